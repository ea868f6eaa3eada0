"""Records on their way to TensorBoard, MLflow and Weights & Biases, and traces of steps."""

import dataclasses
import gzip
import json
import shutil
import struct

import numpy as np
import pytest

from experiments import train
from experiments.config import TrainConfig
from experiments.config_choices import TRACKERS
from lls_jax import trackers
from lls_jax.blocks import ConvBlock
from lls_jax.errors import UserError
from lls_jax.models import BlockSpec, Network
from lls_jax.runs import callbacks, profile
from lls_jax.runs import folder as folders
from lls_jax.trackers import base, mlflow


def one_block(num_classes):
    spec = BlockSpec(ConvBlock(4), pool_size=2, average_pool=1, flatten=True)
    return Network("one_block", num_classes, (spec,))


TINY = TrainConfig(
    dataset="digits", model="test_trackers:one_block", rule="lls", epochs=2, batch_size=16,
    train_examples=64, eval_examples=40, augmentation="none", progress=False, log="tensorboard",
    profile=2,
)  # fmt: skip


# --- TensorBoard: event files, read by what the formats say --------------------------------------


def crc32c(data):
    """Castagnoli's checksum, bit by bit, and TFRecord's masking of it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def records(path):
    """TFRecord: length, its checksum, data, its checksum."""
    content, at = path.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        assert struct.unpack_from("<I", content, at + 8) == (crc32c(content[at : at + 8]),)
        data = content[at + 12 : at + 12 + length]
        assert struct.unpack_from("<I", content, at + 12 + length) == (crc32c(data),)
        yield data
        at += 16 + length


def fields(message):
    """Protobuf's wire format: ``(number, value)``."""

    def varint(at):
        value = shift = 0
        while True:
            value |= (message[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if message[at - 1] < 128:
                return value, at

    at = 0
    while at < len(message):
        key, at = varint(at)
        if key & 7 == 0:
            value, at = varint(at)
        elif key & 7 == 2:
            length, at = varint(at)
            value, at = message[at : at + length], at + length
        else:
            size = {1: 8, 5: 4}[key & 7]
            value, at = message[at : at + size], at + size
        yield key >> 3, value


def events(folder):
    """``{tag: {step: [values]}}`` of a folder, as TensorBoard would show it."""
    shown = {}
    # Event: 2 step, 5 summary, 7 session log. Summary.Value: 1 tag, 2 or 8 the number.
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        for record in records(path):
            event = dict(fields(record))
            step = event.get(2, 0)
            if 7 in event and dict(fields(event[7])).get(1) == 1:
                # A start: what there is from this step on counts no more.
                for series in shown.values():
                    for purged in [old for old in series if old >= step]:
                        del series[purged]
            for number, value in fields(event.get(5, b"")):
                assert number == 1
                content = dict(fields(value))
                if 2 in content:
                    (scalar,) = struct.unpack("<f", content[2])
                    series = shown.setdefault(content[1].decode(), {})
                    series.setdefault(step, []).append(scalar)
    return shown


def assert_shown(folder):
    """Each number of each record, once."""
    shown, written = events(folder / "tensorboard"), folders.read_metrics(folder)
    for record in written:
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        numbers |= {f"layer_loss/L{i + 1}": loss for i, loss in enumerate(record["layer_loss"])}
        numbers.pop("step")
        for name, value in numbers.items():
            assert shown[name][record["step"]] == [pytest.approx(value, rel=1e-6)], name
    assert set(shown["train_loss"]) == {record["step"] for record in written}


def test_tensorboard_and_a_trace_of_a_run_that_goes_on(tmp_path, capsys):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    config = dataclasses.replace(TINY, workdir=str(tmp_path))
    assert train.train_and_evaluate(config) == 0
    assert_shown(tmp_path)
    # The trace: two steps, after the second epoch's first one; none else.
    assert f"traced 2 steps, from step 6 on, in {tmp_path}/profile" in capsys.readouterr().out
    (trace,) = (tmp_path / profile.FOLDER).rglob("*.trace.json.gz")
    assert list((tmp_path / profile.FOLDER).rglob("*.xplane.pb"))
    steps = [
        one for one in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        if one.get("name") == "train"
    ]  # fmt: skip
    assert [step["args"]["step_num"] for step in steps] == ["6", "7"]
    assert all(step["dur"] > 0 for step in steps)
    # Killed after the second epoch's record, before its checkpoint: it is there once.
    shutil.rmtree(tmp_path / "checkpoints" / "8")
    assert train.train_and_evaluate(dataclasses.replace(config, profile=None)) == 0
    assert "resumed at step 4" in capsys.readouterr().out
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert_shown(tmp_path)
    # A tracker that comes later gets all epochs.
    shutil.rmtree(tmp_path / "tensorboard")
    (tmp_path / "trackers.json").unlink()
    assert train.train_and_evaluate(config) == 0
    assert "nothing to do for --profile 2" in "".join(capsys.readouterr())
    assert_shown(tmp_path)


# --- What all trackers do ------------------------------------------------------------------------


class Listed(base.Tracker):
    """Sends to a list, if it is there."""

    name = "listed"

    def __init__(self, arrived, **options):
        super().__init__(**options)
        self.arrived, self.is_there = arrived, True

    def open_run(self, event, kept):
        if not self.is_there:
            raise ConnectionError("no route\nat all")
        return kept or {"id": 7}

    def send(self, records):
        if not self.is_there:
            raise ConnectionError("no route\nat all")
        self.arrived.append([record["epoch"] for record in records])

    def close_run(self, is_finished):
        self.arrived.append(is_finished)


def start(folder, records):
    fields = dict.fromkeys(callbacks.RunStart._fields)
    return callbacks.RunStart(**{**fields, "folder": folder, "records": records, "epochs": 3})


def end(epoch):
    return callbacks.EpochEnd({"epoch": epoch}, [], 3, None, None)


def test_what_cannot_be_sent_is_sent_later_and_a_run_goes_on(tmp_path, monkeypatch):
    arrived, warnings = [], []
    tracker = Listed(arrived, warn=warnings.append)
    tracker.on_start(start(tmp_path, []))
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"listed": {"id": 7}}
    tracker.is_there = False
    tracker.on_epoch(end(1))
    assert arrived == []
    (warning,) = warnings
    assert "ConnectionError: no route); 1 epochs are waiting" in warning
    tracker.is_there = True
    tracker.on_epoch(end(2))
    tracker.on_exit()
    assert arrived == [[1], [1, 2], False]
    # It goes on after what it has; and is finished with the last epoch.
    tracker = Listed(arrived, warn=warnings.append)
    tracker.on_start(start(tmp_path, [{"epoch": 1}, {"epoch": 2}]))
    tracker.on_epoch(end(3))
    tracker.on_exit()
    assert arrived[3:] == [[1, 2, 3], True] and len(warnings) == 1
    # Of several processes the others send nothing.
    monkeypatch.setattr(base.processes, "is_first", lambda: False)
    other = Listed(arrived)
    other.on_start(start(tmp_path, []))
    other.on_epoch(end(1))
    other.on_exit()
    assert len(arrived) == 5
    monkeypatch.undo()
    tracker.is_there = False
    with pytest.raises(UserError, match=r"listed cannot be opened \(ConnectionError: no route\)"):
        tracker.on_start(start(tmp_path, []))


@pytest.mark.parametrize("name", trackers.NAMES)
def test_what_is_not_installed_is_said_before_anything_is_done(tmp_path, monkeypatch, name):
    assert trackers.NAMES == TRACKERS
    package = {"tensorboard": "tensorboardX"}.get(name, name)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda wanted: None if wanted == package else wanted
    )
    config = dataclasses.replace(TINY, log=name, workdir=str(tmp_path / "run"))
    with pytest.raises(UserError, match=f"`pip install {package}`"):
        train.train_and_evaluate(config)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="unknown tracker 'excel'; expected some of tensorboard"):
        trackers.make(["excel"])
    with pytest.raises(ValueError, match="give `workdir`"):
        base.folder_of(start(None, []), "tensorboard")


