"""Runs on a GPU that repeat to the bit: what is asked of XLA, and what is kept with the run.

On a GPU two starts of one program differ in the last bits for two reasons. Some algorithms add in
the order in which threads happen to come: XLA leaves them out where it is told to. And which
algorithm is taken is measured anew by each process that compiles: so what a run has compiled stays
in its folder, with the results of the autotuner, and every start of the run loads it. (XLA's own
folder of results alone does not hold all of them: openxla/xla issue 37902.) Both are read when JAX
starts, once.
"""

import os
import pathlib
import re

from experiments import startup
from lls_jax.errors import UserError

_EXACT = "xla_gpu_exclude_nondeterministic_ops"


def environment(folder: pathlib.Path) -> dict[str, str]:
    """What JAX has to find in the environment, besides XLA's flag.

    Args:
        folder: of the run.
    """
    # Of no other run, which may have chosen otherwise; whole, however large; and machine code of
    # this kind of CPU.
    return {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(folder.absolute() / "compiled" / startup.kind_of_cpu()),
        "JAX_COMPILATION_CACHE_MAX_SIZE": "-1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def prepare(folder: pathlib.Path) -> None:
    """Set up the environment of a run; to be called before JAX is imported.

    Args:
        folder: of the run.

    Raises:
        UserError: the environment asks XLA for something else.
    """
    given = os.environ.get("XLA_FLAGS", "")
    found = _exact(given)
    if found is None:
        os.environ["XLA_FLAGS"] = f"{given} --{_EXACT}=true".strip()
    elif not found:
        raise UserError(
            f"--deterministic needs XLA's flag {_EXACT}, which XLA_FLAGS in the environment turns "
            "off; take it out there, or leave --deterministic out."
        )
    os.environ.update(environment(folder))


def check(folder: pathlib.Path, platform: str) -> None:
    """Say so where a run is about to start without what it was asked for.

    Args:
        folder: of the run.
        platform: the kind of device that it runs on.

    Raises:
        UserError: it runs on a GPU, and JAX has started without :func:`prepare`.
    """
    wanted = environment(folder)
    is_ready = _exact(os.environ.get("XLA_FLAGS", "")) and all(
        os.environ.get(name) == value for name, value in wanted.items()
    )
    if platform == "gpu" and not is_ready:
        raise UserError(
            "--deterministic has to be known before JAX starts; start the run as a command, like "
            "`python -m experiments.cifar10 --deterministic`, or with "
            f"XLA_FLAGS=--{_EXACT}=true {' '.join(f'{n}={value}' for n, value in wanted.items())} "
            "in the environment."
        )


def _exact(given: str) -> bool | None:
    """Whether XLA's flag is on; None where it is not there. The last one counts."""
    found = re.findall(rf"--{_EXACT}(?:=(\S*))?(?:\s|$)", given)
    return found[-1].lower() in ("", "true", "1") if found else None
