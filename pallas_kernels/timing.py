"""Time functions on a device, and the local loss among them."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.local_loss import Tiles, mean_head_loss
from pallas_kernels.local_loss.shapes import Problem

_LEAST_SECONDS = 0.01


def _own(number: int) -> int:
    return number


def turns(
    functions: Sequence[Callable[[], Any]], count: int, agree: Callable[[int], int] = _own
) -> list[float]:
    """Median seconds of a call of each function, the functions taking turns.

    A turn is as many calls as take about 10 ms, dispatched without waiting in between, so that what
    is measured on a GPU is the GPU.

    Args:
        functions: compiled already; each returns arrays.
        count: turns that each function takes.
        agree: makes one number of those of several processes, whose functions wait for each other
            and must be called equally often.
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
        repeats.append(agree(max(1, min(1000, int(_LEAST_SECONDS / seconds(function, 3))))))
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
    """Random latents, projection, labels and parameters of a problem."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        name: jax.random.normal(keys[2], shape.shape) for name, shape in problem.params.items()
    }
    return (
        jax.random.normal(keys[0], (batch, problem.latents)),
        jnp.sign(jax.random.normal(keys[1], (problem.rows, problem.latents))),
        jax.random.randint(keys[3], (batch,), 0, problem.classes),
        params,
    )


def loss_and_gradients(
    problem: Problem,
    batch: int,
    implementation: str,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Callable[[], Any]:
    """A compiled call: the mean loss, and its gradients to the latents and the parameters."""
    latents, projection, labels, params = arguments(problem, batch)

    def loss(learned: Any, projection: Any, labels: Any) -> Any:
        return mean_head_loss(
            learned[0],
            projection,
            labels,
            problem.head,
            learned[1],
            implementation,
            interpret,
            tiles=tiles,
        )

    inputs = ((latents, params), projection, labels)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*inputs).compile()
    return lambda: compiled(*inputs)


def least_bytes(problem: Problem, batch: int) -> int:
    """What must move: the latents are read and their gradient written, once each; float32."""
    return 2 * batch * problem.latents * 4
