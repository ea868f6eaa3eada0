"""The kernels as compiled programs: what is lowered, what machine code comes out, who tunes them.

None of this needs a GPU; what does carries the marker `gpu` (`LLS_JAX_TEST_GPU=1 pytest -m gpu`).
"""

import dataclasses
import functools
import json
import os
import random

import cuda
import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle
import optax
import pytest
import small_models
from kernel_heads import CASES, Margin

from lls_jax import models, rules, training
from lls_jax.runs import kernels
from pallas_kernels import local_loss, timing, tune
from pallas_kernels.local_loss import heads, pallas_triton, shapes, split, tiles
from pallas_kernels.local_loss.results import Call

MAX_SHARED = 99 * 1024
ARCHITECTURES = [90, *(pytest.param(number, marks=pytest.mark.exhaustive) for number in (80, 100))]
# Beside the published layers: many classes, reduced bases, odd sizes.
ODD = [
    shapes.Problem(latents, rows, classes, modulation)
    for latents, rows, classes, modulation in [
        (2048, 20, 100, "matrix"),
        (2048, 100, 10, "matrix"),
        (2048, 100, 100, "matrix"),
        (1024, 200, 200, "none"),
        (75, 20, 20, "vector"),
        (2048, 500, 500, "none"),
        (2100, 2, 2, "vector"),
    ]
]
LAYERS = [layer for layers in shapes.LAYERS.values() for layer in layers]
# One of each modulation, and the largest.
SOME_PROBLEMS = [*shapes.problems(LAYERS[:1], shapes.MODULATIONS, 10), *ODD[:1], *ODD[4:5]]
SOME_HEADS = {name: CASES[name] for name in ("mlp", "goodness", "hundred")}
EVERY_PROBLEM = [*SOME_PROBLEMS, *shapes.problems(LAYERS, ["matrix"], 10)[1:], *ODD]
EXHAUSTIVE = bool(os.environ.get("LLS_JAX_EXHAUSTIVE"))
PROBLEMS = EVERY_PROBLEM if EXHAUSTIVE else SOME_PROBLEMS


def example(model_name="small_conv", batch=4, side=32):
    generator = np.random.default_rng(0)
    return models.make(model_name, num_classes=10), {
        "image": jnp.asarray(generator.normal(size=(batch, side, side, 3)), jnp.float32),
        "label": jnp.asarray(generator.integers(0, 10, batch), jnp.int32),
    }


def lower_step(rule, implementation):
    model, batch = example()
    tx = optax.adam(1e-3)
    create = functools.partial(training.create_train_state, model, rule, tx)
    state = jax.eval_shape(create, jax.random.key(0), batch["image"])
    step = training.make_train_step(model, rule.with_implementation(implementation), tx)
    return model, cuda.lower(step, state, batch)


# The dense block's and the classifier's products, forward and to the weights.
@pytest.mark.parametrize("name", ["lls", "lls_mxm", "own"])
def test_the_training_step_has_one_kernel_a_layer_and_no_projection(name):
    rule = Margin() if name == "own" else rules.make(name, num_classes=10)
    model, lowered = lower_step(rule, "pallas")
    kernels = cuda.triton_kernels(lowered)
    assert [kernel.name for kernel in kernels] == ["head_loss"] * len(model.specs)
    assert lowered.as_text().count("stablehlo.dot_general") == 4
    # Nothing passes between threads through memory.
    assert [kernel.ttir.count("gpu.barrier") for kernel in kernels] == [0] * len(kernels)
    # float32 as it is, not rounded to TF32.
    products = [line for line in kernels[0].ttir.splitlines() if "tt.dot " in line]
    assert len(products) >= 2 and not [line for line in products if "tf32" in line.lower()]
    if name == "own":
        _, apart = lower_step(rule, "split")
        names = [kernel.name for kernel in cuda.triton_kernels(apart)]
        assert sorted(names) == ["head_loss_back"] * 4 + ["head_loss_scores"] * 4
        _, plain = lower_step(rule, "xla")
        assert cuda.triton_kernels(plain) == []
        assert plain.as_text().count("stablehlo.dot_general") > 4


def assert_fits(used, what):
    # A sine's reduction of large angles takes 32 bytes; here and there two words are put away.
    allowed = 32 if what == "own_target" else 8
    assert used.stack <= allowed, f"{what} spills {used.stack} bytes of registers"
    assert used.shared <= MAX_SHARED, f"{what} takes {used.shared} bytes of shared memory"
    assert 0 < used.registers <= 255


def cases(capability):
    """Heads, their parameters' shapes, rows and latents: what is compiled."""
    everything = EXHAUSTIVE and capability == 90
    for problem in EVERY_PROBLEM if everything else SOME_PROBLEMS:
        yield problem, problem.head, problem.params, problem.rows, problem.latents
    for name, case in (CASES if everything else SOME_HEADS).items():
        params = {
            key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in case.shapes.items()
        }
        yield name, case.head, params, case.rows, 512


