"""The speed-run network: whitening, its blocks, Muon, alternating flips, views, its preset."""

import dataclasses
import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from seeds import random_generator

from experiments import command_line, optimizers, presets, train
from experiments.config import TrainConfig
from lls_jax import evaluation, fit, models, rules, training
from lls_jax.accounting import account
from lls_jax.blocks.speedrun import NormalizeGelu
from lls_jax.data import Split, augment, batches, get_spec, streaming
from lls_jax.data.order import epoch_order, epoch_permutation
from lls_jax.layers.gelu import biased_gelu, gelu
from lls_jax.layers.normalized_gelu import apply_gelu, normalize_gelu
from lls_jax.layers.whitening import whitening_filters
from lls_jax.optimizers import NamedRate, muon, muon_for_kernels, schedule_free_adamw
from lls_jax.runs import folder as folders
from lls_jax.runs.views import mean_logits

CLASSES = 4
CIFAR = get_spec("cifar10")


def patches(images, size):
    """Every patch as a row, in float64."""
    views = np.lib.stride_tricks.sliding_window_view(images, (size, size), axis=(1, 2))
    return views.transpose(0, 1, 2, 4, 5, 3).reshape(-1, size * size * images.shape[-1])


# --- Whitening -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "channels"), [(2, 3), (3, 1)])
def test_whitened_patches_have_unit_second_moments(size, channels):
    rng = random_generator()
    # Neighbours and channels alike, as in photographs, but not more than float32 can tell.
    mix = np.eye(channels) + 0.5
    noise = rng.normal(size=(40, 12, 11, channels)) @ mix + 1.0
    images = (noise[:, :, 1:] + 0.7 * noise[:, :, :-1]).astype(np.float32)
    filters = whitening_filters(jnp.asarray(images), size, epsilon=1e-9)
    number = size * size * channels
    assert filters.shape == (size, size, channels, 2 * number)
    out = patches(images.astype(np.float64), size) @ np.asarray(filters).reshape(number, -1)
    np.testing.assert_allclose(out[:, :number], -out[:, number:], atol=1e-5)
    moments = out[:, :number].T @ out[:, :number] / len(out)
    np.testing.assert_allclose(moments, np.eye(number), atol=5e-3)
    # With epsilon, `v / sqrt(e + epsilon)`.
    wide = patches(images.astype(np.float64), size)
    values, vectors = np.linalg.eigh(wide.T @ wide / len(wide))
    damped = np.asarray(whitening_filters(jnp.asarray(images), size, 0.5)).reshape(number, -1)
    expected = vectors / np.sqrt(values + 0.5)
    # A projector has no sign: both are built from the same eigenvectors.
    np.testing.assert_allclose(
        damped[:, :number] @ damped[:, :number].T, expected @ expected.T, atol=2e-3
    )


def small_set(count=64, side=12):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, count)
    images = rng.integers(0, 60, (count, side, side, 3)) + 45 * labels[:, None, None, None]
    return images.astype(np.uint8), labels


def find_filters(state):
    return np.asarray(state.batch_stats["block_0"]["block"]["from_images"]["kernel"])


def make_airbench(width=1 / 16):
    return models.make("airbench", num_classes=CLASSES, width=width, classifier_smoothing=0.2)


