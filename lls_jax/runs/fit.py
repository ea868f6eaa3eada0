"""The whole of training, from Python: data, epochs, evaluation, checkpoints, resuming."""

import contextlib
import pathlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lls_jax import platforms, processes
from lls_jax.arguments import whole_number
from lls_jax.data import DatasetSpec, Split, batches
from lls_jax.data.arrays import describe, to_split
from lls_jax.models import Network
from lls_jax.placement import Execution, single
from lls_jax.rules import Rule
from lls_jax.runs import callbacks as listening
from lls_jax.runs import checks, epoch_sums, kernels
from lls_jax.runs import folder as folders
from lls_jax.runs import source as sources
from lls_jax.runs.loop import train as train_run
from lls_jax.runs.resuming import check_lost_settings
from lls_jax.runs.run import Compiled, FitResult, Run
from lls_jax.runs.views import check_views
from lls_jax.steps.loop import make_loop, make_statistics_loop
from lls_jax.steps.reach_schedule import check_reach
from lls_jax.training import Optimizer, Reach

# Larger ones repeat smaller ones: jax.random.key takes 32 bits.
_SEEDS = 2**32


class _Warnings(listening.Callback):
    """Passes a run's warnings on to Python's."""

    def on_warning(self, message: str) -> None:
        warnings.warn(message, stacklevel=2)


def _reach_setting(reach: int | tuple[int, ...]) -> dict[str, Any]:
    """What a folder has of a reach, as JSON gives it back; folders of before it was there: 1."""
    if reach == 1:
        return {}
    return {"reach": [*reach] if isinstance(reach, tuple) else reach}


