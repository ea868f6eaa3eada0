"""Local rules: how a block learns from its own activation. Pure functions, no Flax."""

from lls_jax.rules.backpropagation import Backpropagation
from lls_jax.rules.periodic import PeriodicRule
from lls_jax.rules.registry import NAMES, LocalRule, Rule, make

__all__ = ["NAMES", "Backpropagation", "LocalRule", "PeriodicRule", "Rule", "make"]
