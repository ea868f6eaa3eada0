"""A training command: from a config to :func:`lls_jax.fit`, and what a person is told of it."""

import contextlib
import pathlib
import shlex
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from experiments import console, determinism, execution, reach_options, run_config, setup
from experiments.commands import resume_command
from experiments.config import TrainConfig
from experiments.next_steps import next_steps
from experiments.signals import Signals
from lls_jax import fit, processes, trackers
from lls_jax.runs import folder as folders
from lls_jax.runs.callbacks import Callback, RunStart, selection_accuracy
from lls_jax.runs.run import FitResult


class Trained(NamedTuple):
    """A run that has ended.

    Attributes:
        run: what was trained.
        result: how it ended.
        signal: number of the signal that stopped it; 0 for none.
        late_signal: of one that came too late to stop it; it is to stop what comes after.
    """

    run: setup.Run
    result: FitResult
    signal: int
    late_signal: int


def train_and_evaluate(config: TrainConfig) -> int:
    """Train a run to its end, from its newest checkpoint where it has one, and say how it ended.

    Args:
        config: the run.

    Returns:
        Exit status: 0, or 130 / 143 after Ctrl-C / SIGTERM, with all saved: also where it came
        after the last step, so that a batch ends there.

    Raises:
        As :func:`train`.
    """
    trained = train(config)
    if trained.signal:
        return _say_stopped(config, trained)
    _say_done(config, trained.result)
    return 128 + trained.late_signal if trained.late_signal else 0


def train_and_advise(config: TrainConfig) -> int:
    """:func:`train_and_evaluate`, and then say what the accuracy means and what to try next."""
    status = train_and_evaluate(config)
    if not status:
        for line in next_steps(config):
            console.say(line)
    return status


def train(
    config: TrainConfig,
    *,
    adapt: Callable[[setup.Run], setup.Run] = lambda run: run,
    listeners: Sequence[Callback] = (),
) -> Trained:
    """Train a run to its end, from its newest checkpoint where it has one.

    Args:
        config: the run.
        adapt: changes what its config makes.
        listeners: are told of the run beside the person.

    Raises:
        UserError: the config, the folder or a loss is such that the run cannot go on.
        lls_jax.errors.ProcessesError: the processes could not connect, or one was lost.
    """
    trackers.require(config.trackers())
    folder = pathlib.Path(config.run_folder())
    signals = Signals()
    with contextlib.ExitStack() as stack:
        if config.coordinator is not None:
            with setup.as_user_error():
                stack.enter_context(
                    processes.initialize(
                        config.coordinator, config.num_processes, config.process_id
                    )
                )
            stack.enter_context(processes.peer_loss_as_error())
        settings = run_config.ConfigSettings(config)
        # Before anything is downloaded for it.
        folders.check_settings(folder, settings)
        if config.deterministic:
            determinism.check(folder, jax.default_backend())
        # A download may be interrupted: nothing of the run is there to be saved.
        run = adapt(setup.make_run(config))
        stack.enter_context(signals.noted())
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
            callbacks=[_KeepOptions(config), *console.callbacks(config, run), *listeners],
            early_stopping=config.patience,
            checkpoint_every=config.checkpoint_every,
            reach=reach_options.of_losses(config.reach),
            remat_above=execution.bytes_above(config.remat),
            slice_above=execution.slice_above(config),
            execution=run.execution,
            steps_a_launch=setup.STEPS_A_LAUNCH[config.loop],
            settings=settings,
            should_stop=lambda: signals.received or 0,
        )
    if signals.is_signal(result.stopped):
        return Trained(run, result, result.stopped, 0)
    return Trained(run, result, 0, signals.received or 0)


class _KeepOptions(Callback):
    """Writes the options that a run has from each start anew into its config.json."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config

    def on_start(self, event: RunStart) -> None:
        """Only now: a start that is refused leaves all as it was."""
        if event.folder is not None and processes.is_first():
            own = {name: getattr(self._config, name) for name in run_config.OF_NEWEST_START}
            folders.change_settings(event.folder, own)


def _say_stopped(config: TrainConfig, trained: Trained) -> int:
    """Say how to go on with a run that a signal has stopped; returns the exit status."""
    console.say(
        f"stopped at step {int(trained.result.state.step)}, saved; resume with"
        f"{'' if config.process_id is None else ', each process with its own --process-id'}:\n"
        f"  {resume_command(config)}"
    )
    return 128 + trained.signal


def _say_done(config: TrainConfig, result: FitResult) -> None:
    last = result.records[-1]
    best = next(r for r in result.records if r["epoch"] == (result.best_epoch or last["epoch"]))
    by = "validation" if config.validation_examples else "test"
    early = last["epoch"] < config.epochs
    why = f" (no better one for {config.patience}, of {config.epochs})" if early else ""
    console.say(
        f"done: {last['epoch']} epochs{why} in {result.seconds:.1f} s, test accuracy "
        f"{last['test_accuracy']:.2f} % (best {selection_accuracy(best):.2f} % of the {by} images "
        f"after epoch {best['epoch']}); evaluate with:\n"
        f"  python -m experiments.evaluate --workdir {shlex.quote(config.run_folder())}"
    )
