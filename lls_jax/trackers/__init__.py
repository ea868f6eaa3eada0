"""Callbacks that send each epoch's record on, to where people look at runs."""

from lls_jax.trackers.base import Tracker, scalars
from lls_jax.trackers.registry import NAMES, make, require

__all__ = ["NAMES", "Tracker", "make", "require", "scalars"]
