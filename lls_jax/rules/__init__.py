"""Rules: how a block learns from its own activation, and the baselines. No Flax."""

from lls_jax.rules.backpropagation import Backpropagation
from lls_jax.rules.base import (
    HeadRule,
    LocalRule,
    PerBlock,
    Rule,
    has_local_losses,
    split_fixed,
)
from lls_jax.rules.classifier import LocalClassifier, RandomLLS
from lls_jax.rules.contrastive import Contrastive
from lls_jax.rules.decoupled import Decoupled
from lls_jax.rules.feedback import DirectFeedback
from lls_jax.rules.periodic import LLS
from lls_jax.rules.predsim import PredSim
from lls_jax.rules.registry import NAMES, OPTIONS, make, options_of

__all__ = [
    "LLS",
    "NAMES",
    "OPTIONS",
    "Backpropagation",
    "Contrastive",
    "Decoupled",
    "DirectFeedback",
    "HeadRule",
    "LocalClassifier",
    "LocalRule",
    "PerBlock",
    "PredSim",
    "RandomLLS",
    "Rule",
    "has_local_losses",
    "make",
    "options_of",
    "split_fixed",
]
