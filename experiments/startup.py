"""What a command asks of its process before JAX starts: memory that stays, compiled code kept."""

import hashlib
import os
import pathlib
import sys

# Temporaries in huge pages, and memory that is free kept for the next step. Measured on two cores:
# up to half of a step goes into page faults without the first, a tenth to a fifth without the rest.
_MALLOC = ":".join(
    f"glibc.malloc.{setting}"
    for setting in ("hugetlb=1", "mmap_max=0", f"trim_threshold={2**33}", "arena_max=1")
)
_CACHE_BYTES = 2**30


def prepare() -> None:
    """Set up the process, once; to be called before JAX is imported."""
    keep_compiled()
    keep_memory()


def keep_memory() -> None:
    """Start this process again with memory in huge pages that it keeps, where glibc can be told to.

    XLA's CPU backend takes a step's temporaries from malloc, which gets them from the kernel anew
    each time, in pages of 4 KiB: half of a step can go into page faults. glibc reads the
    settings when a process starts, and only then. Where GLIBC_TUNABLES is set, its owner decides.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = _MALLOC
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_compiled() -> None:
    """Let JAX keep what it compiles in the user's cache folder, a GiB at most.

    Where JAX_COMPILATION_CACHE_DIR is set, its owner decides; an empty one keeps nothing.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(_CACHE_BYTES))
        # All of them: a run of the digits has sixty, most of a tenth of a second.
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def cache_folder() -> pathlib.Path:
    """Where this process's programs are kept: machine code for its kind of CPU, and no other.

    And for as many CPUs: XLA's CPU backend cuts operations into parts when it compiles, but its key
    of a kept program does not say for how many. (A step that a process of one CPU has kept is 4 to
    15 % slower on two than one that is compiled for two, jax 0.12.0.1.)
    """
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "lls_jax" / "compiled" / f"{kind_of_cpu()}-{count_cpus()}"


def count_cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def kind_of_cpu() -> str:
    """A name for the instructions that this CPU has; a home folder may be shared by several."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "any"
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:12]
