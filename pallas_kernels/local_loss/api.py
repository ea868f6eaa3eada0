"""The public function of the local loss: checks its arguments and picks an implementation."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.local_loss import reference
from pallas_kernels.local_loss.availability import (
    Choice,
    KernelUnavailableError,
    choose_implementation,
    current_device,
    obstacle,
    shape_obstacle,
)
from pallas_kernels.local_loss.config import Config, Problem, choose
from pallas_kernels.local_loss.gradient import KernelOutputs, Launch, LossOptions, differentiable
from pallas_kernels.local_loss.pooling import latent_dim

IMPLEMENTATIONS = ("xla", "pallas", "triton")


@functools.lru_cache(maxsize=64)
def _launcher(implementation: str, config: Config | None, interpret: bool) -> Launch:
    """The launch of a kernel; the same object for the same arguments."""
    backend: Any = importlib.import_module(
        {
            "pallas": "pallas_kernels.local_loss.pallas_triton",
            "triton": "pallas_kernels.local_loss.triton_native",
        }[implementation]
    )

    def launch(
        statics: LossOptions,
        activation: jax.Array,
        projection: jax.Array,
        modulation: jax.Array | None,
        labels: jax.Array,
        *,
        save_latents: bool,
    ) -> KernelOutputs:
        problem = make_problem(activation, projection.shape[1], modulation, statics.pool_size)
        kind = None if interpret else current_device().kind
        return backend.launch(
            problem,
            config or choose(implementation, kind, problem),
            statics,
            activation,
            projection,
            modulation,
            labels,
            save_latents=save_latents,
            interpret=interpret,
        )

    return launch


def make_problem(
    activation: jax.Array, rows: int, modulation: jax.Array | None, pool_size: int
) -> Problem:
    """The shapes of a call, as tile choice and the table of measured tiles know them."""
    spatial = activation.ndim == 4
    return Problem(
        height=activation.shape[1] if spatial else 0,
        width=activation.shape[2] if spatial else 0,
        channels=activation.shape[-1],
        pool_size=pool_size,
        rows=rows,
        classes=rows if modulation is None else modulation.shape[-1],
        modulation="none" if modulation is None else {1: "vector", 2: "matrix"}[modulation.ndim],
        dtype=str(activation.dtype),
    )


def explain(
    activation: jax.Array,
    projection: jax.Array,
    modulation: jax.Array | None,
    *,
    pool_size: int,
) -> Choice:
    """Which implementation ``implementation=None`` would take on the current device, and why.

    Args are those of :func:`local_loss`; only shapes and dtypes count.

    >>> explain(jnp.ones((1, 4)), jnp.eye(2), None, pool_size=2).implementation
    'xla'
    """
    problem = make_problem(activation, projection.shape[0], modulation, pool_size)
    return choose_implementation(current_device(), problem)


def _check(
    activation: jax.Array,
    projection: jax.Array,
    modulation: jax.Array | None,
    labels: jax.Array,
    pool_size: int,
    temperature: float,
    label_smoothing: float,
) -> None:
    if activation.ndim not in (2, 4):
        raise ValueError(
            f"`activation` has shape {activation.shape}; expected [batch, height, width, channels] "
            "or [batch, features]."
        )
    if not jnp.issubdtype(activation.dtype, jnp.floating):
        raise ValueError(f"`activation` has dtype {activation.dtype}; expected a float dtype.")
    if pool_size < 1:
        raise ValueError(f"`pool_size` is {pool_size}; it must be at least 1.")
    if not temperature > 0:
        raise ValueError(f"`temperature` is {temperature}; it must be positive.")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"`label_smoothing` is {label_smoothing}; it must lie in [0, 1).")
    latents = latent_dim(activation.shape[1:], pool_size)
    if projection.ndim != 2 or projection.shape[1] != latents:
        raise ValueError(
            f"`projection` has shape {projection.shape}; expected [rows, {latents}] for an "
            f"activation of shape {activation.shape} pooled to {pool_size}."
        )
    if 0 in activation.shape:
        raise ValueError(f"`activation` has shape {activation.shape}; no axis may be empty.")
    if labels.shape != activation.shape[:1]:
        raise ValueError(
            f"`labels` has shape {labels.shape}; expected {activation.shape[:1]}, one an example."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"`labels` has dtype {labels.dtype}; expected an integer dtype.")
    rows = projection.shape[0]
    if modulation is not None and (modulation.ndim not in (1, 2) or modulation.shape[0] != rows):
        raise ValueError(
            f"`modulation` has shape {modulation.shape}; expected [{rows}] or [{rows}, classes], "
            f"for a projection of {rows} rows, or None."
        )
    classes = rows if modulation is None else modulation.shape[-1]
    # Inside a compiled function their values are not known yet.
    if not isinstance(labels, jax.core.Tracer):
        # NumPy's, because JAX's give no values while another function is traced.
        values = np.asarray(labels)
        least, most = int(values.min()), int(values.max())
        if least < 0 or most >= classes:
            raise ValueError(
                f"`labels` holds {least if least < 0 else most}; expected indices of {classes} "
                f"classes, from 0 to {classes - 1}."
            )


def local_loss(
    activation: jax.Array,
    projection: jax.Array,
    modulation: jax.Array | None,
    labels: jax.Array,
    *,
    pool_size: int,
    temperature: float = 0.5,
    label_smoothing: float = 0.0,
    normalize: bool = True,
    implementation: str | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """A block's local loss: pool, normalise, project, modulate, softmax cross-entropy.

    With ``a`` the activation pooled to ``p x p`` and flattened channel-major::

        z      = a / max(||a||, 1e-12)          (z = a where not `normalize`)
        s      = z W^T
        logits = s,  s * m  or  s M             (no modulation, a vector, a matrix)
        loss   = cross_entropy(logits / temperature, labels, label_smoothing)

    Everything after the activation is computed in float32. Differentiable once, in reverse, with
    respect to `activation`, `projection` and `modulation`.

    Args:
        activation: ``[batch, height, width, channels]`` or ``[batch, features]``, any float dtype.
        projection: ``W``, ``[rows, latents]``; ``latents`` is ``channels * p * p``, or ``p``.
        modulation: None, ``m`` ``[rows]`` or ``M`` ``[rows, classes]``.
        labels: integers ``[batch]``; an index of a class each. Inside a compiled function, where
            their values are not known yet, the loss of a label that is no class is NaN, and so is
            its gradient.
        pool_size: ``p``; bins along each spatial axis, or along the features.
        temperature: divides the logits; positive, dimensionless.
        label_smoothing: share of the target spread evenly over the classes, in [0, 1).
        normalize: whether each example's latents are scaled to unit length.
        implementation: ``"xla"``: plain operations, on any device. ``"pallas"``: one kernel, on
            NVIDIA GPUs of compute capability 8.0 and newer. ``"triton"``: the same kernel in Triton
            itself, with the package jax-triton. None: a kernel where ``pallas_kernels.tune`` has
            measured one to be faster on this device, else ``"xla"``; :func:`explain` tells.
        config: tile sizes of a kernel; None chooses.
        interpret: interpret the kernel instead of compiling it: on any device, slowly, for tests.

    Returns:
        float32 ``[batch]``: the loss of each example.

    Raises:
        ValueError: an argument's shape, dtype or value is wrong, or no such implementation exists.
        KernelUnavailableError: the implementation asked for cannot run here; nothing falls back.

    References:
        Apolinario, Roy, Roy, "LLS: Local Learning Rule for Deep Neural Networks Inspired by Neural
        Activity Synchronization", WACV 2025, https://arxiv.org/abs/2405.15868, section 3.

    >>> local_loss(jnp.ones((1, 4)), jnp.eye(2), None, jnp.array([0]), pool_size=2)
    Array([0.6931472], dtype=float32)
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"`implementation` is {implementation!r}; expected one of "
            f"{', '.join(map(repr, IMPLEMENTATIONS))}, or None to choose."
        )
    _check(activation, projection, modulation, labels, pool_size, temperature, label_smoothing)
    problem = make_problem(activation, projection.shape[0], modulation, pool_size)
    device = current_device()
    name = implementation or choose_implementation(device, problem).implementation
    statics = LossOptions(pool_size, temperature, label_smoothing, normalize)
    classes = problem.classes
    one = jnp.where((labels >= 0) & (labels < classes), jnp.float32(1.0), jnp.float32(jnp.nan))
    labels = jnp.clip(labels, 0, classes - 1)
    if name == "xla":
        loss = reference.local_loss(activation, projection, modulation, labels, **statics._asdict())
        return one * loss
    stopped = shape_obstacle(problem) if interpret else obstacle(name, device, problem)
    if stopped is not None:
        raise KernelUnavailableError(f"implementation {name!r} cannot run here: {stopped}.")
    fused = differentiable(_launcher(name, config, interpret), statics)
    return one * fused(activation, projection, modulation, labels)
