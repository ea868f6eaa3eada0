"""LLS and its modulated variants: a fixed projection onto periodic vectors."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from lls_jax.basis import periodic_basis
from pallas_kernels.local_loss import latent_dim, local_loss, takes_pooled

_MODULATION_STDDEV = 0.01


@dataclasses.dataclass(frozen=True)
class PeriodicRule:
    """LLS, LLS-M, LLS-MxM and LLS-MxM with a reduced basis.

    The latents of a block, scaled to unit length, are projected onto a fixed periodic basis ``W``
    (:func:`lls_jax.basis.periodic_basis`); the scores ``s``, modulated, are logits:
    ``s`` (LLS), ``s * m`` (LLS-M), ``s M`` (LLS-MxM). ``m`` and ``M`` are learned with the block.

    Attributes:
        name: the rule's name.
        num_classes: number of classes, ``K``.
        modulation: ``"none"``, ``"vector"`` (``m`` ``[K]``) or ``"matrix"`` (``M`` ``[R, K]``).
        basis_rows: rows of the basis, ``R``; ``K`` unless the modulation is a matrix.
        waveform: ``"square"`` or ``"cosine"``.
        temperature: divides the logits; positive, dimensionless.
        label_smoothing: share of the target spread evenly over the classes, in [0, 1).
        implementation: of :func:`pallas_kernels.local_loss.local_loss`; None chooses.
    """

    name: str
    num_classes: int
    modulation: Literal["none", "vector", "matrix"]
    basis_rows: int
    waveform: str = "square"
    temperature: float = 0.5
    label_smoothing: float = 0.0
    implementation: str | None = None

    works_on_latents: ClassVar[bool] = True

    @property
    def pools_itself(self) -> bool:
        """Whether a kernel pools while it reads the activation, so that nobody else need."""
        return not takes_pooled(self.implementation)

    def init(
        self, key: jax.Array, latent_dim: int, hidden_dim: int | None = None
    ) -> dict[str, jax.Array]:
        """The rule's learned parameters: ``{}`` or ``{"modulation": ...}``, drawn N(0, 0.01^2).

        Args:
            key: random key.
            latent_dim: number of latents; not needed here, the basis is a constant.
            hidden_dim: not needed here.
        """
        del latent_dim, hidden_dim
        shapes = {"vector": (self.num_classes,), "matrix": (self.basis_rows, self.num_classes)}
        if self.modulation == "none":
            return {}
        return {
            "modulation": _MODULATION_STDDEV
            * jax.random.normal(key, shapes[self.modulation], jnp.float32)
        }

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
        latents = latent_dim(activation.shape[1:], pool_size)
        per_example = local_loss(
            activation,
            jnp.asarray(periodic_basis(self.basis_rows, latents, self.waveform)),
            params.get("modulation"),
            labels,
            pool_size=pool_size,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
            implementation=self.implementation,
        )
        return jnp.mean(per_example)
