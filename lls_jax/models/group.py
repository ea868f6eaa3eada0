"""Consecutive blocks that learn from one loss."""

import flax.linen as nn
import jax

from lls_jax.blocks import PoolingBlock, call_options
from lls_jax.models.block_spec import BlockSpec


class Group(PoolingBlock):
    """Consecutive blocks that learn from one loss: a gradient flows through all of them.

    Attributes:
        blocks: their modules, in order.
        specs: what happens between them.
    """

    blocks: tuple[nn.Module, ...]
    specs: tuple[BlockSpec, ...]

    def member_names(self) -> tuple[str, ...]:
        """The members' keys in the group's parameters and statistics."""
        return tuple(f"blocks_{i}" for i in range(len(self.blocks)))

    def dropout_keys(self, train: bool) -> tuple[jax.Array | None, ...]:
        """Random keys of the dropout after each member but the last; None where there is none."""
        draws = train and self.has_rng("dropout")
        return tuple(self.make_rng("dropout") if draws else None for _ in self.specs[:-1])

    @nn.compact
    def activate_and_pool(
        self, x: jax.Array, *, train: bool, pool_size: int | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """From the first block's input to the last one's activation, and the means of its windows
        where the last one gives them: see :class:`~lls_jax.blocks.PoolingBlock`.
        """
        for block, spec, key in zip(self.blocks[:-1], self.specs, self.dropout_keys(train)):
            x = spec.transition(block(x, **call_options(block, train)), key)
        last = self.blocks[-1]
        if isinstance(last, PoolingBlock):
            return last.activate_and_pool(x, train=train, pool_size=pool_size)
        return last(x, **call_options(last, train)), None
