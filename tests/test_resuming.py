"""Runs that cannot hurt themselves: nothing is lost that a person did not ask to lose."""

import contextlib
import dataclasses
import errno
import json
import pathlib
import re
import shlex
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import (
    command_line,
    compare,
    evaluate,
    export,
    import_lls_dnn,
    run_config,
    train,
)
from experiments.config import TrainConfig
from experiments.presets import PRESETS
from experiments.report.command import report
from experiments.report.config import ReportConfig
from lls_jax.errors import DamagedError, DatasetError, StructureError, UserError
from lls_jax.rules import LLS
from lls_jax.runs import checkpoints
from lls_jax.runs import folder as folders

TINY = TrainConfig(
    dataset="digits", model="small_models:two_blocks", rule="lls_mxm", epochs=2,
    batch_size=32, train_examples=64, eval_examples=40, augmentation="none", progress=False,
)  # fmt: skip
STEPS = 4


def tiny(folder, **options):
    return dataclasses.replace(TINY, workdir=str(folder), **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs, to copy."""
    folder = tmp_path_factory.mktemp("finished")
    assert train.train_and_evaluate(tiny(folder)) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def content(folder):
    """Every file of a run but its lock, with its bytes."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def metrics_without_time(folder):
    return [
        {name: value for name, value in record.items() if "second" not in name}
        for record in folders.read_metrics(folder)
    ]


# --- What is damage, and what is not -------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)


def test_whatever_is_damaged_is_noticed_or_harmless(tmp_path):
    """Each file of a checkpoint, cut, changed or gone: what is restored is what was saved."""
    # An optimizer's state is no dict, which only the description of the arrays says.
    state = optax.TraceState({"x": jnp.ones(2)})
    tree = {"a": {"x": jnp.arange(300.0), "empty": {}}, "key": jax.random.key(3), "state": state}
    judged = {"params": {"x": jnp.ones(4)}}
    with checkpoints.open_checkpoints(tmp_path / "whole") as manager:
        checkpoints.save(manager, checkpoints.Checkpoint(1, tree, judged, {"accuracy": 3.0}))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )
    files = [path for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    noticed = 0
    for file in files:
        for damage in (pathlib.Path.unlink, truncate, flip):
            copy = shutil.copytree(tmp_path / "whole", tmp_path / "copy")
            damage(copy / file.relative_to(tmp_path / "whole"))
            with checkpoints.open_checkpoints(copy, read_only=True) as manager:
                try:
                    restored, _ = checkpoints.restore_training(manager, 1, abstract)
                    np.testing.assert_array_equal(restored["a"]["x"], tree["a"]["x"])
                    assert (restored["key"] == tree["key"]).all()
                except DamagedError as error:
                    assert str(error).startswith("checkpoint 1 is damaged: ")
                    noticed += 1
            shutil.rmtree(copy)
    assert noticed >= 10


@dataclasses.dataclass(frozen=True)
class Grown(LLS):
    """A rule that has got another array."""

    def init(self, key, activation_shape, pool_size):
        params = super().init(key, activation_shape, pool_size)
        return {**params, "extra": jnp.zeros(3)} if EXTRA else params


EXTRA = False


def make_grown(num_classes):
    return Grown(num_classes, modulation="matrix")


def test_another_structure_is_no_damage_and_names_the_array(tmp_path, monkeypatch):
    config = tiny(tmp_path / "run", rule="test_resuming:make_grown")
    assert train.train_and_evaluate(config) == 0
    before = content(tmp_path / "run")
    monkeypatch.setattr("test_resuming.EXTRA", True)
    with pytest.raises(UserError, match=r"block_0/rule/extra nowhere.*float32\[3\]") as caught:
        train.train_and_evaluate(config)
    assert "--workdir" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(StructureError, match="block_0/rule/extra"):
        evaluate.evaluate(evaluate.EvaluateConfig(str(tmp_path / "run")))
    after = content(tmp_path / "run")
    # A start is noted; nothing else has changed.
    assert after == before
    monkeypatch.undo()
    assert train.train_and_evaluate(dataclasses.replace(config, epochs=3)) == 0
    assert [r["epoch"] for r in folders.read_metrics(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError("out of memory"), MemoryError),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), RuntimeError),
        (OSError(errno.EIO, "Input/output error"), OSError),
        (ValueError("PERMISSION_DENIED: Error opening file"), OSError),
        (ValueError("UNAVAILABLE: the file system does not answer"), OSError),
        (ValueError("something else"), ValueError),
    ],
)
def test_what_is_no_fault_of_the_checkpoint_is_itself(run, monkeypatch, error, expected):
    def fail(*arguments):
        raise error

    before = content(run)
    monkeypatch.setattr(checkpoints, "_restore_item", fail)
    with pytest.raises(expected) as caught:
        train.train_and_evaluate(tiny(run))
    assert not isinstance(caught.value, UserError)
    assert content(run) == before


