"""The local loss, every implementation, against float64 NumPy on fresh random inputs.

Kernels run in their interpreters here. Triton has one only in a process that was started with
TRITON_INTERPRET=1: `test_triton_in_its_interpreter` starts that process.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from lls_jax.rules.basis import periodic_basis
from pallas_kernels.local_loss import (
    KernelUnavailableError,
    availability,
    config,
    explain,
    local_loss,
    require,
)

REFERENCE = pathlib.Path(__file__).parent / "reference"
INTERPRETS_TRITON = os.environ.get("TRITON_INTERPRET") == "1"
# Drawn problems, and the most latents of one; the interpreters take a second for a thousand.
EVERYTHING = bool(os.environ.get("LLS_JAX_EXHAUSTIVE"))
EXAMPLES = {"xla": 15, "pallas": 8, "triton": 6}
if EVERYTHING:
    EXAMPLES = {"xla": 25, "pallas": 12, "triton": 12}
MOST_LATENTS = 2100 if EVERYTHING else 600
IMPLEMENTATIONS = [
    "xla",
    "pallas",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            not INTERPRETS_TRITON, reason="runs in the process of test_triton_in_its_interpreter"
        ),
    ),
]


def make_case(seed, shape, pool_size, rows, classes, modulation, dtype=np.float32):
    rng = np.random.default_rng(seed)
    activation = rng.normal(size=shape).astype(np.float32)
    latents = shape[-1] * pool_size**2 if len(shape) == 4 else pool_size
    projection = np.sign(rng.normal(size=(rows, latents))).astype(np.float32)
    scale = {"none": None, "vector": (rows,), "matrix": (rows, classes)}[modulation]
    m = None if scale is None else rng.normal(size=scale).astype(np.float32)
    outputs = classes if modulation == "matrix" else rows
    labels = rng.integers(0, outputs, shape[0]).astype(np.int32)
    return jnp.asarray(activation, dtype), projection, m, labels


def run(implementation, *case, **options):
    return local_loss(
        *case, implementation=implementation, interpret=implementation != "xla", **options
    )


@st.composite
def problems(draw):
    """Shapes that are ragged, odd, tiny, upsampled."""
    batch = draw(st.integers(1, 5))
    if draw(st.booleans()):
        channels = draw(st.integers(1, 70))
        pool_size = draw(
            st.integers(1, max(1, int((MOST_LATENTS / channels) ** 0.5)) if channels > 20 else 5)
        )
        shape = (batch, draw(st.integers(1, 9)), draw(st.integers(1, 9)), channels)
    else:
        shape, pool_size = (batch, draw(st.integers(1, 300))), draw(st.integers(1, MOST_LATENTS))
    modulation = draw(st.sampled_from(["none", "vector", "matrix"]))
    rows, classes = draw(st.integers(2, 40)), draw(st.integers(2, 40))
    dtype = draw(st.sampled_from([jnp.float32, jnp.bfloat16]))
    case = make_case(
        draw(st.integers(0, 2**31)), shape, pool_size, rows, classes, modulation, dtype
    )
    if draw(st.booleans()):
        # A row of zeros, whose norm is clamped, and one of large numbers.
        scale = np.ones((batch,) + (1,) * (len(shape) - 1), np.float32)
        scale[0], scale[-1] = 0.0, 1e4
        case = (case[0] * scale.astype(case[0].dtype), *case[1:])
    options = {
        "pool_size": pool_size,
        "temperature": draw(st.sampled_from([0.01, 0.5, 1.0])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "normalize": True if case[0].ndim == 2 else draw(st.booleans()),
    }
    return case, options


def bound(case, options):
    """Rounding of sums over the latents and rows, magnified by scale and temperature."""
    activation, projection, modulation, _ = case
    latents = projection.shape[1]
    size = np.sqrt(latents) if options["normalize"] else latents
    size *= 1 if options["normalize"] else max(1.0, float(jnp.abs(activation).max()))
    if modulation is not None:
        size *= max(1.0, float(np.abs(modulation).max()))
        size *= projection.shape[0] if modulation.ndim == 2 else 1
    return 2e-6 + 1.2e-6 * size / options["temperature"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_float64(implementation):
    @settings(deadline=None, max_examples=EXAMPLES[implementation], derandomize=False)
    @given(drawn=problems())
    def check(drawn):
        case, options = drawn
        ours = run(implementation, *case, **options)
        assert ours.dtype == jnp.float32
        wide = (np.asarray(case[0], np.float64), *case[1:])
        expected = numpy_oracle.local_loss(*wide, **options)
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=bound(case, options))

    check()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("shape", "pool_size", "normalize", "modulation"),
    # Each layout with and without the norm, upsampled and down, each modulation with each.
    [
        ((3, 7, 5, 4), 2, True, "matrix"),
        ((3, 7, 5, 4), 2, False, "none"),
        ((2, 3, 3, 2), 4, True, "vector"),
        ((3, 6), 9, True, "none"),
        ((5, 20), 7, False, "vector"),
        ((5, 20), 7, True, "matrix"),
    ],
)
def test_gradients_equal_float64_differences(
    implementation, shape, pool_size, normalize, modulation
):
    rng = np.random.default_rng()
    case = make_case(rng.integers(2**31), shape, pool_size, 5, 4, modulation)
    weights = rng.normal(size=shape[0]).astype(np.float32)
    options = {
        "pool_size": pool_size,
        "temperature": 0.5,
        "label_smoothing": 0.1,
        "normalize": normalize,
    }
    learned = [np.asarray(x) for x in case[:3] if x is not None]

    def total(function, values):
        m = values[2] if modulation != "none" else None
        return (weights * function(values[0], values[1], m, case[3], **options)).sum()

    grads = jax.grad(lambda v: total(lambda *a, **o: run(implementation, *a, **o), v))(
        [jnp.asarray(x) for x in learned]
    )
    for index, grad in enumerate(grads):
        for _ in range(3):
            direction = rng.normal(size=grad.shape)

            def moved(step, index=index, direction=direction):
                values = [np.asarray(x, np.float64) for x in learned]
                values[index] = values[index] + step * direction
                return total(numpy_oracle.local_loss, values)

            expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
            ours = float(np.sum(np.asarray(grad, np.float64) * direction))
            scale = np.linalg.norm(grad) * np.linalg.norm(direction)
            assert abs(ours - expected) <= 1e-5 * scale + 1e-7


def test_check_grads():
    activation, projection, m, labels = make_case(1, (3, 7, 5, 4), 2, 5, 4, "matrix")

    def f(activation, projection, m):
        return jnp.sum(run("pallas", activation, projection, m, labels, pool_size=2))

    arguments = [activation, jnp.asarray(projection), jnp.asarray(m)]
    check_grads(f, arguments, order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


MODULATED = {"lls": None, "m": "vector", "mxm": "matrix", "mxmr": "matrix"}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_reference_vectors(implementation):
    """Figures of the authors' own implementation."""
    checked = 0
    with np.load(REFERENCE / "losses.npz") as store:
        cases = sorted({key.split("/")[0] for key in store.files})
        for name in cases:
            data = {k.split("/")[1]: store[k] for k in store.files if k.split("/")[0] == name}
            if str(data["rule"]) not in MODULATED:
                continue
            activation = data["activation"]
            spatial = activation.ndim == 4
            pool = int(data["pool"])
            activation = activation.transpose(0, 2, 3, 1) if spatial else activation
            latents = activation.shape[-1] * pool**2 if spatial else pool
            rows = int(data["basis_rows"] if str(data["rule"]) == "mxmr" else data["n_classes"])
            basis = periodic_basis(rows, latents, str(data["waveform"]))
            modulation = jnp.asarray(data["feedback"]) if MODULATED[str(data["rule"])] else None

            def mean_loss(activation, modulation, basis=basis, data=data, pool=pool):
                return jnp.mean(
                    run(
                        implementation,
                        activation,
                        basis,
                        modulation,
                        jnp.asarray(data["labels"], jnp.int32),
                        pool_size=pool,
                        temperature=float(data["temperature"]),
                        label_smoothing=float(data["label_smoothing"]),
                    )
                )

            loss, grads = jax.value_and_grad(mean_loss, argnums=(0, 1))(
                jnp.asarray(activation), modulation
            )
            d_activation = np.asarray(grads[0])
            d_activation = d_activation.transpose(0, 3, 1, 2) if spatial else d_activation
            assert abs(float(loss) - float(data["loss"])) < 1e-6, name
            distance = np.linalg.norm(d_activation - data["d_activation"])
            assert distance < 1e-5 * np.linalg.norm(data["d_activation"]), name
            if modulation is not None:
                distance = np.linalg.norm(grads[1] - data["d_feedback"])
                assert distance < 1e-5 * np.linalg.norm(data["d_feedback"]), name
            checked += 1
    assert checked >= 8


