"""The op and each of its forms, against float64 NumPy on fresh random inputs.

Kernels run in their interpreters here. Triton has one only in a process that was started with
TRITON_INTERPRET=1: `test_triton_in_its_interpreter` starts that process.
"""

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from kernel_heads import CASES, CLASSES, Margin, cross_entropy_64

from lls_jax import models, rules, training
from pallas_kernels.local_loss import (
    KernelUnavailableError,
    cross_entropy,
    head_loss,
    heads,
    interpreter,
    lanes,
    mean_head_loss,
    padded,
    pallas_triton,
    require,
    tiles,
    triton_source,
)
from pallas_kernels.local_loss.availability import Device, current_device
from pallas_kernels.local_loss.results import Call

REFERENCE = pathlib.Path(__file__).parent / "reference"
INTERPRETS_TRITON = os.environ.get("TRITON_INTERPRET") == "1"
EVERYTHING = bool(os.environ.get("LLS_JAX_EXHAUSTIVE"))
MOST_LATENTS = 2100 if EVERYTHING else 300
IMPLEMENTATIONS = [
    "xla",
    "split",
    "pallas",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            not INTERPRETS_TRITON, reason="runs in the process of test_triton_in_its_interpreter"
        ),
    ),
]


def run(function, implementation, *arguments, **options):
    return function(
        *arguments, implementation=implementation, interpret=implementation != "xla", **options
    )


def draw(rng, case, latents=None, batch=None, dtype=np.float32):
    """Ragged shapes; a row of zeros now and then, and one of large numbers."""
    batch = batch or int(rng.integers(1, 40))
    latents = latents or int(rng.integers(1, MOST_LATENTS))
    z = rng.normal(size=(batch, latents)).astype(np.float32)
    if batch > 2:
        z[0], z[-1] = 0.0, 30 * z[-1]
    projection = np.sign(rng.normal(size=(case.rows, latents))) / np.sqrt(latents)
    params = {name: rng.normal(size=shape) for name, shape in case.shapes.items()}
    labels = rng.integers(0, CLASSES, batch)
    return (
        jnp.asarray(z, dtype),
        jnp.asarray(projection, jnp.float32),
        jnp.asarray(labels, jnp.int32),
        {name: jnp.asarray(value, jnp.float32) for name, value in params.items()},
    )


