"""The public functions of the op: they check their arguments and pick a form."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.errors import KernelUnavailableError
from pallas_kernels.local_loss import xla
from pallas_kernels.local_loss.availability import Device, current_device, obstacle
from pallas_kernels.local_loss.heads import Head, inspect_head, is_learned
from pallas_kernels.local_loss.results import Call, Form, Results
from pallas_kernels.local_loss.tiles import Tiles, choose_tiles

IMPLEMENTATIONS = ("xla", "split", "pallas", "triton")
_MODULES = {"split": "split", "pallas": "pallas_triton", "triton": "triton_native"}


@functools.lru_cache(maxsize=8)
def _form(implementation: str) -> Form:
    module: Any = importlib.import_module(f"pallas_kernels.local_loss.{_MODULES[implementation]}")
    return module.launch


def _check(
    latents: jax.Array, projection: jax.Array, labels: jax.Array, implementation: str | None
) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"`implementation` is {implementation!r}; expected one of "
            f"{', '.join(map(repr, IMPLEMENTATIONS))}, or None to choose."
        )
    if latents.ndim != 2 or 0 in latents.shape:
        raise ValueError(
            f"`latents` has shape {latents.shape}; expected [batch, latents], neither of them 0."
        )
    for name, array in (("latents", latents), ("projection", projection)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"`{name}` has dtype {array.dtype}; expected a float dtype.")
    if projection.ndim != 2 or projection.shape[1] != latents.shape[1] or not len(projection):
        raise ValueError(
            f"`projection` has shape {projection.shape}; expected [rows, {latents.shape[1]}] for "
            f"latents of shape {latents.shape}."
        )
    if not isinstance(labels, jax.Array | np.ndarray):
        raise ValueError(
            f"`labels` is {labels!r}; expected an array of integers {latents.shape[:1]}, one an "
            "example: pass `jnp.asarray(labels)`."
        )
    if labels.shape != latents.shape[:1]:
        raise ValueError(
            f"`labels` has shape {labels.shape}; expected {latents.shape[:1]}, one an example."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"`labels` has dtype {labels.dtype}; expected an integer dtype.")


def _on_shards(launch: Any, mesh: jax.sharding.Mesh, leaves: int) -> Any:
    """The launch on each device's rows of the batch, since the compiler cannot cut a kernel."""
    (axis,) = mesh.axis_names
    rows, everywhere = jax.sharding.PartitionSpec(axis), jax.sharding.PartitionSpec()

    def on_rows(*arrays: Any) -> Results:
        results = launch(*arrays)
        return results._replace(d_learned=jax.lax.psum(results.d_learned, axis))

    return jax.shard_map(
        on_rows,
        mesh=mesh,
        in_specs=(rows, everywhere, rows, rows, *(everywhere for _ in range(leaves))),
        out_specs=Results(rows, rows, rows, everywhere),  # type: ignore[arg-type]
        check_vma=False,
    )


def _differentiable(
    head: Head,
    form: Form,
    is_mean: bool,
    tiles: Tiles,
    interpret: bool,
    mesh: jax.sharding.Mesh | None,
) -> Any:
    """``loss(latents, projection, labels, *leaves)``, differentiable once, in reverse."""

    def run(arrays: Any, weights: Any, wants_scores: bool) -> Results:
        def launch(latents: Any, projection: Any, labels: Any, weights: Any, *leaves: Any) -> Any:
            params = list(leaves)
            return form(
                Call(
                    head, params, latents, projection, labels, weights,
                    wants_scores, tiles, interpret,
                )
            )  # fmt: skip

        latents, projection, labels, *leaves = arrays
        call = launch if mesh is None else _on_shards(launch, mesh, len(leaves))
        return call(latents, projection, labels, weights, *leaves)

    def total(losses: jax.Array) -> jax.Array:
        return jnp.mean(losses) if is_mean else losses

    @jax.custom_vjp
    def loss(*arrays: Any) -> jax.Array:
        return total(run(arrays, None, False).loss)

    def forward(*given: Any) -> Any:
        # A fixed projection is not perturbed, and then the scores' gradient is not needed.
        arrays, wants_scores = tuple(x.value for x in given), given[1].perturbed
        if is_mean:
            # What comes down is one number, by which the gradients of the mean are multiplied:
            # they can be made in the same launch.
            batch = arrays[0].shape[0]
            results = run(arrays, jnp.full(batch, 1 / batch, jnp.float32), wants_scores)
            return total(results.loss), (arrays, results, wants_scores)
        return run(arrays, None, False).loss, (arrays, None, wants_scores)

    def backward(kept: Any, cotangent: Any) -> Any:
        arrays, results, wants_scores = kept
        latents, projection, _, *leaves = arrays
        if isinstance(cotangent, SymbolicZero):
            cotangent = jnp.zeros(cotangent.shape, cotangent.dtype)
        scale: Any = cotangent
        if results is None:
            results, scale = run(arrays, cotangent, wants_scores), jnp.float32(1)
        d_projection = None
        if results.d_scores is not None:
            d_projection = jnp.matmul(
                results.d_scores.T, latents.astype(jnp.float32), precision="highest"
            )
            d_projection = (scale * d_projection).astype(projection.dtype)
        learned = iter(results.d_learned)
        d_leaves = [
            (scale * next(learned)).astype(leaf.dtype) if is_learned(leaf) else None
            for leaf in leaves
        ]
        d_latents = (scale * results.d_latents.astype(jnp.float32)).astype(latents.dtype)
        return (d_latents, d_projection, None, *d_leaves)

    loss.defvjp(forward, backward, symbolic_zeros=True)
    return loss


