"""LLS-DNN's PyTorch state dicts, to and from this library's training states.

A state dict here is a plain ``{name: numpy array}`` with that implementation's names and layouts:
``conv_block1.block.conv.weight`` (OIHW), ``linear_block1.block.linear.weight`` ([out, in]),
``conv_block1.block.bn.running_mean``, ``conv_block1.feedback`` (the modulation), and the
classifier's ``linear.weight`` and ``linear.bias``.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lls_jax.blocks import ConvBlock, DenseBlock, DepthwiseSeparableBlock
from lls_jax.interop.layouts import Path, get, put, to_ours, to_torch, torch_shape
from lls_jax.models import Network
from lls_jax.rules import Rule
from lls_jax.training import Optimizer, TrainState, state_from_variables

StateDict = Mapping[str, np.ndarray]


class _Entry(NamedTuple):
    """An array of a state.

    Attributes:
        name: LLS-DNN's.
        collection: ``"params"`` or ``"batch_stats"``.
        path: within it.
        transposed: whether the layouts differ.
        column: whether LLS-DNN has a vector as a matrix of one column.
    """

    name: str
    collection: str
    path: Path
    transposed: bool = True
    column: bool = False


# Our names of a block's layers: (LLS-DNN's name, whether it has a bias).
_LAYERS: dict[type, dict[str, tuple[str, bool]]] = {
    ConvBlock: {"conv": ("conv", True)},
    DenseBlock: {"linear": ("linear", True)},
    DepthwiseSeparableBlock: {"depthwise": ("conv1", False), "pointwise": ("conv2", False)},
}
# Our names of its normalisations: LLS-DNN's.
_NORMS: dict[type, dict[str, str]] = {
    ConvBlock: {"norm": "bn"},
    DenseBlock: {"norm": "bn"},
    DepthwiseSeparableBlock: {"depthwise_norm": "bn1", "pointwise_norm": "bn2"},
}


def _entries(model: Network, params: Mapping[str, Any]) -> Iterator[_Entry]:
    """Every array of a state."""
    counts = {"conv": 0, "linear": 0}
    for index, (name, spec) in enumerate(zip(model.block_names, model.specs)):
        kind = type(spec.module)
        if kind not in _LAYERS:
            raise ValueError(
                f"block {index} of model {model.name!r} is a {kind.__name__}, which LLS-DNN has "
                "not; use the published models, without groups."
            )
        prefix = "linear" if kind is DenseBlock else "conv"
        counts[prefix] += 1
        block = f"{prefix}_block{counts[prefix]}"
        for ours, (theirs, has_bias) in _LAYERS[kind].items():
            layer = (name, "block", ours)
            yield _Entry(f"{block}.block.{theirs}.weight", "params", (*layer, "kernel"))
            if has_bias:
                yield _Entry(f"{block}.block.{theirs}.bias", "params", (*layer, "bias"))
        for ours, theirs in _NORMS[kind].items():
            norm, bn = (name, "block", ours), f"{block}.block.{theirs}"
            yield _Entry(f"{bn}.weight", "params", (*norm, "scale"))
            yield _Entry(f"{bn}.bias", "params", (*norm, "bias"))
            yield _Entry(f"{bn}.running_mean", "batch_stats", (*norm, "mean"))
            yield _Entry(f"{bn}.running_var", "batch_stats", (*norm, "var"))
        yield from _rule_entries(params[name].get("rule", {}), name, block)
    yield _Entry("linear.weight", "params", ("classifier", "linear", "kernel"))
    yield _Entry("linear.bias", "params", ("classifier", "linear", "bias"))


def _rule_entries(rule_params: Mapping[str, Any], name: str, block: str) -> Iterator[_Entry]:
    """A rule's arrays. Its matrices multiply from the same side in both: the layout is the same."""
    path = (name, "rule")
    known = {"modulation"} if set(rule_params) == {"modulation"} else {"feedback", "modulation"}
    feedback = rule_params.get("feedback")
    if set(rule_params) - known or (feedback is not None and feedback.ndim != 2):
        raise ValueError(
            f"the rule of {name} has parameters {', '.join(sorted(rule_params))}, for which "
            "LLS-DNN has no counterpart; it has those of bp, local_classifier, and the lls rules."
        )
    if feedback is not None:
        yield _Entry(f"{block}.feedback", "params", (*path, "feedback"), False)
    if "modulation" in rule_params:
        # A periodic basis has no parameters, and its modulation has the name of the feedback.
        theirs = "feedback" if feedback is None else "modulation"
        column = feedback is not None and rule_params["modulation"].ndim == 1
        yield _Entry(f"{block}.{theirs}", "params", (*path, "modulation"), False, column)


