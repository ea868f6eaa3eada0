"""A trace of some training steps, by JAX's profiler."""

import contextlib
from collections.abc import Callable

import jax

from lls_jax import processes
from lls_jax.runs.callbacks import Callback, EpochEnd, RunStart, StepEnd

FOLDER = "profile"
# Of a run of a single epoch: launches before the trace, in which programs are compiled.
_WARM_UP = 3


class Profile(Callback):
    """Trace training steps into RUN/profile, which Perfetto and TensorBoard open.

    The trace begins after the first step of this start's second epoch, by when all programs are
    compiled; where there is no second one, after three launches. Each launch is a step named
    ``train``. Steps of the next epoch follow where this one has too few, with the evaluation
    between them. Of several processes the first traces. The epoch's own seconds are longer.
    """

    def __init__(self, steps: int, tell: Callable[[str], None] = print) -> None:
        """Trace `steps` steps, or as many as there are.

        Args:
            steps: at least 1; a launch of many steps is traced whole.
            tell: is told where the trace is.

        Raises:
            ValueError: fewer than 1.
        """
        if steps < 1:
            raise ValueError(f"`steps` is {steps}; it must be at least 1.")
        self._steps, self._tell = steps, tell
        self._launches = self._begun_at = 0
        self._is_tracing, self._is_over = False, True
        self._annotation = contextlib.ExitStack()

    def on_start(self, event: RunStart) -> None:
        """Note where the run is.

        Raises:
            ValueError: it has no folder.
        """
        if event.folder is None:
            raise ValueError("a trace is written into the run's folder; give `workdir`.")
        self._folder = event.folder / FOLDER
        # Of a finished run there is no step to trace.
        self._is_over = not processes.is_first() or event.epochs_done >= event.epochs
        self._step, self._steps_per_epoch = event.step, event.steps_per_epoch
        only_one = event.epochs - event.epochs_done < 2
        self._first_epoch = event.epochs_done + (1 if only_one else 2)
        self._wait = _WARM_UP if only_one else 1

    def on_step(self, event: StepEnd) -> None:
        """Begin, go on, or end."""
        if self._is_over:
            return
        self._annotation.close()
        self._step = event.step
        if self._is_tracing and event.step - self._begun_at >= self._steps:
            # The steps may still be under way.
            jax.block_until_ready(event.sums)
            self._end()
            return
        if not self._is_tracing and event.epoch >= self._first_epoch:
            self._launches += 1
            if self._launches >= self._wait:
                jax.block_until_ready(event.sums)
                self._begin(event.step)
        # The evaluation that follows an epoch's last step is none.
        if event.steps_done < self._steps_per_epoch:
            self._annotate()

    def on_epoch(self, event: EpochEnd) -> None:
        """The next epoch's first step follows, if there is one."""
        if event.record["epoch"] < event.epochs:
            self._annotate()

    def on_exit(self) -> None:
        """End the trace where the run ends."""
        self._annotation.close()
        if self._is_tracing:
            self._end()
        elif not self._is_over:
            self._tell("no steps were traced: the run has ended before its programs were compiled")

    def _begin(self, step: int) -> None:
        options = jax.profiler.ProfileOptions()
        # Python's own calls would be most of the file, which holds a million events.
        options.python_tracer_level = 0
        jax.profiler.start_trace(self._folder, profiler_options=options)
        self._is_tracing, self._begun_at = True, step

    def _annotate(self) -> None:
        if self._is_tracing:
            annotation = jax.profiler.StepTraceAnnotation("train", step_num=self._step + 1)
            self._annotation.enter_context(annotation)

    def _end(self) -> None:
        jax.profiler.stop_trace()
        self._is_tracing, self._is_over = False, True
        self._tell(
            f"traced {self._step - self._begun_at} steps, from step {self._begun_at + 1} on, in "
            f"{self._folder}: open its *.trace.json.gz at https://ui.perfetto.dev, or the folder "
            "in TensorBoard with its profile plug-in"
        )
