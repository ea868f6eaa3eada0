"""What is judged: statistics of anybody's blocks, and what counts as a right answer."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from seeds import random_generator

from lls_jax import evaluation, rules, training
from lls_jax.blocks import DenseBlock, LocalBlock
from lls_jax.models import BlockSpec, Network
from lls_jax.optimizers import schedule_free_adamw
from lls_jax.runs import checkpoints
from lls_jax.runs.evaluate import correct_within

CLASSES = 4


class OwnBlock(nn.Module):
    """A dense layer and Flax's own BatchNorm, with its default momentum or another."""

    momentum: float

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dense(6)(x)
        count = self.variable("batch_stats", "count", lambda: jnp.int32(0))
        if train and not self.is_initializing():
            count.value = count.value + 1
        return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(x))


class Untrained(nn.Module):
    """No parameters, no statistics, no `train`."""

    def __call__(self, x):
        return jnp.tanh(x)


def learn(model, image, steps=3):
    """A trained state, and the rule it was trained with."""
    rule, tx = rules.make("lls", num_classes=CLASSES), schedule_free_adamw(1e-2)
    state = training.create_train_state(model, rule, tx, jax.random.key(0), image)
    step = training.make_train_step(model, rule, tx)
    first = None
    for _ in range(steps):
        state, metrics = step(state, {"image": image, "label": jnp.arange(len(image)) % CLASSES})
        first = metrics["loss"] if first is None else first
    assert metrics["loss"] < first
    return state


@pytest.mark.parametrize("momentum", [0.99, 0.5])
def test_statistics_are_estimated_whatever_the_momentum(momentum):
    rng = random_generator()
    model = Network("own", CLASSES, (BlockSpec(OwnBlock(momentum), pool_size=6),))
    images = [jnp.asarray(rng.normal(3.0, 2.0, (16, 5)), jnp.float32) for _ in range(3)]
    state = learn(model, images[0])
    judged = evaluation.evaluation_state(model, state, images)
    dense = judged.params["block_0"]["block"]["Dense_0"]
    outputs = [np.asarray(x @ dense["kernel"] + dense["bias"][None]) for x in images]
    stats = judged.batch_stats["block_0"]["block"]
    norm = stats["BatchNorm_0"]
    np.testing.assert_allclose(norm["mean"], np.mean([x.mean(0) for x in outputs], 0), atol=1e-4)
    np.testing.assert_allclose(norm["var"], np.mean([x.var(0) for x in outputs], 0), rtol=1e-3)
    # What is no average stays.
    assert stats["count"] == 3
    # An iterator that has given all it had leaves statistics of other weights.
    with pytest.raises(ValueError, match="`images` has no batch"):
        evaluation.evaluation_state(model, state, iter([]))


def test_without_statistics_no_image_is_needed():
    model = Network("dense", CLASSES, (BlockSpec(nn.Dense(6), pool_size=6),))
    rule, tx = rules.make("lls", num_classes=CLASSES), schedule_free_adamw(1e-2)
    state = training.create_train_state(model, rule, tx, jax.random.key(0), jnp.ones((1, 5)))
    assert evaluation.evaluation_state(model, state, []).batch_stats == state.batch_stats


def test_blocks_need_no_statistics_no_parameters_and_no_train(tmp_path):
    """Flax's own convolution, a block without parameters, and one with BatchNorm."""
    specs = (
        BlockSpec(nn.Conv(4, (3, 3)), pool_size=2),
        BlockSpec(Untrained(), pool_size=2, average_pool=2, flatten=True),
        BlockSpec(DenseBlock(6), pool_size=6),
    )
    model = Network("plain", CLASSES, specs)
    image = jax.random.normal(jax.random.key(1), (8, 6, 6, 2))
    state = learn(model, image)
    assert state.batch_stats["block_0"] == {"block": {}} == state.params["block_1"]
    judged = evaluation.evaluation_state(model, state, [image])
    assert np.isfinite(training.predict(model, judged, image)).all()
    with checkpoints.open_checkpoints(tmp_path) as manager:
        tree = {"state": state._asdict()}
        variables = {"params": judged.params, "batch_stats": judged.batch_stats}
        checkpoints.save(manager, checkpoints.Checkpoint(3, tree, variables, {}))
        restored, _ = checkpoints.restore_training(manager, 3, tree)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    for name, tx in (("bp", optax.sgd(0.1)), ("dfa", optax.sgd(0.1))):
        rule = rules.make(name, num_classes=CLASSES)
        other = training.create_train_state(model, rule, tx, jax.random.key(0), image)
        batch = {"image": image, "label": jnp.arange(8) % CLASSES}
        _, metrics = training.make_train_step(model, rule, tx)(other, batch)
        assert np.isfinite(metrics["loss"])