# --- Those that need a package of their own ------------------------------------------------------


def test_mlflow_has_the_names_of_the_authors_code():
    record = {
        "epoch": 2, "step": 8, "train_loss": 1, "train_accuracy": 50.0, "train_top5": None,
        "test_loss": 2.0, "test_accuracy": 40.0, "test_top5": 80.0, "layer_loss": [3.0, 4.0],
    }  # fmt: skip
    assert mlflow.metrics([{"test_accuracy": 45.0}, record]) == {
        "loss_train": 1.0, "acc_train": 50.0, "loss_test": 2.0, "acc_test": 40.0,
        "acc_test_top5": 80.0, "layer_loss/L1": 3.0, "layer_loss/L2": 4.0, "best_acc_test": 45.0,
    }  # fmt: skip
    assert "best_acc_test" not in mlflow.metrics([{"train_loss": 1.0}])


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """A run's folder after one epoch of two, without trackers."""
    folder = tmp_path_factory.mktemp("short")
    config = dataclasses.replace(TINY, workdir=str(folder), log=None, profile=None, epochs=1)
    assert train.train_and_evaluate(config) == 0
    return folder


def test_mlflow_goes_on_in_the_same_run(request, tmp_path, monkeypatch):
    client = pytest.importorskip("mlflow", reason="mlflow is not installed")
    pytest.importorskip("sqlalchemy", reason="MLflow's own database needs sqlalchemy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run = shutil.copytree(request.getfixturevalue("short_run"), tmp_path / "run")
    config = dataclasses.replace(TINY, workdir=str(run), log="mlflow", profile=None)
    for epochs in (1, 2, 3):
        assert train.train_and_evaluate(dataclasses.replace(config, epochs=epochs)) == 0
    found = client.MlflowClient()
    experiment = found.get_experiment_by_name("LLS")
    (one,) = found.search_runs([experiment.experiment_id])
    assert one.info.status == "FINISHED" and one.info.run_name == "run"
    assert one.data.params["training_mode"] == one.data.params["rule"] == "lls"
    written = folders.read_metrics(run)
    for theirs, ours in (("acc_test", "test_accuracy"), ("layer_loss/L1", "layer_loss")):
        history = found.get_metric_history(one.info.run_id, theirs)
        values = [np.atleast_1d(one[ours])[0] for one in written]
        assert [(m.step, m.value) for m in history] == [*enumerate(map(pytest.approx, values))]


def test_wandb_goes_on_in_the_same_run(request, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = shutil.copytree(request.getfixturevalue("short_run"), tmp_path / "run")
    config = dataclasses.replace(TINY, workdir=str(run), log="wandb", profile=None)
    for epochs in (1, 2):
        assert train.train_and_evaluate(dataclasses.replace(config, epochs=epochs)) == 0
    (identity,) = json.loads((run / "trackers.json").read_text()).values()
    starts = [path for path in (run / "wandb").iterdir() if path.name.startswith("offline-run")]
    assert [path.name.endswith(identity["id"]) for path in starts] == [True, True]
