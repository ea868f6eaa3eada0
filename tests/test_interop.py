"""State dicts and checkpoint files of the authors' PyTorch code, in both directions."""

import dataclasses
import io
import json
import os
import pickle
import pickletools
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seeds import random_generator

from experiments import (
    command_line,
    evaluate,
    export_lls_dnn,
    import_lls_dnn,
    presets,
    run_config,
    train,
)
from experiments.config import TrainConfig
from lls_jax import interop, models, rules, training
from lls_jax.errors import TorchFileError, UserError
from lls_jax.interop import torch_files, torch_pickles

CLASSES = 5
TX = optax.sgd(0.1)
# LLS-DNN's own names: what its blocks and rules are called there.
BLOCK = {
    "conv": ["conv.weight", "conv.bias", "bn.weight", "bn.bias"],
    "linear": ["linear.weight", "linear.bias", "bn.weight", "bn.bias"],
    "dw": ["conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.weight", "bn2.bias"],
}
BLOCKS = {
    "small_conv": ["conv"] * 3 + ["linear"],
    "small_conv_l": ["conv"] * 3 + ["linear"],
    "vgg8": ["conv"] * 6 + ["linear"],
    "vgg11": ["conv"] * 8 + ["linear"] * 2,
    "mobilenet_v1": ["conv"] + ["dw"] * 13,
    "mobilenet_v1_small": ["conv"] + ["dw"] * 7,
}
RULES = {
    "bp": {},
    "lls": {},
    "lls_m": {"feedback": (CLASSES,)},
    "lls_mxm": {"feedback": (CLASSES, CLASSES)},
    "lls_mxm_reduced": {"feedback": (3, CLASSES)},
    "local_classifier": {"feedback": (CLASSES, None)},
    "lls_random": {"feedback": (CLASSES, None)},
    "lls_m_random": {"feedback": (CLASSES, None), "modulation": (CLASSES, 1)},
    "lls_mxm_random": {"feedback": (CLASSES, None), "modulation": (CLASSES, CLASSES)},
}


def make_rule(name):
    reduced = {"basis_rows": 3} if name == "lls_mxm_reduced" else {}
    return rules.make(name, num_classes=CLASSES, **reduced)


def expected_names(model_name, rule_name):
    counts, names = {"conv": 0, "linear": 0}, set()
    for kind in BLOCKS[model_name]:
        prefix = "linear" if kind == "linear" else "conv"
        counts[prefix] += 1
        block = f"{prefix}_block{counts[prefix]}"
        names |= {f"{block}.block.{name}" for name in BLOCK[kind]}
        names |= {f"{block}.{name}" for name in RULES[rule_name]}
        for norm in ("bn1", "bn2") if kind == "dw" else ("bn",):
            names |= {
                f"{block}.block.{norm}.{name}"
                for name in ("running_mean", "running_var", "num_batches_tracked")
            }
    return names | {"linear.weight", "linear.bias"}


@pytest.mark.parametrize(
    ("model_name", "rule_name"),
    [*((name, "lls_mxm") for name in BLOCKS), *(("small_conv", name) for name in RULES)],
)
def test_names_layouts_and_the_way_back(model_name, rule_name):
    model, rule = models.make(model_name, num_classes=CLASSES), make_rule(rule_name)
    side = max(8, model.smallest_image)
    params, batch_stats = jax.eval_shape(
        lambda key: model.init(rule, key, jnp.zeros((1, side, side, 3))), jax.random.key(0)
    )
    rng = random_generator()
    # Bytes of random data, repeated: vgg11 has 160 million parameters.
    noise = rng.normal(size=997).astype(np.float32)
    params, batch_stats = jax.tree.map(
        lambda leaf: np.resize(noise, leaf.shape), (params, batch_stats)
    )
    state = training.TrainState(jnp.int32(7), params, batch_stats, None, jax.random.key(0))
    exported = interop.to_lls_dnn(model, state)
    assert set(exported) == expected_names(model_name, rule_name)
    for name, shape in RULES[rule_name].items():
        array = exported[f"conv_block1.{name}"]
        assert all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
    kernel = params["block_0"]["block"]["conv"]["kernel"]
    np.testing.assert_array_equal(
        exported["conv_block1.block.conv.weight"], kernel.transpose(3, 2, 0, 1)
    )
    if model_name.startswith("mobilenet"):
        own = params["block_1"]["block"]
        depthwise = exported["conv_block2.block.conv1.weight"]
        assert depthwise.shape == (32, 1, 3, 3)
        np.testing.assert_array_equal(
            depthwise[:, 0].transpose(1, 2, 0), own["depthwise"]["kernel"][:, :, 0]
        )
        pointwise = exported["conv_block2.block.conv2.weight"]
        np.testing.assert_array_equal(pointwise[:, :, 0, 0].T, own["pointwise"]["kernel"][0, 0])
    if model_name == "vgg11":
        return
    back = interop.from_lls_dnn(model, rule, TX, exported)
    jax.tree.map(np.testing.assert_array_equal, back.params, params)
    jax.tree.map(np.testing.assert_array_equal, back.batch_stats, batch_stats)


