"""Gradients, probes and heads of blocks, against jax.grad and NumPy written by hand."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import train
from experiments.config import TrainConfig
from lls_jax import analysis, fit, rules, training
from lls_jax.blocks import ConvBlock, DenseBlock
from lls_jax.models import BlockSpec, Network
from lls_jax.optimizers import schedule_free_adamw
from lls_jax.runs.callbacks import Callback

CLASSES = 4
TX = optax.sgd(0.1)


@dataclasses.dataclass(frozen=True)
class Silent(rules.LocalRule):
    """A rule with nothing to say: its loss is 0."""

    def loss(self, params, seen, labels, *, pool_size):
        return 0.0 * jnp.mean(seen)


def make_batch(size=24, seed=0, features=6):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.normal(size=(size, features)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, CLASSES, size), jnp.int32),
    }


def dense(dropout=0.0):
    specs = tuple(BlockSpec(DenseBlock(width), width, dropout=dropout) for width in (12, 10, 8))
    return Network("dense", CLASSES, specs)


def start(model, rule, batch):
    return training.create_train_state(model, rule, TX, jax.random.key(3), batch["image"])


def make_rule(name):
    return rules.make(name, num_classes=CLASSES)


def compare(model, rule, state, batches, reach=1):
    ours = analysis.make_gradients(model, rule, reach=reach)
    theirs = analysis.make_gradients(model, make_rule("bp"))
    return analysis.compare_gradients(model, ours, theirs, state, batches)


def by_hand(params, x, labels, until):
    """The network's layers, with BatchNorm and LeakyReLU; a block's loss, or the classifier's."""
    for name in ("block_0", "block_1", "block_2"):
        own = params[name]["block"]
        y = x @ own["linear"]["kernel"]
        normal = (y - y.mean(0, keepdims=True)) / jnp.sqrt(y.var(0, keepdims=True) + 1e-5)
        y = normal * own["norm"]["scale"][None] + own["norm"]["bias"][None]
        x = jnp.where(y > 0, y, 0.01 * y)
        if name == until:
            logits = x @ params[name]["rule"]["feedback"].T / 0.5
            break
        if until != "classifier":
            x = jax.lax.stop_gradient(x)
    else:
        linear = params["classifier"]["linear"]
        logits = x @ linear["kernel"] + linear["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def test_cosines_and_norms_are_those_of_gradients_by_hand():
    model, rule, batches = dense(), make_rule("lls_random"), [make_batch(), make_batch(seed=1)]
    state = start(model, rule, batches[0])
    rows = []
    for batch in batches:
        args = batch["image"], batch["label"]
        gradient = jax.jit(jax.grad(by_hand), static_argnums=3)
        bp = gradient(state.params, *args, "classifier")
        for name in model.block_names:
            own = gradient(state.params, *args, name)[name]["block"]
            a, b = (
                np.concatenate(
                    [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(g)]
                )
                for g in (own, bp[name]["block"])
            )
            norms = np.linalg.norm(a), np.linalg.norm(b)
            rows.append((a @ b / norms[0] / norms[1], *norms))
    expected = np.mean(np.reshape(rows, (2, 3, 3)), axis=0).T
    found = compare(model, rule, state, batches)
    # Nothing but floats that differ in rounding; not all are alike.
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert np.ptp(expected[0]) > 0.05


def test_a_reach_of_all_without_local_losses_points_where_backpropagation_does():
    model, batch = dense(dropout=0.2), make_batch()
    silent = rules.PerBlock((Silent(),) * 3)
    state = start(model, silent, batch)
    far = compare(model, silent, state, [batch], reach=4)
    np.testing.assert_allclose(far.cosine, 1.0, atol=1e-6)
    np.testing.assert_allclose(far.norm, far.bp_norm, rtol=1e-4)
    # The classifier's loss teaches the last block alone; the others are taught nothing.
    near = compare(model, silent, state, [batch], reach=2)
    assert near.cosine[2] == pytest.approx(1.0, abs=1e-6)
    assert np.isnan(near.cosine[:2]).all() and (near.norm[:2] == 0).all()


@pytest.mark.parametrize("name", ["dfa", "bp", "lls_mxm"])
def test_gradients_are_those_that_a_step_takes(name):
    model, rule, batch = dense(), make_rule(name), make_batch()
    state = start(model, rule, batch)
    found = analysis.make_gradients(model, rule)(state, batch)
    new, _ = training.make_train_step(model, rule, TX, donate=False)(state, batch)
    for block in (*model.block_names, "classifier"):
        for path, gradient in jax.tree_util.tree_flatten_with_path(found[block])[0]:
            old, after = state.params[block], new.params[block]
            for part in path:
                old, after = old[part.key], after[part.key]
            np.testing.assert_allclose(old - 0.1 * gradient, after, atol=1e-6)
    norms = analysis.gradient_norms(found)
    leaves = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(found["block_1"])]
    assert norms["block_1"] == pytest.approx(np.linalg.norm(np.concatenate(leaves)), rel=1e-5)


