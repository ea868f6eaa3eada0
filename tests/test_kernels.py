"""The kernels as compiled programs: what is lowered, what machine code comes out, who tunes them.

None of this needs a GPU; what does carries the marker `gpu` (`LLS_JAX_TEST_GPU=1 pytest -m gpu`).
"""

import json
import os

import cuda
import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle
import optax
import pytest

from lls_jax import models, rules, training
from pallas_kernels import local_loss, timing, tune
from pallas_kernels.local_loss import config, gradient, pallas_triton, shapes

STATICS = gradient.LossOptions(pool_size=0, temperature=0.5, label_smoothing=0.1, normalize=True)
MAX_SHARED = 99 * 1024
ARCHITECTURES = [90, *(pytest.param(number, marks=pytest.mark.exhaustive) for number in (80, 100))]
# Beside the published layers: many classes, reduced bases, half precision, odd sizes.
ODD = [
    config.Problem(
        height=height, width=height, channels=channels, pool_size=pool, rows=rows,
        classes=classes, modulation=modulation, dtype=dtype,
    )
    for height, channels, pool, rows, classes, modulation, dtype in [
        (8, 512, 2, 100, 100, "matrix", "bfloat16"),
        (64, 64, 4, 200, 200, "none", "float32"),
        (7, 1024, 1, 1000, 1000, "matrix", "bfloat16"),
        (7, 3, 5, 20, 100, "matrix", "float16"),
        (0, 4096, 2048, 100, 200, "matrix", "float32"),
        (0, 2048, 2048, 1000, 1000, "none", "float32"),
        (0, 2048, 2048, 500, 500, "matrix", "float32"),
        (0, 33, 2100, 2, 2, "vector", "float32"),
    ]
]  # fmt: skip
EVERY_PROBLEM = [*shapes.problems(tuple(shapes.LAYERS), shapes.MODULATIONS, 10, ("float32",)), *ODD]


# One of each modulation and layout, and the largest.
SOME_PROBLEMS = [*EVERY_PROBLEM[:3], EVERY_PROBLEM[-1], *ODD[:1], *ODD[2:3], *ODD[6:7]]
PROBLEMS = EVERY_PROBLEM if os.environ.get("LLS_JAX_EXHAUSTIVE") else SOME_PROBLEMS


def example(model_name="small_conv", batch=4, side=32):
    generator = np.random.default_rng(0)
    return models.make(model_name, num_classes=10), {
        "image": jnp.asarray(generator.normal(size=(batch, side, side, 3)), jnp.float32),
        "label": jnp.asarray(generator.integers(0, 10, batch), jnp.int32),
    }


def lower_step(rule_name, implementation):
    model, batch = example()
    rule = rules.make(rule_name, num_classes=10, implementation=implementation)
    tx = optax.adam(1e-3)
    state = training.create_train_state(
        model, rules.make(rule_name, num_classes=10), tx, jax.random.key(0), batch["image"]
    )
    return model, cuda.lower(training.make_train_step(model, rule, tx), state, batch)


# The dense block's and the classifier's products, forward and to the weights; and with a matrix the
# sum over the batch that makes its gradient, one a layer.
@pytest.mark.parametrize(("name", "products"), [("lls", 4), ("lls_m", 4), ("lls_mxm", 8)])
def test_the_training_step_has_one_kernel_a_layer_and_no_projection(name, products):
    model, lowered = lower_step(name, "pallas")
    kernels = cuda.triton_kernels(lowered)
    assert [kernel.name for kernel in kernels] == ["local_loss"] * len(model.specs)
    assert lowered.as_text().count("stablehlo.dot_general") == products
    _, plain = lower_step(name, "xla")
    assert cuda.triton_kernels(plain) == []
    assert plain.as_text().count("stablehlo.dot_general") > products
    # Where threads read what others have stored: the scores before a matrix, what is back from it,
    # and the latents.
    barriers = {"lls": 1, "lls_m": 1, "lls_mxm": 3}[name]
    assert [kernel.ttir.count("gpu.barrier") for kernel in kernels] == [barriers] * len(kernels)


