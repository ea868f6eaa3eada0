"""Several processes on this machine's loopback: they train like one, and survive each other."""

import dataclasses
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import setup, train
from experiments.config import TrainConfig
from lls_jax import processes, training
from lls_jax.runs import checkpoints, epoch_sums
from lls_jax.runs import folder as folders
from lls_jax.runs.restore import restore

ROOT = pathlib.Path(__file__).parents[1]
# Without a number of devices, which may be there for this process.
FLAGS = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
EPOCHS, STEPS = 2, 16
# Gradient descent: Adam's first updates are signs, which rounding may turn. Every kind of random
# draw, so that the processes must agree on them.
CONFIG = TrainConfig(
    dataset="digits", model="small_models:two_blocks", rule="lls_mxm", epochs=EPOCHS,
    batch_size=24, train_examples=192, eval_examples=50, eval_batch_size=20,
    optimizer="sgd", learning_rate=0.02, augmentation="full", dropout=0.2,
    checkpoint_every=2, progress=False,
)  # fmt: skip

# Trains as the command does; process WHO sends itself a signal in the given step of this launch.
SCRIPT = """
import os, signal, sys
import jax
from experiments import command_line
from lls_jax.runs import epoch_sums

step, number, who, *arguments = sys.argv[1:]
add, steps = epoch_sums.add, []

def counted(*values):
    steps.append(1)
    if len(steps) == int(step) and jax.process_index() == int(who):
        os.kill(os.getpid(), int(number))
    return add(*values)

epoch_sums.add = counted
sys.argv[1:] = arguments
command_line.train_command("digits", "Train.")
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def slurm_job():
    """A job's number from which JAX takes a port that is free."""
    for number in range(os.getpid(), os.getpid() + 100):
        try:
            socket.create_server(("", number % 2**12 + 2**16 - 2**12)).close()
        except OSError:
            continue
        return str(number)
    raise AssertionError("no port is free")


def launch(folder, count, step=0, number=0, who=0, each=None, devices=1, slurm=False, **changes):
    """Run the command in that many processes; ``[(status, output, errors)]``."""
    coordinator = "auto" if slurm else f"127.0.0.1:{free_port()}"
    changes = {"workdir": str(folder), "coordinator": coordinator, **changes}
    job = slurm_job() if slurm else None
    environment = {
        **os.environ,
        # Set already: the command does not start itself again.
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0",
        "XLA_FLAGS": " ".join([*FLAGS, f"--xla_force_host_platform_device_count={devices}"]),
        # One may read what another is writing, and then compiles.
        "PYTHONPATH": str(ROOT / "tests"),
        "PYTHONWARNINGS": "ignore:Error reading persistent compilation cache",
        # Devices that share few threads wait for each other's sums forever.
        "NPROC": "16", "PJRT_NPROC": "16",
    }  # fmt: skip
    started = []
    for index in range(count):
        place = {"num_processes": count, "process_id": index}
        if slurm:
            place = {}
            environment |= {
                "SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "127.0.0.1",
                "SLURM_STEP_NUM_NODES": "1", "SLURM_NTASKS": str(count),
                "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index),
            }  # fmt: skip
        config = dataclasses.replace(CONFIG, **{**place, **changes, **(each or {}).get(index, {})})
        arguments = shlex.split(train.resume_command(config))[3:]
        command = [sys.executable, "-c", SCRIPT, *map(str, (step, number, who)), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    try:
        ended = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, *outputs) for p, outputs in zip(started, ended)]


def results(folder):
    """Metrics, state and judged weights of a finished run, read by this one process."""
    run = setup.make_run(CONFIG)
    example = setup.example_image(run.task.spec)
    state = training.create_train_state(
        run.task.model, run.task.rule, run.tx, jax.random.key(0), example
    )
    abstract = {
        "state": state._asdict(),
        "totals": epoch_sums.empty(run.task.model, run.task.rule)._asdict(),
    }
    with checkpoints.open_checkpoints(folder / "checkpoints", read_only=True) as manager:
        restored, meta = checkpoints.restore_training(manager, STEPS, abstract)
    assert meta["epochs_done"] == EPOCHS
    last, _ = restore(folder, run.task.model, run.task.rule, example, "last")
    assert last.step == STEPS
    judged = {"params": last.params, "batch_stats": last.batch_stats}
    return folders.read_metrics(folder), restored["state"], judged


