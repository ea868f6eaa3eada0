"""Reload a run's checkpoint and evaluate it on the test images."""

import dataclasses
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from simple_parsing import flag

from experiments.command_line import parse, run
from experiments.config import TrainConfig
from experiments.config_checks import check_checkpoint
from experiments.config_choices import VIEWS

if TYPE_CHECKING:
    from experiments.setup import Task
    from lls_jax.runs.evaluate import Evaluation


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a checkpoint: loss, top-1, top-5, accuracy by class, confusion matrix."""

    workdir: str
    """Folder of the run."""
    checkpoint: str = "best"
    """best: the most accurate one; last: the newest one; or a step."""
    json: bool = flag(default=False, negative_prefix="--no-")
    """Print JSON."""
    eval_batch_size: int | None = None
    """Images a step [default: the run's]."""
    eval_examples: int | None = None
    """Use only the first N test images [default: the run's]."""
    views: str = "none"
    """Judge by the mean over views of a test image: flip, or flip_translate; see --test-views of
    the training commands."""
    data_dir: str | None = None
    """Folder of prepared data sets [default: the run's]."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming option and value, for what cannot be."""
        check_checkpoint(self.checkpoint)
        if self.views not in VIEWS:
            raise ValueError(f"--views is {self.views!r}; expected one of {', '.join(VIEWS)}.")
        for name in ("eval_batch_size", "eval_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")


class Judged(NamedTuple):
    """A checkpoint on the test images.

    Attributes:
        trained: the run's config.
        task: its network, rule and images.
        step: of the checkpoint.
        epoch: likewise, the epochs done.
        examples: test images.
        result: of the evaluation.
    """

    trained: TrainConfig
    task: "Task"
    step: int
    epoch: int
    examples: int
    result: "Evaluation"


def judge(config: EvaluateConfig) -> Judged:
    """Evaluate a checkpoint of a run.

    Raises:
        UserError: there is no such run, checkpoint or data set.
    """
    from experiments import data_sets, own_sources
    from experiments.run_config import read_config
    from experiments.setup import as_user_error, example_image, make_task
    from lls_jax.runs.checks import check_of_images
    from lls_jax.runs.evaluate import evaluate_weights
    from lls_jax.runs.restore import restore

    folder = pathlib.Path(config.workdir)
    trained = read_config(folder)
    changes = {
        name: getattr(config, name)
        for name in ("eval_batch_size", "eval_examples", "data_dir")
        if getattr(config, name) is not None
    }
    trained = dataclasses.replace(trained, **changes)
    with as_user_error():
        data_sets.download(trained)
        opened = data_sets.open_data(trained)
        check_of_images("--views", config.views, opened.spec.input_shape)
    task = make_task(trained, opened.spec)
    for changed in own_sources.changed(folder, trained):
        print(f"warning: {changed}", file=sys.stderr)
    restored = restore(folder, task.model, task.rule, example_image(task.spec), config.checkpoint)
    variables = {"params": restored.state.params, "batch_stats": restored.state.batch_stats}
    test = data_sets.load_split(trained, opened, "test")
    result = evaluate_weights(
        *(task.model, variables, task.spec, test, trained.eval_batch_size), views=config.views
    )
    return Judged(
        trained=trained,
        task=task,
        step=int(restored.state.step),
        epoch=restored.meta["epochs_done"],
        examples=int(test.labels.shape[0]),
        result=result,
    )


def by_class(judged: Judged) -> dict[str, float | None]:
    """Accuracy on the images of each class, in percent; None for a class that has none."""
    named = zip(judged.task.spec.class_names, judged.result.confusion)
    return {
        name: 100 * float(row[label]) / int(row.sum()) if row.sum() else None
        for label, (name, row) in enumerate(named)
    }


def _draw(config: EvaluateConfig, judged: Judged) -> str | None:
    """Draw the confusion matrix into the run's folder; None where that cannot be written."""
    from experiments import plots

    trained = judged.trained
    # Other images or views are another picture.
    parts = ["confusion", str(judged.step)]
    parts += [] if config.views == "none" else [config.views]
    parts += [] if config.eval_examples is None else [f"first{config.eval_examples}"]
    picture = pathlib.Path(config.workdir) / f"{'-'.join(parts)}.png"
    title = f"{trained.dataset}, {trained.model}, {trained.rule}, step {judged.step}"
    try:
        plots.draw_confusion(judged.result.confusion, judged.task.spec.class_names, title, picture)
    except OSError as error:
        print(
            f"note: {picture} cannot be written ({error.strerror or error}); no picture is drawn",
            file=sys.stderr,
        )
        return None
    return str(picture)


def evaluate(config: EvaluateConfig) -> int:
    """Evaluate a checkpoint and say how it did; returns the exit status."""
    judged = judge(config)
    trained, result = judged.trained, judged.result
    report = {
        "workdir": str(pathlib.Path(config.workdir)),
        "step": judged.step,
        "epoch": judged.epoch,
        "dataset": trained.dataset,
        "model": trained.model,
        "rule": trained.rule,
        "views": config.views,
        "examples": judged.examples,
        "loss": result.loss,
        "accuracy": result.accuracy,
        "top5": result.top5,
        "accuracy_by_class": by_class(judged),
        "confusion": result.confusion.tolist(),
        "picture": _draw(config, judged),
    }
    print(json.dumps(report, indent=2) if config.json else _text(report))
    return 0


def _text(report: dict[str, Any]) -> str:
    top5 = "" if report["top5"] is None else f"  Acc@5 {report['top5']:.2f} %"
    views = "" if report["views"] == "none" else f"  (mean over views: {report['views']})"
    width = max(map(len, report["accuracy_by_class"]))
    lines = [
        f"{report['rule']} on {report['model']}, {report['dataset']}: checkpoint of step "
        f"{report['step']} (epoch {report['epoch']}), {report['examples']} test images",
        f"loss {report['loss']:.4f}  Acc@1 {report['accuracy']:.2f} %{top5}{views}",
        "accuracy by class:",
        *(
            f"  {name:<{width}}  " + ("     -" if accuracy is None else f"{accuracy:6.2f} %")
            for name, accuracy in report["accuracy_by_class"].items()
        ),
    ]
    if report["picture"] is not None:
        lines.append(f"confusion matrix: {report['picture']}")
    return "\n".join(lines)


if __name__ == "__main__":
    config = parse(EvaluateConfig, "evaluate", __doc__ or "")
    run(lambda: evaluate(config))
