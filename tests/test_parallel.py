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

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import benchmark, train
from experiments.config import TrainConfig
from experiments.suites import pipeline as suite
from lls_jax import fit, models, placement, processes, rules, training
from lls_jax.blocks import ConvBlock, DepthwiseSeparableBlock
from lls_jax.data import Split
from lls_jax.data import batches as data
from lls_jax.data.arrays import describe
from lls_jax.data.order import epoch_permutation
from lls_jax.models import BlockSpec, Network
from lls_jax.optimizers import schedule_free_adamw
from lls_jax.placement import block_pipeline
from lls_jax.runs import callbacks, kernels
from lls_jax.runs import folder as folders
from lls_jax.steps.reach_schedule import Move, schedule

CLASSES, DEVICES = 5, 5
HAS_DEVICES = len(jax.devices()) >= DEVICES
on_devices = pytest.mark.skipif(
    not HAS_DEVICES, reason="runs in the process of test_on_five_devices"
)
TX = schedule_free_adamw(5e-3)


def test_on_five_devices():
    if HAS_DEVICES:
        pytest.skip("this is that process")
    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-n0", "-pno:cacheprovider"],
        env={
            **os.environ,
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}",
            # Threads of their own: devices that share two wait for each other's sums forever.
            "NPROC": "16", "PJRT_NPROC": "16",
        },
        cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-4000:]
    assert " passed, 1 skipped" in ended.stdout, ended.stdout[-500:]


def test_a_batch_is_shared_out_to_somebody():
    model, rule = make_mixed()
    with pytest.raises(ValueError, match="`devices` is empty; give one or more"):
        placement.data_parallel(model, rule, TX, [])


def make_rule(name):
    return rules.make(name, num_classes=CLASSES)


# Every kind of rule: nothing learned, something learned, a fixed matrix, and one on the activation
# itself. A block each, so that one program has all of them.
RULES = ("lls", "lls_mxm", "lls_random", "predsim")


def make_mixed(dropout=0.0):
    """A network of four tiny blocks, and a rule for each."""
    specs = [BlockSpec(ConvBlock(4), pool_size=2, dropout=dropout) for _ in RULES]
    specs[-1] = dataclasses.replace(specs[-1], average_pool=2, flatten=True)
    rule = rules.PerBlock(tuple(make_rule(name) for name in RULES))
    return Network("mixed", CLASSES, tuple(specs)), rule


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
    ours = placement.partition(seconds, stages)

    def dearest(sizes):
        ends = np.cumsum(sizes)
        return max(sum(seconds[e - s : e]) for e, s in zip(ends, sizes))

    assert sum(ours) == len(seconds) and min(ours) >= 1
    assert dearest(ours) == dearest(sizes)


@pytest.mark.parametrize(
    ("reach", "sizes", "waiting"),
    [
        # Every piece takes a second. Four blocks take more than what they wait for.
        (1, (4, 4), 0),
        (2, (4, 4), 0),
        (3, (3, 4, 1), 0),
        # Up to the block above, down again, and it learns: more than one block has to do.
        (2, (1, 1, 6), 0),
        (2, (1, 1, 1), 1),
        (3, (1, 1, 1, 1), 2),
        # The second loss alone goes down: to another stage, within one.
        ((1, 2, 1), (1, 1, 1), 1),
        ((1, 2, 1), (2, 1), 0),
    ],
)
def test_a_stage_waits_for_gradients_only_with_nothing_else_to_do(reach, sizes, waiting):
    units = sum(sizes)
    moves = [Move("run", i, i) for i in range(units)] if reach == 1 else schedule(units, reach)
    stage_of = [stage for stage, size in enumerate(sizes) for _ in range(size)]
    seconds = dict.fromkeys(moves, 1.0)
    own = placement.by_unit(seconds)
    ends = np.cumsum(sizes)
    longest = max(sum(own[e - s : e]) for e, s in zip(ends, sizes))
    assert suite.seconds_a_step(seconds, stage_of) == longest + waiting


def test_wrong_stages_are_refused():
    model = models.make("small_conv", num_classes=CLASSES)
    with pytest.raises(ValueError, match="6 stages for 5 units"):
        placement.partition([1.0] * 5, 6)
    with pytest.raises(ValueError, match="together 5 units"):
        placement.pipeline(model, make_rule("lls"), TX, jax.devices()[:1], (4,))
    for name in ("bp", "dfa"):
        with pytest.raises(ValueError, match="no local losses"):
            placement.pipeline(model, make_rule(name), TX, jax.devices()[:1], (5,))


