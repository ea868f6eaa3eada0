"""The options of a training run. Imports nothing heavy: ``--help`` answers at once."""

import dataclasses

from simple_parsing import field, flag

SCHEDULES = ("constant", "multistep", "cosine", "linear", "plateau")
VIEWS = ("none", "flip", "flip_translate")
PRECISIONS = ("float32", "bfloat16")
LOOPS = ("auto", "dispatch", "scan")
ON_DEVICE = ("auto", "yes", "no")
MEASURES = ("alignment", "norms", "probes", "heads")
KERNELS = ("auto", "xla", "split", "pallas", "triton")
# Rules whose blocks have no losses of their own.
BASELINES = ("bp", "dfa", "drtp")

# Averages of the weights take the place of a falling learning rate.
AVERAGING = ("schedule_free_adamw", "optax_schedule_free_adamw", "schedule_free_sgd")
OPTIMIZERS = (*AVERAGING, "adamw", "adam", "sgd", "muon")
# Schedules that spread over all epochs: another number of them is another run from the start.
SPREADING = ("multistep", "cosine", "linear")
# Of what a run folder's config means. 2: schedule_free_adamw is the published optimizer, and not
# optax's; multistep counts steps, not whole epochs.
FORMAT = 2


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train a network with a local learning rule, or with backpropagation."""

    dataset: str = field(default="cifar10", cmd=False)

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
    vgg11b, resnet32, resnet110, airbench."""
    width: float = 1.0
    """Factor of the network's published widths, like 0.5 or 2."""
    groups: str | None = None
    """Blocks that share one local loss, like 2,2; with the classifier in the last one if they add
    up to one more than there are blocks [default: each block by itself]."""
    reach: int = 1
    """Blocks that a local loss teaches: its own and N - 1 below it; the classifier counts as the
    block after the last. A local rule only, and not with --pipeline."""
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
    first steps like all others; schedule_free_sgd, adamw, adam, sgd (with --momentum), or muon:
    Muon for the blocks' kernels, which keep their norm, and adamw for the rest."""
    momentum: float = 0.9
    """Momentum of sgd and muon, and the averaging weight b1 of the schedule-free optimizers."""
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
    alternating_flip_translate: and moved by up to 2 pixels."""
    test_views: str = "none"
    """Evaluate each epoch once more, by the mean over views of a test image: flip: it and its
    mirror image; flip_translate: and those moved by a pixel, as the speed-runs do; none."""
    precision: str = "float32"
    """Of the activations: float32 or bfloat16. Parameters, statistics and losses are float32."""
    kernels: str = "auto"
    """What computes the local losses: auto: on a GPU what whole steps of this run are fastest with,
    measured when it starts, elsewhere xla; xla; split; pallas; or triton."""
    loop: str = "auto"
    """dispatch: one launch a step; scan: many steps a launch, with the images on the device; auto:
    scan on GPUs and TPUs, dispatch on CPUs, whose loops run convolutions on one thread."""
    remat: int | None = None
    """Do not keep a convolution's output of more than N MiB: compute it again, in slices of the
    batch; 0 keeps all; a local rule on its pooled activation only [default: 0]."""
    slice: int | None = None
    """With --reach: compute what follows a convolution's output of more than N MiB, and its
    gradients, in slices of the batch, which is slower and takes less memory; nothing is computed
    again; 0 never [default: 0]."""
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
    workdir: str | None = None
    """Folder of this run; the same command resumes it [default: runs/DATASET-MODEL-RULE-sSEED]."""
    checkpoint_every: int = 0
    """Steps between checkpoints inside an epoch, and each epoch's end; 0: ends of epochs only,
    those within 20 seconds of a checkpoint left out."""
    progress: bool = flag(default=True, negative_prefix="--no-")
    """Show a progress bar where there is a terminal."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming option and value, for what no run could use."""
        for name, smallest in (
            ("reach", 1),
            ("epochs", 1),
            ("batch_size", 1),
            ("eval_batch_size", 1),
            ("train_examples", 1),
            ("eval_examples", 1),
            ("validation_examples", 1),
            ("warmup_epochs", 0),
            ("measure_every", 1),
            ("patience", 1),
            ("auxiliary_depth", 1),
            ("checkpoint_every", 0),
            ("remat", 0),
            ("slice", 0),
            ("pipeline", 1),
            ("data_parallel", 1),
            ("num_processes", 1),
            ("process_id", 0),
            ("seed", 0),
            ("weight_decay", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{option(name)} is {value}; it must be at least {smallest}.")
        for name in ("learning_rate", "width", "other_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{option(name)} is {value}; it must be positive.")
        if self.other_learning_rate is not None and self.optimizer != "muon":
            raise ValueError(
                f"--other-learning-rate {self.other_learning_rate} is of no use to --optimizer "
                f"{self.optimizer}; leave it out."
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"--clip-norm is {self.clip_norm}; it must be positive.")
        if self.warmup_epochs and self.schedule == "plateau":
            raise ValueError(
                f"--warmup-epochs {self.warmup_epochs} does not go with --schedule plateau; use "
                "another schedule."
            )
        if not 0 <= self.momentum < 1:
            raise ValueError(f"--momentum is {self.momentum}; it must lie in [0, 1).")
        for name, known in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
            ("kernels", KERNELS),
            ("data_on_device", ON_DEVICE),
            ("loop", LOOPS),
            ("test_views", VIEWS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}; expected one of {', '.join(known)}."
                )
        self.group_sizes()
        self.stage_sizes()
        if unknown := [name for name in self.measures() if name not in MEASURES]:
            raise ValueError(
                f"--measure has {unknown[0]!r}; expected some of {', '.join(MEASURES)}, joined by "
                "commas."
            )
        if self.measure_every > 1 and not self.measure:
            raise ValueError(
                f"--measure-every {self.measure_every} is given without --measure; say what to "
                "measure."
            )
        self._check_processes()
        sharing = "--coordinator" if self.coordinator else "--data-parallel"
        if self.shares_batches and self.remat:
            raise ValueError(
                f"--remat {self.remat} does not go with {sharing}, whose batches are cut "
                "already; use one of them."
            )
        if self.slice and (self.reach == 1 or self.remat or self.shares_batches):
            beside = f"--remat {self.remat}" if self.remat else sharing
            raise ValueError(
                f"--slice {self.slice} "
                + (
                    "needs a --reach of 2 or more."
                    if self.reach == 1
                    else f"does not go with {beside}; leave one of them out."
                )
            )
        if self.pipeline and self.shares_batches:
            raise ValueError(f"--pipeline and {sharing} do not go together; choose one.")
        if self.pipeline and self.reach > 1:
            raise ValueError(
                f"--reach {self.reach} does not go with --pipeline, whose blocks wait for nothing "
                "from above; leave one of them out."
            )
        if self.deterministic and self.coordinator:
            raise ValueError(
                "--deterministic does not go with --coordinator, each of whose processes chooses "
                "its algorithms; leave one of them out."
            )
        if self.stages is not None and self.pipeline is None:
            raise ValueError("--stages is given without --pipeline; give the number of devices.")
        if self.schedule == "plateau" and self.optimizer in AVERAGING:
            raise ValueError(
                f"--schedule plateau does not go with --optimizer {self.optimizer}, which averages "
                "the weights instead; use --schedule constant, or another optimizer."
            )

    def _check_processes(self) -> None:
        if self.coordinator is None:
            for name in ("num_processes", "process_id"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(
                        f"{option(name)} {value} is given without --coordinator; give HOST:PORT of "
                        "process 0."
                    )
        elif self.coordinator != "auto" and None in (self.num_processes, self.process_id):
            raise ValueError(
                f"--coordinator {self.coordinator} needs --num-processes and --process-id; give "
                "both, or --coordinator auto on a cluster."
            )

    @property
    def shares_batches(self) -> bool:
        """Whether several devices work on each batch."""
        return bool(self.data_parallel or self.coordinator)

    def run_folder(self) -> str:
        """The folder of this run."""
        rule = self.rule.replace(":", ".").replace(",", "+").replace("/", ".")
        return self.workdir or f"runs/{self.dataset}-{self.model}-{rule}-s{self.seed}"

    def measures(self) -> tuple[str, ...]:
        """What is measured after epochs, if anything was asked for."""
        return tuple(self.measure.split(",")) if self.measure is not None else ()

    def group_sizes(self) -> tuple[int, ...] | None:
        """Blocks a group, if any were asked for; ValueError where they are no numbers."""
        return _sizes("--groups", self.groups)

    def stage_sizes(self) -> tuple[int, ...] | None:
        """Units a stage, if any were asked for; ValueError where they are no numbers."""
        return _sizes("--stages", self.stages)


def _sizes(name: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} is {text!r}; expected numbers, like 2,2.") from None


def check_reaches(reaches: list[int]) -> None:
    """Raise ValueError unless there are reaches to compare, each a number of blocks."""
    if not reaches or min(reaches) < 1:
        raise ValueError(f"--reach is {reaches}; expected one or more, each at least 1.")


def option(name: str) -> str:
    """An option as it is typed: ``batch_size`` is ``--batch-size``."""
    return "--" + name.replace("_", "-")
