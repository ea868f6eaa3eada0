"""Matrix products on CPUs: the precision of their factors, and the form that is fast."""

import jax
import jax.numpy as jnp

from lls_jax.platforms import multiplies_bfloat16


def product_dtype(dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """The dtype that a product's factors are written to memory in, for activations of a dtype.

    bfloat16 where the machine multiplies it, into float32 sums; else float32, because XLA would
    make float32 copies of bfloat16 factors first.
    """
    return jnp.bfloat16 if dtype == jnp.bfloat16 and multiplies_bfloat16() else jnp.float32


def wants_least_rounding() -> bool:
    """Whether the program asks JAX for products as exact as float32 can be.

    By ``jax.default_matmul_precision("highest")``, as one who compares numbers does. It is read
    when a function is traced, and when its way back is.
    """
    asked = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return asked in ("highest", "float32", "F32_F32_F32", "F64_F64_F64")


def sum_over_rows(below: jax.Array, above: jax.Array) -> jax.Array:
    """``below' above``, the product of a weight gradient.

    Args:
        below: ``[rows, channels]``.
        above: ``[rows, features]``, in the same dtype.

    Returns:
        float32 ``[channels, features]``.
    """
    if below.dtype == jnp.bfloat16 and multiplies_bfloat16():
        # XLA's CPU backend gives a product to the bfloat16 units only if the axis that is summed
        # over is the last of its first factor. It would fold a plain transpose into the product;
        # it does not fold this one, which changes nothing. For 512 to 8,192 rows and 64 to 256
        # channels on an Intel Xeon with AMX it takes 0.2 to 0.7 of the time of the product as it
        # stands (jax 0.12.0.1 and 0.10.2; in float32 1.0 to 1.4).
        transposed = jnp.where(jnp.isnan(below.T), jnp.nan, below.T)
        transposed = jax.lax.optimization_barrier(transposed)
        return jnp.matmul(transposed, above, preferred_element_type=jnp.float32)
    over_rows = (((0,), (0,)), ((), ()))
    return jax.lax.dot_general(below, above, over_rows, preferred_element_type=jnp.float32)
