"""What the losses of rules ask of their arguments."""

from typing import Any

import jax
import numpy as np


def is_class(labels: Any, num_classes: int) -> Any:
    """Which labels are classes: integers ``[...]`` to bools ``[...]``."""
    return (labels >= 0) & (labels < num_classes)


def check_labels(labels: Any, num_classes: int | None) -> None:
    """Raise ValueError for a label that is no class.

    Inside a compiled function, where the values of labels are not known yet, nothing is checked:
    there such a label makes the losses of this library's rules NaN.

    Args:
        labels: integers ``[batch]``.
        num_classes: how many classes there are; None where any number will do.
    """
    if num_classes is None or isinstance(labels, jax.core.Tracer):
        return
    # NumPy's, because JAX's give no values while another function is traced.
    values = np.asarray(labels)
    wrong = values[~is_class(values, num_classes)]
    if wrong.size:
        raise ValueError(
            f"`labels` holds {wrong[0]}; expected indices of {num_classes} classes, from 0 to "
            f"{num_classes - 1}."
        )


def required_pool_size(rule_name: str, pool_size: int | None) -> int:
    """The size that a rule pools the activation with; ValueError where there is none."""
    if pool_size is None:
        raise ValueError(
            f"`pool_size` is None; rule {rule_name!r} pools the activation itself: give the number "
            "of bins along each spatial axis, or along the features."
        )
    return pool_size
