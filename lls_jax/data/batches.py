"""Training and evaluation batches, of a data set that lives on the device or on the host."""

import functools
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lls_jax import processes
from lls_jax.data import streaming
from lls_jax.data.augment import (
    AUGMENTATIONS,
    middle_window,
    mirror,
    random_crop,
    random_cutout,
    random_erase,
    random_flip,
    random_translation,
    random_window,
)
from lls_jax.data.order import alternates
from lls_jax.data.specs import DatasetSpec
from lls_jax.data.storage import Split

Batch = dict[str, jax.Array]
Sampler = Callable[..., Batch]
Augment = Callable[[jax.Array, jax.Array], jax.Array]
Reader = Callable[..., Generator[Batch, None, None]]


class DeviceSplit(NamedTuple):
    """A part of a data set on the device.

    Attributes:
        images: uint8 ``[count, height, width, channels]``, or float32 ``[count, ...]``.
        labels: int32 ``[count]``.
    """

    images: jax.Array
    labels: jax.Array


def to_device(split: Split) -> DeviceSplit:
    """Move a split to the default device, bytes as bytes."""
    return DeviceSplit(jnp.asarray(split.images), jnp.asarray(split.labels))


def normalize(spec: DatasetSpec, images: jax.Array) -> jax.Array:
    """``(pixel / 255 - mean) / std`` for each channel: uint8 ``[..., channels]`` to float32.

    Images of floats are normalised already, and stay as they are.
    """
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images.astype(jnp.float32)
    channels = (1,) * (images.ndim - 1) + (-1,)
    mean, std = (jnp.asarray(v, jnp.float32).reshape(channels) for v in (spec.mean, spec.std))
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def make_augment(spec: DatasetSpec, augmentation: str) -> Augment:
    """A function that turns pixels into what a network trains on.

    Args:
        spec: the data set, for its normalisation and the size of its windows.
        augmentation: ``"none"``, ``"flip"``, ``"crop"``, ``"flip_crop"``, ``"flip_erase"``, or
            ``"full"``: flip, crop with padding 4 (not where windows are cut anyway), random erasing
            with probability 0.2; ``"alternating_flip"``: each image mirrored in every other epoch,
            which its order says (:func:`epoch_order`), or ``"alternating_flip_translate"``: and
            moved by up to 2 pixels, its edges reflected (not where windows are cut anyway);
            ``"alternating_flip_translate_cutout"``: and without a random square of 8 pixels a side.

    Returns:
        ``augment(key, [batch, ...]) -> float32 [batch, ...]``, to be compiled; of bytes, or of
        floats that are normalised already: what a crop pads these with is 0.

    Raises:
        ValueError: unknown augmentation.
    """
    if augmentation not in AUGMENTATIONS:
        raise ValueError(
            f"unknown augmentation {augmentation!r}; expected one of {', '.join(AUGMENTATIONS)}."
        )

    steps = AUGMENTATIONS[augmentation]

    def augment(key: jax.Array, images: jax.Array) -> jax.Array:
        flip_key, crop_key, erase_key = jax.random.split(key, 3)
        if spec.crop is not None:
            images = random_window(crop_key, images, spec.crop)
        if "flip" in steps:
            images = random_flip(flip_key, images)
        if "crop" in steps and spec.crop is None:
            images = random_crop(crop_key, images)
        if "translate" in steps and spec.crop is None:
            images = random_translation(crop_key, images)
        image = normalize(spec, images)
        if "cutout" in steps:
            image = random_cutout(erase_key, image)
        return random_erase(erase_key, image) if "erase" in steps else image

    return augment


def make_sampler(spec: DatasetSpec, augmentation: str, batch_size: int) -> Sampler:
    """A jit-compiled function that makes one augmented, normalised training batch.

    Args:
        spec: the data set.
        augmentation: of :func:`make_augment`.
        batch_size: examples a batch.

    Returns:
        ``sample(data, permutation, index, key) -> {"image", "label"}``: batch number `index` of
        the epoch whose order is `permutation`, from :func:`epoch_order`. The same arguments give
        the same batch.

    Raises:
        ValueError: unknown augmentation.
    """
    augment = make_augment(spec, augmentation)

    @jax.jit
    def sample(
        data: DeviceSplit, permutation: jax.Array, index: jax.Array, key: jax.Array
    ) -> Batch:
        batch = gather(data, permutation, index, batch_size, None, alternates(augmentation))
        return {**batch, "image": augment(key, batch["image"])}

    return sample


