"""From a config to data, model, rule and optimizer: what training and evaluation share."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments import optimizers
from experiments import totals as training_totals
from experiments.command_line import UserError
from experiments.config import TrainConfig, option
from lls_jax import data, loop, models, parallel, processes, rules, training
from lls_jax.data import batches, prepare, storage
from lls_jax.models import Network
from pallas_kernels import local_loss

_MOST_BYTES_ON_DEVICE = 2**31


class Task(NamedTuple):
    """A network, its rule and the images they are for."""

    spec: data.DatasetSpec
    model: Network
    rule: rules.Rule


class Run(NamedTuple):
    """All that a training run works with, the data on the device."""

    task: Task
    tx: optax.GradientTransformation
    execution: parallel.Execution
    loop: Callable[..., tuple[training.TrainState, Any]] | None
    train: batches.DeviceSplit | data.Split
    test: batches.DeviceSplit | data.Split
    read: batches.Reader
    steps_per_epoch: int


def make_task(config: TrainConfig) -> Task:
    """Data set's entry, model and rule.

    Raises:
        UserError: an unknown name, an option out of range, images too small for the model.
    """
    with _mendable():
        spec = storage.resolve(data.get_spec(config.dataset), data_folder(config))
        task = _make_task(config, spec)
        task.model.check_image((1, *spec.input_shape))
        return task


def check_task(config: TrainConfig) -> None:
    """What can be said of a config before its data set is there.

    Raises:
        UserError: an unknown name, or an option out of range.
    """
    with _mendable():
        spec = data.get_spec(config.dataset)
        if not spec.is_resolved:
            # Its classes are known when it is prepared; any will do.
            spec = dataclasses.replace(spec, class_names=("one", "other"))
        _make_task(config, spec)
        batches.make_augment(spec, config.augmentation)


@contextlib.contextmanager
def _mendable() -> Iterator[None]:
    """What is wrong about a config is its owner's to mend."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def _make_task(config: TrainConfig, spec: data.DatasetSpec) -> Task:
    model = models.make(
        config.model,
        num_classes=spec.num_classes,
        dropout=config.dropout,
        dtype=jnp.dtype(config.precision),
    )
    if (sizes := config.group_sizes()) is not None:
        model = model.grouped(sizes)
    names = config.rule.split(",")
    given = _rule_options(config, names)
    made = tuple(_make_rule(name, given, spec, model) for name in names)
    if len(made) == 1:
        return Task(spec, model, made[0])
    rule = rules.PerBlock(made)  # type: ignore[arg-type]
    _check_rules(rule, model)
    return Task(spec, model, rule)


# Options of rules, by the fields of a config that hold them.
_RULE_OPTIONS = {
    "waveform": "waveform",
    "temperature": "temperature",
    "label_smoothing": "label_smoothing",
    "basis_rows": "basis_rows",
    "kernels": "implementation",
    "feedback_sign": "sign",
}


def _rule_options(config: TrainConfig, names: list[str]) -> dict[str, Any]:
    """The options that are given, each of use to one of the rules at least."""
    useful = frozenset().union(*map(rules.options_of, names))
    given = {}
    for field, name in _RULE_OPTIONS.items():
        value = getattr(config, field)
        if value is None or value is False or (field == "kernels" and value == "auto"):
            continue
        if name not in useful:
            raise ValueError(
                f"{option(field)} {value} is of no use to --rule {config.rule}; leave it out."
            )
        given[name] = value
    return given


def _make_rule(
    name: str, given: dict[str, Any], spec: data.DatasetSpec, model: Network
) -> rules.Rule:
    # Each of several rules takes the options that it has a use for.
    takes = rules.options_of(name)
    options = {option: value for option, value in given.items() if option in takes}
    if name == "lls_mxm_reduced":
        options.setdefault("basis_rows", model.basis_rows)
    return rules.make(name, num_classes=spec.num_classes, **options)


def _check_rules(rule: rules.PerBlock, model: Network) -> None:
    for one in rule.rules:
        if not rules.has_local_losses(one):
            raise ValueError(
                f"rule {one.name!r} has no local loss and cannot be one of several; give it alone."
            )
    model.local_blocks(rule)


def data_folder(config: TrainConfig) -> pathlib.Path:
    """Where the prepared data sets lie."""
    if config.data_dir is None:
        return storage.default_data_dir()
    return pathlib.Path(config.data_dir)


def prepare_data(config: TrainConfig) -> None:
    """Download the data set where it is missing and can be had."""
    try:
        spec = data.get_spec(config.dataset)
    except ValueError as error:
        raise UserError(str(error)) from error
    folder = data_folder(config)
    if spec.downloads and not storage.is_prepared(spec, folder):
        print(f"data set {spec.name!r} is not in {folder}; downloading it", flush=True)
        prepare.prepare(spec, folder, progress=config.progress)


def load_split(
    config: TrainConfig, spec: data.DatasetSpec, split: str
) -> batches.DeviceSplit | data.Split:
    """One part of the data set, on the device or, where it is large, on the host."""
    folder = data_folder(config)
    limit = config.train_examples if split == "train" else config.eval_examples
    loaded = data.load(spec, split, folder, limit)
    fits = loaded.images.nbytes <= _MOST_BYTES_ON_DEVICE
    if config.data_on_device == "yes" or (config.data_on_device == "auto" and fits):
        return batches.to_device(loaded)
    return loaded