def in_float64(case, z, projection, labels, params):
    z, projection = (np.asarray(x, np.float64) for x in (z, projection))
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    return case.oracle(z @ projection.T, (z**2).sum(1), params, np.asarray(labels))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_equal_float64(implementation, name):
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    rng, case = np.random.default_rng(seed), CASES[name]
    z, projection, labels, params = draw(rng, case)
    weights = rng.normal(size=len(z)).astype(np.float32)

    def weighted(z, projection, params):
        losses = run(head_loss, implementation, z, projection, labels, case.head, params)
        return jnp.vdot(jnp.asarray(weights), losses), losses

    learned = (z, projection, params)
    differentiate = jax.jit(jax.value_and_grad(weighted, (0, 1, 2), has_aux=True))
    (_, ours), grads = differentiate(*learned)
    assert ours.dtype == jnp.float32
    expected = in_float64(case, z, projection, labels, params)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5 * max(1, abs(expected).max()))

    # A derivative along a random direction, at once for all that is learned, and for each alone.
    leaves, tree = jax.tree.flatten(learned)
    gradient_leaves = jax.tree.leaves(grads)
    assert len(leaves) == len(gradient_leaves)
    for index, (leaf, grad) in enumerate(zip(leaves, gradient_leaves)):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
        # Where an example has no latents, its norm has no derivative: rows of zeros stay.
        moves = rng.normal(size=leaf.shape) * (np.asarray(leaf) != 0)

        def moved(step, index=index, moves=moves):
            values = [np.asarray(x, np.float64) for x in leaves]
            values[index] = values[index] + step * moves
            z, projection, params = jax.tree.unflatten(tree, values)
            return in_float64(case, z, projection, labels, params)

        ahead, behind = moved(1e-6), moved(-1e-6)
        difference = weights @ (ahead - behind) / 2e-6
        inner = float(np.sum(np.asarray(grad, np.float64) * moves))
        # Of the size of what is added up, each rounded, and what the difference itself loses.
        size = float(np.linalg.norm(np.where(moves, grad, 0.0)) * np.linalg.norm(moves))
        lost = 2e-8 * (1 + np.abs(weights) @ np.abs(expected))
        # Where a loss has a corner (|x| at 0, the largest of equal scores: few latents have many),
        # any slope between those of its two sides is right.
        lost += np.abs(weights) @ np.abs(ahead - 2 * moved(0.0) + behind) / 2e-6
        if index == 0:
            # What an example's direction leaves of a gradient over its norm: of one latent nothing.
            norms = np.linalg.norm(leaf, axis=1)
            moved_by = np.linalg.norm(moves, axis=1) / np.where(norms, norms, 1)
            lost += 2e-6 * np.abs(weights) @ moved_by
        assert abs(inner - difference) <= 2e-5 * size + lost, (name, index)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_mean_whole_tiles_and_half_precision(implementation):
    rng = np.random.default_rng(7)
    case = CASES["lls_mxm"]
    # One example; exactly a program and a chunk; half precision, one more than both.
    for batch, latents, dtype in ((1, 3, np.float32), (16, 64, np.float32), (33, 65, jnp.bfloat16)):
        z, projection, labels, params = draw(rng, case, latents, batch, dtype)

        def total(z, projection, params, function, labels=labels):
            losses = run(function, implementation, z, projection, labels, case.head, params)
            return jnp.float32(3) * jnp.mean(losses)

        results = []
        for function in (mean_head_loss, head_loss):
            differentiate = jax.value_and_grad(
                functools.partial(total, function=function), (0, 1, 2)
            )
            results.append(jax.tree.leaves(jax.jit(differentiate)(z, projection, params)))
        for a, b in zip(*results, strict=True):
            a, b = (np.asarray(x, np.float64) for x in (a, b))
            tolerance = 1e-2 if dtype == jnp.bfloat16 else 1e-5
            assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 0.1)
        expected = in_float64(case, z, projection, labels, params)
        np.testing.assert_allclose(results[0][0], 3 * expected.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("rows", "latents"), [(2, 3), (100, 40), (500, 17), (1000, 17)])
def test_few_and_many_classes(implementation, rows, latents):
    rng = np.random.default_rng(3)
    z = jnp.asarray(rng.normal(size=(5, latents)), jnp.float32)
    projection = jnp.asarray(np.sign(rng.normal(size=(rows, latents))), jnp.float32)
    labels = jnp.asarray(rng.integers(0, rows, 5))

    def head(scores, square, params, label):
        return cross_entropy(scores, square, None, label)

    if rows == 1000 and implementation in ("pallas", "triton"):
        with pytest.raises(KernelUnavailableError, match="as many scores as 1000"):
            run(head_loss, implementation, z, projection, labels, head, {})
        return
    loss = run(head_loss, implementation, z, projection, labels, head, {})
    wide = np.asarray(z, np.float64)
    scores = wide @ np.asarray(projection).T / np.sqrt((wide**2).sum(1, keepdims=True))
    np.testing.assert_allclose(loss, cross_entropy_64(scores / 0.5, np.asarray(labels)), rtol=1e-5)


