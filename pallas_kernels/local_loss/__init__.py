"""The local loss of a block: a projection of its latents, and a head."""

from pallas_kernels.errors import KernelUnavailableError
from pallas_kernels.local_loss.api import IMPLEMENTATIONS, head_loss, mean_head_loss, require
from pallas_kernels.local_loss.cross_entropy import cross_entropy
from pallas_kernels.local_loss.heads import Head
from pallas_kernels.local_loss.pooling import adaptive_average_pool, latent_dim, pool_latents
from pallas_kernels.local_loss.tiles import Tiles

__all__ = [
    "IMPLEMENTATIONS",
    "Head",
    "KernelUnavailableError",
    "Tiles",
    "adaptive_average_pool",
    "cross_entropy",
    "head_loss",
    "latent_dim",
    "mean_head_loss",
    "pool_latents",
    "require",
]
