"""A run's folder: its config, its environment, its metrics, and who may write there."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from experiments.command_line import UserError
from experiments.config import FORMAT, SPREADING, TrainConfig, from_dict, may_go_on, option

Record = dict[str, Any]

_PACKAGES = (
    *("lls_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"),
    *("tensorflow-datasets", "numpy"),
)


def checkpoints(folder: pathlib.Path) -> pathlib.Path:
    """Where a run's checkpoints lie."""
    return folder / "checkpoints"


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Replace a file's content so that a reader sees the old or the new one, whole."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def to_json(value: Any) -> str:
    """JSON as run folders hold it."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


@contextlib.contextmanager
def claim(folder: pathlib.Path) -> Iterator[None]:
    """Make a run's folder and keep other processes from training in it.

    A folder in which nothing was begun when this ends is taken away again.

    Raises:
        UserError: it cannot be written, or another process trains in it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise UserError(
            f"run folder {folder} cannot be written ({error.strerror}); give another --workdir."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one who had it before may have taken it away meanwhile.
            is_ours = path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())
        except BlockingIOError:
            is_ours = False
        if not is_ours:
            raise UserError(
                f"another process is training in {folder}; wait for it, or give another --workdir."
            )
        try:
            yield
        finally:
            if [child.name for child in folder.iterdir()] == [path.name]:
                path.unlink()
                # A parent may hold another run by now.
                with contextlib.suppress(OSError):
                    for empty in made:
                        empty.rmdir()


def _read(folder: pathlib.Path) -> tuple[TrainConfig, int]:
    """The config of a run, and the format that it was written in.

    Raises:
        UserError: there is no run in this folder, or its config cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} holds no run (it has no config.json); give the --workdir of a training run."
        )
    try:
        values = json.loads(path.read_text())
        written = values.pop("format", 1)
        if written > FORMAT:
            raise ValueError(f"it has format {written}, and this version knows {FORMAT}")
        if written == 1:
            # These meant the rule's own, which it has whatever it is.
            own = {"waveform": "square", "temperature": 0.5, "label_smoothing": 0.0}
            values |= {name: None for name, value in own.items() if values.get(name) == value}
        return from_dict(values), written
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a config of this version: {error}.") from error


def read_config(folder: pathlib.Path) -> TrainConfig:
    """The config of a run, of this version or an earlier one.

    Raises:
        UserError: there is no run in this folder, or its config cannot be read.
    """
    return _read(folder)[0]


def write_config(folder: pathlib.Path, config: TrainConfig) -> None:
    """Write a new run's config; of an old one's only the number of epochs may grow."""
    if (folder / "config.json").exists():
        stored = read_config(folder)
        if config.epochs <= stored.epochs:
            return
        config = dataclasses.replace(stored, epochs=config.epochs)
    text = to_json({"format": FORMAT, **dataclasses.asdict(config)})
    write_atomically(folder / "config.json", text)


def check_config(folder: pathlib.Path, config: TrainConfig, *, must_exist: bool = False) -> None:
    """Check that a run that lies in a folder already can go on with a config.

    Args:
        folder: of the run.
        config: of this process.
        must_exist: whether another process has just written one.

    Raises:
        UserError: the folder holds a run with another config, and the message names what differs;
            a run of an earlier version, with another optimizer; or it holds none, and must.
    """
    if not (folder / "config.json").exists():
        if must_exist:
            raise UserError(
                f"{folder} is not the folder that process 0 writes in; give a --workdir on a file "
                "system that all processes share."
            )
        return
    stored, written = _read(folder)
    if written < FORMAT:
        raise UserError(
            f"{folder} was written by an earlier version, whose schedule_free_adamw was optax's "
            "and not the published optimizer, so that it cannot go on as it was; give another "
            "--workdir to train anew (evaluate and compare still read this one)."
        )
    differing = [
        f"{option(field.name)} {getattr(stored, field.name)} there, "
        f"{getattr(config, field.name)} here"
        for field in dataclasses.fields(config)
        if not may_go_on(stored, config, field.name)
    ]
    if differing:
        spread = stored.epochs != config.epochs and config.schedule in SPREADING
        because = f"; --schedule {config.schedule} depends on --epochs" if spread else ""
        raise UserError(
            f"{folder} holds a run with another config ({'; '.join(differing)}{because}); give the "
            "same options to resume it, or another --workdir for a new run."
        )


def _commit() -> str | None:
    """The commit of the checkout that this file lies in, if it is one."""
    here = pathlib.Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def environment() -> Record:
    """Versions, device and commit."""
    import jax

    device = jax.local_devices()[0]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "device": f"{device.platform}: {device.device_kind}",
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "commit": _commit(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def write_environment(folder: pathlib.Path) -> None:
    """Note the environment of this start, after those of earlier ones."""
    entry = environment()
    path = folder / "environment.json"
    try:
        entries = json.loads(path.read_text()) if path.exists() else []
    except ValueError:
        entries = []
    if not entries or entries[-1] != entry:
        write_atomically(path, to_json([*entries, entry]))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def read_metrics(folder: pathlib.Path) -> list[Record]:
    """The records of a run, one an epoch; a last line cut short by a kill is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def append_metrics(folder: pathlib.Path, record: Record) -> None:
    """Add an epoch's record."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def keep_metrics(folder: pathlib.Path, records: list[Record]) -> None:
    """Keep these records of a run, and drop the others, which it is about to repeat."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    path = folder / "metrics.jsonl"
    if path.exists() and path.read_text() != text:
        write_atomically(path, text)
