"""A whole Flax NNX model cut into blocks that learn from local losses."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lls_jax.frameworks.cutting import CutModel
from lls_jax.frameworks.network import LocalizedNetwork, make_network
from lls_jax.frameworks.tracing import Arrays, Cuts

Call = Callable[[Any, jax.Array, nnx.Rngs], jax.Array]


def _call(model: Any, x: jax.Array, rngs: nnx.Rngs) -> jax.Array:
    takes_rngs = "rngs" in inspect.signature(type(model).__call__).parameters
    logits: jax.Array = model(x, rngs=rngs) if takes_rngs else model(x)
    return logits


class _Intercepted:
    """Stands in a module's place: what it is called with goes through the cut."""

    def __init__(self, inner: Callable[..., Any], through: Callable[[Any], Any]) -> None:
        self._inner, self._through = inner, through
        self.__signature__ = inspect.signature(inner)

    def __call__(self, x: Any, *args: Any, **options: Any) -> Any:
        return self._inner(self._through(x), *args, **options)

    def __getattr__(self, name: str) -> Any:
        # A forward pass may read the module's attributes, its number of features for instance.
        return getattr(self._inner, name)


@contextmanager
def _intercept(model: nnx.Module, names: Sequence[str], cuts: Cuts) -> Iterator[None]:
    """A model whose named modules go through the cuts."""
    places = [(vars(_at(model, name.split(".")[:-1])), name.split(".")[-1]) for name in names]
    originals = [attributes[last] for attributes, last in places]
    for (attributes, last), name, inner in zip(places, names, originals):
        attributes[last] = _Intercepted(inner, functools.partial(cuts, name))
    try:
        yield
    finally:
        for (attributes, last), inner in zip(places, originals):
            attributes[last] = inner


def _at(model: Any, path: Sequence[str]) -> Any:
    for key in path:
        model = vars(model)[key]
    return model


def _check_names(model: nnx.Module, names: Sequence[str]) -> None:
    for name in names:
        at: Any = model
        for key in name.split("."):
            if not isinstance(at, nnx.Module) or key not in vars(at):
                known = [own for own in vars(at) if not own.startswith("_")]
                raise ValueError(
                    f"`cut_at` has {name!r}, and a {type(at).__name__} has no {key!r}; it has "
                    f"{', '.join(known)}."
                )
            at = vars(at)[key]
        if isinstance(at, nnx.Variable) or not callable(at):
            raise ValueError(f"`cut_at` has {name!r}, which is a {type(at).__name__}, no module.")


class _Flat:
    """A state as arrays by their path in the model, joined by dots, and back."""

    def __init__(self, state: Any) -> None:
        leaves, self._tree = jax.tree_util.tree_flatten_with_path(state)
        self.arrays: Arrays = {
            jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf
            for path, leaf in leaves
        }

    def state(self, arrays: Mapping[str, jax.Array]) -> Any:
        return jax.tree.unflatten(self._tree, [arrays[name] for name in self.arrays])


def localize(
    model: nnx.Module,
    example: jax.Array | jax.ShapeDtypeStruct,
    *,
    cut_at: Sequence[str],
    pool_size: int | Sequence[int] | None = None,
    call: Call = _call,
) -> LocalizedNetwork:
    """An existing NNX model as a network whose blocks learn from local losses.

    A block begins at each named module; what follows the last one is the classifier. How, and why
    so: :mod:`lls_jax.frameworks.cutting`. The model itself is not changed; its weights are where
    training starts.

    Args:
        model: any NNX model; its forward pass may be any Python.
        example: a batch that it takes, ``[batch, ...]``; its shape and dtype count.
        cut_at: where blocks begin: modules, or other attributes that are called, by their path in
            the model (``"conv2"``, ``"layers.3"``), each called once in a forward pass. What comes
            in there is the activation of the block before, which its loss sees.
        pool_size: of all blocks' losses or of each; None: 4 bins along the axes of images and
            sequences, of vectors all features up to 2048.
        call: ``call(model, x, rngs) -> logits [batch, classes]``; left out, it is ``model(x)``, or
            ``model(x, rngs=rngs)`` where its ``__call__`` has `rngs`. Whether dropout and BatchNorm
            train is set on the model, as its ``train()`` and ``eval()`` do.

    Returns:
        A :class:`lls_jax.models.Network`: for :func:`lls_jax.fit`,
        :func:`lls_jax.training.make_train_step` and the rest; its ``to_model(state)`` is an NNX
        model again. Variables that are no ``nnx.Param`` are kept as BatchNorm's statistics are;
        random streams are drawn anew from the run's key in each step.

    Raises:
        ValueError: the model cannot be cut there; the message says why.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> rngs = nnx.Rngs(0)
    >>> layers = [nnx.Linear(8, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs)]
    >>> network = localize(nnx.Sequential(*layers), jnp.ones((1, 8)), cut_at=["layers.2"])
    >>> network.cut.parts[0].params
    ('layers.0.bias', 'layers.0.kernel')
    """
    _check_names(model, cut_at)
    graph, *states = nnx.split(model, nnx.Param, nnx.RngState, ...)
    learned, random, kept = map(_Flat, states)

    def rebuild(params: Arrays, state: Arrays, drawn: Arrays = random.arrays) -> nnx.Module:
        own = learned.state(params), random.state(drawn), kept.state(state)
        return nnx.merge(graph, *own)

    def run(
        params: Arrays,
        state: Arrays,
        x: jax.Array,
        key: jax.Array | None,
        train: bool,
        given: Mapping[str, jax.Array],
    ) -> tuple[Arrays, jax.Array, Arrays]:
        whole = rebuild(params, state, random.arrays if key is None else _seed(random.arrays, key))
        whole.set_attributes(
            deterministic=key is None, use_running_average=not train, raise_if_not_found=False
        )
        cuts = Cuts(given)
        rngs = nnx.Rngs(0 if key is None else jax.random.fold_in(key, len(random.arrays)))
        with _intercept(whole, cut_at, cuts):
            output = call(whole, x, rngs)
        new = _Flat(nnx.state(whole)).arrays
        return cuts.seen, output, {name: new[name] for name in state}

    one = jax.ShapeDtypeStruct(example.shape[1:], example.dtype)
    title = type(model).__name__
    cut = CutModel(run, learned.arrays, kept.arrays, one, cut_at, title)
    return make_network(cut, rebuild, pool_size)


def _seed(streams: Arrays, key: jax.Array) -> Arrays:
    """A model's random streams, counted from 0 and with keys drawn from one."""
    return {
        name: jax.random.fold_in(key, i)
        if jnp.issubdtype(stream.dtype, jax.dtypes.prng_key)
        else jnp.zeros_like(stream)
        for i, (name, stream) in enumerate(streams.items())
    }
