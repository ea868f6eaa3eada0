"""Training from Python: arrays and batches, validation, callbacks, resuming, optimizers."""

import dataclasses
import itertools
import json
import tracemalloc
import types
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_models

from lls_jax import evaluation, fit, models, processes, rules, training
from lls_jax.blocks import DenseBlock
from lls_jax.data import Split, batches
from lls_jax.data.arrays import describe
from lls_jax.errors import CheckpointError, UserError
from lls_jax.models import BlockSpec, Network
from lls_jax.optimizers import schedule_free_adamw
from lls_jax.runs.callbacks import Callback, EarlyStopping
from lls_jax.runs.source import from_batches

CLASSES = 3
RULE = rules.LLS(num_classes=CLASSES, modulation="matrix")
MODEL = Network(
    "two",
    CLASSES,
    (BlockSpec(DenseBlock(12), pool_size=12), BlockSpec(DenseBlock(8), pool_size=8)),
)
TX = schedule_free_adamw(1e-2)


def blobs(count, seed=0):
    """Feature vectors around a centre of each class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    centres = 2 * np.random.default_rng(7).normal(size=(CLASSES, 6))
    return (centres[labels] + rng.normal(size=(count, 6))).astype(np.float32), labels


def batches_of(examples, size):
    images, labels = examples
    return [
        {"image": images[i : i + size], "label": labels[i : i + size]}
        for i in range(0, len(labels) - size + 1, size)
    ]


def assert_equal(a, b):
    a, b = (
        state._replace(key=jax.random.key_data(state.key), opt_state=jax.tree.leaves(s.opt_state))
        for state, s in ((a, a), (b, b))
    )
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Heard(Callback):
    """Notes what it is told."""

    def __init__(self, stop_at=None):
        self.events, self.stop_at = [], stop_at

    def on_start(self, event):
        self.events.append(("start", event.step, event.resumed))

    def on_step(self, event):
        self.events.append(("step", event.step, event.epoch, event.steps_done))
        assert event.metrics["layer_loss"].shape == (2,)
        return event.step == self.stop_at

    def on_epoch(self, event):
        self.events.append(("epoch", event.record["epoch"], len(event.records)))

    def on_checkpoint(self, step):
        self.events.append(("checkpoint", step))

    def on_exit(self):
        self.events.append(("exit",))


def test_arrays_are_learned_and_what_comes_back_predicts():
    train, test = blobs(90), blobs(45, seed=1)
    result = fit(MODEL, RULE, TX, train=train, test=test, epochs=4, batch_size=15)
    assert [record["epoch"] for record in result.records] == [1, 2, 3, 4]
    last = result.records[-1]
    assert last["test_accuracy"] > 85 and last["train_loss"] < result.records[0]["train_loss"]
    logits = training.predict(MODEL, result.evaluation, jnp.asarray(test[0]))
    accuracy = 100 * float(np.mean(np.argmax(logits, 1) == test[1]))
    assert accuracy == pytest.approx(last["test_accuracy"])
    judged = evaluation.evaluate(MODEL, result.evaluation, test)
    assert judged.accuracy == pytest.approx(accuracy)
    # The weights at which gradients are taken answer wrongly, and are refused.
    for ask in (
        lambda: training.predict(MODEL, result.state, jnp.asarray(test[0])),
        lambda: evaluation.evaluate(MODEL, result.state, test),
    ):
        with pytest.raises(ValueError, match="after 24 steps of a schedule-free optimizer"):
            ask()


def test_the_loop_is_a_plain_loop_over_the_step():
    """Batches in a list are an explicit loop over :func:`lls_jax.training.make_train_step`."""
    made = batches_of(blobs(60), 15)
    result = fit(MODEL, RULE, TX, train=made, epochs=2, seed=3)
    key, _ = jax.random.split(jax.random.key(3))
    state = training.create_train_state(MODEL, RULE, TX, key, jnp.zeros((1, 6)))
    step, losses = training.make_train_step(MODEL, RULE, TX), []
    for batch in itertools.chain(made, made):
        state, metrics = step(state, jax.tree.map(jnp.asarray, batch))
        losses.append(float(metrics["loss"]))
    assert_equal(result.state, state)
    assert result.records[1]["train_loss"] == pytest.approx(np.mean(losses[4:]), rel=1e-5)
    assert "test_accuracy" not in result.records[0] and result.best_epoch is None


def test_batches_may_come_from_a_function_or_an_endless_iterator():
    made = batches_of(blobs(60), 15)
    whole = fit(MODEL, RULE, TX, train=made, epochs=2)
    by_epoch = fit(MODEL, RULE, TX, train=lambda epoch: made, steps_per_epoch=4, epochs=2)
    endless = fit(MODEL, RULE, TX, train=itertools.cycle(made), steps_per_epoch=4, epochs=2)
    assert_equal(whole.state, by_epoch.state)
    assert_equal(whole.state, endless.state)


def test_of_several_processes_each_gives_its_rows_of_a_batch():
    two_of_six = types.SimpleNamespace(num_devices=6, addressable_devices={"a", "b"})
    source, first = from_batches(batches_of(blobs(30), 15), None, two_of_six)
    assert (source.batch_size, first["image"].shape) == (45, (15, 6))


def test_the_best_epoch_is_chosen_by_the_validation_examples():
    images, labels = blobs(90)
    wrong = (labels[60:] + 1) % CLASSES
    examples = images, np.concatenate([labels[:60], wrong])
    options = {"test": blobs(45, seed=1), "epochs": 8, "batch_size": 15}
    held_out = fit(MODEL, RULE, TX, train=examples, validation=30, **options)
    given = fit(
        MODEL,
        RULE,
        TX,
        train=(images[:60], labels[:60]),
        validation=(images[60:], wrong),
        **options,
    )
    assert_equal(held_out.state, given.state)
    accuracies = [record["validation_accuracy"] for record in held_out.records]
    best = max(range(8), key=lambda epoch: (accuracies[epoch], epoch)) + 1
    assert held_out.best_epoch == given.best_epoch == best
    # Held-out labels are wrong: who trains on them, or chooses by the test images, differs.
    assert accuracies[-1] < 50 < held_out.records[-1]["test_accuracy"]


def test_a_run_in_a_folder_is_told_stopped_resumed_and_extended(tmp_path):
    options = {"train": blobs(60), "test": blobs(30, seed=1), "batch_size": 15}
    whole = fit(MODEL, RULE, TX, epochs=3, **options)
    heard = Heard(stop_at=6)
    stopped = fit(MODEL, RULE, TX, epochs=2, workdir=tmp_path / "run", callbacks=[heard], **options)
    assert stopped.stopped == 1 and int(stopped.state.step) == 6
    # What comes back is judged where it stopped, not where its last epoch ended.
    saved = evaluation.restore(tmp_path / "run", MODEL, RULE, jnp.zeros((1, 6)), 6).state
    jax.tree.map(np.testing.assert_array_equal, stopped.evaluation.params, saved.params)
    # A checkpoint is written while training goes on.
    assert [event for event in heard.events if event[0] != "checkpoint"] == [
        ("start", 0, False),
        *(("step", step, 1, step) for step in range(1, 5)),
        ("epoch", 1, 1),
        ("step", 5, 2, 1),
        ("step", 6, 2, 2),
        ("exit",),
    ]
    assert [event[1] for event in heard.events if event[0] == "checkpoint"] == [4, 6]
    assert heard.events.index(("checkpoint", 4)) > heard.events.index(("epoch", 1, 1))
    heard = Heard()
    fit(MODEL, RULE, TX, epochs=2, workdir=tmp_path / "run", callbacks=[heard], **options)
    assert heard.events[:2] == [("start", 6, True), ("step", 7, 2, 3)]
    extended = fit(MODEL, RULE, TX, epochs=3, workdir=tmp_path / "run", **options)
    assert_equal(extended.state, whole.state)
    for ours, theirs in zip(extended.records, whole.records, strict=True):
        for name in ("train_loss", "test_loss", "test_accuracy", "layer_loss"):
            assert ours[name] == theirs[name]
    for changed in ({"seed": 1}, {"batch_size": 20}):
        with pytest.raises(UserError, match=f"other settings .{next(iter(changed))} .* there"):
            fit(
                *(MODEL, RULE, TX),
                **{"epochs": 3, "workdir": tmp_path / "run", **options, **changed},
            )
    with pytest.raises(UserError, match="epochs 3 there, 2 here"):
        fit(MODEL, RULE, TX, epochs=2, workdir=tmp_path / "run", **options)


def test_a_network_that_holds_a_function_is_the_same_one_in_another_process(tmp_path):
    """Another process has another function of that name, at another address."""

    def network():
        def mean(x):
            return jnp.mean(x, axis=1)

        specs = (BlockSpec(nn.Dense(4), pool_size=2, then=mean),)
        return Network("tokens", CLASSES, specs, takes_tokens=True)

    images, labels = blobs(30)
    options = {"train": (images.reshape(30, 3, 2), labels), "batch_size": 15, "workdir": tmp_path}
    fit(network(), RULE, TX, epochs=1, **options)
    config = tmp_path / "config.json"
    named = config.read_text()
    assert "mean" in named and "0x" not in named
    # Folders of earlier versions have the addresses.
    config.write_text(named.replace("mean>", "mean at 0x7f00>"))
    assert int(fit(network(), RULE, TX, epochs=2, **options).state.step) == 4
    other = dataclasses.replace(network(), name="other")
    with pytest.raises(UserError, match=r"other settings .*model"):
        fit(other, RULE, TX, epochs=2, **options)


def test_a_stop_after_an_epochs_last_step_ends_the_epoch_first(tmp_path):
    heard = Heard(stop_at=4)
    options = {"train": blobs(60), "epochs": 3, "batch_size": 15, "callbacks": [heard]}
    stopped = fit(MODEL, RULE, TX, workdir=tmp_path / "run", **options)
    assert stopped.stopped == 1 and len(stopped.records) == 1
    assert heard.events[-3:] == [("epoch", 1, 1), ("checkpoint", 4), ("exit",)]


def test_the_folder_of_a_run_gives_its_weights_back(tmp_path):
    options = {"train": blobs(60), "test": blobs(30, seed=1), "batch_size": 15}
    result = fit(
        MODEL, RULE, TX, epochs=3, workdir=tmp_path / "run", checkpoint_every=100, **options
    )
    example = jnp.zeros((1, 6))
    for wanted, epoch in (("last", 3), ("best", result.best_epoch), (12, 3)):
        state, meta = evaluation.restore(tmp_path / "run", MODEL, RULE, example, wanted)
        assert meta["epochs_done"] == epoch and int(state.step) == 4 * epoch
        judged = evaluation.evaluate(MODEL, state, options["test"])
        assert judged.accuracy == result.records[epoch - 1]["test_accuracy"] == meta["accuracy"]
    jax.tree.map(
        np.testing.assert_array_equal,
        evaluation.restore(tmp_path / "run", MODEL, RULE, example, "last").state.params,
        result.evaluation.params,
    )
    with pytest.raises(UserError, match="no checkpoint of step 5; there are"):
        evaluation.restore(tmp_path / "run", MODEL, RULE, example, 5)
    with pytest.raises(UserError, match="'bestt' is neither 'best', 'last' nor a step"):
        evaluation.restore(tmp_path / "run", MODEL, RULE, example, "bestt")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        evaluation.restore(tmp_path / "none", MODEL, RULE, example)
    other = rules.LLS(num_classes=CLASSES, modulation="vector")
    with pytest.raises(CheckpointError, match="rule/modulation"):
        evaluation.restore(tmp_path / "run", MODEL, other, example)


def mean_over_tokens(x):
    return jnp.mean(x, axis=1)


def test_sequences_of_tokens_are_learned():
    """``[batch, length, channels]`` in, two means along the sequence to each loss."""
    specs = (
        BlockSpec(nn.Dense(8), pool_size=2),
        BlockSpec(nn.Dense(8), pool_size=2, then=mean_over_tokens),
    )
    model = Network("tokens", CLASSES, specs, takes_tokens=True)
    images, labels = blobs(90)
    rng = np.random.default_rng(3)
    tokens = (images[:, None] + rng.normal(size=(90, 5, 6))).astype(np.float32)
    result = fit(
        model, RULE, TX, train=(tokens, labels), test=(tokens, labels), epochs=6, batch_size=15
    )
    assert result.records[-1]["test_accuracy"] > 70
    (modulation,) = {
        result.state.params[name]["rule"]["modulation"].shape for name in model.block_names
    }
    assert modulation == (CLASSES, CLASSES)
    assert training.predict(model, result.evaluation, jnp.asarray(tokens[:2])).shape == (2, CLASSES)
    # What a loss sees: 8 channels, two means along the sequence, channel-major.
    seen = RULE.observe(jnp.asarray(tokens), 5)
    np.testing.assert_array_equal(seen, tokens.transpose(0, 2, 1).reshape(90, -1))


def test_early_stopping_stops_and_stays_stopped(tmp_path):
    options = {"train": blobs(60), "test": blobs(30, seed=1), "batch_size": 15, "epochs": 60}
    first = fit(MODEL, RULE, TX, early_stopping=2, workdir=tmp_path / "run", **options)
    accuracies = [record["test_accuracy"] for record in first.records]
    assert len(accuracies) < 60 and max(accuracies[:-2]) >= max(accuracies[-2:])
    again = fit(MODEL, RULE, TX, early_stopping=2, workdir=tmp_path / "run", **options)
    assert_equal(first.state, again.state)
    with pytest.raises(ValueError, match="`patience` is 0"):
        EarlyStopping(0)


@pytest.mark.parametrize("rule_name", ["lls_mxm", "bp", "drtp"])
def test_blocks_may_differ_in_their_optimizers(rule_name):
    rule = rules.make(rule_name, num_classes=CLASSES)
    names = [*MODEL.block_names, "classifier"]
    options = {"train": blobs(60), "epochs": 1, "batch_size": 15}
    frozen = {name: optax.sgd(0.0 if name == "block_0" else 0.1) for name in names}
    by_name = fit(MODEL, rule, frozen, **options)
    by_function = fit(MODEL, rule, lambda name: frozen[name], **options)
    assert_equal(by_name.state, by_function.state)
    plain = fit(MODEL, rule, optax.sgd(0.1), **options)
    start = fit(MODEL, rule, optax.sgd(0.0), **options)

    def same(a, b, name):
        pairs = zip(*(jax.tree.leaves(s.state.params[name]["block"]) for s in (a, b)))
        return all(np.array_equal(x, y) for x, y in pairs)

    assert same(by_name, start, "block_0") and not same(plain, start, "block_0")
    # What block 1 learns from does not depend on who trains block 0, but its input does.
    assert not same(by_name, start, "block_1")
    with pytest.raises(ValueError, match="no optimizer for 'classifier'"):
        fit(MODEL, rule, {name: frozen[name] for name in MODEL.block_names}, **options)


def test_a_clip_by_the_norm_stays_inside_the_block():
    """The first block's update does not depend on the size of another block's gradient."""
    batch = jax.tree.map(jnp.asarray, batches_of(blobs(15), 15)[0])
    tx = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
    state = training.create_train_state(MODEL, RULE, tx, jax.random.key(0), batch["image"])
    after, _ = training.make_train_step(MODEL, RULE, tx, donate=False)(state, batch)
    for name in (*MODEL.block_names, "classifier"):
        moved = jax.tree.map(jnp.subtract, after.params[name], state.params[name])
        assert float(optax.global_norm(moved)) == pytest.approx(1e-3, rel=1e-3)
    # Nothing was donated: the state before is still there.
    assert np.isfinite(float(optax.global_norm(state.params)))


def test_images_of_bytes_are_normalised_by_themselves_or_by_a_description():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 8, 3), np.uint8)
    labels = rng.integers(0, CLASSES, 40)
    model = models.make("small_conv", num_classes=CLASSES)
    options = {"epochs": 1, "batch_size": 20, "test": (images, labels)}
    ours = fit(model, RULE, TX, train=(images, labels), **options)
    pixels = images.astype(np.float64) / 255
    np.testing.assert_allclose(ours.spec.mean, pixels.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(ours.spec.std, pixels.std((0, 1, 2)), rtol=1e-5)
    judged = evaluation.evaluate(model, ours.evaluation, (images, labels), spec=ours.spec)
    assert judged.accuracy == pytest.approx(ours.records[-1]["test_accuracy"])
    with pytest.raises(ValueError, match="`spec` is None and the images are uint8"):
        evaluation.evaluate(model, ours.evaluation, (images, labels))
    other = dataclasses.replace(ours.spec, mean=(0.0,) * 3)
    theirs = fit(model, RULE, TX, train=(images, labels), spec=other, **options)
    assert theirs.records[0]["train_loss"] != ours.records[0]["train_loss"]


BYTES = np.zeros((9, 6), np.uint8)


def labelled(change):
    """Batches with other labels."""
    made = batches_of(blobs(30), 15)
    return [{**batch, "label": change(batch["label"])} for batch in made]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 0}, "`epochs` is 0"),
        ({"train": blobs(9)[0]}, "a training batch is a ndarray; expected a dict"),
        ({"train": (blobs(9)[0], blobs(8)[1])}, "`train` has 9 images and 8 labels"),
        ({"train": (blobs(9)[0], blobs(9)[1] + 1)}, "labels of `train` go from 1 to 3"),
        ({"train": (blobs(9)[0].astype(int), blobs(9)[1])}, "dtype int64; expected uint8"),
        ({"batch_size": 99}, "`batch_size` is 99, but there are only 60"),
        ({"validation": 60}, "60 examples are to be held out"),
        ({"test": (blobs(9)[0], blobs(9)[1].astype(float))}, "labels of `test` have .* float64"),
        ({"train": batches_of(blobs(30), 15), "validation": 5}, "`validation` is a number"),
        ({"train": iter(batches_of(blobs(30), 15))}, "`steps_per_epoch` is None"),
        ({"train": batches_of(blobs(30), 15) + batches_of(blobs(4), 4)}, "has 4 examples.* had 15"),
        ({"steps_a_launch": "few"}, "`steps_a_launch` is 'few'"),
        ({"rule": "lls"}, "`rule` is 'lls'; expected a rule, like"),
        ({"batch_size": 0}, "`batch_size` is 0; it must be a whole number, at least 1"),
        ({"batch_size": -4}, "`batch_size` is -4"),
        ({"batch_size": 2.5}, "`batch_size` is 2.5"),
        ({"eval_batch_size": 0}, "`eval_batch_size` is 0"),
        ({"checkpoint_every": -1}, "`checkpoint_every` is -1.* at least 0"),
        ({"early_stopping": 0, "test": blobs(9)}, "`early_stopping` is 0; it must be"),
        ({"early_stopping": 2}, "`early_stopping` is 2, and there are neither"),
        ({"seed": 2**32}, "`seed` is 4294967296; it must be at least 0, and less than"),
        ({"steps_per_epoch": 3}, "`steps_per_epoch` is 3, and the training examples are arrays"),
        ({"test_views": "flip"}, "`test_views` is 'flip', and there are neither"),
        (
            {"test_views": "flip", "test": blobs(9)},
            r"the examples have shape \(6,\); it is for images",
        ),
        ({"test": (blobs(9)[0][:, :1], blobs(9)[1])}, r"`test` have shape \(1,\); expected \(6,\)"),
        ({"validation": (BYTES, blobs(9)[1])}, "`validation` have dtype uint8, .* float32; give"),
        ({"train": [{"image": BYTES, "label": blobs(9)[1]}]}, "a training batch have dtype uint8"),
        ({"train": (np.zeros((60, 6, 6)), blobs(60)[1])}, r"\(15, 6, 6\); .*`images\[..., None\]`"),
        ({"train": labelled(lambda y: y + 1)}, "labels of a training batch go from 1 to 3"),
        ({"train": labelled(lambda y: y * 1.0)}, "labels of a training batch .* float64;"),
        ({"train": labelled(lambda y: np.eye(3, dtype=int)[y])}, r"have shape \(15, 3\) and dtype"),
        ({"train": labelled(lambda y: y[0])}, r"have shape \(\) and dtype"),
        ({"seed": 0.5}, "`seed` is 0.5; it must be a whole number, at least 0"),
        ({"seed": -1}, "`seed` is -1; it must be"),
        (
            {"train": iter(batches_of(blobs(90), 15)), "steps_per_epoch": 4, "epochs": 2},
            "batches of epoch 2 ended after 2 steps; an epoch has 4",
        ),
        ({"rule": rules.make("bp", num_classes=CLASSES), "remat_above": 9}, "`remat_above` is 9"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    changed = dict(changed)
    rule = changed.pop("rule", RULE)
    options = {"train": blobs(60), "epochs": 1, "batch_size": 15, **changed}
    with pytest.raises(ValueError, match=message):
        fit(MODEL, rule, TX, **options)


def test_numbers_may_be_those_of_numpy(tmp_path):
    counts = {"epochs": 1, "batch_size": 15, "eval_batch_size": 9, "validation": 8}
    counts |= {"seed": 1, "reach": 2}
    ones = {name: np.int64(count) for name, count in counts.items()}
    numpy = fit(MODEL, RULE, TX, train=blobs(60), workdir=tmp_path, **ones)
    assert_equal(numpy.state, fit(MODEL, RULE, TX, train=blobs(60), **counts).state)


def test_a_run_whose_losses_reach_differently_goes_on(tmp_path):
    options = {"train": blobs(60), "batch_size": 15, "workdir": tmp_path}
    half = fit(MODEL, RULE, TX, epochs=1, reach=(1, 2, 1), **options)
    whole = fit(MODEL, RULE, TX, epochs=2, reach=np.array([1, 2, 1]), **options)
    # Its seconds too.
    assert whole.records[0] == half.records[0]
    assert int(whole.state.step) == 8
    with pytest.raises(UserError, match="reach \\[1, 2, 1\\] there, 2 here"):
        fit(MODEL, RULE, TX, epochs=2, reach=2, **options)


def test_a_folder_knows_the_size_of_batches_that_others_make(tmp_path):
    options = {"epochs": 1, "workdir": tmp_path}
    fit(MODEL, RULE, TX, train=batches_of(blobs(30), 15), **options)
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 15
    with pytest.raises(UserError, match="batch_size 15 there, 10 here"):
        fit(MODEL, RULE, TX, train=batches_of(blobs(20), 10), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": -1}, r"labels of `examples` go from -1 to .* model's 3 classes"),
        ({"labels": 1}, r"labels of `examples` go from .* to 3"),
        ({"channels": 1}, r"shape \(8, 8, 1\); expected \(8, 8, 3\)"),
        ({"batch_size": -1}, "`batch_size` is -1"),
        ({"channels": 1, "trained": (8, 8, 1)}, r"shape \(8, 8, 1\) do not fit .*'two_blocks'"),
        ({"side": 2, "trained": (2, 2, 3)}, "2x2 pixels are too small for model 'two_blocks'"),
    ],
)
def test_what_cannot_be_evaluated_is_named(change, message):
    """What a lookup would take for another class, and a mean for another channel."""
    model = dataclasses.replace(small_models.two_blocks(CLASSES), smallest_image=4)
    example = jnp.zeros((1, 8, 8, 3))
    state = training.create_train_state(model, RULE, TX, jax.random.key(0), example)
    side = change.get("side", 8)
    images = np.zeros((9, side, side, 3), np.uint8)[..., : change.get("channels", 3)]
    labels = np.arange(9) % CLASSES + change.get("labels", 0)
    trained = np.ones((9, *change.get("trained", (8, 8, 3))), np.uint8)
    spec = describe(Split(trained, labels), CLASSES)
    with pytest.raises(ValueError, match=message):
        evaluation.evaluate(
            *(model, state, (images, labels)), spec=spec, batch_size=change.get("batch_size", 9)
        )
    if "trained" in change:
        with pytest.raises(ValueError, match=message):
            training.predict(model, state, jnp.asarray(images, jnp.float32))


def test_only_images_have_views():
    """Sequences would be read from their last channel to their first."""
    state = training.create_train_state(MODEL, RULE, TX, jax.random.key(0), jnp.zeros((1, 6)))
    with pytest.raises(ValueError, match=r"`views` is 'flip', and the examples have shape \(6,\)"):
        evaluation.evaluate(MODEL, state, blobs(9), views="flip")


@pytest.mark.parametrize(
    ("stop_at", "count", "message"),
    [
        # Of four steps an epoch.
        (None, 15, "has 4 steps an epoch, and an epoch of these training examples has 1"),
        (None, 45, "has 4 steps an epoch, and an epoch of these training examples has 3"),
        (None, 120, "has 4 steps an epoch, and an epoch of these training examples has 8"),
        (3, 30, "has step 3, and an epoch of these training examples has 2"),
    ],
)
def test_a_run_goes_on_with_as_many_examples_as_it_began_with(tmp_path, stop_at, count, message):
    """Else its epochs would be empty, or begin before their first batch."""
    options = {"epochs": 2, "batch_size": 15, "workdir": tmp_path}
    fit(MODEL, RULE, TX, train=blobs(60), callbacks=[Heard(stop_at)], **options)
    options["epochs"] = 3
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(UserError, match=message):
        fit(MODEL, RULE, TX, train=blobs(count), **options)
    assert (tmp_path / "config.json").read_text() == before
    assert fit(MODEL, RULE, TX, train=blobs(60), **options).state.step == 12
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(before) | {"epochs": 3}


def test_of_several_processes_none_trains_another_number_of_epochs(tmp_path, monkeypatch):
    """The first one's is in the folder, and the others would be lost, or wait for it."""
    options = {"train": blobs(60), "batch_size": 15, "workdir": tmp_path}
    fit(MODEL, RULE, TX, epochs=1, **options)
    monkeypatch.setattr(processes, "is_first", lambda: False)
    with pytest.raises(UserError, match="is to train 2 epochs, and process 0 trains 1"):
        fit(MODEL, RULE, TX, epochs=2, **options)


