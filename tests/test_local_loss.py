"""The local loss, every implementation, against float64 NumPy on fresh random inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from pallas_kernels.local_loss import IMPLEMENTATIONS, local_loss


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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(deadline=None, max_examples=25, derandomize=False)
@given(data=st.data())
def test_equals_float64(implementation, data):
    convolutional = data.draw(st.booleans())
    batch = data.draw(st.integers(1, 9))
    if convolutional:
        shape = (
            batch,
            *(data.draw(st.integers(1, 9)) for _ in range(2)),
            data.draw(st.integers(1, 5)),
        )
        pool_size = data.draw(st.integers(1, 10))
    else:
        shape = (batch, data.draw(st.integers(1, 40)))
        pool_size = data.draw(st.integers(1, 90))
    modulation = data.draw(st.sampled_from(["none", "vector", "matrix"]))
    rows, classes = data.draw(st.integers(2, 12)), data.draw(st.integers(2, 12))
    case = make_case(data.draw(st.integers(0, 2**31)), shape, pool_size, rows, classes, modulation)
    options = {
        "pool_size": pool_size,
        "temperature": data.draw(st.sampled_from([0.01, 0.5, 1.0])),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.1])),
        "normalize": data.draw(st.booleans()),
    }
    ours = local_loss(*case, **options, implementation=implementation)
    expected = numpy_oracle.local_loss(*case, **options)
    # Rounding of a sum over the latents, magnified by the temperature.
    latents = case[1].shape[1]
    size = np.sqrt(latents) if options["normalize"] else latents
    bound = 4e-7 * size * (rows if modulation == "matrix" else 1) / options["temperature"]
    largest_modulation = 1 if case[2] is None else max(1.0, float(np.abs(case[2]).max()))
    np.testing.assert_allclose(
        ours, expected, rtol=2e-5, atol=2e-6 + 3 * bound * largest_modulation
    )


@pytest.mark.parametrize("modulation", ["none", "vector", "matrix"])
@pytest.mark.parametrize(("shape", "pool_size"), [((3, 7, 5, 4), 2), ((3, 6), 9)])
def test_gradients(shape, pool_size, modulation):
    rng = np.random.default_rng()
    activation, projection, m, labels = make_case(
        rng.integers(2**31), shape, pool_size, 5, 4, modulation
    )
    differentiated = [activation, jnp.asarray(projection)] + ([] if m is None else [jnp.asarray(m)])

    def f(activation, projection, m=None):
        loss = local_loss(activation, projection, m, labels, pool_size=pool_size)
        return jnp.sum(loss)

    check_grads(f, differentiated, order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_zero_rows_and_large_activations_stay_finite():
    projection = jnp.ones((3, 4))
    activation = jnp.stack([jnp.zeros(4), jnp.full(4, 1e15), jnp.full(4, 1e-30)])
    value, grad = jax.value_and_grad(
        lambda a: jnp.sum(local_loss(a, projection, None, jnp.arange(3), pool_size=4))
    )(activation)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def test_bfloat16_is_accumulated_in_float32():
    case = make_case(1, (4, 8, 8, 16), 4, 10, 10, "none", jnp.bfloat16)
    options = {"pool_size": 4, "temperature": 0.5, "label_smoothing": 0.0, "normalize": True}
    ours = local_loss(*case, **options)
    assert ours.dtype == jnp.float32
    as_float = (np.asarray(case[0], np.float32), *case[1:])
    np.testing.assert_allclose(ours, numpy_oracle.local_loss(*as_float, **options), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": jnp.ones((2, 3, 4))}, r"`activation` has shape \(2, 3, 4\)"),
        ({"activation": jnp.ones((2, 4), jnp.int32)}, "`activation` has dtype int32"),
        (
            {"projection": jnp.ones((3, 5))},
            r"`projection` has shape \(3, 5\); expected \[rows, 4\]",
        ),
        ({"modulation": jnp.ones((4, 3))}, r"`modulation` has shape \(4, 3\); expected \[3\]"),
        ({"labels": jnp.zeros(3, jnp.int32)}, r"`labels` has shape \(3,\); expected \(2,\)"),
        ({"labels": jnp.zeros(2)}, "`labels` has dtype float32"),
        ({"pool_size": 0}, "`pool_size` is 0"),
        ({"temperature": 0.0}, "`temperature` is 0.0"),
        ({"label_smoothing": 1.0}, "`label_smoothing` is 1.0"),
        ({"implementation": "cuda"}, "`implementation` is 'cuda'; expected one of 'xla'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "activation": jnp.ones((2, 4)),
        "projection": jnp.ones((3, 4)),
        "modulation": None,
        "labels": jnp.zeros(2, jnp.int32),
        "pool_size": 4,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        local_loss(**arguments)
