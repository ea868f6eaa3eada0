"""Sums over the steps of an epoch, on the device: what a record of the epoch is made of."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments import judging
from lls_jax import training
from lls_jax.models import Network
from lls_jax.rules import Rule


class Totals(NamedTuple):
    """Sums over the steps of the epoch so far, on the device.

    Attributes:
        losses: of each local layer's loss, then of the classifier's, ``[local layers + 1]``.
        correct: images classified rightly.
        correct5: images whose five best classes hold the right one.
    """

    losses: jax.Array
    correct: jax.Array
    correct5: jax.Array


@jax.jit
def add(totals: Totals, metrics: training.Metrics) -> Totals:
    """Add a step's metrics, which have its labels too, to an epoch's totals."""
    logits, labels = metrics["logits"], metrics["label"]
    return Totals(
        totals.losses + jnp.append(metrics["layer_loss"], metrics["loss"]),
        totals.correct + jnp.sum(judging.correct_within(logits, labels, 1)),
        totals.correct5 + jnp.sum(judging.correct_within(logits, labels, 5)),
    )


def empty(model: Network, rule: Rule) -> Totals:
    """The totals of an epoch that has not begun."""
    layers = training.num_local_losses(model, rule)
    # Buffers of their own: they may be given away.
    return Totals(jnp.zeros((layers + 1,)), *(jnp.zeros((), jnp.int32) for _ in range(2)))
