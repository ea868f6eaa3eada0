"""LLS-DNN's PyTorch state dicts, to and from this library's training states.

A state dict here is a plain ``{name: numpy array}`` with that implementation's names and layouts:
``conv_block1.block.conv.weight`` (OIHW), ``linear_block1.block.linear.weight`` ([out, in]),
``conv_block1.block.bn.running_mean``, ``conv_block1.feedback`` (the modulation), and the
classifier's ``linear.weight`` and ``linear.bias``.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lls_jax.blocks import ConvBlock
from lls_jax.models import Network
from lls_jax.rules import Rule
from lls_jax.training import TrainState, state_from_variables

StateDict = Mapping[str, np.ndarray]
Path = tuple[str, ...]

# Axes that take a weight from PyTorch's layout to ours, by number of axes, and back.
_TO_OURS = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}


def _entries(model: Network, rule_params: Mapping[str, Mapping[str, Any]]) -> Iterator[Any]:
    """Every array of a state: (LLS-DNN's name, collection, path, whether it is transposed)."""
    counts = {"conv": 0, "linear": 0}
    for name, spec in zip(model.block_names, model.specs):
        kind = "conv" if isinstance(spec.module, ConvBlock) else "linear"
        counts[kind] += 1
        torch_block = f"{kind}_block{counts[kind]}"
        layer, norm = (name, "block", kind), (name, "block", "norm")
        yield f"{torch_block}.block.{kind}.weight", "params", (*layer, "kernel"), True
        yield f"{torch_block}.block.{kind}.bias", "params", (*layer, "bias"), True
        yield f"{torch_block}.block.bn.weight", "params", (*norm, "scale"), True
        yield f"{torch_block}.block.bn.bias", "params", (*norm, "bias"), True
        yield f"{torch_block}.block.bn.running_mean", "batch_stats", (*norm, "mean"), True
        yield f"{torch_block}.block.bn.running_var", "batch_stats", (*norm, "var"), True
        for parameter in rule_params.get(name, ()):
            # The modulation multiplies scores from the right in both: its layout is the same.
            yield f"{torch_block}.feedback", "params", (name, "rule", parameter), False
    yield "linear.weight", "params", ("classifier", "linear", "kernel"), True
    yield "linear.bias", "params", ("classifier", "linear", "bias"), True


def _rule_params(params: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: block["rule"] for name, block in params.items() if "rule" in block}


def _get(tree: Mapping[str, Any], path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _set(tree: dict[str, Any], path: Path, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def from_lls_dnn(
    model: Network, rule: Rule, tx: optax.GradientTransformation, state_dict: StateDict
) -> TrainState:
    """A training state with the weights of an LLS-DNN checkpoint.

    Args:
        model: the same architecture.
        rule: the same rule.
        tx: the optimiser to go on with; its state starts anew.
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
    side = max(32, model.smallest_image)
    expected_params, expected_stats = jax.eval_shape(
        lambda key: model.init(rule, key, jnp.zeros((1, side, side, channels))), jax.random.key(0)
    )
    expected = {"params": expected_params, "batch_stats": expected_stats}
    converted: dict[str, dict[str, Any]] = {"params": {}, "batch_stats": {}}
    problems, known = [], set()
    for name, collection, path, transposed in _entries(model, _rule_params(expected_params)):
        known.add(name)
        if name not in state_dict:
            problems.append(f"{name} is missing")
            continue
        array = np.asarray(state_dict[name], np.float32)
        if transposed and array.ndim in _TO_OURS:
            array = array.transpose(_TO_OURS[array.ndim])
        shape = _get(expected[collection], path).shape
        if array.shape != shape:
            problems.append(
                f"{name} has shape {state_dict[name].shape}, which does not fit {shape}"
            )
            continue
        # Copied: the array may be a view of a buffer that PyTorch goes on writing to.
        _set(converted[collection], path, jnp.array(array, copy=True))
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
    """
    collections = {"params": state.params, "batch_stats": state.batch_stats}
    result: dict[str, np.ndarray] = {}
    for name, collection, path, transposed in _entries(model, _rule_params(state.params)):
        array = np.asarray(_get(collections[collection], path))
        result[name] = array.transpose(_TO_TORCH[array.ndim]) if transposed else array
        if name.endswith("running_var"):
            counter = name.replace("running_var", "num_batches_tracked")
            result[counter] = np.asarray(int(state.step), np.int64)
    return {name: np.array(array) for name, array in result.items()}
