"""`--deterministic`: which flags XLA gets, when, and who is told that it cannot be."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from experiments import determinism, train
from experiments.config import TrainConfig
from lls_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
EXACT = "xla_gpu_exclude_nondeterministic_ops"


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    monkeypatch.setattr(determinism.atexit, "register", lambda *arguments: None)
    return monkeypatch


def test_a_command_starts_jax_with_flags_that_this_xla_knows(tmp_path):
    """XLA ends a process that gives it a flag which it has not."""
    script = """
import sys, pathlib
from experiments import determinism
determinism.prepare(pathlib.Path(sys.argv[1]))
assert "jax" not in sys.modules
import jax
print(jax.devices(), jax.config.jax_enable_compilation_cache)
assert pathlib.Path(determinism.flags(pathlib.Path(sys.argv[1]))[
    "xla_gpu_per_fusion_autotune_cache_dir"]).is_dir()
"""
    run = tmp_path / "a run" / "of mine"
    ended = subprocess.run(
        [sys.executable, "-c", script, str(run)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    # What was in the environment is still heard.
    assert re.search(r"id=1\)\] False", ended.stdout), ended.stdout
    # Nothing was written: the folder is as it was.
    assert not (tmp_path / "a run").exists()


def test_flags_are_added_once_and_checked(tmp_path, environment):
    with pytest.raises(UserError, match=r"before JAX starts.*--xla_gpu_exclude.*=true"):
        determinism.check(tmp_path, "gpu")
    # Nothing is needed there.
    determinism.check(tmp_path, "cpu")
    environment.setenv("XLA_FLAGS", f"--xla_dump_to=/x --{EXACT}")
    determinism.prepare(tmp_path)
    assert os.environ["XLA_FLAGS"].startswith(f"--xla_dump_to=/x --{EXACT} --xla_gpu_per_fusion")
    assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "false"
    determinism.check(tmp_path, "gpu")
    before = os.environ["XLA_FLAGS"]
    determinism.prepare(tmp_path)
    assert os.environ["XLA_FLAGS"] == before
    # Another run's choices are not this one's.
    with pytest.raises(UserError, match="before JAX starts"):
        determinism.check(tmp_path / "other", "gpu")


@pytest.mark.parametrize(
    "flag", [f"--{EXACT}=false", "--xla_gpu_per_fusion_autotune_cache_dir='/somewhere else'"]
)
def test_who_asks_xla_for_something_else_is_told(tmp_path, environment, flag):
    environment.setenv("XLA_FLAGS", flag)
    said = re.escape(flag.partition("=")[2].strip("'"))
    with pytest.raises(UserError, match=f"XLA_FLAGS in the environment has it {said}; take it out"):
        determinism.prepare(tmp_path)


def test_a_folder_that_cannot_be_made_is_told(tmp_path, environment):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be made .* give another --workdir"):
        determinism.prepare(tmp_path / "file" / "run")


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
