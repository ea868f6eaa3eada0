"""Functions that back ends do not know, in terms of those that they know, as plain JAX.

Each takes the equation's parameters and its operands, and is traced in the primitive's place. They
keep their relative error near zero, where the plain formula would not.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def _log1p(x: jax.Array) -> jax.Array:
    # What `1 + x` loses, the quotient gives back (Kahan; Higham, "Accuracy and Stability of
    # Numerical Algorithms", section 1.14.1).
    u = 1.0 + x
    # At infinity the quotient is no number.
    return jnp.where((u == 1.0) | (u == jnp.inf), x, jnp.log(u) * (x / (u - 1.0)))


def _expm1(x: jax.Array) -> jax.Array:
    u = jnp.exp(x)
    small = (u - 1.0) * (x / jnp.log(u))
    return jnp.where(u == 1.0, x, jnp.where((u < 0.5) | (u > 2.0), u - 1.0, small))


def _tanh(x: jax.Array) -> jax.Array:
    # Beyond 10 float32 is at 1; so far from it `exp` stays finite.
    t = _expm1(2.0 * jnp.minimum(jnp.abs(x), 10.0))
    size = t / (t + 2.0)
    return jnp.where(x < 0, -size, size)


# Of x P(x^2) / Q(x^2), highest power first: what Eigen and XLA take for float32.
_ERF_P = (2.2905065861350646e-4, 3.4082910107109506e-3, 5.0955695062380861e-2,
          1.8520832239976145e-1, 1.128379143519084)  # fmt: skip
_ERF_Q = (-1.1791602954361697e-7, 2.3547966471313185e-5, 1.0179625278914885e-3,
          1.4070470171167667e-2, 1.1098505178285362e-1, 4.9746925110067538e-1, 1.0)  # fmt: skip
# Of log(erfc(x) / t) + x^2, with t = 1 / (1 + x / 2), to 1.2e-7: a Chebyshev fit (Press et al.,
# "Numerical Recipes", section 6.2). In float32 exp(-x^2) adds to it, 6e-6 at x = 9.
_ERFC = (0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807,
         -0.18628806, 0.09678418, 0.37409196, 1.00002368, -1.26551223)  # fmt: skip


def _polynomial(coefficients: Sequence[Any], x: jax.Array) -> jax.Array:
    """By Horner's rule, highest power first."""
    value = x * 0 + coefficients[0]
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def _erf(x: jax.Array) -> jax.Array:
    # From there on float32 is at 1.
    x = jnp.minimum(jnp.maximum(x, -3.832506856900711), 3.832506856900711)
    return x * _polynomial(_ERF_P, x * x) / _polynomial(_ERF_Q, x * x)


def _sign(x: jax.Array) -> jax.Array:
    zero = x * 0
    return jnp.where(x > 0, zero + 1, jnp.where(x < 0, zero - 1, zero))


def _integer_pow(x: jax.Array, exponent: int) -> jax.Array:
    power, square, left = None, x, abs(exponent)
    while left:
        if left & 1:
            power = square if power is None else power * square
        left >>= 1
        square = square * square if left else square
    power = x * 0 + 1 if power is None else power
    return 1 / power if exponent < 0 else power


def _pow(x: jax.Array, y: jax.Array) -> jax.Array:
    y = y.astype(x.dtype)
    power = jnp.exp(y * jnp.log(jnp.abs(x)))
    # Of a negative number only whole powers are real; odd ones have its sign.
    is_odd = jnp.floor(0.5 * y) != 0.5 * y
    signed = jnp.where(jnp.floor(y) == y, jnp.where(is_odd, -power, power), jnp.nan)
    return jnp.where(y == 0, 1.0, jnp.where(x < 0, signed, power))


def _erfc(x: jax.Array) -> jax.Array:
    # Where erf is 1 to the last bit, the distance from it still counts.
    t = 1.0 / (1.0 + 0.5 * jnp.abs(x))
    tail = t * jnp.exp(_polynomial(_ERFC, t) - x * x)
    return jnp.where(x < 0, 2.0 - tail, tail)


def _ceil(x: jax.Array) -> jax.Array:
    return -jnp.floor(-x)


REWRITES: dict[str, Callable[..., Any]] = {
    "log1p": lambda params, x: _log1p(x),
    "expm1": lambda params, x: _expm1(x),
    "tanh": lambda params, x: _tanh(x),
    "logistic": lambda params, x: 1.0 / (1.0 + jnp.exp(-x)),
    "sign": lambda params, x: _sign(x),
    "is_finite": lambda params, x: jnp.abs(x) < jnp.inf,
    "integer_pow": lambda params, x: _integer_pow(x, params["y"]),
    "square": lambda params, x: x * x,
    "one_minus_square": lambda params, x: 1.0 - x * x,
    "pow": lambda params, x, y: _pow(x, y),
    "exp2": lambda params, x: jnp.exp(x * 0.6931471805599453),
    "erf": lambda params, x: _erf(x),
    "polynomial": lambda params, x, *coefficients: _polynomial(coefficients[::-1], x),
    "erfc": lambda params, x: _erfc(x),
    "ceil": lambda params, x: _ceil(x),
    "clamp": lambda params, low, x, high: jnp.minimum(jnp.maximum(x, low), high),
}