def fit(
    model: Network,
    rule: Rule,
    tx: Optimizer,
    *,
    train: sources.Arrays | Iterable[Any] | Callable[[int], Iterable[Any]],
    test: sources.Arrays | None = None,
    validation: sources.Arrays | int | None = None,
    epochs: int,
    batch_size: int = 128,
    eval_batch_size: int = 500,
    test_views: str = "none",
    steps_per_epoch: int | None = None,
    augmentation: str = "none",
    spec: DatasetSpec | None = None,
    seed: int = 0,
    workdir: str | pathlib.Path | None = None,
    callbacks: Sequence[listening.Callback] = (),
    early_stopping: int | None = None,
    checkpoint_every: int = 0,
    reach: Reach = 1,
    remat_above: int | None = None,
    slice_above: int | None = None,
    execution: Execution | None = None,
    steps_a_launch: Literal["auto", "one", "many"] = "auto",
    settings: folders.Settings | None = None,
    should_stop: Callable[[], int] = lambda: 0,
) -> FitResult:
    """Train a network to its end, epoch by epoch, and evaluate it after each.

    The same arguments give the same numbers; with a `workdir` the same call resumes a run that was
    stopped or killed, to the bit, and a larger number of epochs extends one.

    Args:
        model: from :func:`lls_jax.models.make`, or a :class:`lls_jax.models.Network` of your own.
        rule: from :func:`lls_jax.rules.make`, or your own. On a GPU what computes its losses is
            measured first, for some seconds, where the rule does not name it
            (:mod:`lls_jax.runs.kernels`).
        tx: any optax transformation, :func:`lls_jax.optimizers.schedule_free_adamw` for instance;
            or one a block, ``{name: tx}`` or ``tx(name)``, with the names ``block_0``, ...,
            ``classifier``. ``optax.chain(optax.clip_by_global_norm(c), tx)`` clips by block.
        train: ``(images, labels)``: images uint8 ``[count, height, width, channels]``, or floats
            ``[count, ...]`` that are normalised already; labels integers ``[count]``. Or batches
            ``{"image", "label"}`` of such floats, all of one size: a list or a data loader, which
            is gone over once an epoch; a function of the epoch's number, from 0, that gives such;
            or an iterator that does not end (one that cannot be resumed exactly).
        test: images and labels that each epoch is evaluated on, of the shape of the training
            examples, and without a `spec` bytes or floats as they are; None for none.
        validation: likewise, and the best epoch is chosen by them; or how many of the last training
            examples are held out for it. None: the best epoch is chosen by the test images, and
            their accuracy is no honest estimate of that epoch's on new ones.
        epochs: passes over the training examples, at least 1.
        batch_size: examples a step, of arrays; an epoch's last partial batch is dropped.
        eval_batch_size: examples a step of evaluation; changes speed and memory only.
        test_views: ``"flip"`` or ``"flip_translate"``: evaluate each epoch once more, by the mean
            over views of an image (:mod:`lls_jax.runs.views`); its records have
            ``test_views_accuracy`` beside ``test_accuracy``.
        steps_per_epoch: of training batches whose number is not known.
        augmentation: of :func:`lls_jax.data.batches.make_augment`; of images in arrays.
        spec: how uint8 images are normalised and cut; None: by the mean and the deviation of the
            training images, and not cut.
        seed: of every random draw of the run.
        workdir: the run's own folder: settings, metrics.jsonl, checkpoints; None to write nothing.
            An optimizer cannot be compared: whoever resumes has to give the same one.
        callbacks: are told of each step, epoch and checkpoint, and may stop the run. Where none has
            an `on_warning`, warnings are Python's.
        early_stopping: epochs without a better accuracy after which the run stops; None for never.
        checkpoint_every: steps between checkpoints inside an epoch; 0: ends of epochs only, those
            within 20 seconds of a checkpoint left out.
        reach: as of :func:`lls_jax.training.make_train_step`; an `execution` has its own, and
            measurements and settings are told this one.
        remat_above: likewise.
        slice_above: likewise.
        execution: where steps run, from :mod:`lls_jax.placement`; None for the default device.
        steps_a_launch: ``"many"``: a compiled loop over steps, with the images on the device;
            ``"auto"``: where such loops are fast (:mod:`lls_jax.platforms`).
        settings: what the folder's config.json has, and who may go on with it; None: the arguments.
        should_stop: is asked before each step; a number other than 0 stops the run, all saved.

    Returns:
        The state, the state to predict with, and a record an epoch.

    Raises:
        ValueError: an argument is wrong.
        lls_jax.errors.UserError: the folder belongs to another run, or a loss is not finite.

    >>> import numpy as np, optax
    >>> from lls_jax import models, rules
    >>> rng = np.random.default_rng(0)
    >>> images = rng.integers(0, 256, (32, 8, 8, 3), np.uint8)
    >>> labels = rng.integers(0, 4, 32)
    >>> model = models.make("small_conv", num_classes=4)
    >>> rule = rules.make("lls_mxm", num_classes=4)
    >>> result = fit(model, rule, optax.sgd(0.1), train=(images, labels), epochs=2, batch_size=16)
    >>> [record["epoch"] for record in result.records], int(result.state.step)
    ([1, 2], 4)
    """
    reach = check_reach(model, rule, reach)
    check_views("test_views", test_views)
    epochs = whole_number("epochs", epochs, 1)
    batch_size = whole_number("batch_size", batch_size, 1)
    eval_batch_size = whole_number("eval_batch_size", eval_batch_size, 1)
    checkpoint_every = whole_number("checkpoint_every", checkpoint_every, 0)
    seed = whole_number("seed", seed, 0)
    if steps_per_epoch is not None:
        steps_per_epoch = whole_number("steps_per_epoch", steps_per_epoch, 1)
    held_out: int | None = None
    if isinstance(validation, int | np.integer):
        held_out, validation = whole_number("validation", validation, 1), None
    for name, wanted, is_asked in (
        ("test_views", test_views, test_views != "none"),
        ("early_stopping", early_stopping, early_stopping is not None),
    ):
        if is_asked and test is None and validation is None and held_out is None:
            raise ValueError(
                f"`{name}` is {wanted!r}, and there are neither `test` nor `validation` examples "
                "to evaluate: give some, or leave it out."
            )
    listeners = [*callbacks]
    if all(type(one).on_warning is listening.Callback.on_warning for one in listeners):
        # Nobody would hear of a damaged checkpoint.
        listeners.append(_Warnings())
    if early_stopping is not None:
        patience = whole_number("early_stopping", early_stopping, 1)
        listeners.append(listening.EarlyStopping(patience))
    sharding = None if execution is None else execution.sharding
    if seed >= _SEEDS:
        raise ValueError(f"`seed` is {seed}; it must be at least 0, and less than {_SEEDS}.")
    model_key, data_key = jax.random.split(jax.random.key(seed))
    evaluation_sets: dict[str, Any] = {}
    dtypes: dict[str, Any] = {}
    if isinstance(train, tuple | Split | batches.DeviceSplit):
        if steps_per_epoch is not None:
            raise ValueError(
                f"`steps_per_epoch` is {steps_per_epoch}, and the training examples are arrays, of "
                "which an epoch is all: leave it out, or give batches."
            )
        examples = _from_user("train", train)
        if held_out is not None:
            examples, evaluation_sets["validation"] = sources.hold_out(examples, held_out)
        dtypes["train"] = examples.images.dtype
        own_spec = spec or describe(examples, model.num_classes)
        checks.check_examples("train", examples, own_spec, model.num_classes)
        examples = sources.on_each_device(examples, sharding)
        source = sources.from_arrays(
            examples, own_spec, augmentation, batch_size, data_key, sharding
        )
        example = jnp.zeros((1, *own_spec.input_shape))
        if model.whitening is not None:
            example = batches.first_images(own_spec, examples, model.whitening.images)
    else:
        if held_out is not None:
            raise ValueError("`validation` is a number, and the training examples come in batches.")
        if augmentation != "none":
            raise ValueError(f"`augmentation` is {augmentation!r}; batches are taken as they are.")
        source, first = sources.from_batches(train, steps_per_epoch, sharding)
        checks.check_classes("a training batch", first["label"], model.num_classes)
        example = first["image"]
        dtypes["train"] = example.dtype
        # Of floats, which are normalised already.
        own_spec = spec or describe(_on_host(example), model.num_classes)
    checks.check_of_images("test_views", test_views, own_spec.input_shape)
    model.check_image((source.batch_size, *example.shape[1:]))
    for name, given in (("validation", validation), ("test", test)):
        if given is not None:
            evaluation_sets[name] = _from_user(name, given)
    if spec is None:
        dtypes |= {name: examples.images.dtype for name, examples in evaluation_sets.items()}
        checks.check_kinds(dtypes)
    for name, examples in evaluation_sets.items():
        checks.check_examples(name, examples, own_spec, model.num_classes)
        evaluation_sets[name] = sources.on_each_device(examples, sharding)
    if settings is None:
        settings = folders.Settings(
            {
                "format": 1,
                "made_by": "lls_jax.fit",
                "model": folders.describe(model),
                "rule": folders.describe(rule),
                "epochs": epochs,
                # Of batches that somebody else makes it is theirs.
                "batch_size": source.batch_size,
                "augmentation": augmentation,
                **_reach_setting(reach),
                "seed": seed,
                "validation": held_out,
            }
        )
    options = reach, remat_above, slice_above
    work = kernels.Work(
        model, rule, tx, example.shape[1:], source.batch_size, *options, execution=execution
    )
    choice = kernels.choose(work, None if workdir is None else pathlib.Path(workdir))
    if choice is not None:
        rule = kernels.with_default(rule, choice.implementation)
        for listener in listeners:
            listener.on_kernels(choice)
    if execution is None:
        execution = single(model, rule, tx, remat_above, reach, slice_above)
    elif choice is not None and execution.with_rule is not None:
        execution = execution.with_rule(rule)
    run = Run(
        model=model,
        rule=rule,
        tx=tx,
        execution=execution,
        compiled=_compiled(steps_a_launch, model, execution, source, own_spec, augmentation),
        source=source,
        example=example,
        spec=own_spec,
        evaluation_sets=evaluation_sets,
        key=model_key,
        epochs=epochs,
        eval_batch_size=eval_batch_size,
        test_views=test_views,
        checkpoint_every=checkpoint_every,
        reach=reach,
        settings=settings.values,
        callbacks=listeners,
        should_stop=should_stop,
    )
    if workdir is None:
        return train_run(run, None)
    folder = pathlib.Path(workdir)
    with contextlib.ExitStack() as stack:
        if processes.is_first():
            stack.enter_context(folders.claim(folder))
        processes.wait_for_all("the folder is claimed")
        folders.check_settings(folder, settings)
        check_lost_settings(folder, settings)
        if processes.is_first():
            folders.write_settings(folder, settings)
            folders.write_environment(folder)
            if choice is not None:
                kernels.keep(choice, folder)
        processes.wait_for_all("the settings are written")
        folders.check_settings(folder, settings, must_exist=True)
        return train_run(run, folder)


