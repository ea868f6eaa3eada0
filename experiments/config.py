"""The options of a training run. Imports nothing heavy: ``--help`` answers at once."""

import dataclasses
from collections.abc import Iterable

from simple_parsing import flag

from experiments import reach_options
from experiments.config_checks import check_values

# Of what a run folder's config means. 2: schedule_free_adamw is the published optimizer, and not
# optax's; multistep counts steps, not whole epochs. 3: momentum is the b1 of adam and adamw.
FORMAT = 3


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train a network with a local learning rule, or with backpropagation."""

    dataset: str = "cifar10"
    """Data set: cifar10, cifar100, digits, fashion_mnist, image_folder, imagenette, mnist,
    tiny_imagenet, visual_wake_words; your own: package.module:function [default: the command's;
    cifar10 of experiments.run]."""
    preset: str | None = None
    """Other values for what is not given here: airbench: the 94 %% CIFAR-10 speed-run's network,
    optimizer, schedule and augmentation [default: the published recipe]."""
    rule: str = "lls_mxm"
    """Learning rule: lls, lls_m, lls_mxm, lls_mxm_reduced, lls_centered, lls_random,
    lls_m_random, lls_mxm_random, local_classifier, predsim, contrastive, decoupled, auglocal,
    infopro, mono_forward, deeper_forward, distance_forward; a baseline: bp, dfa, drtp; your own:
    package.module:function; or one of these a block, joined by commas."""
    model: str = "small_conv"
    """Network: small_conv, small_conv_l, vgg8, vgg11, mobilenet_v1, mobilenet_v1_small, vgg8b,
    vgg11b, resnet32, resnet110, airbench; your own: package.module:function."""
    width: float = 1.0
    """Factor of the network's published widths, like 0.5 or 2."""
    groups: str | None = None
    """Blocks that share one local loss, like 2,2; with the classifier in the last one if they add
    up to one more than there are blocks [default: each block by itself]."""
    reach: reach_options.TypedReach = reach_options.one(1)
    """Blocks that a local loss teaches: its own and N - 1 below it; the classifier counts as the
    block after the last; or one number for the loss of each block and at last the classifier's,
    like 1,2,2,1,1. A local rule only."""
    epochs: int = 100
    """Passes over the training images."""
    batch_size: int = 128
    """Images a training step; an epoch's last partial batch is dropped."""
    eval_batch_size: int = 500
    """Images a step of evaluation; changes speed and memory only."""
    learning_rate: float = 5e-3
    """Step size of the optimizer."""
    optimizer: str = "schedule_free_adamw"
    """schedule_free_adamw: the published one; optax_schedule_free_adamw, whose average weighs the
    first steps like all others; schedule_free_sgd, adamw, adam, sgd, or muon:
    Muon for the blocks' kernels, which keep their norm, and adamw for the rest; your own:
    package.module:function."""
    momentum: float = 0.9
    """Momentum of sgd and muon, b1 of adam and adamw, and the averaging weight b1 of the
    schedule-free optimizers."""
    other_learning_rate: float | None = None
    """Of what is no kernel of a block, with --optimizer muon [default: 0.01]."""
    weight_decay: float = 0.0
    """Decay of the weights: decoupled for the adamw kinds; for muon a step's share of what is no
    kernel, at the full rate; L2 for the others."""
    schedule: str = "constant"
    """Of the learning rate: constant; multistep: a tenth after 50 %% and again after 75 %% of the
    epochs; cosine, linear: falling to nothing at the end; plateau: a tenth after 5 epochs with no
    lower training loss, by block for a local rule."""
    warmup_epochs: int = 0
    """Epochs in which the learning rate rises from nothing; not with --schedule plateau."""
    clip_norm: float | None = None
    """Largest norm of a gradient, by block for a local rule [default: any]."""
    patience: int | None = None
    """Stop after so many epochs without a better accuracy [default: never]."""
    basis_rows: int | None = None
    """Rows of the basis of lls_mxm_reduced [default: the model's published number] and of
    lls_centered [default: 100, or the classes if they are more]."""
    auxiliary_depth: int | None = None
    """Blocks of auglocal's auxiliary network at the first block [default: 2]."""
    feedback_sign: bool = flag(default=False, negative_prefix="--no-")
    """dfa feeds back the sign of the output's error alone."""
    waveform: str | None = None
    """Of the periodic basis: square or cosine [default: the rule's own, square]."""
    temperature: float | None = None
    """Divides the logits of the local losses [default: the rule's own; 0.5; 0.1 of contrastive,
    deeper_forward and distance_forward]."""
    label_smoothing: float | None = None
    """Share of a local loss's target that is spread evenly over the classes, in [0, 1) [default:
    the rule's own, 0]."""
    classifier_smoothing: float = 0.0
    """Likewise of the classifier's loss."""
    dropout: float = 0.0
    """Rate of the dropout after each pooling between blocks, in [0, 1)."""
    augmentation: str = "flip"
    """none; flip: left to right; crop: with 4 pixels of padding; flip_crop; flip_erase: and random
    erasing; full: all three; alternating_flip: each image mirrored in every other epoch;
    alternating_flip_translate: and moved by up to 2 pixels; alternating_flip_translate_cutout: and
    without a random square of 8 pixels a side."""
    test_views: str = "none"
    """Evaluate each epoch once more, by the mean over views of a test image: flip: it and its
    mirror image; flip_translate: and those moved by a pixel, as the speed-runs do; none."""
    precision: str = "float32"
    """Of the activations: float32 or bfloat16, which is faster on CPUs with AMX. Parameters,
    statistics and losses are float32."""
    kernels: str = "auto"
    """What computes the local losses: auto: on a GPU what whole steps of this run are fastest with,
    measured when it starts, elsewhere xla; xla; split; pallas; or triton."""
    loop: str = "auto"
    """dispatch: one launch a step; scan: many steps a launch, with the images on the device; auto:
    scan on GPUs and TPUs, dispatch on CPUs, whose loops run convolutions on one thread."""
    remat: int | None = None
    """Do not keep a convolution's output of more than N MiB: compute it again, in slices of the
    batch; 0 keeps all but, with --reach 2 or more or in a group, what is cheap for a CPU to compute
    again: that of an image's own convolution; a local rule on its pooled activation only
    [default: 0]."""
    slice: int | None = None
    """Compute the gradients of a convolution whose output has more than N MiB, and what they come
    from, in slices of the batch, which takes less memory; nothing is computed again; 0 never; a
    local rule on its pooled activation only [default: 2, in about 8 slices at most, on CPUs; 0
    elsewhere and with --data-parallel]."""
    pipeline: int | None = None
    """Put consecutive blocks on N devices, which learn at the same time; a local rule only."""
    stages: str | None = None
    """Units of each device of --pipeline, blocks and at last the classifier, like 2,3 [default:
    measured, and balanced]."""
    data_parallel: int | None = None
    """Share each batch out among N devices."""
    coordinator: str | None = None
    """Share each batch out among the devices of several processes, on one machine or more, all of
    which run this command: HOST:PORT at which process 0 listens, with --num-processes and
    --process-id; or auto: as the cluster tells (Slurm, Open MPI, Kubernetes)."""
    num_processes: int | None = None
    """How many processes connect at --coordinator."""
    process_id: int | None = None
    """Which of them this is, from 0; process 0 writes the run's files."""
    seed: int = 0
    """Of every random draw of the run."""
    deterministic: bool = flag(default=False, negative_prefix="--no-")
    """On a GPU: the same bits whenever the run is resumed. XLA leaves out algorithms that add in
    any order, and what it has compiled, with what it chose, stays in the run's folder. A CPU needs
    it not."""
    train_examples: int | None = None
    """Use only the first N training images [default: all]."""
    validation_examples: int | None = None
    """Hold out the last N training images, and choose the best epoch by them [default: none; it is
    chosen by the test images]."""
    eval_examples: int | None = None
    """Use only the first N test images [default: all]."""
    data_dir: str | None = None
    """Folder of prepared data sets [default: $TFDS_DATA_DIR or ~/tensorflow_datasets]."""
    data_on_device: str = "auto"
    """Where the images are kept: auto: on the device up to 2 GiB, on the host beyond; yes; or no:
    on the host, read ahead. The batches are the same."""
    measure: str | None = None
    """What to measure of each block after an epoch, joined by commas: alignment: the cosine of its
    gradient with backpropagation's; norms: of both gradients; probes: how well a linear classifier
    reads its activation; heads: how well its own loss tells the classes apart [default: nothing].
    """
    measure_every: int = 1
    """Epochs from one measurement to the next; the last epoch is measured too."""
    log: str | None = None
    """Where the epochs' records go beside metrics.jsonl, joined by commas: tensorboard: into the
    run's folder; mlflow, under LLS-DNN's names; wandb [default: nowhere]."""
    profile: int | None = None
    """Trace N training steps, after those that compile, into the run's folder, for Perfetto or
    TensorBoard [default: none]."""
    workdir: str | None = None
    """Folder of this run; the same command resumes it [default:
    runs/DATASET-MODEL-RULE-sSEED, and -groupsN+N, -reachN, -OPTIMIZER where they are others]."""
    checkpoint_every: int = 0
    """Steps between checkpoints inside an epoch, and each epoch's end; 0: ends of epochs only,
    those within 20 seconds of a checkpoint left out."""
    progress: bool = flag(default=True, negative_prefix="--no-")
    """Show a progress bar where there is a terminal."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming option and value, for what no run could use."""
        check_values(vars(self))
        self.group_sizes()
        self.stage_sizes()

    @property
    def shares_batches(self) -> bool:
        """Whether several devices work on each batch."""
        return bool(self.data_parallel or self.coordinator)

    def run_folder(self) -> str:
        """The folder of this run."""
        name = f"{self.dataset}-{self.model}-{self.rule}-s{self.seed}"
        # Options that one tries out beside the default; runs of both have room.
        sizes = self.group_sizes()
        name += f"-groups{','.join(map(str, sizes))}" if sizes else ""
        name += f"-reach{self.reach}" if self.reach != 1 else ""
        name += f"-{self.optimizer}" if self.optimizer != TrainConfig.optimizer else ""
        return self.workdir or f"runs/{folder_name(name)}"

    def without(self, names: Iterable[str]) -> "TrainConfig":
        """The same run with some options as they are where nobody gives them.

        Args:
            names: of fields.
        """
        return dataclasses.replace(self, **{name: getattr(TrainConfig, name) for name in names})

    def measures(self) -> tuple[str, ...]:
        """What is measured after epochs, if anything was asked for."""
        return tuple(self.measure.split(",")) if self.measure is not None else ()

    def trackers(self) -> tuple[str, ...]:
        """Where records go, beside metrics.jsonl."""
        return tuple(self.log.split(",")) if self.log is not None else ()

    def group_sizes(self) -> tuple[int, ...] | None:
        """Blocks a group, if any were asked for; ValueError where they are no numbers."""
        return _sizes("--groups", self.groups)

    def stage_sizes(self) -> tuple[int, ...] | None:
        """Units a stage, if any were asked for; ValueError where they are no numbers."""
        return _sizes("--stages", self.stages)


def folder_name(name: str) -> str:
    """A folder's name of one that may hold a user's own parts.

    >>> folder_name("digits-mynet:make-lls,lls_m-s0")
    'digits-mynet.make-lls+lls_m-s0'
    """
    return name.replace(":", ".").replace(",", "+").replace("/", ".")


def _sizes(name: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} is {text!r}; expected numbers, like 2,2.") from None
