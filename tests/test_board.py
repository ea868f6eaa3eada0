"""Rules side by side: killed, gone on with, added to; budgets, tests over seeds, what is shared."""

import dataclasses
import json
import math
import os
import pathlib
import shlex
import sys
import threading

import jax
import numpy as np
import optax
import pytest
from scipy import stats

from experiments import console, run_config, setup
from experiments.board import content, costs, outcome, paired, speed, summary
from experiments.board.command import _Maker, board
from experiments.board.config import BoardConfig
from experiments.board.rows import Row, train_config
from experiments.command_line import parse
from experiments.config import TrainConfig
from lls_jax import training
from lls_jax.errors import DivergedError, UserError
from lls_jax.runs import folder as folders

OPTIONS = "--train-examples 96 --batch-size 32 --eval-examples 40"


def config(folder, **options):
    return BoardConfig(workdir=str(folder), progress=False, turns=1, **options)


def table(folder):
    return json.loads((folder / "board.json").read_text())


def ends_at(accuracy):
    """A run that is over at once."""

    def train_run(one, row, steps):
        folder = pathlib.Path(one.workdir)
        folder.mkdir(parents=True)
        final = {"step": 3, "test": accuracy(row, one), "validation": None, "views": None}
        (folder / "final.json").write_text(json.dumps(final))
        return 0

    return train_run


