"""The rival: a PyTorch loop of the same network and rule, in a process of its own.

PyTorch's threads and XLA's in one process would be in each other's way; here one side sleeps while
the other has its turn. The rival inherits this process's environment, its GLIBC_TUNABLES too.

The ratio means something on a quiet machine alone: PyTorch's threads wait for each other in a spin,
and where another program has one of their cores, each of its hundreds of small parallel loops costs
a time slice, 10 times the step in all. ``OMP_WAIT_POLICY=PASSIVE`` lets them sleep. What the
load and that policy were is part of the results.
"""

import contextlib
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.config import TrainConfig
from experiments.setup import Task
from experiments.suites import report
from lls_jax.blocks import ConvBlock, DenseBlock, DepthwiseSeparableBlock
from lls_jax.errors import UserError
from lls_jax.rules import LLS, Backpropagation
from pallas_kernels.local_loss import latent_dim

COLUMNS = {
    "torch_images_per_second": "torch images/s",
    "times_torch": "times torch",
    "times_torch_min": "least",
    "times_torch_max": "most",
}
_KINDS = {
    ConvBlock: "conv",
    DepthwiseSeparableBlock: "depthwise_separable",
    DenseBlock: "dense",
}
_PROGRAM = pathlib.Path(__file__).with_name("torch_loop.py")
_SECONDS_TO_END = 10


def _describe_rule(task: Task) -> dict[str, Any]:
    rule = task.rule
    if isinstance(rule, Backpropagation):
        own: dict[str, Any] = {"local": False, "modulation": "none", "temperature": 1.0}
    elif isinstance(rule, LLS):
        own = {"local": True, "modulation": rule.modulation, "temperature": rule.temperature}
    else:
        raise UserError(f"--against torch has no loop of rule {rule.name!r}.")
    return {**own, "num_classes": task.model.num_classes}


def describe(task: Task, config: TrainConfig, seed: int) -> dict[str, Any]:
    """A task in JSON, for a program that has PyTorch but not this library.

    Args:
        task: its model, rule, image shape, and normalisation count.
        config: its batch size, precision, learning rate and weight decay count.
        seed: of the random images and weights.

    Raises:
        UserError: the PyTorch loop has no such rule, or no such block.
    """
    rule = _describe_rule(task)
    blocks = []
    x = jax.ShapeDtypeStruct((1, *task.spec.input_shape), np.float32)
    for spec in task.model.specs:
        inputs = x.shape[-1]

        def run(x: jax.Array, spec: Any = spec) -> jax.Array:
            return spec.module.init_with_output(jax.random.key(0), x)[0]

        activation = jax.eval_shape(run, x)
        basis = None
        if isinstance(task.rule, LLS):
            latents = latent_dim(activation.shape[1:], spec.pool_size)
            basis = task.rule.projection({}, latents).tolist()
        module: Any = spec.module
        if type(module) not in _KINDS:
            raise UserError(
                f"--against torch has no block of kind {type(module).__name__}, which model "
                f"{task.model.name!r} has; leave that model out."
            )
        blocks.append(
            {
                "kind": _KINDS[type(module)],
                "inputs": inputs,
                "features": module.features,
                "stride": 1 if isinstance(module, DenseBlock) else module.stride,
                "pool_size": spec.pool_size,
                "max_pool": spec.max_pool,
                "average_pool": spec.average_pool,
                "flatten": spec.flatten,
                "basis": basis,
            }
        )
        x = jax.eval_shape(lambda x, spec=spec: spec.transition(x, None), activation)
    return {
        "rule": rule,
        "blocks": blocks,
        "features": math.prod(x.shape[1:]),
        "image_shape": task.spec.input_shape,
        "mean": task.spec.mean,
        "std": task.spec.std,
        "batch_size": config.batch_size,
        "precision": config.precision,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "seed": seed,
        "device": "cuda" if jax.default_backend() == "gpu" else "cpu",
    }


def command(python: str | None) -> list[str]:
    """What starts the PyTorch loop.

    Args:
        python: the interpreter that has PyTorch; None for this one.
    """
    return [python or sys.executable, str(_PROGRAM)]


class Rival:
    """A program that steps when it is told to, through the pipes to it.

    Args:
        command: starts it.
        description: from :func:`describe`.

    Raises:
        UserError: it does not start, has no PyTorch, or ended.
    """

    def __init__(self, command: Sequence[str], description: dict[str, Any]) -> None:
        self.times: list[float] = []
        self.load = os.getloadavg()[0]
        # Not a pipe: nobody reads it meanwhile, and a full one would stop the program.
        self._open = contextlib.ExitStack()
        self._errors = self._open.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        except OSError as error:
            self._open.close()
            raise UserError(
                f"{command[0]} does not start ({error.strerror}); --torch-python takes the path "
                "of a Python that has PyTorch."
            ) from error
        try:
            self.environment = self._ask(json.dumps(description))
        except BaseException:
            self.close()
            raise
        if "missing" in self.environment:
            self.close()
            raise UserError(
                f"{command[0]} has no PyTorch ({self.environment['missing']}): install it there "
                "with `pip install torch`, or give --torch-python the path of a Python that has it."
            )

    def __enter__(self) -> "Rival":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, line: str) -> dict[str, Any]:
        """The answer to a line."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            status = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines() or ["it said nothing"]
            raise UserError(f"the PyTorch loop ended with status {status}: {said[-1]}")
        content: dict[str, Any] = json.loads(answer)
        return content

    def advance(self, steps: int, *, keep: bool) -> None:
        """Train, and keep the seconds of each step if asked to."""
        seconds = self._ask(str(steps))["seconds"]
        if keep:
            self.times += seconds

    def close(self) -> None:
        """End the program."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._open.close()


def compare(
    library: Sequence[float], rival: Rival, steps_a_turn: int, batch_size: int
) -> report.Row:
    """How many times faster than its rival the library was, turn by turn.

    Args:
        library: seconds of its steps, all turns one after the other.
        rival: after as many.
        steps_a_turn: that each took.
        batch_size: images a step.

    Returns:
        The keys of :data:`COLUMNS` and what they are made of.
    """

    def turns(times: Sequence[float]) -> list[float]:
        return [sum(times[i : i + steps_a_turn]) for i in range(0, len(times), steps_a_turn)]

    ratios = [theirs / ours for ours, theirs in zip(turns(library), turns(rival.times))]
    return {
        "torch_images_per_second": batch_size / statistics.median(rival.times),
        "times_torch": statistics.median(ratios),
        "times_torch_min": min(ratios),
        "times_torch_max": max(ratios),
        "times_torch_turns": ratios,
        "torch_step_ms": [1e3 * value for value in rival.times],
        "torch": rival.environment["torch"],
        "torch_threads": rival.environment["threads"],
        "load_before": rival.load,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }
