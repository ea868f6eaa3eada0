"""The commands, as a person uses them: train, stop, kill, resume, evaluate, compare, mistype."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import urllib.error

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import EMITTERS

from experiments import (
    accounting,
    batch,
    benchmark,
    command_line,
    compare,
    console,
    data_sets,
    evaluate,
    export_lls_dnn,
    import_lls_dnn,
    paper,
    plots,
    prepare_data,
    run_config,
    setup,
    several_rules,
    startup,
    train,
)
from experiments.board.command import board
from experiments.board.config import BoardConfig
from experiments.config import TrainConfig
from experiments.config_choices import AVERAGING, OPTIMIZERS
from experiments.suites import epochs as suites_epochs
from experiments.suites import kernels as suites_kernels
from experiments.suites import pipeline as suites_pipeline
from experiments.suites import training as suites_training
from lls_jax import data, models, rules
from lls_jax.data import augment, batches
from lls_jax.errors import DivergedError, UserError
from lls_jax.runs import epoch_sums, launches, loop, saving
from lls_jax.runs import fit as fitting
from lls_jax.runs import folder as folders
from lls_jax.runs.evaluate import evaluate_weights

ROOT = pathlib.Path(__file__).parents[1]
TINY = TrainConfig(
    dataset="digits",
    # Of ten channels: `deeper_forward` has a group of them for each class.
    model="small_models:two_blocks",
    epochs=3,
    batch_size=16,
    train_examples=64,
    eval_examples=40,
    augmentation="full",
    dropout=0.1,
    progress=False,
)
STEPS = 12


def tiny(folder, **options):
    return dataclasses.replace(TINY, workdir=str(folder), **options)


def arrays(folder, step=STEPS):
    """Every array that training goes on with, by path."""
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        arguments = ocp.args.Composite(training=ocp.args.StandardRestore())
        tree = manager.restore(step, args=arguments)["training"]
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path): np.asarray(
            jax.random.key_data(leaf)
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf
        )
        for path, leaf in flat
    }


def results(folder):
    """The metrics that do not depend on the clock."""
    clock = ("seconds", "total_seconds", "images_per_second")
    return [
        {key: value for key, value in record.items() if key not in clock}
        for record in folders.read_metrics(folder)
    ]


def assert_same_run(folder, reference):
    ours, theirs = arrays(folder), arrays(reference)
    assert ours.keys() == theirs.keys()
    for path in theirs:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
    assert results(folder) == results(reference)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("reference")
    assert train.train_and_evaluate(tiny(folder)) == 0
    return folder


# --- training and what it leaves ---------------------------------------------------------------


# One of each kind: with local losses, and without.
KINDS = ("lls_mxm", "dfa")


@pytest.mark.parametrize(
    "rule",
    [
        name if name in KINDS else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in rules.NAMES
    ],
)
def test_every_rule_trains_and_reloads(tmp_path, capsys, rule):
    config = tiny(tmp_path, rule=rule, epochs=1)
    assert train.train_and_evaluate(config) == 0
    printed = capsys.readouterr().out
    (record,) = folders.read_metrics(tmp_path)
    layers = 0 if rule in ("bp", "dfa", "drtp") else 2
    assert len(record["layer_loss"]) == layers
    assert ("L2 " in printed) == bool(layers)
    assert f"Acc@1 {record['test_accuracy']:.2f}" in printed
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment[0]["packages"]["jax"] == jax.__version__
    assert evaluate.evaluate(evaluate.EvaluateConfig(str(tmp_path), json=True)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rule"] == rule
    assert report["accuracy"] == pytest.approx(record["test_accuracy"])
    assert report["loss"] == pytest.approx(record["test_loss"], rel=1e-5)
    assert report["top5"] == pytest.approx(record["test_top5"])
    assert np.sum(report["confusion"]) == 40
    # The same command again: nothing left to do.
    assert train.train_and_evaluate(config) == 0
    assert "resumed at step 4, epoch 1 done" in capsys.readouterr().out
    assert len(folders.read_metrics(tmp_path)) == 1


# One that averages, one with two kinds of parameters, one with a schedule that sees the loss.
PAIRS = (("schedule_free_adamw", "multistep"), ("muon", "multistep"), ("adamw", "plateau"))


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        pair if pair in PAIRS else pytest.param(*pair, marks=pytest.mark.exhaustive)
        for pair in itertools.product(OPTIMIZERS, ["multistep", "plateau"])
    ],
)
def test_every_optimizer_and_schedule_trains(tmp_path, optimizer, schedule):
    if schedule == "plateau" and optimizer in AVERAGING:
        with pytest.raises(ValueError, match="--schedule plateau does not go with --optimizer"):
            tiny(tmp_path, optimizer=optimizer, schedule=schedule)
        return
    config = tiny(
        tmp_path, optimizer=optimizer, schedule=schedule, epochs=1, weight_decay=1e-4, rule="lls_m"
    )
    assert train.train_and_evaluate(config) == 0


def test_a_folder_keeps_its_config(tmp_path, reference):
    with pytest.raises(UserError) as caught:
        train.train_and_evaluate(tiny(reference, learning_rate=1e-3, rule="lls"))
    assert "--rule lls_mxm there, lls here" in str(caught.value)
    assert "--learning-rate 0.005 there, 0.001 here" in str(caught.value)
    with folders.claim(reference), pytest.raises(UserError, match="another process is training"):
        train.train_and_evaluate(tiny(reference))


# --- stopping, killing, damaging ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "status", "at_step"), [(signal.SIGINT, 130, 3), (signal.SIGTERM, 143, 8)]
)
def test_a_signal_saves_and_the_resumed_run_is_the_same(
    tmp_path, capfd, monkeypatch, reference, number, status, at_step
):
    steps = 0

    def signalled(*arguments, add=epoch_sums.add):
        nonlocal steps
        steps += 1
        if steps == at_step:
            os.kill(os.getpid(), number)
        return add(*arguments)

    monkeypatch.setattr(epoch_sums, "add", signalled)
    before = signal.getsignal(number)
    assert train.train_and_evaluate(tiny(tmp_path)) == status
    assert signal.getsignal(number) is before
    printed, told = capfd.readouterr()
    assert told.startswith("stopping: the steps under way are finished and saved")
    assert f"stopped at step {at_step}, saved; resume with:" in printed
    command = printed.strip().splitlines()[-1].split()
    assert command[:3] == ["python", "-m", "experiments.digits"]
    # What it says to type is this run.
    assert command_line.parse_training("digits", "", command[3:]) == tiny(tmp_path)
    monkeypatch.undo()
    assert train.train_and_evaluate(tiny(tmp_path)) == 0
    assert f"resumed at step {at_step}" in capfd.readouterr().out
    assert_same_run(tmp_path, reference)


def test_a_signal_while_images_are_loaded_interrupts(request, tmp_path, monkeypatch, capsys):
    def interrupted(config):
        os.kill(os.getpid(), signal.SIGINT)
        # Another thread may get it, and this one hear of it a moment later.
        time.sleep(20)
        pytest.fail("it went on")

    # A shell starts what it puts into the background deaf to it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    monkeypatch.setattr(setup.data_sets, "open_data", interrupted)
    status, error = command(monkeypatch, capsys, run_digits, "--workdir", str(tmp_path / "run"))
    assert (status, error) == (130, "interrupted\n")
    assert not (tmp_path / "run").exists()


def test_a_signal_after_the_last_step_ends_a_batch(tmp_path, capsys, monkeypatch):
    append = folders.append_metrics

    def signalled(folder, record):
        append(folder, record)
        if record["epoch"] == TINY.epochs:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(folders, "append_metrics", signalled)

    def member(name):
        config = tiny(tmp_path / name)
        return batch.Member(
            *(name, tmp_path / name, "digits", lambda: False),
            lambda: train.train_and_evaluate(config),
        )

    assert batch.run_all(map(member, ("one", "two")), lambda: None) == 143
    assert f"done: {TINY.epochs} epochs" in capsys.readouterr().out
    assert (tmp_path / "one").exists() and not (tmp_path / "two").exists()


# Each makes the process kill itself somewhere; none of it lets anything clean up.
KILLS = {
    "inside an epoch": """
        add, count = epoch_sums.add, iter(range(100))
        def killed(*arguments):
            return kill() if next(count) == 6 else add(*arguments)
        epoch_sums.add = killed
    """,
    "between metrics and checkpoint": """
        append, count = folders.append_metrics, iter(range(100))
        def killed(*arguments):
            append(*arguments)
            if next(count) == 1:
                kill()
        folders.append_metrics = killed
    """,
    "after epochs that were not written": """
        append, count = folders.append_metrics, iter(range(100))
        saving._SECONDS = 1000
        def killed(*arguments):
            append(*arguments)
            if next(count) == 2:
                kill()
        folders.append_metrics = killed
    """,
    "while a checkpoint is written": """
        import threading
        save, count = checkpoints.save, iter(range(100))
        def killed(*arguments):
            if next(count) == 3:
                threading.Timer(0.01, kill).start()
            save(*arguments)
        checkpoints.save = killed
    """,
}


# Training goes on beside a checkpoint that is never done; the one before is used.
KILLS["steps after a checkpoint was begun"] = """
    import threading
    save, add, count, steps = checkpoints.save, epoch_sums.add, iter(range(9)), iter(range(99))
    begun = threading.Event()
    def endless(*arguments):
        if next(count) == 1:
            begun.set()
            threading.Event().wait()
        save(*arguments)
    def killed(*arguments):
        if next(steps) == 7:
            begun.wait()
            kill()
        return add(*arguments)
    checkpoints.save, epoch_sums.add = endless, killed
    """


@pytest.mark.parametrize("point", KILLS)
def test_a_killed_run_resumes_bit_identically(tmp_path, reference, point):
    config = tiny(tmp_path, checkpoint_every=0 if "not written" in point else 3)
    script = "\n".join(
        [
            "import os, signal",
            "from experiments import train",
            "from lls_jax.runs import checkpoints, epoch_sums, saving, folder as folders",
            "from experiments.config import TrainConfig",
            "kill = lambda: os.kill(os.getpid(), signal.SIGKILL)",
            textwrap.dedent(KILLS[point]),
            f"train.train_and_evaluate(TrainConfig(**{dataclasses.asdict(config)!r}))",
        ]
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert train.train_and_evaluate(config) == 0
    assert_same_run(tmp_path, reference)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    # That leaves a file of the right name and size; `test_resuming` does more to every file.
    [
        flip,
        *(pytest.param(d, marks=pytest.mark.exhaustive) for d in (pathlib.Path.unlink, truncate)),
    ],
)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(
    tmp_path, capsys, monkeypatch, reference, damage
):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(console.plots, "draw_curves", lambda *a: None)
        patch.setattr(console, "_REDRAW_SECONDS", 0)
        patch.setattr(saving, "_SECONDS", 0)
        whole, count = loop.evaluate_weights, iter(range(9))
        patch.setattr(
            loop, "evaluate_weights", lambda *a: stop() if next(count) == 2 else whole(*a)
        )
        with pytest.raises(KeyboardInterrupt):
            train.train_and_evaluate(tiny(tmp_path))
    newest = tmp_path / "checkpoints" / "8"
    largest = max(
        (path for path in (newest / "training").rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    damage(largest)
    capsys.readouterr()
    assert train.train_and_evaluate(tiny(tmp_path)) == 0
    printed = capsys.readouterr()
    assert "warning: checkpoint 8 is damaged" in printed.err
    assert "resumed at step 4, epoch 1 done" in printed.out
    assert (tmp_path / "damaged" / "8").is_dir()
    assert_same_run(tmp_path, reference)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_layer(tmp_path, monkeypatch):
    single = fitting.single

    def poisoned(*arguments):
        execution = single(*arguments)

        def step(state, batch):
            state, metrics = execution.step(state, batch)
            if int(state.step) == 6:
                metrics["layer_loss"] = metrics["layer_loss"].at[1].set(np.nan)
            return state, metrics

        return execution._replace(step=step)

    monkeypatch.setattr(fitting, "single", poisoned)
    with pytest.raises(UserError, match="loss of local layer L2 is not finite by step"):
        train.train_and_evaluate(tiny(tmp_path))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4"]
    assert evaluate.evaluate(evaluate.EvaluateConfig(str(tmp_path))) == 0


def test_a_diverging_run_is_stopped(tmp_path):
    config = tiny(tmp_path, optimizer="sgd", learning_rate=1e30, rule="bp")
    with pytest.raises(UserError, match=r"not finite.*lower --learning-rate"):
        train.train_and_evaluate(config)
    assert not list((tmp_path / "checkpoints").iterdir())


# The older emitter fuses a loop of two steps otherwise than one of four, and rounds otherwise.
OLDER_EMITTER = f"{EMITTERS}=false" in os.environ.get("XLA_FLAGS", "")


@pytest.mark.skipif(not OLDER_EMITTER, reason="nothing to set aside")
def test_with_the_emitter_that_users_have():
    many = test_many_steps_a_launch_are_the_same_however_they_are_cut.__name__
    flags = os.environ["XLA_FLAGS"].replace(f"{EMITTERS}=false", f"{EMITTERS}=true")
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", f"{__file__}::{many}", "-n0", "-pno:cacheprovider"],
        env={**os.environ, "XLA_FLAGS": flags}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert "1 passed in" in ended.stdout, ended.stdout[-4000:]


@pytest.mark.skipif(OLDER_EMITTER, reason="runs in test_with_the_emitter_that_users_have")
def test_many_steps_a_launch_are_the_same_however_they_are_cut(tmp_path, monkeypatch, capsys):
    # One block: each length of a loop is a program of its own.
    small = {
        "model": "test_trackers:one_block",
        "width": 1.0,
        "dropout": 0.0,
        "augmentation": "flip",
    }
    looped = {"loop": "scan", **small}
    assert train.train_and_evaluate(tiny(tmp_path / "whole", **looped)) == 0
    assert "many steps a launch" in capsys.readouterr().out
    monkeypatch.setattr(launches, "_STEPS_A_LAUNCH", 1)
    assert train.train_and_evaluate(tiny(tmp_path / "single", **looped)) == 0
    assert_same_run(tmp_path / "single", tmp_path / "whole")
    monkeypatch.setattr(launches, "_STEPS_A_LAUNCH", 3)
    make_loop = fitting.make_loop

    def signalled(*arguments):
        made, count = make_loop(*arguments), iter(range(100))

        def noted(launch, *values):
            if next(count) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return launch(*values)

        return type(made)(*(functools.partial(noted, launch) for launch in made))

    stopped = tiny(tmp_path / "stopped", checkpoint_every=2, **looped)
    monkeypatch.setattr(fitting, "make_loop", signalled)
    assert train.train_and_evaluate(stopped) == 143
    assert "stopped at step 6, saved" in capsys.readouterr().out
    monkeypatch.undo()
    assert train.train_and_evaluate(stopped) == 0
    assert "resumed at step 6" in capsys.readouterr().out
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_the_best_epoch_is_chosen_by_images_that_are_held_out(tmp_path, capsys):
    config = tiny(
        tmp_path, validation_examples=24, clip_norm=1.0, warmup_epochs=1, schedule="cosine",
        patience=2,
    )  # fmt: skip
    assert train.train_and_evaluate(config) == 0
    printed = capsys.readouterr().out
    assert "64 training and 40 test images, 24 for validation" in printed
    assert "% of the validation images after epoch" in printed
    records = results(tmp_path)
    assert all("validation_loss" in record for record in records)
    best = max(records, key=lambda record: (record["validation_accuracy"], record["epoch"]))
    evaluate.evaluate(evaluate.EvaluateConfig(str(tmp_path), json=True))
    report = json.loads(capsys.readouterr().out)
    assert report["epoch"] == best["epoch"]
    assert report["accuracy"] == pytest.approx(best["test_accuracy"])
    stopping = tiny(tmp_path / "early", validation_examples=24, patience=1, epochs=40)
    assert train.train_and_evaluate(stopping) == 0
    assert len(results(tmp_path / "early")) < 40
    assert " epochs (no better one for 1, of 40) in" in capsys.readouterr().out
    with pytest.raises(UserError, match="--validation-examples is 1437, but data set 'digits' has"):
        train.train_and_evaluate(tiny(tmp_path / "all", validation_examples=1437, batch_size=1))


# --- evaluate, compare, benchmark --------------------------------------------------------------


def test_evaluate_takes_best_last_and_steps(reference, capsys):
    records = {record["step"]: record["test_accuracy"] for record in results(reference)}
    best = max(records, key=lambda step: (records[step], step))
    # Which ones are kept depends on how fast epochs were, and on which was best.
    first = min(int(path.name) for path in (reference / "checkpoints").iterdir())
    for wanted, step in (("best", best), ("last", 12), (str(first), first)):
        config = evaluate.EvaluateConfig(str(reference), checkpoint=wanted, json=True)
        evaluate.evaluate(config)
        report = json.loads(capsys.readouterr().out)
        assert report["step"] == step
        assert report["accuracy"] == pytest.approx(records[step])
    evaluate.evaluate(evaluate.EvaluateConfig(str(reference), checkpoint="last"))
    printed = capsys.readouterr().out
    assert "accuracy by class:" in printed
    assert (reference / "confusion-12.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="no checkpoint of step 7; there are"):
        evaluate.evaluate(evaluate.EvaluateConfig(str(reference), checkpoint="7"))


def test_evaluate_has_views_of_images_alone(reference, monkeypatch):
    """Sequences would be read from their last channel to their first."""
    open_data = data_sets.open_data

    def of_sequences(config):
        opened = open_data(config)
        return opened._replace(spec=dataclasses.replace(opened.spec, image_shape=(6, 2)))

    monkeypatch.setattr(data_sets, "open_data", of_sequences)
    config = evaluate.EvaluateConfig(str(reference), views="flip")
    with pytest.raises(UserError, match=r"`--views` is 'flip', and .* shape \(6, 2\)"):
        evaluate.judge(config)


def test_evaluate_answers_where_classes_have_no_image_and_no_picture_can_be_written(
    reference, capsys, monkeypatch
):
    def read_only(confusion, names, title, path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(plots, "draw_confusion", read_only)
    config = evaluate.EvaluateConfig(str(reference), eval_examples=3, views="flip", json=True)
    assert evaluate.evaluate(config) == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert report["picture"] is None
    # Other images and views have a picture of their own.
    assert re.search(r"note: .*confusion-\d+-flip-first3.png cannot be written", said.err)
    rows = zip(report["accuracy_by_class"].values(), report["confusion"])
    assert all((accuracy is None) == (sum(row) == 0) for accuracy, row in rows)
    assert evaluate.evaluate(dataclasses.replace(config, json=False)) == 0
    assert capsys.readouterr().out.count("  -\n") == 10 - np.count_nonzero(
        np.sum(report["confusion"], axis=1)
    )


def test_compare_writes_table_and_picture(reference, tmp_path, capsys):
    other = tmp_path / "other"
    train.train_and_evaluate(tiny(other, rule="bp", epochs=1))
    out = tmp_path / "out"
    assert compare.compare(compare.CompareConfig([str(reference), str(other)], str(out))) == 0
    rows = json.loads((out / "comparison.json").read_text())
    assert [row["rule"] for row in rows] == ["lls_mxm", "bp"]
    assert rows[0]["test_accuracy"] == results(reference)[-1]["test_accuracy"]
    table = (out / "comparison.md").read_text().splitlines()
    assert len(table) == 4
    assert table[0].startswith("| run | data | model | rule | epochs |")
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def few_steps(monkeypatch):
    """What is asked is what a race reports, not how fast a step is."""
    monkeypatch.setattr(suites_training, "_WARM_UP_STEPS", 1)
    monkeypatch.setattr(suites_training, "STEPS_A_TURN", 2)


def test_benchmark_reports_every_rule(tmp_path, capsys, few_steps):
    config = benchmark.BenchmarkConfig(
        rules=["lls"], reach=[1, 2], models=["small_models:two_blocks"], batch_sizes=[4], turns=1,
        out=str(tmp_path),
    )  # fmt: skip
    assert benchmark.benchmark(config) == 0
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert [(row["rule"], row["reach"]) for row in report["results"]] == [
        ("lls", 1), ("lls", 2), ("bp", 1), ("bp, checkpointed", 1), ("bp, 4 x 1", 1),
    ]  # fmt: skip
    bp = report["results"][2]
    # What is below a loss is kept for it.
    own, reaching = report["results"][:2]
    assert reaching["temporary_mb"] > own["temporary_mb"]
    for row in report["results"]:
        assert len(row["all_step_ms"]) == 2
        # The state and the batch are held besides the temporaries.
        assert row["peak_mb"] > row["temporary_mb"] > 0
        assert row["peak_over_bp"] == pytest.approx(row["peak_mb"] / bp["peak_mb"])
    assert bp["speed_over_bp"] == 1.0
    assert "| small_models:two_blocks | lls | 2 | 4 |" in capsys.readouterr().out


def test_a_race_of_precisions_compares_each_with_its_like(monkeypatch):
    step_seconds = {
        ("lls", 1, "float32"): 6.0, ("lls", 2, "float32"): 8.0, ("bp", 1, "float32"): 12.0,
        ("lls", 1, "bfloat16"): 2.0, ("lls", 2, "bfloat16"): 5.0, ("bp", 1, "bfloat16"): 3.0,
    }  # fmt: skip

    class Timed:
        compile_seconds, is_local = 0.0, True

        def __init__(self, entrant, seed, make):
            self.entrant, self.times = entrant, []
            config = entrant.config
            self.key = config.rule, config.reach, config.precision
            assert config.width == 0.5
            self.temporary_bytes = int(1e6 * step_seconds[self.key])
            self.peak_bytes = 2 * self.temporary_bytes

        def advance(self, steps, *, keep):
            self.times += [step_seconds[self.key]] * (steps * keep)

    monkeypatch.setattr(suites_training, "Contestant", Timed)
    monkeypatch.setattr(
        suites_training, "with_baselines", lambda one: [suites_training.Entrant(one)]
    )
    config = benchmark.BenchmarkConfig(
        rules=["lls"], reach=[1, 2], precisions=["float32", "bfloat16"], width=0.5, groups="2,2"
    )
    (group,) = suites_training._groups(config)
    # Backpropagation's network has no losses to share.
    assert {(one.config.rule, one.config.groups) for one in group} == {("lls", "2,2"), ("bp", None)}
    rows = suites_training.race(group, 1, 0)
    found = {
        (row["rule"], row["reach"], row["precision"]): (
            row["speed_over_bp"], row["speed_over_float32"],
        )
        for row in rows
    }  # fmt: skip
    for row in rows:
        assert row["temporaries_over_bp"] == row["peak_over_bp"] == 1 / row["speed_over_bp"]
    assert found == {
        ("lls", 1, "float32"): (2.0, 1.0), ("lls", 2, "float32"): (1.5, 1.0),
        ("bp", 1, "float32"): (1.0, 1.0), ("lls", 1, "bfloat16"): (1.5, 3.0),
        ("lls", 2, "bfloat16"): (0.6, 1.6), ("bp", 1, "bfloat16"): (1.0, 4.0),
    }  # fmt: skip
    assert "over float32" in suites_training._text(config, rows)
    alone = [row for row in rows if row["precision"] == "float32"]
    assert "over float32" not in suites_training._text(config, alone)


def test_benchmark_takes_the_peak_of_an_allocator_that_counts(monkeypatch):
    entrant = suites_training.Entrant(TrainConfig(rule="bp", batch_size=4))
    assert suites_training.allocator_peak(entrant, 0) is None
    counted = iter([{"peak_bytes_in_use": 1}, {"peak_bytes_in_use": 5_000_000}])
    monkeypatch.setattr(suites_training, "_allocator", lambda: next(counted))
    peak = suites_training.allocator_peak(entrant, 0)
    (row,) = suites_training.race([entrant], 1, 0, [peak])
    assert row["peak_mb"] == 5


def test_benchmark_of_whole_runs_tells_seconds_and_accuracy(tmp_path, capsys):
    config = benchmark.BenchmarkConfig(
        suite="epochs", models=["small_models:two_blocks"], rules=["lls"], reach=[2],
        batch_sizes=[100], dataset="digits", epochs=3, out=str(tmp_path),
    )  # fmt: skip
    assert benchmark.benchmark(config) == 0
    rows = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    assert [(row["rule"], row["reach"]) for row in rows] == [("bp", 1), ("lls", 2)]
    for row in rows:
        first, *others = row["epoch_seconds"]
        assert row["seconds"] == pytest.approx(sum(others) + sum(others) / 2)
        assert row["total_seconds"] == pytest.approx(first + sum(others))
        assert row["total_seconds"] < row["command_seconds"]
        assert row["test_accuracy"] > 15
    assert rows[1]["speed_over_bp"] == rows[0]["seconds"] / rows[1]["seconds"]
    printed = capsys.readouterr().out
    assert "| small_models:two_blocks | lls | 2 | 100 | float32 | 3 |" in printed
    # Of folders that are gone by then.
    assert "evaluate with" not in printed


@pytest.mark.parametrize(
    ("suite", "options", "message"),
    [
        ("training", {"models": ["small_conv", "vgg9"]}, "'vgg9'"),
        ("training", {"models": ["vgg8", "airbench"], "against": "torch"}, "no block of kind"),
        ("epochs", {"models": ["small_conv", "vgg9"], "dataset": "digits"}, "'vgg9'"),
        ("kernels", {"rules": ["lls", "lls_n"], "cpu": True}, "'lls_n'"),
        ("pipeline", {"rules": ["lls", "lls_n"]}, "'lls_n'"),
    ],
)
def test_benchmark_looks_at_all_before_it_measures_any(
    tmp_path, monkeypatch, suite, options, message
):
    def measured(*arguments, **named):
        pytest.fail("it began to measure")

    monkeypatch.setattr(suites_training, "allocator_peaks", lambda *a: [])
    for module, name in (
        *((suites_training, "race"), (suites_epochs, "measure")),
        *((suites_kernels.timing, "copy_bandwidth"), (suites_pipeline, "_measure")),
    ):
        monkeypatch.setattr(module, name, measured)
    with pytest.raises(UserError, match=message):
        benchmark.benchmark(benchmark.BenchmarkConfig(suite, out=str(tmp_path), **options))


def test_benchmark_keeps_what_it_has_measured(tmp_path, monkeypatch):
    def measure(one):
        if one.batch_size == 8:
            raise KeyboardInterrupt
        return {"rule": one.rule, "seconds": 1.0}

    monkeypatch.setattr(suites_epochs, "measure", measure)
    config = benchmark.BenchmarkConfig(
        suite="epochs", rules=["lls"], batch_sizes=[4, 8], dataset="digits", out=str(tmp_path)
    )
    with pytest.raises(KeyboardInterrupt):
        benchmark.benchmark(config)
    rows = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    assert [row["rule"] for row in rows] == ["bp", "lls"]


def test_each_rule_is_given_what_it_has_a_use_for():
    common = TrainConfig(remat=4, kernels="xla", temperature=0.3, feedback_sign=True)
    own_bp = "lls_jax.rules:Backpropagation"
    names = ["bp", "lls", "predsim", "dfa", own_bp, "bp"]
    made = several_rules.of_rules(common, names, [1, 2])
    shown = [(one.rule, one.reach, one.remat, one.kernels, one.temperature) for one in made]
    assert shown == [
        ("bp", 1, None, "auto", None),
        *(("lls", reach, 4, "xla", 0.3) for reach in (1, 2)),
        *(("predsim", reach, None, "auto", None) for reach in (1, 2)),
        ("dfa", 1, None, "auto", None),
        (own_bp, 1, None, "auto", None),
    ]
    assert [one.rule for one in made if one.feedback_sign] == ["dfa"]
    for one in made:
        setup.check_task(one)


def test_benchmark_of_kernels_has_layers_of_some_models(tmp_path):
    config = benchmark.BenchmarkConfig(
        suite="kernels", models=["small_conv", "vgg8b"], cpu=True, out=str(tmp_path)
    )
    with pytest.raises(UserError, match=r"no layers of model 'vgg8b'; .* small_conv, vgg8"):
        benchmark.benchmark(config)


def test_benchmark_of_kernels_names_what_it_measured(tmp_path, capsys, few_steps, monkeypatch):
    # Half a gigabyte, several times.
    monkeypatch.setattr(suites_kernels.timing, "copy_bandwidth", lambda: 1e9)
    config = benchmark.BenchmarkConfig(
        suite="kernels", rules=["lls"], models=["small_conv"], batch_sizes=[2],
        turns=1, cpu=True, out=str(tmp_path),
    )  # fmt: skip
    assert benchmark.benchmark(config) == 0
    report = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    assert report["copy_bytes_per_second"] == 1e9
    assert report["layers_not_measured"] == 0
    assert {row["rule"] for row in report["layers"]} == {"lls", "lls_m", "lls_mxm"}
    # Three of its four layers have 512 latents.
    assert len(report["layers"]) == 2 * 3
    for row in report["layers"]:
        assert row["implementation"] == "xla"
        assert row["speed_over_xla"] == 1.0
    assert [row["rule"] for row in report["steps"]] == ["lls", "bp"]
    printed = capsys.readouterr().out
    assert "left out: implementation 'pallas'" in printed
    assert jax.devices()[0].device_kind in printed


def test_the_papers_batch_runs_resumes_and_tells_what_is_missing(tmp_path, capsys, monkeypatch):
    entries = [
        paper.Entry("digits", "small_conv", "lls", "square", 100, "none"),
        paper.Entry("digits", "small_conv", "bp", "square", 100, "none"),
        paper.Entry("image_folder", "small_conv", "lls", "square", 100, "none"),
    ]
    monkeypatch.setitem(paper.TABLES, "2", lambda: iter(entries))
    config = paper.PaperConfig(
        table="2", workdir=str(tmp_path), epochs=1, seeds=[0, 1], train_examples=256,
        eval_examples=40, data_dir=str(tmp_path), progress=False,
    )  # fmt: skip
    assert paper.paper(dataclasses.replace(config, dry_run=True)) == 0
    assert "seed 0 (0 epochs), seed 1 (0 epochs)" in capsys.readouterr().out
    assert paper.paper(dataclasses.replace(config, only=["small_conv-lls"])) == 0
    assert "left out: data set 'image_folder'" in capsys.readouterr().err
    assert paper.paper(config) == 0
    printed = capsys.readouterr().out
    assert "--- digits-small_conv-lls-square" not in printed
    assert "--- digits-small_conv-bp, seed 1" in printed
    table = json.loads((tmp_path / "table-2.json").read_text())
    assert [row["runs"] for row in table] == [2, 2, 0]
    finals = [
        folders.read_metrics(tmp_path / f"digits-small_conv-bp-s{seed}")[-1]["test_accuracy"]
        for seed in (0, 1)
    ]
    assert table[1]["accuracy"] == pytest.approx(np.mean(finals))
    assert table[1]["deviation"] == pytest.approx(np.std(finals, ddof=1))
    assert table[2]["missing"] == "seed 0 (0 epochs), seed 1 (0 epochs)"
    with pytest.raises(UserError, match="no experiment of table 2"):
        paper.paper(dataclasses.replace(config, only=["vgg9"]))


def test_the_papers_table_takes_no_other_runs_accuracy(tmp_path, capsys, monkeypatch):
    entry = paper.Entry("digits", "small_conv", "lls", "square", 100, "none")
    monkeypatch.setitem(paper.TABLES, "2", lambda: iter([entry]))

    def fake(config):
        folder = pathlib.Path(config.workdir)
        folder.mkdir(parents=True)
        folders.write_settings(folder, run_config.ConfigSettings(config))
        for epoch in (1, 2):
            folders.append_metrics(folder, {"epoch": epoch, "test_accuracy": 50.0 + epoch})
        return 0

    monkeypatch.setattr(train, "train_and_evaluate", fake)
    config = paper.PaperConfig(
        table="2", workdir=str(tmp_path), epochs=2, train_examples=128, data_dir=str(tmp_path)
    )
    assert paper.paper(config) == 0
    written = (tmp_path / "table-2.json").read_text()
    assert json.loads(written)[0]["accuracy"] == 52.0
    capsys.readouterr()
    # A dry run shows, and writes nothing.
    assert paper.paper(dataclasses.replace(config, epochs=3, dry_run=True)) == 0
    assert "seed 0 (2 epochs)" in capsys.readouterr().out
    assert (tmp_path / "table-2.json").read_text() == written
    with pytest.raises(UserError, match="--train-examples 128 there, None here"):
        paper.paper(dataclasses.replace(config, train_examples=None))
    assert (tmp_path / "table-2.json").read_text() == written
    # The first epoch of two is that of a run of one.
    assert paper.paper(dataclasses.replace(config, epochs=1)) == 0
    assert json.loads((tmp_path / "table-2.json").read_text())[0]["accuracy"] == 51.0


def test_a_run_that_diverges_is_recorded_and_the_papers_batch_goes_on(
    tmp_path, capsys, monkeypatch
):
    entries = [
        paper.Entry("digits", "small_conv", rule, "square", 1, "none") for rule in ("lls", "bp")
    ]
    monkeypatch.setitem(paper.TABLES, "2", lambda: iter(entries))
    ran = []

    def fake(config):
        ran.append(config.rule)
        folder = pathlib.Path(config.workdir)
        folder.mkdir(parents=True)
        if config.rule == "lls":
            raise DivergedError("the loss of local layer L2 is not finite by step 7")
        folders.append_metrics(folder, {"epoch": 1, "test_accuracy": 50.0})
        return 0

    monkeypatch.setattr(train, "train_and_evaluate", fake)
    config = paper.PaperConfig(table="2", workdir=str(tmp_path), progress=False)
    for _ in range(2):  # The second time there is nothing left to run.
        assert paper.paper(config) == 0
        assert ran == ["lls", "bp"]
        table = json.loads((tmp_path / "table-2.json").read_text())
        assert table[0]["missing"] == "seed 0 (0 epochs, diverged)"
        assert (table[0]["accuracy"], table[1]["accuracy"]) == (None, 50.0)
    assert "diverged: the loss of local layer L2" in capsys.readouterr().err


def test_the_papers_table_has_a_waveform_where_there_is_one(tmp_path):
    config = paper.PaperConfig("2", str(tmp_path))
    rows = paper.rows(config, list(paper.TABLES["2"]()))
    shown = {row["rule"]: row["waveform"] for row in rows}
    assert shown == {"lls": "square", "bp": None, "dfa": None}


def test_the_papers_tables_name_what_exists():
    for table, make in paper.TABLES.items():
        entries = list(make())
        assert len({entry.name for entry in entries}) == len(entries)
        for entry in entries:
            config = paper.train_config(paper.PaperConfig(table, "x"), entry, 0)
            assert config.epochs in (100, 300)
            setup.check_task(config)
            assert entry.rule in rules.NAMES
            assert entry.model in models.NAMES
            assert entry.augmentation in augment.AUGMENTATIONS


# --- mistakes ----------------------------------------------------------------------------------


def command(monkeypatch, capsys, main, *arguments):
    """Run a command in this process: (exit status, what it wrote to standard error)."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    # Set, it keeps the command from starting this process again.
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr().err


