"""How weights are drawn."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Initializer = Callable[..., jax.Array]


def fan_in_uniform(fan_in: int) -> Initializer:
    """The initialiser ``U(-1/sqrt(fan_in), 1/sqrt(fan_in))``, PyTorch's for weights and biases."""
    bound = 1.0 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
