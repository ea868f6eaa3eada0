"""A run's folder: its settings, its environment, its metrics, and who may write there."""

import contextlib
import fcntl
import json
import os
import pathlib
import platform
import re
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from lls_jax.errors import UserError

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


# Of a function or an object, in its repr: another one in each process.
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def describe(value: Any) -> str:
    """What a value is, the same in each process: its repr without addresses.

    >>> describe([describe]), describe("a")
    ('[<function describe>]', "'a'")
    """
    return _ADDRESS.sub("", repr(value))


def _differ(stored: Any, given: Any) -> bool:
    """Whether two JSON values do; of strings without addresses, which earlier versions wrote."""
    one, other = (
        _ADDRESS.sub("", value) if isinstance(value, str) else value for value in (stored, given)
    )
    return bool(one != other)


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


class Settings:
    """What a run is started with, as config.json has it; decides whether another start may go on.

    Args:
        values: JSON values.
    """

    def __init__(self, values: Record) -> None:
        self.values = values

    def check(self, folder: pathlib.Path, stored: Record) -> None:
        """Raise UserError, naming what differs, if a run that has `stored` cannot go on with these.

        A larger number of epochs extends a run.
        """
        differing = [
            f"{name} {stored.get(name)!r} there, {self.values.get(name)!r} here"
            for name in sorted({*stored, *self.values})
            if _differ(stored.get(name), self.values.get(name)) and name != "epochs"
        ]
        if self.values["epochs"] < stored.get("epochs", 0):
            differing.append(f"epochs {stored['epochs']} there, {self.values['epochs']} here")
        if differing:
            raise UserError(
                f"{folder} holds a run with other settings ({'; '.join(differing)}); use the same "
                "ones to resume it, or another folder for a new run."
            )


def read_settings(folder: pathlib.Path) -> Record | None:
    """The values of a run's config.json; None where there is none.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
    except ValueError as error:
        raise UserError(f"{path} is not a config of this version: {error}.") from error
    return values


def check_settings(folder: pathlib.Path, settings: Settings, *, must_exist: bool = False) -> None:
    """Check that a run that a folder holds already can go on with other settings.

    Args:
        folder: of the run.
        settings: of this process.
        must_exist: whether another process has just written them.

    Raises:
        UserError: it cannot, and the message names what differs; or it holds none, and must.
    """
    stored = read_settings(folder)
    if stored is not None:
        settings.check(folder, stored)
    elif must_exist:
        raise UserError(
            f"{folder} is not the folder that process 0 writes in; give a --workdir on a file "
            "system that all processes share."
        )


def write_settings(folder: pathlib.Path, settings: Settings) -> None:
    """Write a new run's settings; those of an old one stay."""
    if read_settings(folder) is None:
        write_atomically(folder / "config.json", to_json(settings.values))


def extend(folder: pathlib.Path, epochs: int) -> None:
    """Write that a run goes on, to a larger number of epochs."""
    stored = read_settings(folder)
    if stored is not None and stored["epochs"] < epochs:
        change_settings(folder, {"epochs": epochs})


def change_settings(folder: pathlib.Path, values: Record) -> None:
    """Write what is otherwise from this start on, and may be; to be called when the run goes on.

    Args:
        folder: of the run.
        values: by name.
    """
    stored = read_settings(folder)
    if stored is not None and any(stored.get(name) != value for name, value in values.items()):
        write_atomically(folder / "config.json", to_json({**stored, **values}))


def check_epochs(folder: pathlib.Path, epochs: int) -> None:
    """Raise UserError where another process has written another number of epochs."""
    stored = read_settings(folder)
    if stored is not None and stored["epochs"] != epochs:
        raise UserError(
            f"this process is to train {epochs} epochs, and process 0 trains {stored['epochs']}; "
            "give all processes the same number."
        )


def _commit() -> str | None:
    """The commit of the checkout that this file belongs to, if it is one."""
    here = pathlib.Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def environment() -> Record:
    """Versions, device and commit."""
    # Imported late: who only reads a folder need not wait for it.
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


def read_environment(folder: pathlib.Path) -> list[Record]:
    """The environments of a run's starts, oldest first; none where that cannot be read."""
    try:
        entries = json.loads((folder / "environment.json").read_text())
    except (FileNotFoundError, ValueError):
        return []
    return [one for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []


def write_environment(folder: pathlib.Path) -> None:
    """Note the environment of this start, after those of earlier ones."""
    entry = environment()
    entries = read_environment(folder)
    if not entries or entries[-1] != entry:
        write_atomically(folder / "environment.json", to_json([*entries, entry]))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def read_metrics(folder: pathlib.Path) -> list[Record]:
    """The records of a run, one an epoch; a last line cut short by a kill is left out.

    Raises:
        UserError: a line is no record of an epoch.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or "epoch" not in record:
            raise UserError(
                f"{path} has {line[:40]!r} in line {number}, which is no record of an epoch; bring "
                "the file back as it was."
            )
        records.append(record)
    return records


def append_metrics(folder: pathlib.Path, record: Record) -> None:
    """Add an epoch's record."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def keep_metrics(folder: pathlib.Path, records: list[Record]) -> None:
    """Keep these records of a run, and drop the others, which it is about to repeat."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    path = folder / "metrics.jsonl"
    if path.exists() and path.read_text(errors="replace") != text:
        write_atomically(path, text)