def _from_user(name: str, arrays: sources.Arrays) -> Any:
    """Images and labels where they are best kept; a split is kept where its owner has put it."""
    examples = to_split(name, arrays)
    return sources.place(examples) if examples is not arrays else examples


def _on_host(images: jax.Array) -> Split:
    return Split(np.asarray(images), np.zeros(images.shape[0], np.int32))


def _compiled(
    wanted: str,
    model: Network,
    execution: Execution,
    source: sources.Source,
    spec: DatasetSpec,
    augmentation: str,
) -> Compiled | None:
    """Launches of many batches, where they are wanted and there can be some; else None."""
    if wanted not in ("auto", "one", "many"):
        raise ValueError(f"`steps_a_launch` is {wanted!r}; expected 'auto', 'one' or 'many'.")
    step, data = execution.train_step, source.on_devices
    can_be = step is not None and data is not None
    is_fast = platforms.choices(jax.default_backend()).compiled_loops
    if wanted == "one" or (wanted == "auto" and not (can_be and is_fast)):
        return None
    if step is None or data is None:
        raise ValueError(
            "`steps_a_launch` is 'many', which needs the images on the device: give "
            "`lls_jax.data.batches.to_device(...)`, and no pipeline as execution."
        )
    of_batches = (spec, augmentation, source.batch_size, execution.sharding)
    return Compiled(
        make_loop(step, epoch_sums.add, *of_batches),
        make_statistics_loop(model, *of_batches),
        data,
    )