def assert_close(array, expected):
    # Rounding may put an activation on the other side of the LeakyReLU's bend, and with it the
    # gradient of a unit: all but a few are equal, and those are near.
    difference = np.abs(np.asarray(array) - np.asarray(expected))
    assert np.quantile(difference, 0.99) <= 2e-3 * np.abs(expected).max(initial=0)
    assert np.linalg.norm(difference) <= 2e-2 * np.linalg.norm(expected)


def assert_same_run(folder, expected):
    (ours, state, judged), (theirs, other, expected_judged) = results(folder), expected
    assert [record["epoch"] for record in ours] == list(range(1, EPOCHS + 1))
    for a, b in zip(ours, theirs):
        for name in ("train_loss", "test_loss", "layer_loss"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3, err_msg=name)
        # An image on the boundary may fall to either side.
        assert abs(a["test_accuracy"] - b["test_accuracy"]) <= 2.0
    for name in ("params", "batch_stats"):
        jax.tree.map(assert_close, state[name], other[name])
        jax.tree.map(assert_close, judged[name], expected_judged[name])
    key, expected_key = map(jax.random.key_data, (state["key"], other["key"]))
    np.testing.assert_array_equal(key, expected_key)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    assert train.train_and_evaluate(dataclasses.replace(CONFIG, workdir=str(folder))) == 0
    return results(folder)


@pytest.mark.parametrize(
    ("count", "devices", "slurm", "on_device"), [(2, 2, False, "yes"), (3, 1, True, "no")]
)
def test_several_processes_train_like_one(tmp_path, alone, count, devices, slurm, on_device):
    folder = tmp_path / "run"
    ended = launch(folder, count, devices=devices, slurm=slurm, data_on_device=on_device)
    assert [status for status, _, _ in ended] == [0] * count, ended
    assert_same_run(folder, alone)
    # One process speaks for all.
    assert f"{count} processes" in ended[0][1] and "done: 2 epochs" in ended[0][1]
    for _, output, errors in ended[1:]:
        assert "epoch" not in output and not errors


def test_losses_reach_down_and_blocks_are_measured_in_several_processes(tmp_path):
    changes = {"reach": 2, "epochs": 1, "measure": "norms,heads"}
    one, two = tmp_path / "one", tmp_path / "two"
    config = dataclasses.replace(CONFIG, workdir=str(one), **changes)
    assert train.train_and_evaluate(config) == 0
    ended = launch(two, 2, **changes)
    assert [status for status, _, _ in ended] == [0, 0], ended
    (theirs,), (ours,) = folders.read_metrics(one), folders.read_metrics(two)
    for name in ("train_loss", "test_loss", "layer_loss"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=5e-3, err_msg=name)
    # Of a batch, where rounding takes activations over LeakyReLU's bend.
    for name in ("gradient_norm", "bp_gradient_norm"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=5e-2, err_msg=name)
    np.testing.assert_allclose(ours["head_accuracy"], theirs["head_accuracy"], atol=4.0)


def damage_newest(folder):
    """Cut the newest checkpoint's index; its step."""
    names = [path.name for path in (folder / "checkpoints").iterdir()]
    # One that was being written has a longer name.
    step = max(int(name) for name in names if name.isdigit())
    index = folder / "checkpoints" / str(step) / "training" / "manifest.ocdbt"
    index.write_bytes(index.read_bytes()[:20])
    return step


def test_a_lost_process_ends_the_others_and_the_run_goes_on_with_fewer(tmp_path, alone):
    folder, damaged = tmp_path / "run", None
    for count, who, number, step in (
        # Of the checkpoints after steps 2, 4, and 6 the last may not be there yet.
        (3, 1, signal.SIGKILL, 7),
        (2, 1, signal.SIGINT, 3),
        (2, 0, signal.SIGKILL, 3),
    ):
        ended = launch(folder, count, step=step, number=int(number), who=who)
        for index, (status, output, errors) in enumerate(ended):
            if damaged is not None and index == 0:
                # All of them agree on the one before, and go on.
                assert f"warning: checkpoint {damaged} is damaged" in errors
                assert (folder / "damaged" / str(damaged)).is_dir()
            if number == signal.SIGINT:
                assert status == 130, ended
                assert ("saved; resume with" in output) == (index == 0), output
            elif index == who:
                assert status == -signal.SIGKILL, errors
            else:
                assert status not in (0, -signal.SIGKILL), errors
                # JAX's own abort may be said after it.
                said = [line for line in errors.splitlines() if line.startswith("error: ")]
                assert said and "to resume it" in said[-1], errors
                assert "Traceback" not in errors
        damaged = damage_newest(folder) if damaged is None else None
    assert len(folders.read_metrics(folder)) < EPOCHS
    assert train.train_and_evaluate(dataclasses.replace(CONFIG, workdir=str(folder))) == 0
    assert_same_run(folder, alone)


