"""Local classifiers, learned or fixed and random: a linear map of the latents to the classes."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.local_loss import (
    adaptive_average_pool,
    latent_dim,
    local_loss,
    takes_pooled,
)

_FEEDBACK_STDDEV = 0.1
_MODULATION_STDDEV = 0.01


@dataclasses.dataclass(frozen=True)
class ClassifierRule:
    """A local classifier, and LLS with a random basis in place of the periodic one.

    A matrix ``Q`` ``[K, hidden]`` is reduced along `hidden` to the number of latents by adaptive
    average pooling; with ``a`` the pooled activation, not normalised, the logits are ``a Q^T``.
    ``local_classifier`` learns ``Q``; ``lls_random`` keeps it as it was drawn; ``lls_m_random`` has
    ``m[:, None] * Q`` and ``lls_mxm_random`` ``M Q``, with ``m``, ``M`` learned.

    Attributes:
        name: the rule's name.
        num_classes: number of classes, ``K``.
        modulation: ``"none"``, ``"vector"`` (``m`` ``[K]``) or ``"matrix"`` (``M`` ``[K, K]``).
        learned: whether ``Q`` is learned.
        temperature: divides the logits; positive, dimensionless.
        label_smoothing: share of the target spread evenly over the classes, in [0, 1).
        implementation: of :func:`pallas_kernels.local_loss.local_loss`; None chooses.

    References:
        Apolinario, Roy, Roy, https://arxiv.org/abs/2405.15868, sections 3.2 and 4.3. Mostafa,
        Ramesh, Cauwenberghs, "Deep supervised learning using local errors",
        https://arxiv.org/abs/1711.06756 (local classifiers).
    """

    name: str
    num_classes: int
    modulation: Literal["none", "vector", "matrix"] = "none"
    learned: bool = False
    temperature: float = 0.5
    label_smoothing: float = 0.0
    implementation: str | None = None

    works_on_latents: ClassVar[bool] = True

    @property
    def fixed(self) -> frozenset[str]:
        """The parameters that training leaves alone."""
        return frozenset() if self.learned else frozenset({"feedback"})

    @property
    def pools_itself(self) -> bool:
        """Whether a kernel pools while it reads the activation, so that nobody else need."""
        return not takes_pooled(self.implementation)

    def init(
        self, key: jax.Array, latent_dim: int, hidden_dim: int | None = None
    ) -> dict[str, jax.Array]:
        """``{"feedback": Q}``, N(0, 0.1^2), and ``"modulation"``, N(0, 0.01^2), where there is one.

        Args:
            key: random key.
            latent_dim: number of latents.
            hidden_dim: columns of ``Q``; None for as many as there are latents.
        """
        feedback_key, modulation_key = jax.random.split(key)
        width = hidden_dim or latent_dim
        params = {
            "feedback": _FEEDBACK_STDDEV
            * jax.random.normal(feedback_key, (self.num_classes, width), jnp.float32)
        }
        shapes = {"vector": (self.num_classes,), "matrix": (self.num_classes, self.num_classes)}
        if self.modulation != "none":
            params["modulation"] = _MODULATION_STDDEV * jax.random.normal(
                modulation_key, shapes[self.modulation], jnp.float32
            )
        return params

    def loss(
        self, params: dict[str, Any], activation: jax.Array, labels: jax.Array, *, pool_size: int
    ) -> jax.Array:
        """The local loss, a float32 scalar: the mean over the batch.

        Args:
            params: from :meth:`init`.
            activation: ``[batch, height, width, channels]`` or ``[batch, features]``.
            labels: integers ``[batch]``.
            pool_size: bins along each spatial axis, or along the features.
        """
        feedback = params["feedback"]
        if not self.learned:
            feedback = jax.lax.stop_gradient(feedback)
        latents = latent_dim(activation.shape[1:], pool_size)
        modulation = params.get("modulation")
        if modulation is not None and modulation.ndim == 2:
            # a (M Q)^T = (a Q^T) M^T: the small product is the modulation's.
            modulation = modulation.T
        per_example = local_loss(
            activation,
            adaptive_average_pool(feedback, latents),
            modulation,
            labels,
            pool_size=pool_size,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
            normalize=False,
            implementation=self.implementation,
        )
        return jnp.mean(per_example)
