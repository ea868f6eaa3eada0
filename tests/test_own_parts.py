"""A user's own parts, and options from files and other runs: the page, and what is refused."""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from experiments import (
    command_line,
    compare,
    evaluate,
    own_sources,
    run_config,
    setup,
    several_rules,
    train,
)
from experiments.config import TrainConfig
from experiments.presets import PRESETS
from lls_jax import models, own_parts
from lls_jax.blocks import ConvBlock
from lls_jax.errors import StructureError, UserError
from lls_jax.models import BlockSpec, Network
from lls_jax.runs import folder as folders

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "own-parts.md"
FILES = dict(
    re.findall(r"<!-- file: (\S+) -->\n```(?:python|toml)\n(.*?)```", PAGE.read_text(), re.S)
)
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.S)
    for line in block.splitlines()
]  # fmt: skip
# So that each takes a second.
SMALL = ["--train-examples", "96", "--eval-examples", "32", "--batch-size", "32"]


def parse(command, *more):
    """A training command's config, of a line as the page has it."""
    module, *arguments = shlex.split(command.removeprefix("python -m experiments."))
    return command_line.parse_training(None if module == "run" else module, "", [*arguments, *more])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A folder with the page's files, in which its commands are typed."""
    folder = tmp_path_factory.mktemp("page")
    for name, text in FILES.items():
        assert len(text.splitlines()) < 30, name
        (folder / name).write_text(text)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 250)
    images = rng.integers(0, 60, (250, 8, 8, 3)) + 60 * labels[:, None, None, None]
    np.savez(folder / "fruit.npz", images=images.astype(np.uint8), labels=labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        # A user's program, under JAX's own defaults.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield folder


def test_every_command_of_the_page_is_a_run(page):
    """Those of the files train; what they say is what is made; then one that has all four."""
    configs = {}
    (page / "runs" / "first").mkdir(parents=True)
    first = dataclasses.replace(PRESETS["digits"], model="mynet:make", width=0.5, rule="bp")
    folders.write_settings(page / "runs" / "first", run_config.ConfigSettings(first))
    for command in COMMANDS:
        if "experiments.evaluate" not in command:
            configs[command] = parse(command)
            setup.check_task(configs[command])
    assert len(configs) == 10
    mine = next(config for config in configs.values() if config.workdir == "runs/mine")
    (second,) = (config for config in configs.values() if config.workdir == "runs/second")
    assert second == dataclasses.replace(first, rule="lls_mxm", reach=2, workdir="runs/second")
    (small,) = (config for config in configs.values() if config.measure)
    assert (small.model, small.width, small.batch_size, small.epochs, small.progress) == (
        *("mynet:make", 0.5, 64, 3), False,
    )  # fmt: skip
    model = models.make("mynet:make", num_classes=10, width=0.5)
    assert [spec.module.features for spec in model.specs] == [16, 32]
    # The printed command goes on with the run of a data set that no command is named after.
    assert parse(train.resume_command(mine)) == mine
    assert mine.run_folder() == "runs/mine"
    folder = dataclasses.replace(mine, workdir=None).run_folder()
    assert folder == "runs/mydata.load-mynet.make-myrule.NearestCentre-s0-myopt.make"
    other = TrainConfig(dataset="digits", rule="lls", seed=3, reach=2)
    assert other.run_folder() == "runs/digits-small_conv-lls-s3-reach2"
    grouped = dataclasses.replace(other, groups="1, 3")
    assert grouped.run_folder() == "runs/digits-small_conv-lls-s3-groups1+3-reach2"
    # Each command of the page has room for its run.
    assert len({config.run_folder() for config in configs.values()}) == len(configs)


def test_a_run_of_ones_own_parts_is_resumed_evaluated_and_compared(page, capsys):
    (command,) = (line for line in COMMANDS if "experiments.run" in line and "runs/mine" in line)
    config = parse(command, *SMALL, "--epochs", "2", "--no-progress")
    assert train.train_and_evaluate(config) == 0
    printed = capsys.readouterr()
    assert "NearestCentre on mynet:make, mydata:load: 96 training" in printed.out
    assert "warning" not in printed.err
    run = page / "runs" / "mine"
    assert {path.name: path.read_text() for path in (run / "source").iterdir()} == {
        name: FILES[name] for name in ("mynet.py", "mydata.py", "myopt.py", "myrule.py")
    }
    # A file that has changed is named, and its copy stays what it was.
    (page / "mynet.py").write_text(FILES["mynet.py"] + "# Changed.\n")
    longer = dataclasses.replace(config, epochs=3)
    assert train.train_and_evaluate(longer) == 0
    printed = capsys.readouterr()
    assert "resumed at step 6, epoch 2 done" in printed.out
    records = folders.read_metrics(run)
    assert (np.array(records[-1]["layer_loss"]) < records[0]["layer_loss"]).all()
    assert evaluate.evaluate(evaluate.EvaluateConfig(str(run), "last", json=True)) == 0
    evaluated = capsys.readouterr()
    report = json.loads(evaluated.out)
    assert report["accuracy"] == pytest.approx(records[-1]["test_accuracy"])
    assert list(report["accuracy_by_class"]) == ["apple", "banana", "cherry"]
    for error in (printed.err, evaluated.err):
        assert error.count("warning: ") == 1 and "mynet.py, of model 'mynet:make', has" in error
    assert (run / "source" / "mynet.py").read_text() == FILES["mynet.py"]
    assert compare.compare(compare.CompareConfig([str(run)], str(page / "out"))) == 0
    assert "| mydata:load | mynet:make | myrule:NearestCentre |" in capsys.readouterr().out
    # Another network is refused: nothing is lost.
    other = (BlockSpec(ConvBlock(8), pool_size=4, average_pool=1, flatten=True),)
    sys.modules["mynet"].make = lambda num_classes: Network("other", num_classes, other)
    with pytest.raises(UserError, match=r"what is to be restored has it .*--workdir"):
        train.train_and_evaluate(longer)
    with pytest.raises(StructureError, match="block_0/rule/centres"):
        evaluate.evaluate(evaluate.EvaluateConfig(str(run)))
    del sys.modules["mynet"]


def test_of_classes_that_are_not_known_yet_nothing_is_said():
    config = TrainConfig(
        dataset="test_own_parts:wrong_labels", model="test_own_parts:of_three_classes", rule="lls"
    )
    setup.check_task(config)
    assert several_rules.of_rules(config, ["lls", "bp"], [1, 2])


# --- What the functions are given, and what is no such function ----------------------------------


def needs_depth(num_classes, depth):
    return Network("needs", num_classes, ())


def takes_nothing():
    return Network("nothing", 10, ())


def of_two_classes():
    spec = BlockSpec(ConvBlock(8), pool_size=4, average_pool=1, flatten=True)
    return Network("two", 2, (spec,))


def of_three_classes():
    return dataclasses.replace(of_two_classes(), num_classes=3)


def a_list():
    return [1]


def two_lists():
    return ([1], [2])


def wrong_labels():
    images = np.zeros((4, 8, 8, 1), np.uint8)
    return (images, np.array([0, 1, 2, -1])), (images, np.array([0, 1, 2, 3]))


def of_two_shapes():
    labels = np.array([0, 1])
    return (np.zeros((2, 5)), labels), (np.zeros((2, 6)), labels)


def plain_sgd():
    return optax.sgd(0.1)


A_NUMBER = 3


def test_a_function_gets_what_it_asks_for():
    given = []

    def maker(a, *, b=2, **rest):
        given.append((a, b, rest))
        return 1

    part = own_parts.OwnPart(
        "rule", "x:maker", maker, own_parts.inspect.signature(maker).parameters
    )
    assert part.takes(["a", "c"]) == {"a", "c"}
    assert part.make({"a": 1, "c": 3}, int, "number") == 1
    assert given == [(1, 2, {"c": 3})]
    with pytest.raises(ValueError, match="needs `a`; it can be given c, by name"):
        part.make({"c": 3}, int, "number")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--model no_such_module:make", ["model 'no_such_module:make'", "PYTHONPATH"]),
        ("--model test_own_parts:nothing", ["test_own_parts has no 'nothing'"]),
        ("--model test_own_parts:", ["not of the form package.module:function"]),
        ("--model test_own_parts:A_NUMBER", ["is a int; expected a function"]),
        ("--model test_own_parts:a_list", ["is a list, which is no lls_jax.models.Network"]),
        ("--model test_own_parts:needs_depth", ["needs `depth`", "num_classes", "a default"]),
        ("--model test_own_parts:takes_nothing --width 2", ["`width` is 2.0", "no use for it"]),
        (
            "--model test_own_parts:takes_nothing --precision bfloat16",
            ["`dtype` is", "no use for it"],
        ),
        ("--model test_own_parts:of_two_classes", ["has 2 classes", "data set 'digits' has 10"]),
        ("--dataset test_own_parts:A_NUMBER", ["data set 'test_own_parts:A_NUMBER' is a int"]),
        ("--dataset test_own_parts:a_list", ["is a list, which is no lls_jax.data.Dataset"]),
        ("--dataset test_own_parts:two_lists", ["`train` is a list; expected (images, labels)"]),
        ("--dataset test_own_parts:wrong_labels", ["labels go from -1 to 3", "4 classes"]),
        ("--dataset test_own_parts:of_two_shapes", ["images of shape (5,)", "(6,)", "alike"]),
        ("--dataset digit", ["unknown data set 'digit'", "Did you mean 'digits'"]),
        ("--optimizer test_own_parts:a_list", ["is a list, which is no optax transformation"]),
        (
            "--optimizer test_own_parts:plain_sgd --weight-decay 0.1",
            ["`weight_decay` is 0.1; optimizer 'test_own_parts:plain_sgd' has no use for it"],
        ),
        (
            "--optimizer test_own_parts:plain_sgd --schedule cosine",
            ["`learning_rate` is 0.005", "no use for it"],
        ),
        ("--log tensorbord", ["--log has 'tensorbord'", "tensorboard, mlflow, wandb"]),
        ("--profile 0", ["--profile is 0", "at least 1"]),
        ("--config {tmp}/none.toml", ["{tmp}/none.toml cannot be read", "No such file"]),
        ("--config {tmp}/unknown.toml", ["'bach-size'", "the nearest is 'batch-size'"]),
        ("--config {tmp}/type.toml", ["epochs = 'many'", "a whole number"]),
        ("--config {tmp}/truth.toml", ["epochs = True", "a whole number"]),
        ("--config {tmp}/both.toml", ["reach = True", "a whole number or text"]),
        ("--config {tmp}/twice.toml", ["--batch-size twice"]),
        ("--config {tmp}/broken.toml", ["broken.toml is no TOML"]),
        ("--set-from {tmp}", ["{tmp} holds no run"]),
        ("--set-from {tmp} --preset airbench", ["--preset airbench does not go with --set-from"]),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path, monkeypatch, capsys, arguments, parts):
    for name, text in {
        "unknown": "bach-size = 3", "type": 'epochs = "many"', "truth": "epochs = true",
        "both": "reach = true",
        "twice": "batch-size = 1\nbatch_size = 2", "broken": "epochs =",
    }.items():  # fmt: skip
        (tmp_path / f"{name}.toml").write_text(text)
    words = arguments.format(tmp=tmp_path).split()
    monkeypatch.setattr(sys, "argv", ["command", *words, "--workdir", str(tmp_path / "run")])
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    with pytest.raises(SystemExit) as ended:
        command_line.train_command("digits", "")
    error = capsys.readouterr().err
    assert ended.value.code == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1
    for part in parts:
        assert part.format(tmp=tmp_path) in error
    assert not (tmp_path / "run").exists()


