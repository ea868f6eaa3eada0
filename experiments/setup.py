"""From a config to data, model, rule and optimizer: what training and evaluation share."""

import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments import optimizers
from experiments.command_line import UserError
from experiments.config import TrainConfig
from lls_jax import data, models, rules, training
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
    train_step: training.TrainStep
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
        implementation=None if config.kernels == "auto" else config.kernels,
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
    prepare_data(config)
    task = make_task(config)
    available = config.train_examples or task.spec.train_size
    if config.batch_size > available:
        raise UserError(
            f"--batch-size is {config.batch_size}, but there are only {available} training images; "
            "use a smaller one."
        )
    try:
        read = batches.make_reader(task.spec, config.augmentation, config.batch_size)
    except ValueError as error:
        raise UserError(str(error)) from error
    steps_per_epoch = available // config.batch_size
    tx = optimizers.make(config, steps_per_epoch)
    return Run(
        task=task,
        tx=tx,
        train_step=training.make_train_step(task.model, task.rule, tx),
        train=load_split(config, task.spec, "train"),
        test=load_split(config, task.spec, "test"),
        read=read,
        steps_per_epoch=steps_per_epoch,
    )


def example_image(spec: data.DatasetSpec) -> jax.Array:
    """An image of the right shape, for drawing parameters."""
    return jnp.zeros((1, *spec.input_shape))
