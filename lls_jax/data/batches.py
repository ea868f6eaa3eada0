"""Batches made on the device from a data set that lives there as uint8."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lls_jax.data.augment import (
    AUGMENTATIONS,
    random_crop,
    random_erase,
    random_flip,
)
from lls_jax.data.specs import DatasetSpec
from lls_jax.data.storage import Split

Sampler = Callable[..., dict[str, jax.Array]]


class DeviceSplit(NamedTuple):
    """A part of a data set on the device.

    Attributes:
        images: uint8 ``[count, height, width, channels]``.
        labels: int32 ``[count]``.
    """

    images: jax.Array
    labels: jax.Array


def to_device(split: Split) -> DeviceSplit:
    """Move a split to the default device, as uint8."""
    return DeviceSplit(jnp.asarray(split.images), jnp.asarray(split.labels))


def normalize(spec: DatasetSpec, images: jax.Array) -> jax.Array:
    """``(pixel / 255 - mean) / std`` for each channel: uint8 ``[..., channels]`` to float32."""
    mean, std = jnp.asarray(spec.mean, jnp.float32), jnp.asarray(spec.std, jnp.float32)
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def epoch_permutation(key: jax.Array, epoch: int, count: int) -> jax.Array:
    """The order of an epoch's examples, a function of the run's key and the epoch alone."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), count)


def make_sampler(spec: DatasetSpec, augmentation: str, batch_size: int) -> Sampler:
    """A jit-compiled function that makes one augmented, normalised training batch.

    Args:
        spec: the data set, for its normalisation.
        augmentation: ``"none"``, ``"flip"``, or ``"full"``: flip, crop with padding 4, random
            erasing with probability 0.2.
        batch_size: examples a batch.

    Returns:
        ``sample(data, permutation, index, key) -> {"image", "label"}``: batch number `index` of
        the epoch whose order is `permutation`. The same arguments give the same batch.

    Raises:
        ValueError: unknown augmentation.
    """
    if augmentation not in AUGMENTATIONS:
        raise ValueError(
            f"unknown augmentation {augmentation!r}; expected one of {', '.join(AUGMENTATIONS)}."
        )

    @jax.jit
    def sample(
        data: DeviceSplit, permutation: jax.Array, index: jax.Array, key: jax.Array
    ) -> dict[str, jax.Array]:
        chosen = jax.lax.dynamic_slice_in_dim(permutation, index * batch_size, batch_size)
        images = jnp.take(data.images, chosen, axis=0)
        flip_key, crop_key, erase_key = jax.random.split(key, 3)
        if augmentation != "none":
            images = random_flip(flip_key, images)
        if augmentation == "full":
            images = random_crop(crop_key, images)
        image = normalize(spec, images)
        if augmentation == "full":
            image = random_erase(erase_key, image)
        return {"image": image, "label": jnp.take(data.labels, chosen)}

    return sample


def evaluation_batches(
    spec: DatasetSpec, data: DeviceSplit, batch_size: int
) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
    """All examples once, in order, in batches of one shape.

    Args:
        spec: the data set, for its normalisation.
        data: the examples.
        batch_size: examples a batch.

    Yields:
        ``(image, label, weight)``; `weight` ``[batch]`` is 0 for what fills up the last batch.
    """
    count = data.labels.shape[0]
    prepare = jax.jit(lambda data, at: (normalize(spec, data.images[at]), data.labels[at]))
    for start in range(0, count, batch_size):
        position = jnp.arange(start, start + batch_size)
        image, label = prepare(data, jnp.minimum(position, count - 1))
        yield image, label, (position < count).astype(jnp.float32)