def test_check_grads():
    case = CASES["mlp"]
    z, projection, labels, params = draw(np.random.default_rng(1), case, 21, 2)

    def f(z, projection, params):
        return run(mean_head_loss, "pallas", z, projection, labels, case.head, params)

    check_grads(f, (z, projection, params), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


MODULATED = {"lls": "lls", "m": "lls_m", "mxm": "lls_mxm", "mxmr": "lls_mxm_reduced"}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_reference_vectors(implementation):
    """Figures of the authors' own implementation, by the rules."""
    checked, seen = 0, {}
    with np.load(REFERENCE / "losses.npz") as store:
        for name in sorted({key.split("/")[0] for key in store.files}):
            data = {k.split("/")[1]: store[k] for k in store.files if k.split("/")[0] == name}
            if str(data["rule"]) not in MODULATED:
                continue
            seen.setdefault(str(data["rule"]), 0)
            seen[str(data["rule"])] += 1
            # Every case by XLA; of each rule the first by the kernels, whose compiling takes long.
            if implementation != "xla" and not EVERYTHING and seen[str(data["rule"])] > 1:
                continue
            activation = data["activation"]
            spatial = activation.ndim == 4
            activation = activation.transpose(0, 2, 3, 1) if spatial else activation
            reduced = {"basis_rows": int(data["basis_rows"])} if data["rule"] == "mxmr" else {}
            rule = rules.make(
                MODULATED[str(data["rule"])],
                num_classes=int(data["n_classes"]),
                waveform=str(data["waveform"]),
                temperature=float(data["temperature"]),
                label_smoothing=float(data["label_smoothing"]),
                **reduced,
            ).with_implementation(implementation)
            if implementation != "xla":
                rule = rule.interpreted()
            params = {}
            if str(data["rule"]) != "lls":
                params = {"modulation": jnp.asarray(data["feedback"])}

            def loss(activation, params, rule=rule, data=data):
                labels = jnp.asarray(data["labels"], jnp.int32)
                return rule.loss(params, activation, labels, pool_size=int(data["pool"]))

            value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(
                jnp.asarray(activation), params
            )
            d_activation = np.asarray(grads[0])
            d_activation = d_activation.transpose(0, 3, 1, 2) if spatial else d_activation
            assert abs(float(value) - float(data["loss"])) < 1e-6, name
            distance = np.linalg.norm(d_activation - data["d_activation"])
            assert distance < 1e-5 * np.linalg.norm(data["d_activation"]), name
            if params:
                distance = np.linalg.norm(grads[1]["modulation"] - data["d_feedback"])
                assert distance < 1e-5 * np.linalg.norm(data["d_feedback"]), name
            checked += 1
    assert checked >= (8 if implementation == "xla" else 4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_rule_of_ones_own_learns_through_every_form(implementation):
    model, tx = models.make("small_conv", num_classes=10), optax.sgd(0.1)
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(4, 8, 8, 3)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 10, 4), jnp.int32),
    }
    losses = {}
    for name in {"xla", implementation}:
        rule = Margin(implementation=name, interpret=name != "xla")
        state = training.create_train_state(model, rule, tx, jax.random.key(0), batch["image"])
        step, losses[name] = training.make_train_step(model, rule, tx), []
        for _ in range(3):
            state, metrics = step(state, batch)
            losses[name].append(metrics["layer_loss"])
    np.testing.assert_allclose(losses[implementation], losses["xla"], rtol=1e-4)
    assert np.all(losses["xla"][2] < losses["xla"][0])


@pytest.mark.skipif(INTERPRETS_TRITON, reason="this is that process")
def test_triton_in_its_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    options = ["-k", "triton", "-n0", "-pno:cacheprovider"]
    command = [sys.executable, "-m", "pytest", __file__, *options]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = pathlib.Path(__file__).parents[1]
    result = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, timeout=3600
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    # Every other test of this kind, and none skipped but this one.
    assert f"{len(CASES) + 11} passed, 1 skipped" in result.stdout, result.stdout[-500:]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extremes_stay_finite(implementation):
    z = jnp.stack([jnp.zeros(4), jnp.full(4, 1e15), jnp.full(4, 1e-30)])
    value, grad = jax.value_and_grad(
        lambda z: jnp.sum(
            run(
                head_loss, implementation, z, jnp.ones((CLASSES, 4)), jnp.arange(3),
                CASES["lls"].head, {},
            )
        )
    )(z)  # fmt: skip
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_quotients_go_toward_zero_and_the_logarithm_of_infinity_is_infinite(implementation):
    def divided(scores, square, params, label):
        # Of constants, which are folded, and of what is read.
        both = jax.lax.div(np.int32(-7), np.int32(2)) + jax.lax.div(label - 8, 3)
        return both.astype(jnp.float32)

    def logarithm(scores, square, params, label):
        return jnp.log1p(params)

    z, projection = jnp.ones((3, 4)), jnp.ones((CLASSES, 4))
    for head, params, expected in (
        (divided, {}, [-5.0, -5.0, -4.0]),
        (logarithm, jnp.float32(jnp.inf), [np.inf] * 3),
        (logarithm, jnp.float32(-1), [-np.inf] * 3),
    ):
        ours = run(head_loss, implementation, z, projection, jnp.array([0, 2, 5]), head, params)
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_label_that_is_no_class_is_nan_inside_a_compiled_function(implementation):
    z = jnp.arange(12.0).reshape(4, 3)

    @jax.jit
    def loss_and_gradient(z, labels):
        def total(z):
            loss = run(
                head_loss, implementation, z, jnp.ones((CLASSES, 3)), labels, CASES["lls"].head, {}
            )
            return jnp.sum(loss), loss

        (_, loss), gradient = jax.value_and_grad(total, has_aux=True)(z)
        return loss, gradient

    loss, gradient = loss_and_gradient(z, jnp.array([1, -1, CLASSES, 0]))
    np.testing.assert_array_equal(np.isnan(loss), [False, True, True, False])
    np.testing.assert_array_equal(np.isnan(gradient).all(1), [False, True, True, False])


