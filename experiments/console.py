"""What a person sees while a run trains: lines, a progress bar, and curves."""

import dataclasses
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
import tqdm

from experiments import output, panels, plots
from experiments.config import TrainConfig
from experiments.own_sources import KeepSources
from experiments.setup import Run
from lls_jax import analysis, processes, trackers
from lls_jax.runs.callbacks import Callback, EarlyStopping, EpochEnd, Record, RunStart, StepEnd
from lls_jax.runs.kernels import KernelChoice
from lls_jax.runs.profile import Profile

_REFRESH_SECONDS = 0.5
_REDRAW_SECONDS = 30.0
# What each of --measure adds to a record.
_MEASURED = {
    "alignment": "alignment",
    "norms": "gradient_norm",
    "probes": "probe_accuracy",
    "heads": "head_accuracy",
}


def say(*values: str, **options: Any) -> None:
    """Print; of several processes one speaks for all. A run goes on where nobody reads it."""
    if not processes.is_first():
        return
    try:
        print(*values, **options)
    except BrokenPipeError:
        if not output.is_gone():
            raise
        output.drop()


def callbacks(config: TrainConfig, run: Run) -> list[Callback]:
    """What a training command hears of its run with."""
    if not processes.is_first():
        return [Callback()]
    heard: list[Callback] = [_Lines(config, run), _Curves(config)]
    heard.append(KeepSources(config, _warn))
    if config.measure is not None:
        heard.append(analysis.Measure(config.measures(), every=config.measure_every))
    if config.progress and sys.stderr.isatty():
        heard.append(_Bar())
    settings = {name: v for name, v in dataclasses.asdict(config).items() if v is not None}
    heard += trackers.make(config.trackers(), settings, _warn)
    if config.profile is not None:
        heard.append(Profile(config.profile, say))
    return heard


def _warn(message: str) -> None:
    say(f"warning: {message}", file=sys.stderr, flush=True)


class _Lines(Callback):
    """A line at the start, and one an epoch."""

    def __init__(self, config: TrainConfig, run: Run) -> None:
        self._config = config
        self._run = run

    def on_start(self, event: RunStart) -> None:
        """What is trained, on what, and from where."""
        config, run, device = self._config, self._run, jax.local_devices()[0]
        validation = run.validation
        say(
            f"{config.rule} on {config.model}, {config.dataset}: {run.train.labels.shape[0]} "
            f"training and {run.test.labels.shape[0]} test images"
            + ("" if validation is None else f", {validation.labels.shape[0]} for validation")
            + f", {event.steps_per_epoch} steps an epoch, {device.platform} ({device.device_kind}),"
            f" {'many steps' if run.many_steps else 'one step'} a launch, in {event.folder}"
            + (f", {jax.process_count()} processes" if jax.process_count() > 1 else "")
        )
        if event.resumed:
            say(f"resumed at step {event.step}, epoch {event.epochs_done} done")
        if idle := idle_options(config, event):
            _warn(
                f"the run is finished, with nothing to do for {', '.join(idle)}; extend it with "
                "more --epochs, or give another --workdir."
            )

    def on_epoch(self, event: EpochEnd) -> None:
        """How the epoch went."""
        say(epoch_line(event.record, event.epochs), flush=True)
        for line in measured_lines(event.record):
            say(line, flush=True)

    def on_kernels(self, choice: KernelChoice) -> None:
        """What computes the local losses, and what it gains."""
        say(str(choice))
        for name, why in choice.refused.items():
            say(f"  {name} was not measured: {why}")

    def on_warning(self, message: str) -> None:
        """Something that is no error."""
        _warn(message)