def test_commands_keep_what_jax_compiles(monkeypatch, tmp_path):
    names = ("DIR", "MAX_SIZE")

    def kept():
        startup.keep_compiled()
        return [os.environ.get(f"JAX_COMPILATION_CACHE_{name}") for name in names]

    def forget():
        for name in names:
            # Set first, so that what the command sets is taken back too when the test ends.
            monkeypatch.setenv(f"JAX_COMPILATION_CACHE_{name}", "")
            monkeypatch.delenv(f"JAX_COMPILATION_CACHE_{name}")

    for name in ("MIN_COMPILE_TIME_SECS", "MIN_ENTRY_SIZE_BYTES"):
        monkeypatch.setenv(f"JAX_PERSISTENT_CACHE_{name}", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    folder, size = kept()
    assert pathlib.Path(folder).is_relative_to(tmp_path / "cache" / "lls_jax")
    assert pathlib.Path(folder).is_dir() and int(size) == 2**30
    forget()
    # A program that was compiled for one CPU is slow on more.
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {7}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    of_one = kept()[0]
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {6, 7})
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    forget()
    assert kept()[0] != of_one
    forget()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    assert kept() == ["elsewhere", None]
    forget()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert kept() == [None, None]


def run_digits():
    command_line.train_command("digits", "")


