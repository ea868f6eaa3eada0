"""The local loss, forward and backward, by each implementation; then whole training steps.

For every local layer: time by implementation, the bytes that must move (the latents read once,
their gradient written once), the share of the device's measured copy bandwidth that this makes, and
the ratio to plain XLA.
"""

import pathlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from experiments import setup, several_rules
from experiments.config import TrainConfig
from experiments.suites import report, training
from experiments.suites.entrants import Entrant
from lls_jax.errors import UserError
from pallas_kernels import local_loss, timing
from pallas_kernels.local_loss.shapes import LAYERS, MODULATIONS, Problem, problems

_RULES = dict(zip(MODULATIONS, ("lls", "lls_m", "lls_mxm")))
_CLASSES = 10
# The whole suite is to take less than eight minutes of a GPU.
_LAYER_SECONDS, _STEP_SECONDS = 270.0, 450.0
_LAYER_COLUMNS = {
    "latents": "latents",
    "rule": "rule",
    "batch_size": "batch",
    "implementation": "implementation",
    "microseconds": "us",
    "megabytes": "MB that must move",
    "share_of_bandwidth": "share of copy bandwidth",
    "speed_over_xla": "speed over xla",
}
_STEP_COLUMNS = {
    key: training._COLUMNS[key]
    for key in ("model", "rule", "kernels", "images_per_second", "step_ms", "speed_over_bp")
}


class _Case(NamedTuple):
    problem: Problem
    batch: int


def _implementations() -> Iterator[str]:
    for name in local_loss.IMPLEMENTATIONS:
        try:
            local_loss.require(name)
        except local_loss.KernelUnavailableError as error:
            print(f"left out: {error}")
        else:
            yield name


def _measure(case: _Case, names: list[str], turns: int, bandwidth: float) -> list[report.Row]:
    calls = [timing.loss_and_gradients(case.problem, case.batch, name) for name in names]
    seconds = timing.turns(calls, turns)
    moved = timing.least_bytes(case.problem, case.batch)
    xla = seconds[names.index("xla")]
    return [
        {
            "latents": case.problem.latents,
            "rule": _RULES[case.problem.modulation],
            "batch_size": case.batch,
            "implementation": name,
            "microseconds": 1e6 * spent,
            "megabytes": moved / 1e6,
            "share_of_bandwidth": moved / spent / bandwidth,
            "speed_over_xla": xla / spent,
        }
        for name, spent in zip(names, seconds)
    ]


def _entrants(model: str, rules: list[str], names: list[str]) -> list[Entrant]:
    """Each rule with each implementation that it has a use for, and at last ``bp``.

    Raises:
        UserError: an unknown name.
    """
    local = [rule for rule in rules if rule != "bp"]
    made = [
        one
        for name in names
        for one in several_rules.of_rules(TrainConfig(model=model, kernels=name), local, [1])
    ]
    configs = [*dict.fromkeys(made), TrainConfig(model=model, rule="bp")]
    for one in configs:
        setup.check_task(one)
    return [*map(Entrant, configs)]


def run(config: Any) -> int:
    """The suite; returns the exit status."""
    platform = jax.devices()[0].platform
    if platform == "cpu" and not config.cpu:
        raise UserError(
            "--suite kernels measures GPU kernels and this machine's device is a CPU; add --cpu to "
            "time the plain XLA operations here."
        )
    if unknown := sorted(set(config.models) - set(LAYERS)):
        raise UserError(
            f"--suite kernels has no layers of model {unknown[0]!r}; expected some of "
            f"{', '.join(LAYERS)}."
        )
    models = config.models
    names = list(_implementations())
    raced = {model: _entrants(model, config.rules, names) for model in models}
    began = time.perf_counter()
    bandwidth = timing.copy_bandwidth()
    print(f"{report.device_line()}, copies {bandwidth / 1e9:.0f} GB/s", flush=True)
    layers_of_models = [layer for model in models for layer in LAYERS[model]]
    cases = [
        _Case(problem, batch)
        for batch in config.batch_sizes
        for problem in problems(layers_of_models, MODULATIONS, _CLASSES)
    ]
    layers: list[report.Row] = []
    measured = 0
    for case in cases:
        if time.perf_counter() - began > _LAYER_SECONDS:
            print(f"out of time: {len(cases) - measured} of {len(cases)} layers were not measured")
            break
        layers += _measure(case, names, config.turns, bandwidth)
        measured += 1
    steps: list[report.Row] = []
    for model in models:
        if time.perf_counter() - began > _STEP_SECONDS:
            print(f"out of time: no training steps of {model}")
            continue
        steps += training.race(raced[model], min(config.turns, 5), config.seed)
    text = f"{report.device_line()}, copies {bandwidth / 1e9:.0f} GB/s\n\n"
    text += report.markdown(_LAYER_COLUMNS, layers)
    for name in names:
        for batch in config.batch_sizes:
            ratios = [
                row["speed_over_xla"]
                for row in layers
                if row["implementation"] == name and row["batch_size"] == batch
            ]
            if name != "xla" and ratios:
                text += (
                    f"\n{name}, batch {batch}: {report.geometric_mean(ratios):.2f} times the speed "
                    f"of xla in the geometric mean over {len(ratios)} cases, from "
                    f"{min(ratios):.2f} to {max(ratios):.2f}\n"
                )
    text += "\n" + report.markdown(_STEP_COLUMNS, steps)
    results = {
        "copy_bytes_per_second": bandwidth,
        "layers": layers,
        "layers_not_measured": len(cases) - measured,
        "steps": steps,
    }
    report.write(pathlib.Path(config.out), config, results, text)
    return 0
