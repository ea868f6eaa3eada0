"""The order of an epoch's examples, and which of them are mirrored."""

import functools

import jax
import jax.numpy as jnp

from lls_jax.data.augment import AUGMENTATIONS


@functools.partial(jax.jit, static_argnums=2)
def epoch_permutation(key: jax.Array, epoch: int, count: int) -> jax.Array:
    """The order of an epoch's examples, a function of the run's key and the epoch alone."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), count)


# Draws which images are mirrored in even epochs; the orders of epochs have small numbers.
_FIRST_SIDES = 2**31 - 2


def alternates(augmentation: str) -> bool:
    """Whether an augmentation mirrors each image in every other epoch."""
    return "alternating_flip" in AUGMENTATIONS.get(augmentation, ())


def epoch_order(key: jax.Array, epoch: int, count: int, augmentation: str) -> jax.Array:
    """:func:`epoch_permutation`, which says too what is mirrored, where flips alternate.

    Each image is mirrored in the even epochs or in the odd ones, as is drawn once: over two epochs
    it is shown once each way, where independent flips show half of the images the same way twice.

    Args:
        key: the run's random key of the data.
        epoch: its number, from 0.
        count: examples.
        augmentation: of :func:`make_augment`.

    Returns:
        Examples' numbers, int32 ``[count]``; ``~i``, a negative number, is example `i` mirrored.

    References:
        Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", section 3.6,
        https://arxiv.org/abs/2404.00498.
    """
    order = epoch_permutation(key, epoch, count)
    return _alternated(key, order, epoch) if alternates(augmentation) else order


@jax.jit
def _alternated(key: jax.Array, order: jax.Array, epoch: int) -> jax.Array:
    sides = jax.random.bernoulli(jax.random.fold_in(key, _FIRST_SIDES), 0.5, order.shape)
    mirrored = sides[order] ^ (jnp.asarray(epoch) % 2 == 1)
    return jnp.where(mirrored, ~order, order)
