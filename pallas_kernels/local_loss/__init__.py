"""The fused local loss: pool, project, modulate, cross-entropy."""

from pallas_kernels.local_loss.api import IMPLEMENTATIONS, local_loss
from pallas_kernels.local_loss.pooling import adaptive_average_pool, pool_latents

__all__ = ["IMPLEMENTATIONS", "adaptive_average_pool", "local_loss", "pool_latents"]
