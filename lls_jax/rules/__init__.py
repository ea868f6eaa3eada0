"""Rules: how a block learns from its own activation, and the baselines. No Flax."""

from lls_jax.rules.auglocal import AugLocal
from lls_jax.rules.backpropagation import Backpropagation
from lls_jax.rules.base import (
    HeadRule,
    LocalRule,
    PerBlock,
    Rule,
    has_local_losses,
    split_fixed,
)
from lls_jax.rules.centered import CenteredLLS
from lls_jax.rules.classifier import LocalClassifier, RandomLLS
from lls_jax.rules.contrastive import Contrastive
from lls_jax.rules.decoupled import Decoupled
from lls_jax.rules.deeper_forward import DeeperForward
from lls_jax.rules.distance_forward import DistanceForward
from lls_jax.rules.feedback import DirectFeedback
from lls_jax.rules.infopro import InfoPro
from lls_jax.rules.mono_forward import MonoForward
from lls_jax.rules.periodic import LLS
from lls_jax.rules.predsim import PredSim
from lls_jax.rules.registry import NAMES, OPTIONS, OURS, make, options_of
from lls_jax.rules.surroundings import (
    LabeledImages,
    LaterBlock,
    Surroundings,
    Targets,
    labels_of,
)

__all__ = [
    "LLS",
    "NAMES",
    "OPTIONS",
    "OURS",
    "AugLocal",
    "Backpropagation",
    "CenteredLLS",
    "Contrastive",
    "Decoupled",
    "DeeperForward",
    "DirectFeedback",
    "DistanceForward",
    "HeadRule",
    "InfoPro",
    "LabeledImages",
    "LaterBlock",
    "LocalClassifier",
    "LocalRule",
    "MonoForward",
    "PerBlock",
    "PredSim",
    "RandomLLS",
    "Rule",
    "Surroundings",
    "Targets",
    "has_local_losses",
    "labels_of",
    "make",
    "options_of",
    "split_fixed",
]
