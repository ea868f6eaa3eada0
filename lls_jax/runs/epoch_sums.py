"""Sums over the steps of an epoch, on the device: what a record of the epoch is made of."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lls_jax.models import Network
from lls_jax.rules import Rule
from lls_jax.runs.evaluate import correct_within
from lls_jax.training import Metrics, num_local_losses


class EpochSums(NamedTuple):
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
def add(sums: EpochSums, metrics: Metrics) -> EpochSums:
    """Add a step's metrics, which have its labels too, to an epoch's sums."""
    logits, labels = metrics["logits"], metrics["label"]
    losses = jnp.append(metrics["layer_loss"], metrics["loss"])
    # Of one dtype from the first step to the last, with 64-bit numbers enabled too.
    correct, correct5 = (
        jnp.sum(correct_within(logits, labels, best), dtype=jnp.int32) for best in (1, 5)
    )
    return EpochSums(
        sums.losses + losses.astype(sums.losses.dtype),
        sums.correct + correct,
        sums.correct5 + correct5,
    )


def empty(model: Network, rule: Rule) -> EpochSums:
    """The sums of an epoch that has not begun."""
    layers = num_local_losses(model, rule)
    # Buffers of their own: they may be given away.
    losses = jnp.zeros((layers + 1,), jnp.float32)
    return EpochSums(losses, *(jnp.zeros((), jnp.int32) for _ in range(2)))