def run_cifar10():
    command_line.train_command("cifar10", "")


def run_evaluate():
    config = command_line.parse(evaluate.EvaluateConfig, "evaluate", "")
    command_line.run(lambda: evaluate.evaluate(config))


def run_compare():
    config = command_line.parse(compare.CompareConfig, "compare", "")
    command_line.run(lambda: compare.compare(config))


def run_benchmark():
    config = command_line.parse(benchmark.BenchmarkConfig, "benchmark", "")
    command_line.run(lambda: benchmark.benchmark(config))


def run_accounting():
    config = command_line.parse(accounting.AccountingConfig, "accounting", "")
    command_line.run(lambda: accounting.accounting(config))


def run_paper():
    config = command_line.parse(paper.PaperConfig, "paper", "")
    command_line.run(lambda: paper.paper(config))


def run_board():
    config = command_line.parse(BoardConfig, "board", "")
    command_line.run(lambda: board(config))


def run_export():
    config = command_line.parse(export_lls_dnn.ExportConfig, "export_lls_dnn", "")
    command_line.run(lambda: export_lls_dnn.export_lls_dnn(config))


def run_prepare():
    config = command_line.parse(prepare_data.PrepareConfig, "prepare_data", "")
    command_line.run(lambda: prepare_data.prepare_data(config))


