"""Strictness that finds silent upcasts and broadcasting mistakes in our own code."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