def _loss(
    latents: jax.Array,
    projection: jax.Array,
    labels: jax.Array,
    head: Head,
    params: Any,
    implementation: str | None,
    tiles: Tiles | None,
    interpret: bool,
    mesh: jax.sharding.Mesh | None,
    is_mean: bool,
) -> jax.Array:
    _check(latents, projection, labels, implementation)
    params = jax.tree.map(jnp.asarray, params)
    leaves, tree = jax.tree.flatten(params)
    used, couples = inspect_head(head, projection.shape[0], params, labels.dtype)
    if implementation in (None, "xla"):
        losses = xla.head_loss(latents, projection, labels, head, params)
        return jnp.mean(losses) if is_mean else losses
    assert implementation is not None
    stopped = None if interpret else obstacle(implementation, current_device())
    if stopped is not None:
        raise KernelUnavailableError(
            f"implementation {implementation!r} cannot run here: {stopped}."
        )
    if couples and mesh is not None:
        raise KernelUnavailableError(
            "the head couples the examples of a batch, which is on several devices; use 'xla'."
        )

    def of_used(scores: Any, square: Any, seen: Any, label: Any) -> jax.Array:
        given = iter(seen)
        all_leaves = [next(given) if use else leaf for use, leaf in zip(used, empty)]
        return head(scores, square, jax.tree.unflatten(tree, all_leaves), label)

    # What the head does not look at is not the kernel's.
    seen = [leaf for use, leaf in zip(used, leaves) if use]
    empty = [None if use else np.zeros(leaf.shape, leaf.dtype) for use, leaf in zip(used, leaves)]
    rows, num_latents = projection.shape
    kind = current_device().kind
    tiles = tiles or choose_tiles(implementation, kind, rows, num_latents, seen)
    loss = _differentiable(of_used, _form(implementation), is_mean, tiles, interpret, mesh)
    return loss(latents, projection, labels, *seen)


def head_loss(
    latents: jax.Array,
    projection: jax.Array,
    labels: jax.Array,
    head: Head,
    params: Any,
    implementation: str | None = None,
    interpret: bool = False,
    *,
    tiles: Tiles | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
    """The local loss of each example, from a projection of its latents and a head.

    With ``z`` the latents of an example and ``W`` the projection::

        s = W z,    q = |z|^2,    loss = head(s, q, params, label)

    Everything is computed in float32. Differentiable once, in reverse, with respect to `latents`,
    `projection` and the floats among `params`.

    Args:
        latents: ``z``, ``[batch, latents]``, any float dtype.
        projection: ``W``, ``[rows, latents]``, any float dtype.
        labels: integers ``[batch]``.
        head: ``head(scores, square, params, label)``, the loss of one example, a float32 scalar:
            of float32 ``[rows]``, a float32 scalar, `params`, and an integer.
        params: a pytree of arrays, the same for all examples.
        implementation: ``"xla"``: plain operations, on any device. ``"split"``: kernels before and
            behind the head, which XLA computes; any head. ``"pallas"``: one kernel with the head
            inside. ``"triton"``: the same in Triton itself, with the package jax-triton. Kernels
            run on NVIDIA GPUs of compute capability 8.0 and newer. None: ``"xla"``; a training run
            measures which is the fastest, and names it.
        interpret: interpret the kernel instead of compiling it: on any device, slowly, for tests.
        tiles: sizes of a kernel; None for those that ``python -m pallas_kernels.tune`` has measured
            on this device, or else for some that fit.
        mesh: of one axis, over which the batch is sharded; None where it is on one device.

    Returns:
        float32 ``[batch]``.

    Raises:
        ValueError: an argument's shape, dtype or value is wrong, or no such implementation exists.
        KernelUnavailableError: the implementation asked for cannot run here, or cannot have
            something in this head; nothing falls back.

    References:
        Apolinario, Roy, Roy, "LLS: Local Learning Rule for Deep Neural Networks Inspired by Neural
        Activity Synchronization", WACV 2025, https://arxiv.org/abs/2405.15868, section 3.

    >>> def head(scores, square, params, label):
    ...     logits = params["gain"] * scores / jnp.sqrt(square)
    ...     return -jax.nn.log_softmax(logits)[label]
    >>> head_loss(jnp.ones((1, 4)), jnp.eye(2, 4), jnp.array([0]), head, {"gain": 1.0})
    Array([0.6931472], dtype=float32)
    """
    return _loss(
        latents, projection, labels, head, params, implementation, tiles, interpret, mesh, False
    )


def mean_head_loss(
    latents: jax.Array,
    projection: jax.Array,
    labels: jax.Array,
    head: Head,
    params: Any,
    implementation: str | None = None,
    interpret: bool = False,
    *,
    tiles: Tiles | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
    """The mean of :func:`head_loss` over the batch, a float32 scalar.

    Its gradient is known up to one factor when its value is computed, so that a kernel is launched
    once for both, where :func:`head_loss` takes two launches. The arguments are the same.

    >>> def head(scores, square, params, label):
    ...     return jnp.square(scores[label] - 1.0)
    >>> mean_head_loss(jnp.ones((1, 4)), jnp.eye(2, 4), jnp.array([0]), head, {})
    Array(0., dtype=float32)
    """
    return _loss(
        latents, projection, labels, head, params, implementation, tiles, interpret, mesh, True
    )


def require(implementation: str, device: Device | None = None) -> None:
    """Raise KernelUnavailableError where an implementation cannot run.

    Args:
        implementation: one of :data:`IMPLEMENTATIONS`.
        device: None for the current one.
    """
    stopped = obstacle(implementation, device or current_device())
    if stopped is not None:
        raise KernelUnavailableError(
            f"implementation {implementation!r} cannot run here: {stopped}."
        )
