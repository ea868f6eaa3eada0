"""The published optimizer: against its own figures, and a float64 form of its recurrence."""

import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from seeds import random_generator

from experiments import optimizers
from experiments.config import TrainConfig
from lls_jax import evaluation, training
from lls_jax.optimizers import NamedRate, muon, schedule_free_adamw

REFERENCE = pathlib.Path(__file__).parent / "reference"


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 2, lambda k: min((k + 1) / 4, 1)),
        ("cosine", 0, lambda k: (1 + np.cos(np.pi * k / 12)) / 2),
        # It rises for two epochs of two steps, and then falls over what is left of six.
        ("cosine", 2, lambda k: (k + 1) / 4 if k < 4 else (1 + np.cos(np.pi * (k - 4) / 8)) / 2),
        ("multistep", 1, lambda k: min((k + 1) / 2, 1) * (1 if k < 6 else 0.1 if k < 9 else 0.01)),
    ],
)
def test_rates_rise_and_fall(schedule, warmup, expected):
    config = TrainConfig(
        optimizer="sgd", momentum=0.0, learning_rate=0.5, epochs=6, schedule=schedule,
        warmup_epochs=warmup,
    )  # fmt: skip
    tx = optimizers.make(config, steps_per_epoch=2)
    params = jnp.zeros(())
    state = tx.init(params)
    for k in range(12):
        # Optax's own schedules mix dtypes.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(jnp.ones(()), state, params)
        np.testing.assert_allclose(-updates, 0.5 * expected(k), rtol=1e-5, atol=1e-7)


def test_gradients_are_clipped_by_their_norm():
    config = TrainConfig(optimizer="sgd", momentum=0.0, learning_rate=1.0, clip_norm=0.5)
    tx = optimizers.make(config, steps_per_epoch=2)
    for grads, norm in ((jnp.array([3.0, 4.0]), 0.5), (jnp.array([0.03, 0.04]), 0.05)):
        updates, _ = tx.update(grads, tx.init(grads), grads)
        np.testing.assert_allclose(updates, -grads / jnp.linalg.norm(grads) * norm, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_momentum_is_adams_b1(name):
    tx = optimizers.make(TrainConfig(optimizer=name, momentum=0.6, learning_rate=0.5), 2)
    params = jnp.zeros(())
    # Optax's own mix dtypes.
    with jax.numpy_dtype_promotion("standard"):
        _, state = tx.update(jnp.ones(()), tx.init(params), params)
        update, _ = tx.update(-jnp.ones(()), state, params)
    # 1 and then -1: their mean square is 1, their mean -(1 - b1)^2 / (1 - b1^2).
    np.testing.assert_allclose(update, 0.5 * (1 - 0.6) / (1 + 0.6), rtol=1e-5)


def run(tx, initial, gradients):
    """The parameters, and their average, after every step."""
    update = jax.jit(tx.update)
    params, state = initial, tx.init(initial)
    history = []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        history.append((params, optax.contrib.schedule_free_eval_params(state, params)))
    return history


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="measured on CPUs")
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_step_in_place_copies_neither_parameters_nor_state(weight_decay):
    tx = schedule_free_adamw(weight_decay=weight_decay)

    def step(params, state, x):
        gradient = jax.grad(lambda params: jnp.sum(jnp.tanh(x @ params)))(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params, x = jnp.zeros((256, 256)), jnp.zeros((2, 256))
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), x)
    # The gradient, and little else.
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 1.5 * params.nbytes


@pytest.mark.parametrize("case", ["plain", "decay"])
def test_equals_the_published_figures(case):
    with np.load(REFERENCE / "schedule_free_adamw.npz") as store:
        data = {k.split("/")[1]: store[k] for k in store.files if k.split("/")[0] == case}
    tx = schedule_free_adamw(float(data["learning_rate"]), weight_decay=float(data["weight_decay"]))
    history = run(tx, jnp.asarray(data["initial"]), jnp.asarray(data["gradients"]))
    assert len(data["steps"]) == 5
    for index, step in enumerate(data["steps"]):
        for ours, name in zip(history[step - 1], ("trained", "averaged")):
            reference = data[name][index]
            moved = np.linalg.norm(reference - data["initial"])
            assert np.linalg.norm(ours - reference) < 2e-5 * moved, (step, name)


def test_equals_its_recurrence_under_a_schedule():
    """In float64 NumPy, with rates that rise, fall and are zero at first."""
    rng = random_generator()
    rates = np.array([0.0, 0.02, 0.05, 0.05, 0.01, 0.03])
    gradients, y = rng.normal(size=(6, 7)), rng.normal(size=7)
    b1, b2, eps, decay = 0.8, 0.95, 1e-3, 0.1
    tx = schedule_free_adamw(
        lambda count: jnp.asarray(rates, jnp.float32)[count], b1, b2, eps, decay
    )
    history = run(tx, jnp.asarray(y, jnp.float32), jnp.asarray(gradients, jnp.float32))
    z, v, total, largest = y.copy(), np.zeros(7), 0.0, 0.0
    for k, (rate, g) in enumerate(zip(rates, gradients), 1):
        rate = rate * np.sqrt(1 - b2**k)
        v = b2 * v + (1 - b2) * g**2
        direction = g / (np.sqrt(v) + eps) + decay * y
        largest = max(largest, rate)
        total += largest**2
        c = largest**2 / total if total else 0.0
        y = (1 - c) * y + c * z + rate * (b1 * (1 - c) - 1) * direction
        z = z - rate * direction
        for ours, expected in zip(history[k - 1], (y, y + (1 - 1 / b1) * (z - y))):
            np.testing.assert_allclose(ours, expected, atol=2e-6)


