"""Which epochs of a run are written: those that it cannot do without, and not all of them."""

import dataclasses
import itertools
import json
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import evaluate, run_config, setup, train
from experiments.config import TrainConfig
from lls_jax.errors import DivergedError
from lls_jax.runs import checkpoints, epoch_sums, loop, resuming, saving
from lls_jax.runs.restore import restore
from lls_jax.training import TrainState

TINY = TrainConfig(
    dataset="digits", model="small_models:two_blocks", rule="lls_mxm", epochs=4,
    batch_size=16, train_examples=64, eval_examples=40, augmentation="none", progress=False,
)  # fmt: skip
STEPS = 4
# Of the judged epochs; the third is the best.
ACCURACIES = (50.0, 60.0, 75.0, 70.0)


@pytest.fixture(autouse=True)
def accuracies(monkeypatch):
    """Judge epochs as wanted, and let no clock decide."""
    whole, wanted = loop.evaluate_weights, itertools.cycle(ACCURACIES)
    monkeypatch.setattr(
        loop, "evaluate_weights", lambda *a: whole(*a)._replace(accuracy=next(wanted))
    )
    monkeypatch.setattr(saving, "_SECONDS", 1000)


def tiny(folder, **options):
    return dataclasses.replace(TINY, workdir=str(folder), **options)


