"""What arguments of the library's functions must be like."""

import operator
from typing import Any


def whole_number(name: str, value: Any, least: int) -> int:
    """A number of things, as Python's own; NumPy's integers will do.

    Args:
        name: of the argument, for errors.
        value: what was given.
        least: what it must be at least.

    Raises:
        ValueError: it is smaller, or no whole number.

    >>> import numpy as np
    >>> whole_number("epochs", np.int64(3), 1)
    3
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"`{name}` is {value!r}; it must be a whole number, at least {least}.")
    return number
