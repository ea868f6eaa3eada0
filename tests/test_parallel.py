"""Executions: pipelines, data parallelism; on five devices made of one CPU.

They exist only in a process that was started with them: `test_on_five_devices` starts it.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import benchmark, run_folder, train
from experiments.config import TrainConfig
from lls_jax import models, parallel, processes, rules, training

CLASSES, DEVICES = 5, 5
HAS_DEVICES = len(jax.devices()) >= DEVICES
on_devices = pytest.mark.skipif(
    not HAS_DEVICES, reason="runs in the process of test_on_five_devices"
)
TX = optax.contrib.schedule_free_adamw(5e-3)


def test_on_five_devices():
    if HAS_DEVICES:
        pytest.skip("this is that process")
    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider"],
        env={
            **os.environ,
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}",
            # Threads of their own: devices that share two wait for each other's sums forever.
            "NPROC": "16", "PJRT_NPROC": "16",
        },
        cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-4000:]
    assert " passed, 1 skipped" in ended.stdout, ended.stdout[-500:]


def make_rule(name):
    return rules.make(name, num_classes=CLASSES)


def make_batches(count=6, size=20, side=8):
    rng = np.random.default_rng(0)
    return [
        {
            "image": jnp.asarray(rng.normal(size=(size, side, side, 3)), jnp.float32),
            "label": jnp.asarray(rng.integers(0, CLASSES, size), jnp.int32),
        }
        for _ in range(count)
    ]


def advance(execution, state, batches):
    running, history = execution.enter(state), []
    for batch in batches:
        running, metrics = execution.step(running, batch)
        history.append(metrics)
    return execution.leave(running), jax.tree.map(np.asarray, history)


def start(model, rule):
    return training.create_train_state(
        model, rule, TX, jax.random.key(0), make_batches(1)[0]["image"]
    )


def leaves(state):
    tree = state._replace(key=jax.random.key_data(state.key))
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def assert_equal(ours, theirs):
    ours, theirs = leaves(ours), leaves(theirs)
    assert ours.keys() == theirs.keys()
    for path in theirs:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


def assert_close(ours, theirs, tolerance):
    ours, theirs = leaves(ours), leaves(theirs)
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        distance = np.linalg.norm(ours[path].astype(np.float64) - value.astype(np.float64))
        size = np.linalg.norm(value.astype(np.float64))
        assert distance <= tolerance * size + 3e-4, (path, distance, size)


@pytest.mark.parametrize(
    ("seconds", "stages", "sizes"),
    [
        ([1, 1, 1, 1], 2, (2, 2)),
        ([5, 1, 1, 1], 2, (1, 3)),
        ([1, 1, 1, 5], 3, (1, 2, 1)),
        ([3, 1], 2, (1, 1)),
        ([2, 2, 2], 1, (3,)),
    ],
)
def test_stages_are_balanced(seconds, stages, sizes):
    ours = parallel.partition(seconds, stages)

    def dearest(sizes):
        ends = np.cumsum(sizes)
        return max(sum(seconds[e - s : e]) for e, s in zip(ends, sizes))

    assert sum(ours) == len(seconds) and min(ours) >= 1
    assert dearest(ours) == dearest(sizes)


def test_wrong_stages_are_refused():
    model = models.make("small_conv", num_classes=CLASSES)
    with pytest.raises(ValueError, match="6 stages for 5 units"):
        parallel.partition([1.0] * 5, 6)
    with pytest.raises(ValueError, match="together 5 units"):
        parallel.pipeline(model, make_rule("lls"), TX, jax.devices()[:1], (4,))
    for name in ("bp", "dfa"):
        with pytest.raises(ValueError, match="no local losses"):
            parallel.make_units(model, make_rule(name), TX)


RULES = ("lls", "lls_m", "lls_mxm", "lls_random", "local_classifier", "predsim")


@on_devices
@pytest.mark.parametrize("rule_name", RULES)
def test_a_pipeline_is_bit_identical_to_its_units_on_one_device(rule_name):
    model, rule = models.make("small_conv", num_classes=CLASSES, dropout=0.2), make_rule(rule_name)
    state, batches, devices = start(model, rule), make_batches(), jax.devices()
    alone, one = advance(parallel.pipeline(model, rule, TX, devices[:1], (5,)), state, batches)
    splits = [(2, 3), (1, 2, 2), (1, 1, 1, 2), (1, 1, 1, 1, 1)]
    for sizes in splits if rule_name == "lls_mxm" else splits[1:2]:
        execution = parallel.pipeline(model, rule, TX, devices[: len(sizes)], sizes)
        spread, several = advance(execution, state, batches)
        assert_equal(spread, alone)
        for a, b in zip(one, several):
            jax.tree.map(np.testing.assert_array_equal, a, b)
        # Each block was on its device, and the state comes back to the first.
        running = execution.enter(state)
        for name, device in zip(("block_0", "classifier"), (devices[0], devices[len(sizes) - 1])):
            for leaf in jax.tree.leaves(running.states[name]):
                assert leaf.devices() == {device}
        assert all(leaf.devices() == {devices[0]} for leaf in jax.tree.leaves(spread.params))


@on_devices
def test_a_pipeline_that_computes_convolutions_again_is_bit_identical_too():
    model, rule = models.make("small_conv", num_classes=CLASSES), make_rule("lls_mxm")
    state, batches, devices = start(model, rule), make_batches(), jax.devices()
    results = [
        advance(
            parallel.pipeline(model, rule, TX, devices[: len(sizes)], sizes, 8192), state, batches
        )
        for sizes in ((5,), (1, 2, 2))
    ]
    assert_equal(results[0][0], results[1][0])
    kept, _ = advance(parallel.pipeline(model, rule, TX, devices[:1], (5,)), state, batches)
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(kept.params), jax.tree.leaves(results[0][0].params))
    ), "nothing was computed again"


@on_devices
@pytest.mark.parametrize("rule_name", RULES)
def test_executions_equal_the_single_step_within_rounding(rule_name):
    model, rule = models.make("small_conv", num_classes=CLASSES), make_rule(rule_name)
    # Plain gradient descent: Adam's first updates are signs, which rounding may turn.
    tx = optax.sgd(0.05, momentum=0.9)
    batches, devices = make_batches(4), jax.devices()
    state = training.create_train_state(model, rule, tx, jax.random.key(0), batches[0]["image"])
    expected, losses = advance(
        parallel.single(model, rule, tx), jax.tree.map(jnp.copy, state), batches
    )
    for execution in (
        parallel.pipeline(model, rule, tx, devices[:2], (2, 3)),
        parallel.data_parallel(model, rule, tx, devices[:4]),
    ):
        ours, metrics = advance(execution, state, batches)
        assert_close(ours, expected, 2e-4)
        for a, b in zip(metrics, losses):
            np.testing.assert_allclose(a["layer_loss"], b["layer_loss"], rtol=2e-4)
            np.testing.assert_array_equal(a["label"], b["label"])
        assert int(ours.step) == len(batches)


@on_devices
@pytest.mark.parametrize("rule_name", ["bp", "dfa"])
def test_data_parallel_takes_baselines_and_groups_too(rule_name):
    model, rule, tx = (
        models.make("small_conv", num_classes=CLASSES),
        make_rule(rule_name),
        optax.sgd(0.05),
    )
    batches = make_batches(3)
    state = training.create_train_state(model, rule, tx, jax.random.key(0), batches[0]["image"])
    expected, _ = advance(parallel.single(model, rule, tx), jax.tree.map(jnp.copy, state), batches)
    ours, _ = advance(parallel.data_parallel(model, rule, tx, jax.devices()[:5]), state, batches)
    assert_close(ours, expected, 1e-3)
    with pytest.raises(ValueError, match="a batch of 20 does not divide over 3 devices"):
        advance(parallel.data_parallel(model, rule, tx, jax.devices()[:3]), state, batches)


@on_devices
@pytest.mark.parametrize("in_order", [False, True])
def test_sums_of_gradients_need_not_be_awaited(in_order):
    """The next block's convolution starts without the gradient, but on CPUs, in order."""
    model, rule = models.make("small_conv", num_classes=CLASSES), make_rule("lls_mxm")
    batch, state = make_batches(1)[0], start(model, rule)
    execution = parallel.data_parallel(model, rule, TX, jax.devices()[:4])
    arguments = execution.enter(state), processes.share(batch, execution.sharding)
    step = training.make_train_step(model, rule, TX, in_order=in_order)
    program = step.lower(*arguments).compile().as_text()
    program = program[program.index("\nENTRY") :]
    lines = re.findall(r"^ *(?:ROOT )?(%\S+) = (.*?) ([a-z][\w-]*)\((.*)$", program, re.M)
    operands = {name: re.findall(r"%[\w.-]+", rest.split(")")[0]) for name, *_, rest in lines}

    def needed(name):
        found, open_ends = set(), [name]
        while open_ends:
            new = set(operands.get(open_ends.pop(), ())) - found
            found |= new
            open_ends += new
        return found

    def made(kinds, where, shape):
        size = math.prod(shape)
        return [
            name
            for name, result, kind, rest in lines
            if kind in kinds
            and re.search(where, rest)
            and size
            in [math.prod(map(int, d.split(","))) for d in re.findall(r"\[([\d,]+)", result)]
        ]

    convolution = r'op_name="[^"(]*\([^"(]*\)/jvp\(LocalBlock\)/block/conv/conv_general_dilated"'
    for kernel, output in (((3, 3, 3, 32), (5, 4, 4, 64)), ((3, 3, 32, 64), (5, 2, 2, 128))):
        (summed,) = made(("all-reduce", "all-reduce-start"), "", kernel)
        above = made(("convolution", "fusion", "custom-call", "call"), convolution, output)
        assert (summed in needed(above[0])) == in_order