def test_fit_takes_the_whitening_from_its_training_images_and_leaves_it(tmp_path):
    """Through `fit`, with an optimizer that averages: statistics anew, filters as they were."""
    model, examples = make_airbench(), small_set()
    rule = rules.make("lls_mxm", num_classes=CLASSES)
    arguments = {"train": examples, "test": examples, "batch_size": 32}
    result = fit(model, rule, schedule_free_adamw(5e-3), epochs=1, test_views="flip", **arguments)
    images = batches.first_images(result.spec, Split(*examples), 64)
    expected = whitening_filters(images, 2)
    np.testing.assert_array_equal(find_filters(result.state), find_filters(result.evaluation))
    # Eigenvectors of like eigenvalues may turn with a rounding; what they span together does not.
    ours, theirs = (f.reshape(12, 24) for f in (find_filters(result.state), np.asarray(expected)))
    np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, rtol=1e-2, atol=1e-2)
    record = result.records[-1]
    assert 0 <= record["test_views_accuracy"] <= 100 and len(record["layer_loss"]) == 3
    judged = evaluation.evaluate(model, result.evaluation, examples, spec=result.spec, views="flip")
    assert judged.accuracy == pytest.approx(record["test_views_accuracy"])
    with pytest.raises(ValueError, match=r"`views` is 'flop'.*none, flip, flip_translate"):
        evaluation.evaluate(model, result.evaluation, examples, spec=result.spec, views="flop")


# --- The network ---------------------------------------------------------------------------------


def test_gelu_and_its_gradient_are_those_of_float64():
    """Far below zero too, where 1 + erf has few digits left."""
    x = np.concatenate(
        [random_generator().normal(size=200) * 3, [-30.0, -5.5, -1e-3, 0.0, 1e-3, 5.5, 30.0]]
    )
    x = x.astype(np.float32).astype(np.float64)
    below = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x])
    slope = below + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    pull = random_generator().normal(size=x.size)
    y, vjp = jax.vjp(gelu, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, x * below, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(vjp(jnp.asarray(pull, jnp.float32))[0], pull * slope, atol=1e-5)
    half = jnp.asarray(x, jnp.bfloat16)
    assert gelu(half).dtype == jnp.bfloat16
    wide = gelu(half.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(gelu(half), np.float32), np.asarray(wide, np.float32))


def gelu_in_float64(x):
    """GELU and its derivative."""
    below = np.vectorize(lambda value: 0.5 * math.erfc(-value / math.sqrt(2)))(x)
    return x * below, below + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_normalised_and_biased_gelu_are_those_of_float64(dtype):
    """Of channels whose mean is not zero; the gradient goes through mean and deviation too."""
    rng = random_generator()
    channels, epsilon = 5, 1e-3
    x = 3 + rng.normal(size=(6, 4, 3, channels)) * np.arange(1, channels + 1)
    x, pull = (np.asarray(jnp.asarray(v, dtype), np.float64) for v in (x, rng.normal(size=x.shape)))
    bias = rng.normal(size=channels).astype(np.float32).astype(np.float64)
    narrow = [jnp.asarray(x, dtype), jnp.asarray(bias, jnp.float32)]
    # Of values to 10, and of sums over 72 elements, in which a gradient is rounded to `dtype`.
    tolerance = {jnp.float32: 2e-5, jnp.bfloat16: 0.06}[dtype]

    @jax.jit
    def both(x, bias, pull):
        own, pull_own = jax.vjp(biased_gelu, x, bias)
        (normal, *statistics), pull_normal = jax.vjp(
            lambda x, bias: normalize_gelu(x, bias, epsilon), x, bias
        )
        zeros = jax.tree.map(jnp.zeros_like, statistics)
        return own, pull_own(pull), normal, pull_normal((pull, *zeros)), statistics

    own, d_own, normal, d_normal, statistics = both(*narrow, jnp.asarray(pull, dtype))
    axes, mean, variance = (0, 1, 2), x.mean((0, 1, 2)), x.var((0, 1, 2))
    deviation = np.sqrt(variance + epsilon)
    white = (x - mean) / deviation
    y, slope = gelu_in_float64(x + bias)
    z, slope_z = gelu_in_float64(white + bias)
    dz = pull * slope_z
    dx = (dz - dz.mean(axes) - white * (dz * white).mean(axes)) / deviation
    for ours, expected in (
        (own, y), (d_own[0], pull * slope), (d_own[1], (pull * slope).sum(axes)),
        (normal, z), (d_normal[0], dx), (d_normal[1], dz.sum(axes)),
        (statistics[0], mean), (statistics[1], variance),
    ):  # fmt: skip
        ours = np.asarray(ours, np.float64)
        np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance)
    assert own.dtype == normal.dtype == d_own[0].dtype == d_normal[0].dtype == dtype
    # Rounded to `dtype` once, at the end.
    rounded = jnp.asarray(gelu(narrow[0].astype(jnp.float32) + narrow[1][None, None, None]), dtype)
    apart = np.asarray(own, np.float64) - np.asarray(rounded, np.float64)
    assert np.mean(np.abs(apart) > 1e-5) < 0.02
    running = np.asarray(apply_gelu(narrow[0], *statistics, narrow[1], epsilon), np.float64)
    np.testing.assert_allclose(running, z, rtol=tolerance, atol=tolerance)