def test_a_probe_is_ridge_regression_with_an_intercept():
    """Against least squares on examples with the penalty's rows below them."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(200, 9)) @ rng.normal(size=(9, 9)) + 3
    labels = rng.integers(0, CLASSES, 200)
    x += 0.5 * labels[:, None]
    penalty = 0.3
    probe = analysis.fit_probe(x, labels, num_classes=CLASSES, penalty=penalty)
    ridge = np.sqrt(penalty * x.var(0).mean() * len(x))
    above = np.hstack([x, np.ones((200, 1))])
    below = np.hstack([ridge * np.eye(9), np.zeros((9, 1))])
    targets = np.vstack([np.eye(CLASSES)[labels], np.zeros((9, CLASSES))])
    solution = np.linalg.lstsq(np.vstack([above, below]), targets, rcond=None)[0]
    np.testing.assert_allclose(probe.weights, solution[:-1], atol=1e-4)
    np.testing.assert_allclose(probe.bias, solution[-1], atol=1e-4)
    answers = np.argmax(above @ solution, 1)
    assert probe.accuracy(x, labels) == pytest.approx(100 * np.mean(answers == labels))
    assert 30 < probe.accuracy(x, labels) < 100
    with pytest.raises(ValueError, match="`penalty` is 0"):
        analysis.fit_probe(x, labels, num_classes=CLASSES, penalty=0)


def pairs(*batches):
    return [(batch["image"], batch["label"]) for batch in batches]


def test_every_block_is_probed_over_batches_as_over_one():
    model, rule = dense(), make_rule("lls")
    batches = [make_batch(seed=seed) for seed in range(3)]
    state = start(model, rule, batches[0])
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    found = analysis.probe_accuracies(model, variables, pairs(*batches), pairs(batches[1]))
    image, label = (jnp.concatenate([batch[k] for batch in batches]) for k in ("image", "label"))
    whole = analysis.block_latents(model, variables, image)
    held = analysis.block_latents(model, variables, batches[1]["image"])
    expected = [
        analysis.fit_probe(x, label, num_classes=CLASSES).accuracy(y, batches[1]["label"])
        for x, y in zip(whole, held)
    ]
    assert found == pytest.approx(expected) and [x.shape[1] for x in whole] == [12, 10, 8]
    with pytest.raises(ValueError, match="`held_out` has no examples"):
        analysis.probe_accuracies(model, variables, pairs(*batches), [])


def test_a_head_answers_what_its_largest_logit_says():
    names = ("lls_mxm", "local_classifier", "predsim", "contrastive", "auglocal", "infopro")
    specs = [BlockSpec(ConvBlock(5), pool_size=2) for _ in names]
    specs[-1] = dataclasses.replace(specs[-1], average_pool=2, flatten=True)
    model = Network("heads", CLASSES, tuple(specs))
    rule = rules.PerBlock(tuple(map(make_rule, names)))
    rng = np.random.default_rng(2)
    image = jnp.asarray(rng.normal(size=(40, 8, 8, 3)), jnp.float32)
    label = jnp.asarray(rng.integers(0, CLASSES, 40))
    state = start(model, rule, {"image": image})
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    latents = [np.asarray(x, np.float64) for x in analysis.block_latents(model, variables, image)]
    own = [
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params[name]["rule"])
        for name in model.block_names
        if "rule" in state.params[name]
    ]
    basis = np.asarray(rule.rules[0].projection({}, latents[0].shape[1]), np.float64)
    logits = latents[0] @ basis.T @ own[0]["modulation"], latents[1] @ own[1]["feedback"].T
    halves = [(image[:25], label[:25]), (image[25:], label[25:])]
    found = analysis.head_accuracies(model, rule, variables, halves)
    for accuracy, scores in zip(found, logits):
        assert accuracy == pytest.approx(100 * np.mean(np.argmax(scores, 1) == label))
    # One that has a classifier in its loss, and those that compare examples, or normalise by them.
    assert 0 < found[2] < 100 and found[3:] == [None] * 3
    assert analysis.head_accuracies(model, make_rule("bp"), variables, []) == [None] * 6
    # Whatever computes their losses in training, and runs on a GPU alone.
    heads = [rules.make(one, num_classes=CLASSES, implementation="pallas") for one in names[:2]]
    named = rules.PerBlock((*heads, *rule.rules[2:]))
    assert analysis.head_accuracies(model, named, variables, halves) == found


def blobs(count, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    centres = 2 * np.random.default_rng(7).normal(size=(CLASSES, 6))
    return (centres[labels] + rng.normal(size=(count, 6))).astype(np.float32), labels


def test_a_run_measures_and_stays_what_it_was(tmp_path):
    data = {"train": blobs(96), "test": blobs(60, seed=1), "epochs": 3, "batch_size": 24}
    model, rule, tx = dense(dropout=0.2), make_rule("lls_mxm"), schedule_free_adamw(1e-2)
    plain = fit(model, rule, tx, reach=2, **data)
    measure = analysis.Measure(every=2, gradient_batches=2, examples=50)
    seen = fit(model, rule, tx, reach=2, callbacks=[measure], workdir=tmp_path, **data)
    jax.tree.map(np.testing.assert_array_equal, seen.state.params, plain.state.params)
    keys = ("alignment", "gradient_norm", "bp_gradient_norm", "probe_accuracy", "head_accuracy")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == seen.records
    for record in lines:
        measured = record["epoch"] != 1
        assert all((key in record) == measured for key in keys)
        if measured:
            assert all(len(record[key]) == 3 for key in keys)
    last = lines[-1]
    # Seen at the weights that are evaluated, on those examples: the first 50.
    images, labels = data["test"]
    variables = {"params": seen.evaluation.params, "batch_stats": seen.evaluation.batch_stats}
    heads = analysis.head_accuracies(model, rule, variables, [(images[:50], labels[:50])])
    assert last["head_accuracy"] == pytest.approx(heads)
    assert min(last["probe_accuracy"]) > 60 and last["head_accuracy"][0] > 60
    # With a reach of 2 the last block learns from the classifier too.
    assert last["alignment"][2] > last["alignment"][0]


class Renames(Callback):
    def add_to_record(self, event):
        return {"step": 0}


def test_what_cannot_be_measured_is_said():
    data = {"train": blobs(48), "epochs": 1, "batch_size": 24}
    model, rule = dense(), make_rule("lls")
    for options, message in (
        ({"measures": ["alinement"]}, "'alinement'; expected some of alignment, norms"),
        ({"measures": []}, "`measures` is empty"),
        ({"every": 0}, "`every` is 0"),
        ({"examples": 0}, "`examples` is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            analysis.Measure(**options)
    with pytest.raises(ValueError, match="has heads, which are judged on validation or test"):
        fit(model, rule, TX, callbacks=[analysis.Measure(["heads"])], **data)
    with pytest.raises(ValueError, match="adds 'step' to a record that has it"):
        fit(model, rule, TX, callbacks=[Renames()], **data)


def test_the_command_measures_says_and_draws(tmp_path, capsys):
    config = TrainConfig(
        dataset="digits", model="small_models:two_blocks", rule="lls_mxm,contrastive", epochs=1,
        batch_size=64, train_examples=192, eval_examples=100, measure="alignment,heads",
        progress=False, workdir=str(tmp_path),
    )  # fmt: skip
    assert train.train_and_evaluate(config) == 0
    (record,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert "probe_accuracy" not in record and record["head_accuracy"][1] is None
    printed = capsys.readouterr().out
    assert f"cosine with bp's gradient:  L1 {record['alignment'][0]:.3f}" in printed
    # Its head is none that answers.
    assert re.search(r"local head accuracy \[%\]:  L1 \d.*L2 -$", printed, re.M)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    # A finished run has been measured, or has not.
    assert train.train_and_evaluate(config) == 0
    assert "nothing to do" not in capsys.readouterr().err
    more = dataclasses.replace(config, measure="heads,probes", test_views="flip", profile=2)
    assert train.train_and_evaluate(more) == 0
    said = capsys.readouterr()
    assert "nothing to do for --measure probes, --test-views flip, --profile 2;" in said.err
    assert "no steps were traced" not in said.out