@on_devices
@pytest.mark.parametrize(
    ("remat_above", "reach", "cuts"),
    [
        (None, 1, [(2, 3), (1, 1, 1, 1, 1)]),
        (8192, 1, [(1, 2, 2)]),
        # A gradient goes down through a stage of one unit, and to a stage further down.
        (None, 3, [(2, 1, 2)]),
        (None, (1, 2, 1, 3, 1), [(2, 1, 2)]),
    ],
)
def test_a_pipeline_is_bit_identical_to_its_units_on_one_device(remat_above, reach, cuts):
    model, rule = make_mixed(dropout=0.2)
    state, batches, devices = start(model, rule), make_batches(), jax.devices()

    def run(sizes):
        execution = placement.pipeline(
            model, rule, TX, devices[: len(sizes)], sizes, remat_above=remat_above, reach=reach
        )
        return execution, *advance(execution, state, batches)

    _, alone, one = run((5,))
    for sizes in cuts:
        execution, spread, several = run(sizes)
        assert_equal(spread, alone)
        for a, b in zip(one, several):
            jax.tree.map(np.testing.assert_array_equal, a, b)
        # Each block was on its device, and the state comes back to the first.
        running = execution.enter(state)
        for name, device in zip(("block_0", "classifier"), (devices[0], devices[len(sizes) - 1])):
            for leaf in jax.tree.leaves(running.states[name]):
                assert leaf.devices() == {device}
        assert all(leaf.devices() == {devices[0]} for leaf in jax.tree.leaves(spread.params))
    if remat_above is not None:
        kept, _ = advance(placement.pipeline(model, rule, TX, devices[:1], (5,)), state, batches)
        assert any(
            not np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves(kept.params), jax.tree.leaves(alone.params))
        ), "nothing was computed again"


@on_devices
@pytest.mark.parametrize("reach", [1, 3])
def test_executions_equal_the_single_step_within_rounding(reach):
    model, rule = make_mixed()
    # Plain gradient descent: Adam's first updates are signs, which rounding may turn.
    tx = optax.sgd(0.05, momentum=0.9)
    batches, devices = make_batches(4), jax.devices()
    state = training.create_train_state(model, rule, tx, jax.random.key(0), batches[0]["image"])
    expected, losses = advance(
        placement.single(model, rule, tx, reach=reach), jax.tree.map(jnp.copy, state), batches
    )
    for execution in (
        placement.data_parallel(model, rule, tx, devices[:4], reach),
        placement.pipeline(model, rule, tx, devices[:3], (2, 1, 2), reach=reach),
    ):
        ours, metrics = advance(execution, state, batches)
        assert_close(ours, expected, 2e-4)
        for a, b in zip(metrics, losses):
            np.testing.assert_allclose(a["layer_loss"], b["layer_loss"], rtol=2e-4)
            np.testing.assert_array_equal(a["label"], b["label"])
        assert int(ours.step) == len(batches)


@on_devices
@pytest.mark.parametrize("rule_name", ["bp", "dfa"])
def test_data_parallel_takes_baselines_too(rule_name):
    (model, _), rule, tx = make_mixed(), make_rule(rule_name), optax.sgd(0.05)
    batches = make_batches(3)
    state = training.create_train_state(model, rule, tx, jax.random.key(0), batches[0]["image"])
    expected, _ = advance(placement.single(model, rule, tx), jax.tree.map(jnp.copy, state), batches)
    ours, _ = advance(placement.data_parallel(model, rule, tx, jax.devices()[:5]), state, batches)
    assert_close(ours, expected, 1e-3)
    with pytest.raises(ValueError, match="a batch of 20 does not divide over 3 devices"):
        advance(placement.data_parallel(model, rule, tx, jax.devices()[:3]), state, batches)


