"""How many blocks local losses teach, as options say it: 2, or 1,2,1,2, each loss its own."""

from collections.abc import Sequence

# As it is typed, and as a run's folder has it.
Reach = int | str


def parse(text: str) -> Reach:
    """The value of an option.

    >>> parse("2"), parse("1,2,1,2")
    (2, '1,2,1,2')
    """
    return int(text) if text.isdecimal() else text


def of_losses(reach: Reach) -> int | tuple[int, ...]:
    """As the library takes it.

    Raises:
        ValueError: it is no number of blocks, nor several.

    >>> of_losses(2), of_losses("1,2,1,2")
    (2, (1, 2, 1, 2))
    """
    try:
        numbers = tuple(int(part) for part in str(reach).split(","))
    except ValueError:
        numbers = ()
    if min(numbers, default=0) < 1:
        raise ValueError(
            f"--reach is {reach}; expected a number of blocks, or one for each loss and at last "
            "the classifier's, like 1,2,1,2; each at least 1."
        )
    return reach if isinstance(reach, int) else numbers


def check(reaches: Sequence[Reach]) -> None:
    """Raise ValueError unless there are reaches to compare, each a number of blocks."""
    if not reaches:
        raise ValueError("--reach is empty; expected one or more.")
    for reach in reaches:
        of_losses(reach)