def test_normalise_gelu_is_flaxs_batchnorm_and_gelu():
    """By the same variables: so checkpoints of either are the other's."""
    ours = NormalizeGelu()
    theirs = nn.BatchNorm(momentum=0.6, epsilon=1e-12, use_scale=False)
    rng = random_generator()
    x, pull = (jnp.asarray(rng.normal(size=(6, 5, 4, 3)), jnp.float32) for _ in range(2))
    variables = ours.init(jax.random.key(0), x, train=True)
    made = theirs.init(jax.random.key(0), x, use_running_average=False)
    assert jax.tree.structure(variables) == jax.tree.structure(made)
    jax.tree.map(np.testing.assert_array_equal, variables, made)
    state = jax.tree.map(lambda v: jnp.asarray(rng.uniform(1, 2, v.shape), v.dtype), variables)

    def own(params, x):
        return ours.apply({**state, "params": params}, x, train=True, mutable=["batch_stats"])

    def flaxs(params, x):
        y, new = theirs.apply(
            {**state, "params": params}, x, use_running_average=False, mutable=["batch_stats"]
        )
        return gelu(y), new

    results = []
    for function in (own, flaxs):
        y, pull_back, new = jax.vjp(function, state["params"], x, has_aux=True)
        results.append((y, pull_back(pull), new))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, *results)
    running = gelu(theirs.apply(state, x, use_running_average=True))
    close(ours.apply(state, x, train=False), running)


def test_airbench_has_its_published_shapes():
    model = models.make("airbench", num_classes=10)
    x, size, activations = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32), 0, []
    for spec in model.specs:
        a, variables = jax.eval_shape(
            lambda x, m=spec.module: m.init_with_output(jax.random.key(0), x), x
        )
        size += sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        activations.append(a.shape[1:])
        x = jax.eval_shape(lambda a, spec=spec: spec.transition(a, None), a)
    assert activations == [(15, 15, 64), (7, 7, 256), (3, 3, 256)]
    assert x.shape == (1, 256)
    convolutions = 24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256
    counts = account(model, rules.make("bp", num_classes=10), (32, 32, 3))
    areas = np.array([31 * 31, 15 * 15, 15 * 15, 7 * 7, 7 * 7, 3 * 3])
    taps = 9 * np.array([24 * 64, 64 * 64, 64 * 256, 256 * 256, 256 * 256, 256 * 256])
    assert counts.total("forward") == areas @ taps + 31 * 31 * 12 * 24 + 256 * 10
    assert size == 9 * convolutions + 2 * (64 + 256 + 256) + 24


