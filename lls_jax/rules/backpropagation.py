"""The baseline: no local losses, one gradient from the classifier through every block."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Backpropagation:
    """Stands where a local rule does, and tells the training step to backpropagate.

    Attributes:
        name: ``"bp"``.
        num_classes: number of classes.
    """

    name: str
    num_classes: int

    def init(
        self, key: jax.Array, latent_dim: int, hidden_dim: int | None = None
    ) -> dict[str, jax.Array]:
        """No parameters."""
        del key, latent_dim, hidden_dim
        return {}
