"""What a linear classifier reads from each block: ridge regression onto the classes."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lls_jax.blocks import apply_module
from lls_jax.models import Network
from pallas_kernels.local_loss import pool_latents

Examples = Iterable[tuple[jax.Array, jax.Array]]


@functools.partial(jax.jit, static_argnums=0)
def block_latents(model: Network, variables: Any, image: jax.Array) -> tuple[jax.Array, ...]:
    """Each block's activation in evaluation, pooled as its local loss pools it.

    Args:
        model: the network.
        variables: ``{"params", "batch_stats"}``, the weights and statistics to evaluate.
        image: normalised, ``[batch, ...]``.

    Returns:
        float32 ``[batch, latents]``, one a block.
    """
    x, latents = image.astype(model.dtype), []
    for name, spec in zip(model.block_names, model.specs):
        own, stats = variables["params"][name]["block"], variables["batch_stats"][name]["block"]
        activation, _ = apply_module(spec.module, own, stats, x, train=False)
        latents.append(pool_latents(activation, spec.pool_size))
        x = spec.transition(activation, None)
    return tuple(latents)


class Probe(NamedTuple):
    """A linear classifier of latents.

    Attributes:
        weights: float64 ``[latents, classes]``.
        bias: float64 ``[classes]``.
    """

    weights: np.ndarray
    bias: np.ndarray

    def accuracy(self, latents: Any, labels: Any) -> float:
        """Share of examples whose largest output is the right class, in percent.

        Args:
            latents: ``[examples, latents]``.
            labels: integers ``[examples]``.
        """
        right = np.argmax(np.asarray(latents, np.float64) @ self.weights + self.bias, axis=1)
        return 100 * float(np.mean(right == np.asarray(labels)))


class _Sums(NamedTuple):
    """Over examples ``x`` with targets ``y``: how many, and the sums of x, y, x x^T and x y^T."""

    count: Any
    x: Any
    y: Any
    xx: Any
    xy: Any


@functools.partial(jax.jit, static_argnums=2)
def _sums(latents: jax.Array, labels: jax.Array, num_classes: int) -> _Sums:
    x, y = latents.astype(jnp.float32), jax.nn.one_hot(labels, num_classes)
    product = functools.partial(jnp.matmul, precision="highest")
    return _Sums(jnp.float32(len(x)), x.sum(0), y.sum(0), product(x.T, x), product(x.T, y))


def _solve(sums: _Sums, penalty: float) -> Probe:
    mean_x, mean_y = sums.x / sums.count, sums.y / sums.count
    covariance = sums.xx / sums.count - np.outer(mean_x, mean_x)
    # Where no latent varies any ridge gives weights of 0.
    ridge = penalty * np.trace(covariance) / len(mean_x) or 1.0
    targets = sums.xy / sums.count - np.outer(mean_x, mean_y)
    weights = np.linalg.solve(covariance + ridge * np.eye(len(mean_x)), targets)
    return Probe(weights, mean_y - mean_x @ weights)


def _check_penalty(penalty: float) -> None:
    if not 0 < penalty < float("inf"):
        raise ValueError(f"`penalty` is {penalty}; it must be positive.")


def fit_probe(latents: Any, labels: Any, *, num_classes: int, penalty: float = 1e-3) -> Probe:
    """Ridge regression of the classes on latents, with an intercept, in closed form::

        min over W, b of  mean |W^T x + b - y|^2 + penalty * v * |W|^2

    with y one at the class and zero elsewhere, and v the mean variance of a latent, so that the
    penalty means the same whatever the latents' scale.

    Args:
        latents: ``[examples, latents]``.
        labels: integers ``[examples]``.
        num_classes: number of classes.
        penalty: dimensionless, positive.

    Raises:
        ValueError: the penalty is not positive.
    """
    _check_penalty(penalty)
    sums = _sums(jnp.asarray(latents), jnp.asarray(labels), num_classes)
    return _solve(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), sums), penalty)


def probe_accuracies(
    model: Network,
    variables: Any,
    training: Examples,
    held_out: Examples,
    *,
    penalty: float = 1e-3,
) -> list[float]:
    """How much a linear classifier reads from each block, in percent.

    One is fitted to each block's latents (:func:`block_latents`) on some examples, and judged on
    others. No gradient descent, and no random draw.

    Args:
        model: the network.
        variables: ``{"params", "batch_stats"}``, the weights and statistics to evaluate.
        training: ``(image, label)``, batches that the probes are fitted to.
        held_out: likewise, that they are judged on.
        penalty: as of :func:`fit_probe`.

    Raises:
        ValueError: there are no examples, or the penalty is not positive.
    """
    _check_penalty(penalty)
    total: list[_Sums] | None = None
    for image, label in training:
        rows = [
            _sums(latents, label, model.num_classes)
            for latents in block_latents(model, variables, image)
        ]
        # Over batches in float64.
        new = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), rows)
        total = new if total is None else jax.tree.map(np.add, total, new)
    if total is None:
        raise ValueError("`training` has no examples to fit a probe to.")
    probes = [_solve(sums, penalty) for sums in total]
    right, count = np.zeros(len(probes)), 0
    for image, label in held_out:
        for index, latents in enumerate(block_latents(model, variables, image)):
            right[index] += probes[index].accuracy(latents, label) * len(label) / 100
        count += len(label)
    if not count:
        raise ValueError("`held_out` has no examples to judge a probe on.")
    return [100 * float(one) / count for one in right]