def _load_splits(config: TrainConfig, spec: data.DatasetSpec) -> list[Any]:
    """Training and test images; of several processes the first decodes what is not decoded yet."""
    splits = []
    for split in ("train", "test"):
        if processes.is_first():
            splits.append(load_split(config, spec, split))
        processes.wait_for_all(f"the {split} images are decoded")
        if not processes.is_first():
            splits.append(load_split(config, spec, split))
    return splits


def make_run(config: TrainConfig) -> Run:
    """Everything that training needs.

    Raises:
        UserError: the config asks for what cannot be.
        lls_jax.data.DatasetError: the data set is missing or damaged.
        pallas_kernels.local_loss.KernelUnavailableError: the kernels asked for cannot run here.
    """
    if config.kernels != "auto":
        local_loss.require(config.kernels)
    # Before anything is downloaded.
    check_task(config)
    if processes.is_first():
        prepare_data(config)
    processes.wait_for_all("the data set is prepared")
    task = make_task(config)
    available = config.train_examples or task.spec.train_size
    if config.batch_size > available:
        raise UserError(
            f"--batch-size is {config.batch_size}, but there are only {available} training images; "
            "use a smaller one."
        )
    steps_per_epoch = available // config.batch_size
    tx = optimizers.make(config, steps_per_epoch)
    execution = _make_execution(config, task, tx)
    read = batches.make_reader(
        task.spec, config.augmentation, config.batch_size, execution.sharding
    )
    train, test = _load_splits(config, task.spec)
    return Run(
        task=task,
        tx=tx,
        execution=execution,
        loop=_make_loop(config, task, tx, train),
        train=train,
        test=test,
        read=read,
        steps_per_epoch=steps_per_epoch,
    )


def remat_above(config: TrainConfig) -> int | None:
    """Bytes above which a convolution's output is computed again; None for never."""
    return (config.remat or 0) * 2**20 or None


def _make_execution(
    config: TrainConfig, task: Task, tx: optax.GradientTransformation
) -> parallel.Execution:
    """How the config wants a step to be executed.

    Raises:
        UserError: there are too few devices, or the config asks for what cannot be together.
    """
    devices = jax.devices()
    wanted = config.pipeline or config.data_parallel or (config.coordinator and len(devices))
    if not wanted:
        return parallel.single(task.model, task.rule, tx, remat_above(config))
    name = "--pipeline" if config.pipeline else "--data-parallel"
    if config.coordinator and wanted != len(devices):
        raise UserError(
            f"{name} is {wanted}, but the {jax.process_count()} processes have {len(devices)} "
            "devices, all of which work; leave it out."
        )
    if wanted > len(devices):
        raise UserError(
            f"{name} is {wanted}, but this machine has {len(devices)} {devices[0].platform} "
            "device(s); use fewer (on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N "
            "makes several of one)."
        )
    devices = devices[:wanted]
    try:
        if config.shares_batches:
            if config.batch_size % wanted:
                raise ValueError(
                    f"--batch-size is {config.batch_size}, which {wanted} devices do not divide."
                )
            return parallel.data_parallel(task.model, task.rule, tx, devices)
        sizes = config.stage_sizes() or _balanced(config, task, tx)
        print(f"stages of {', '.join(map(str, sizes))} units", flush=True)
        return parallel.pipeline(task.model, task.rule, tx, devices, sizes, remat_above(config))
    except ValueError as error:
        raise UserError(str(error)) from error


def _make_loop(
    config: TrainConfig,
    task: Task,
    tx: optax.GradientTransformation,
    train: batches.DeviceSplit | data.Split,
) -> Any:
    """The compiled loop over steps, where the config wants one; else None.

    Raises:
        UserError: the config asks for one where there can be none.
    """
    together = config.pipeline or config.shares_batches
    fits = isinstance(train, batches.DeviceSplit) and not together
    chosen = config.loop
    if chosen == "auto":
        chosen = loop.choose_loop(jax.default_backend()) if fits else "dispatch"
    if chosen == "dispatch":
        return None
    if not fits:
        raise UserError(
            "--loop scan needs the images on one device, without --pipeline, --data-parallel or "
            "--coordinator; use --loop dispatch, or --data-on-device yes."
        )
    step = training.make_train_step(task.model, task.rule, tx, remat_above=remat_above(config))
    return loop.make_loop(
        step, training_totals.add, task.spec, config.augmentation, config.batch_size
    )


def _balanced(config: TrainConfig, task: Task, tx: optax.GradientTransformation) -> tuple[int, ...]:
    """Stages that take about the same time, after a short measurement."""
    key = jax.random.key(0)
    image = jax.random.normal(key, (config.batch_size, *task.spec.input_shape))
    label = jnp.arange(config.batch_size) % task.spec.num_classes
    state = training.create_train_state(task.model, task.rule, tx, key, image)
    seconds = parallel.measure_units(
        task.model,
        task.rule,
        tx,
        state,
        {"image": image, "label": label},
        remat_above=remat_above(config),
    )
    return parallel.partition(seconds, config.pipeline or 1)


def example_image(spec: data.DatasetSpec) -> jax.Array:
    """An image of the right shape, for drawing parameters."""
    return jnp.zeros((1, *spec.input_shape))
