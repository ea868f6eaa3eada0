"""Where and how a config's steps are executed."""

import sys
from typing import Any

import jax
import jax.numpy as jnp

from experiments.config import TrainConfig
from experiments.reach_options import of_losses
from lls_jax import data, placement, training
from lls_jax.errors import UserError
from lls_jax.models import Network
from lls_jax.rules import Rule


def bytes_above(mebibytes: int | None) -> int | None:
    """What --remat means: bytes from which on it is done; None for never."""
    return (mebibytes or 0) * 2**20 or None


def slice_above(config: TrainConfig) -> int | None:
    """What --slice means: bytes from which on it is done; None for what the device is best at."""
    # With --remat only 0 is allowed beside it, which it overrules.
    if config.slice is None or config.remat:
        return None
    return config.slice * 2**20 or sys.maxsize


def pipeline_options(config: TrainConfig) -> dict[str, Any]:
    """What :func:`lls_jax.placement.pipeline` and the measurements for it are told."""
    return {
        "remat_above": bytes_above(config.remat),
        "reach": of_losses(config.reach),
        "slice_above": slice_above(config),
    }


def make(
    config: TrainConfig, spec: data.DatasetSpec, model: Network, rule: Rule, tx: training.Optimizer
) -> placement.Execution | None:
    """How the config wants a step to be executed; None for the plain way.

    Raises:
        UserError: there are too few devices, or the config asks for what cannot be together.
    """
    devices = jax.devices()
    wanted = config.pipeline or config.data_parallel or (config.coordinator and len(devices))
    if not wanted:
        return None
    name = "--pipeline" if config.pipeline else "--data-parallel"
    if config.coordinator and wanted != len(devices):
        raise UserError(
            f"{name} is {wanted}, but the {jax.process_count()} processes have {len(devices)} "
            "devices, all of which work; leave it out."
        )
    if wanted > len(devices):
        raise UserError(
            f"{name} is {wanted}, but this machine has {len(devices)} {devices[0].platform} "
            "device(s); use fewer (on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N "
            "makes several of one)."
        )
    devices = devices[:wanted]
    try:
        if config.shares_batches:
            if config.batch_size % wanted:
                raise ValueError(
                    f"--batch-size is {config.batch_size}, which {wanted} devices do not divide."
                )
            return placement.data_parallel(model, rule, tx, devices, of_losses(config.reach))
        sizes = config.stage_sizes() or _balanced(config, spec, model, rule, tx)
        print(f"stages of {', '.join(map(str, sizes))} units", flush=True)
        return placement.pipeline(model, rule, tx, devices, sizes, **pipeline_options(config))
    except ValueError as error:
        raise UserError(str(error)) from error


def _balanced(
    config: TrainConfig, spec: data.DatasetSpec, model: Network, rule: Rule, tx: training.Optimizer
) -> tuple[int, ...]:
    """Stages that take about the same time, after a short measurement."""
    key = jax.random.key(0)
    image = jax.random.normal(key, (config.batch_size, *spec.input_shape))
    batch = {"image": image, "label": jnp.arange(config.batch_size) % spec.num_classes}
    state = training.create_train_state(model, rule, tx, key, image)
    seconds = placement.measure_units(model, rule, tx, state, batch, **pipeline_options(config))
    return placement.partition(seconds, config.pipeline or 1)