class Dropping(nn.Module):
    """Dropout, then a normalisation of what is left."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(6)(nn.BatchNorm(use_running_average=not train)(x))


def test_statistics_are_estimated_with_dropout():
    """What is left of ones is 0 or 2, of variance 1; in evaluation nothing is dropped."""
    model = Network("dropping", CLASSES, (BlockSpec(Dropping(), pool_size=6),))
    image = jnp.ones((400, 5))
    rule, tx = rules.make("lls", num_classes=CLASSES), schedule_free_adamw(1e-2)
    state = training.create_train_state(model, rule, tx, jax.random.key(0), image)
    judged = evaluation.evaluation_state(model, state, [image] * 3)
    norm = judged.batch_stats["block_0"]["block"]["BatchNorm_0"]
    for name in ("mean", "var"):
        np.testing.assert_allclose(norm[name], 1, atol=0.15)
    again = evaluation.evaluation_state(model, state, [image] * 3)
    jax.tree.map(np.testing.assert_array_equal, judged.batch_stats, again.batch_stats)
    # Of each batch its own.
    one = evaluation.evaluation_state(model, state, [image])
    assert np.any(one.batch_stats["block_0"]["block"]["BatchNorm_0"]["mean"] != norm["mean"])
    # Training goes on with what it had: a step takes the memory of the state that it is given.
    batch = {"image": image, "label": jnp.zeros(len(image), jnp.int32)}
    training.make_train_step(model, rule, tx)(state, batch)
    assert int(one.step) == 0 and jax.random.key_data(one.key).shape


@pytest.mark.parametrize("rule_name", ["dfa", "drtp", "bp", "lls"])
def test_dropout_inside_a_block_and_a_group_draws_in_each_step(rule_name):
    rule, tx = rules.make(rule_name, num_classes=CLASSES), optax.sgd(0.0)
    dropping = BlockSpec(Dropping(), pool_size=6)
    grouped = (BlockSpec(DenseBlock(6), 6, dropout=0.5), BlockSpec(DenseBlock(6), 6))
    for specs in ((dropping,), grouped):
        model = Network("dropping", CLASSES, specs).grouped((len(specs),))
        image = jax.random.normal(jax.random.key(1), (8, 5))
        state = training.create_train_state(model, rule, tx, jax.random.key(0), image)
        step = training.make_train_step(model, rule, tx)
        batch = {"image": image, "label": jnp.arange(8) % CLASSES}
        state, first = step(state, batch)
        _, second = step(state, batch)
        assert np.any(first["logits"] != second["logits"])


def test_a_convolution_of_flax_is_a_local_block():
    block = LocalBlock(nn.Conv(4, (3, 3)), rules.make("lls_mxm", num_classes=CLASSES), pool_size=2)
    x, labels = jnp.ones((2, 6, 6, 3)), jnp.array([0, 1])
    variables = block.init(jax.random.key(0), x)
    activation, loss = block.apply(variables, x, labels, train=True)
    assert activation.shape == (2, 6, 6, 4) and np.isfinite(loss)


def test_networks_of_ones_own_take_images_and_feature_vectors():
    model = Network("own", CLASSES, (BlockSpec(DenseBlock(6), pool_size=6),))
    image = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5)), jnp.float32)
    state = evaluation.evaluation_state(model, learn(model, image), [image])
    assert training.predict(model, state, jnp.ones((3, 5))).shape == (3, CLASSES)
    with pytest.raises(ValueError, match=r"shape \(3, 5, 1, 2, 2\); expected .*batch, features"):
        training.predict(model, state, jnp.ones((3, 5, 1, 2, 2)))
    fixed = dataclasses.replace(model, smallest_image=4)
    with pytest.raises(ValueError, match=r"expected \[batch, height, width, channels\]"):
        training.predict(fixed, state, jnp.ones((3, 5)))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("logits", "label", "ranks"),
    [
        ([3.0, 1.0, 2.0, 0.0], 2, 1),
        ([3.0, 1.0, 2.0, 0.0], 0, 0),
        # Equal logits are no right answer: the first of them is what is predicted.
        ([0.0, 0.0, 0.0, 0.0], 0, 0),
        ([0.0, 0.0, 0.0, 0.0], 3, 3),
        ([1.0, 2.0, 2.0, 2.0], 2, 1),
        ([NAN, NAN, NAN, NAN], 0, 4),
        ([0.0, NAN, 0.0, 0.0], 1, 4),
        ([0.0, NAN, 5.0, 0.0], 2, 4),
        ([-INF, -INF, 1.0, INF], 3, 0),
    ],
)
def test_a_label_has_a_rank(logits, label, ranks):
    for best in range(1, 5):
        correct = correct_within(jnp.asarray([logits]), jnp.asarray([label]), best)
        assert bool(correct[0]) == (ranks < best)
