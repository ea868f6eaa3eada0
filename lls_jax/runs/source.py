"""Where a run's training batches come from: arrays, or batches that somebody else makes."""

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lls_jax import processes
from lls_jax.data import DatasetSpec, Split, batches
from lls_jax.data.arrays import check_labels
from lls_jax.data.order import epoch_order
from lls_jax.runs.checks import check_of_images

Arrays = tuple[Any, Any] | Split | batches.DeviceSplit
Batch = dict[str, jax.Array]

_MOST_BYTES_ON_DEVICE = 2**31
# Stands in for an epoch's number where batches are drawn for BatchNorm's statistics.
_STATS_EPOCH = 2**31 - 1


def place(examples: Split | batches.DeviceSplit) -> Split | batches.DeviceSplit:
    """The same examples on the device where they take 2 GiB at most; more stay on the host."""
    fits = examples.images.nbytes <= _MOST_BYTES_ON_DEVICE
    return batches.to_device(examples) if fits and isinstance(examples, Split) else examples


def on_each_device(examples: Any, sharding: jax.sharding.NamedSharding | None) -> Any:
    """What is on the default device on each of a sharding's instead, which take their own rows."""
    if sharding is None or not isinstance(examples, batches.DeviceSplit):
        return examples
    return batches.place(examples, sharding)


def on_this_device(examples: Any, sharding: jax.sharding.NamedSharding | None) -> Any:
    """What is on each of a sharding's devices on this process's own alone."""
    if sharding is None or not isinstance(examples, batches.DeviceSplit):
        return examples
    return processes.local_copy(examples)


def first_examples(examples: Any, count: int) -> Any:
    """The first `count` examples of a split."""
    return type(examples)(examples.images[:count], examples.labels[:count])


def hold_out(examples: Any, count: int) -> tuple[Any, Any]:
    """The last `count` examples of a split apart: ``(the others, these)``.

    Raises:
        ValueError: there are not so many.
    """
    size = int(examples.labels.shape[0])
    if not 0 < count < size:
        raise ValueError(
            f"{count} examples are to be held out for validation; of {size} training examples 1 to "
            f"{size - 1} can be."
        )
    cut = size - count
    held_out = type(examples)(examples.images[cut:], examples.labels[cut:])
    return first_examples(examples, cut), held_out


class OnDevices(NamedTuple):
    """Training examples on the devices, for compiled loops over batches.

    Attributes:
        data: the examples, whole on each device.
        order: ``order(epoch)``: the order of an epoch's examples.
        key: the random key of the data; of a training batch it is ``fold_in(key, step)``.
        statistics_order: the order of the examples from whose first batches BatchNorm's statistics
            are estimated.
        statistics_key: of such a batch the key is ``fold_in(statistics_key, its number)``.
    """

    data: batches.DeviceSplit
    order: Callable[[int], jax.Array]
    key: jax.Array
    statistics_order: jax.Array
    statistics_key: jax.Array


class Source(NamedTuple):
    """A run's training batches.

    Attributes:
        steps_per_epoch: batches of an epoch.
        batch_size: examples a batch.
        epoch: ``epoch(number, start)``: the batches of an epoch, from 0, from batch `start` on.
        sample: ``sample(count)``: batches of examples, always the same, each whole and on this
            process's own device.
        for_statistics: ``for_statistics(count)``: images from which BatchNorm's statistics are
            estimated anew, always the same.
        on_devices: what a compiled loop over steps takes instead; None where the data are not on
            the devices.
    """

    steps_per_epoch: int
    batch_size: int
    epoch: Callable[[int, int], Generator[Batch, None, None]]
    sample: Callable[[int], Iterator[Batch]]
    for_statistics: Callable[[int], Iterator[jax.Array]]
    on_devices: "OnDevices | None" = None