def test_a_file_may_be_a_pipe():
    """The process starts again, for its memory, and a pipe is read but once."""
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.digits", "--config", "/dev/stdin"],
        **{"input": "bach-size = 3", "env": environment, "cwd": pathlib.Path(__file__).parents[1]},
        **{"capture_output": True, "text": True, "check": False},
    )
    assert done.returncode == 2 and "'bach-size', which is no option" in done.stderr


def test_a_longer_run_is_another_where_its_updates_depend_on_its_length(tmp_path, monkeypatch):
    (tmp_path / "mytx.py").write_text(
        "import optax\n"
        "def plain(learning_rate): return optax.sgd(learning_rate)\n"
        "def spread(learning_rate, epochs): return optax.sgd(learning_rate / epochs)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for options, by in (
        ({}, None),
        ({"schedule": "cosine"}, "--schedule cosine"),
        ({"optimizer": "muon"}, None),
        ({"optimizer": "muon", "model": "airbench"}, "--optimizer muon"),
        ({"optimizer": "mytx:plain"}, None),
        ({"optimizer": "mytx:spread"}, "--optimizer mytx:spread"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        short = TrainConfig(epochs=2, workdir=str(folder), **options)
        folders.write_settings(folder, run_config.ConfigSettings(short))
        longer = run_config.ConfigSettings(dataclasses.replace(short, epochs=3))
        if by is None:
            longer.check(folder, folders.read_settings(folder))
        else:
            with pytest.raises(UserError, match=f"--epochs 2 there, 3 here; {by} depends on"):
                longer.check(folder, folders.read_settings(folder))


def test_the_nearer_stands_before_the_farther(tmp_path):
    """Data set's defaults < preset < file < command line; and of a run, run < file < line."""
    file = tmp_path / "options.toml"
    file.write_text(
        'preset = "airbench"\nepochs = 5\nmomentum = 0\nreach = "1,2,1,2"\ndata-dir = "~/data"\n'
    )
    config = command_line.parse_training(
        "digits", "", ["--config", str(file), "--epochs", "7", "--seed", "1"]
    )
    assert (config.epochs, config.momentum, config.model) == (7, 0.0, "airbench")
    assert config.reach == "1,2,1,2"
    # No shell sees a file, or what stands behind `=`.
    assert config.data_dir == os.path.expanduser("~/data")
    typed = parse("python -m experiments.digits --workdir=~/run")
    assert typed.workdir == os.path.expanduser("~/run")
    assert (config.batch_size, config.dataset, config.preset) == (2000, "digits", "airbench")
    other = dataclasses.replace(
        config, workdir="elsewhere", coordinator="here:1", num_processes=2, process_id=1
    )
    folders.write_settings(tmp_path, run_config.ConfigSettings(other))
    file.write_text("seed = 3\nmodel = 'vgg8'\n")
    options = ["--set-from", str(tmp_path), "--config", str(file), "--model", "small_conv"]
    expected = dataclasses.replace(config, seed=3, model="small_conv", workdir=None)
    assert command_line.parse_training(None, "", options) == expected
    # The command's own data set is on the command line.
    assert command_line.parse_training("cifar10", "", options).dataset == "cifar10"
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "format": 1}))
    with pytest.raises(UserError, match="earlier version"):
        run_config.begin_from(tmp_path)


def test_a_part_that_is_gone_is_no_change_of_a_source(tmp_path):
    """Weights are evaluated and exported where their optimizer's module is not."""
    config = TrainConfig(dataset="digits", optimizer="no_such_module:make")
    assert own_sources.changed(tmp_path, config) == []


def test_any_command_takes_any_data_set():
    assert command_line.parse_training("cifar10", "", ["--dataset", "digits"]) == PRESETS["digits"]
    assert command_line.parse_training(None, "", []) == TrainConfig()
    own = command_line.parse_training("digits", "", ["--dataset", "mine:load"])
    assert own == TrainConfig(dataset="mine:load", augmentation="none")
