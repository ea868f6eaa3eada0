"""GELU by the error function, in one pass over memory."""

import math

import jax
import jax.numpy as jnp

from lls_jax.layers.normalization import along

_ROOT_OF_HALF = math.sqrt(0.5)
_NORMAL_AT_ZERO = 1 / math.sqrt(2 * math.pi)


def _normal_below(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(_ROOT_OF_HALF * x))


def gelu_slope(x: jax.Array) -> jax.Array:
    """The derivative of :func:`gelu` at `x`, float32 of any shape."""
    return _normal_below(x) + x * (_NORMAL_AT_ZERO * jnp.exp(-0.5 * x * x))


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """``x P(N < x)`` with N normal of mean 0 and deviation 1.

    `flax.linen.gelu(x, approximate=False)` asks for erfc, for which XLA makes several passes over
    memory on a CPU and keeps their results for the gradient; this keeps `x`.

    Args:
        x: any shape; float32 or bfloat16, which is computed in float32.

    Returns:
        As `x`; within 1.2e-6 of the exact value in float32.

    References:
        Hendrycks, Gimpel, https://arxiv.org/abs/1606.08415.
    """
    wide = x.astype(jnp.float32)
    return (wide * _normal_below(wide)).astype(x.dtype)


def _forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), x


def _backward(x: jax.Array, d_y: jax.Array) -> tuple[jax.Array]:
    return ((d_y.astype(jnp.float32) * gelu_slope(x.astype(jnp.float32))).astype(x.dtype),)


gelu.defvjp(_forward, _backward)


@jax.custom_vjp
def biased_gelu(x: jax.Array, bias: jax.Array) -> jax.Array:
    """``gelu(x + bias)``, in float32 whatever the dtype of `x`, which is all that is kept.

    Args:
        x: ``[..., channels]``, float32 or bfloat16.
        bias: float32 ``[channels]``.

    Returns:
        In the shape and dtype of `x`.
    """
    return gelu(_biased(x, bias)).astype(x.dtype)


def _biased(x: jax.Array, bias: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) + along(bias, x)


def _biased_forward(x: jax.Array, bias: jax.Array) -> tuple:
    return biased_gelu(x, bias), (x, bias)


def _biased_backward(residuals: tuple, d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, bias = residuals
    dx = d_y.astype(jnp.float32) * gelu_slope(_biased(x, bias))
    # The bias's gradient is summed in float32 from what is written to memory: for a sum in
    # bfloat16 XLA's CPU backend makes three passes.
    dx = jax.lax.optimization_barrier(dx.astype(x.dtype))
    return dx, jnp.sum(dx.astype(jnp.float32), tuple(range(x.ndim - 1)))


biased_gelu.defvjp(_biased_forward, _biased_backward)