def run_import():
    config = command_line.parse(import_lls_dnn.ImportConfig, "import_lls_dnn", "")
    command_line.run(lambda: import_lls_dnn.import_lls_dnn(config))


@pytest.mark.parametrize(
    ("main", "arguments", "parts"),
    [
        (run_import, "no_such.tar --out x --rule lls", ["no_such.tar", "does not exist"]),
        (run_import, "pyproject.toml --out x --rule lls", ["pyproject.toml", "not a checkpoint"]),
        (run_digits, "--rule lls_mxn", ["'lls_mxn'", "lls, lls_m", "Did you mean"]),
        (run_digits, "--model vgg9", ["'vgg9'", "small_conv"]),
        (run_digits, "--optimizer lion", ["'lion'", "schedule_free_adamw"]),
        (run_digits, "--schedule falling", ["'falling'", "multistep"]),
        (run_digits, "--waveform saw", ["'saw'", "square"]),
        (run_digits, "--augmentation mixup", ["'mixup'", "flip"]),
        (run_digits, "--precision float16", ["'float16'", "bfloat16"]),
        (run_digits, "--kernels cuda", ["'cuda'", "auto, xla, split, pallas, triton"]),
        (run_digits, "--kernels pallas", ["'pallas'", "needs an NVIDIA GPU", "use 'xla'"]),
        (run_benchmark, "--suite kernels", ["is a CPU", "--cpu"]),
        (run_benchmark, "--suite kernel", ["'kernel'", "training, epochs, kernels, pipeline"]),
        (run_benchmark, "--suite pipeline", ["needs several devices", "device_count=2"]),
        (run_benchmark, "--precisions float16", ["'float16'", "bfloat16"]),
        (run_benchmark, "--suite epochs --epochs 1", ["--epochs is 1", "at least 2"]),
        (run_benchmark, "--batch-sizes 0", ["--batch-sizes is 0"]),
        (run_benchmark, "--reach 2 0", ["--reach is 0", "at least 1"]),
        (run_benchmark, "--reach", ["--reach is empty"]),
        (run_benchmark, "--reach 2 1,2", ["has 2 numbers (1, 2)", "give 5 numbers"]),
        (run_benchmark, "--rules bp --groups 2,2", ["--groups 2,2 is of no use to any"]),
        (run_accounting, "--groups two", ["--groups is 'two'"]),
        (run_accounting, "--reach 1,2", ["model 'small_conv' has 4 blocks and the classifier"]),
        (run_benchmark, "--suite kernels --reach 2", ["training, epochs, pipeline, not kernels"]),
        (run_benchmark, "--against torch --reach 2", ["--reach 2 does not go", "races 1"]),
        (run_digits, "--loop while", ["'while'", "auto, dispatch, scan"]),
        (run_digits, "--loop scan --data-on-device no", ["--loop scan needs", "--loop dispatch"]),
        (run_digits, "--pipeline 2", ["--pipeline is 2", "this machine has 1 cpu"]),
        (run_digits, "--pipeline 1 --data-parallel 1", ["do not go together"]),
        (run_digits, "--pipeline 1 --rule bp", ["'bp' has no local losses"]),
        (run_digits, "--data-parallel 2 --remat 4", ["--remat 4 does not go"]),
        (run_digits, "--reach 0", ["--reach is 0", "at least 1"]),
        (run_digits, "--reach 1,two", ["--reach is 1,two", "like 1,2,1,2"]),
        (run_digits, "--reach 1,2,1", ["`reach` has 3 numbers", "give 5 numbers, or one"]),
        (run_digits, "--reach 2 --rule bp", ["`reach` is 2, but rule 'bp' has no local losses"]),
        (run_digits, "--measure norm", ["--measure has 'norm'", "alignment, norms, probes, heads"]),
        (run_digits, "--measure-every 2", ["--measure-every 2 is given without --measure"]),
        (run_digits, "--measure norms --measure-every 0", ["--measure-every is 0", "at least 1"]),
        (run_digits, "--slice 4 --rule bp", ["--slice 4 is of no use to --rule bp"]),
        (run_digits, "--reach 2 --slice 4 --remat 2", ["--slice 4 does not go with --remat 2"]),
        (run_digits, "--reach 2 --slice 4 --data-parallel 2", ["not go with --data-parallel"]),
        (run_digits, "--remat -1", ["--remat is -1", "at least 0"]),
        (run_digits, "--remat 8 --rule bp", ["--remat 8 is of no use to --rule bp"]),
        (run_digits, "--remat 8 --rule predsim", ["no use to --rule predsim with --model small_"]),
        (
            run_digits,
            "--remat 8 --model mobilenet_v1 --groups 2,12",
            ["--groups 2,12: it is for", "groups of convolution and dense blocks alone"],
        ),
        (run_digits, "--slice 8 --model resnet32", ["--rule lls_mxm with --model resnet32"]),
        (run_digits, "--seed 4294967296", ["--seed is 4294967296", "less than 4294967296"]),
        (run_paper, "--table 2 --workdir x --seeds 4294967297", ["--seeds is 4294967297"]),
        (run_board, "--workdir x --seeds 0 4294967297", ["--seeds is 4294967297"]),
        (run_board, "--workdir {tmp} --epochs 1 --options='", ["No closing quotation", "quotes"]),
        (run_benchmark, "--seed 9223372036854775808", ["--seed is 9223372036854775808"]),
        (run_benchmark, "--rules foo --turns 1 --out {tmp}", ["unknown rule 'foo'"]),
        (
            run_benchmark,
            "--rules lls --reach 2 --slice 1 --remat 1 --out {tmp}",
            ["--slice 1 does not go with --remat 1"],
        ),
        (run_export, "--workdir x --checkpoint foo", ["'foo'", "best, last or a step"]),
        (run_digits, "--model .:b", ["model '.:b'", "package.module:function"]),
        (run_digits, "--model ..x:b", ["model '..x:b'", "package.module:function"]),
        (run_digits, "--stages 2,3", ["--stages is given without --pipeline"]),
        (run_digits, "--pipeline 1 --stages 4", ["together 5 units"]),
        (run_digits, "--groups 2,x", ["'2,x'", "like 2,2"]),
        (run_digits, "--groups 3", ["add up to 4, or to 5"]),
        (
            run_digits,
            "--optimizer schedule_free_sgd --momentum 0",
            ["--momentum is 0.0", "positive"],
        ),
        (run_digits, "--rule deeper_forward --width 0.2", ["no group for each of 10 classes"]),
        (
            run_digits,
            "--train-examples 5000 --validation-examples 100",
            ["--train-examples is 5000", "1337 are left"],
        ),
        (run_digits, "--rule lls,bp", ["'bp' has no local loss"]),
        (run_digits, "--rule lls,lls_m", ["2 rules, one a block, for 4 blocks"]),
        (run_digits, "--rule no_such.module:rule", ["no_such.module", "cannot be imported"]),
        (run_digits, "--model vgg11", ["8x8 pixels are too small", "16x16"]),
        (run_digits, "--data-on-device maybe", ["'maybe'", "auto, yes, no"]),
        (run_digits, "--patience --epochs 3", ["--patience", "expected one argument"]),
        (run_digits, "--workdir", ["--workdir", "expected one argument"]),
        (run_digits, "--data-dir= --epochs 3", ["--data-dir is empty", "leave it out"]),
        (run_evaluate, "--workdir=", ["--workdir is empty", "leave it out"]),
        (run_digits, "--no-progress false", ["--no-progress=False", "--help"]),
        (run_evaluate, "--workdir {tmp} --no-json", ["{tmp}", "no config.json"]),
        (run_export, "--workdir {tmp} --data-dir {tmp}", ["{tmp}", "no config.json"]),
        (run_digits, "--weight-decay inf", ["--weight-decay is inf", "finite"]),
        (run_digits, "--weight-decay nan", ["--weight-decay is nan", "finite"]),
        (run_digits, "--temperature inf", ["--temperature is inf", "finite"]),
        (run_digits, "--log wandb,wandb", ["--log is 'wandb,wandb'", "once"]),
        (run_paper, "--table 2 --workdir x --train-examples 0", ["--train-examples is 0"]),
        (run_paper, "--table 2 --workdir x --eval-examples -3", ["--eval-examples is -3"]),
        (run_benchmark, "--suite epochs --turns 3", ["--turns is of", "pipeline, not epochs"]),
        (run_benchmark, "--suite kernels --kernels xla", ["--kernels is of", "not kernels"]),
        (run_benchmark, "--suite kernels --remat 2", ["--remat is of", "not kernels"]),
        (run_benchmark, "--suite kernels --slice 2", ["--slice is of", "not kernels"]),
        (run_benchmark, "--dataset digits", ["--dataset is of --suite epochs, not training"]),
        (run_benchmark, "--data-dir x", ["--data-dir is of --suite epochs, not training"]),
        (run_benchmark, "--epochs 3", ["--epochs is of --suite epochs, not training"]),
        (run_benchmark, "--cpu", ["--cpu is of --suite kernels, not training"]),
        (run_benchmark, "--suite pipeline --rules bp", ["nothing to measure of --rules bp", "lls"]),
        (run_paper, "--table 4 --workdir x", ["--table is 4", "1, 2, 3, rules"]),
        (run_prepare, "tiny_imagenet", ["cannot be downloaded by itself", "--archive"]),
        (run_digits, "--lerning-rate 1", ["--lerning-rate", "--help"]),
        (run_digits, "--epoch 1", ["--epoch", "--help"]),
        (run_digits, "--epochs many", ["--epochs", "'many'"]),
        (run_digits, "--epochs 0", ["--epochs is 0", "at least 1"]),
        (run_digits, "--learning-rate nan", ["--learning-rate is nan", "positive"]),
        (run_digits, "--batch-size 1438", ["--batch-size is 1438", "1437", "smaller"]),
        (run_digits, "--train-examples 5000", ["5000", "1437"]),
        (run_digits, "--validation-examples 1438", ["--validation-examples is 1438", "1437"]),
        (run_digits, "--temperature 0", ["temperature", "0.0", "positive"]),
        (run_digits, "--workdir pyproject.toml/run", ["pyproject.toml/run", "--workdir"]),
        (
            run_cifar10,
            "--data-dir {tmp}",
            ["'cifar10'", "prepare_data cifar10", "--archive", "experiments.digits"],
        ),
        (run_evaluate, "--workdir {tmp}", ["{tmp}", "no config.json", "--workdir"]),
        (run_evaluate, "--workdir x --checkpoint first", ["'first'", "best, last or a step"]),
        (run_evaluate, "", ["--workdir"]),
        (run_compare, "{tmp}", ["{tmp}", "no config.json"]),
        (run_prepare, "imagenet", ["'imagenet'", "cifar10"]),
        (run_prepare, "cifar10 --archive {tmp}/none", ["{tmp}/none", "does not exist"]),
        (run_prepare, "digits", ["embedded", "experiments.digits"]),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path, monkeypatch, capsys, main, arguments, parts):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.chdir(ROOT)
    words = arguments.format(tmp=tmp_path).split()
    takes_folder = main in (run_digits, run_cifar10) and "--workdir" not in words
    words += ["--workdir", str(tmp_path / "run")] if takes_folder else []
    status, error = command(monkeypatch, capsys, main, *words)
    assert status == 2
    # That a download was begun is no mistake.
    error = "".join(line for line in error.splitlines(True) if not line.startswith("note: "))
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    for part in parts:
        assert part.format(tmp=tmp_path) in error
    # It binds nothing: the corrected command may use the same folder.
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("coordinator", "process", "message"),
    [("host:70000", 0, "'host:70000'; expected"), ("localhost:7000", 5, "is 5; expected 0 to 1")],
)
def test_processes_that_cannot_connect_are_a_mistake(tmp_path, coordinator, process, message):
    own = tiny(tmp_path, coordinator=coordinator, num_processes=2, process_id=process)
    with pytest.raises(UserError, match=message):
        train.train(own)


