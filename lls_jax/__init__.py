"""Local learning in JAX: each block of a network trained from its own loss.

Importing this package touches no device and imports no submodule: take what you need with
``from lls_jax import rules, models, training, interop``.
"""

__version__ = "0.1.0"
