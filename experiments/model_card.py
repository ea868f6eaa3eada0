"""The model card of an exported run: what was trained, how, how good it is, and how to use it."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.commands import resume_command
from experiments.config import TrainConfig
from experiments.presets import default_config
from experiments.run_config import NOT_COMPARED, OF_NEWEST_START
from lls_jax.blocks import (
    ConvBlock,
    DenseBlock,
    DepthwiseSeparableBlock,
    ResidualBlock,
    ResidualStem,
)
from lls_jax.data import DatasetSpec
from lls_jax.models import BlockSpec, Network
from lls_jax.runs import folder as folders

_PAPER = (
    "M. P. E. Apolinario, A. Roy, K. Roy, *LLS: Local Learning Rule for Deep Neural Networks "
    "Inspired by Neural Activity Synchronization*, WACV 2025, "
    "[arXiv 2405.15868](https://arxiv.org/abs/2405.15868)"
)


class Card(NamedTuple):
    """What a card is made from.

    Attributes:
        folder: of the run.
        config: of the run.
        spec: the data set.
        model: the network.
        meta: the checkpoint's description.
        step: the checkpoint's.
        path: of the exported file.
        arrays: in it.
    """

    folder: pathlib.Path
    config: TrainConfig
    spec: DatasetSpec
    model: Network
    meta: dict[str, Any]
    step: int
    path: pathlib.Path
    arrays: dict[str, np.ndarray]


def describe_input(spec: DatasetSpec) -> str:
    """A sentence on what an input is, in PyTorch's layout."""
    *sides, channels = spec.input_shape
    shape = (channels, *sides) if len(sides) == 2 else spec.input_shape
    of_bytes = f"in [0, 1], less {[*spec.mean]}, over {[*spec.std]}, by channel"
    is_plain = not any(spec.mean) and all(one == 1 for one in spec.std)
    numbers = "as they were given" if is_plain else of_bytes
    return f"An input is [batch, {', '.join(map(str, shape))}]: numbers {numbers}."


def command_of(config: TrainConfig) -> str:
    """The command that repeats a run, wherever and on whatever it is trained."""
    default = default_config(config.dataset, config.preset)
    elsewhere = {*NOT_COMPARED} - {*OF_NEWEST_START}
    return resume_command(
        dataclasses.replace(config, **{name: getattr(default, name) for name in elsewhere})
    )


def _conv(block: ConvBlock, inputs: int) -> str:
    stride = f", stride={block.stride}" if block.stride != 1 else ""
    return (
        f"`conv`: Conv2d({inputs}, {block.features}, 3{stride}, padding=1); "
        f"`norm`: BatchNorm2d({block.features}); LeakyReLU(0.01)"
    )


def _dense(block: DenseBlock, inputs: int) -> str:
    width = block.features
    return f"`linear`: Linear({inputs}, {width}); `norm`: BatchNorm1d({width}); LeakyReLU(0.01)"


def _separable(block: DepthwiseSeparableBlock, inputs: int) -> str:
    stride, width = block.stride, block.features
    return (
        f"`depthwise`: Conv2d({inputs}, {inputs}, 3, stride={stride}, padding={stride}, "
        f"groups={inputs}, bias=False); `depthwise_norm`: BatchNorm2d({inputs}); LeakyReLU(0.01); "
        f"`pointwise`: Conv2d({inputs}, {width}, 1, bias=False); `pointwise_norm`: "
        f"BatchNorm2d({width}); LeakyReLU(0.01)"
    )


def _stem(block: ResidualStem, inputs: int) -> str:
    width = block.features
    return f"`conv`: Conv2d({inputs}, {width}, 3, padding=1, bias=False); `norm`; ReLU"


def _residual(block: ResidualBlock, inputs: int) -> str:
    stride, width = block.stride, block.features
    return (
        f"`conv_0`: Conv2d({inputs}, {width}, 3, stride={stride}, padding=1, bias=False); "
        f"`norm_0`; ReLU; `conv_1`: Conv2d({width}, {width}, 3, padding=1, bias=False); `norm_1`; "
        "added to the input (where shapes differ: to `shortcut_conv`, 1x1 with the same stride and "
        "no bias, and `shortcut_norm`); ReLU"
    )


# A kind of block in PyTorch's words, and its first kernel's name and axis of inputs.
_IN_PYTORCH: dict[type, tuple[Callable[[Any, int], str], str, int]] = {
    ConvBlock: (_conv, "conv", 1),
    DenseBlock: (_dense, "linear", 1),
    DepthwiseSeparableBlock: (_separable, "depthwise", 0),
    ResidualStem: (_stem, "conv", 1),
    ResidualBlock: (_residual, "conv_0", 1),
}