def test_a_run_lends_its_options_to_those_that_have_a_use_for_them(tmp_path):
    lent = tiny(tmp_path, temperature=0.3, reach=2, remat=8)
    folders.write_settings(tmp_path, run_config.ConfigSettings(lent))

    def begun(*typed):
        return command_line.parse_training(None, "", ["--set-from", str(tmp_path), *typed])

    assert begun() == dataclasses.replace(lent, workdir=None)
    assert begun("--rule", "lls_m").temperature == 0.3
    bp = begun("--rule", "bp")
    assert (bp.temperature, bp.reach, bp.remat, bp.batch_size) == (None, 1, None, 16)
    setup.check_task(bp)
    # What is typed is not taken back.
    with pytest.raises(UserError, match=r"--temperature 0.1 is of no use to --rule bp"):
        setup.check_task(begun("--rule", "bp", "--temperature", "0.1"))
    with pytest.raises(UserError, match=r"no use to --rule mono_forward.* --set-from brings it"):
        setup.check_task(begun("--rule", "mono_forward"))


def test_what_is_said_of_a_download_is_no_answer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_sets.prepare, "prepare", lambda *a, **k: None)
    data_sets.download(TrainConfig(data_dir=str(tmp_path)))
    said = capsys.readouterr()
    assert said.out == "" and "'cifar10' is not in" in said.err