def test_if_every_checkpoint_is_damaged_it_stops_and_changes_nothing(run):
    for file in (run / "checkpoints").rglob("manifest.ocdbt"):
        truncate(file)
    before = content(run)
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged.*--workdir"):
        train.train_and_evaluate(tiny(run))
    assert content(run) == before


def test_records_are_not_dropped_for_want_of_checkpoints(run):
    shutil.rmtree(run / "checkpoints")
    before = content(run)
    with pytest.raises(UserError, match="records of 2 epochs, but no checkpoint"):
        train.train_and_evaluate(tiny(run))
    assert content(run) == before
    # One record: a run that was killed between its first record and its first checkpoint.
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(lines[0])
    assert train.train_and_evaluate(tiny(run)) == 0
    assert [record["epoch"] for record in folders.read_metrics(run)] == [1, 2]


def test_records_that_do_not_reach_the_checkpoint_stop_it(run, tmp_path):
    written = (run / "metrics.jsonl").read_text()
    for text, message in (
        ("", "the records of 0 epochs, and the checkpoint to go on from has 2"),
        (written.splitlines()[1], "the records of 1 epochs"),
        ("{}\n" + written, "has '{}' in line 1, which is no record of an epoch"),
    ):
        (run / "metrics.jsonl").write_text(text)
        before = content(run)
        with pytest.raises(UserError, match=re.escape(message)):
            train.train_and_evaluate(tiny(run))
        assert content(run) == before


def test_who_has_lost_its_config_is_no_other_run(run):
    (run / "config.json").unlink()
    before = content(run)
    with pytest.raises(UserError, match="--rule lls_mxm there, bp here"):
        train.train_and_evaluate(tiny(run, rule="bp"))
    assert content(run) == before
    assert train.train_and_evaluate(tiny(run)) == 0
    assert run_config.read_config(run).rule == "lls_mxm"


def test_a_folder_of_fit_says_who_reads_it(run):
    (run / "config.json").write_text('{"format": 1, "made_by": "lls_jax.fit", "model": "Network"}')
    with pytest.raises(UserError, match=r"run of lls_jax\.fit, .* lls_jax\.evaluation\.restore"):
        run_config.read_config(run)


def test_what_ran_where_may_be_lost(run, tmp_path):
    compared = compare.CompareConfig([str(run)], out=str(tmp_path / "out"))
    for damage in (lambda path: path.write_text(""), lambda path: path.unlink()):
        damage(run / "environment.json")
        assert compare.compare(compared) == 0
        assert json.loads((tmp_path / "out" / "comparison.json").read_text())[0]["device"] is None
        assert report(ReportConfig(str(run), evaluate=False)) == 0
        assert export.export(export.ExportConfig(str(run))) == 0
        assert "not recorded" in (run / "export" / "MODEL_CARD.md").read_text()


# --- The command that goes on --------------------------------------------------------------------

OTHER = {
    "rule": "lls,lls_m,predsim,lls_mxm", "model": "vgg8", "groups": "2,2", "epochs": 7,
    "batch_size": 17, "eval_batch_size": 3, "learning_rate": 0.25, "optimizer": "sgd",
    "momentum": 0.5, "weight_decay": 0.125, "schedule": "multistep", "basis_rows": 4,
    "deterministic": True,
    "feedback_sign": True, "waveform": "cosine", "temperature": 0.5, "label_smoothing": 0.1,
    "dropout": 0.25, "precision": "bfloat16", "kernels": "xla", "loop": "dispatch", "remat": 0,
    "reach": 2, "width": 0.5, "preset": "airbench", "classifier_smoothing": 0.1,
    "test_views": "flip", "auxiliary_depth": 3, "other_learning_rate": 0.5,
    "slice": 0, "measure": "norms,heads", "measure_every": 2,
    "pipeline": 2, "data_parallel": 2, "seed": 3, "train_examples": 64, "eval_examples": 40,
    "data_dir": "some where", "data_on_device": "no", "workdir": "a folder", "checkpoint_every": 5,
    "progress": False, "augmentation": "crop", "validation_examples": 24, "patience": 3,
    "clip_norm": 2.0, "warmup_epochs": 1, "log": "tensorboard,mlflow", "profile": 3,
}  # fmt: skip
# These need others beside them.
TOGETHER = {
    "stages": {"pipeline": 2},
    "measure_every": {"measure": "norms"},
    "coordinator": {"num_processes": 2, "process_id": 0},
    "other_learning_rate": {"optimizer": "muon"},
}
OTHER |= {"stages": "2,3", "coordinator": "here:1", "num_processes": 3, "process_id": 1}
NEED = {"num_processes": "coordinator", "process_id": "coordinator"}


@pytest.mark.parametrize("dataset", PRESETS)
def test_the_printed_command_is_the_run(dataset):
    """Presets x options, each at another value and at the general default."""
    preset, general = PRESETS[dataset], TrainConfig()
    for field in dataclasses.fields(TrainConfig):
        if field.name == "dataset":
            continue
        for value in (OTHER[field.name], getattr(general, field.name)):
            options = {field.name: value, **(TOGETHER.get(field.name, {}) if value else {})}
            if field.name in NEED and value is not None:
                options = {"coordinator": "here:1", **TOGETHER["coordinator"], **options}
            config = dataclasses.replace(preset, **options)
            command = train.resume_command(config)
            name, *arguments = shlex.split(command)[2:]
            assert name == f"experiments.{dataset}"
            assert command_line.parse_training(dataset, "", arguments) == config, command


