"""A training command: from a config to :func:`lls_jax.fit`, and what a person is told of it."""

import contextlib
import dataclasses
import pathlib
import shlex

import jax

from experiments import console, determinism, execution, run_config, setup
from experiments.config import TrainConfig
from experiments.option_files import to_arguments
from experiments.presets import PRESETS, default_config
from experiments.signals import Signals
from lls_jax import fit, processes, trackers
from lls_jax.runs import folder as folders
from lls_jax.runs.callbacks import selection_accuracy
from lls_jax.runs.run import FitResult


def resume_command(config: TrainConfig) -> str:
    """The command that goes on with a run."""
    default = default_config(config.dataset, config.preset)
    values = {
        field.name: value
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != getattr(default, field.name)
        or field.name in ("rule", "preset", "dataset")
    }
    if config.preset is None:
        values.pop("preset")
    command = "run"
    if config.dataset in PRESETS:
        command = values.pop("dataset")
    return shlex.join(["python", "-m", f"experiments.{command}", *to_arguments(values)])


def train_and_evaluate(config: TrainConfig) -> int:
    """Train a run to its end, from its newest checkpoint where it has one.

    Args:
        config: the run.

    Returns:
        Exit status: 0, or 130 / 143 after Ctrl-C / SIGTERM, with all saved.

    Raises:
        UserError: the config, the folder or a loss is such that the run cannot go on.
        lls_jax.errors.ProcessesError: the processes could not connect, or one was lost.
    """
    trackers.require(config.trackers())
    folder = pathlib.Path(config.run_folder())
    signals = Signals()
    with contextlib.ExitStack() as stack:
        if config.coordinator is not None:
            stack.enter_context(
                processes.initialize(config.coordinator, config.num_processes, config.process_id)
            )
            stack.enter_context(processes.peer_loss_as_error())
        stack.enter_context(signals.noted())
        settings = run_config.ConfigSettings(config)
        # Before anything is downloaded for it.
        folders.check_settings(folder, settings)
        if config.deterministic:
            determinism.check(folder, jax.default_backend())
        run = setup.make_run(config)
        result = fit(
            run.task.model,
            run.task.rule,
            run.tx,
            train=run.train,
            test=run.test,
            validation=run.validation,
            epochs=config.epochs,
            batch_size=config.batch_size,
            eval_batch_size=config.eval_batch_size,
            test_views=config.test_views,
            augmentation=config.augmentation,
            spec=run.task.spec,
            seed=config.seed,
            workdir=folder,
            callbacks=console.callbacks(config, run),
            early_stopping=config.patience,
            checkpoint_every=config.checkpoint_every,
            reach=config.reach,
            remat_above=execution.bytes_above(config.remat),
            slice_above=execution.bytes_above(config.slice),
            execution=run.execution,
            steps_a_launch=setup.STEPS_A_LAUNCH[config.loop],
            settings=settings,
            should_stop=lambda: signals.received or 0,
        )
    return _ended(config, folder, result, signals.is_signal(result.stopped))


def _ended(config: TrainConfig, folder: pathlib.Path, result: FitResult, by_signal: bool) -> int:
    """Say how a run has ended; returns the exit status."""
    if by_signal:
        console.say(
            f"stopped at step {int(result.state.step)}, saved; resume with"
            f"{'' if config.process_id is None else ', each process with its own --process-id'}:\n"
            f"  {resume_command(config)}"
        )
        return 128 + result.stopped
    last = result.records[-1]
    best = result.records[(result.best_epoch or last["epoch"]) - 1]
    by = "validation" if config.validation_examples else "test"
    early = last["epoch"] < config.epochs
    why = f" (no better one for {config.patience}, of {config.epochs})" if early else ""
    console.say(
        f"done: {last['epoch']} epochs{why} in {result.seconds:.1f} s, test accuracy "
        f"{last['test_accuracy']:.2f} % (best {selection_accuracy(best):.2f} % of the {by} images "
        f"after epoch {best['epoch']}); evaluate with:\n"
        f"  python -m experiments.evaluate --workdir {shlex.quote(str(folder))}"
    )
    return 0
