"""Measure training: images/s, ms a step, compile time, temporaries, and the ratio to bp.

Rules take turns, a few steps each, so that whatever else the machine does meets all of them alike.
A step here is all that training does for a batch: drawing, augmenting and normalising it, the
update, and the running totals.
"""

import dataclasses
import pathlib
import time
from typing import Any

from simple_parsing import field

from experiments.command_line import parse, run, use_huge_pages
from experiments.config import TrainConfig

_WARM_UP_STEPS = 3
_STEPS_A_TURN = 5


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Measure the training loop on random images of CIFAR-10's shape."""

    rules: list[str] = field(default_factory=lambda: ["lls", "lls_m", "lls_mxm", "bp"])
    """Rules to measure; bp is added for the ratio."""
    model: str = "small_conv"
    """Network."""
    batch_size: int = 128
    """Images a step."""
    precision: str = "float32"
    """float32 or bfloat16."""
    turns: int = 10
    """Turns of 5 steps that each rule takes; the figures are medians over all its steps."""
    seed: int = 0
    """Of the random images and weights."""
    out: str = "benchmark"
    """Folder for benchmark.json and benchmark.md."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming option and value, for what cannot be."""
        for name in ("batch_size", "turns"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1."
                )


class _Contestant:
    """One rule's training loop, advanced a few steps at a time."""

    def __init__(self, config: BenchmarkConfig, rule_name: str, images: Any, labels: Any) -> None:
        import jax
        import jax.numpy as jnp

        from experiments import optimizers
        from experiments.setup import example_image, make_task
        from experiments.train import empty_totals
        from lls_jax import training
        from lls_jax.data import batches

        train_config = TrainConfig(
            rule=rule_name,
            model=config.model,
            batch_size=config.batch_size,
            precision=config.precision,
        )
        task = make_task(train_config)
        tx = optimizers.make(train_config, steps_per_epoch=1000)
        self.name = rule_name
        self.times: list[float] = []
        self._index = 0
        self._batches = len(labels) // config.batch_size
        self._data = batches.DeviceSplit(jnp.asarray(images), jnp.asarray(labels))
        self._key = jax.random.key(config.seed)
        self._permutation = batches.epoch_permutation(self._key, 0, len(labels))
        self._sample = batches.make_sampler(task.spec, train_config.augmentation, config.batch_size)
        self._state = training.create_train_state(
            task.model, task.rule, tx, self._key, example_image(task.spec)
        )
        self._totals = empty_totals(task)
        self._step = training.make_train_step(task.model, task.rule, tx)
        batch = self._sample(self._data, self._permutation, 0, self._key)
        start = time.perf_counter()
        compiled = self._step.lower(self._state, batch).compile()  # type: ignore[attr-defined]
        self.compile_seconds = time.perf_counter() - start
        memory = compiled.memory_analysis()
        self.temporary_bytes = None if memory is None else int(memory.temp_size_in_bytes)

    def advance(self, steps: int, *, keep: bool) -> None:
        import jax

        from experiments.train import add_totals

        for _ in range(steps):
            start = time.perf_counter()
            key = jax.random.fold_in(self._key, self._index)
            index = self._index % self._batches
            batch = self._sample(self._data, self._permutation, index, key)
            self._state, metrics = self._step(self._state, batch)
            self._totals = add_totals(self._totals, metrics, batch["label"])
            jax.block_until_ready(self._totals)
            jax.block_until_ready(self._state)
            self._index += 1
            if keep:
                self.times.append(time.perf_counter() - start)


def benchmark(config: BenchmarkConfig) -> int:
    """Measure, print a table, write JSON and Markdown; returns the exit status."""
    import statistics

    import jax
    import numpy as np

    from experiments import run_folder

    names = [*dict.fromkeys([*config.rules, "bp"])]
    generator = np.random.default_rng(config.seed)
    count = config.batch_size * 8
    images = generator.integers(0, 256, (count, 32, 32, 3), np.uint8)
    labels = generator.integers(0, 10, count).astype(np.int32)
    contestants = [_Contestant(config, name, images, labels) for name in names]
    for contestant in contestants:
        contestant.advance(_WARM_UP_STEPS, keep=False)
    for _ in range(config.turns):
        for contestant in contestants:
            contestant.advance(_STEPS_A_TURN, keep=True)
    step_seconds = {c.name: statistics.median(c.times) for c in contestants}
    device = jax.devices()[0]
    results = [
        {
            "rule": c.name,
            "images_per_second": config.batch_size / step_seconds[c.name],
            "step_ms": 1e3 * step_seconds[c.name],
            "compile_seconds": c.compile_seconds,
            "temporary_mb": None if c.temporary_bytes is None else c.temporary_bytes / 1e6,
            "speed_over_bp": step_seconds["bp"] / step_seconds[c.name],
            "all_step_ms": [1e3 * seconds for seconds in c.times],
        }
        for c in contestants
    ]
    header = "| rule | images/s | ms a step | compile [s] | temporaries [MB] | speed over bp |"
    lines = [header, "|" + " --- |" * 6]
    for row in results:
        memory = "" if row["temporary_mb"] is None else f"{row['temporary_mb']:.0f}"
        lines.append(
            f"| {row['rule']} | {row['images_per_second']:.0f} | {row['step_ms']:.1f} | "
            f"{row['compile_seconds']:.1f} | {memory} | {row['speed_over_bp']:.2f} |"
        )
    table = "\n".join(lines) + "\n"
    environment = run_folder.environment()
    report = {
        "config": dataclasses.asdict(config),
        "environment": environment,
        "results": results,
    }
    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    run_folder.write_atomically(out / "benchmark.json", run_folder.to_json(report))
    run_folder.write_atomically(out / "benchmark.md", table)
    print(
        f"{config.model}, batch {config.batch_size}, {config.precision}, {device.platform} "
        f"({device.device_kind}), jax {jax.__version__}; medians of "
        f"{_STEPS_A_TURN * config.turns} steps\n\n"
        f"{table}\nwritten: {out / 'benchmark.json'}, benchmark.md"
    )
    return 0


if __name__ == "__main__":
    config = parse(BenchmarkConfig, "benchmark", __doc__ or "")
    use_huge_pages()
    run(lambda: benchmark(config))