def from_lls_dnn(model: Network, rule: Rule, tx: Optimizer, state_dict: StateDict) -> TrainState:
    """A training state with the weights of an LLS-DNN checkpoint.

    Args:
        model: the same architecture.
        rule: the same rule.
        tx: the optimizer to go on with; its state starts anew.
        state_dict: ``{name: array}``, LLS-DNN's names; ``num_batches_tracked`` is ignored.

    Returns:
        A state before its first step.

    Raises:
        ValueError: entries are missing, unexpected or of another shape; the message lists them.
    """
    kernel = state_dict.get("conv_block1.block.conv.weight")
    channels = 3 if kernel is None or kernel.ndim != 4 else kernel.shape[1]
    # Only its shapes are used. Every architecture ends in a fixed-size pooling before its first
    # dense block, so any image that is large enough gives the right ones.
    side = max(32, model.smallest_image or 1)
    expected_params, expected_stats = jax.eval_shape(
        lambda key: model.init(rule, key, jnp.zeros((1, side, side, channels))), jax.random.key(0)
    )
    expected = {"params": expected_params, "batch_stats": expected_stats}
    converted: dict[str, dict[str, Any]] = {"params": {}, "batch_stats": {}}
    problems, known = [], set()
    for name, collection, path, transposed, column in _entries(model, expected_params):
        known.add(name)
        if name not in state_dict:
            problems.append(f"{name} is missing")
            continue
        array = np.asarray(state_dict[name], np.float32)
        if column and array.ndim == 2:
            array = array[:, 0]
        array = to_ours(array) if transposed else array
        shape = get(expected[collection], path).shape
        if path[-1] == "feedback" and array.ndim == 2:
            # Of any width: it is pooled to the latents.
            shape = (shape[0], array.shape[1])
        if array.shape != shape:
            theirs = torch_shape(shape) if transposed else (*shape, 1) if column else shape
            problems.append(f"{name} has shape {state_dict[name].shape}, not {theirs}")
            continue
        # Copied: the array may be a view of a buffer that PyTorch goes on writing to.
        put(converted[collection], path, jnp.array(array, copy=True))
    extra = [n for n in state_dict if n not in known and not n.endswith("num_batches_tracked")]
    problems += [f"{name} is unexpected" for name in extra]
    if problems:
        raise ValueError(
            f"this state dict is not one of model {model.name!r} with rule {rule.name!r}: "
            + "; ".join(problems)
        )
    return state_from_variables(
        rule, tx, jax.random.key(0), converted["params"], converted["batch_stats"]
    )


def to_lls_dnn(model: Network, state: TrainState) -> dict[str, np.ndarray]:
    """A state's weights and statistics as an LLS-DNN state dict.

    Args:
        model: the state's model.
        state: any state with `params`, `batch_stats` and `step`.

    Returns:
        ``{name: array}`` with LLS-DNN's names and layouts; ``torch.from_numpy`` on each value makes
        what its ``load_state_dict`` takes.

    Raises:
        ValueError: LLS-DNN has no such block or rule.
    """
    collections = {"params": state.params, "batch_stats": state.batch_stats}
    result: dict[str, np.ndarray] = {}
    for name, collection, path, transposed, column in _entries(model, state.params):
        array = np.asarray(get(collections[collection], path))
        array = array[:, None] if column else array
        result[name] = to_torch(array) if transposed else array
        if name.endswith("running_var"):
            counter = name.replace("running_var", "num_batches_tracked")
            result[counter] = np.asarray(int(state.step), np.int64)
    return {name: np.array(array) for name, array in result.items()}
