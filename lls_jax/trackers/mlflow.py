"""MLflow, under the names that the authors' PyTorch code (LLS-DNN) logs to it.

Source: ``main.py`` of https://github.com/mapolinario94/LLS-DNN.
"""

import os
import time
from collections.abc import Mapping
from typing import Any

from lls_jax.runs.callbacks import Record, RunStart
from lls_jax.trackers.base import Tracker, scalars

# Their default experiment.
_EXPERIMENT = "LLS"
# Their names of what a record has; the others keep ours.
METRICS = {
    "train_accuracy": "acc_train",
    "train_top5": "acc_train_top5",
    "train_loss": "loss_train",
    "test_accuracy": "acc_test",
    "test_top5": "acc_test_top5",
    "test_loss": "loss_test",
}
_BEST = "best_acc_test"
# Their names of settings, beside ours.
PARAMETERS = {"rule": "training_mode", "epochs": "num_epochs", "schedule": "lr_scheduler"}


def metrics(records: list[Record]) -> dict[str, float]:
    """The last record's numbers by LLS-DNN's names, with the best test accuracy of all.

    >>> metrics([{"test_accuracy": 60.0}, {"test_accuracy": 50.0, "layer_loss": [1.5]}])
    {'acc_test': 50.0, 'layer_loss/L1': 1.5, 'best_acc_test': 60.0}
    """
    found = {METRICS.get(name, name): value for name, value in scalars(records[-1]).items()}
    accuracies = [r["test_accuracy"] for r in records if r.get("test_accuracy") is not None]
    return {**found, **({_BEST: max(accuracies)} if accuracies else {})}


def parameters(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as MLflow takes them, those that LLS-DNN names otherwise under its name too.

    >>> parameters({"rule": "lls", "momentum": 0.9})
    {'rule': 'lls', 'momentum': '0.9', 'training_mode': 'lls'}
    """
    theirs = {PARAMETERS[name]: value for name, value in settings.items() if name in PARAMETERS}
    return {name: str(value) for name, value in {**settings, **theirs}.items()}


class MLflow(Tracker):
    """A run of MLflow where MLFLOW_TRACKING_URI says, of experiment ``LLS`` or
    MLFLOW_EXPERIMENT_NAME's.

    As LLS-DNN does it a metric's step is the epoch, from 0, and accuracies are in percent.
    """

    name = "mlflow"

    def open_run(self, event: RunStart, kept: Record | None) -> Record:
        """Create a run, or go on with that of before."""
        # Imported late: an option of the installation.
        import mlflow

        # Not MLflow's own "active run", of which a process has one.
        self._client: Any = mlflow.MlflowClient()
        self._logged: set[int] = set()
        if kept is not None:
            self._id = kept["run_id"]
            self._client.update_run(self._id, status="RUNNING")
            history = self._client.get_metric_history(self._id, METRICS["train_loss"])
            self._logged = {metric.step for metric in history}
            return kept
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _EXPERIMENT)
        experiment = self._client.get_experiment_by_name(name)
        made = self._client.create_run(
            experiment.experiment_id if experiment else self._client.create_experiment(name),
            run_name=None if event.folder is None else event.folder.name,
        )
        self._id = made.info.run_id
        self._client.log_batch(
            self._id,
            params=[mlflow.entities.Param(*one) for one in parameters(self._settings).items()],
        )
        return {"run_id": self._id}

    def missing(self, records: list[Record]) -> list[Record]:
        """Those of epochs that MLflow does not have."""
        return [record for record in records if record["epoch"] - 1 not in self._logged]

    def send(self, records: list[Record]) -> None:
        """Log the epoch's numbers, unless an earlier start has."""
        import mlflow

        step, now = records[-1]["epoch"] - 1, int(time.time() * 1000)
        if step in self._logged:
            return
        self._client.log_batch(
            self._id,
            metrics=[mlflow.entities.Metric(*one, now, step) for one in metrics(records).items()],
        )

    def close_run(self, is_finished: bool) -> None:
        """Say that it is finished, or was stopped."""
        self._client.set_terminated(self._id, "FINISHED" if is_finished else "KILLED")
