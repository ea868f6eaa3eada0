"""Which form of the local losses a run takes: measured on its own steps, when it starts."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lls_jax import processes
from lls_jax.models import Network
from lls_jax.placement import Execution
from lls_jax.rules import HeadRule, PerBlock, Rule
from lls_jax.runs.folder import describe
from lls_jax.training import Optimizer, Reach, create_train_state, make_train_step
from pallas_kernels import timing
from pallas_kernels.local_loss import IMPLEMENTATIONS, KernelUnavailableError, require

_PLAIN = "xla"
# A kernel is taken when a step is faster by more than what two measurements differ by.
_MARGIN = 1.05
_STEPS, _TURNS = 8, 5
_FILE = "kernels.json"
_IN_PART = "measured in part"


@dataclasses.dataclass(frozen=True)
class KernelChoice:
    """A form of the local losses, and why it is the one.

    Attributes:
        implementation: its name, as of :func:`pallas_kernels.local_loss.head_loss`.
        speeds: of a step with each form, over that with ``"xla"``.
        refused: why a form was not measured, by its name.
        origin: ``"measured"``, ``"measured in part"`` where a form failed that could have run,
            ``"remembered"`` from an earlier run of the same kind, or ``"resumed"`` with the run.
    """

    implementation: str
    speeds: dict[str, float]
    refused: dict[str, str]
    origin: str = "measured"

    def __str__(self) -> str:
        """For people, in one line."""
        rest = ", ".join(f"{name} {speed:.2f}" for name, speed in self.speeds.items())
        why = f" ({self.origin}; steps over xla: {rest})" if rest else f" ({self.origin})"
        failed = "".join(
            f"; {name} failed: {text}"
            for name, text in self.refused.items()
            if self.origin == _IN_PART
        )
        return f"local losses by {self.implementation}{why}{failed}"


class Work(NamedTuple):
    """What a run's steps are.

    Attributes:
        model: the network.
        rule: whose implementation is to be chosen.
        tx: the optimizer.
        image_shape: of one example.
        batch_size: examples a step.
        reach: as of :func:`lls_jax.training.make_train_step`.
        remat_above: likewise.
        slice_above: likewise.
        execution: where steps run; None for the default device.
    """

    model: Network
    rule: Rule
    tx: Optimizer
    image_shape: tuple[int, ...]
    batch_size: int
    reach: Reach = 1
    remat_above: int | None = None
    slice_above: int | None = None
    execution: Execution | None = None


Measure = Callable[[Sequence[Callable[[], Any]], int, Callable[[int], int]], list[float]]


def choose(
    work: Work, folder: pathlib.Path | None = None, platform: str | None = None
) -> KernelChoice | None:
    """The form that a run takes; of several processes all take what the first one says.

    Args:
        work: what the run does.
        folder: of the run: it goes on with what it began with; None for none.
        platform: of the device; None for JAX's default one.

    Returns:
        None where there is nothing to choose: no GPU, no head, an implementation named, or an
        execution with which none is measured.
    """
    if (platform or jax.default_backend()) != "gpu" or not has_choice(work.rule):
        return None
    if work.execution is not None and work.execution.with_rule is None:
        return None
    memory, key = _memory(), _key(work)
    known = _known(memory, key, folder) if processes.is_first() else None
    first = _of_first(None if known is None else known.implementation)
    if first is not None:
        return known or KernelChoice(first, {}, {}, "remembered")
    choice = measure(work)
    taken = _of_first(choice.implementation)
    assert taken is not None
    choice = dataclasses.replace(choice, implementation=taken)
    # What failed may not the next time.
    if processes.is_first() and choice.origin != _IN_PART:
        # Where nothing can be remembered, the next run measures again.
        with contextlib.suppress(OSError):
            _write(memory, {**_read(memory), key: dataclasses.asdict(choice)})
    return choice


def _known(memory: pathlib.Path, key: str, folder: pathlib.Path | None) -> KernelChoice | None:
    kept = None if folder is None else _choice(_read(folder / _FILE), "resumed")
    return kept or _choice(_read(memory).get(key), "remembered")


def _of_first(implementation: str | None) -> str | None:
    """What the first process says of all; None is an answer too."""
    said = 0 if implementation is None else IMPLEMENTATIONS.index(implementation) + 1
    # The largest: the others are silent.
    agreed = processes.make_agreement()(said if processes.is_first() else 0)
    return IMPLEMENTATIONS[agreed - 1] if agreed else None


def keep(choice: KernelChoice, folder: pathlib.Path) -> None:
    """Write a choice into the run's folder, for :func:`choose` when it goes on."""
    _write(folder / _FILE, dataclasses.asdict(choice))


def has_choice(rule: Rule) -> bool:
    """Whether a rule has a head whose implementation is not named."""
    return with_default(rule, _PLAIN) != rule