def grads_and_params():
    params = {"a": jnp.arange(3.0), "b": {"c": jnp.ones((2, 2))}}
    return jax.tree.map(lambda p: 0.1 * p + 0.3, params), params


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx,
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        lambda tx: optax.named_chain(("clip", optax.clip_by_global_norm(1.0)), ("own", tx)),
        lambda tx: optax.inject_hyperparams(
            lambda learning_rate: schedule_free_adamw(learning_rate)
        )(learning_rate=0.1),
        lambda tx: optax.masked(tx, {"a": True, "b": False}),
        lambda tx: optax.multi_transform(
            {"one": tx, "other": schedule_free_adamw(0.1)}, {"a": "one", "b": "other"}
        ),
    ],
    ids=["plain", "chain", "named_chain", "inject_hyperparams", "masked", "multi_transform"],
)
def test_its_average_is_found_at_any_depth(wrap, request):
    tx = wrap(schedule_free_adamw(0.1))
    grads, params = grads_and_params()
    state = tx.init(params)
    for _ in range(3):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    whole = training.TrainState(jnp.int32(3), params, {}, state, jax.random.key(0))
    averaged = evaluation.averaged_params(whole)
    plain = schedule_free_adamw(0.1)
    clipped = grads
    if "chain" in request.node.name:
        clipped, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
    for name in ("a", "b"):
        own, own_grads = grads_and_params()[1][name], clipped[name]
        if name == "b" and "masked" in request.node.name:
            # Not its own: the gradient passes, and nothing is averaged.
            np.testing.assert_array_equal(averaged["b"]["c"], params["b"]["c"])
            continue
        own_state = plain.init(own)
        for _ in range(3):
            updates, own_state = plain.update(own_grads, own_state, own)
            own = optax.apply_updates(own, updates)
        expected = optax.contrib.schedule_free_eval_params(own_state, own)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), averaged[name], expected
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b1": 1.0}, "`b1` is 1.0"),
        ({"b1": 0.0}, "`b1` is 0.0"),
        ({"b2": -0.1}, "`b2` is -0.1"),
        ({"weight_decay": -1}, "`weight_decay` is -1"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        schedule_free_adamw(**options)
    tx = schedule_free_adamw()
    with pytest.raises(ValueError, match="`params` is None"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


class Layer(NamedTuple):
    kernel: jax.Array
    scale: jax.Array


def test_muon_finds_kernels_by_whatever_paths_have():
    """Keys of dicts, attributes and places in lists; at the top there is no path at all."""
    kernel, bias = jnp.ones((2, 3)), jnp.zeros(3)
    params = {"block": {"a": [kernel, bias], "b": Layer(kernel, bias)}, "rule": (kernel,)}
    tx = muon(by_name={"scale": NamedRate(0.1)})
    state = tx.init(params)
    counts = {
        name: [leaf.shape for leaf in jax.tree.leaves(inner)].count((2, 3))
        for name, inner in state.inner_states.items()
    }
    # Muon's momenta of two kernels; AdamW's two of what a rule learns.
    assert counts == {"kernels": 2, "other": 2, "scale": 0}
    # Optax's own mix dtypes.
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    muon().init(kernel)


@pytest.mark.parametrize("name", ["kernels", "other"])
def test_what_muon_calls_its_own_is_no_name_of_parameters(name):
    with pytest.raises(ValueError, match=f"`by_name` has '{name}'"):
        muon(by_name={name: NamedRate(0.1)})


@pytest.mark.parametrize("b2", [0.9, 0.0])
def test_what_optax_injects_has_no_value_yet(b2):
    """Options that are arrays of the state, while programs are compiled."""
    given = {"learning_rate": 0.1, "b1": 0.8, "b2": b2, "weight_decay": 0.01}
    params, grads = jnp.array([1.0, -1.0]), jnp.array([0.5, 2.0])
    averages = []
    for make in (optax.inject_hyperparams(schedule_free_adamw), schedule_free_adamw):
        tx = make(**given)
        state, y = jax.jit(tx.init)(params), params
        update = jax.jit(tx.update, donate_argnums=1)
        for _ in range(3):
            updates, state = update(grads, state, y)
            y = optax.apply_updates(y, updates)
        inner = state if isinstance(state, optax.contrib.ScheduleFreeState) else state.inner_state
        averages.append(optax.contrib.schedule_free_eval_params(inner, y))
    np.testing.assert_allclose(*averages, rtol=1e-5)
    tx = optax.inject_hyperparams(muon)()
    jax.jit(tx.init)({"block": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}})


@pytest.mark.parametrize(
    ("epochs", "steps_per_epoch", "rates"),
    [
        (1, 1, [1]),
        (1, 2, [1, 0.1]),
        (1, 4, [1, 1, 0.1, 0.01]),
        (2, 4, [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]),
        (3, 2, [1, 1, 1, 0.1, 0.1, 0.01]),
    ],
)
def test_multistep_drops_at_half_and_at_three_quarters(epochs, steps_per_epoch, rates):
    config = TrainConfig(
        optimizer="sgd", momentum=0.0, learning_rate=1.0, schedule="multistep", epochs=epochs
    )
    tx = optimizers.make(config, steps_per_epoch)
    params = jnp.ones(1)
    state, taken = tx.init(params), []
    for _ in range(epochs * steps_per_epoch):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(jnp.ones(1), state, params)
        taken.append(-float(updates[0]))
    np.testing.assert_allclose(taken, rates, rtol=1e-6)
