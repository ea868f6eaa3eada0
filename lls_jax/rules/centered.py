"""LLS on centred latents, read by many periodic vectors: a rule of this library's own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lls_jax.rules.basis import check_latents, check_waveform, periodic_basis
from lls_jax.rules.cross_entropy import CrossEntropyRule, draw_modulation

_FEWEST_ROWS = 100


@dataclasses.dataclass(frozen=True)
class CenteredLLS(CrossEntropyRule):
    """LLS-MxM with more rows than classes, on latents without what a batch has in common.

    With ``a`` the pooled activation, ``W`` the periodic basis
    (:func:`lls_jax.rules.basis.periodic_basis`) and ``M`` learned with the block::

        z = a - mean of a over the batch,    logits = (W z / |z|) M

    With as many rows as classes an error can move a block's weights along that few fixed
    directions only; and activations are positive, so that most of a latent vector's length is
    their mean, and the differences between images are small beside it. ``TRIALS.md`` beside this
    file has what was measured, and what else was tried.

    In a batch of one image nothing is left: it has to be trained in batches.

    Attributes:
        num_classes: number of classes, ``K``.
        temperature: divides the logits; positive, dimensionless.
        label_smoothing: share of the target spread evenly over the classes, in [0, 1).
        implementation, interpret: see :class:`HeadRule`.
        basis_rows: rows of the basis, ``R``; None for 100, or ``K`` where there are more classes.
        waveform: ``"square"`` or ``"cosine"``.

    References:
        LLS: Apolinario, Roy, Roy, https://arxiv.org/abs/2405.15868, section 3. The rule is ours.

    >>> CenteredLLS(num_classes=10).rows, CenteredLLS(num_classes=200).rows
    (100, 200)
    """

    basis_rows: int | None = None
    waveform: str = "square"

    def __post_init__(self) -> None:
        """Raise ValueError for an option that is out of its range."""
        super().__post_init__()
        check_waveform(self.waveform)
        if self.basis_rows is not None and self.basis_rows < 1:
            raise ValueError(f"`basis_rows` is {self.basis_rows}; it must be at least 1.")

    @property
    def name(self) -> str:
        """``lls_centered``."""
        return "lls_centered"

    @property
    def rows(self) -> int:
        """Rows of the basis, ``R``."""
        return self.basis_rows or max(_FEWEST_ROWS, self.num_classes)

    def init(
        self, key: jax.Array, activation_shape: tuple[int, ...], pool_size: int
    ) -> dict[str, Any]:
        """``{"modulation": M}``, ``[R, K]``, drawn N(0, 0.01^2). Args are those of `Rule.init`."""
        check_latents(activation_shape, pool_size)
        return {"modulation": draw_modulation(key, (self.rows, self.num_classes))}

    def observe(self, activation: jax.Array, pool_size: int | None) -> jax.Array:
        """The latents without their mean over the batch; as they are where they are given.

        Args are those of :meth:`LocalRule.observe`.
        """
        latents = super().observe(activation, pool_size)
        if pool_size is None:
            return latents
        return latents - jnp.mean(latents, axis=0, keepdims=True)

    def projection(self, params: dict[str, Any], latent_dim: int) -> jax.Array:
        """The periodic basis, ``[rows, latents]``."""
        del params
        return jnp.asarray(periodic_basis(self.rows, latent_dim, self.waveform))
