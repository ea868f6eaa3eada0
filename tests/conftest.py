"""One environment for every test, and for the processes that tests start."""

import atexit
import importlib.metadata
import os
import shutil
import tempfile

import pytest

# Many tests train the same tiny network, some in processes of their own, and two workers share the
# tests: compile it once. What the first process has set, those that it starts find.
if "LLS_JAX_TEST_CACHE" not in os.environ:
    os.environ["LLS_JAX_TEST_CACHE"] = tempfile.mkdtemp(prefix="lls_jax-compiled-")
    atexit.register(shutil.rmtree, os.environ["LLS_JAX_TEST_CACHE"], ignore_errors=True)
_cache = os.environ["LLS_JAX_TEST_CACHE"]
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["TRITON_CACHE_DIR"] = os.path.join(_cache, "triton")
# Tests compile much and compute little. The programs are the same; only machine code is made with
# less care, in half the time.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA's older emitter makes the same programs in half the time; later lines no longer have it.
EMITTERS = "--xla_cpu_use_fusion_emitters"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _flags = os.environ.get("XLA_FLAGS", "")
    if EMITTERS not in _flags:
        os.environ["XLA_FLAGS"] = f"{_flags} {EMITTERS}=false"
# Silent upcasts and accidental broadcasts are errors; some users' programs ask for the same.
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# What Triton 3.9 asks to be said.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
if not os.environ.get("LLS_JAX_TEST_GPU"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")


EXHAUSTIVE = os.environ.get("LLS_JAX_EXHAUSTIVE")


def pytest_collection_modifyitems(items):
    """Leave out what tries every combination, unless it is asked for."""
    if EXHAUSTIVE:
        return
    skip = pytest.mark.skip(reason="LLS_JAX_EXHAUSTIVE is not set")
    for item in items:
        if "exhaustive" in item.keywords:
            item.add_marker(skip)