@on_devices
def test_sums_in_passes_need_no_gathering():
    """Depthwise gradients and pooled sums pass over every image where it is, and ask nobody."""
    specs = (
        BlockSpec(ConvBlock(8), pool_size=4),
        BlockSpec(DepthwiseSeparableBlock(16), pool_size=2),
        BlockSpec(DepthwiseSeparableBlock(16, stride=2), 2, average_pool=1, flatten=True),
    )
    model, rule, tx = Network("three", CLASSES, specs), make_rule("lls_mxm"), optax.sgd(0.1)
    (batch,) = make_batches(1, size=16)
    state = training.create_train_state(model, rule, tx, jax.random.key(0), batch["image"])
    step = training.make_train_step(model, rule, tx)
    execution = placement.data_parallel(model, rule, tx, jax.devices()[:4])
    spread = execution.enter(state)
    program = step.lower(spread, processes.shard_batch(batch, execution.sharding)).compile()
    text = program.as_text()
    assert "all-reduce" in text and "all-gather" not in text
    # Not for a shard's first element, by which a pass would be decided on.
    asked = re.findall(r"f32\[1(?:,1){3,}\]\S* all-reduce.*op_name=\"(.*?)\"", text)
    assert not [name for name in asked if "/depthwise/" in name or "norm/" in name]
    running, metrics = execution.step(spread, batch)
    alone, expected = step(state, batch)
    np.testing.assert_allclose(metrics["layer_loss"], expected["layer_loss"], rtol=1e-5)
    shared = execution.leave(running)
    for a, b in zip(jax.tree.leaves(shared.params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def make_split(count=46):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
    return Split(images, rng.integers(0, CLASSES, count).astype(np.int32))


@on_devices
def test_each_device_takes_its_own_rows_in_one_program():
    """Batches of what is on every device: those of one device, and no device gathers them all."""
    split = make_split()
    spec, key = describe(split, CLASSES), jax.random.key(2)
    order = epoch_permutation(key, 0, 46)
    sharding = placement.data_parallel(
        make_mixed()[0], make_rule("lls"), TX, jax.devices()[:4]
    ).sharding
    everywhere = data.place(data.to_device(split), sharding)
    assert all(len(leaf.devices()) == 4 for leaf in everywhere)
    one = data.make_reader(spec, "flip", 12)(data.to_device(split), order, 1, key, 5)
    for ours, theirs in zip(
        data.make_reader(spec, "flip", 12, sharding)(everywhere, order, 1, key, 5), one, strict=True
    ):
        for name in ("image", "label"):
            assert ours[name].sharding.is_equivalent_to(sharding, ours[name].ndim)
            np.testing.assert_array_equal(ours[name], theirs[name])
    program = data.gather.lower(everywhere, order, 1, 12, sharding).compile().as_text()
    assert "u8[3,8,8,3]" in program and "u8[12," not in program
    assert "all-gather" not in program and "all-reduce" not in program
    for ours, theirs in zip(
        data.evaluation_batches(spec, everywhere, 10, sharding),
        data.evaluation_batches(spec, data.to_device(split), 12),
        strict=True,
    ):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@on_devices
def test_shards_train_with_many_steps_a_launch():
    """As with one step a launch on the same devices, and as on one device, within rounding."""
    model, rule, tx = make_mixed()[0].grouped((2, 2)), make_rule("lls_mxm"), optax.sgd(0.05)
    split, devices = make_split(), jax.devices()
    options = {"train": data.to_device(split), "test": data.to_device(split), "epochs": 2}
    options |= {"batch_size": 12, "eval_batch_size": 10}
    alone = fit(model, rule, tx, **options)
    execution = placement.data_parallel(model, rule, tx, devices[:4])
    for steps in ("many", "one"):
        ours = fit(model, rule, tx, execution=execution, steps_a_launch=steps, **options)
        assert_close(ours.state, alone.state, 1e-3)
        for a, b in zip(ours.records, alone.records, strict=True):
            np.testing.assert_allclose(a["layer_loss"], b["layer_loss"], rtol=1e-3)
            np.testing.assert_allclose(a["test_loss"], b["test_loss"], rtol=1e-3)
    pipeline = placement.pipeline(model, rule, tx, devices[:1], (3,))
    with pytest.raises(ValueError, match="no pipeline as execution"):
        fit(model, rule, tx, execution=pipeline, steps_a_launch="many", **options)


@on_devices
@pytest.mark.parametrize("form", ["split", "pallas"])
def test_a_kernel_runs_on_each_shard(form):
    """What the compiler cannot cut is cut before; the losses and gradients are of all rows."""
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    rule = rules.make("lls_mxm", num_classes=CLASSES)
    # Ten rows a device: neither a whole program nor a whole tile.
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.normal(size=(20, 37)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, CLASSES, 20), jnp.int32)
    params = {"modulation": jnp.asarray(rng.normal(size=(CLASSES, CLASSES)), jnp.float32)}

    def differentiate(rule, *arrays):
        def loss(latents, params, labels):
            return rule.loss(params, latents, labels)

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(*arrays)

    expected = differentiate(rule, latents, params, labels)
    on_mesh = rules.PerBlock((rule,)).on_mesh(mesh).rules[0]
    shared = on_mesh.with_implementation(form).interpreted()
    ours = differentiate(
        shared, jax.device_put(latents, rows), params, jax.device_put(labels, rows)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert make_rule("predsim").on_mesh(mesh) == make_rule("predsim")


@on_devices
def test_a_form_is_chosen_by_steps_on_shards(monkeypatch):
    """Each form's steps run on both devices, with the same losses; the run takes the choice."""
    specs = (BlockSpec(ConvBlock(4), pool_size=2, average_pool=2, flatten=True),)
    model, tx = Network("one", CLASSES, specs), optax.sgd(0.05)
    rule = make_rule("lls_mxm").interpreted()
    execution = placement.data_parallel(model, rule, tx, jax.devices()[:2])
    work = kernels.Work(model, rule, tx, (8, 8, 3), 12, execution=execution)

    def turns(calls, count, agree):
        found = [call() for call in calls]
        for state, losses in found:
            assert len(jax.tree.leaves(state)[0].sharding.device_set) == 2
            np.testing.assert_allclose(losses, found[0][1], rtol=1e-4)
        assert len(found) == 2 and agree(7) == 7
        return [1.0, 0.5]

    choice = kernels.measure(work, ("xla", "pallas"), turns)
    assert choice.implementation == "pallas"
    # Where none is measured, as in a pipeline, none is chosen.
    pipeline = placement.pipeline(model, rule, tx, jax.devices()[:1], (2,))
    assert kernels.choose(work._replace(execution=pipeline), None, "gpu") is None

    taken, told = [], []
    monkeypatch.setattr(kernels, "choose", lambda work, folder: choice)

    def with_rule(rule):
        taken.append(rule.implementation)
        return execution.with_rule(rule)

    class Listener(callbacks.Callback):
        def on_kernels(self, choice):
            told.append(choice)

    split = data.to_device(make_split())
    fit(
        model, rule, tx, train=split, epochs=1, batch_size=12, callbacks=[Listener()],
        execution=execution._replace(with_rule=with_rule),
    )  # fmt: skip
    assert taken == ["pallas"] and told == [choice]


@on_devices
@pytest.mark.parametrize("in_order", [False, True])
def test_sums_of_gradients_need_not_be_awaited(in_order):
    """The next block's convolution starts without the gradient, but on CPUs, in order."""
    model, rule = models.make("small_conv", num_classes=CLASSES), make_rule("lls_mxm")
    batch, state = make_batches(1)[0], start(model, rule)
    execution = placement.data_parallel(model, rule, TX, jax.devices()[:4])
    arguments = execution.enter(state), processes.shard_batch(batch, execution.sharding)
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

    # Of the way forward: the way back is named as a transpose.
    product = r'op_name="(?![^"]*transpose)[^"]*ConvBlock[^"]*/conv/[^"]*dot_general"'
    # The first gradient comes as one product for four outputs of a row, the second in a piece for
    # each tap of the kernel; maps as small as those above are convolved by one product.
    for piece, output in (((54, 4 * 32), (5, 4, 4, 64)), ((32, 64), (5, 2, 2, 128))):
        summed = made(("all-reduce", "all-reduce-start"), "", piece)
        assert summed
        above = made(("dot", "fusion", "custom-call", "call"), product, output)
        assert bool(needed(above[0]) & set(summed)) == in_order


@on_devices
@pytest.mark.parametrize(("threads", "enough"), [("4", False), ("5", False), ("6", True)])
def test_devices_of_a_cpu_without_threads_say_so(monkeypatch, threads, enough):
    model, rule = make_mixed()
    monkeypatch.delenv("PJRT_NPROC")
    monkeypatch.setenv("NPROC", threads)
    # One device sums with nobody.
    placement.data_parallel(model, rule, TX, jax.devices()[:1])
    if enough:
        placement.data_parallel(model, rule, TX, jax.devices()[:2])
        return
    with pytest.raises(ValueError, match=f"2 devices .* need 6 threads .* XLA has {threads}"):
        placement.data_parallel(model, rule, TX, jax.devices()[:2])


@on_devices
def test_a_joined_group_runs_in_a_pipeline():
    model = make_mixed()[0].grouped((1, 2, 2))
    rule = make_rule("lls")
    state, batches, devices = start(model, rule), make_batches(3), jax.devices()
    alone, _ = advance(placement.pipeline(model, rule, TX, devices[:1], (3,)), state, batches)
    spread, metrics = advance(
        placement.pipeline(model, rule, TX, devices[:2], (1, 2)), state, batches
    )
    assert_equal(spread, alone)
    assert metrics[0]["layer_loss"].shape == (2,)


@dataclasses.dataclass(frozen=True)
class Slow(rules.LocalRule):
    """A rule that takes a second or more for its loss, on its device."""

    def loss(self, params, seen, labels, *, pool_size):
        mean = jnp.mean(seen)
        return mean + jax.lax.fori_loop(
            0, 20_000_000, lambda i, x: jnp.sin(x), jax.lax.stop_gradient(mean)
        )


@on_devices
@pytest.mark.parametrize("reach", [1, 2])
def test_stages_work_at_the_same_time(monkeypatch, reach):
    """The first stage is done with the next batch while the second is still at this one."""
    specs = [BlockSpec(ConvBlock(4), pool_size=2) for _ in range(3)]
    specs[-1] = dataclasses.replace(specs[-1], average_pool=2, flatten=True)
    model = Network("three", CLASSES, tuple(specs))
    # The first block learns from the second, too, which is on the other device; from none beyond.
    rule = rules.PerBlock((make_rule("lls"), make_rule("lls"), Slow()))
    make_pieces, done = block_pipeline.make_pieces, []

    def watched(*arguments):
        pieces = make_pieces(*arguments)

        def do(move, *others):
            states, work = pieces.do(move, *others)
            if move[:2] == ("run", 0):
                done.append(work.x)
            return states, work

        return pieces._replace(do=do)

    monkeypatch.setattr(block_pipeline, "make_pieces", watched)
    execution = placement.pipeline(model, rule, TX, jax.devices()[:2], (1, 3), reach=reach)
    compiling, *batches = make_batches(4)
    running, metrics = execution.step(execution.enter(start(model, rule)), compiling)
    jax.block_until_ready(metrics)
    losses = []
    for batch in batches:
        running, metrics = execution.step(running, batch)
        losses.append(metrics["layer_loss"])
        jax.block_until_ready(done[-1])
        # Taking turns, the second stage would be done with the batch before by now.
        assert not losses[max(len(losses) - 2, 0)].is_ready()
    assert np.isfinite(jax.block_until_ready(losses)).all()


@on_devices
def test_the_command_trains_in_a_pipeline_and_resumes_elsewhere(tmp_path, capsys):
    base = TrainConfig(
        dataset="digits", model="small_models:two_blocks", rule="lls_mxm", epochs=2,
        batch_size=16, train_examples=64, eval_examples=40, progress=False,
    )  # fmt: skip

    def run(name, epochs=2, **options):
        config = dataclasses.replace(base, workdir=str(tmp_path / name), epochs=epochs, **options)
        assert train.train_and_evaluate(config) == 0
        return [
            (record["train_loss"], record["test_loss"], tuple(record["layer_loss"]))
            for record in folders.read_metrics(tmp_path / name)
        ]

    whole = run("whole", pipeline=2, stages="1,2")
    run("moved", epochs=1, pipeline=3)
    assert "stages of" in capsys.readouterr().out
    # The same folder, on other devices: to the bit in a pipeline, within rounding in shards.
    assert run("moved", pipeline=2, stages="2,1") == whole
    assert "resumed at step 4, epoch 1 done" in capsys.readouterr().out
    run("shared", epochs=1)
    shared = run("shared", data_parallel=4)
    assert "resumed at step 4, epoch 1 done" in capsys.readouterr().out
    np.testing.assert_allclose([r[0] for r in shared], [r[0] for r in whole], rtol=2e-2)


@on_devices
def test_the_pipeline_suite_reports_expected_and_achieved(tmp_path, monkeypatch):
    devices = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    config = benchmark.BenchmarkConfig(
        suite="pipeline", models=["small_models:two_blocks"], rules=["lls", "bp"], reach=[2],
        batch_sizes=[64], turns=1, out=str(tmp_path),
    )  # fmt: skip
    assert benchmark.benchmark(config) == 0
    (row,) = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    assert (row["rule"], row["reach"], row["devices"]) == ("lls", 2, 2)
    assert 1 <= row["gpipe"] <= 2 and 1 <= row["ideal"] <= 2
    stages = [float(ms) for ms in row["stage_ms"].split(", ")]
    expected = sum(stages) / (max(stages) + row["waiting_ms"])
    assert row["ideal"] == pytest.approx(expected, rel=0.1)
    assert row["achieved"] == pytest.approx(row["one_device_ms"] / row["pipeline_ms"])