@on_devices
def test_a_joined_group_runs_in_a_pipeline():
    model, rule = (
        models.make("small_conv", num_classes=CLASSES).grouped((1, 1, 3)),
        make_rule("lls"),
    )
    state, batches, devices = start(model, rule), make_batches(3), jax.devices()
    alone, _ = advance(parallel.pipeline(model, rule, TX, devices[:1], (3,)), state, batches)
    spread, metrics = advance(
        parallel.pipeline(model, rule, TX, devices[:2], (1, 2)), state, batches
    )
    assert_equal(spread, alone)
    assert metrics[0]["layer_loss"].shape == (2,)


@on_devices
def test_stages_work_at_the_same_time(monkeypatch):
    """Stage 0 begins batch t + 1 before stage 1 has ended batch t."""
    model, rule, devices = (
        models.make("small_conv", num_classes=CLASSES),
        make_rule("lls"),
        jax.devices(),
    )
    events = []

    def traced(units):
        def watch(index, unit):
            def run(states, x, labels, key, step):
                def note(_, kind):
                    events.append((time.perf_counter(), kind, index, step))

                out = unit(states, x, labels, key, step)
                # Called from the device's own thread, when its input is there.
                probe[index](x, lambda v: note(v, "in"))
                probe[index](out[2], lambda v: note(v, "out"))
                return out

            return run

        return [(names, watch(i, unit)) for i, (names, unit) in enumerate(units)]

    class Probe(dict):
        def __missing__(self, index):
            def run(x, call):
                def wait():
                    jax.block_until_ready(x)
                    call(x)

                thread = threading.Thread(target=wait)
                thread.start()
                threads.append(thread)

            return run

    probe, threads = Probe(), []
    make_units = parallel.make_units
    monkeypatch.setattr(parallel, "make_units", lambda *a: traced(make_units(*a)))
    batches = make_batches(12, size=60, side=24)
    state = training.create_train_state(model, rule, TX, jax.random.key(0), batches[0]["image"])
    execution = parallel.pipeline(model, rule, TX, devices[:2], (2, 3))
    advance(execution, state, batches)
    events.clear()
    advance(execution, state, batches)
    for thread in threads:
        thread.join()
    when = {(kind, unit, step): at for at, kind, unit, step in events}
    overlaps = 0
    for step in range(1, len(batches) - 1):
        # A device begins when its input is there and it is done with the batch before.
        first = (max(when["in", 0, step + 1], when["out", 1, step]), when["out", 1, step + 1])
        second = (max(when["in", 2, step], when["out", 4, step - 1]), when["out", 4, step])
        overlaps += max(first[0], second[0]) < min(first[1], second[1])
    # How many depends on who else has the two cores; one could not happen by itself.
    assert overlaps >= 1