# --- What a kernel cannot have, and wrong arguments.


def coupled(scores, square, params, label):
    return jnp.mean(jnp.square(scores - jax.lax.pmean(scores, "batch"))) + 0.0 * square


def test_a_head_that_couples_the_batch_is_split_and_nothing_else():
    rng = np.random.default_rng(0)
    z, projection, labels, _ = draw(rng, CASES["lls"], 7, 6)
    losses = run(head_loss, "split", z, projection, labels, coupled, {})
    scores = np.asarray(z, np.float64) @ np.asarray(projection, np.float64).T
    np.testing.assert_allclose(losses, ((scores - scores.mean(0)) ** 2).mean(1), rtol=1e-5)
    with pytest.raises(KernelUnavailableError, match="cannot couple the examples of a batch"):
        run(head_loss, "pallas", z, projection, labels, coupled, {})


@pytest.mark.parametrize(
    ("head", "params", "message"),
    [
        (lambda s, q, p, y: jnp.sort(s)[y], {}, "cannot have `sort`"),
        (lambda s, q, p, y: jnp.cumsum(s)[y], {}, "cannot have `cumsum`"),
        (lambda s, q, p, y: jnp.sum(s) + (~y).astype(s.dtype), {}, "cannot have `not` of int32"),
        (lambda s, q, p, y: jnp.sum(s @ p**2), jnp.ones((10, 300)), r"as large as \(10, 300\)"),
    ],
)
def test_what_a_kernel_cannot_have_is_named(head, params, message):
    z, projection, labels, _ = draw(np.random.default_rng(0), CASES["lls"], 7, 3)
    with pytest.raises(KernelUnavailableError, match=f"{message}.*use the implementation 'split'"):
        run(head_loss, "pallas", z, projection, labels, head, params)
    expected = run(head_loss, "xla", z, projection, labels, head, params)
    ours = run(head_loss, "split", z, projection, labels, head, params)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("chunk", "axis"), [(0, 0), (6, 0), (0, 1), (2, 1)])
def test_a_chunk_ends_where_its_matrix_does(chunk, axis):
    shape = (100, 40)
    expected = {
        row * 40 + column for row, column in np.ndindex(shape) if (row, column)[axis] // 16 == chunk
    }
    (rows, columns), inside = pallas_triton._chunk(shape, chunk, axis)
    places = np.asarray(rows * 40 + columns)[np.asarray(inside)]
    assert set(places) == expected and len(places) == len(expected)
    # The same as source, in which NumPy stands for Triton's language.
    printed = triton_source._chunk("0", shape, str(chunk), axis)
    language = {"tl": types.SimpleNamespace(arange=np.arange)}
    place, mask = np.broadcast_arrays(*(eval(text, language) for text in printed))
    np.testing.assert_array_equal(place[mask], places)