def whole(sharding: jax.sharding.NamedSharding) -> jax.sharding.NamedSharding:
    """The sharding of what is whole on every device over which `sharding` shares batches out."""
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())


def place(split: DeviceSplit, sharding: jax.sharding.NamedSharding) -> DeviceSplit:
    """A split whole on every device that takes rows of its batches."""
    return DeviceSplit(*processes.replicate(tuple(split), whole(sharding)))


def _take(
    data: DeviceSplit, chosen: jax.Array, sharding: jax.sharding.NamedSharding | None
) -> Batch:
    if sharding is not None:
        # Each device takes its own rows.
        chosen = jax.lax.with_sharding_constraint(chosen, sharding)
    # Of a permutation, or cut at the last example: in range, and no mask need be made.
    batch = {
        "image": jnp.take(data.images, chosen, axis=0, mode="clip"),
        "label": jnp.take(data.labels, chosen, mode="clip"),
    }
    return batch if sharding is None else jax.lax.with_sharding_constraint(batch, sharding)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def gather(
    data: DeviceSplit,
    permutation: jax.Array,
    index: jax.Array,
    batch_size: int,
    sharding: jax.sharding.NamedSharding | None = None,
    mirrors: bool = False,
) -> Batch:
    """The pixels and labels of batch number `index` of the epoch in that order.

    Args:
        data: the examples; with a `sharding`, whole on each of its devices.
        permutation: from :func:`epoch_order`.
        index: of the batch, from 0.
        batch_size: examples a batch.
        sharding: that the batch is to have.
        mirrors: whether the order has negative numbers, of mirrored images.
    """
    chosen = jax.lax.dynamic_slice_in_dim(permutation, index * batch_size, batch_size)
    if not mirrors:
        return _take(data, chosen, sharding)
    mirrored = chosen < 0
    batch = _take(data, jnp.where(mirrored, ~chosen, chosen), sharding)
    image = batch["image"]
    return {**batch, "image": jnp.where(mirrored[:, None, None, None], mirror(image), image)}


