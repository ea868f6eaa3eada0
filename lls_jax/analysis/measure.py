"""A callback that measures how each block learns, and writes it into the epochs' records."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lls_jax import processes
from lls_jax.analysis.gradients import compare_gradients, make_gradients
from lls_jax.analysis.heads import head_accuracies
from lls_jax.analysis.probes import probe_accuracies
from lls_jax.data import batches
from lls_jax.rules import Backpropagation
from lls_jax.runs.callbacks import Callback, EpochEnd, Record, RunStart
from lls_jax.runs.source import first_examples

# What can be measured.
MEASURES = ("alignment", "norms", "probes", "heads")
_ON_GRADIENTS = ("alignment", "norms")
_ON_EXAMPLES = ("probes", "heads")
# Examples a step of evaluation.
_BATCH = 500


def check_measures(measures: Sequence[str], every: int) -> None:
    """Raise ValueError unless these can be measured so often."""
    if not measures:
        raise ValueError(f"`measures` is empty; expected some of {', '.join(MEASURES)}.")
    if unknown := [name for name in measures if name not in MEASURES]:
        raise ValueError(f"`measures` has {unknown[0]!r}; expected some of {', '.join(MEASURES)}.")
    if every < 1:
        raise ValueError(f"`every` is {every}; it must be at least 1.")


def _known(values: Any) -> list[float | None]:
    """As JSON has them: None for what is no number."""
    return [float(value) if np.isfinite(value) else None for value in values]


class Measure(Callback):
    """Measure each block after some epochs, for :func:`lls_jax.fit`.

    A record has, as lists with one number a block:

    - ``alignment``: the cosine of the block's gradient, as its rule and the run's reach make it,
      with backpropagation's at the same weights, on the same batch; the mean over a few batches.
      ``alignment`` asks for it.
    - ``gradient_norm``, ``bp_gradient_norm``: the L2 norms of both; asked for by ``norms``.
    - ``probe_accuracy``: of a linear classifier of the block's latents, fitted to training examples
      by ridge regression and judged on the validation examples, or else the test examples, in
      percent; asked for by ``probes``.
    - ``head_accuracy``: how often the block's own loss is least at the right class, on the same
      examples, in percent; None of a rule without such an answer. ``heads`` asks for it.

    The gradients are those at the weights that are trained; probes and heads see the weights that
    are evaluated. Nothing is drawn at random but what the training batches are augmented with, and
    the run's own numbers stay what they are. The seconds that it takes are not counted in the
    records. Of several processes the first measures, by itself.
    """

    def __init__(
        self,
        measures: Sequence[str] = MEASURES,
        *,
        every: int = 1,
        gradient_batches: int = 4,
        probe_batches: int = 50,
        examples: int = 2000,
        penalty: float = 1e-3,
    ) -> None:
        """Choose what to measure, and on how much.

        Args:
            measures: some of ``alignment``, ``norms``, ``probes``, ``heads``.
            every: epochs from one to the next; the last epoch is measured too.
            gradient_batches: training batches for alignment and norms.
            probe_batches: training batches that the probes are fitted to.
            examples: the first so many of the validation or test examples, for probes and heads.
            penalty: of the ridge regression, :func:`lls_jax.analysis.fit_probe`.

        Raises:
            ValueError: an unknown measure, or a number that is too small.
        """
        check_measures(measures, every)
        for name, value in (
            ("gradient_batches", gradient_batches),
            ("probe_batches", probe_batches),
            ("examples", examples),
        ):
            if value < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 1.")
        self._measures, self._every = tuple(measures), every
        self._gradient_batches, self._probe_batches = gradient_batches, probe_batches
        self._examples, self._penalty = examples, penalty

    def _wants(self, names: Sequence[str]) -> bool:
        return any(name in self._measures for name in names)

    def on_start(self, event: RunStart) -> None:
        """Note what there is to measure with.

        Raises:
            ValueError: probes or heads are wanted, and there are no examples to judge them on.
        """
        self._run = event
        sets = event.evaluation_sets
        self._held_out = sets.get("validation", sets.get("test"))
        if self._wants(_ON_EXAMPLES) and self._held_out is None:
            raise ValueError(
                f"`measures` has {' and '.join(n for n in _ON_EXAMPLES if n in self._measures)}, "
                "which are judged on validation or test examples, and there are none; give `test`."
            )
        if self._wants(_ON_GRADIENTS):
            self._ours = make_gradients(event.model, event.rule, reach=event.reach)
            self._theirs = make_gradients(event.model, Backpropagation(event.model.num_classes))

    def add_to_record(self, event: EpochEnd) -> Record | None:
        """What was measured, where it is the epoch's turn."""
        epoch = event.record["epoch"]
        if not processes.is_first() or (epoch % self._every and epoch != event.epochs):
            return None
        model = self._run.model
        record: Record = {}
        if self._wants(_ON_GRADIENTS):
            found = compare_gradients(
                model,
                self._ours,
                self._theirs,
                event.state,
                self._run.sample(self._gradient_batches),
            )
            if "alignment" in self._measures:
                record["alignment"] = _known(found.cosine)
            if "norms" in self._measures:
                record["gradient_norm"] = _known(found.norm)
                record["bp_gradient_norm"] = _known(found.bp_norm)
        if "probes" in self._measures:
            training = (
                (batch["image"], batch["label"]) for batch in self._run.sample(self._probe_batches)
            )
            record["probe_accuracy"] = probe_accuracies(
                model, event.evaluation, training, self._judged(), penalty=self._penalty
            )
        if "heads" in self._measures:
            record["head_accuracy"] = head_accuracies(
                model, self._run.rule, event.evaluation, self._judged()
            )
        return record

    def _judged(self) -> Iterator[tuple[Any, Any]]:
        assert self._held_out is not None
        size = int(self._held_out.labels.shape[0])
        count = min(self._examples, size)
        examples = first_examples(self._held_out, count)
        read = batches.evaluation_batches(self._run.spec, examples, min(_BATCH, count))
        for image, label, weight in read:
            # The last batch is filled up; what fills it has no weight.
            own = int(np.asarray(weight).sum())
            yield image[:own], label[:own]