def test_a_projections_own_parameters_are_not_the_kernels():
    z, projection, labels, _ = draw(np.random.default_rng(0), CASES["lls"], 7, 3)
    params = {"feedback": jnp.ones((1000, 1000)), "scale": jnp.float32(2)}
    head = CASES["margin"].head
    ours = run(head_loss, "pallas", z, projection, labels, head, params)
    expected = run(head_loss, "xla", z, projection, labels, head, {"scale": jnp.float32(2)})
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def arguments(**change):
    return {
        "latents": jnp.ones((2, 4)),
        "projection": jnp.ones((3, 4)),
        "labels": jnp.zeros(2, jnp.int32),
        "head": lambda scores, square, params, label: jnp.sum(scores),
        "params": {},
        **change,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": jnp.ones((2, 3, 4))}, r"`latents` has shape \(2, 3, 4\)"),
        ({"latents": jnp.ones((0, 4))}, r"`latents` has shape \(0, 4\); expected"),
        ({"latents": jnp.ones((2, 4), jnp.int32)}, "`latents` has dtype int32"),
        ({"projection": jnp.ones((3, 5))}, r"`projection` has shape \(3, 5\); expected \[rows, 4"),
        ({"labels": jnp.zeros(3, jnp.int32)}, r"`labels` has shape \(3,\); expected \(2,\)"),
        ({"labels": jnp.zeros(2)}, "`labels` has dtype float32"),
        ({"labels": [0, 1]}, r"`labels` is \[0, 1\]; expected an array of integers"),
        ({"implementation": "cuda"}, "`implementation` is 'cuda'; expected one of 'xla', 'split'"),
        ({"head": lambda s, q, p, y: s}, "`head` gives .*expected a scalar float"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        head_loss(**arguments(**change))


@pytest.mark.parametrize(
    ("device", "capability"),
    [
        ({"platform": "gpu", "compute_capability": "9.0"}, (9, 0)),
        ({"platform": "gpu", "compute_capability": "gfx90a"}, None),
        ({"platform": "cpu"}, None),
    ],
)
def test_only_gpus_are_asked_for_their_capability(device, capability, monkeypatch):
    found = types.SimpleNamespace(device_kind="some", **device)
    monkeypatch.setattr(jax, "devices", lambda: [found])
    assert current_device() == Device(device["platform"], "some", capability)


def test_a_head_that_holds_what_is_differentiated_is_refused():
    def loss(scale):
        head = lambda s, q, p, y: scale * jnp.sum(s)  # noqa: E731
        return jnp.sum(head_loss(**arguments(head=head, implementation="pallas", interpret=True)))

    with pytest.raises(ValueError, match="pass it in `params`"):
        jax.grad(loss)(2.0)


def test_a_label_that_is_no_class_is_named_outside_a_compiled_function():
    rule = rules.make("lls", num_classes=3)
    with pytest.raises(ValueError, match="`labels` holds 3; expected indices of 3 classes"):
        rule.loss({}, jnp.ones((2, 4)), jnp.array([0, 3]), pool_size=4)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about machines without a GPU")
@pytest.mark.parametrize("name", ["split", "pallas", "triton"])
def test_a_kernel_never_falls_back(name):
    message = f"'{name}' cannot run here: it needs an NVIDIA GPU and the device is cpu.*use 'xla'"
    with pytest.raises(KernelUnavailableError, match=message):
        head_loss(**arguments(implementation=name))
    with pytest.raises(KernelUnavailableError, match=message):
        require(name)
    require("xla")


def test_measured_tiles_are_read(tmp_path, monkeypatch):
    table = tmp_path / "tuned.json"
    monkeypatch.setenv("LLS_JAX_TUNED", str(table))
    usual = tiles.default_tiles(10, 512, {})
    assert tiles.choose_tiles("pallas", "NVIDIA H100", 10, 512, {}) == usual
    table.write_text('{"pallas: NVIDIA H100": {"10x512": {"block_latents": 32, "num_warps": 2}}}')
    found = tiles.choose_tiles("pallas", "NVIDIA H100", 10, 512, {})
    assert found == tiles.Tiles(block_latents=32, num_warps=2)
    assert tiles.choose_tiles("pallas", "NVIDIA A100", 10, 512, {}) == usual
    table.write_text("not json")
    assert tiles.choose_tiles("pallas", "NVIDIA H100", 10, 512, {}) == usual


# --- A kernel with one thing wrong must not pass.

KERNEL = pathlib.Path(importlib.util.find_spec("pallas_kernels.local_loss.pallas_triton").origin)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("def launch(", "def launch("),
        # Masks: of the examples behind the batch, of rows, of latents.
        ("mask=is_example, other=0.0)", "mask=is_example, other=1.0)"),
        ("jnp.minimum(place, batch - 1)", "jnp.maximum(place - 1, 0)"),
        ("(row < num_rows)[:, None] & (latent < num_latents)[None, :]", "(row < 8)[:, None]"),
        # The norm's own gradient, the products, the program's place.
        ("2.0 * d_square[:, None] * latents_tile(latent)", "0.0 * latents_tile(latent)"),
        ("square + jnp.sum(z * z, axis=1)", "square + jnp.sum(z, axis=1)"),
        ("[index < outputs for", "[index < 3 for"),
        ("ref.at[(program, *indices)]", "ref.at[(0, *indices)]"),
    ],
)
def test_a_mutation_of_the_kernel_is_seen(right, wrong):
    source = KERNEL.read_text()
    assert source.count(right) == 1, right
    # A row of zeros has a gradient beside which no other shows.
    z, projection, labels, params = draw(np.random.default_rng(5), CASES["lls_mxm"], 70, 19)
    arguments = (z.at[0].set(1.0), projection, labels, params)
    assert kernel_passes(source.replace(right, wrong), *arguments) is (right == wrong)


