"""Seeing how a network learns: its gradients, its features and its heads, block by block."""

from lls_jax.analysis.gradients import (
    GradientComparison,
    compare_gradients,
    gradient_norms,
    make_gradients,
)
from lls_jax.analysis.heads import head_accuracies, head_losses
from lls_jax.analysis.measure import MEASURES, Measure
from lls_jax.analysis.probes import Probe, block_latents, fit_probe, probe_accuracies

__all__ = [
    "MEASURES",
    "GradientComparison",
    "Measure",
    "Probe",
    "block_latents",
    "compare_gradients",
    "fit_probe",
    "gradient_norms",
    "head_accuracies",
    "head_losses",
    "make_gradients",
    "probe_accuracies",
]
