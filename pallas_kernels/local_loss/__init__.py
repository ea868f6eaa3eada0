"""The fused local loss: pool, project, modulate, cross-entropy."""

from pallas_kernels.local_loss.api import IMPLEMENTATIONS, explain, local_loss
from pallas_kernels.local_loss.availability import Choice, KernelUnavailableError, require
from pallas_kernels.local_loss.config import Config
from pallas_kernels.local_loss.pooling import adaptive_average_pool, latent_dim, pool_latents

__all__ = [
    "IMPLEMENTATIONS",
    "Choice",
    "Config",
    "KernelUnavailableError",
    "adaptive_average_pool",
    "explain",
    "latent_dim",
    "local_loss",
    "pool_latents",
    "require",
]
