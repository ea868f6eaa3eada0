"""One environment for every test, and for the processes that tests start."""

import atexit
import os
import shutil
import tempfile

# Many tests train the same tiny network, some in processes of their own: compile it once.
_cache = tempfile.mkdtemp(prefix="lls_jax-compiled-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["TRITON_CACHE_DIR"] = os.path.join(_cache, "triton")
# What Triton 3.9 asks to be said.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
if not os.environ.get("LLS_JAX_TEST_GPU"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
