"""Optimizers from a config: the published one, and optax's."""

import math
from collections.abc import Callable

import optax

from experiments.config import TrainConfig
from lls_jax.optimizers import schedule_free_adamw

_DROP = 0.1
_MILESTONES = (0.5, 0.75)
_PATIENCE_EPOCHS = 5


def make(config: TrainConfig, steps_per_epoch: int) -> optax.GradientTransformation:
    """The optimizer that a config asks for.

    Args:
        config: its optimizer, learning rate, schedule, momentum and weight decay count.
        steps_per_epoch: updates an epoch; schedules count in epochs.
    """
    rate: float | optax.Schedule = config.learning_rate
    if config.schedule == "multistep":
        steps = config.epochs * steps_per_epoch
        # Rounded up: a run of one step has its whole rate.
        drops = {math.ceil(part * steps): _DROP for part in _MILESTONES}
        rate = optax.piecewise_constant_schedule(config.learning_rate, drops)
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
        "adamw": lambda: optax.adamw(rate, weight_decay=decay),
        "adam": lambda: optax.chain(optax.add_decayed_weights(decay), optax.adam(rate)),
        "sgd": lambda: optax.chain(
            optax.add_decayed_weights(decay), optax.sgd(rate, momentum=config.momentum)
        ),
    }
    tx = makers[config.optimizer]()
    if config.schedule != "plateau":
        return tx
    plateau = optax.contrib.reduce_on_plateau(
        factor=_DROP, patience=_PATIENCE_EPOCHS, accumulation_size=steps_per_epoch
    )
    return optax.chain(tx, plateau)
