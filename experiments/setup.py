"""From a config to data, model, rule and optimizer: what training and evaluation share."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from experiments import data_sets, execution, optimizers, reach_options
from experiments.config import TrainConfig
from experiments.config_choices import OF_CUTS, OF_RULES, option
from experiments.data_sets import Examples
from lls_jax import data, models, placement, platforms, processes, rules, training
from lls_jax.data import batches
from lls_jax.errors import UserError
from lls_jax.models import Network
from lls_jax.rules import published
from lls_jax.runs.checks import check_of_images
from lls_jax.steps import slice_plan
from lls_jax.steps.reach_schedule import check_reach
from pallas_kernels import local_loss


class Task(NamedTuple):
    """A network, its rule and the images they are for."""

    spec: data.DatasetSpec
    model: Network
    rule: rules.Rule


class Run(NamedTuple):
    """What a training command gives :func:`lls_jax.fit`, the data on the device or the host.

    Attributes:
        task: network, rule and images.
        tx: the optimizer.
        execution: where steps run; None for the default device.
        train: the training images.
        validation: those of them that are held out; None for none.
        test: the test images.
        many_steps: whether a launch has many steps.
    """

    task: Task
    tx: training.Optimizer
    execution: placement.Execution | None
    train: Examples
    validation: Examples | None
    test: Examples
    many_steps: bool


# What a run has cannot be taken back on the command line.
_LEAVE_OUT = "leave it out, or where --set-from brings it, give the options themselves."
# `--loop`, as :func:`lls_jax.fit` names it.
STEPS_A_LAUNCH: dict[str, Literal["auto", "one", "many"]] = {
    "auto": "auto",
    "dispatch": "one",
    "scan": "many",
}


def make_task(config: TrainConfig, spec: data.DatasetSpec | None = None) -> Task:
    """Data set's entry, model and rule.

    Args:
        config: of the run.
        spec: the data set's entry, where it is open already; None to look.

    Raises:
        UserError: an unknown name, an option out of range, images too small for the model.
    """
    with as_user_error():
        spec = spec or data_sets.open_data(config).spec
        task = _make_task(config, spec)
        if task.model.num_classes != spec.num_classes:
            raise ValueError(
                f"model {config.model!r} has {task.model.num_classes} classes, and data set "
                f"{config.dataset!r} has {spec.num_classes}; give its function a parameter "
                "`num_classes`, and use it."
            )
        task.model.check_image((1, *spec.input_shape))
        return task


def check_task(config: TrainConfig) -> None:
    """What can be said of a config before its data set is there.

    Raises:
        UserError: an unknown name, or an option out of range.
    """
    with as_user_error():
        task = sketch_task(config)
        why = why_uncut(config, task)
        for name in OF_CUTS:
            if why and (value := getattr(config, name)):
                raise ValueError(f"{option(name)} {value} is of no use to {why}; {_LEAVE_OUT}")
        batches.make_augment(task.spec, config.augmentation)
        optimizers.make(config, steps_per_epoch=1)


def sketch_task(config: TrainConfig) -> Task:
    """Network and rule, before the data set is there."""
    return _make_task(config, data_sets.sketch(config))


def why_uncut(config: TrainConfig, task: Task) -> str | None:
    """For whom no block's batch can be cut, so that what asks for it would change nothing."""
    if not (config.remat or config.slice):
        return None
    if not rules.has_local_losses(task.rule):
        return f"--rule {config.rule}, which has no local losses"
    # The data set's classes may not be known yet, so nothing is said of them here.
    specs = task.model.specs
    own: list[Any] = [task.rule.at_block(index, len(specs)) for index in range(len(specs))]
    if task.model.classifier_in_last_group:
        own[-1] = None
    if any(slice_plan.may_cut(spec, rule) for spec, rule in zip(specs, own)):
        return None
    groups = "" if config.groups is None else f" and --groups {config.groups}"
    return (
        f"--rule {config.rule} with --model {config.model}{groups}: it is for blocks of one "
        "convolution whose rule sees the pooled activation alone, and groups of convolution and "
        "dense blocks alone"
    )


@contextlib.contextmanager
def as_user_error() -> Iterator[None]:
    """Turn a ValueError about a config into an error of the person who wrote it."""
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
        width=config.width,
        classifier_smoothing=config.classifier_smoothing,
    )
    if (sizes := config.group_sizes()) is not None:
        model = model.grouped(sizes)
    names = config.rule.split(",")
    given = _rule_options(config, names)
    made = tuple(_make_rule(name, given, spec, config) for name in names)
    reach = reach_options.of_losses(config.reach)
    if len(made) == 1:
        check_reach(model, made[0], reach)
        return Task(spec, model, made[0])
    for one in made:
        if not rules.has_local_losses(one):
            raise ValueError(
                f"rule {one.name!r} has no local loss and cannot be one of several; give it alone."
            )
    rule = rules.PerBlock(made)  # type: ignore[arg-type]
    model.block_rules(rule)
    check_reach(model, rule, reach)
    return Task(spec, model, rule)