# --- What may change -----------------------------------------------------------------------------


def test_a_finished_run_can_be_extended(run, finished, tmp_path, capsys):
    longer = {"epochs": 3, "eval_batch_size": 7}
    assert train.train_and_evaluate(tiny(run, **longer)) == 0
    assert f"resumed at step {STEPS}, epoch 2 done" in capsys.readouterr().out
    assert run_config.read_config(run).epochs == 3
    assert train.train_and_evaluate(tiny(tmp_path / "whole", epochs=3)) == 0
    ours, theirs = metrics_without_time(run), metrics_without_time(tmp_path / "whole")
    for a, b in zip(ours, theirs, strict=True):
        # Judged in other batches: but for rounding.
        assert a.pop("test_loss") == pytest.approx(b.pop("test_loss"), rel=1e-5)
        assert a == b
    # Not to fewer epochs, and not where the schedule would have been another.
    with pytest.raises(UserError, match="--epochs 3 there, 2 here"):
        train.train_and_evaluate(tiny(run))
    stepped = tiny(tmp_path / "stepped", schedule="multistep", epochs=1)
    assert train.train_and_evaluate(stepped) == 0
    with pytest.raises(UserError, match="--schedule multistep depends on --epochs"):
        train.train_and_evaluate(dataclasses.replace(stepped, epochs=2))


def test_a_folder_of_an_earlier_version_is_read_but_not_resumed(run, capsys):
    values = json.loads((run / "config.json").read_text())
    # The second had no b1 of adam, and a dropout of airbench that did nothing.
    for options, message in (
        (
            {"optimizer": "adam", "momentum": 0.5},
            "adam had a b1 of 0.9 and not --momentum 0.5",
        ),
        ({"optimizer": "adam"}, None),
        ({"momentum": 0.5}, None),
        ({"model": "airbench", "dropout": 0.2}, None),
    ):
        stored = {**values, **options, "format": 2}
        config = run_config.ConfigSettings(tiny(values["workdir"], **{**options, "dropout": 0.0}))
        with contextlib.ExitStack() as stack:
            if message:
                stack.enter_context(pytest.raises(UserError, match=message))
            config.check(run, stored)
    assert values.pop("format") == 3
    values |= {"waveform": "square", "temperature": 0.5, "label_smoothing": 0.0}
    (run / "config.json").write_text(json.dumps(values))
    before = content(run)
    with pytest.raises(UserError, match="earlier version, whose schedule_free_adamw was optax's"):
        train.train_and_evaluate(tiny(run))
    assert content(run) == before
    assert run_config.read_config(run) == tiny(values["workdir"])
    capsys.readouterr()
    assert evaluate.evaluate(evaluate.EvaluateConfig(str(run), json=True)) == 0
    best = max(record["test_accuracy"] for record in folders.read_metrics(run))
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(best)


@pytest.mark.parametrize(
    "options", [{"rule": "lls_mxn"}, {"train_examples": 5000}, {"model": "vgg11"}]
)
def test_a_start_that_fails_leaves_nothing_behind(tmp_path, options):
    with pytest.raises((UserError, DatasetError)):
        train.train_and_evaluate(tiny(tmp_path / "new" / "run", **options))
    assert not list(tmp_path.iterdir())
    # A folder that was there before stays.
    (tmp_path / "mine").mkdir()
    with pytest.raises((UserError, DatasetError)):
        train.train_and_evaluate(tiny(tmp_path / "mine", **options))
    assert not list((tmp_path / "mine").iterdir())


def test_names_are_checked_before_anything_is_downloaded(tmp_path, monkeypatch):
    def unreachable(*arguments, **options):
        raise AssertionError("a download was tried")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    for dataset in ("cifar10", "imagenette"):
        for options, message in (
            ({"rule": "lls_mxn"}, "Did you mean 'lls_mxm'"),
            ({"model": "vgg9"}, "unknown model 'vgg9'"),
            ({"augmentation": "flap"}, "unknown augmentation 'flap'"),
            ({"rule": "lls", "temperature": -1.0}, "`temperature` is -1.0"),
            ({"rule": "predsim", "temperature": 0.2}, "--temperature 0.2 is of no use"),
        ):
            config = TrainConfig(
                dataset=dataset, data_dir=str(tmp_path), workdir=str(tmp_path / "run"), **options
            )
            with pytest.raises(UserError, match=message):
                train.train_and_evaluate(config)


def test_an_import_that_fails_leaves_no_folder(tmp_path):
    config = import_lls_dnn.ImportConfig("missing.tar", out=str(tmp_path / "out"), dataset="digits")
    with pytest.raises(UserError, match="does not exist"):
        import_lls_dnn.import_lls_dnn(config)
    assert not (tmp_path / "out").exists()