def test_a_pair_starts_as_the_identity_and_the_classifier_small():
    model = models.make("airbench", num_classes=10, width=0.25)
    rule = rules.make("bp", num_classes=10)
    rng = random_generator()
    image = jnp.asarray(rng.normal(size=(1, 16, 16, 3)), jnp.float32)
    params, _ = model.init(rule, jax.random.key(0), image)
    # 64 inputs to 64 outputs hand all on; 24 to 16 the first 16; 16 to 64 all, and 48 are drawn.
    x = rng.normal(size=(2, 5, 5, 16))
    kernels = [
        params["block_2"]["block"]["kernel_0"],
        params["block_0"]["block"]["pair"]["kernel_0"],
        params["block_1"]["block"]["kernel_0"],
    ]
    for kernel, inputs, handed_on in zip(kernels, (64, 24, 16), (64, 16, 16)):
        x = jnp.asarray(rng.normal(size=(2, 5, 5, inputs)), jnp.float32)
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        np.testing.assert_allclose(y[..., :handed_on], x[..., :handed_on], atol=1e-6)
    assert np.abs(kernels[2][..., 16:]).max() <= (9 * 16) ** -0.5
    head = np.asarray(params["classifier"]["scaled_kernel"], np.float64)
    assert np.std(head) == pytest.approx(1, abs=0.1)
    features = rng.normal(size=(3, 64))
    logits = model.classify(params["classifier"], jnp.asarray(features, jnp.float32))
    np.testing.assert_allclose(logits, features @ head / 64, rtol=1e-4, atol=1e-5)


def test_the_classifiers_loss_is_smoothed():
    rng = random_generator()
    logits, labels = rng.normal(size=(6, CLASSES)), rng.integers(0, CLASSES, 6)
    target = 0.8 * np.eye(CLASSES)[labels] + 0.2 / CLASSES
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ours = training.classifier_loss(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), 0.2)
    np.testing.assert_allclose(ours, -(target * log_p).sum(1).mean(), rtol=1e-5)
    with pytest.raises(ValueError, match="`classifier_smoothing` is 1"):
        models.make("airbench", num_classes=CLASSES, classifier_smoothing=1)


# --- Muon ----------------------------------------------------------------------------------------


def np_orthogonal(g):
    """Newton-Schulz by odd polynomials of the matrix itself."""
    x = g / (np.sqrt((g**2).sum()) + 1e-8)
    for _ in range(3):
        cube = x @ x.T @ x
        x = 3.4445 * x - 4.775 * cube + 2.0315 * (x @ x.T @ cube)
    return x


