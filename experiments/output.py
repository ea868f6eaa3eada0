"""Standard output as it is: without all characters, or with nobody who reads it any more."""

import io
import os
import select
import sys


def print_anything() -> None:
    """Let what the terminal has no character for be printed as a question mark."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def is_gone() -> bool:
    """Whether nobody reads it any more, as after ``| head -1``."""
    asked = select.poll()
    asked.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0))


def drop() -> None:
    """Print nowhere from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