@pytest.mark.parametrize(
    ("rule", "groups", "message"),
    [
        ("predsim", None, "no counterpart"),
        ("dfa", None, "no counterpart"),
        ("lls", (2, 2), "Group"),
    ],
)
def test_what_lls_dnn_has_not_is_refused(rule, groups, message):
    model, rule = models.make("small_conv", num_classes=CLASSES), make_rule(rule)
    model = model.grouped(groups) if groups else model
    state = training.create_train_state(model, rule, TX, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match=message):
        interop.to_lls_dnn(model, state)


def test_shapes_are_those_of_pytorch():
    """Expected ones too: of kernels in its layout, of a vector where it has a column."""
    model, rule = models.make("small_conv", num_classes=CLASSES), make_rule("lls_m_random")
    params, batch_stats = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(
            lambda key: model.init(rule, key, jnp.zeros((1, 8, 8, 3))), jax.random.key(0)
        ),
    )
    state = training.TrainState(jnp.int32(0), params, batch_stats, None, jax.random.key(0))
    kernel, column = np.zeros((64, 32, 5, 5)), np.zeros((CLASSES + 1, 1))
    wrong = {"conv_block2.block.conv.weight": kernel, "conv_block1.modulation": column}
    with pytest.raises(ValueError) as caught:
        interop.from_lls_dnn(model, rule, TX, interop.to_lls_dnn(model, state) | wrong)
    assert "conv.weight has shape (64, 32, 5, 5), not (64, 32, 3, 3)" in str(caught.value)
    assert f"modulation has shape {column.shape}, not ({CLASSES}, 1)" in str(caught.value)
    wrong = {"layers.1.conv.weight": kernel, "classifier.bias": column[0]}
    with pytest.raises(ValueError) as caught:
        interop.from_state_dict(
            model, interop.to_state_dict(model, state) | wrong, jnp.zeros((1, 8, 8, 3))
        )
    assert "conv.weight has shape (64, 32, 5, 5), not (64, 32, 3, 3)" in str(caught.value)
    assert f"classifier.bias has shape (1,), not ({CLASSES},)" in str(caught.value)


# --- Files ---------------------------------------------------------------------------------------


def small_dict():
    rng = np.random.default_rng(3)
    return {
        "linear.weight": rng.normal(size=(3, 4)).astype(np.float32),
        "bn.num_batches_tracked": np.asarray(7, np.int64),
        "empty": np.empty((0, 2), np.float32),
    }


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].shape == value.shape
        np.testing.assert_array_equal(ours[name], value)


def test_a_file_comes_back_as_it_was_written(tmp_path):
    torch_files.write(tmp_path / "x.tar", small_dict(), 41)
    content = torch_files.read(tmp_path / "x.tar")
    assert content["epoch"] == 41
    assert_same(content["state_dict"], small_dict())