@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize("shape", [(5, 3), (2, 6), (3, 3, 2, 4)])
def test_muon_equals_its_numpy_form(shape):
    rng, rate, momentum = random_generator(), 0.24, 0.6
    tx = muon_for_kernels(rate, momentum)
    w = rng.normal(size=shape)
    params = {"kernel": jnp.asarray(w, jnp.float32)}
    state, mean = tx.init(params), 0.0
    for step in range(1, 4):
        g = rng.normal(size=shape)
        updates, state = tx.update({"kernel": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        # As optax averages: both are unbiased, the momentum as of the next step.
        mean = momentum * mean + (1 - momentum) * g
        ahead = mean / (1 - momentum ** (step + 1))
        mixed = momentum * ahead + (1 - momentum) * g / (1 - momentum**step)
        w = w * np.sqrt(shape[-1]) / np.sqrt((w**2).sum())
        w = w - rate * np_orthogonal(mixed.reshape(-1, shape[-1])).reshape(shape)
        np.testing.assert_allclose(params["kernel"], w, atol=2e-5)
        # Neither the gradient's scale nor the kernel's counts.
    scaled = muon_for_kernels(rate, momentum)
    twice = [
        tx.update({"k": c * updates["kernel"]}, scaled.init({"k": params["kernel"]}),
                  {"k": params["kernel"]})[0]["k"]
        for c in (1.0, 100.0)
    ]  # fmt: skip
    np.testing.assert_allclose(*twice, atol=1e-5)


@jax.numpy_dtype_promotion("standard")
def test_muon_takes_the_kernels_of_blocks_and_adamw_the_rest():
    params = {
        "block_0": {"block": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)},
                    "rule": {"modulation": jnp.ones((3, 3))}},
        "classifier": {"scaled_kernel": jnp.ones((3, 2))},
    }  # fmt: skip
    tx = muon(by_name={"scaled_kernel": NamedRate(0.5, lambda count: 1.0 / (count + 1))},
              weight_decay=0.1, schedule=lambda count: 1.0)  # fmt: skip
    updates, state = tx.update(params, tx.init(params), params)
    # A first step of Adam is its rate, whatever the gradient; then the decay of a tenth.
    np.testing.assert_allclose(updates["block_0"]["rule"]["modulation"], -0.11, rtol=1e-3)
    np.testing.assert_allclose(updates["classifier"]["scaled_kernel"], -0.6, rtol=1e-3)
    np.testing.assert_allclose(updates["block_0"]["block"]["bias"], 0)
    kernel = np.ones((2, 3)) / np.sqrt(6) * np.sqrt(3) - 0.24 * np_orthogonal(np.ones((2, 3)))
    ours = params["block_0"]["block"]["kernel"] + updates["block_0"]["block"]["kernel"]
    np.testing.assert_allclose(ours, kernel, atol=1e-5)
    again, _ = tx.update(params, state, params)
    assert abs(again["classifier"]["scaled_kernel"][0, 0]) < 0.35
    for wrong, message in (
        (lambda: muon(momentum=1.0), "`momentum` is 1.0"),
        (lambda: muon(weight_decay=-1), "`weight_decay` is -1"),
        (lambda: muon(other_learning_rate=0), "learning rate of 'other' is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_the_linear_schedule_falls_to_nothing():
    config = TrainConfig(optimizer="sgd", schedule="linear", epochs=2, momentum=0.0,
                         learning_rate=1.0)  # fmt: skip
    tx = optimizers.make(config, steps_per_epoch=2)
    state, steps = tx.init(jnp.float32(0)), []
    for _ in range(5):
        update, state = tx.update(jnp.float32(1), state, jnp.float32(0))
        steps.append(-float(update))
    np.testing.assert_allclose(steps, [1, 0.75, 0.5, 0.25, 0])


# --- Data ----------------------------------------------------------------------------------------


def test_alternating_flips_show_each_image_once_each_way_over_two_epochs():
    count, size = 48, 4
    spec = dataclasses.replace(CIFAR, image_shape=(4, 4, 3))
    # The left half of an image says which one it is.
    images = np.zeros((count, 4, 4, 3), np.uint8)
    images[:, :, :2] = np.arange(1, count + 1)[:, None, None, None]
    split = Split(images, np.arange(count, dtype=np.int32) % 10)
    seen = {}
    key = jax.random.key(int(random_generator().integers(2**31)))
    for data in (split, batches.to_device(split)):
        read = batches.make_reader(dataclasses.replace(spec, mean=(0,) * 3, std=(1 / 255,) * 3),
                                   "alternating_flip", size)  # fmt: skip
        for epoch in range(4):
            order = epoch_order(key, epoch, count, "alternating_flip")
            shown = [np.asarray(batch["image"]) for batch in read(data, order, 0, key)]
            for image in np.concatenate(shown):
                mirrored = image[0, 0, 0] == 0
                seen.setdefault((int(image.max()), type(data)), []).append(bool(mirrored))
    assert len(seen) == 2 * count
    for sides in seen.values():
        assert sides[0] != sides[1] and sides[:2] == sides[2:]
    first = [sides[0] for (_, kind), sides in seen.items() if kind is Split]
    assert first == [sides[0] for (_, kind), sides in seen.items() if kind is not Split]
    assert 0 < sum(first) < count
    # Without, an order is the permutation.
    plain = epoch_order(key, 0, count, "flip")
    np.testing.assert_array_equal(plain, epoch_permutation(key, 0, count))
    ahead = next(streaming.stream(split, np.array([~3, 5]), 2, 0))["image"]
    np.testing.assert_array_equal(ahead, [images[3][:, ::-1], images[5]])


def test_translations_equal_an_oracle():
    rng = random_generator()
    images = rng.normal(size=(20, 5, 6, 2)).astype(np.float32)
    moved = np.asarray(augment.random_translation(jax.random.key(3), jnp.asarray(images), 2))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    places = set()
    for before, after in zip(padded, moved):
        fits = [(i, j) for i in range(5) for j in range(5)
                if np.array_equal(before[i : i + 5, j : j + 6], after)]  # fmt: skip
        assert len(fits) == 1
        places.update(fits)
    assert len(places) > 5


def test_views_are_averaged_as_the_speed_runs_do():
    rng = random_generator()
    images = rng.normal(size=(3, 4, 4, 2))
    weights = rng.normal(size=(32, CLASSES))

    def classify(x):
        return np.tanh(x.reshape(len(x), -1)) @ weights

    def both(x):
        return (classify(x) + classify(x[:, :, ::-1])) / 2

    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    moved = (both(padded[:, :4, :4]) + both(padded[:, 2:, 2:])) / 2
    expected = {"none": classify(images), "flip": both(images)}
    expected["flip_translate"] = both(images) / 2 + moved / 2
    for views, logits in expected.items():
        ours = mean_logits(
            lambda x: jnp.tanh(x.reshape(x.shape[0], -1)) @ jnp.asarray(weights, jnp.float32),
            jnp.asarray(images, jnp.float32), views,
        )  # fmt: skip
        np.testing.assert_allclose(ours, logits, atol=1e-4)


# --- The preset ----------------------------------------------------------------------------------


def test_a_preset_gives_what_is_not_given(capsys):
    config = command_line.parse_training(
        "cifar10", "", ["--preset", "airbench", "--rule", "bp", "--epochs", "3"]
    )
    recipe = {**presets.RECIPES["airbench"], "epochs": 3, "rule": "bp", "preset": "airbench"}
    assert all(getattr(config, name) == value for name, value in recipe.items())
    with pytest.raises(SystemExit):
        command_line.parse_training("cifar10", "", ["--preset", "airbensh"])
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: unknown preset 'airbensh'.*'airbench'\?\n", error)
    with pytest.raises(ValueError, match=r"--other-learning-rate 0.1 is of no use"):
        TrainConfig(other_learning_rate=0.1)


@pytest.mark.parametrize("rule", ["lls_mxm", pytest.param("bp", marks=pytest.mark.exhaustive)])
def test_the_preset_trains_and_resumes_to_the_bit(rule, tmp_path):
    images, labels = small_set(48)
    config = dataclasses.replace(
        presets.default_config("cifar10", "airbench"), rule=rule, batch_size=16, epochs=2
    )
    tx = optimizers.make(config, 3)
    model, made = make_airbench(), rules.make(rule, num_classes=CLASSES)

    def run(folder, stop_at=None):
        steps = iter(range(100))
        return fit(
            model, made, tx, train=(images, labels), test=(images, labels), epochs=2,
            batch_size=16, augmentation=config.augmentation, workdir=tmp_path / folder,
            checkpoint_every=1, should_stop=lambda: int(next(steps) == stop_at),
        )  # fmt: skip

    whole = run("whole")
    assert run("cut", stop_at=2).stopped
    resumed = run("cut")
    for a, b in zip(jax.tree.leaves(whole.state._replace(key=0)),
                    jax.tree.leaves(resumed.state._replace(key=0)), strict=True):  # fmt: skip
        np.testing.assert_array_equal(a, b)
    kernel = np.asarray(whole.state.params["block_1"]["block"]["kernel_0"])
    # Normalised before the last step, whose rate is a sixth.
    assert np.linalg.norm(kernel) == pytest.approx(kernel.shape[-1] ** 0.5, rel=0.2)
    assert folders.read_metrics(tmp_path / "cut")[-1]["epoch"] == 2
    assert train.resume_command(config).count("--preset airbench") == 1
