"""A supervised Forward-Forward: the mean of a group of channels is a class's goodness."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lls_jax.rules.base import check_options
from lls_jax.rules.cross_entropy import HeadOfClasses, smoothed_losses
from pallas_kernels.local_loss import latent_dim


def group_means(num_classes: int, channels: int) -> np.ndarray:
    """The mean over each class's channels as a matrix, float32 ``[classes, channels]``.

    The channels are cut into as many groups as there are classes, of sizes as equal as can be.

    >>> group_means(2, 3)
    array([[0.5, 0.5, 0. ],
           [0. , 0. , 1. ]], dtype=float32)
    """
    group = np.arange(channels) * num_classes // channels
    members = (group[None, :] == np.arange(num_classes)[:, None]).astype(np.float32)
    return members / members.sum(axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class DeeperForward(HeadOfClasses):
    """Each class has a group of channels, whose mean activation is its goodness; nothing is drawn.

    ``loss = CE(g / temperature, y)`` with ``g_k`` the mean over the channels of group ``k`` and
    over the image. There are no negative examples and no labels in the image.

    In the paper a block has no BatchNorm, and what it passes on is normalised group by group, so
    that goodness is not just handed on. Blocks here normalise themselves, and pass on what they
    make.

    Attributes:
        num_classes: number of classes, ``K``; a block has at least as many channels.
        temperature: divides the goodness; positive, dimensionless. The paper's is 1, for
            activations of any size; a normalised block's are about 1, and their means over groups
            close to each other.
        label_smoothing: of the cross-entropy, in [0, 1).

    References:
        Sun, Zhang, He, Wen, Shen, Xie, "DeeperForward: Enhanced Forward-Forward Training for Deeper
        and Better Performance", ICLR 2025. The grouping: Papachristodoulou et al., "Convolutional
        Channel-wise Competitive Learning for the Forward-Forward Algorithm", AAAI 2024,
        https://arxiv.org/abs/2312.12668.
    """

    num_classes: int
    temperature: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError for an option that is out of its range."""
        check_options(self.num_classes, self.temperature, self.label_smoothing)

    @property
    def name(self) -> str:
        """``deeper_forward``."""
        return "deeper_forward"

    @property
    def fixed(self) -> frozenset[str]:
        """The groups stay."""
        return frozenset({"groups"})

    def init(
        self, key: jax.Array, activation_shape: tuple[int, ...], pool_size: int
    ) -> dict[str, Any]:
        """``{"groups": ...}``, :func:`group_means` of the channels, or of a vector's latents.

        Args are those of :meth:`Rule.init`.

        Raises:
            ValueError: there are more classes than channels.
        """
        del key
        is_vector = len(activation_shape) == 1
        channels = latent_dim(activation_shape, pool_size) if is_vector else activation_shape[-1]
        if channels < self.num_classes:
            raise ValueError(
                f"a block of {channels} channels has no group for each of {self.num_classes} "
                "classes; rule 'deeper_forward' needs a wider network."
            )
        return {"groups": jnp.asarray(group_means(self.num_classes, channels))}

    def projection(self, params: dict[str, Any], latent_dim: int) -> jax.Array:
        """The mean over each group's latents, ``[classes, latents]``."""
        groups = jax.lax.stop_gradient(params["groups"])
        # Latents are channel-major: a channel's windows lie together.
        windows = latent_dim // groups.shape[1]
        return jnp.repeat(groups / windows, windows, axis=1)

    def head(
        self, scores: jax.Array, square: jax.Array, params: dict[str, Any], label: jax.Array
    ) -> jax.Array:
        """The cross-entropy of one example; see :meth:`HeadRule.head`."""
        del square, params
        return smoothed_losses(scores / self.temperature, label, self.label_smoothing)
