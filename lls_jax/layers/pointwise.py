"""1x1 convolutions whose gradient is fast on CPUs too."""

import jax

from lls_jax.layers.products import sum_over_rows
from lls_jax.platforms import by_platform


def _pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _pointwise_on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _pointwise(x, kernel)


def _pointwise_forward(x: jax.Array, kernel: jax.Array) -> tuple:
    return _pointwise(x, kernel), (x, kernel)


def _pointwise_backward(residuals: tuple, dy: jax.Array) -> tuple:
    x, kernel = residuals
    x_rows, dy_rows = (array.reshape(-1, array.shape[-1]) for array in (x, dy))
    dx = jax.lax.dot_general(dy_rows, kernel, (((1,), (1,)), ((), ())))
    # Automatic differentiation asks for the transpose, for
    # which XLA computes all of `dy` again, transposed. The barrier keeps the transpose that an
    # optimizer's passes may prefer away from the product.
    d_kernel = jax.lax.optimization_barrier(sum_over_rows(x_rows, dy_rows))
    return dx.reshape(x.shape), d_kernel.astype(kernel.dtype)


_pointwise_on_cpu.defvjp(_pointwise_forward, _pointwise_backward)


def pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 1x1 convolution.

    Args:
        x: ``[..., channels]``.
        kernel: ``[channels, features]``, in the dtype of `x`.

    Returns:
        ``[..., features]``.
    """
    return by_platform(x, kernel, cpu=_pointwise_on_cpu, elsewhere=lambda x, kernel: x @ kernel)