def test_processes_that_do_not_fit_together_say_so(tmp_path):
    ended = launch(tmp_path / "run", 2, each={1: {"seed": 7}})
    assert "holds a run with another config (--seed 0 there, 7 here)" in ended[1][2]
    ended = launch(tmp_path / "other", 2, each={1: {"workdir": str(tmp_path / "elsewhere")}})
    assert "is not the folder that process 0 writes in" in ended[1][2]
    assert all(status not in (0, None) for status, _, _ in ended)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"coordinator": "here:1"}, ["--num-processes", "--process-id"]),
        ({"num_processes": 2}, ["--num-processes 2", "without --coordinator"]),
        ({"process_id": 0}, ["--process-id 0", "without --coordinator"]),
        ({"coordinator": "auto", "num_processes": 0}, ["--num-processes is 0", "at least 1"]),
        ({"coordinator": "auto", "pipeline": 2}, ["--pipeline and --coordinator"]),
        ({"coordinator": "auto", "remat": 8}, ["--remat 8", "--coordinator"]),
    ],
)
def test_options_that_do_not_go_together_are_refused(changes, parts):
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(CONFIG, **changes)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host",), "expected HOST:PORT"),
        (("host:x", 2, 0), "expected HOST:PORT"),
        (("host:70000", 2, 0), "expected HOST:PORT"),
        (("host:1", 2), "give both"),
        (("host:1", 0, 0), "at least 1"),
        (("host:1", 2, 2), "expected 0 to 1"),
        (("host:1", 2, -1), "expected 0 to 1"),
    ],
)
def test_a_meeting_needs_sound_arguments(arguments, message):
    with pytest.raises(ValueError, match=message), processes.initialize(*arguments):
        pass


def run_script(script):
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("before", "arguments", "message"),
    [
        ("", '"auto"', "no cluster was found"),
        ("", '"127.0.0.1:{taken}", 2, 0', "process 0 cannot listen at port {taken}"),
        ("import jax; jax.devices()", '"127.0.0.1:{free}", 1, 0', "nothing has touched a device"),
    ],
)
def test_a_meeting_that_cannot_be_is_explained(before, arguments, message):
    with socket.create_server(("", 0)) as other:
        ports = {"taken": other.getsockname()[1], "free": free_port()}
        ended = run_script(
            "from lls_jax import errors, processes\n"
            f"{before}\n"
            "try:\n"
            f"    with processes.initialize({arguments.format(**ports)}, timeout=5): pass\n"
            "except processes.ProcessesError as error:\n"
            "    print(error)\n"
        )
    assert message.format(**ports) in ended.stdout, ended.stderr


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [("os.abort()", -signal.SIGABRT, True), ("leave(3)", 3, False)],
)
def test_a_process_that_is_aborted_has_a_last_word(end, status, said):
    script = (
        "import os; from experiments import abort_message; leave = abort_message.prepare('lost')"
    )
    ended = run_script(f"{script}; print('here'); {end}")
    assert ended.returncode == status
    assert ended.stderr.endswith("lost\n") == said, ended.stderr
    assert said or ended.stdout == "here\n"


def test_one_process_is_first_agrees_with_itself_and_reads_all():
    assert processes.is_first()
    assert [processes.make_agreement(4)(number) for number in (0, 2, 15)] == [0, 2, 15]
    assert processes.local_rows(processes.everywhere(), 12) == slice(0, 12)
    tree = {"a": jax.numpy.arange(3.0), "key": jax.random.key(1)}
    again = processes.local_copy(processes.replicate(tree, processes.everywhere()))
    np.testing.assert_array_equal(again["a"], tree["a"])
    assert again["a"].unsafe_buffer_pointer() != tree["a"].unsafe_buffer_pointer()