class _Curves(Callback):
    """Draws curves.png, now and then and at the end."""

    def __init__(self, config: TrainConfig) -> None:
        self._title = f"{config.dataset}, {config.model}, {config.rule}"
        self._path = pathlib.Path(config.run_folder()) / "curves.png"
        self._drawn = time.perf_counter()
        self._waiting: list[Record] = []

    def on_epoch(self, event: EpochEnd) -> None:
        """Draw where some time has passed."""
        self._waiting = event.records
        if time.perf_counter() - self._drawn > _REDRAW_SECONDS:
            self.on_exit()

    def on_exit(self) -> None:
        """Draw what is not drawn yet, however the run has ended."""
        if self._waiting:
            plots.draw_curves(self._waiting, self._title, self._path)
            self._waiting, self._drawn = [], time.perf_counter()


class _Bar(Callback):
    """A progress bar over the images of an epoch; for a terminal."""

    def __init__(self) -> None:
        self._bar: tqdm.tqdm | None = None
        self._refreshed = time.perf_counter()

    def on_start(self, event: RunStart) -> None:
        """Note how long an epoch is."""
        self._batch_size, self._epochs = event.batch_size, event.epochs
        self._images = event.steps_per_epoch * event.batch_size

    def on_step(self, event: StepEnd) -> None:
        """Count the images, and now and then show how it goes."""
        done = event.steps_done * self._batch_size
        if self._bar is None:
            self._bar = tqdm.tqdm(
                desc=f"epoch {event.epoch}/{self._epochs}",
                total=self._images,
                unit=" images",
                leave=False,
                dynamic_ncols=True,
            )
        self._bar.update(done - self._bar.n)
        if time.perf_counter() - self._refreshed > _REFRESH_SECONDS:
            self._refreshed = time.perf_counter()
            loss = float(np.asarray(event.sums.losses)[-1]) / event.steps_done
            accuracy = 100 * float(np.asarray(event.sums.correct)) / done
            self._bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1f} %")
        if done == self._images:
            self.on_exit()

    def on_exit(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def idle_options(config: TrainConfig, event: RunStart) -> list[str]:
    """What a finished run is asked for and has not: only epochs that are trained are measured.

    Args:
        config: of this start.
        event: where the run is.
    """
    patience = config.patience
    is_over = event.epochs_done >= event.epochs or (
        patience is not None and EarlyStopping(patience).is_over(event.records)
    )
    if not is_over or not event.records:
        return []
    last = event.records[-1]
    lacks = [f"--measure {name}" for name in config.measures() if _MEASURED[name] not in last]
    if config.test_views != "none" and "test_views_accuracy" not in last:
        lacks.append(f"--test-views {config.test_views}")
    if config.profile is not None:
        lacks.append(f"--profile {config.profile}")
    return lacks


def layer_losses(losses: list[float]) -> str:
    """``L1 1.465  L2 0.944``."""
    return "  ".join(f"L{layer + 1} {loss:.3f}" for layer, loss in enumerate(losses))


def measured_lines(record: Record) -> list[str]:
    """One line for each kind of what was measured of the blocks."""
    lines = []
    for name, measured in panels.MEASURED.items():
        if name in record:
            values = "  ".join(
                f"L{layer + 1} {'-' if value is None else measured.digits(value)}"
                for layer, value in enumerate(record[name])
            )
            lines.append(f"  {measured.label}:  {values}")
    return lines


def epoch_line(record: Record, epochs: int) -> str:
    """One line that sums up an epoch."""
    top5 = record["test_top5"]
    validation = record.get("validation_accuracy")
    by_views = record.get("test_views_accuracy")
    parts = [
        f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}",
        f"train loss {record['train_loss']:.4f} acc {record['train_accuracy']:.2f}",
        "" if validation is None else f"validation Acc@1 {validation:.2f}",
        f"test loss {record['test_loss']:.4f} Acc@1 {record['test_accuracy']:.2f}"
        + ("" if by_views is None else f" by views {by_views:.2f}")
        + ("" if top5 is None else f" Acc@5 {top5:.2f}"),
        f"{record['seconds']:.1f} s, {record['images_per_second']:.0f} images/s",
        layer_losses(record["layer_loss"]),
    ]
    return "  |  ".join(part for part in parts if part)
