"""What examples must be like before a run, or an evaluation, begins."""

from typing import Any

import numpy as np

from lls_jax.data import DatasetSpec


def check_examples(name: str, examples: Any, spec: DatasetSpec, num_classes: int) -> None:
    """Raise ValueError unless examples are of a data set's shape, and of a model's classes.

    Args:
        name: of the argument, for errors.
        examples: a split, on the device or on the host.
        spec: the data set.
        num_classes: of the model.
    """
    shape = tuple(examples.images.shape[1:])
    # Where windows are cut, they may be cut already.
    if shape not in (tuple(spec.image_shape), tuple(spec.input_shape)):
        raise ValueError(
            f"the examples of `{name}` have shape {shape}; expected {tuple(spec.image_shape)}, "
            "that of the training examples, or of the `spec`."
        )
    check_classes(f"`{name}`", examples.labels, num_classes)


def check_classes(whose: str, labels: Any, num_classes: int) -> None:
    """Raise ValueError unless labels, integers, are classes of a model.

    Args:
        whose: the labels are, for errors.
        labels: ``[count]``, on the device or on the host.
        num_classes: of the model.
    """
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= num_classes:
        raise ValueError(
            f"the labels of {whose} go from {least} to {most}; expected indices of the model's "
            f"{num_classes} classes, from 0."
        )


def check_of_images(name: str, asked: str, shape: tuple[int, ...]) -> None:
    """Raise ValueError, naming the argument, where what is asked for needs images.

    Args:
        name: of the argument.
        asked: what it is; ``"none"`` asks for nothing.
        shape: of an example.
    """
    if asked != "none" and len(shape) != 3:
        raise ValueError(
            f"`{name}` is {asked!r}, and the examples have shape {tuple(shape)}; it is for images "
            "[height, width, channels] alone."
        )


def check_kinds(dtypes: dict[str, Any]) -> None:
    """Raise ValueError where some images are bytes and others floats, normalised already.

    Args:
        dtypes: by the arguments' names, that of what the run is trained on first.
    """
    (first, trained), *others = dtypes.items()
    for name, dtype in others:
        if (trained == np.uint8) != (dtype == np.uint8):
            raise ValueError(
                f"the images of `{name}` have dtype {dtype}, those of `{first}` {trained}; "
                "give both alike, or the `spec` that says how bytes are normalised."
            )