def steps(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def evaluation(folder, step):
    """What a checkpoint has to be evaluated, and its description."""
    task = setup.make_task(run_config.read_config(folder))
    example = setup.example_image(task.spec)
    state, meta = restore(folder, task.model, task.rule, example, step)
    return {"params": state.params, "batch_stats": state.batch_stats}, meta


def test_the_best_epoch_is_written_with_the_last_as_it_was(tmp_path, monkeypatch, capsys):
    assert train.train_and_evaluate(tiny(tmp_path / "rare")) == 0
    assert steps(tmp_path / "rare") == [3 * STEPS, 4 * STEPS]
    monkeypatch.setattr(saving, "_SECONDS", 0)
    assert train.train_and_evaluate(tiny(tmp_path / "every")) == 0
    for step in (3 * STEPS, 4 * STEPS):
        (ours, meta), (theirs, _) = (evaluation(tmp_path / n, step) for n in ("rare", "every"))
        assert meta["accuracy"] == ACCURACIES[step // STEPS - 1]
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    capsys.readouterr()
    evaluate.evaluate(evaluate.EvaluateConfig(str(tmp_path / "rare"), json=True))
    assert json.loads(capsys.readouterr().out)["epoch"] == 3


@pytest.mark.parametrize("optimizer", ["schedule_free_adamw", "sgd"])
def test_a_stop_inside_an_epoch_writes_the_best_one_too(tmp_path, monkeypatch, optimizer):
    add, count = epoch_sums.add, iter(range(100))

    def stopping(*arguments):
        if next(count) == 3 * STEPS + 1:
            signal.raise_signal(signal.SIGTERM)
        return add(*arguments)

    monkeypatch.setattr(epoch_sums, "add", stopping)
    config = tiny(tmp_path, optimizer=optimizer)
    assert train.train_and_evaluate(config) == 143
    assert steps(tmp_path) == [3 * STEPS, 3 * STEPS + 2]
    _, meta = evaluation(tmp_path, 3 * STEPS)
    assert meta["accuracy"] == ACCURACIES[2]


def test_a_run_that_diverges_leaves_its_best_epoch(tmp_path, monkeypatch):
    check = resuming.check_finite

    def diverge(model, reached):
        if reached.epochs_done == 3:
            raise DivergedError("a loss is not finite")
        check(model, reached)

    monkeypatch.setattr(resuming, "check_finite", diverge)
    with pytest.raises(DivergedError):
        train.train_and_evaluate(tiny(tmp_path))
    assert steps(tmp_path) == [STEPS, 3 * STEPS]


def test_a_resumed_run_knows_the_best_of_before(tmp_path):
    """Worse epochs than the best of an earlier start are not kept for it."""
    assert train.train_and_evaluate(tiny(tmp_path, epochs=3)) == 0
    assert train.train_and_evaluate(tiny(tmp_path)) == 0
    assert steps(tmp_path) == [STEPS, 3 * STEPS, 4 * STEPS][1:]


def test_the_best_of_an_earlier_start_stays_on_the_disk(tmp_path, monkeypatch):
    """However many checkpoints come after it, in as many starts."""
    monkeypatch.setattr(saving, "_SECONDS", 0)
    for epochs in (3, 4, 6):
        assert train.train_and_evaluate(tiny(tmp_path, epochs=epochs)) == 0
    assert steps(tmp_path) == [3 * STEPS, 5 * STEPS, 6 * STEPS]


def test_who_wants_checkpoints_inside_epochs_has_every_epochs_too(tmp_path, monkeypatch):
    written, save = [], checkpoints.save

    def noted(manager, content):
        written.append(content.step)
        save(manager, content)

    monkeypatch.setattr(checkpoints, "save", noted)
    assert train.train_and_evaluate(tiny(tmp_path, epochs=2, checkpoint_every=3)) == 0
    assert written == [3, 4, 6, 8]


@pytest.fixture
def saver(tmp_path):
    """A saver of checkpoints into a folder, where it has told of them, and what to save."""
    told = []
    with checkpoints.open_checkpoints(tmp_path / "checkpoints") as manager:
        made = saving.Saver(manager, {}, every_epoch=True, best=None, written=told.append)
        yield made, manager, told


def where(step, value):
    """A run of one array at a step, all of it ``value``, and its weights."""
    state = TrainState(
        jnp.int32(step), {"w": jnp.full(5, value)}, {}, {"m": jnp.full(5, value)}, jax.random.key(7)
    )
    sums = epoch_sums.EpochSums(jnp.zeros(1), jnp.int32(0), jnp.int32(0))
    return resuming.CheckpointState(state, sums, 0, 0.0, 0.0), {"params": {"w": jnp.full(5, value)}}


def test_training_goes_on_while_a_checkpoint_is_written(saver, monkeypatch):
    """What is written is what was there when it was asked for, whatever becomes of the arrays."""
    saver, manager, told = saver
    save, may_go_on = checkpoints.save, threading.Event()

    def held(*arguments):
        assert may_go_on.wait(60)
        save(*arguments)

    monkeypatch.setattr(checkpoints, "save", held)
    with saver:
        reached, evaluation = where(3, 1.5)
        saver.save(reached, evaluation)
        # A training step takes the memory of the state that it is given.
        step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 9, tree), donate_argnums=0)
        jax.block_until_ready(step((reached.state.params, reached.state.opt_state, evaluation)))
        saver.poll()
        assert saver.has(3) and not told and not checkpoints.list_steps(manager)
        may_go_on.set()
        saver.finish()
        assert told == [3]
    expected, weights = where(3, 1.5)
    restored, _ = checkpoints.restore_training(manager, 3, expected.arrays())
    same = jax.tree.map(lambda a, b: bool((a == b).all()), restored, expected.arrays())
    assert all(jax.tree.leaves(same))
    judged, _ = checkpoints.restore_evaluation(manager, 3, weights)
    jax.tree.map(np.testing.assert_array_equal, judged, weights)


def test_a_checkpoint_that_cannot_be_written_is_an_error_of_the_run(saver, monkeypatch):
    saver, _, told = saver
    save = checkpoints.save

    def failing(manager, checkpoint):
        if checkpoint.step == 4:
            raise OSError(28, "No space left on device")
        save(manager, checkpoint)

    monkeypatch.setattr(checkpoints, "save", failing)
    with pytest.raises(OSError, match="No space left"), saver:
        saver.save(*where(3, 0.0))
        saver.save(*where(4, 0.0))
    assert told == [3]
    # What has ended a run is heard before that.
    with pytest.raises(KeyboardInterrupt), saver:
        raise KeyboardInterrupt