def test_a_board_is_killed_goes_on_and_is_added_to(tmp_path, monkeypatch):
    begun, killed, real = [], [3], outcome.train_run

    def train_run(one, row, steps):
        begun.append((row.rule, one.seed))
        if len(begun) in killed:
            raise KeyboardInterrupt
        return real(one, row, steps)

    monkeypatch.setattr(outcome, "train_run", train_run)
    # The runs' own pictures are tested elsewhere.
    monkeypatch.setattr(console.plots, "draw_curves", lambda *a: None)
    folder = tmp_path / "board"
    new = config(
        folder, dataset="digits", rules=["lls", "bp"], reach=[1], seeds=[0, 1], epochs=1,
        options=OPTIONS,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        board(new)
    assert [row["missing"] for row in table(folder)["rows"]] == ["seed 1", "seed 1"]
    assert board(new) == 0
    # Seed by seed, and no run twice but the one that was killed.
    assert begun == [("lls", 0), ("bp", 0), ("lls", 1), ("lls", 1), ("bp", 1)]
    before = table(folder)["rows"]
    for row, name in zip(before, ("lls", "bp")):
        finals = [
            folders.read_metrics(folder / f"runs/small_conv-{name}-r1-1epochs-s{seed}")[-1]
            for seed in (0, 1)
        ]
        finals = [record["test_accuracy"] for record in finals]
        assert list(row["accuracies"].values()) == finals
        assert row["accuracy"] == pytest.approx(np.mean(finals))
        assert row["deviation"] == pytest.approx(np.std(finals, ddof=1))
        assert (row["missing"], row["n"]) == ("", 2)
        assert row["images_per_second"] > 0 and row["temporary_mb"] > 0
    assert before[1]["speed_over_bp"] == before[1]["macs_over_bp"] == 1 > before[0]["macs_over_bp"]

    (tmp_path / "mine.py").write_text(
        "from lls_jax import rules\n"
        "def cold(num_classes):\n"
        "    return rules.make('lls', num_classes=num_classes, temperature=0.1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(outcome, "train_run", ends_at(lambda row, one: 90.0 + one.seed))
    # Twice as fast as a bp that takes 4 s a step in this mood of the machine.
    raced = [
        {"all_step_ms": [ms] * 5, "temporary_mb": 1.0, "temporaries_over_bp": 0.5}
        for ms in (4000.0, 2000.0)
    ]
    monkeypatch.setattr(speed.training, "race", lambda *a, **k: raced)
    assert board(config(folder, rules=["mine:cold"])) == 0
    lls, bp, cold = table(folder)["rows"]
    assert [lls, bp] == before
    assert cold["accuracy"] == 90.5 and cold["extra_parameters"] == 0
    assert cold["against_bp"]["difference"] == pytest.approx(90.5 - bp["accuracy"])
    assert cold["speed_over_bp"] == 2 and cold["step_ms"] == pytest.approx(bp["step_ms"] / 2)
    page = (folder / "board.md").read_text()
    assert "| small_conv | 1 epoch | mine:cold | 1 | 2 | 90.50 ± 0.71 |" in page
    assert page.count("python -m experiments.board") == 1
    assert "--rules lls mine:cold bp --reach 1 --seeds 0 1 --epochs 1" in page
    assert (folder / "board.png").read_bytes().startswith(b"\x89PNG")
    # Nothing is left to do, for which nobody's rule is needed.
    (tmp_path / "mine.py").unlink()
    monkeypatch.delitem(sys.modules, "mine")
    assert board(config(folder)) == 0


def test_a_budget_of_seconds_ends_at_a_step_and_is_judged_there(tmp_path):
    folder = tmp_path / "board"
    row = Row("small_conv", "lls", 1, "seconds", 2.0)
    figures = {"model": "small_conv", "rule": "lls", "reach": 1, "step_ms": 399.0}
    recipe = content.recipe_of("digits", OPTIONS)
    made = content.Board("digits", recipe, (0,), (row,), {content.key_of(row): figures})
    folder.mkdir()
    (folder / "board.json").write_text(json.dumps(content.to_json(made, [row.values()])))
    own = config(folder)
    assert board(own) == 0
    run = row.folder(folder, 0)
    # Five steps of 399 ms, at three an epoch.
    (record,) = folders.read_metrics(run)
    first = outcome.read(run)
    assert (record["step"], first.step) == (3, 5)
    # From the checkpoint, without the step's state in memory.
    (run / "final.json").unlink()
    assert board(own) == 0
    assert outcome.read(run) == first
    assert table(folder)["rows"][0]["steps"] == {"0": 5}


def test_a_run_that_diverges_is_noted_and_bp_lends_its_runs(tmp_path, monkeypatch):
    begun = []

    def accuracy(row, one):
        begun.append(row.rule)
        if row.rule == "lls":
            raise DivergedError("the loss of local layer L2 is not finite by step 7")
        return 50.0

    monkeypatch.setattr(outcome, "train_run", ends_at(accuracy))
    own = config(
        tmp_path, dataset="digits", rules=["lls", "bp_checkpointed", "bp_accumulated", "bp"],
        reach=[1, 2], seeds=[0], epochs=1, measure_speed=False,
    )  # fmt: skip
    for _ in range(2):
        assert board(own) == 0
        assert begun == ["lls", "lls", "bp", "bp_accumulated"]
    rows = table(tmp_path)["rows"]
    assert [row["missing"] for row in rows] == ["seed 0 (diverged)"] * 2 + [""] * 3
    assert [row["accuracy"] for row in rows] == [None, None, 50.0, 50.0, 50.0]
    assert rows[2]["against_bp"]["note"] == "n too small"


def test_a_seed_is_the_same_weights_for_every_row_and_a_baseline_its_own_step(monkeypatch):
    def initial(rule):
        task = setup.make_task(TrainConfig(dataset="digits", rule=rule))
        image = setup.example_image(task.spec)
        return task, training.create_train_state(
            task.model, task.rule, optax.sgd(0.1), jax.random.key(3), image
        )

    (task, lls), (_, bp) = initial("local_classifier"), initial("bp")
    for name in (*task.model.block_names, "classifier"):
        ours, theirs = (s.params[name] if name == "classifier" else s.params[name]["block"]
                        for s in (lls, bp))  # fmt: skip
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    counted = costs.count(task, Row("small_conv", "local_classifier", 1, "epochs", 1))
    in_rules = [lls.params[name]["rule"] for name in task.model.block_names]
    assert counted.extra_parameters == sum(leaf.size for leaf in jax.tree.leaves(in_rules))

    made = {}
    monkeypatch.setitem(outcome.BASELINE_STEPS, "accumulated", lambda model, tx: made.get)
    run = setup.Run(task, None, None, None, None, None, False)
    row = Row("small_conv", "bp_accumulated", 1, "epochs", 1)
    assert outcome._with_step(row, run).execution.train_step == made.get
    assert outcome._with_step(dataclasses.replace(row, rule="bp"), run) is run
    own = train_config(TrainConfig(remat=8), row)
    # What saves a local rule's memory is of no use to bp.
    assert (own.rule, own.remat) == ("bp", None)
    assert train_config(TrainConfig(remat=8), dataclasses.replace(row, rule="lls")).remat == 8


def test_the_paired_test_is_the_one_of_the_books():
    rng = np.random.default_rng(0)
    for count in (2, 3, 6):
        ours, theirs = rng.normal(70, 1, (2, count))
        found = paired.compare(dict(enumerate(ours)), {**dict(enumerate(theirs)), 99: 0.0})
        differences = ours - theirs
        t = differences.mean() / (differences.std(ddof=1) / math.sqrt(count))
        assert found.n == count and found.difference == pytest.approx(differences.mean())
        assert found.p == pytest.approx(2 * stats.t.sf(abs(t), count - 1))
        assert found.p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
        if count == 2:  # Student's distribution is Cauchy's.
            assert found.p == pytest.approx(1 - 2 / math.pi * math.atan(abs(t)))
    assert paired.compare({0: 71.0}, {0: 70.0, 1: 2.0})[1:] == (1, None, "n too small")
    assert paired.compare({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0})[1:] == (2, None, "no spread")
    # An image of 360 better with each seed, to the last bit but one.
    right = np.array([354, 353, 349])
    better, plain = (dict(enumerate(100 * count / 360)) for count in (right + 1, right))
    assert paired.compare(better, plain)[1:] == (3, None, "no spread")
    assert paired.compare({0: 1.0}, {1: 1.0}) is None
    shown = summary._test(paired.compare({0: 71.0}, {0: 70.0})._asdict())
    assert shown == "+1.00 (n too small, n 1)"


def test_what_is_not_given_is_as_the_board_has_it_and_another_recipe_is_refused(tmp_path):
    def extend(stored=None, **options):
        return content.extend(config(tmp_path, **options), stored)

    with pytest.raises(UserError, match="--epochs N or --seconds S"):
        extend()
    made = extend(rules=["lls", "bp"], epochs=2, seeds=[4], options="--batch-size 64")
    assert [(row.rule, row.reach) for row in made.rows] == [("lls", 1), ("lls", 2), ("bp", 1)]
    more = extend(made, rules=["lls_m"], seeds=[5])
    assert more.rows == (*made.rows, *(Row("small_conv", "lls_m", r, "epochs", 2) for r in (1, 2)))
    assert more.seeds == (4, 5)
    longer = extend(made, seconds=60.0)
    assert [row.budget for row in longer.rows] == ["epochs"] * 3 + ["seconds"] * 3
    assert len(content.commands(longer, "x")) == 2
    # Commands make these rows and no others, though they are no product.
    ragged = extend(made, models=["vgg8"], rules=["lls"], reach=[1])
    ragged = extend(ragged, models=["vgg8"], rules=["bp"])
    ragged = extend(ragged, models=["small_conv"], rules=["lls"], reach=["1,2,1,1,1"])
    assert ragged.rows[-1].name == "small_conv-lls-r1+2+1+1+1-2epochs"
    # A number for each loss is of networks with as many losses.
    more = set(extend(ragged, rules=["lls_m"]).rows) - set(ragged.rows)
    assert {(row.model, row.reach) for row in more} == {
        ("small_conv", 1), ("small_conv", 2), ("small_conv", "1,2,1,1,1"), ("vgg8", 1), ("vgg8", 2),
    }  # fmt: skip
    again = None
    for command in content.commands(ragged, str(tmp_path)):
        arguments = shlex.split(command.removeprefix("python -m experiments.board"))
        again = content.extend(parse(BoardConfig, "board", "", arguments), again)
    assert set(again.rows) == set(ragged.rows) and len(ragged.rows) == 6
    for options, message in (
        ({"dataset": "digits"}, "a board of cifar10, not of digits"),
        ({"options": "--batch-size 32"}, "--batch-size 64 there, 32 here"),
        # What changes no training, but the board's columns.
        ({"options": "--batch-size 64 --remat 4"}, "--remat None there, 4 here"),
        ({"options": "--batch-size 64 --test-views flip"}, "--test-views none there, flip here"),
        ({"options": "--seed=3"}, "--options has --seed"),
        ({"options": "--no-progress"}, "--options has --no-progress"),
        ({"options": "--pipeline 2"}, "--options has --pipeline, which no run of a board can"),
        ({"options": "--pipeline 2 --stages=2,3"}, "--options has --pipeline"),
        ({"options": "--data-parallel 2"}, "--options has --data-parallel"),
        ({"options": "--coordinator auto"}, "--options has --coordinator"),
        ({"options": "--num-processes 2"}, "--options has --num-processes"),
        ({"options": "--process-id 0"}, "--options has --process-id"),
        ({"options": "--deterministic"}, "--options has --deterministic"),
        ({"options": "--batch-size '64"}, "No closing quotation"),
        ({"dataset": "cifar11"}, "of cifar10, not of cifar11"),
    ):
        with pytest.raises(UserError, match=message):
            extend(made, **options)
    with pytest.raises(UserError, match="unknown data set 'cifar11'"):
        extend(dataset="cifar11", epochs=1)
    assert content.recipe_of("mydata:load", "").dataset == "mydata:load"
    file = tmp_path / "options.toml"
    for written in (
        *("patience = 2", "pipeline = 2", "rule = 'lls'", "seed = 0", "epochs = 3", "reach = 2"),
        *("workdir = 'x'", "progress = false"),
    ):
        file.write_text(written)
        name = written.split()[0]
        with pytest.raises(UserError, match=f"--options has --(no-)?{name}, .* --config names"):
            content.recipe_of("digits", f"--config {file}")
    file.write_text("dataset = 'digits'\ndata-dir = 'there'")
    with pytest.raises(UserError, match=r"--dataset digits, and the board is of cifar10"):
        content.recipe_of("cifar10", f"--config {file}")
    assert content.recipe_of("digits", f"--config {file}").data_dir == "there"
    # Of a run what a board has several of does not count, and what it cannot have is refused.
    run = TrainConfig(dataset="digits", rule="lls", seed=4, epochs=3, reach=2, batch_size=64)
    folders.write_settings(tmp_path, run_config.ConfigSettings(run))
    begun = content.recipe_of("digits", f"--set-from {tmp_path}")
    assert (begun.batch_size, begun.seed, begun.epochs, begun.reach) == (64, 0, 30, 1)
    (tmp_path / "config.json").unlink()
    patient = dataclasses.replace(run, patience=2)
    folders.write_settings(tmp_path, run_config.ConfigSettings(patient))
    with pytest.raises(UserError, match="--patience 2 from a run, which no run of a board can"):
        content.recipe_of("digits", f"--set-from {tmp_path}")
    with pytest.raises(UserError, match="into 4 parts"):
        board(
            config(
                tmp_path, rules=["bp_accumulated"], epochs=1, dataset="digits",
                options="--batch-size 30",
            )
        )  # fmt: skip
    with pytest.raises(ValueError, match="--no-measure-speed"):
        config(tmp_path, seconds=1.0, measure_speed=False)


def test_bp_is_given_no_options_of_local_losses():
    recipe = content.recipe_of("digits", "--temperature 0.3 --kernels xla --remat 4")
    for rule, expected in (("lls", (0.3, "xla", 4.0)), ("bp", (None, "auto", None))):
        one = train_config(recipe, Row("small_conv", rule, 1, "epochs", 2))
        assert (one.temperature, one.kernels, one.remat) == expected
        setup.check_task(one)


def test_a_row_is_given_what_its_rule_has_a_use_for(tmp_path):
    own_bp = "lls_jax.rules:Backpropagation"
    new = config(
        tmp_path, dataset="digits", rules=["lls", "predsim", own_bp], epochs=1,
        options="--remat 4 --data-dir there",
    )  # fmt: skip
    made = content.extend(new, None)
    assert [(row.rule, row.reach) for row in made.rows] == [
        *(("lls", 1), ("lls", 2), ("predsim", 1), ("predsim", 2), (own_bp, 1)),
    ]
    runs = [train_config(made.recipe, row) for row in made.rows]
    assert [one.remat for one in runs] == [4, 4, None, None, None]
    for one in runs:
        setup.check_task(one)
    # Reaches of rows that could have another are those of a rule that is added.
    rows = tuple(row for row in made.rows if (row.rule, row.reach) != ("lls", 1))
    rows = tuple(row for row in rows if row.rule != "predsim")
    more = content.extend(config(tmp_path, rules=["lls_m"]), made._replace(rows=rows))
    assert [row.reach for row in more.rows if row.rule == "lls_m"] == [2]
    # Commands that make it begin with options that are of use to their own rows.
    again = None
    for command in content.commands(content.extend(new, None), str(tmp_path)):
        arguments = shlex.split(command.removeprefix("python -m experiments.board"))
        again = content.extend(parse(BoardConfig, "board", "", arguments), again)
    assert set(again.rows) == set(made.rows)
    # The folder of data is the recipe's where the board has none of its own.
    assert _Maker(new, tmp_path, made)._recipe.data_dir == "there"
    given = dataclasses.replace(new, data_dir="here")
    assert _Maker(given, tmp_path, made)._recipe.data_dir == "here"
    with pytest.raises(UserError, match="--remat 4 is of no use to any of --rules predsim"):
        content.extend(dataclasses.replace(new, rules=["predsim"]), None)
    with pytest.raises(UserError, match="--data-dir there there, elsewhere here"):
        content.extend(config(tmp_path, options="--remat 4 --data-dir elsewhere"), made)


def test_a_boards_options_may_come_through_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("batch-size = 32",))
    writer.start()
    assert content.recipe_of("digits", f"--config {tmp_path / 'pipe'}").batch_size == 32
    writer.join()


def test_a_board_keeps_the_options_of_a_file_that_changes(tmp_path):
    file = tmp_path / "options.toml"
    file.write_text("batch-size = 32\naugmentation = 'crop'")
    new = config(
        tmp_path, rules=["lls"], epochs=1, dataset="digits", options=f"--config {file}"
    )  # fmt: skip
    made = content.extend(new, None)
    text = folders.to_json(content.to_json(made, [row.values() for row in made.rows]))
    (tmp_path / "board.json").write_text(text)
    file.write_text("batch-size = 64\naugmentation = 'crop'")
    assert content.extend(config(tmp_path, rules=["lls_m"]), content.read(tmp_path)).recipe == (
        made.recipe
    )
    with pytest.raises(UserError, match="--batch-size 32 there, 64 here"):
        content.extend(new, content.read(tmp_path))
    # The commands of the page make this board, and no other.
    (command,) = content.commands(made, str(tmp_path))
    assert "'--options=--batch-size 32 --augmentation crop'" in command
    # A board of an earlier version has what was typed.
    earlier = {**json.loads(text), "options": "--batch-size 32 --augmentation crop"}
    del earlier["recipe"]
    (tmp_path / "board.json").write_text(json.dumps(earlier))
    assert content.read(tmp_path) == made
