"""LLS-DNN's PyTorch files, to and from this library."""

from lls_jax.interop.lls_dnn import from_lls_dnn, to_lls_dnn

__all__ = ["from_lls_dnn", "to_lls_dnn"]
