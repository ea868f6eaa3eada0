"""From a config to data, model, rule and optimizer: what training and evaluation share."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments import optimizers
from experiments import totals as training_totals
from experiments.command_line import UserError
from experiments.config import TrainConfig
from lls_jax import data, loop, models, parallel, processes, remat, rules, training
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
    try:
        spec = storage.resolve(data.get_spec(config.dataset), data_folder(config))
        model = models.make(
            config.model,
            num_classes=spec.num_classes,
            dropout=config.dropout,
            dtype=jnp.dtype(config.precision),
        )
        if (sizes := config.group_sizes()) is not None:
            model = model.grouped(sizes)
        made = tuple(_make_rule(config, name, spec, model) for name in config.rule.split(","))
        rule = made[0]
        if len(made) > 1:
            rule = rules.PerBlock(made)  # type: ignore[arg-type]
            _check_rules(rule, model)
        model.check_image((1, *spec.input_shape))
        return Task(spec, model, rule)
    except ValueError as error:
        raise UserError(str(error)) from error


def _implementation(config: TrainConfig) -> str | None:
    """What computes the local losses; None chooses."""
    if config.shares_batches:
        return "xla"
    return None if config.kernels == "auto" else config.kernels


def _make_rule(
    config: TrainConfig, name: str, spec: data.DatasetSpec, model: Network
) -> rules.Rule:
    reduced = name == "lls_mxm_reduced"
    # Each of several rules takes the options that it has a use for.
    several = "," in config.rule
    basis_rows = config.basis_rows
    if reduced and basis_rows is None:
        basis_rows = model.basis_rows
    if several and not reduced:
        basis_rows = None
    return rules.make(
        name,
        num_classes=spec.num_classes,
        waveform=config.waveform,
        temperature=config.temperature,
        label_smoothing=config.label_smoothing,
        basis_rows=basis_rows,
        implementation=_implementation(config),
        sign=config.feedback_sign,
    )


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


def make_run(config: TrainConfig) -> Run:
    """Everything that training needs.

    Raises:
        UserError: the config asks for what cannot be.
        lls_jax.data.DatasetError: the data set is missing or damaged.
        pallas_kernels.local_loss.KernelUnavailableError: the kernels asked for cannot run here.
    """
    if config.kernels != "auto":
        local_loss.require(config.kernels)
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
    try:
        read = batches.make_reader(
            task.spec, config.augmentation, config.batch_size, execution.sharding
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    train = load_split(config, task.spec, "train")
    return Run(
        task=task,
        tx=tx,
        execution=execution,
        loop=_make_loop(config, task, tx, train),
        train=train,
        test=load_split(config, task.spec, "test"),
        read=read,
        steps_per_epoch=steps_per_epoch,
    )


def remat_above(config: TrainConfig) -> int | None:
    """Bytes above which a convolution's output is computed again; None for never."""
    if config.remat is None:
        return remat.choose_bytes(jax.default_backend())
    return config.remat * 2**20 or None


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
