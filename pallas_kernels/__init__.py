"""Kernels for the hot paths of local learning; independent of :mod:`lls_jax`."""