@pytest.mark.skipif(INTERPRETS_TRITON, reason="this is that process")
def test_triton_in_its_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    options = ["-k", "triton", "-n0", "-pno:cacheprovider"]
    command = [sys.executable, "-m", "pytest", __file__, *options]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = pathlib.Path(__file__).parents[1]
    result = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    # Every other test of this kind, and none skipped but this one.
    assert "11 passed, 1 skipped" in result.stdout, result.stdout[-500:]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extremes_stay_finite(implementation):
    projection = jnp.ones((3, 4))
    activation = jnp.stack([jnp.zeros(4), jnp.full(4, 1e15), jnp.full(4, 1e-30)])
    value, grad = jax.value_and_grad(
        lambda a: jnp.sum(run(implementation, a, projection, None, jnp.arange(3), pool_size=4))
    )(activation)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_label_that_is_no_class_is_nan_inside_a_compiled_function(implementation):
    activation, projection = jnp.arange(12.0).reshape(4, 3), jnp.ones((2, 3))

    @jax.jit
    def loss_and_gradient(activation, labels):
        def total(activation):
            loss = run(implementation, activation, projection, None, labels, pool_size=3)
            return jnp.sum(loss), loss

        (_, loss), gradient = jax.value_and_grad(total, has_aux=True)(activation)
        return loss, gradient

    loss, gradient = loss_and_gradient(activation, jnp.array([1, -1, 2, 0]))
    np.testing.assert_array_equal(np.isnan(loss), [False, True, True, False])
    np.testing.assert_array_equal(np.isnan(gradient).all(1), [False, True, True, False])