@on_devices
def test_the_command_trains_in_a_pipeline_and_resumes_elsewhere(tmp_path, capsys):
    base = TrainConfig(
        dataset="digits", rule="lls_mxm", epochs=2, batch_size=16, train_examples=64,
        eval_examples=40, progress=False,
    )  # fmt: skip

    def run(name, epochs=2, **options):
        config = dataclasses.replace(base, workdir=str(tmp_path / name), epochs=epochs, **options)
        assert train.train_and_evaluate(config) == 0
        return [
            (record["train_loss"], record["test_loss"], tuple(record["layer_loss"]))
            for record in run_folder.read_metrics(tmp_path / name)
        ]

    whole = run("two", pipeline=2, stages="2,3")
    assert run("three", pipeline=3) == whole
    assert "stages of" in capsys.readouterr().out
    single = run("single")
    shards = run("shards", data_parallel=4)
    for other in (single, shards):
        np.testing.assert_allclose([r[0] for r in other], [r[0] for r in whole], rtol=2e-2)


@on_devices
def test_the_pipeline_suite_reports_ideal_and_achieved(tmp_path):
    config = benchmark.BenchmarkConfig(
        suite="pipeline", rules=["lls", "bp"], batch_sizes=[4], turns=1, out=str(tmp_path)
    )
    assert benchmark.benchmark(config) == 0
    rows = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    assert [row["devices"] for row in rows] == [2, 3, 4, 5]
    for row in rows:
        assert row["rule"] == "lls"
        assert 1 <= row["gpipe"] <= row["ideal"] <= row["devices"]
        assert row["achieved"] == pytest.approx(row["one_device_ms"] / row["pipeline_ms"])
