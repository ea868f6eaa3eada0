"""A cut model as a network of ours, which trains, evaluates and saves it like any other."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lls_jax.arguments import whole_number
from lls_jax.frameworks.cutting import CutModel
from lls_jax.frameworks.tracing import Arrays
from lls_jax.models import BlockSpec, Network

# Bins along each axis of an image or a sequence, and latents of a vector, unless they are given.
_BINS, _LATENTS = 4, 2048


class PartModule(nn.Module):
    """A part of a cut model as a Flax module; its parameters are those of the model it is of.

    Attributes:
        cut: the model.
        index: of the part.
    """

    cut: CutModel
    index: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """``[batch, ...]`` to the activation; dropout where it is trained with a key."""
        part = self.cut.parts[self.index]
        variables: dict[str, Arrays] = {}
        for collection, names, start in (
            ("params", part.params, self.cut.params),
            ("batch_stats", part.state, self.cut.state),
        ):
            if self.is_initializing():
                for name in names:
                    # A copy: a step may take the memory of the state that it is given.
                    self.put_variable(collection, name, jnp.array(start[name], copy=True))
            variables[collection] = {name: self.get_variable(collection, name) for name in names}
        key = self.make_rng("dropout") if train and self.has_rng("dropout") else None
        params, state = variables["params"], variables["batch_stats"]
        activation, new = self.cut.apply(self.index, params, state, x, key, train)
        if train and not self.is_initializing():
            for name, value in new.items():
                self.put_variable("batch_stats", name, value)
        return activation


@dataclasses.dataclass(frozen=True)
class LocalizedNetwork(Network):
    """A model of another framework as a network whose blocks learn from local losses.

    It goes wherever a :class:`lls_jax.models.Network` does.

    Attributes:
        cut: the model in parts.
        rebuild: ``rebuild(params, state)``: the framework's own model with these arrays.
    """

    cut: CutModel = dataclasses.field(kw_only=True)
    rebuild: Callable[[Arrays, Arrays], Any] = dataclasses.field(kw_only=True, repr=False)

    def to_model(self, state: Any) -> Any:
        """The framework's own model with a state's weights and statistics.

        Args:
            state: any with ``params`` and ``batch_stats``, like ``fit(...).evaluation``.

        Returns:
            What was localized, with other arrays; of Equinox models with state, both.

        Raises:
            ValueError: the state is of blocks that were put together in groups.
        """
        names = [*self.block_names, "classifier"]
        if len(names) != len(self.cut.parts):
            raise ValueError(
                "blocks were put together in groups; cut the model at fewer modules instead."
            )
        params, kept = dict(self.cut.params), dict(self.cut.state)
        for name in self.block_names:
            params |= state.params[name]["block"]
            kept |= state.batch_stats[name]["block"]
        return self.rebuild(params | state.params["classifier"], kept)


def make_network(
    cut: CutModel,
    rebuild: Callable[[Arrays, Arrays], Any],
    pool_size: int | Sequence[int] | None,
) -> LocalizedNetwork:
    """A network of a cut model's parts.

    Args:
        cut: the model in parts.
        rebuild: see :class:`LocalizedNetwork`.
        pool_size: of all blocks or of each; None: 4 bins along the axes of images and sequences,
            of vectors all features up to 2048.

    Raises:
        ValueError: there are more or fewer sizes than blocks, or one is no whole number.
    """
    blocks = cut.parts[:-1]
    if pool_size is None:
        sizes = [
            min(part.output.shape[0], _BINS if len(part.output.shape) > 1 else _LATENTS)
            for part in blocks
        ]
    else:
        given: Any = pool_size if np.ndim(pool_size) else [pool_size] * len(blocks)
        sizes = [whole_number("pool_size", size, 1) for size in given]
    if len(sizes) != len(blocks):
        raise ValueError(
            f"`pool_size` has {len(sizes)} sizes for {len(blocks)} blocks; give one for all, or "
            f"{len(blocks)} of them."
        )
    specs = [BlockSpec(PartModule(cut, index), size) for index, size in enumerate(sizes)]
    return LocalizedNetwork(
        name=cut.title,
        num_classes=cut.parts[-1].output.shape[0],
        specs=tuple(specs),
        takes_tokens=len(cut.example.shape) == 2,
        classifier=PartModule(cut, len(blocks)),
        cut=cut,
        rebuild=rebuild,
    )