def arguments(**change):
    return {
        "activation": jnp.ones((2, 4)),
        "projection": jnp.ones((3, 4)),
        "modulation": None,
        "labels": jnp.zeros(2, jnp.int32),
        "pool_size": 4,
        **change,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": jnp.ones((2, 3, 4))}, r"`activation` has shape \(2, 3, 4\)"),
        ({"activation": jnp.ones((0, 4))}, r"`activation` has shape \(0, 4\); no axis"),
        ({"activation": jnp.ones((2, 4), jnp.int32)}, "`activation` has dtype int32"),
        (
            {"projection": jnp.ones((3, 5))},
            r"`projection` has shape \(3, 5\); expected \[rows, 4\]",
        ),
        ({"modulation": jnp.ones((4, 3))}, r"`modulation` has shape \(4, 3\); expected \[3\]"),
        ({"labels": jnp.zeros(3, jnp.int32)}, r"`labels` has shape \(3,\); expected \(2,\)"),
        ({"labels": jnp.zeros(2)}, "`labels` has dtype float32"),
        ({"labels": jnp.array([0, 3])}, "`labels` holds 3; expected indices of 3 classes"),
        ({"labels": jnp.array([-1, 0])}, "`labels` holds -1; expected indices of 3 classes"),
        ({"pool_size": 0}, "`pool_size` is 0"),
        ({"temperature": 0.0}, "`temperature` is 0.0"),
        ({"label_smoothing": 1.0}, "`label_smoothing` is 1.0"),
        ({"implementation": "cuda"}, "`implementation` is 'cuda'; expected one of 'xla'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        local_loss(**arguments(**change))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about machines without a GPU")
@pytest.mark.parametrize("name", ["pallas", "triton"])
def test_a_kernel_never_falls_back(name):
    message = f"'{name}' cannot run here: it needs an NVIDIA GPU and the device is cpu.*use 'xla'"
    with pytest.raises(KernelUnavailableError, match=message):
        local_loss(**arguments(implementation=name))
    with pytest.raises(KernelUnavailableError, match=message):
        require(name)
    wide = {"projection": jnp.ones((2000, 4)), "implementation": name, "interpret": True}
    with pytest.raises(KernelUnavailableError, match="up to 1024 rows and classes and there are"):
        local_loss(**arguments(**wide))
    choice = explain(jnp.ones((2, 4)), jnp.ones((3, 4)), None, pool_size=4)
    assert choice.implementation == "xla"
    assert "pallas: it needs an NVIDIA GPU" in choice.reason
    require("xla")


def test_auto_takes_a_kernel_only_where_it_was_measured_to_be_faster(tmp_path, monkeypatch):
    table = tmp_path / "tuned.json"
    monkeypatch.setenv("LLS_JAX_TUNED", str(table))
    device = availability.Device("gpu", "NVIDIA H100", (9, 0))
    problem = config.Problem(
        height=8, width=8, channels=16, pool_size=2, rows=10, classes=10,
        modulation="none", dtype="float32",
    )  # fmt: skip
    choice = availability.choose_implementation(device, problem)
    assert choice.implementation == "xla"
    assert "not measured to be faster on NVIDIA H100" in choice.reason
    tiles = config.Config(block_channels=32, block_columns=2, block_rows=4, num_warps=2)
    table.write_text(json.dumps({"pallas: NVIDIA H100": {problem.key: dataclasses.asdict(tiles)}}))
    assert availability.choose_implementation(device, problem).implementation == "pallas"
    assert config.choose("pallas", "NVIDIA H100", problem) == tiles
    assert config.choose("pallas", "NVIDIA A100", problem) == config.heuristic(problem)
    old = availability.Device("gpu", "Tesla T4", (7, 5))
    reason = availability.choose_implementation(old, problem).reason
    assert "needs compute capability 8.0 and Tesla T4 has 7.5" in reason
    table.write_text("not json")
    assert availability.choose_implementation(device, problem).implementation == "xla"