def abstract(problem, batch=128):
    """Shapes of a problem's kernel arguments."""
    bins = problem.pool_size**2 if problem.is_spatial else 1
    latents = problem.channels if problem.is_spatial else problem.pool_size
    spatial = (problem.height, problem.width) if problem.is_spatial else ()
    modulation = {
        "none": None,
        "vector": jax.ShapeDtypeStruct((problem.rows,), jnp.float32),
        "matrix": jax.ShapeDtypeStruct((problem.rows, problem.classes), jnp.float32),
    }[problem.modulation]
    return (
        jax.ShapeDtypeStruct((batch, *spatial, problem.channels), problem.dtype),
        jax.ShapeDtypeStruct((bins, problem.rows, latents), jnp.float32),
        modulation,
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )


def assert_fits(used, problem):
    assert used.stack == 0, f"{problem} spills {used.stack} bytes of registers"
    assert used.shared <= MAX_SHARED, f"{problem} takes {used.shared} bytes of shared memory"
    assert 0 < used.registers <= 255


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_every_pallas_tile_compiles_and_does_not_spill(capability, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    for problem in PROBLEMS:
        statics = STATICS._replace(pool_size=problem.pool_size)

        def launch(activation, projection, modulation, labels, problem=problem, statics=statics):
            return pallas_triton.launch(
                problem, config.heuristic(problem), statics,
                activation, projection, modulation, labels,
                save_latents=problem.modulation == "none", interpret=False,
            )  # fmt: skip

        (kernel,) = cuda.triton_kernels(cuda.lower(jax.jit(launch), *abstract(problem)))
        assert_fits(cuda.compile_ttir(kernel, capability, tmp_path), problem)


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_every_triton_tile_compiles_and_does_not_spill(capability, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    from pallas_kernels.local_loss import triton_native

    for problem in PROBLEMS:
        statics = STATICS._replace(pool_size=problem.pool_size)
        tiles = config.heuristic(problem)
        fixed = triton_native.constants(problem, tiles, statics, problem.modulation == "none")
        pointers = {"labels_ptr": "*i32", "activation_ptr": cuda.POINTERS[problem.dtype]}
        used = cuda.compile_jit(
            triton_native.local_loss_kernel, fixed, pointers, tiles, capability, tmp_path
        )
        assert_fits(used, problem)


@pytest.mark.parametrize("name", shapes.LAYERS)
def test_the_listed_layers_are_those_of_the_models(name):
    side = 128 if name == "mobilenet_v1" else 32
    model = models.make(name, num_classes=10)
    rule = rules.make("lls", num_classes=10)
    x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    seen = []
    variables = jax.eval_shape(
        lambda key: model.init(rule, key, jnp.zeros(x.shape)), jax.random.key(0)
    )
    for block_name, spec in zip(model.block_names, model.specs):
        block = {
            "params": variables[0][block_name]["block"],
            "batch_stats": variables[1][block_name]["block"],
        }
        activation = jax.eval_shape(spec.module.apply, block, x)
        seen.append(shapes.Layer(activation.shape[1:], spec.pool_size))
        x = jax.eval_shape(lambda x, spec=spec: spec.transition(x, None), activation)
    assert list(dict.fromkeys(seen)) == list(shapes.LAYERS[name])


def test_tuning_writes_what_won_and_drops_what_lost(tmp_path, monkeypatch, capsys):
    table = tmp_path / "cache" / "tuned.json"
    monkeypatch.setenv("LLS_JAX_TUNED", str(table))
    made = []

    def interpreted(problem, batch, implementation, tiles=None):
        made.append((implementation, tiles))
        kernel = implementation != "xla"
        call = original(problem, batch, implementation, tiles, interpret=kernel)
        loss, grads = call()
        assert np.isfinite(loss) and np.isfinite(grads[0]).all()
        return call

    original = timing.loss_and_gradients
    monkeypatch.setattr(timing, "loss_and_gradients", interpreted)
    small = shapes.problem(shapes.Layer((3, 3, 4), 2), "matrix", 4, "float32")
    kind = jax.devices()[0].device_kind
    for speed, entries in ((0.5, [small.key]), (2.0, [])):
        monkeypatch.setattr(
            timing, "turns", lambda calls, count, speed=speed: [1.0] + [speed] * (len(calls) - 1)
        )
        (row,) = tune.tune([small], ["pallas"], [2])
        assert row["speed_over_xla"] == pytest.approx(1 / speed)
        assert list(json.loads(table.read_text())[f"pallas: {kind}"]) == entries
    assert "(xla stays)" in capsys.readouterr().out
    assert len({tiles for _, tiles in made}) > 4
    monkeypatch.undo()
    if jax.default_backend() == "cpu":
        assert tune.main([]) == 2
        assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_turns_measures_each_function_and_copies_have_a_speed():
    one = jax.jit(lambda x: x + 1)
    seconds = timing.turns([lambda: one(jnp.ones(4)), lambda: one(jnp.ones(8))], 2)
    assert len(seconds) == 2 and min(seconds) > 0
    assert timing.copy_bandwidth(1 << 16) > 0


# --- With a GPU ----------------------------------------------------------------------------------

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        jax.default_backend() != "gpu",
        reason="no CUDA GPU here, or LLS_JAX_TEST_GPU is not set",
    ),
]


