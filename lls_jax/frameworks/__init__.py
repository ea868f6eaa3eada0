"""Blocks and whole models of Flax NNX and Equinox that learn from local losses.

``lls_jax.frameworks.nnx`` and ``lls_jax.frameworks.equinox`` have the same names: a ``LocalBlock``,
its ``update``, and ``localize``, which cuts a model into blocks (:mod:`lls_jax.frameworks.cutting`
says how). Each imports its framework; this package imports neither.
"""
