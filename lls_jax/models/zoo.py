"""The published models, as data."""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from lls_jax.blocks import ConvBlock, DenseBlock
from lls_jax.models.network import BlockSpec, Network


def _small_conv(num_classes: int, dtype: Any) -> Network:
    return Network(
        name="small_conv",
        num_classes=num_classes,
        specs=(
            BlockSpec(ConvBlock(32, dtype), pool_size=4, hidden_dim=512, max_pool=True),
            BlockSpec(ConvBlock(64, dtype), pool_size=2, hidden_dim=256, max_pool=True),
            BlockSpec(
                ConvBlock(128, dtype), pool_size=2, hidden_dim=512, average_pool=2, flatten=True
            ),
            BlockSpec(DenseBlock(512, dtype), pool_size=512, hidden_dim=512),
        ),
        dtype=dtype,
        basis_rows=20,
        smallest_image=4,
    )


_MODELS: dict[str, Callable[[int, Any], Network]] = {"small_conv": _small_conv}

NAMES = tuple(_MODELS)


def make(name: str, *, num_classes: int, dropout: float = 0.0, dtype: Any = jnp.float32) -> Network:
    """Make a model by its name.

    Args:
        name: ``small_conv``.
        num_classes: outputs of the classifier, at least 2.
        dropout: rate of the dropout after each pooling between blocks, in [0, 1).
        dtype: of the activations, float32 or bfloat16; parameters are float32.

    Returns:
        An immutable, hashable description; :meth:`Network.init` draws its parameters.

    Raises:
        ValueError: an unknown name, or an option out of its range.

    >>> [spec.module.features for spec in make("small_conv", num_classes=10).specs]
    [32, 64, 128, 512]

    References:
        Apolinario, Roy, Roy, https://arxiv.org/abs/2405.15868, section 4.
    """
    if name not in _MODELS:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown model {name!r}; expected one of {', '.join(NAMES)}.{hint}")
    if num_classes < 2:
        raise ValueError(f"`num_classes` is {num_classes}; it must be at least 2.")
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` is {dropout}; it must lie in [0, 1).")
    network = _MODELS[name](num_classes, dtype)
    if not dropout:
        return network
    specs = tuple(
        dataclasses.replace(spec, dropout=dropout)
        if spec.max_pool or spec.average_pool is not None
        else spec
        for spec in network.specs
    )
    return dataclasses.replace(network, specs=specs)
