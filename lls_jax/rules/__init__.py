"""Rules: how a block learns from its own activation, and the baselines. No Flax."""

from lls_jax.rules.backpropagation import Backpropagation
from lls_jax.rules.classifier import ClassifierRule
from lls_jax.rules.contrastive import ContrastiveRule
from lls_jax.rules.decoupled import DecoupledRule
from lls_jax.rules.feedback import FeedbackRule
from lls_jax.rules.periodic import PeriodicRule
from lls_jax.rules.predsim import PredSimRule
from lls_jax.rules.protocol import LocalRule, PerBlock, Rule, has_local_losses, without_kernels
from lls_jax.rules.registry import NAMES, OPTIONS, make, options_of

__all__ = [
    "NAMES",
    "OPTIONS",
    "Backpropagation",
    "ClassifierRule",
    "ContrastiveRule",
    "DecoupledRule",
    "FeedbackRule",
    "LocalRule",
    "PerBlock",
    "PeriodicRule",
    "PredSimRule",
    "Rule",
    "has_local_losses",
    "make",
    "options_of",
    "without_kernels",
]
