"""A whole Equinox model cut into blocks that learn from local losses."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from lls_jax.frameworks.cutting import CutModel
from lls_jax.frameworks.equinox.block import (
    BATCH,
    Call,
    call_example,
    channels_first,
    channels_last,
)
from lls_jax.frameworks.network import LocalizedNetwork, make_network
from lls_jax.frameworks.tracing import Arrays, Cuts


def _set_mode(model: Any, train: bool, draws: bool) -> Any:
    """A model whose BatchNorms train or not, and whose other layers (dropout) draw or not."""

    def is_norm(node: Any) -> bool:
        return isinstance(node, eqx.nn.BatchNorm)

    def of(node: Any) -> Any:
        return eqx.nn.inference_mode(node, value=not (train if is_norm(node) else draws))

    return jax.tree.map(of, eqx.nn.inference_mode(model, value=not draws), is_leaf=is_norm)


def _norms(model: Any) -> list[Any]:
    nodes = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, eqx.nn.BatchNorm))
    return [node for node in nodes if isinstance(node, eqx.nn.BatchNorm)]


def _rescale(model: Any, state: Any, change: Callable[[jax.Array, jax.Array], jax.Array]) -> Any:
    """A state whose running averages are ``change(average, scale)``.

    BatchNorm's mode ``batch`` keeps ``scale = 1 - momentum**count`` times the average. Here it is
    the average itself, so that an average that comes from elsewhere needs no count.
    """
    for norm in _norms(model):
        if norm.mode == "batch":
            count = state.get(norm.batch_counter)
            scale = jnp.where(count == 0, 1.0, 1.0 - norm.momentum ** count.astype(jnp.float32))
            averages = state.get(norm.batch_state_index)
            changed = tuple(change(average, scale) for average in averages)
            state = state.set(norm.batch_state_index, changed)
    return state


class _Intercepted(eqx.nn.StatefulLayer):
    """Stands in a module's place: what it is called with goes through the cut."""

    inner: Any
    through: Callable[[Any], Any] = eqx.field(static=True)

    def is_stateful(self) -> bool:
        return isinstance(self.inner, eqx.nn.StatefulLayer) and self.inner.is_stateful()

    def __call__(self, x: Any, *args: Any, **options: Any) -> Any:
        return self.inner(self.through(x), *args, **options)

    def __getattr__(self, name: str) -> Any:
        # A forward pass may read the module's attributes, its number of features for instance.
        if name.startswith("__") or "inner" not in vars(self):
            raise AttributeError(name)
        return getattr(self.inner, name)


def _at(model: Any, name: str) -> Any:
    for key in name.split("."):
        model = model[int(key)] if isinstance(model, list | tuple) else vars(model)[key]
    return model


def _check_names(model: Any, names: Sequence[str]) -> None:
    for name in names:
        try:
            found = _at(model, name)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise ValueError(
                f"`cut_at` has {name!r}, and a {type(model).__name__} has no such module; it has "
                f"{', '.join(vars(model))}, and elements of a list are 'layers.0', 'layers.1', ..."
            ) from error
        if not callable(found):
            raise ValueError(
                f"`cut_at` has {name!r}, which is a {type(found).__name__}, no module."
            )


