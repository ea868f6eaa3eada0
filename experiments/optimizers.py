"""Optimizers from a config: the published one, and optax's."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import optax

from experiments.config import TrainConfig
from lls_jax import own_parts
from lls_jax.optimizers import NamedRate, muon, schedule_free_adamw

_DROP = 0.1
_MILESTONES = (0.5, 0.75)
_PATIENCE_EPOCHS = 5
_OTHER_LEARNING_RATE = 0.01
# Of airbench: its classifier's rate over that of its biases, and the share of the epochs in which
# the bias of its whitening is trained, with a rate that falls.
_SCALED_CLASSIFIER = 10.0
_WHITENING_EPOCHS = 3 / 8


def make(config: TrainConfig, steps_per_epoch: int) -> optax.GradientTransformation:
    """The optimizer that a config asks for.

    Args:
        config: its optimizer, learning rate, schedule, momentum and weight decay count.
        steps_per_epoch: updates an epoch; schedules count in epochs.

    Raises:
        ValueError: a user's own optimizer is none, or has no use for what it is asked for.
    """
    rate = _rate(config, steps_per_epoch, config.learning_rate)
    other = config.other_learning_rate or _OTHER_LEARNING_RATE
    whitening_steps = max(1, math.ceil(_WHITENING_EPOCHS * config.epochs * steps_per_epoch))
    factor = _rate(config, steps_per_epoch, 1.0)
    decay = config.weight_decay
    makers: dict[str, Callable[[], optax.GradientTransformation]] = {
        "schedule_free_adamw": lambda: schedule_free_adamw(
            rate, b1=config.momentum, weight_decay=decay
        ),
        "optax_schedule_free_adamw": lambda: optax.contrib.schedule_free_adamw(
            rate, b1=config.momentum, weight_decay=decay
        ),
        "schedule_free_sgd": lambda: optax.contrib.schedule_free_sgd(
            rate, b1=config.momentum, weight_decay=decay
        ),
        "adamw": lambda: optax.adamw(rate, b1=config.momentum, weight_decay=decay),
        "adam": lambda: optax.chain(
            optax.add_decayed_weights(decay), optax.adam(rate, b1=config.momentum)
        ),
        "muon": lambda: muon(
            config.learning_rate,
            config.momentum,
            other_learning_rate=other,
            weight_decay=decay,
            schedule=factor if callable(factor) else None,
            by_name={
                "whitening_bias": NamedRate(other, optax.linear_schedule(1, 0, whitening_steps)),
                "scaled_kernel": NamedRate(_SCALED_CLASSIFIER * other),
            },
        ),
        "sgd": lambda: optax.chain(
            optax.add_decayed_weights(decay), optax.sgd(rate, momentum=config.momentum)
        ),
    }
    if own_parts.is_own(config.optimizer):
        tx = _own(config, rate, steps_per_epoch)
    else:
        tx = makers[config.optimizer]()
    if config.clip_norm is not None:
        tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)
    if config.schedule != "plateau":
        return tx
    plateau = optax.contrib.reduce_on_plateau(
        factor=_DROP, patience=_PATIENCE_EPOCHS, accumulation_size=steps_per_epoch
    )
    return optax.chain(tx, plateau)


def _own(
    config: TrainConfig, rate: float | optax.Schedule, steps_per_epoch: int
) -> optax.GradientTransformation:
    """A user's own optimizer; refuses what is asked for and of no use to it."""
    own = own_parts.find("optimizer", config.optimizer)
    options = {
        "learning_rate": rate,
        "momentum": config.momentum,
        "weight_decay": config.weight_decay,
    }
    plain = TrainConfig()
    own.check_used(
        {
            name: getattr(config, name)
            for name, value in options.items()
            # A schedule is one of the learning rate.
            if callable(value) or value != getattr(plain, name)
        }
    )
    return own.make(
        {**options, "epochs": config.epochs, "steps_per_epoch": steps_per_epoch},
        optax.GradientTransformation,
        "optax transformation; return one, like optax.adam(learning_rate).",
    )


def _rate(config: TrainConfig, steps_per_epoch: int, whole: float) -> float | optax.Schedule:
    """A learning rate under the config's schedule: a number, or a function of the updates done."""
    steps = config.epochs * steps_per_epoch
    warm_up = config.warmup_epochs * steps_per_epoch
    rate: float | optax.Schedule = whole
    if config.schedule == "multistep":
        # Rounded up: a run of one step has its whole rate.
        drops = {math.ceil(part * steps): _DROP for part in _MILESTONES}
        rate = optax.piecewise_constant_schedule(whole, drops)
    elif config.schedule == "cosine":
        rate = optax.cosine_decay_schedule(whole, max(steps - warm_up, 1))
        # Counted from the end of the warm-up; the others from the run's start.
        rate = rate if not warm_up else _delayed(rate, warm_up)
    elif config.schedule == "linear":
        rate = optax.linear_schedule(whole, 0.0, max(steps - warm_up, 1), warm_up)
    if not warm_up:
        return rate
    after = rate if callable(rate) else optax.constant_schedule(whole)
    rising = optax.linear_schedule(0.0, 1.0, warm_up)
    return lambda count: rising(count + 1) * after(count)


def _delayed(schedule: optax.Schedule, steps: int) -> optax.Schedule:
    return lambda count: schedule(jnp.maximum(count - steps, 0))