def test_pytorch_reads_ours_and_we_read_pytorchs(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch_files.write(tmp_path / "ours.tar", small_dict(), 41)
    loaded = torch.load(tmp_path / "ours.tar", weights_only=True)
    assert_same({k: v.numpy() for k, v in loaded["state_dict"].items()}, small_dict())
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    content = {
        "epoch": 3,
        "state_dict": layer.state_dict(),
        "best_acc": torch.tensor(91.5),
        "parameter": layer[0].weight,
        "view": torch.arange(12.0).reshape(3, 4).T[1:],
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    torch.save(content, tmp_path / "theirs.tar")
    ours = torch_files.read(tmp_path / "theirs.tar")
    assert_same(ours["state_dict"], {k: v.numpy() for k, v in layer.state_dict().items()})
    assert float(ours["best_acc"]) == 91.5
    np.testing.assert_array_equal(ours["parameter"], layer[0].weight.detach().numpy())
    np.testing.assert_array_equal(ours["view"], content["view"].numpy())
    np.testing.assert_array_equal(ours["half"].astype(np.float32), [1, 1])


def packed(content, storages=()):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for key, value in enumerate(storages):
            archive.writestr(f"archive/data/{key}", value)
    return file.getvalue()


class Command:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def tensor(shape, stride, count=4, key="0", offset=0, kind=b"FloatStorage"):
    """A pickle of one tensor."""
    text, number = torch_files._text, torch_files._number
    storage = b"(" + text("storage") + b"ctorch\n" + kind + b"\n" + text(key) + text("cpu")
    storage += number(count) + b"tQ"
    sizes = torch_files._numbers(shape) + torch_files._numbers(stride)
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + sizes + b"tR."
    )


def many_tensors(count):
    """A tuple of tensors, all of the same storage."""
    return b"\x80\x02(" + count * tensor((4,), (1,))[2:-1] + b"t."


def test_tensors_may_share_a_storage(tmp_path):
    (tmp_path / "x.tar").write_bytes(packed(many_tensors(2), [b"\0" * 16]))
    one, other = torch_files.read(tmp_path / "x.tar")
    assert one.shape == other.shape == (4,)


def nested_tuples():
    """A key whose hash takes 2**60 steps."""
    return b"\x80\x02})" + b"".join(b"q\x00h\x00\x86" for _ in range(60)) + b"Ns."


def test_what_a_pickle_may_do_is_in_one_table():
    known = {op.name for op in pickletools.opcodes}
    assert set(torch_pickles._OPERATIONS) <= known
    assert not set(torch_pickles._OPERATIONS) & {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda path: pickle.dumps(Command(path), 2), "system to be called"),
        (lambda path: pickle.dumps(Command(path), 4), "system to be called"),
        (lambda path: b"cos\nsystem\n(X\x02\x00\x00\x00lstR.", "system to be called"),
        (lambda path: b"(S'ls'\nios\nsystem\n.", "operation"),
        (lambda path: b"\x80\x02c__builtin__\neval\n(X\x01\x00\x00\x001tR.", "to be called"),
        (
            lambda path: b"\x80\x02cos\nsystem\nq\x00X\x02\x00\x00\x00ls\x85\x81.",
            "operation NEWOBJ",
        ),
        (lambda path: tensor((2**40,), (0,)), "reaches beyond"),
        (lambda path: tensor((4,), (2,)), "reaches beyond"),
        (lambda path: tensor((2,), (1,), offset=3), "reaches beyond"),
        (lambda path: tensor((2,), (1, 1)), "shape"),
        # Each is as large as the storage, and no larger.
        (lambda path: many_tensors(5), "together are many times larger"),
        (lambda path: tensor((4,), (1,), count=2**40), "bytes; expected"),
        (lambda path: tensor((4,), (1,), key="9"), "missing"),
        (lambda path: tensor((4,), (1,), kind=b"EvilStorage"), "storage of kind"),
        (lambda path: nested_tuples(), "key of type tuple"),
        (lambda path: b"\x80\x02r\xff\xff\xff\xff.", "damaged"),
        (lambda path: b"\x80\x02", "damaged|does not end"),
        (lambda path: b"\x80\x02]]]e.", "damaged"),
    ],
)
def test_malicious_and_damaged_pickles_are_refused_and_run_nothing(content, message, tmp_path):
    trap = tmp_path / "trap"
    (tmp_path / "x.tar").write_bytes(packed(content(trap), [b"\0" * 16]))
    with pytest.raises(TorchFileError, match=message):
        torch_files.read(tmp_path / "x.tar")
    assert not trap.exists()


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "x.tar"
    for content, message in (
        (b"", "not a checkpoint"),
        (pickle.dumps({"a": 1}), "not a checkpoint"),
        (packed(b"N.")[:40], "not a checkpoint"),
    ):
        path.write_bytes(content)
        with pytest.raises(TorchFileError, match=message):
            torch_files.read(path)
    with pytest.raises(TorchFileError, match="does not exist"):
        torch_files.read(tmp_path / "none.tar")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", tensor((4,), (1,)))
        archive.writestr("archive/data/0", b"\0" * 16)
    with pytest.raises(TorchFileError, match="compressed"):
        torch_files.read(path)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_fuzzed_files_give_arrays_or_an_error(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    torch_files.write(folder / "good.tar", small_dict(), 1)
    content = bytearray((folder / "good.tar").read_bytes())
    kind = data.draw(st.sampled_from(["cut", "flip", "pickle"]))
    if kind == "cut":
        content = content[: data.draw(st.integers(0, len(content)))]
    elif kind == "flip":
        for _ in range(data.draw(st.integers(1, 5))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        with zipfile.ZipFile(folder / "good.tar") as archive:
            inner = bytearray(archive.read("archive/data.pkl"))
        opcodes = [op.code.encode("latin1") for op in pickletools.opcodes]
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(2, len(inner) - 1))
            inner[place : place + 1] = data.draw(
                st.one_of(st.sampled_from(opcodes), st.binary(max_size=6))
            )
        content = packed(bytes(inner), [b"\0" * 48, b"\0" * 8, b""])
    (folder / "fuzzed.tar").write_bytes(bytes(content))
    try:
        result = torch_files.read(folder / "fuzzed.tar")
    except TorchFileError:
        return
    leaves = jax.tree.leaves(result)
    assert sum(leaf.nbytes for leaf in leaves if isinstance(leaf, np.ndarray)) < 10_000


# --- Commands ------------------------------------------------------------------------------------


def test_a_run_goes_out_comes_back_and_trains_on(tmp_path, capsys, monkeypatch):
    small = TrainConfig(
        dataset="digits", epochs=1, batch_size=16, train_examples=64, eval_examples=40,
        progress=False,
    )  # fmt: skip
    # What comes back has its data set's own options.
    monkeypatch.setitem(presets.PRESETS, "digits", small)
    trained = dataclasses.replace(small, rule="lls_m_random", workdir=str(tmp_path / "run"))
    assert train.train_and_evaluate(trained) == 0
    file = tmp_path / "model_best.pth.tar"
    assert (
        export_lls_dnn.export_lls_dnn(export_lls_dnn.ExportConfig(str(tmp_path / "run"), str(file)))
        == 0
    )
    config = import_lls_dnn.ImportConfig(
        str(file), out=str(tmp_path / "came back"), rule="lls_m_random", dataset="digits"
    )
    capsys.readouterr()
    assert import_lls_dnn.import_lls_dnn(config) == 0
    printed = capsys.readouterr().out
    assert "saved after epoch 1" in printed and f"--workdir '{tmp_path / 'came back'}'" in printed
    # The command of its data set goes on with it.
    back = run_config.read_config(tmp_path / "came back")
    assert back == command_line.parse_training(
        "digits", "", ["--rule", "lls_m_random", "--workdir", str(tmp_path / "came back")]
    )
    losses = []
    for name in ("run", "came back"):
        capsys.readouterr()
        evaluate.evaluate(
            evaluate.EvaluateConfig(str(tmp_path / name), eval_examples=40, json=True)
        )
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == losses[1]
    with pytest.raises(UserError, match="holds a run already"):
        import_lls_dnn.import_lls_dnn(config)
    wrong = import_lls_dnn.ImportConfig(
        str(file), out=str(tmp_path / "other"), rule="lls", dataset="digits"
    )
    with pytest.raises(UserError, match=r"conv_block1\.feedback is unexpected"):
        import_lls_dnn.import_lls_dnn(wrong)
    # Images of other channels, of another side, and other classes.
    wrong = dataclasses.replace(wrong, rule="lls_m_random", dataset="cifar10")
    with pytest.raises(UserError, match=r"has shape .*data set 'cifar10' has .*--dataset and"):
        import_lls_dnn.import_lls_dnn(wrong)
    assert not (tmp_path / "other" / "config.json").exists()
    capsys.readouterr()
    assert train.train_and_evaluate(back) == 0
    assert "resumed at step 0" in capsys.readouterr().out
    (record,) = (tmp_path / "came back" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(record)["epoch"] == 1
