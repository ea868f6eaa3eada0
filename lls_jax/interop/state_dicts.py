"""Evaluation weights as state dicts that PyTorch's users expect, and as safetensors files.

The blocks are ``layers.0``, ``layers.1``, ...: ``layers.0.conv.weight`` (OIHW), ``.conv.bias``,
``layers.0.norm.weight``, ``.bias``, ``.running_mean``, ``.running_var``; the classifier is
``classifier.weight`` ([out, in]) and ``classifier.bias``. Kernels of two and four axes have
PyTorch's layout and are called ``weight``; any other array keeps our name and layout. What only the
local losses need is left out: no prediction takes it.
"""

import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from lls_jax.errors import UserError
from lls_jax.interop.layouts import TO_TORCH, Path, get, put, to_ours, to_torch, torch_shape
from lls_jax.models import Network
from lls_jax.rules import Backpropagation
from lls_jax.training import TrainState

_LEAVES = {"scale": "weight", "mean": "running_mean", "var": "running_var"}


class _Entry(NamedTuple):
    """An array of a state.

    Attributes:
        name: in a state dict.
        collection: ``"params"`` or ``"batch_stats"``.
        path: within it.
        transposed: whether the layouts differ.
    """

    name: str
    collection: str
    path: Path
    transposed: bool


def _name(prefix: str, path: Path, axes: int) -> tuple[str, bool]:
    *modules, leaf = ".".join(path).split(".")
    is_kernel = re.fullmatch(r"kernel(_\d+)?", leaf) is not None and axes in TO_TORCH
    if is_kernel:
        # Two kernels of one module, as `kernel_0` and `kernel_1`, are a convolution each.
        modules += ["conv" + leaf.removeprefix("kernel")] if leaf != "kernel" else []
        leaf = "weight"
    return ".".join([prefix, *modules, _LEAVES.get(leaf, leaf)]), is_kernel


def _entries(model: Network, variables: Mapping[str, Any]) -> Iterator[_Entry]:
    """Every array that a prediction takes."""
    for collection in ("params", "batch_stats"):
        for index, block in enumerate(model.block_names):
            own = variables[collection][block]["block"]
            for path, leaf in _leaves(own):
                named = _name(f"layers.{index}", path, leaf.ndim)
                yield _Entry(named[0], collection, (block, "block", *path), named[1])
    for path, leaf in _leaves(variables["params"]["classifier"]):
        # Of a dense layer it is all there is.
        short = path[1:] if path[0] == "linear" else path
        named = _name("classifier", short, leaf.ndim)
        yield _Entry(named[0], "params", ("classifier", *path), named[1])


def _leaves(tree: Any) -> Iterator[tuple[Path, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield tuple(str(entry.key) for entry in path), leaf


def to_state_dict(model: Network, state: TrainState) -> dict[str, np.ndarray]:
    """Weights and statistics as a PyTorch state dict.

    Args:
        model: the state's model.
        state: that is evaluated: ``fit(...).evaluation``, or of
            :func:`lls_jax.evaluation.evaluation_state` or :func:`lls_jax.evaluation.restore`.

    Returns:
        ``{name: array}``, names and layouts as the module says; ``torch.from_numpy`` on each value
        makes what a module's ``load_state_dict`` takes.
    """
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    result: dict[str, np.ndarray] = {}
    for name, collection, path, transposed in _entries(model, variables):
        array = np.asarray(get(variables[collection], path))
        result[name] = np.array(to_torch(array) if transposed else array, order="C")
        if name.endswith("running_var"):
            counter = name.replace("running_var", "num_batches_tracked")
            result[counter] = np.asarray(int(state.step), np.int64)
    return result


def from_state_dict(
    model: Network, state_dict: Mapping[str, np.ndarray], example_image: Any, step: int = 0
) -> TrainState:
    """The inverse of :func:`to_state_dict`, for evaluation.

    Args:
        model: the same architecture.
        state_dict: ``{name: array}``; ``num_batches_tracked`` is ignored.
        example_image: a batch ``[batch, height, width, channels]``; its shape counts.
        step: of the state.

    Returns:
        A state for :func:`lls_jax.training.predict` and :func:`lls_jax.evaluation.evaluate`; it has
        no optimizer state, and nothing of a rule.

    Raises:
        ValueError: entries are missing, unexpected or of another shape; the message lists them.
    """
    image = jnp.zeros(jnp.shape(example_image))
    params, batch_stats = jax.eval_shape(
        lambda key: model.init(Backpropagation(model.num_classes), key, image), jax.random.key(0)
    )
    expected = {"params": params, "batch_stats": batch_stats}
    variables: dict[str, dict[str, Any]] = {
        "params": {name: {"block": {}} for name in model.block_names},
        "batch_stats": {name: {"block": {}} for name in model.block_names},
    }
    problems, known = [], set()
    for name, collection, path, transposed in _entries(model, expected):
        known.add(name)
        if name not in state_dict:
            problems.append(f"{name} is missing")
            continue
        leaf, array = get(expected[collection], path), np.asarray(state_dict[name])
        array = to_ours(array) if transposed else array
        if array.shape != leaf.shape:
            theirs = torch_shape(leaf.shape) if transposed else leaf.shape
            problems.append(f"{name} has shape {state_dict[name].shape}, not {theirs}")
            continue
        put(variables[collection], path, jnp.array(array, leaf.dtype))
    extra = [n for n in state_dict if n not in known and not n.endswith("num_batches_tracked")]
    problems += [f"{name} is unexpected" for name in extra]
    if problems:
        raise ValueError(
            f"this state dict is not one of model {model.name!r}: " + "; ".join(problems)
        )
    return TrainState(jnp.int32(step), **variables, opt_state=None, key=jax.random.key(0))


def save_safetensors(
    path: str | pathlib.Path,
    model: Network,
    state: TrainState,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write weights and statistics to a safetensors file.

    Args:
        path: the file.
        model: the state's model.
        state: as of :func:`to_state_dict`.
        metadata: texts to keep with them.
    """
    texts = {"format": "pt", "step": str(int(state.step)), **(metadata or {})}
    safetensors.numpy.save_file(to_state_dict(model, state), path, metadata=texts)


def load_safetensors(path: str | pathlib.Path, model: Network, example_image: Any) -> TrainState:
    """Read what :func:`save_safetensors` has written, for evaluation.

    Args:
        path: the file.
        model: the same architecture.
        example_image: a batch ``[batch, height, width, channels]``; its shape counts.

    Raises:
        UserError: the file is not there, or is no safetensors file.
        ValueError: it is of another architecture; the message lists what does not fit.

    >>> import tempfile, optax
    >>> from lls_jax import models, rules, training
    >>> from lls_jax.blocks import DenseBlock
    >>> model = models.Network("dense", 3, (models.BlockSpec(DenseBlock(4), 4),))
    >>> image, key = jnp.ones((1, 8)), jax.random.key(0)
    >>> rule = rules.make("lls", num_classes=3)
    >>> state = training.create_train_state(model, rule, optax.sgd(0.1), key, image)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_safetensors(f"{folder}/model.safetensors", model, state)
    ...     again = load_safetensors(f"{folder}/model.safetensors", model, image)
    >>> logits = [training.predict(model, one, image) for one in (state, again)]
    >>> bool((logits[0] == logits[1]).all())
    True
    """
    try:
        with safe_open(path, "numpy") as file:
            step = int((file.metadata() or {}).get("step", 0))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a safetensors file ({error}); write it again with "
            "`python -m experiments.export`."
        ) from error
    return from_state_dict(model, arrays, example_image, step)