def kernels_here():
    for name in ("pallas", "triton"):
        try:
            local_loss.require(name)
        except local_loss.KernelUnavailableError:
            continue
        yield name


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.key)
class TestOnGpu:
    pytestmark = needs_gpu

    def test_equals_float64_and_xla(self, problem):
        for name in kernels_here():
            case = timing.arguments(problem, 7)
            options = {
                "pool_size": problem.pool_size,
                "temperature": 0.5,
                "label_smoothing": 0.1,
                "normalize": True,
            }
            ours = local_loss.local_loss(*case, **options, implementation=name)
            wide = [None if x is None else np.asarray(x, np.float64) for x in case[:3]]
            expected = numpy_oracle.local_loss(*wide, np.asarray(case[3]), **options)
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
            ours = timing.loss_and_gradients(problem, 7, name)()
            plain = timing.loss_and_gradients(problem, 7, "xla")()
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain)):
                a, b = (np.asarray(x, np.float32) for x in (a, b))
                tolerance = 1e-2 if problem.dtype != "float32" else 1e-4
                assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b) + 1e-7

    def test_two_runs_are_equal_to_the_bit(self, problem):
        for name in kernels_here():
            call = timing.loss_and_gradients(problem, 33, name)
            for a, b in zip(jax.tree.leaves(call()), jax.tree.leaves(call())):
                np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no CUDA GPU here")
@pytest.mark.parametrize("rule_name", ["lls", "lls_m", "lls_mxm"])
def test_200_steps_with_and_without_kernels_are_alike(rule_name):
    model, batch = example(batch=32)
    losses = {}
    for name in ("xla", *kernels_here()):
        rule, tx = rules.make(rule_name, num_classes=10, implementation=name), optax.sgd(0.01)
        state = training.create_train_state(model, rule, tx, jax.random.key(0), batch["image"])
        step = training.make_train_step(model, rule, tx)
        kept = []
        for _ in range(200):
            state, metrics = step(state, batch)
            kept.append(np.asarray(metrics["layer_loss"]))
        losses[name] = np.stack(kept)
    for name, values in losses.items():
        np.testing.assert_allclose(values, losses["xla"], rtol=5e-3, atol=5e-3, err_msg=name)
