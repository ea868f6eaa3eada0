"""How many blocks local losses teach, as options say it: 2, or 1,2,1,2, each loss its own."""

from collections.abc import Sequence
from typing import Any

from simple_parsing import field

# As it is typed, and as a run's folder has it.
TypedReach = int | str


def _numbers(text: str) -> tuple[int, ...]:
    """Numbers that are joined by commas; none where it is anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        return ()


def parse(text: str) -> TypedReach:
    """The value of an option, in one spelling; what is wrong stays as it is.

    >>> parse("2"), parse("1, 2,1,02"), parse("two")
    (2, '1,2,1,2', 'two')
    """
    numbers = _numbers(text)
    if len(numbers) == 1:
        return numbers[0]
    return ",".join(map(str, numbers)) or text


def one(default: TypedReach) -> Any:
    """The field of an option that has one of them."""
    return field(default=default, type=parse, metavar="N[,N...]")


def several(*default: TypedReach) -> Any:
    """The field of an option that has one or more of them, with spaces between."""
    return field(default_factory=lambda: [*default], type=parse, nargs="*", metavar="N[,N...]")


def of_losses(reach: TypedReach) -> int | tuple[int, ...]:
    """As the library takes it.

    Raises:
        ValueError: it is no number of blocks, nor several.

    >>> of_losses(2), of_losses("1,2,1,2")
    (2, (1, 2, 1, 2))
    """
    numbers = _numbers(str(reach))
    if min(numbers, default=0) < 1:
        raise ValueError(
            f"--reach is {reach}; expected a number of blocks, or one for each loss and at last "
            "the classifier's, like 1,2,1,2; each at least 1."
        )
    return numbers[0] if len(numbers) == 1 else numbers


def check(reaches: Sequence[TypedReach]) -> None:
    """Raise ValueError unless there are reaches to compare, each of which could be one."""
    if not reaches:
        raise ValueError("--reach is empty; expected one or more.")
    for reach in reaches:
        of_losses(reach)
