"""What a run leaves for a person: its page, the pictures' content, and what to do next."""

import dataclasses
import html
import html.parser
import json
import math
import shutil

import jax
import pytest

from experiments import panels, presets, run_config, setup, train
from experiments.config import TrainConfig
from experiments.next_steps import next_steps
from experiments.parameters import BlockParameters
from experiments.report import sections
from experiments.report.command import report
from experiments.report.config import ReportConfig
from lls_jax.errors import UserError
from lls_jax.runs import folder as folders

TINY = TrainConfig(
    dataset="digits", epochs=2, batch_size=32, train_examples=64, eval_examples=40,
    augmentation="none", learning_rate=0.0051, measure="heads", progress=False,
)  # fmt: skip


class Page(html.parser.HTMLParser):
    """Sources, cells of tables by row, and whether each tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.rows, self.open, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.sources += [named[name] for name in ("src", "href") if name in named]
        assert tag not in ("script", "link", "iframe")
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_a_runs_page_stands_by_itself_and_says_what_its_records_say(tmp_path, capsys, monkeypatch):
    run = tmp_path / "a <run>"
    config = dataclasses.replace(TINY, workdir=str(run))
    assert train.train_and_advise(config) == 0
    printed = capsys.readouterr().out
    assert f"python -m experiments.report '{run}'" in printed
    assert f"curves: {run / 'curves.png'}" in printed
    assert report(ReportConfig(str(run))) == 0
    page = Page((run / "report.html").read_text())
    # Accuracy, loss, local losses, heads; the confusion matrix.
    assert len(page.sources) == 5
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    first, last = folders.read_metrics(run)
    shown = page.text.replace("\n", "")
    assert f"{last['test_accuracy']:.2f} %test accuracy after epoch 2" in shown
    assert f"epoch 2: {last['test_accuracy']:.2f} % of 40 test images" in page.text
    rows = {row[0]: row for row in page.rows}
    for block in range(4):
        shown = rows[f"L{block + 1}"]
        assert float(shown[3]) == pytest.approx(first["layer_loss"][block], rel=1e-3)
        assert float(shown[4]) == pytest.approx(last["layer_loss"][block], rel=1e-3)
        assert float(shown[5]) == pytest.approx(last["head_accuracy"][block], rel=1e-3)
    # Kernels of 3x3, two numbers of BatchNorm a channel; the matrix of classes.
    assert rows["L1"][1:3] == [str(9 * 32 + 3 * 32), "100"]
    assert float(rows["classifier"][4]) == pytest.approx(last["train_loss"], rel=1e-3)
    assert "--learning-rate 0.0051" in page.text and str(tmp_path) not in page.text
    assert rows["--learning-rate"] == ["--learning-rate", "0.0051"]
    assert rows["jax"][1] == jax.__version__

    out = tmp_path / "pages" / "other.html"
    with pytest.raises(UserError, match="no checkpoint of step 7; there are"):
        report(ReportConfig(str(run), out=str(out), checkpoint="7"))
    assert not out.exists()
    (run / "checkpoints").rename(run / "gone")
    assert report(ReportConfig(str(run), out=str(out))) == 0
    assert "It could not be evaluated" in Page(out.read_text()).text
    # Images that are not there any more, and a run that ended before its epochs did.
    stored = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**stored, "epochs": 9, "patience": 1}))
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({**r, "test_accuracy": 50.0}) + "\n" for r in (first, last))
    )

    def gone(config):
        raise FileNotFoundError(config.dataset)

    monkeypatch.setattr(setup, "make_task", gone)
    assert report(ReportConfig(str(run), out=str(out), evaluate=False)) == 0
    page = Page(out.read_text())
    assert "2 epochs of 9; stopped early" in page.text
    assert {row[0]: row for row in page.rows}["L1"][0] == "L1"
    with pytest.raises(UserError, match=r"is a folder; give a file, like .*report\.html"):
        report(ReportConfig(str(run), out=str(tmp_path)))
    with pytest.raises(UserError, match="holds no run"):
        report(ReportConfig(str(tmp_path)))
    with pytest.raises(ValueError, match="--checkpoint is 'first'"):
        ReportConfig(str(run), checkpoint="first")


def fake(folder, config, accuracy):
    folder.mkdir()
    settings = run_config.ConfigSettings(dataclasses.replace(config, workdir=str(folder)))
    folders.write_settings(folder, settings)
    folders.append_metrics(folder, {"epoch": config.epochs, "test_accuracy": accuracy})


def test_what_to_do_next_depends_on_the_runs_that_are_there(tmp_path, monkeypatch):
    def lines(**options):
        own = dataclasses.replace(config, workdir=str(tmp_path / "own"), **options)
        return "\n".join(next_steps(own))

    config = TrainConfig(dataset="mnist", epochs=7)
    # Nothing is known of bp.
    assert "bp reached" not in lines()
    assert "experiments.mnist --rule bp --epochs 7" in lines()
    assert f"--workdir {tmp_path}/mnist-small_conv-bp-s0" in lines()
    assert "--rule bp" in lines(reach=2, slice=2, temperature=0.3)
    assert "--temperature" not in lines(temperature=0.3).split("try next")[1]
    assert "--groups" not in lines(groups="2,3").split("try next")[1]
    assert "--rule lls_mxm" in lines(rule="bp").split("try next")[1]
    measured = presets.Measured(98.7, "once", "python -m experiments.mnist --rule bp")
    monkeypatch.setitem(presets.BP_MEASURED, "mnist", measured)
    assert "bp reached" not in lines()
    config = dataclasses.replace(config, epochs=20, augmentation="none")
    assert "bp reached 98.70 % with the same options, once" in lines()
    assert "--reach 2 --workdir" in lines()
    # A user's own rule is asked whether its blocks have losses that could reach further.
    assert "try next" not in lines(rule="lls_jax.rules:Backpropagation")
    # Not into the folder of a run with other options.
    place = tmp_path / "mnist-small_conv-lls_mxm-s0-reach2"
    fake(place, dataclasses.replace(config, reach=2, learning_rate=1.0), 10.0)
    assert "try next" not in lines()
    shutil.rmtree(place)
    # Runs beside it stand before that: of other options none, and that of the same seed first.
    fake(tmp_path / "other", dataclasses.replace(config, rule="bp", learning_rate=1.0), 10.0)
    assert "98.70 %" in lines()
    fake(tmp_path / "b", dataclasses.replace(config, rule="bp", seed=1), 97.0)
    fake(tmp_path / "c", dataclasses.replace(config, rule="bp"), 98.0)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "config.json").write_text("{")
    assert f"bp reached 98.00 % with the same options ({tmp_path}/c)" in lines()
    assert f"experiments.compare {tmp_path}/own {tmp_path}/c" in lines()
    fake(tmp_path / "e", dataclasses.replace(config, reach=2), 98.0)
    assert "try next" not in lines() and "try next" not in lines(reach=2)
    # Backpropagation has no losses that blocks could share.
    assert "bp reached 98.00 %" in lines(groups="2,3")
    assert "--groups 2,3 --reach 2" in lines(groups="2,3")


def test_a_network_of_fewer_blocks_than_the_records_is_not_counted():
    record = {"layer_loss": [2.0, 1.5, 1.0], "train_loss": 0.5}
    counted = [BlockParameters(name, 7, 5) for name in ("block_0", "block_1", "classifier")]
    page = Page(sections.blocks([record], counted))
    assert [row[0] for row in page.rows] == ["block", "L1", "L2", "L3", "classifier"]
    assert "parameters" not in page.text
    whole = Page(sections.blocks([{**record, "layer_loss": [2.0, 1.5]}], counted))
    assert "parameters" in whole.text


def test_pictures_show_what_the_records_have():
    def record(epoch, **more):
        return {
            **{"epoch": epoch, "total_seconds": 100.0 * epoch, "layer_loss": [2.0, 1.0 / epoch]},
            **{f"{s}_{q}": epoch for s in ("train", "test") for q in ("accuracy", "loss")},
            **more,
        }

    records = [record(1), record(2, alignment=[0.5, None], validation_accuracy=3.0), record(3)]
    accuracy, loss, local, alignment = panels.curve_panels(records)
    assert [line.label for line in accuracy.lines] == ["train", "validation", "test"]
    assert math.isnan(accuracy.lines[1].y[0]) and accuracy.lines[1].y[1] == 3.0
    assert [line.label for line in loss.lines] == ["train", "test"]
    assert local.lines[1].y == [1.0, 0.5, 1 / 3]
    assert alignment.lines[0].x == [2] and math.isnan(alignment.lines[1].y[0])
    bp = [{**one, "layer_loss": []} for one in (record(1), record(2))]
    assert len(panels.curve_panels(bp)) == 2
    compared = panels.comparison_panels({"a": records, "b": bp})
    assert [panel.x_label for panel in compared] == [
        "epoch", "training time [min]", "epoch", "training time [min]", "block",
    ]  # fmt: skip
    assert compared[1].lines[1].x == pytest.approx([100 / 60, 200 / 60])
    assert [line.label for line in compared[4].lines] == ["a"]
