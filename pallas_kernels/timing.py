"""Time functions on a device, and the local loss among them."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.local_loss import Config, latent_dim, local_loss
from pallas_kernels.local_loss.config import Problem

_LEAST_SECONDS = 0.01


def turns(functions: Sequence[Callable[[], Any]], count: int) -> list[float]:
    """Median seconds of a call of each function, the functions taking turns.

    A turn is as many calls as take about 10 ms, dispatched without waiting in between, so that what
    is measured on a GPU is the GPU.

    Args:
        functions: compiled already; each returns arrays.
        count: turns that each function takes.
    """

    def seconds(function: Callable[[], Any], repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            result = function()
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / repeats

    repeats = []
    for function in functions:
        jax.block_until_ready(function())
        repeats.append(max(1, min(1000, int(_LEAST_SECONDS / seconds(function, 3)))))
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(count):
        for function, often, kept in zip(functions, repeats, times):
            kept.append(seconds(function, often))
    return [statistics.median(kept) for kept in times]


def copy_bandwidth(num_bytes: int = 1 << 28) -> float:
    """Measured bytes per second, read and written, of copying an array on the default device."""
    source = jnp.zeros(num_bytes // 4, jnp.float32)
    # Adding what is not known to be zero keeps XLA from returning its argument.
    copy = jax.jit(lambda x, y: x + y)
    one = jnp.float32(1)
    (seconds,) = turns([lambda: copy(source, one)], 10)
    return 2 * num_bytes / seconds


def arguments(problem: Problem, batch: int) -> tuple[Any, ...]:
    """Random activation, projection, modulation and labels of a problem."""
    keys = jax.random.split(jax.random.key(0), 4)
    shape: tuple[int, ...] = (problem.channels,)
    if problem.is_spatial:
        shape = (problem.height, problem.width, problem.channels)
    latents = latent_dim(shape, problem.pool_size)
    modulations = {"vector": (problem.rows,), "matrix": (problem.rows, problem.classes)}
    modulation = None
    if problem.modulation != "none":
        modulation = jax.random.normal(keys[2], modulations[problem.modulation])
    return (
        jax.random.normal(keys[0], (batch, *shape), problem.dtype),
        jnp.sign(jax.random.normal(keys[1], (problem.rows, latents))),
        modulation,
        jax.random.randint(keys[3], (batch,), 0, problem.classes),
    )


def loss_and_gradients(
    problem: Problem,
    batch: int,
    implementation: str,
    config: Config | None = None,
    interpret: bool = False,
) -> Callable[[], Any]:
    """A compiled call: the mean loss, and its gradients to the activation and the modulation."""
    activation, projection, modulation, labels = arguments(problem, batch)

    def loss(learned: Any, projection: Any, labels: Any) -> Any:
        losses = local_loss(
            learned[0],
            projection,
            learned[1],
            labels,
            pool_size=problem.pool_size,
            implementation=implementation,
            config=config,
            interpret=interpret,
        )
        return jnp.mean(losses)

    inputs = ((activation, modulation), projection, labels)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*inputs).compile()
    return lambda: compiled(*inputs)


def least_bytes(problem: Problem, batch: int) -> int:
    """What must move: the activation is read and its gradient written, once each."""
    activation = problem.channels * (problem.height * problem.width or 1)
    return 2 * batch * activation * jnp.dtype(problem.dtype).itemsize