def localize(
    model: Any,
    example: jax.Array | jax.ShapeDtypeStruct,
    *,
    cut_at: Sequence[str],
    state: Any = None,
    pool_size: int | Sequence[int] | None = None,
    call: Call = call_example,
    axis_name: str = BATCH,
) -> LocalizedNetwork:
    """An existing Equinox model as a network whose blocks learn from local losses.

    A block begins at each named module; what follows the last one is the classifier. How, and why
    so: :mod:`lls_jax.frameworks.cutting`. The weights of the model are where training starts.

    Args:
        model: any Equinox model of one example; its forward pass may be any Python.
        example: a batch as the data have it, ``[batch, height, width, channels]`` or ``[batch,
            ...]``; its shape and dtype count. The model gets images with their channels first.
        cut_at: where blocks begin: modules, or functions in a list of layers, by their path in the
            model (``"conv2"``, ``"layers.3"``), each called once in a forward pass. What comes in
            there is the activation of the block before, which its loss sees.
        state: of the model, from ``eqx.nn.make_with_state``; None for none.
        pool_size: of all blocks' losses or of each; None: 4 bins along the axes of images and
            sequences, of vectors all features up to 2048.
        call: ``call(model, x, state, key) -> (output, state)`` of one example; left out, it is
            ``model(x)`` or ``model(x, state)``, with `key` where its ``__call__`` has that.
        axis_name: that the model's BatchNorms are made with.

    Returns:
        A :class:`lls_jax.models.Network`: for :func:`lls_jax.fit`,
        :func:`lls_jax.training.make_train_step` and the rest; its ``to_model(state)`` is the
        Equinox model again, or with state both. Floating-point arrays are learned; other arrays
        stay; the model's state is kept as BatchNorm's statistics are. Of a schedule-free
        optimizer's weights they are estimated anew, which takes BatchNorms of ``mode="batch"``:
        with ``"ema"`` they are part of the training pass itself.

    Raises:
        ValueError: the model cannot be cut there; the message says why.

    >>> import equinox as eqx, jax
    >>> mlp = eqx.nn.MLP(8, 3, width_size=16, depth=2, key=jax.random.key(0))
    >>> network = localize(mlp, jnp.ones((1, 8)), cut_at=["layers.1", "layers.2"])
    >>> network.cut.parts[1].params
    ('layers.1.bias', 'layers.1.weight')
    """
    _check_names(model, cut_at)
    learned, rest = eqx.partition(model, eqx.is_inexact_array)
    leaves, tree = jax.tree_util.tree_flatten_with_path(learned)
    params = {
        jax.tree_util.keystr(path, simple=True, separator="."): jnp.asarray(leaf)
        for path, leaf in leaves
    }
    kept, kept_tree = jax.tree.flatten(state)
    # A copy: a state that was changed cannot be read again.
    own = _rescale(model, jax.tree.unflatten(kept_tree, kept), jnp.divide)
    kept = jax.tree.leaves(own)
    names = [f"state.{i}" for i in range(len(kept))]

    def model_of(params: Arrays, paths: Sequence[str] = tuple(params)) -> Any:
        return eqx.combine(jax.tree.unflatten(tree, [params[path] for path in paths]), rest)

    def state_of(state: Arrays) -> Any:
        averages = jax.tree.unflatten(kept_tree, [state[name] for name in names])
        return _rescale(model, averages, jnp.multiply)

    def rebuild(params: Arrays, own: Arrays) -> Any:
        return model_of(params) if state is None else (model_of(params), state_of(own))

    def run(
        params: Arrays,
        state: Arrays,
        x: jax.Array,
        key: jax.Array | None,
        train: bool,
        given: Mapping[str, jax.Array],
    ) -> tuple[Arrays, jax.Array, Arrays]:
        whole = _set_mode(model_of(params), train, key is not None)
        before = state_of(state)

        def one(x: jax.Array, key: jax.Array | None, given: Mapping[str, jax.Array]) -> Any:
            cuts = Cuts(given)
            stand_ins = [
                _Intercepted(_at(whole, name), functools.partial(cuts, name)) for name in cut_at
            ]
            cut = eqx.tree_at(lambda tree: [_at(tree, name) for name in cut_at], whole, stand_ins)
            output, after = call(cut, x, before, key)
            return cuts.seen, output, after

        keys = None if key is None else jax.random.split(key, x.shape[0])
        inputs = (channels_first(x), keys, {n: channels_first(v) for n, v in given.items()})
        mapped = jax.vmap(one, out_axes=(0, 0, None), axis_name=axis_name)
        seen, output, after = mapped(*inputs)
        last = {name: channels_last(value) for name, value in seen.items()}
        after = jax.tree.leaves(_rescale(model, after, jnp.divide))
        return last, output, dict(zip(names, after))

    one = jax.ShapeDtypeStruct(example.shape[1:], example.dtype)
    title = type(model).__name__
    cut = CutModel(run, params, dict(zip(names, kept)), one, cut_at, title)
    return make_network(cut, rebuild, pool_size)
