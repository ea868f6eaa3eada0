"""LLS and its modulated variants: a fixed projection onto periodic vectors."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lls_jax.rules.base import check_choice
from lls_jax.rules.basis import check_latents, check_waveform, periodic_basis
from lls_jax.rules.cross_entropy import CrossEntropyRule, draw_modulation

_NAMES = {"none": "lls", "vector": "lls_m", "matrix": "lls_mxm"}


@dataclasses.dataclass(frozen=True)
class LLS(CrossEntropyRule):
    """LLS, LLS-M, LLS-MxM and LLS-MxM with a reduced basis.

    The latents of a block, scaled to unit length, are projected onto a fixed periodic basis ``W``
    (:func:`lls_jax.rules.basis.periodic_basis`); the scores ``s``, modulated, are logits:
    ``s`` (LLS), ``s * m`` (LLS-M), ``s M`` (LLS-MxM). ``m`` and ``M`` are learned with the block.

    Attributes:
        num_classes: number of classes, ``K``.
        temperature: divides the logits; positive, dimensionless.
        label_smoothing: share of the target spread evenly over the classes, in [0, 1).
        implementation, interpret: see :class:`HeadRule`.
        modulation: ``"none"``, ``"vector"`` (``m`` ``[K]``) or ``"matrix"`` (``M`` ``[R, K]``).
        basis_rows: rows of a reduced basis, ``R``, with a matrix only; None for ``K``.
        waveform: ``"square"`` or ``"cosine"``.

    References:
        Apolinario, Roy, Roy, https://arxiv.org/abs/2405.15868, section 3.

    >>> LLS(num_classes=10, modulation="matrix").name
    'lls_mxm'
    """

    modulation: Literal["none", "vector", "matrix"] = "none"
    basis_rows: int | None = None
    waveform: str = "square"

    def __post_init__(self) -> None:
        """Raise ValueError for an option that is out of its range."""
        super().__post_init__()
        check_choice("modulation", self.modulation, _NAMES)
        check_waveform(self.waveform)
        if self.basis_rows is not None and (self.basis_rows < 1 or self.modulation != "matrix"):
            raise ValueError(
                f"`basis_rows` is {self.basis_rows} with modulation {self.modulation!r}; it must "
                "be at least 1, and only a matrix takes the rows to the classes."
            )

    @property
    def name(self) -> str:
        """``lls``, ``lls_m``, ``lls_mxm`` or ``lls_mxm_reduced``."""
        return _NAMES[self.modulation] + ("" if self.basis_rows is None else "_reduced")

    @property
    def rows(self) -> int:
        """Rows of the basis, ``R``."""
        return self.num_classes if self.basis_rows is None else self.basis_rows

    def init(
        self, key: jax.Array, activation_shape: tuple[int, ...], pool_size: int
    ) -> dict[str, Any]:
        """The learned parameters: ``{}`` or ``{"modulation": ...}``, drawn N(0, 0.01^2).

        The basis is a constant. Args are those of :meth:`Rule.init`.
        """
        check_latents(activation_shape, pool_size)
        shapes = {"vector": (self.num_classes,), "matrix": (self.rows, self.num_classes)}
        if self.modulation == "none":
            return {}
        return {"modulation": draw_modulation(key, shapes[self.modulation])}

    def projection(self, params: dict[str, Any], latent_dim: int) -> jax.Array:
        """The periodic basis, ``[rows, latents]``."""
        del params
        return jnp.asarray(periodic_basis(self.rows, latent_dim, self.waveform))
