"""A data set of a user's own, by the name of the function that gives it."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lls_jax import own_parts
from lls_jax.data.arrays import describe, to_split
from lls_jax.data.specs import DatasetSpec
from lls_jax.data.storage import Split
from lls_jax.errors import DatasetError


class Dataset(NamedTuple):
    """What a function of a user's own gives: images, labels, and what is known of them.

    Attributes:
        train: ``(images, labels)``: images uint8 ``[count, height, width, channels]``, or floats
            ``[count, ...]`` that are normalised already; labels integers ``[count]``, from 0.
        test: likewise; what each epoch is evaluated on.
        class_names: in label order; None: the labels themselves.
        mean: of each channel of uint8 images, for normalisation, pixels in [0, 1]; None: the
            training images'.
        std: the deviation, likewise.
    """

    train: tuple[Any, Any]
    test: tuple[Any, Any]
    class_names: Sequence[str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


class OwnData(NamedTuple):
    """A data set of a user's own, checked.

    Attributes:
        spec: what it is.
        splits: ``{"train": ..., "test": ...}``.
    """

    spec: DatasetSpec
    splits: dict[str, Split]


def load_own(name: str, data_dir: pathlib.Path) -> OwnData:
    """Call the function of a data set.

    Args:
        name: ``package.module:function``. The function is called with `data_dir`, if it has a
            parameter of that name, and returns a :class:`Dataset`, or ``(train, test)``.
        data_dir: the folder of data sets, a path.

    Raises:
        ValueError: there is no such function, or it returns something else.
        DatasetError: its arrays do not fit each other.
    """
    own = own_parts.find("data set", name)
    expected = "lls_jax.data.Dataset; return one, or ((images, labels), (test images, labels))."
    made = own.make({"data_dir": data_dir}, tuple, expected)
    if not isinstance(made, Dataset):
        if len(made) != 2:
            raise ValueError(f"data set {name!r} is a tuple of {len(made)}, which is no {expected}")
        made = Dataset(*made)
    try:
        return _checked(name, made)
    except ValueError as error:
        raise DatasetError(f"data set {name!r}: {error}") from error


def _checked(name: str, made: Dataset) -> OwnData:
    splits: dict[str, Any] = {
        # A copy of the tuple: what somebody calls a split is looked at too.
        part: to_split(part, tuple(arrays) if isinstance(arrays, tuple) else arrays)
        for part, arrays in (("train", made.train), ("test", made.test))
    }
    train, test = splits["train"], splits["test"]
    if train.images.shape[1:] != test.images.shape[1:] or train.images.dtype != test.images.dtype:
        raise ValueError(
            f"`train` has {train.images.dtype} images of shape {train.images.shape[1:]}, `test` "
            f"{test.images.dtype} ones of {test.images.shape[1:]}; give both alike."
        )
    labels = np.concatenate([train.labels, test.labels])
    names = made.class_names
    if names is None:
        names = tuple(map(str, range(int(labels.max()) + 1)))
    if labels.min() < 0 or labels.max() >= len(names) or len(names) < 2:
        raise ValueError(
            f"the labels go from {labels.min()} to {labels.max()}, and there are {len(names)} "
            "classes; expected labels from 0, each with a name, and two classes or more."
        )
    described = describe(train, len(names))
    spec = dataclasses.replace(
        described,
        name=name,
        class_names=tuple(map(str, names)),
        mean=described.mean if made.mean is None else tuple(map(float, made.mean)),
        std=described.std if made.std is None else tuple(map(float, made.std)),
        train_size=len(train.labels),
        test_size=len(test.labels),
    )
    channels = train.images.shape[-1]
    if not len(spec.mean) == len(spec.std) == channels or min(spec.std) <= 0:
        raise ValueError(
            f"`mean` is {spec.mean} and `std` {spec.std}; expected a number for each of {channels} "
            "channels, and positive deviations."
        )
    return OwnData(spec, splits)