def test_a_full_disk_is_one_clear_line_and_keeps_what_was_saved(tmp_path, monkeypatch, capsys):
    arguments = [
        *("--epochs", "2", "--train-examples", "64", "--eval-examples", "40"),
        *("--batch-size", "16", "--workdir", str(tmp_path)),
    ]
    usage, count = shutil.disk_usage, iter(range(9))

    def full(path):
        return usage(path)._replace(**({"free": 2**20} if next(count) == 1 else {}))

    monkeypatch.setattr(shutil, "disk_usage", full)
    status, error = command(monkeypatch, capsys, run_digits, *arguments)
    assert status == 2
    assert error == (
        f"error: the disk is full at {tmp_path}/checkpoints: make room, or choose another folder, "
        "and run the same command again; what was saved before is whole.\n"
    )
    monkeypatch.setattr(shutil, "disk_usage", usage)
    status, _ = command(monkeypatch, capsys, run_digits, *arguments)
    assert status == 0
    assert [record["epoch"] for record in folders.read_metrics(tmp_path)] == [1, 2]


COMMANDS = (
    *("cifar10", "cifar100", "fashion_mnist", "mnist", "digits", "imagenette", "tiny_imagenet"),
    *("visual_wake_words", "image_folder", "prepare_data", "evaluate", "compare"),
    *("import_lls_dnn", "export_lls_dnn", "accounting", "paper", "run"),
    *("board", "report", "export", "benchmark"),
)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_answers_without_starting_jax(name):
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['{name}', '--help']\n"
        f"try: runpy.run_module('experiments.{name}', run_name='__main__')\n"
        "finally: assert not {'jax', 'matplotlib', 'tensorflow_datasets'} & set(sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert f"python -m experiments.{name}" in ended.stdout
    options = ended.stdout.split("settings:")[1]
    lines = [line for line in options.splitlines() if line.strip().startswith("--")]
    assert lines
    assert "(default: None)" not in options


