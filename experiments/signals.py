"""Ctrl-C and SIGTERM that let the step under way finish."""

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

# A large network has several steps under way, and statistics to take anew before it is saved.
_NOTED = b"stopping: the steps under way are finished and saved; once more ends at once, unsaved\n"


class Signals:
    """Notes Ctrl-C and SIGTERM, so that the step under way can finish; a second ends at once.

    Attributes:
        received: the number of the signal that came last; None before.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def _note(self, number: int, frame: Any) -> None:
        del frame
        self.received = number
        signal.signal(number, signal.SIG_DFL)
        # Not print: what it interrupts may be in the midst of printing. Nobody may listen.
        with contextlib.suppress(OSError):
            os.write(2, _NOTED)

    @staticmethod
    def is_signal(number: int) -> bool:
        """Whether what stopped a run is the number of one of these signals."""
        return number in (signal.SIGINT, signal.SIGTERM)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note them meanwhile, instead of what they did before."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        old = [signal.signal(number, self._note) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, old):
                signal.signal(number, handler)
