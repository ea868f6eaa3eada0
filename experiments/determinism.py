"""Runs on a GPU that repeat to the bit: what is asked of XLA, and what is kept with the run.

On a GPU two starts of one program differ in the last bits for two reasons: some algorithms add in
the order in which threads happen to come, and which algorithm is taken is decided by how long each
takes, anew in each process. XLA leaves out the former where it is told to, and reads the latter's
results from a folder, which is the run's. It reads its flags once, when JAX starts.
"""

import atexit
import contextlib
import os
import pathlib
import re
from importlib import metadata

from lls_jax.errors import UserError


def flags(folder: pathlib.Path) -> dict[str, str]:
    """XLA's flags for a run in that folder.

    Args:
        folder: of the run.
    """
    # XLA does not look whether another version wrote there.
    version = metadata.version("jaxlib")
    return {
        "xla_gpu_exclude_nondeterministic_ops": "true",
        "xla_gpu_per_fusion_autotune_cache_dir": str(folder.absolute() / "autotuned" / version),
    }


def prepare(folder: pathlib.Path) -> None:
    """Put the flags into the environment; to be called before JAX is imported.

    Args:
        folder: of the run.

    Raises:
        UserError: the environment asks XLA for something else.
    """
    given = os.environ.get("XLA_FLAGS", "")
    missing = []
    for name, value in flags(folder).items():
        found = _value(given, name)
        if found is None:
            missing.append(
                f'--{name}="{value}"' if re.search(r"\s", value) else f"--{name}={value}"
            )
        elif found != value:
            raise UserError(
                f"--deterministic needs XLA's flag {name} to be {value}, and XLA_FLAGS in the "
                f"environment has it {found}; take it out there, or leave --deterministic out."
            )
    kept = pathlib.Path(flags(folder)["xla_gpu_per_fusion_autotune_cache_dir"])
    made = [path for path in (kept, *kept.parents) if not path.exists()]
    try:
        kept.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--deterministic keeps XLA's choices in {kept}, which cannot be made "
            f"({error.strerror}); give another --workdir."
        ) from error
    # Nothing is written there without a GPU, or in a run that does not begin.
    atexit.register(_remove_empty, made)
    os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()
    # A program that another run has compiled has that run's algorithms.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"


def check(folder: pathlib.Path, platform: str) -> None:
    """Say so where a run is about to start without what it was asked for.

    Args:
        folder: of the run.
        platform: the kind of device that it runs on.

    Raises:
        UserError: it runs on a GPU, and the flags were not there when JAX started.
    """
    given = os.environ.get("XLA_FLAGS", "")
    wanted = flags(folder)
    if platform == "gpu" and any(_value(given, name) != wanted[name] for name in wanted):
        raise UserError(
            "--deterministic needs XLA's flags before JAX starts; start the run as a command, or "
            f"with XLA_FLAGS='{' '.join(f'--{name}={value}' for name, value in wanted.items())}' "
            "and JAX_ENABLE_COMPILATION_CACHE=false in the environment."
        )


def _value(given: str, name: str) -> str | None:
    """What a flag is set to; the last one counts."""
    found = re.findall(rf"""--{name}(?:=(?:"([^"]*)"|'([^']*)'|(\S*)))?(?:\s|$)""", given)
    return None if not found else "".join(found[-1]) or "true"


def _remove_empty(folders: list[pathlib.Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