def make_reader(
    spec: DatasetSpec,
    augmentation: str,
    batch_size: int,
    sharding: jax.sharding.NamedSharding | None = None,
) -> Reader:
    """A function that reads an epoch's training batches, from the device or from the host.

    Args:
        spec: the data set.
        augmentation: of :func:`make_augment`.
        batch_size: examples a batch.
        sharding: that the batches are to have. Of several processes each reads its own rows from
            the host, and each device takes its own rows of what is on the devices; the whole batch
            is the one that a single process would make.

    Returns:
        ``read(data, permutation, start, key, first)``, an iterator of ``{"image", "label"}``: the
        batches of the epoch whose order is `permutation`, from number `start` on; the random key
        of one is ``fold_in(key, first + its number)``. `data` is a :class:`DeviceSplit`, of
        :func:`place` where there is a `sharding`, or a split on the host, which gives the same
        batches, read ahead.

    Raises:
        ValueError: unknown augmentation.
    """
    augment = make_augment(spec, augmentation)
    mirrors = alternates(augmentation)

    # Neither is compiled with the training step, in which it would round differently.
    @jax.jit
    def augment_at(key: jax.Array, number: jax.Array, images: jax.Array) -> jax.Array:
        return augment(jax.random.fold_in(key, number), images)

    @jax.jit
    def sample_at(
        data: DeviceSplit,
        permutation: jax.Array,
        index: jax.Array,
        key: jax.Array,
        number: jax.Array,
    ) -> Batch:
        batch = gather(data, permutation, index, batch_size, sharding, mirrors)
        return {**batch, "image": augment_at(key, number, batch["image"])}

    def read(
        data: DeviceSplit | Split,
        permutation: jax.Array,
        start: int,
        key: jax.Array,
        first: int = 0,
    ) -> Generator[Batch, None, None]:
        if isinstance(data, DeviceSplit):
            # One launch a batch, on whatever devices it is for.
            for index in range(start, permutation.shape[0] // batch_size):
                yield sample_at(data, permutation, index, key, first + index)
            return
        size = batch_size
        if sharding is not None:
            permutation, size = _own_part(permutation, batch_size, sharding)
        ahead: Iterator[Any] = streaming.stream(data, np.asarray(permutation), size, start)
        for index, batch in enumerate(ahead, start):
            if sharding is not None:
                batch = processes.shard_batch(batch, sharding)
            yield {
                "image": augment_at(key, first + index, batch["image"]),
                "label": jnp.asarray(batch["label"]),
            }

    return read


def _own_part(
    permutation: jax.Array, batch_size: int, sharding: jax.sharding.NamedSharding
) -> tuple[jax.Array, int]:
    """The order of the examples that this process reads, and how many a batch."""
    rows = processes.local_rows(sharding, batch_size)
    whole = permutation[: permutation.shape[0] // batch_size * batch_size]
    return whole.reshape(-1, batch_size)[:, rows].reshape(-1), rows.stop - rows.start


def evaluation_batches(
    spec: DatasetSpec,
    data: DeviceSplit | Split,
    batch_size: int,
    sharding: jax.sharding.NamedSharding | None = None,
) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
    """All examples once, in order, in batches of one shape.

    Args:
        spec: the data set, for its normalisation and the size of its windows.
        data: the examples, on the device, of :func:`place` with a `sharding`, or on the host.
        batch_size: examples a batch; with a `sharding`, rounded up by :func:`whole_rows`.
        sharding: that the batches are to have; of several processes each reads its own rows.

    Yields:
        ``(image, label, weight)``; `weight` ``[batch]`` is 0 for what fills up the last batch.
    """
    count = data.labels.shape[0]
    batch_size = whole_rows(batch_size, sharding)
    rows = slice(0, batch_size)
    if sharding is not None:
        rows = processes.local_rows(sharding, batch_size)
    for first in range(0, count, batch_size):
        if isinstance(data, DeviceSplit):
            yield _evaluation_batch(spec, data, first, batch_size, sharding)
            continue
        position = np.arange(first + rows.start, first + rows.stop)
        chosen = np.minimum(position, count - 1)
        image = _prepare(spec, data.images[chosen])
        weight = jnp.asarray(position < count, jnp.float32)
        batch = image, jnp.asarray(data.labels[chosen]), weight
        yield batch if sharding is None else processes.shard_batch(batch, sharding)


def whole_rows(batch_size: int, sharding: jax.sharding.NamedSharding | None) -> int:
    """The least multiple of a sharding's devices that is at least `batch_size`."""
    devices = 1 if sharding is None else sharding.num_devices
    return -(-batch_size // devices) * devices


def first_images(spec: DatasetSpec, data: DeviceSplit | Split, count: int) -> jax.Array:
    """The first `count` images, or all that there are, as they are evaluated: float32."""
    return _prepare(spec, jnp.asarray(data.images[:count]))


@functools.partial(jax.jit, static_argnums=0)
def _prepare(spec: DatasetSpec, images: jax.Array) -> jax.Array:
    return normalize(spec, images if spec.crop is None else middle_window(images, spec.crop))


def evaluation_batch(
    spec: DatasetSpec,
    data: DeviceSplit,
    start: jax.Array | int,
    batch_size: int,
    sharding: jax.sharding.NamedSharding | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What :func:`evaluation_batches` yields from example `start` on; to be compiled."""
    count = data.labels.shape[0]
    position = start + jnp.arange(batch_size)
    taken = _take(data, jnp.minimum(position, count - 1), sharding)
    return _prepare(spec, taken["image"]), taken["label"], (position < count).astype(jnp.float32)


_evaluation_batch = jax.jit(evaluation_batch, static_argnums=(0, 3, 4))
