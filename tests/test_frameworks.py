"""Blocks and whole models of Flax NNX and Equinox: the updates that Linen blocks make."""

import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from lls_jax import data, evaluation, fit, rules, training
from lls_jax.frameworks import nnx as local_nnx
from lls_jax.models import BlockSpec, Network
from lls_jax.steps.block import BlockOutput, local_update, start_block

eqx = pytest.importorskip("equinox")
from lls_jax.frameworks import equinox as local_eqx  # noqa: E402

RULE = rules.make("lls_mxm", num_classes=3)
MOMENTUM = 0.8


@pytest.fixture(autouse=True)
def users_defaults():
    """A user's program, under JAX's own defaults."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class NNXModel(nnx.Module):
    """Convolution, BatchNorm, ReLU, pooling; a convolution; a dense layer."""

    def __init__(self, rngs, dropout=0.0):
        self.conv1 = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(4, momentum=MOMENTUM, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.conv2 = nnx.Conv(4, 5, (3, 3), strides=2, padding=1, rngs=rngs)
        self.head = nnx.Linear(20, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norm1(self.conv1(x))), (2, 2), (2, 2))
        x = nnx.relu(self.conv2(self.dropout(x)))
        return self.head(x.reshape(x.shape[0], -1))


class EqxModel(eqx.Module):
    """The same, of one example with its channels first."""

    conv1: eqx.nn.Conv2d
    norm1: eqx.nn.BatchNorm
    pool: eqx.nn.MaxPool2d
    conv2: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self, key):
        self.conv1 = eqx.nn.Conv2d(2, 4, 3, padding=1, key=key)
        self.norm1 = eqx.nn.BatchNorm(4, "batch", momentum=MOMENTUM, mode="batch")
        self.pool = eqx.nn.MaxPool2d(2, 2)
        self.conv2 = eqx.nn.Conv2d(4, 5, 3, stride=2, padding=1, key=key)
        self.head = eqx.nn.Linear(20, 3, key=key)

    def __call__(self, x, state):
        x, state = self.norm1(self.conv1(x), state)
        x = jax.nn.relu(self.conv2(self.pool(jax.nn.relu(x))))
        return self.head(jnp.moveaxis(x, 0, -1).ravel()), state


class LinenFirst(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(4, (3, 3), name="conv1")(x)
        norm = nn.BatchNorm(not train, momentum=MOMENTUM, epsilon=1e-5, name="norm1")
        return nn.max_pool(nn.relu(norm(x)), (2, 2), (2, 2))


class LinenSecond(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(5, (3, 3), 2, padding=1, name="conv2")(x))
        return x.reshape(x.shape[0], -1)


X = jax.random.normal(jax.random.key(1), (6, 8, 8, 2))
BATCH = {"image": X, "label": jnp.arange(6) % 3}
LINEN = Network(
    "linen",
    3,
    (BlockSpec(LinenFirst(), 4), BlockSpec(LinenSecond(), 20)),
    classifier=nn.Dense(3),
)
TX = optax.sgd(0.1, momentum=0.9)


def linen_params(params):
    """A localized state's parameters in the Linen blocks' names and layouts."""
    named = {}
    for block in params.values():
        named |= block.get("block", block)
    layers = {name: {} for name in ("conv1", "norm1", "conv2", "head")}
    for name, value in named.items():
        layer, leaf = name.split(".")
        leaf = {"weight": "scale" if layer == "norm1" else "kernel"}.get(leaf, leaf)
        if leaf == "kernel" and name.endswith("weight"):
            value = value.transpose((2, 3, 1, 0)) if value.ndim == 4 else value.T
        # Equinox keeps a convolution's bias with axes of length 1 behind.
        layers[layer][leaf] = value.ravel() if leaf == "bias" else value
    blocks = [{"conv1": layers["conv1"], "norm1": layers["norm1"]}, {"conv2": layers["conv2"]}]
    ours = {
        f"block_{i}": {"block": own, "rule": params[f"block_{i}"]["rule"]}
        for i, own in enumerate(blocks)
    }
    return {**ours, "classifier": layers["head"]}


def nnx_case():
    network = local_nnx.localize(
        NNXModel(nnx.Rngs(0)), X[:1], cut_at=["head", "conv2"], pool_size=[4, 20]
    )

    def running(model):
        return model.norm1.mean[...], model.norm1.var[...]

    def predict(model, x):
        model.eval()
        return model(x)

    return network, running, predict


def eqx_case():
    model, state = eqx.nn.make_with_state(EqxModel)(jax.random.key(0))
    network = local_eqx.localize(
        model, X[:1], state=state, cut_at=["conv2", "head"], pool_size=[4, 20]
    )

    def running(both):
        return both[1].get(both[0].norm1.batch_state_index)

    def predict(both, x):
        model, state = eqx.nn.inference_mode(both[0]), both[1]
        mapped = jax.vmap(lambda x: model(x, state)[0], axis_name="batch")
        return mapped(jnp.moveaxis(x, -1, 1))

    return network, running, predict


@pytest.mark.parametrize("case", [nnx_case, eqx_case])
def test_a_localized_model_learns_as_the_same_weights_in_linen_blocks(case):
    network, running, predict = case()
    state = training.create_train_state(network, RULE, TX, jax.random.key(2), X)
    ours = linen_params(state.params)
    fresh = LINEN.init(RULE, jax.random.key(0), X)[1]
    linen = training.state_from_variables(RULE, TX, jax.random.key(3), ours, fresh)
    step = training.make_train_step(network, RULE, TX, donate=False)
    linen_step = training.make_train_step(LINEN, RULE, TX, donate=False)
    for _ in range(3):
        state, metrics = step(state, BATCH)
        linen, expected = linen_step(linen, BATCH)
        for name in ("layer_loss", "loss", "logits"):
            np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4, atol=1e-5)
    ours = linen_params(state.params)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours, linen.params
    )
    model = network.to_model(state)
    stats = linen.batch_stats["block_0"]["block"]["norm1"]
    np.testing.assert_allclose(running(model)[0], stats["mean"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(running(model)[1], stats["var"], rtol=1e-4)
    logits = training.predict(network, state, X)
    np.testing.assert_allclose(predict(model, X), logits, rtol=1e-4, atol=1e-5)


def test_no_loss_of_a_localized_model_has_a_gradient_in_another_block():
    network, _, _ = nnx_case()
    first = training.create_train_state(network, RULE, TX, jax.random.key(2), X)
    step = training.make_train_step(network, RULE, TX, donate=False)

    def losses(params):
        return step(first._replace(params=params), BATCH)[1]["layer_loss"]

    taught = jax.jit(jax.jacrev(losses))(first.params)
    for i in range(2):
        for j in range(2):
            largest = max(
                float(jnp.abs(leaf[i]).max()) for leaf in jax.tree.leaves(taught[f"block_{j}"])
            )
            assert (largest > 0) == (i == j), (i, j, largest)


def test_statistics_are_estimated_anew_whatever_the_framework_counts():
    """Equinox divides its averages by ``1 - momentum**count``; after few steps that is not 1."""
    network, _, _ = eqx_case()
    params, stats = network.init(RULE, jax.random.key(2), X)
    _, stats = jax.jit(functools.partial(network.apply, train=True))(params, stats, 3 * X)
    stats = evaluation.estimate_batch_stats(network, params, stats, [X])
    state = training.TrainState(jnp.int32(1), params, stats, None, jax.random.key(0))
    model, kept = network.to_model(state)
    conv = jax.vmap(model.conv1)(jnp.moveaxis(X, -1, 1))
    count = kept.get(model.norm1.batch_counter)
    hidden, _ = kept.get(model.norm1.batch_state_index)
    mean = hidden / (1 - MOMENTUM**count)
    np.testing.assert_allclose(mean, conv.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


class Odd(nnx.Module):
    """What cannot be cut, each at another place."""

    def __init__(self, rngs, kind):
        self.kind = kind
        self.a, self.b, self.c = (nnx.Linear(8, 8, rngs=rngs) for _ in range(3))
        self.d = nnx.Linear(8, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.a(x)
        if self.kind == "skip":
            x = x + self.b(x)
        if self.kind == "twice":
            x = self.b(self.b(x))
        if self.kind == "shared":
            x = self.b(x) @ self.a.kernel[...]
        if self.kind == "branches":
            x = self.b(x) + self.c(x)
        if self.kind == "state":
            x = self.norm(self.b(x))
        if self.kind == "dropout":
            x = self.dropout(self.b(x))
        if self.kind == "none":
            x = self.b(x)
        return x if self.kind == "wide" else self.d(x)


@pytest.mark.parametrize(
    ("kind", "cut_at", "message"),
    [
        ("skip", ["b"], r"the output depends on the model's input and on 'b' at once: a path"),
        ("twice", ["b"], r"module 'b' is called more than once"),
        ("shared", ["b"], r"parameter 'a.kernel' belongs to two blocks"),
        ("branches", ["b", "c"], r"do not follow each other|depends on 'b' and on 'c' at once"),
        ("state", ["b"], r"last cut, 'b', keeps norm.mean, norm.var; it is the classifier"),
        ("dropout", ["b"], r"last cut, 'b', draws dropout"),
        ("none", ["c"], r"names 'c', which the forward pass does not call"),
        ("none", ["b.x"], r"'b.x', and a Linear has no 'x'; it has .*kernel"),
        ("none", ["b.kernel"], r"'b.kernel', which is a Param, no module"),
        ("none", [], r"`cut_at` is \[\]; expected different names"),
        ("none", ["b", "b"], r"expected different names"),
    ],
)
def test_what_cannot_be_cut_is_named(kind, cut_at, message):
    with pytest.raises(ValueError, match=message):
        local_nnx.localize(Odd(nnx.Rngs(0), kind), jnp.ones((1, 8)), cut_at=cut_at)


def test_wrong_sizes_and_names_are_named():
    network, _, _ = nnx_case()
    with pytest.raises(ValueError, match=r"cut to take \[batch, 8, 8, 2\]"):
        training.create_train_state(network, RULE, TX, jax.random.key(0), jnp.ones((1, 9, 9, 2)))
    model = NNXModel(nnx.Rngs(0))
    with pytest.raises(ValueError, match="3 sizes for 2 blocks"):
        local_nnx.localize(model, X[:1], cut_at=["conv2", "head"], pool_size=[1, 2, 3])
    for size in (0, 1.5):
        with pytest.raises(ValueError, match=f"`pool_size` is {size}; it must be a whole number"):
            local_nnx.localize(model, X[:1], cut_at=["conv2", "head"], pool_size=size)
    mlp = eqx.nn.MLP(4, 3, 8, 2, key=jax.random.key(0))
    numpy = local_eqx.localize(
        mlp, jnp.ones((1, 4)), cut_at=["layers.1", "layers.2"], pool_size=np.int64(4)
    )
    assert [repr(spec.pool_size) for spec in numpy.specs] == ["4", "4"]
    for name in ("layers.7", "nothing", "layers.x"):
        with pytest.raises(ValueError, match=f"has '{name}', and a MLP has no such module"):
            local_eqx.localize(mlp, jnp.ones((1, 4)), cut_at=[name])


def test_a_run_of_a_localized_model_resumes_to_the_bit_and_is_restored(tmp_path):
    """BatchNorm's statistics and dropout's keys too, through Orbax."""
    split = data.load(data.get_spec("digits"), "train", pathlib.Path())
    images = np.concatenate([split.images[:64]] * 2, axis=-1)
    examples = (images, (split.labels[:64] % 3).astype(np.int32))
    seeds = iter(range(9))

    def run(folder, epochs):
        # Another process draws other weights; a checkpoint's stand.
        model = NNXModel(nnx.Rngs(0 if folder == "whole" else next(seeds)), dropout=0.3)
        network = local_nnx.localize(model, X[:1], cut_at=["conv2", "head"])
        made = {"train": examples, "test": examples, "batch_size": 16}
        workdir = tmp_path / folder
        return network, fit(network, RULE, TX, **made, epochs=epochs, workdir=workdir)

    _, whole = run("whole", 2)
    run("parts", 1)
    network, parts = run("parts", 2)
    jax.tree.map(np.testing.assert_array_equal, whole.evaluation[1:3], parts.evaluation[1:3])
    losses = [record["layer_loss"] for record in whole.records]
    assert (np.array(losses[1]) < losses[0]).all()
    restored = evaluation.restore(tmp_path / "parts", network, RULE, X[:1], "last").state
    accuracy = evaluation.evaluate(network, restored, examples, spec=parts.spec).accuracy
    assert accuracy == parts.records[-1]["test_accuracy"]
    variables = restored.params, restored.batch_stats

    @jax.jit
    def dropped(seed):
        key = jax.random.key(seed)
        return network.apply(*variables, X, train=True, dropout_key=key)[0]

    np.testing.assert_array_equal(dropped(1), dropped(1))
    assert (dropped(1) != dropped(2)).any()
    model = network.to_model(restored)
    model.eval()
    np.testing.assert_allclose(
        model(X), training.predict(network, restored, X), rtol=1e-5, atol=1e-5
    )


# A rule with a fixed matrix beside what it learns.
FIXED = rules.make("lls_m_random", num_classes=3)


def plain_updates(weights, x, labels):
    """Two updates of ``relu(x @ w + b)`` by the framework-free function; the oracle."""

    def apply(params, batch_stats, x, key):
        return BlockOutput(jax.nn.relu(x @ params["w"] + params["b"]))

    decayed = optax.adamw(0.05, weight_decay=0.1)
    state = start_block(FIXED, decayed, jax.random.key(0), weights[0], (8,), 8)
    state = state._replace(params={"block": weights[0], "rule": weights[1]})
    update = jax.jit(local_update(apply, FIXED, decayed, pool_size=8))
    losses = []
    for _ in range(2):
        state, loss, activation = update(state, x, labels)
        losses.append(loss)
    return decayed, losses, activation, state.params


def same(ours, theirs):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ours, theirs)


def saved_and_restored(folder, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", jax.tree.map(jnp.zeros_like, tree))


def test_an_nnx_block_is_updated_as_plain_arrays_are(tmp_path):
    x, labels = jax.random.normal(jax.random.key(4), (6, 5)), BATCH["label"]
    rngs = nnx.Rngs(0)
    layer = nnx.Sequential(nnx.Linear(5, 8, rngs=rngs), nnx.relu)
    block = local_nnx.LocalBlock(layer, x, rule=FIXED, pool_size=8, rngs=rngs)

    def arrays():
        linear = block.block.layers[0]
        own = {"w": linear.kernel[...], "b": linear.bias[...]}
        rule = {**block.rule_params, **block.rule_fixed}
        return jax.tree.map(jnp.copy, (own, {name: one[...] for name, one in rule.items()}))

    before = arrays()
    tx, losses, activation, params = plain_updates(before, x, labels)
    optimizer = nnx.Optimizer(block, tx, wrt=nnx.Param)
    ours = [local_nnx.update(block, optimizer, x, labels) for _ in range(2)]
    same([loss for loss, _ in ours], losses)
    same((ours[-1][1], arrays()), (activation, (params["block"], params["rule"])))
    np.testing.assert_array_equal(arrays()[1]["feedback"], before[1]["feedback"])
    assert block(x).shape == (6, 8)
    # Optimizers that are told the loss, and those that are told no more than they ask for.
    plain = optax.GradientTransformation(*optax.sgd(0.1))
    for own in (optax.chain(plain, optax.contrib.reduce_on_plateau()), plain):
        told = nnx.Optimizer(block, own, wrt=nnx.Param)
        assert np.isfinite(local_nnx.update(block, told, x, labels)[0])
    state = nnx.to_pure_dict(nnx.state(block))
    same(saved_and_restored(tmp_path, state), state)

    def above(params, rest, graph):
        lower = nnx.merge(graph, params, rest)
        return block(jnp.tile(lower(x)[:, :5], 1), labels)[1]

    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    gradient = jax.grad(above)(params, rest, graph)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_an_equinox_block_is_updated_as_plain_arrays_are(tmp_path):
    x, labels = jax.random.normal(jax.random.key(4), (6, 5)), BATCH["label"]
    linear = eqx.nn.Linear(5, 8, key=jax.random.key(0))
    layer = eqx.nn.Sequential([linear, eqx.nn.Lambda(jax.nn.relu)])
    block = local_eqx.LocalBlock(layer, x, rule=FIXED, pool_size=8, key=jax.random.key(1))

    def arrays(block):
        linear = block.block.layers[0]
        return {"w": linear.weight.T, "b": linear.bias}, {**block.rule_params, **block.rule_fixed}

    tx, losses, activation, params = plain_updates(arrays(block), x, labels)
    learner, ours = local_eqx.start(block, tx), []
    for _ in range(2):
        learner, loss, seen = local_eqx.update(learner, tx, x, labels)
        ours.append(loss)
    same(ours, losses)
    same((seen, arrays(learner.block)), (activation, (params["block"], params["rule"])))
    np.testing.assert_array_equal(
        learner.block.rule_fixed["feedback"], block.rule_fixed["feedback"]
    )
    saved = jax.tree.leaves(eqx.filter(learner, eqx.is_array))
    same(saved_and_restored(tmp_path, saved), saved)


def test_an_equinox_block_keeps_its_state_and_pools_images():
    key, labels = jax.random.key(0), BATCH["label"]
    x = jnp.moveaxis(X, -1, 1)
    make = eqx.nn.make_with_state(
        lambda: eqx.nn.Sequential(
            [
                eqx.nn.Conv2d(2, 4, 3, padding=1, key=key),
                eqx.nn.BatchNorm(4, "batch", momentum=MOMENTUM, mode="batch"),
                eqx.nn.Dropout(0.1),
            ]
        )
    )
    layer, state = make()
    block = local_eqx.LocalBlock(layer, x, rule=RULE, pool_size=2, key=key, state=state)
    assert block.rule_params["modulation"].shape == (3, 3)
    learner, loss, activation = local_eqx.update(
        local_eqx.start(block, optax.sgd(0.1), state), optax.sgd(0.1), x, labels, key
    )
    params = {**block.rule_params, **block.rule_fixed}
    expected = RULE.loss(params, jnp.moveaxis(activation, 1, -1), labels, pool_size=2)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    norm = learner.block.block.layers[1]
    conv = jax.vmap(layer.layers[0])(x)
    hidden = learner.state.get(norm.batch_state_index)[0]
    np.testing.assert_allclose(hidden, (1 - MOMENTUM) * conv.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)


def test_equinox_is_asked_for_where_it_is_missing(monkeypatch):
    import importlib
    import sys

    for name in [name for name in sys.modules if name.startswith("lls_jax.frameworks.equinox")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "equinox", None)
    with pytest.raises(ImportError, match="pip install equinox"):
        importlib.import_module("lls_jax.frameworks.equinox")