def abstract(rows, latents, batch=128):
    return (
        jax.ShapeDtypeStruct((batch, latents), jnp.float32),
        jax.ShapeDtypeStruct((rows, latents), jnp.float32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.float32),
    )


def compile_pallas(head, params, rows, latents, sizes, capability, folder):
    def launch(params, *arrays):
        return pallas_triton.launch(Call(head, params, *arrays, not params, sizes))

    lowered = cuda.lower(jax.jit(launch), params, *abstract(rows, latents))
    (kernel,) = cuda.triton_kernels(lowered)
    return cuda.compile_ttir(kernel, capability, folder)


def compile_triton(head, params, rows, latents, sizes, capability, folder):
    from pallas_kernels.local_loss import triton_source

    program = heads.trace(head, rows, params, jnp.int32)
    arrays = [*program.consts, *jax.tree.leaves(params)]
    source = triton_source.write_source(
        program,
        [(tuple(array.shape), np.dtype(array.dtype)) for array in arrays],
        rows,
        np.dtype(np.int32),
        True,
        not params,
    )
    return cuda.compile_jit(
        triton_source.load_kernel(source),
        triton_source.constants(128, latents, rows, sizes.block_latents),
        {"labels_ptr": "*i32"},
        sizes,
        capability,
        folder,
    )


