"""Weights for others: state dicts, safetensors, the export command and its model card."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from experiments import export, run_config, train
from experiments.config import TrainConfig
from experiments.model_card import describe_input
from lls_jax import interop, models, rules, training
from lls_jax.blocks import (
    ConvBlock,
    DenseBlock,
    DepthwiseSeparableBlock,
    ResidualBlock,
    ResidualStem,
)
from lls_jax.data import Split
from lls_jax.data.arrays import describe
from lls_jax.errors import UserError
from lls_jax.interop import torch_files
from lls_jax.models import BlockSpec, Network
from lls_jax.runs.callbacks import Callback

RULE = rules.make("lls_mxm", num_classes=3)
# Every kind of layer once, small.
TINY = Network(
    "tiny",
    3,
    (
        BlockSpec(ConvBlock(4), 2, max_pool=True),
        BlockSpec(DepthwiseSeparableBlock(6, stride=2), 2),
        BlockSpec(ResidualStem(6), 2),
        BlockSpec(ResidualBlock(6), 2),
        BlockSpec(ResidualBlock(8, 2), 2, average_pool=2, flatten=True),
        BlockSpec(DenseBlock(5), 5),
    ),
)


def images(channels=2, count=4):
    return jax.random.normal(jax.random.key(5), (count, 16, 16, channels))


def random_state(model, shape):
    """A state whose every array is drawn, statistics too; nothing of it is compiled."""
    expected = jax.eval_shape(
        lambda key: model.init(RULE, key, jnp.zeros(shape)), jax.random.key(0)
    )
    rng = np.random.default_rng(3)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape)
        if leaf.ndim > 1:
            values *= 3 / np.prod(leaf.shape[:-1]) ** 0.5
        elif path[-1].key in ("scale", "var"):
            values = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            values *= 0.2
        return jnp.asarray(values, leaf.dtype)

    drawn = jax.tree_util.tree_map_with_path(draw, expected)
    return training.TrainState(jnp.int32(7), *drawn, None, jax.random.key(0))


def test_safetensors_have_pytorchs_names_and_layouts_and_come_back(tmp_path):
    image, path = images(), tmp_path / "model.safetensors"
    state = random_state(TINY, image.shape)
    interop.save_safetensors(path, TINY, state, {"dataset": "none"})
    arrays = safetensors.numpy.load_file(path)
    shapes = {
        "layers.0.conv.weight": (4, 2, 3, 3),
        "layers.0.norm.running_var": (4,),
        "layers.1.depthwise.weight": (4, 1, 3, 3),
        "layers.4.shortcut_conv.weight": (8, 6, 1, 1),
        "layers.5.linear.weight": (5, 32),
        "classifier.weight": (3, 5),
    }
    assert {name: arrays[name].shape for name in shapes} == shapes
    kernel = state.params["block_0"]["block"]["conv"]["kernel"]
    assert arrays["layers.0.conv.weight"][3, 1, 2, 0] == kernel[2, 0, 1, 3]
    assert not any("rule" in name or "modulation" in name for name in arrays)
    again = interop.load_safetensors(path, TINY, image)
    assert int(again.step) == 7
    expected = training.predict(TINY, state, image)
    np.testing.assert_array_equal(training.predict(TINY, again, image), expected)
    wrong = {**arrays, "more": arrays["classifier.bias"], "classifier.bias": np.zeros(4)}
    del wrong["layers.0.conv.bias"]
    with pytest.raises(
        ValueError,
        match=r"conv.bias is missing; classifier.bias has shape \(4,\).*; more is unexpected",
    ):
        interop.from_state_dict(TINY, wrong, image)
    (tmp_path / "text").write_text("no tensors here")
    for file, message in (("text", "is not a safetensors file"), ("none", "does not exist")):
        with pytest.raises(UserError, match=message):
            interop.load_safetensors(tmp_path / file, TINY, image)


@pytest.mark.parametrize(
    ("shape", "dtype", "said"),
    [
        ((8, 6, 3), np.uint8, "[batch, 3, 8, 6]: numbers in [0, 1], less"),
        ((6,), np.float32, "[batch, 6]: numbers as they were given."),
        ((5, 4), np.float32, "[batch, 5, 4]: numbers as they were given."),
    ],
)
def test_the_card_says_what_an_input_is(shape, dtype, said):
    pixels = np.arange(2 * np.prod(shape)).reshape(2, *shape).astype(dtype)
    assert said in describe_input(describe(Split(pixels, np.zeros(2, np.int32)), 2))


def test_blocks_without_a_counterpart_come_back():
    """Two kernels in a block, frozen filters, a classifier without a bias."""
    model = models.make("airbench", num_classes=3, width=0.07)
    state = random_state(model, (1, 32, 32, 3))
    arrays = interop.to_state_dict(model, state)
    again = interop.from_state_dict(model, arrays, jnp.zeros((1, 32, 32, 3)))
    assert again.params["classifier"].keys() == state.params["classifier"].keys()
    for block in model.block_names:
        jax.tree.map(
            np.testing.assert_array_equal,
            (again.params[block]["block"], again.batch_stats[block]),
            (state.params[block]["block"], state.batch_stats[block]),
        )


def torch_network(torch):
    """TINY in PyTorch, as a user of it would write it from its model card."""
    nn = torch.nn

    class Layer(nn.Module):
        def __init__(self, run, **modules):
            super().__init__()
            self.run = run
            for name, module in modules.items():
                self.add_module(name, module)

        def forward(self, x):
            return self.run(self, x)

    act, relu = nn.functional.leaky_relu, torch.relu

    def residual(inputs, width, stride):
        def run(m, x):
            y = relu(m.norm_0(m.conv_0(x)))
            same = "shortcut_conv" not in dict(m.named_children())
            shortcut = x if same else m.shortcut_norm(m.shortcut_conv(x))
            return relu(m.norm_1(m.conv_1(y)) + shortcut)

        beside = {} if inputs == width else {
            "shortcut_conv": nn.Conv2d(inputs, width, 1, stride, bias=False),
            "shortcut_norm": nn.BatchNorm2d(width),
        }  # fmt: skip
        return Layer(
            run,
            conv_0=nn.Conv2d(inputs, width, 3, stride, 1, bias=False), norm_0=nn.BatchNorm2d(width),
            conv_1=nn.Conv2d(width, width, 3, 1, 1, bias=False), norm_1=nn.BatchNorm2d(width),
            **beside,
        )  # fmt: skip

    layers = [
        Layer(
            lambda m, x: nn.functional.max_pool2d(act(m.norm(m.conv(x))), 2),
            conv=nn.Conv2d(2, 4, 3, padding=1), norm=nn.BatchNorm2d(4),
        ),
        Layer(
            lambda m, x: act(m.pointwise_norm(m.pointwise(act(m.depthwise_norm(m.depthwise(x)))))),
            depthwise=nn.Conv2d(4, 4, 3, stride=2, padding=2, groups=4, bias=False),
            depthwise_norm=nn.BatchNorm2d(4),
            pointwise=nn.Conv2d(4, 6, 1, bias=False), pointwise_norm=nn.BatchNorm2d(6),
        ),
        Layer(
            lambda m, x: relu(m.norm(m.conv(x))),
            conv=nn.Conv2d(6, 6, 3, padding=1, bias=False), norm=nn.BatchNorm2d(6),
        ),
        residual(6, 6, 1),
        residual(6, 8, 2),
        Layer(
            lambda m, x: act(m.norm(m.linear(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)))),
            linear=nn.Linear(32, 5), norm=nn.BatchNorm1d(5),
        ),
    ]  # fmt: skip

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*layers)
            self.classifier = nn.Linear(5, 3)

        def forward(self, x):
            return self.classifier(self.layers(x))

    return Whole().eval()


def test_pytorch_loads_both_files_strictly_and_gives_our_logits(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    import safetensors.torch

    image = images()
    state = random_state(TINY, image.shape)
    torch_files.write_state_dict(tmp_path / "m.pt", interop.to_state_dict(TINY, state))
    interop.save_safetensors(tmp_path / "m.safetensors", TINY, state)
    ours = np.asarray(training.predict(TINY, state, image))
    assert np.ptp(ours) > 0.1
    for weights in (
        torch.load(tmp_path / "m.pt", weights_only=True),
        safetensors.torch.load_file(tmp_path / "m.safetensors"),
    ):
        network = torch_network(torch)
        network.load_state_dict(weights)
        with torch.no_grad():
            theirs = network(torch.from_numpy(np.array(image.transpose(0, 3, 1, 2)))).numpy()
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)


def test_the_command_exports_a_run_and_its_card(tmp_path):
    folder = tmp_path / "run"
    config = TrainConfig(
        dataset="digits", rule="lls_m_random", epochs=1, batch_size=16, train_examples=64,
        eval_examples=40, augmentation="none", progress=False, workdir=str(folder),
    )  # fmt: skip
    assert train.train_and_evaluate(config) == 0
    for form, file in export.FORMATS.items():
        assert export.export(export.ExportConfig(str(folder), form)) == 0
        assert (folder / "export" / file).exists()
    arrays = safetensors.numpy.load_file(folder / "export" / "model.safetensors")
    theirs = torch_files.read(folder / "export" / "model.pt")
    assert set(arrays) == set(theirs)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, theirs[name])
    record = json.loads((folder / "metrics.jsonl").read_text())
    card = (folder / "export" / "MODEL_CARD.md").read_text()
    for part in (
        f"top-1 {record['test_accuracy']:.2f} %",
        "--rule lls_m_random --epochs 1 --batch-size 16 --train-examples 64",
        "`conv`: Conv2d(1, 32, 3, padding=1)",
        "| `classifier` | Linear(512, 10) |",
        f"jax {jax.__version__}",
        "MIT license",
        "2405.15868",
    ):
        assert part in card, part
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, "epochs": 3}))
    with pytest.raises(UserError, match="unfinished: 1 of 3 epochs"):
        export.export(export.ExportConfig(str(folder)))
    last = export.ExportConfig(str(folder), checkpoint="last", output=str(tmp_path / "elsewhere"))
    assert export.export(last) == 0
    assert "After epoch 1 of 3" in (tmp_path / "elsewhere" / "MODEL_CARD.md").read_text()
    # What was measured at other weights is no figure of these.
    (folder / "metrics.jsonl").write_text(json.dumps({**record, "step": record["step"] - 1}) + "\n")
    assert export.export(last) == 0
    card = (tmp_path / "elsewhere" / "MODEL_CARD.md").read_text()
    assert "- not recorded" in card and f"{record['test_accuracy']:.2f} %" not in card
    with pytest.raises(UserError, match="holds no run"):
        export.export(export.ExportConfig(str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match="--format is 'onnx'; expected safetensors or torch"):
        dataclasses.replace(last, format="onnx")


def test_a_run_that_ends_by_a_patience_given_later_is_finished(tmp_path):
    class Stop(Callback):
        def on_epoch(self, event):
            return True

    config = TrainConfig(
        dataset="digits", model="small_models:two_blocks", rule="lls", epochs=50, batch_size=16,
        train_examples=32, eval_examples=20, augmentation="none", learning_rate=1e-9,
        progress=False, workdir=str(tmp_path),
    )  # fmt: skip
    train.train(config, listeners=[Stop()])
    with pytest.raises(UserError, match="unfinished: 1 of 50 epochs"):
        export._check_finished(tmp_path, run_config.read_config(tmp_path))
    patient = dataclasses.replace(config, patience=1, test_views="flip")
    assert len(train.train(patient).result.records) < 50
    assert run_config.read_config(tmp_path) == patient
    export._check_finished(tmp_path, run_config.read_config(tmp_path))