def with_default(rule: Rule, name: str) -> Rule:
    """The same rule with its losses computed so, where it has a head and names no other way.

    Args:
        rule: any.
        name: of :data:`pallas_kernels.local_loss.IMPLEMENTATIONS`.
    """
    if isinstance(rule, PerBlock):
        return PerBlock(tuple(with_default(one, name) for one in rule.rules))  # type: ignore[misc]
    is_named = isinstance(rule, HeadRule) and rule.implementation is not None
    return rule if is_named else rule.with_implementation(name)


def measure(
    work: Work, names: Sequence[str] = IMPLEMENTATIONS, turns: Measure = timing.turns
) -> KernelChoice:
    """Time whole steps with each form, taking turns, and take the fastest by a margin of 5 %.

    Args:
        work: what the run does.
        names: forms; those that cannot run are left out.
        turns: ``turns(functions, count, agree) -> seconds`` of each.
    """
    agree = processes.make_agreement()
    image = jax.random.normal(jax.random.key(0), (work.batch_size, *work.image_shape))
    label = jnp.arange(work.batch_size, dtype=jnp.int32) % work.model.num_classes
    batch = {"image": image, "label": label}
    key = jax.random.key(1)
    state = create_train_state(work.model, work.rule, work.tx, key, image[:1])
    calls: dict[str, Callable[[], Any]] = {}
    refused, origin = {}, "measured"
    for name in (_PLAIN, *(name for name in names if name != _PLAIN)):
        try:
            calls[name] = _chain(work, name, state, batch)
        except KernelUnavailableError as error:
            refused[name] = str(error)
        except Exception as error:
            # A kernel that wants more memory than there is, for one. Nobody has asked for it.
            if name == _PLAIN:
                raise
            refused[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
            origin = _IN_PART
        if agree(int(name in refused)) and name in calls:
            del calls[name]
            refused[name] = "another process cannot run it"
    choice = decide(dict(zip(calls, turns(list(calls.values()), _TURNS, agree))), refused)
    return dataclasses.replace(choice, origin=origin)


def decide(seconds: dict[str, float], refused: dict[str, str]) -> KernelChoice:
    """The fastest form, if it is faster than ``"xla"`` by 5 %.

    Args:
        seconds: of a step, by form; ``"xla"`` among them.
        refused: why others were not measured.

    >>> decide({"xla": 1.0, "split": 0.8, "pallas": 0.5}, {}).implementation
    'pallas'
    """
    speeds = {name: seconds[_PLAIN] / spent for name, spent in seconds.items()}
    best = max(speeds, key=lambda name: speeds[name])
    best = best if speeds[best] >= _MARGIN else _PLAIN
    return KernelChoice(best, speeds, refused)


def _chain(work: Work, name: str, state: Any, batch: Any) -> Callable[[], Any]:
    """A compiled chain of steps, as a run on a GPU launches them."""
    rule = with_default(work.rule, name)
    if not rule.interprets:
        require(name)
    if work.execution is None:
        step = make_train_step(
            work.model,
            rule,
            work.tx,
            reach=work.reach,
            remat_above=work.remat_above,
            slice_above=work.slice_above,
        )
    else:
        assert work.execution.with_rule is not None
        shared = work.execution.with_rule(rule)
        assert shared.train_step is not None and shared.sharding is not None
        rows = processes.local_rows(shared.sharding, work.batch_size)
        batch = processes.shard_batch(jax.tree.map(lambda x: x[rows], batch), shared.sharding)
        step, state = shared.train_step, shared.enter(state)

    def run(state: Any, batch: Any) -> Any:
        def one(state: Any, _: Any) -> Any:
            state, metrics = step(state, batch)
            return state, metrics["loss"]

        return jax.lax.scan(one, state, None, length=_STEPS)

    compiled = jax.jit(run).lower(state, batch).compile()
    return lambda: compiled(state, batch)


def _key(work: Work) -> str:
    """Device, driver, versions, shapes and head."""
    device: Any = jax.devices()[0]
    parts = [device.device_kind, device.client.platform_version, jax.__version__]
    parts += [
        describe(work.model),
        describe(work.rule),
        work.image_shape,
        work.batch_size,
        work.reach,
    ]
    if work.execution is not None and work.execution.sharding is not None:
        parts += [work.execution.sharding.mesh.size, jax.process_count()]
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
    return f"{device.device_kind}, jax {jax.__version__}: {digest[:16]}"


def _memory() -> pathlib.Path:
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return cache / "lls_jax" / _FILE


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _choice(values: Any, origin: str) -> KernelChoice | None:
    """A choice that was written; None for what this version does not understand."""
    try:
        choice = KernelChoice(**{**values, "origin": origin})
    except TypeError:
        return None
    return choice if choice.implementation in IMPLEMENTATIONS else None


def _write(path: pathlib.Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process may be reading: it sees the old file or the new one.
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(values, indent=1) + "\n")
    temporary.replace(path)