COMPILE = {"pallas": compile_pallas, "triton": compile_triton}


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("form", COMPILE)
def test_every_kernel_compiles_and_does_not_spill(form, capability, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    for what, head, params, rows, latents in cases(capability):
        sizes = tiles.default_tiles(rows, latents, params)
        used = COMPILE[form](head, params, rows, latents, sizes, capability, tmp_path)
        assert_fits(used, what)


def test_the_tiles_that_a_search_tries_compile(tmp_path):
    """Of all neighbours of all tiles, by both forms, for three architectures, some.

    They may put words away, up to 96 bytes have been seen: what that costs, the search measures.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    draw = random.Random(seed)
    tried = [
        (problem, sizes, form, capability)
        for problem in PROBLEMS
        for sizes in list(tune.neighbours(problem))[1:]
        for form in COMPILE
        for capability in (80, 90, 100)
    ]
    for problem, sizes, form, capability in draw.sample(tried, 20 if EXHAUSTIVE else 2):
        head, params, rows, latents = problem.head, problem.params, problem.rows, problem.latents
        used = COMPILE[form](head, params, rows, latents, sizes, capability, tmp_path)
        print(problem, sizes, form, capability, used)
        # What a block may have with compute capability 8.0.
        assert used.shared <= 163 * 1024 and 0 < used.registers <= 255


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_the_split_kernels_compile_and_do_not_spill(capability, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    for rows, latents in ((10, 512), (100, 2048), (1000, 2048)):
        sizes = tiles.default_tiles(rows, latents, {})

        def launch(*arrays, sizes=sizes):
            def head(scores, square, params, label):
                return jnp.sum(scores) + square

            return split.launch(Call(head, {}, *arrays, False, sizes))

        for kernel in cuda.triton_kernels(cuda.lower(jax.jit(launch), *abstract(rows, latents))):
            used = cuda.compile_ttir(kernel, capability, tmp_path)
            # A thousand scores of sixteen examples are more than registers hold.
            assert used.stack <= (0 if rows <= 500 else 512), (kernel.name, rows, used)


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


def test_tuning_writes_the_fastest_tiles(tmp_path, monkeypatch, capsys):
    table = tmp_path / "cache" / "tuned.json"
    monkeypatch.setenv("LLS_JAX_TUNED", str(table))
    made = []

    def interpreted(problem, batch, implementation, sizes=None):
        made.append((implementation, sizes))
        if implementation == "xla" or len(made) < 4:
            call = original(problem, batch, implementation, sizes, implementation != "xla")
            loss, grads = call()
            assert np.isfinite(loss) and np.isfinite(grads[0]).all()
            return call
        if len(made) == 4:
            raise RuntimeError("no room for these tiles")
        return lambda: None

    original = timing.loss_and_gradients
    monkeypatch.setattr(timing, "loss_and_gradients", interpreted)
    small = shapes.Problem(16, 4, 4, "matrix")
    monkeypatch.setattr(
        timing, "turns", lambda calls, count: [1.0] * (len(calls) - 2) + [0.25, 0.5]
    )
    (row,) = tune.tune([small], ["pallas"], [2])
    assert row["speed_over_xla"] == pytest.approx(4) and row["speed_over_heuristic"] == 4
    (entry,) = json.loads(table.read_text()).values()
    assert entry == {"4x16-4x4": dataclasses.asdict(made[-2][1])}
    sizes = tiles.choose_tiles("pallas", jax.devices()[0].device_kind, 4, 16, small.params)
    assert sizes == made[-2][1]
    assert len({sizes for _, sizes in made}) > 4
    assert "RuntimeError" in capsys.readouterr().err
    monkeypatch.undo()
    if jax.default_backend() == "cpu":
        assert tune.main([]) == 2
        assert "needs an NVIDIA GPU" in capsys.readouterr().err


def work(**change):
    model = small_models.two_blocks(10)
    rule = rules.make("lls_mxm", num_classes=10).interpreted()
    given = {"model": model, "rule": rule, "tx": optax.sgd(0.1)}
    return kernels.Work(**{**given, "image_shape": (8, 8, 3), "batch_size": 2, **change})


@pytest.mark.parametrize(
    ("seconds", "taken"),
    [([1.0, 2.0, 0.5], "pallas"), ([1.0, 0.96, 2.0], "xla"), ([1.0, 0.9, 0.95], "split")],
)
def test_a_form_is_taken_by_a_margin(seconds, taken):
    names = ("xla", "split", "pallas")
    choice = kernels.decide(dict(zip(names, seconds)), {})
    assert choice.implementation == taken
    assert choice.speeds == pytest.approx({n: seconds[0] / s for n, s in zip(names, seconds)})
    assert taken in str(choice) and f"{seconds[0] / seconds[2]:.2f}" in str(choice)


def test_a_run_measures_its_own_steps():
    def turns(calls, count, agree):
        # Every contestant has been compiled, and runs.
        found = [call()[1] for call in calls]
        np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-4)
        assert all(np.isfinite(losses).all() for losses in found)
        return [1.0, 0.5]

    choice = kernels.measure(work(), ("xla", "pallas"), turns)
    assert choice == kernels.KernelChoice("pallas", {"xla": 1.0, "pallas": 2.0}, {})


def test_a_choice_is_kept_with_the_run_and_for_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measured = []

    def measure(work):
        measured.append(work)
        return kernels.KernelChoice("pallas", {"xla": 1.0, "pallas": 1.2}, {"triton": "why"})

    monkeypatch.setattr(kernels, "measure", measure)
    one = work(rule=rules.make("lls_mxm", num_classes=10))
    folder = tmp_path / "run"
    first = kernels.choose(one, folder, "gpu")
    assert (first.implementation, first.origin) == ("pallas", "measured")
    assert kernels.choose(one, None, "gpu").origin == "remembered"
    assert kernels.choose(one._replace(batch_size=3), None, "gpu").origin == "measured"
    kernels.keep(kernels.KernelChoice("split", {}, {}), folder)
    assert kernels.choose(one, folder, "gpu") == kernels.KernelChoice("split", {}, {}, "resumed")
    assert len(measured) == 2
    # Of a later version, which may know more.
    (folder / "kernels.json").write_text('{"implementation": "split", "colour": 3}')
    assert kernels.choose(one, folder, "gpu").origin == "remembered"
    gone = kernels.KernelChoice("gone", {}, {})
    kernels.keep(gone, folder)
    assert kernels.choose(one, folder, "gpu").origin == "remembered"
    # A cache that cannot be written ends no run.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert kernels.choose(one, None, "gpu").origin == "measured"
    # Where there is nothing to choose.
    for rule in (rules.make("predsim", num_classes=10), one.rule.with_implementation("xla")):
        assert kernels.choose(one._replace(rule=rule), None, "gpu") is None
    assert kernels.choose(one, None, "cpu") is None


@pytest.mark.parametrize(
    ("is_first", "said", "taken", "measures"),
    [
        # What the first process knows; what it has measured, whatever this one has.
        (False, [3], "pallas", False),
        (False, [0, 2], "split", True),
        (True, [0, 4], "triton", True),
    ],
)
def test_processes_take_what_the_first_one_says(
    tmp_path, monkeypatch, is_first, said, taken, measures
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    told, measured = [], []

    def agree(number):
        told.append(number)
        return said[len(told) - 1]

    def measure(work):
        measured.append(work)
        return kernels.KernelChoice("triton", {"xla": 1.0, "triton": 1.2}, {})

    monkeypatch.setattr(kernels, "measure", measure)
    monkeypatch.setattr(kernels.processes, "is_first", lambda: is_first)
    monkeypatch.setattr(kernels.processes, "make_agreement", lambda: agree)
    one = work(rule=rules.make("lls_mxm", num_classes=10))
    assert kernels.choose(one, None, "gpu").implementation == taken
    assert bool(measured) == measures
    assert told == ([0, 4] if is_first else [0] * len(said))
    # The others write nothing.
    assert any(tmp_path.rglob("*.json")) == is_first


def test_a_form_that_cannot_run_is_left_out_and_says_why():
    one = work(rule=rules.make("lls_mxm", num_classes=10), batch_size=1)
    choice = kernels.measure(one, ("pallas",), lambda calls, count, agree: [1.0] * len(calls))
    if jax.default_backend() == "cpu":
        assert choice.implementation == "xla" and "needs an NVIDIA GPU" in choice.refused["pallas"]


def test_a_form_that_another_process_cannot_run_is_left_out(monkeypatch):
    said = iter([0, 1])
    monkeypatch.setattr(kernels.processes, "make_agreement", lambda: lambda number: next(said))
    monkeypatch.setattr(kernels, "_chain", lambda *arguments: lambda: None)
    choice = kernels.measure(work(), ("pallas",), lambda calls, count, agree: [1.0] * len(calls))
    assert list(choice.speeds) == ["xla"] and "another process" in choice.refused["pallas"]


def test_a_form_that_does_not_compile_ends_no_run(monkeypatch):
    def chain(work, name, *arguments):
        if name in broken:
            raise RuntimeError("RESOURCE_EXHAUSTED: shared memory")

    def measure():
        return kernels.measure(work(), ("pallas",), lambda calls, count, agree: [1.0] * len(calls))

    monkeypatch.setattr(kernels, "_chain", chain)
    broken = ("pallas",)
    choice = measure()
    assert choice.refused == {"pallas": "RuntimeError: RESOURCE_EXHAUSTED: shared memory"}
    assert "(measured in part; " in str(choice) and "pallas failed: RuntimeError" in str(choice)
    # Without the plain form there is nothing to run.
    broken = ("xla",)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        measure()


def test_a_form_is_given_to_all_heads_or_to_those_that_name_none():
    heads = [rules.make("lls", num_classes=3, implementation=form) for form in ("pallas", None)]
    both = rules.PerBlock((*heads, rules.make("predsim", num_classes=3)))
    for change, forms in (
        (rules.PerBlock.with_implementation, ["xla", "xla"]),
        (kernels.with_default, ["pallas", "xla"]),
    ):
        made = change(both, "xla")
        assert [rule.implementation for rule in made.rules[:2]] == forms
        assert made.rules[2] == both.rules[2]


def test_turns_are_as_many_as_all_agree_on():
    called = []
    timing.turns([lambda: called.append(1)], 2, lambda number: 3)
    # To compile, to guess, and two turns of three.
    assert len(called) == 1 + 3 + 2 * 3


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
    for name in ("split", "pallas", "triton"):
        try:
            local_loss.require(name)
        except local_loss.KernelUnavailableError:
            continue
        yield name


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
class TestOnGpu:
    pytestmark = needs_gpu

    def test_equals_float64_and_xla(self, problem):
        for name in kernels_here():
            z, projection, labels, params = timing.arguments(problem, 7)
            ours = local_loss.head_loss(z, projection, labels, problem.head, params, name)
            wide = [None if x is None else np.asarray(x, np.float64) for x in (z, projection)]
            modulation = params.get("modulation")
            expected = numpy_oracle.local_loss(
                *wide,
                None if modulation is None else np.asarray(modulation, np.float64),
                np.asarray(labels),
                pool_size=problem.latents,
                temperature=0.5,
                label_smoothing=0.0,
                normalize=True,
            )
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
            ours = timing.loss_and_gradients(problem, 7, name)()
            plain = timing.loss_and_gradients(problem, 7, "xla")()
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain)):
                a, b = (np.asarray(x, np.float32) for x in (a, b))
                assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b) + 1e-7

    def test_two_runs_are_equal_to_the_bit(self, problem):
        for name in kernels_here():
            call = timing.loss_and_gradients(problem, 33, name)
            for a, b in zip(jax.tree.leaves(call()), jax.tree.leaves(call())):
                np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no CUDA GPU here")
@pytest.mark.parametrize("name", CASES)
def test_every_head_on_a_gpu_equals_xla(name):
    case = CASES[name]
    problem = shapes.Problem(300, case.rows, 10, "none")
    z, projection, labels, _ = timing.arguments(problem, 33)
    params = {
        key: jax.random.normal(jax.random.key(4), shape) for key, shape in case.shapes.items()
    }
    found = {}
    for form in ("xla", *kernels_here()):

        def loss(z, params, form=form):
            return local_loss.mean_head_loss(z, projection, labels, case.head, params, form)

        found[form] = jax.jit(jax.value_and_grad(loss, (0, 1)))(z, params)
    for form, values in found.items():
        for a, b in zip(jax.tree.leaves(values), jax.tree.leaves(found["xla"])):
            distance = np.linalg.norm(np.asarray(a) - np.asarray(b))
            assert distance <= 1e-4 * np.linalg.norm(b) + 1e-6, form


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