def _row(index: int, spec: BlockSpec, arrays: Mapping[str, np.ndarray]) -> str:
    kind = type(spec.module)
    if kind in _IN_PYTORCH:
        describe, first, axis = _IN_PYTORCH[kind]
        inputs = arrays[f"layers.{index}.{first}.weight"].shape[axis]
        layers = [describe(spec.module, inputs)]
    else:
        layers = [f"{kind.__name__} of {kind.__module__}"]
    layers += ["MaxPool2d(2)"] if spec.max_pool else []
    if spec.average_pool is not None:
        layers.append(f"AdaptiveAvgPool2d({spec.average_pool})")
    layers += [repr(spec.then)] if spec.then is not None else []
    layers += ["flatten(1)"] if spec.flatten else []
    return f"| `layers.{index}` | {'; '.join(layers)} |"


def _classifier(card: Card) -> str:
    if card.model.classifier is not None:
        kind = type(card.model.classifier)
        return f"{kind.__name__} of {kind.__module__}"
    inputs = card.arrays["classifier.weight"].shape[1]
    return f"Linear({inputs}, {card.model.num_classes})"


def _versions(folder: pathlib.Path) -> str:
    environments = folders.read_environment(folder)
    if not environments:
        return "not recorded"
    newest = environments[-1]
    packages = newest.pop("packages", {})
    named = {"python": newest.get("python"), **packages, "device": newest.get("device")}
    return ", ".join(f"{name} {value}" for name, value in named.items() if value is not None)


def _accuracies(card: Card) -> list[str]:
    records = folders.read_metrics(card.folder)
    rows = []
    # None, of a step inside an epoch.
    for record in (one for one in records if one["step"] == card.step):
        for split in ("validation", "test"):
            if f"{split}_accuracy" in record:
                top5 = record.get(f"{split}_top5")
                beside = "" if top5 is None else f", top-5 {top5:.2f} %"
                rows.append(
                    f"- {split}: top-1 {record[f'{split}_accuracy']:.2f} %{beside}, loss "
                    f"{record[f'{split}_loss']:.4f}"
                )
    chosen = "validation" if card.config.validation_examples else "test"
    note = f"The best epoch is the one with the highest {chosen} accuracy"
    honest = "" if chosen == "validation" else ", so that accuracy is no estimate for new images"
    return [*(rows or ["- not recorded"]), "", f"{note}{honest}."]


def _load_line(path: pathlib.Path) -> str:
    if path.suffix == ".pt":
        return f'weights = torch.load("{path.name}", weights_only=True)'
    return f'weights = safetensors.torch.load_file("{path.name}")'


def write_card(card: Card, path: pathlib.Path) -> None:
    """Write a run's model card, Markdown.

    Args:
        card: what it says.
        path: the file.
    """
    config, spec = card.config, card.spec
    done = card.meta["epochs_done"]
    weights = sum(
        array.size
        for name, array in card.arrays.items()
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    )
    lines = [
        f"# {config.model}, trained on {config.dataset} by {config.rule}",
        "",
        f"Trained by lls_jax with the learning rule `{config.rule}`; "
        f"{weights:,} parameters in `{card.path.name}`.",
        "",
        "## Accuracy",
        "",
        f"After epoch {done} of {config.epochs} (step {card.step}):",
        "",
        *_accuracies(card),
        "",
        "## Recipe",
        "",
        "```sh",
        command_of(config),
        "```",
        "",
        f"- rule: {config.rule}; reach {config.reach}; seed {config.seed}; {config.precision}",
        f"- optimizer: {config.optimizer}, learning rate {config.learning_rate}, weight decay "
        f"{config.weight_decay}, schedule {config.schedule}, batch size {config.batch_size}",
        f"- augmentation: {config.augmentation}; dropout {config.dropout}",
        f"- versions: {_versions(card.folder)}",
        "",
        "The weights are those that were evaluated: of a schedule-free optimizer their average, "
        "with BatchNorm's statistics estimated anew at it.",
        "",
        "## Data",
        "",
        f"{spec.name}, {spec.train_size or 'unknown'} training and {spec.test_size or 'unknown'} "
        f"test images, {len(spec.class_names)} classes in this order: "
        f"{', '.join(spec.class_names)}.",
        describe_input(spec),
        "",
        "## In PyTorch",
        "",
        "Kernels are OIHW, dense weights [out, in]; BatchNorms have eps 1e-5. `flatten(1)` is "
        "PyTorch's own order.",
        "",
        "```python",
        _load_line(card.path),
        "network.load_state_dict(weights)  # of a network with these names",
        "network.eval()",
        "```",
        "",
        "| module | what it is |",
        "| --- | --- |",
        *(_row(index, block, card.arrays) for index, block in enumerate(card.model.specs)),
        f"| `classifier` | {_classifier(card)} |",
        "",
        "In lls_jax: `interop.load_safetensors(path, model, example_image)` gives a state for "
        "`training.predict` and `evaluation.evaluate`.",
        "",
        "## License and citation",
        "",
        "The code is under the MIT license; the weights are under whatever the data allow. The "
        f"method: {_PAPER}. The rule's own source is in `lls_jax.rules`.",
        "",
    ]
    folders.write_atomically(path, "\n".join(lines))
