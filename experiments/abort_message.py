"""A message from a process that is about to be aborted.

When the coordinator of several processes is lost, JAX's runtime aborts the others at once, from a
thread of its own, with a stack trace and no chance for Python to say what that means. A small
process that waits for this one's end says it.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import NoReturn

_WATCHER = """
import sys
if sys.stdin.buffer.read() != b"goodbye":
    print(sys.argv[1], file=sys.stderr)
"""


def prepare(message: str) -> Callable[[int], NoReturn]:
    """Have a message printed to standard error if this process is killed or aborted.

    Args:
        message: one line.

    Returns:
        ``leave(status)``: ends the process without the message, and without what JAX does at an
        exit: it would wait for processes that are not coming.
    """
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WATCHER, message],
        stdin=subprocess.PIPE,
        # Ctrl-C in the terminal is not for it.
        start_new_session=True,
    )

    def leave(status: int) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        watcher.communicate(b"goodbye")
        os._exit(status)

    return leave