def from_arrays(
    split: Split | batches.DeviceSplit,
    spec: DatasetSpec,
    augmentation: str,
    batch_size: int,
    key: jax.Array,
    sharding: jax.sharding.NamedSharding | None = None,
) -> Source:
    """Batches of images and labels, in a new order each epoch; a function of the key alone.

    Args:
        split: the training images, on the device, those of `sharding` if there is one, or on the
            host.
        spec: how they are normalised and cut.
        augmentation: of :func:`lls_jax.data.batches.make_augment`.
        batch_size: examples a batch; an epoch's last partial batch is dropped.
        key: the run's random key of the data.
        sharding: that the batches are to have.

    Raises:
        ValueError: there are fewer examples than a batch has.
    """
    size = int(split.labels.shape[0])
    if batch_size > size:
        raise ValueError(
            f"`batch_size` is {batch_size}, but there are only {size} training examples; use a "
            "smaller one."
        )
    check_of_images("augmentation", augmentation, split.images.shape[1:])
    steps = size // batch_size
    read = batches.make_reader(spec, augmentation, batch_size, sharding)

    def order(epoch: int) -> jax.Array:
        permutation = epoch_order(key, epoch, size, augmentation)
        if sharding is None or isinstance(split, Split):
            return permutation
        return processes.replicate(permutation, batches.whole(sharding))

    def epoch(number: int, start: int) -> Generator[Batch, None, None]:
        return read(split, order(number), start, key, number * steps)

    statistics_key = jax.random.fold_in(key, _STATS_EPOCH)

    def draw(read: batches.Reader, count: int) -> Iterator[Batch]:
        drawn = read(split, order(_STATS_EPOCH), 0, statistics_key)
        return itertools.islice(drawn, count)

    def sample(count: int) -> Iterator[Batch]:
        alone = batches.make_reader(spec, augmentation, batch_size)
        # What is on every device is on this process's own too.
        here = on_this_device(split, sharding)
        permutation = epoch_order(key, _STATS_EPOCH, size, augmentation)
        return itertools.islice(alone(here, permutation, 0, statistics_key), count)

    def for_statistics(count: int) -> Iterator[jax.Array]:
        return (batch["image"] for batch in draw(read, count))

    on_devices = None
    if isinstance(split, batches.DeviceSplit):
        on_devices = OnDevices(split, order, key, order(_STATS_EPOCH), statistics_key)
    return Source(steps, batch_size, epoch, sample, for_statistics, on_devices)


# Of an iterator, what BatchNorm's statistics are estimated from: what it has given is gone.
_KEPT_BATCHES = 50


def from_batches(
    made: Iterable[Any] | Callable[[int], Iterable[Any]],
    steps_per_epoch: int | None,
    sharding: jax.sharding.NamedSharding | None = None,
) -> tuple[Source, dict[str, Any]]:
    """Batches that somebody else makes, normalised already.

    Args:
        made: batches ``{"image": [batch, ...], "label": integers [batch]}``, all of one size:
            something that can be gone over once an epoch, like a list or a data loader; a function
            of the epoch's number, from 0, that gives such; or an iterator that does not end.
        steps_per_epoch: batches of an epoch; None for ``len(made)``.
        sharding: that the batches are to have; where it is of several processes, each gives its own
            rows of every batch.

    Returns:
        The source, and its first batch.

    Raises:
        ValueError: the number of batches is not known, or there is none; or images are no floats,
            or labels no integers.
    """
    if steps_per_epoch is None:
        if not isinstance(made, Sized):
            raise ValueError(
                "`steps_per_epoch` is None and the training batches have no length; give it."
            )
        steps_per_epoch = len(made)
    endless = isinstance(made, Iterator)
    first = next(iter(made(0) if callable(made) else made), None)
    if first is None or steps_per_epoch < 1:
        raise ValueError("there is no training batch to go over.")
    if not isinstance(first, Mapping) or not {"image", "label"} <= set(first):
        raise ValueError(
            f'a training batch is a {type(first).__name__}; expected a dict with "image" and '
            '"label" (images and labels of all examples are a tuple).'
        )
    rest: Iterator[Any] = itertools.chain([first], made) if endless else iter(())  # type: ignore[arg-type]
    kept: list[Any] = [first]

    def of_epoch(number: int) -> Iterator[Any]:
        if endless:
            return rest
        return iter(made(number) if callable(made) else made)

    images = jnp.asarray(first["image"])
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"the images of a training batch have dtype {images.dtype}, and batches are taken as "
            "they are; normalise them to floats, or give all images and labels as arrays."
        )
    labels = np.asarray(first["label"])
    check_labels("a training batch", labels)

    def whole(batch: Any) -> Batch:
        if len(batch["label"]) != images.shape[0]:
            raise ValueError(
                f"a training batch has {len(batch['label'])} examples, and the first one had "
                f"{images.shape[0]}; make all of one size, and drop the last partial one."
            )
        return {name: jnp.asarray(batch[name]) for name in ("image", "label")}

    def placed(batch: Any) -> Batch:
        batch = whole(batch)
        return batch if sharding is None else processes.shard_batch(batch, sharding)

    def epoch(number: int, start: int) -> Generator[Batch, None, None]:
        skip = 0 if endless else start
        for batch in itertools.islice(of_epoch(number), skip, steps_per_epoch - start + skip):
            if endless and len(kept) < _KEPT_BATCHES:
                kept.append(batch)
            yield placed(batch)

    def some(count: int) -> Iterator[Any]:
        return itertools.islice(kept if endless else of_epoch(0), count)

    def sample(count: int) -> Iterator[Batch]:
        return map(whole, some(count))

    def for_statistics(count: int) -> Iterator[jax.Array]:
        return (placed(batch)["image"] for batch in some(count))

    parts = 1 if sharding is None else sharding.num_devices // len(sharding.addressable_devices)
    batch_size = parts * images.shape[0]
    source = Source(steps_per_epoch, batch_size, epoch, sample, for_statistics)
    return source, {"image": images, "label": labels}