# What the published runs gave a rule that is made without it, and what the data set knows.
_PUBLISHED = {
    "hidden_dim": lambda config, spec: published.hidden_dim(config.model, config.group_sizes()),
    "basis_rows": lambda config, spec: published.basis_rows(config.model, spec.num_classes),
    "pixel_mean": lambda config, spec: spec.mean,
    "pixel_std": lambda config, spec: spec.std,
}


def useful_options(names: list[str]) -> frozenset[str]:
    """Options that one of the rules at least has a use for."""
    return frozenset().union(*map(rules.options_of, names))


def _rule_options(config: TrainConfig, names: list[str]) -> dict[str, Any]:
    """The options that are given, each of use to one of the rules at least."""
    useful = useful_options(names)
    given = {}
    for field, name in OF_RULES.items():
        value = getattr(config, field)
        if value is None or value is False or (field == "kernels" and value == "auto"):
            continue
        if name not in useful:
            raise ValueError(
                f"{option(field)} {value} is of no use to --rule {config.rule}; {_LEAVE_OUT}"
            )
        given[name] = value
    return given


def _make_rule(
    name: str, given: dict[str, Any], spec: data.DatasetSpec, config: TrainConfig
) -> rules.Rule:
    # Each of several rules takes the options that it has a use for.
    takes = rules.options_of(name)
    options = {option: value for option, value in given.items() if option in takes}
    if name in rules.NAMES and name not in rules.OURS:
        for option_name, make in _PUBLISHED.items():
            if option_name in takes and option_name not in options:
                options[option_name] = make(config, spec)
    return rules.make(name, num_classes=spec.num_classes, **options)


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
        data_sets.download(config)
    processes.wait_for_all("the data set is prepared")
    with as_user_error():
        opened = data_sets.open_data(config)
    task = make_task(config, opened.spec)
    _check_shapes(config, task)
    held_out = config.validation_examples or 0
    if held_out >= task.spec.train_size:
        raise UserError(
            f"--validation-examples is {held_out}, but data set {config.dataset!r} has only "
            f"{task.spec.train_size} training images; hold fewer of them out."
        )
    _check_batch_size(config, task.spec.train_size - held_out)
    train, test = data_sets.load_splits(config, opened)
    with as_user_error():
        train, validation = data_sets.held_out(config, train)
    _check_batch_size(config, train.labels.shape[0])
    with as_user_error():
        tx = optimizers.make(config, train.labels.shape[0] // config.batch_size)
    return Run(
        task=task,
        tx=tx,
        execution=execution.make(config, *task, tx),
        train=train,
        validation=validation,
        test=test,
        many_steps=_many_steps(config, train),
    )


def _check_shapes(config: TrainConfig, task: Task) -> None:
    """Raise UserError for what the examples' shape does not allow."""
    with as_user_error():
        for name, asked in (
            ("--augmentation", config.augmentation),
            ("--test-views", config.test_views),
        ):
            check_of_images(name, asked, task.spec.input_shape)
        # A rule may find a block too narrow for its classes.
        draw = functools.partial(task.model.init, task.rule)
        jax.eval_shape(draw, jax.random.key(0), example_image(task.spec))


def _check_batch_size(config: TrainConfig, available: int) -> None:
    available = min(available, config.train_examples or available)
    if config.batch_size > available:
        raise UserError(
            f"--batch-size is {config.batch_size}, but there are only {available} training images; "
            "use a smaller one."
        )


def _many_steps(config: TrainConfig, train: Examples) -> bool:
    """Whether a launch has many steps.

    Raises:
        UserError: the config asks for that where it cannot be.
    """
    fits = isinstance(train, batches.DeviceSplit) and not config.pipeline
    if config.loop == "scan" and not fits:
        raise UserError(
            "--loop scan needs the images on the device, without --pipeline; use --loop dispatch, "
            "or --data-on-device yes."
        )
    is_fast = platforms.choices(jax.default_backend()).compiled_loops
    return config.loop == "scan" or (config.loop == "auto" and fits and is_fast)


def example_image(spec: data.DatasetSpec) -> jax.Array:
    """An image of the right shape, for drawing parameters."""
    return jnp.zeros((1, *spec.input_shape))