def test_bytes_are_described_without_a_copy_of_them_all():
    images = np.zeros((4096, 16, 16, 3), np.uint8)
    split = Split(images, np.zeros(4096, np.int32))
    tracemalloc.start()
    spec = describe(split, CLASSES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert spec.std == (1.0,) * 3 and peak < images.nbytes


def test_with_64_bit_numbers_a_run_stops_inside_an_epoch_and_goes_on(tmp_path):
    images, labels = blobs(60)
    train = batches.to_device(Split(images, labels.astype(np.int32)))
    options = {"train": train, "epochs": 1, "batch_size": 15}
    # Strictly, an index of 64 bits goes with no label of 32.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        fit(MODEL, RULE, TX, workdir=tmp_path, callbacks=[Heard(stop_at=2)], **options)
        heard = Heard()
        fit(MODEL, RULE, TX, workdir=tmp_path, callbacks=[heard], **options)
        many = fit(MODEL, RULE, TX, steps_a_launch="many", **options)
    assert heard.events[0] == ("start", 2, True) and int(many.state.step) == 4


class Silent(Callback):
    """Does not want to hear of warnings."""

    def on_warning(self, message):
        pass


@pytest.mark.parametrize(("heard", "warned"), [([], 1), ([Heard()], 1), ([Heard(), Silent()], 0)])
def test_a_damaged_checkpoint_is_told_unless_somebody_hears_of_it(tmp_path, heard, warned):
    options = {"train": blobs(60), "batch_size": 15, "workdir": tmp_path, "checkpoint_every": 4}
    fit(MODEL, RULE, TX, epochs=2, **options)
    for path in (tmp_path / "checkpoints" / "8").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(bytes(path.stat().st_size))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(MODEL, RULE, TX, epochs=2, callbacks=heard, **options)
    assert len([one for one in caught if "set aside" in str(one.message)]) == warned


@pytest.mark.parametrize("reach", [1, 2])
def test_many_steps_a_launch_are_the_same_steps(reach):
    images, labels = blobs(60)
    train = batches.to_device(Split(images, labels.astype(np.int32)))
    options = {"train": train, "epochs": 2, "batch_size": 15, "reach": reach}
    one = fit(MODEL, RULE, optax.sgd(0.1), steps_a_launch="one", **options)
    many = fit(MODEL, RULE, optax.sgd(0.1), steps_a_launch="many", **options)
    for a, b in zip(jax.tree.leaves(one.state.params), jax.tree.leaves(many.state.params)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