@pytest.mark.parametrize(
    ("speak", "status"),
    [
        # A command that answers has nothing more to do; a run goes on.
        ("print('größe ±', flush=True)", 141),
        ("print('größe ±')", 141),
        ("console.say('größe ±', flush=True); console.say('more', flush=True)", 0),
    ],
)
def test_a_command_speaks_to_any_terminal_and_to_nobody(tmp_path, speak, status):
    script = (
        "from experiments import command_line, console\n"
        f"def command():\n    {speak}\n    return 0\n"
        "command_line.run(command)\n"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    start = functools.partial(
        subprocess.run, [sys.executable, "-c", script], stderr=subprocess.PIPE, env=environment
    )
    read = start(stdout=subprocess.PIPE)
    assert (read.returncode, read.stderr) == (0, b"")
    assert read.stdout.startswith(b"gr??e ?")
    reader, writer = os.pipe()
    os.close(reader)
    unread = start(stdout=writer)
    os.close(writer)
    assert (unread.returncode, unread.stderr) == (status, b"")


@pytest.mark.parametrize("batch_size", [7, 40, 100])
def test_judging_in_one_launch_is_judging_batch_by_batch(batch_size):
    spec = data.get_spec("digits")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, *spec.image_shape), np.uint8)
    split = batches.to_device(data.Split(images, rng.integers(0, 10, 40).astype(np.int32)))
    model = models.make("small_conv", num_classes=10)
    params, batch_stats = model.init(
        rules.make("lls", num_classes=10), jax.random.key(0), jnp.zeros((1, *spec.input_shape))
    )
    variables = {"params": params, "batch_stats": batch_stats}
    one, several = (
        evaluate_weights(model, variables, spec, split, batch_size, launch)
        for launch in (True, False)
    )
    np.testing.assert_array_equal(one.confusion, several.confusion)
    assert one.confusion.sum() == 40 and one.accuracy == several.accuracy
    assert one.loss == pytest.approx(several.loss, rel=1e-5)
    logits, _ = model.apply(params, batch_stats, batches.normalize(spec, split.images))
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, split.labels).mean()
    assert one.loss == pytest.approx(float(expected), rel=1e-5)
