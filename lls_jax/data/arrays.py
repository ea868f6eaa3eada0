"""Images and labels that somebody has in arrays: checked, and described."""

from typing import Any

import numpy as np

from lls_jax.data.batches import DeviceSplit
from lls_jax.data.specs import DatasetSpec
from lls_jax.data.storage import Split


def to_split(name: str, arrays: Any) -> Split | DeviceSplit:
    """Images and labels as a split.

    Args:
        name: of the argument, for errors.
        arrays: ``(images, labels)``, or a split already.

    Raises:
        ValueError: they do not fit each other, or are none.
    """
    if isinstance(arrays, Split | DeviceSplit):
        return arrays
    if not isinstance(arrays, tuple) or len(arrays) != 2:
        raise ValueError(
            f"`{name}` is a {type(arrays).__name__}; expected (images, labels), two arrays."
        )
    images, labels = np.asarray(arrays[0]), np.asarray(arrays[1])
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise ValueError(
            f"the images of `{name}` have dtype {images.dtype}; expected uint8, or floats that "
            "are normalised already."
        )
    check_labels(f"`{name}`", labels)
    if len(images) != len(labels) or not len(images):
        raise ValueError(f"`{name}` has {len(images)} images and {len(labels)} labels.")
    if images.dtype != np.uint8:
        images = images.astype(np.float32)
    return Split(images, labels.astype(np.int32))


def check_labels(whose: str, labels: np.ndarray) -> None:
    """Raise ValueError, saying whose they are, unless labels are integers ``[count]``."""
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"the labels of {whose} have shape {labels.shape} and dtype {labels.dtype}; expected "
            "integers, one an example."
        )


# Examples that are counted at once.
_COUNTED = 512


def _count_bytes(images: Any) -> np.ndarray:
    """How often each channel has each byte, ``[channels, 256]``; never a second copy of them all.

    Args:
        images: uint8 ``[count, ..., channels]``, on the device or the host.
    """
    counts = np.zeros((images.shape[-1], 256), np.int64)
    for start in range(0, images.shape[0], _COUNTED):
        some = np.asarray(images[start : start + _COUNTED]).reshape(-1, images.shape[-1])
        counts += [np.bincount(channel, minlength=256) for channel in some.T]
    return counts


def _moments(counts: np.ndarray) -> tuple[float, float]:
    """Mean and deviation of bytes from how often there is each."""
    values, total = np.arange(256), counts.sum()
    mean = float(counts @ values) / total
    return mean, float(np.sqrt(counts @ np.square(values - mean) / total))


def describe(split: Split | DeviceSplit, num_classes: int) -> DatasetSpec:
    """A description of images by themselves: mean and deviation of each channel, no windows.

    Args:
        split: the training images.
        num_classes: number of classes.
    """
    channels = split.images.shape[-1]
    mean, std = (0.0,) * channels, (1.0,) * channels
    if split.images.dtype == np.uint8:
        moments = [_moments(counts) for counts in _count_bytes(split.images)]
        mean = tuple(mean / 255 for mean, _ in moments)
        std = tuple(std / 255 or 1.0 for _, std in moments)
    return DatasetSpec(
        name="arrays",
        version="1.0.0",
        image_shape=tuple(split.images.shape[1:]),
        class_names=tuple(map(str, range(num_classes))),
        mean=mean,
        std=std,
        train_size=split.images.shape[0],
        test_size=0,
        layout="embedded",
    )
