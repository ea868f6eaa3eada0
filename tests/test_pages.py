"""The README and the pages of docs/: their code runs, and what they say of others is so."""

import dataclasses
import functools
import importlib.util
import pathlib
import re
import shlex
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import config_choices
from experiments.command_line import parse_training
from experiments.config import TrainConfig
from experiments.paper import TABLES, PaperConfig, train_config
from experiments.presets import PRESETS
from lls_jax import data, models, rules
from lls_jax.data.batches import AUGMENTATIONS

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
FENCE = re.compile(r"(<!-- on: machines -->\n)?```python[^\n]*\n(.*?)```", re.S)


def blocks(page, for_machines=False):
    """A page's code, but for files that it shows, which have tests of their own."""
    found = FENCE.findall(page.read_text())
    return [code for mark, code in found if bool(mark) == for_machines and "--8<--" not in code]


PAGES = [page for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))) if blocks(page)]


# Whose code needs each of a model's blocks; on the others a model has two, and half of the
# compilation, which is what these tests take their time for.
WHOLE = ("README", "models", "devices", "from-lls-dnn")
make = models.make


def half(name, **options):
    model = make(name, **options)
    return dataclasses.replace(model, specs=model.specs[-2:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_on_a_page_runs(page, tmp_path, monkeypatch):
    """From top to bottom in one namespace, which for the README has images, and else nothing."""
    monkeypatch.chdir(tmp_path)
    few = functools.partial(data.load, limit=320)
    monkeypatch.setattr(data, "load", few)
    if page.stem not in WHOLE:
        monkeypatch.setattr(models, "make", half)
    scope = {"__name__": page.stem}
    if page.stem == "README":
        for prefix, split in (("", "train"), ("test_", "test")):
            examples = few(data.get_spec("digits"), split, tmp_path)
            scope |= {f"{prefix}images": examples[0], f"{prefix}labels": examples[1]}
    # A user's program, under JAX's own defaults.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for number, code in enumerate(blocks(page)):
            exec(compile(code, f"{page.name}, block {number}", "exec"), scope)
    if "result" in scope:
        first, last = scope["result"].records[0], scope["result"].records[-1]
        assert np.isfinite(last["layer_loss"]).all()
        assert last is first or last["train_loss"] < first["train_loss"]
    if page.stem == "README":
        assert len(scope["result"].records) == 2 and "test_accuracy" in last
    if page.stem == "frameworks":
        step, x, labels = scope["train_step"], scope["x"], scope["labels"]
        layers, early = step(scope["layers"], x, labels)
        for _ in range(40):
            layers, late = step(layers, x, labels)
        assert late < early - 0.02


def test_the_code_for_several_machines_runs_on_one():
    """With one process in the place of two: it has to start before anything touches a device."""
    (code,) = blocks(DOCS / "devices.md", for_machines=True)
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        port = listening.getsockname()[1]
    one = code.replace("10.0.0.1:12345", f"localhost:{port}").replace("processes=2", "processes=1")
    assert one != code and "num_processes=1" in one
    # What the page takes as given, inside: a device may be touched only then.
    given = """
    from lls_jax import models, rules, training
    from lls_jax.blocks import DenseBlock
    from lls_jax.optimizers import schedule_free_adamw
    model = models.Network("dense", 10, (models.BlockSpec(DenseBlock(8), pool_size=8),))
    rule, tx = rules.make("lls", num_classes=10), schedule_free_adamw(5e-3)
    image, label = jax.numpy.ones((128, 16)), jax.numpy.arange(128) % 10
    state = training.create_train_state(model, rule, tx, jax.random.key(0), image)
    execution"""
    script = one.replace("\n    execution", given, 1) + "\n    print(metrics['layer_loss'].shape)\n"
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ended.stdout.strip() == "(1,)", ended.stderr


# --- Coming from LLS-DNN -------------------------------------------------------------------------


def mapped(command):
    """What the guide's tables make of a command of LLS-DNN: the data set, and options."""
    rows = re.findall(
        r"^\| `(--\S+) (\S+)` \| `([^`]+)` \|$", (DOCS / "from-lls-dnn.md").read_text(), re.M
    )
    table = {(option, value): ours for option, value, ours in rows}
    words, dataset, options = shlex.split(command)[2:], None, []
    for option, value in zip(words[::2], words[1::2]):
        if option == "--experiment-name":
            continue
        if (option, value) in table:
            ours = table[option, value].split()
        else:
            placeholder = next(v for o, v in table if o == option and v in ("N", "X", "PATH"))
            ours = [
                value if word == placeholder else word
                for word in table[option, placeholder].split()
            ]
        if option == "--dataset":
            dataset, *ours = ours
        options += ours
    return parse_training(dataset, "", options)


# Of the authors' script.sh. Its lines for CIFAR-10 differ in these only.
AUTHORS = (
    "python main.py --dataset {dataset} --model {model} --num-epochs {epochs} --lr 5e-3 "
    "--training-mode {mode} --batch-size 128 --test-batch-size 128 --optimizer AdamWSF "
    "{waveform} --experiment-name Table{table}"
)
BASIC, AUGMENTED = ("CIFAR10", "LLS_SmallConv", 100), ("CIFAR10AUG", "LLS_VGG8", 300)
LARGE = ("CIFAR10", "LLS_SmallConvL", 100)
DFA = ("CIFAR10", "DFA_SmallConvL", 100)
PUBLISHED = [
    *((1, *run, "LLS", w) for run in (BASIC, AUGMENTED) for w in ("cosine", "square")),
    *((1, *run, "LLS_Random", None) for run in (BASIC, AUGMENTED)),
    *((2, *LARGE, "LLS", "square"), (2, *LARGE, "BP", None), (2, *DFA, "DFA", None)),
    *((3, *AUGMENTED, mode, None) for mode in ("BP", "LocalLosses")),
    *((3, *AUGMENTED, mode, "square") for mode in ("LLS", "LLS_M", "LLS_MxM")),
]


def test_the_authors_cifar10_command_is_the_published_recipe_field_by_field():
    command = AUTHORS.format(
        **{"dataset": "CIFAR10", "model": "LLS_SmallConv", "epochs": 100, "mode": "LLS_MxM"},
        **{"waveform": "--waveform square --temperature 0.5 --momentum 0.9", "table": 3},
    )
    config = dataclasses.asdict(
        mapped(command + " --lr-scheduler ReduceLROnPlateau --label-smoothing 0.0 --dropout 0.0")
    )
    published = {
        **{"dataset": "cifar10", "model": "small_conv", "rule": "lls_mxm", "epochs": 100},
        **{"batch_size": 128, "eval_batch_size": 128, "learning_rate": 5e-3, "momentum": 0.9},
        **{"optimizer": "schedule_free_adamw", "weight_decay": 0.0, "schedule": "constant"},
        **{"waveform": "square", "temperature": 0.5, "label_smoothing": 0.0, "dropout": 0.0},
        **{"augmentation": "flip", "width": 1.0, "reach": 1, "precision": "float32"},
        **{"classifier_smoothing": 0.0, "warmup_epochs": 0, "test_views": "none", "seed": 0},
    }
    assert {name: config[name] for name in published} == published
    # Nothing else is asked for: each other field is nobody's choice, but a default.
    rest = dataclasses.asdict(TrainConfig())
    assert {n: v for n, v in config.items() if n not in published} == {
        n: v for n, v in rest.items() if n not in published
    }


def test_the_authors_published_cifar10_commands_are_the_papers_tables_here():
    ours = set()
    for table in "123":
        for entry in TABLES[table]():
            if entry.dataset == "cifar10":
                config = train_config(PaperConfig(table, "runs", progress=True), entry, seed=0)
                # How fast an evaluation is, and where a run lies, are no part of a recipe.
                ours.add((table, dataclasses.replace(config, eval_batch_size=128, workdir=None)))
    theirs = set()
    for table, dataset, model, epochs, mode, waveform in PUBLISHED:
        named = f"--waveform {waveform}" if waveform else ""
        command = AUTHORS.format(
            **{"dataset": dataset, "model": model, "epochs": epochs, "mode": mode},
            **{"waveform": named, "table": table},
        )
        theirs.add((str(table), mapped(command)))
    # Which waveform a random basis has makes no difference: it has none.
    assert theirs == ours


def test_the_page_says_the_same_twice():
    """The command at its top, in their words and in ours."""
    theirs, ours = re.findall(
        r"```sh\n(python [^`]*?)```", (DOCS / "from-lls-dnn.md").read_text().replace("\\\n", " ")
    )[:2]
    assert mapped(theirs) == parse_training("cifar10", "", shlex.split(ours)[3:])


# --- What is generated ---------------------------------------------------------------------------


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_commands_has_every_option_of_every_command():
    listing = load(DOCS / "hooks" / "commands.py").listing()
    for field in dataclasses.fields(TrainConfig):
        option = "`--" + field.name.replace("_", "-")
        assert option in listing, option
    assert "__TEMP__" not in listing and "\n:   \n" not in listing
    for name in ("cifar10", "evaluate", "paper", "image_folder", "board", "report"):
        assert f"\n## experiments.{name}\n" in "\n" + listing
    assert "`--batch-size 64`, `--augmentation none`" in listing  # of the digits


def test_what_pages_list_by_hand_is_all_there_is():
    config = (config_choices.OPTIMIZERS, config_choices.SCHEDULES, config_choices.VIEWS)
    config += (config_choices.KERNELS, config_choices.MEASURES, config_choices.PRECISIONS)
    for page, names in (
        ("options", [*rules.NAMES, *AUGMENTATIONS, *sum(config, ())]),
        ("rules", rules.NAMES),
        ("models", models.NAMES),
        ("cifar10", [f"experiments.{name}" for name in PRESETS]),
        ("own-data", AUGMENTATIONS),
    ):
        text = (DOCS / f"{page}.md").read_text()
        assert [name for name in names if f"`{name}`" not in text] == [], page


def test_the_drawings_are_those_of_their_script():
    script = load(DOCS / "drawings" / "gradients.py")
    for name, draw in script.PICTURES.items():
        assert (DOCS / "images" / name).read_text() == draw(), f"run {script.__file__}"


def test_the_readme_is_short_and_has_a_picture():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
    assert "docs/images/gradients.svg" in text
