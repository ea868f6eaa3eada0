"""`--deterministic`: which flags XLA gets, when, and who is told that it cannot be."""

import os
import pathlib
import subprocess
import sys

import pytest

from experiments import determinism, train
from experiments.config import TrainConfig
from lls_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
EXACT = "xla_gpu_exclude_nondeterministic_ops"


@pytest.fixture
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", "")
    for name, value in determinism.environment(tmp_path).items():
        monkeypatch.setenv(name, f"not {value}")
    return monkeypatch


def test_a_run_keeps_what_it_has_compiled_and_xla_knows_the_flag(tmp_path):
    """XLA ends a process that gives it a flag which it has not."""
    script = """
import sys, pathlib
from experiments import determinism
determinism.prepare(pathlib.Path(sys.argv[1]))
assert "jax" not in sys.modules
import jax
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("cache_hits")))
jax.jit(lambda x: x + 1)(1.0)
print(len(jax.devices()), "devices,", sum(hits), "hits")
"""
    for where, hits in (("a run", 0), ("a run", 1), ("another", 0)):
        ended = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / where)],
            cwd=ROOT, capture_output=True, text=True, timeout=300,
            env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        # What was in the environment is still heard.
        assert ended.stdout == f"2 devices, {hits} hits\n"


def test_the_flag_is_added_once_and_checked(tmp_path, environment):
    with pytest.raises(UserError, match=r"before JAX starts.*--xla_gpu_exclude.*=true JAX_"):
        determinism.check(tmp_path, "gpu")
    # Nothing is needed there.
    determinism.check(tmp_path, "cpu")
    for given in ("", "--xla_dump_to=/x", f"--{EXACT} --xla_dump_to=/x"):
        environment.setenv("XLA_FLAGS", given)
        determinism.prepare(tmp_path)
        assert os.environ["XLA_FLAGS"].startswith(given)
        assert os.environ["XLA_FLAGS"].count(EXACT) == 1
        determinism.check(tmp_path, "gpu")
    # Another run's choices are not this one's.
    with pytest.raises(UserError, match="before JAX starts"):
        determinism.check(tmp_path / "other", "gpu")
    determinism.prepare(tmp_path)
    environment.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --{EXACT}=false")
    with pytest.raises(UserError, match="before JAX starts"):
        determinism.check(tmp_path, "gpu")
    with pytest.raises(UserError, match=f"{EXACT}, which XLA_FLAGS .* turns off; take it out"):
        determinism.prepare(tmp_path)


def test_several_processes_are_refused():
    with pytest.raises(ValueError, match="--deterministic does not go with --coordinator"):
        TrainConfig(deterministic=True, coordinator="auto")


def test_a_run_on_a_gpu_without_the_flags_is_refused_before_it_begins(tmp_path, environment):
    environment.setattr(train.jax, "default_backend", lambda: "gpu")
    config = TrainConfig(dataset="digits", deterministic=True, workdir=str(tmp_path / "run"))
    with pytest.raises(UserError, match="start the run as a command"):
        train.train_and_evaluate(config)
    assert not (tmp_path / "run").exists()


def test_the_command_prepares_and_says_in_a_line_why_it_cannot(tmp_path):
    command = ("-m", "experiments.digits", "--deterministic", "--workdir", str(tmp_path / "run"))
    ended = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "XLA_FLAGS": f"--{EXACT}=false"},
    )  # fmt: skip
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("error: --deterministic needs XLA's flag")
    assert not (tmp_path / "run").exists()