def kernel_passes(source, z, projection, labels, params):
    head, weights = CASES["lls_mxm"].head, jnp.full(len(z), 0.5)
    scope = {"__name__": "mutated"}
    exec(compile(source, "mutated", "exec"), scope)

    def total(z, params):
        losses = head_loss(z, projection, labels, head, params, "xla")
        return jnp.vdot(weights, losses), losses

    grads, losses = jax.jit(jax.grad(total, (0, 1), has_aux=True))(z, params)
    try:
        results = scope["launch"](
            Call(
                head, params, z, projection, labels, weights, wants_scores=False,
                tiles=tiles.default_tiles(10, 70, params), interpret=True,
            )
        )  # fmt: skip
    except (AttributeError, TypeError, ValueError):
        return False
    ours = [results.loss, results.d_latents, *results.d_learned]
    return all(
        np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-5 * np.abs(np.asarray(b)).max()
        for a, b in zip(ours, [losses, *jax.tree.leaves(grads)], strict=True)
    )


def run_head_on_poisoned_lanes(case):
    """A head and its gradient at padded shapes, NaN behind every array; and what JAX finds."""
    program = heads.trace(case.head, case.rows, parameter_shapes(case), jnp.int32)
    rng = np.random.default_rng(2)
    inputs = [
        rng.integers(0, CLASSES, v.aval.shape)
        if v.aval.dtype == jnp.int32
        # Small: where tanh is almost 1, how far it is from 1 is all rounding.
        else 0.3 * np.abs(rng.normal(size=v.aval.shape))
        for v in program.jaxpr.invars
    ]
    arrays = [jnp.asarray(x, v.aval.dtype) for x, v in zip(inputs, program.jaxpr.invars)]
    arithmetic = lanes.Lanes(pallas_triton.PallasOps())

    def poisoned(x):
        if not x.ndim:
            return padded.Padded(x, (), np.dtype(x.dtype))
        if padded.is_large(x.shape):
            return padded.Padded(padded.InMemory(loader(x)), x.shape, np.dtype(x.dtype))
        wide = padded.padded_shape(x.shape)
        behind = jnp.nan if x.dtype == jnp.float32 else -7
        tile = jnp.full(wide, behind, x.dtype).at[tuple(map(slice, x.shape))].set(x)
        return padded.Padded(tile, x.shape, np.dtype(x.dtype))

    def loader(x):
        def load(chunk, axis):
            rows = x if axis == 0 else x.T
            behind = ((0, 16), (0, padded.dot_side(rows.shape[1]) - rows.shape[1]))
            return jax.lax.dynamic_slice_in_dim(jnp.pad(rows, behind), 16 * chunk, 16)

        return load

    def whole(x):
        if isinstance(x.value, padded.Outer):
            left, right = map(whole, x.value)
            return jnp.matmul(left.T, right, precision="highest")
        return jnp.asarray(arithmetic.tile(x))[tuple(map(slice, x.shape))]

    def in_tiles(*arrays):
        consts = [poisoned(jnp.asarray(value)) for value in program.consts]
        results = interpreter.run(arithmetic, program.jaxpr, consts, list(map(poisoned, arrays)))
        return list(map(whole, results))

    expected = jax.core.eval_jaxpr(program.jaxpr, program.consts, *arrays)
    return jax.jit(in_tiles)(*arrays), expected


def parameter_shapes(case):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in case.shapes.items()}


@pytest.mark.parametrize("name", CASES)
def test_what_lies_behind_an_array_is_never_seen(name):
    ours, expected = run_head_on_poisoned_lanes(CASES[name])
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * max(1, np.abs(b).max()))


def test_without_its_masks_it_is_seen(monkeypatch):
    monkeypatch.setattr(lanes.Lanes, "mask", lambda self, x, axes, fill: x)
    ours, _ = run_head_on_poisoned_lanes(CASES["smoothed"])
    assert all(np.isnan(x).any() for x in ours)
