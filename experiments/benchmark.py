"""Measure speed and memory: whole training steps, or the kernels of the local loss.

--suite training races rules against backpropagation, step by step, and with --against torch each
of them against a PyTorch loop of the same network and rule; --suite epochs trains whole runs
(the published 25 epochs of CIFAR-10); --suite kernels measures the local loss by
each implementation, on a GPU; --suite pipeline puts the blocks on several devices.
"""

import dataclasses
import importlib
from typing import Any

from simple_parsing import field

from experiments import reach_options, startup
from experiments.command_line import parse, run
from experiments.config_checks import check_seeds
from experiments.config_choices import KERNELS, PRECISIONS, option

SUITES = ("training", "epochs", "kernels", "pipeline")
# Options of some suites, which the others have no use for.
_OF_SUITES = {
    "width": ("training", "epochs"),
    "precisions": ("training", "epochs"),
    "kernels": ("training", "epochs"),
    "reach": ("training", "epochs", "pipeline"),
    "groups": ("training",),
    "remat": ("training", "epochs", "pipeline"),
    "slice": ("training", "epochs", "pipeline"),
    "against": ("training",),
    "torch_python": ("training",),
    "dataset": ("epochs",),
    "data_dir": ("epochs",),
    "epochs": ("epochs",),
    "turns": ("training", "kernels", "pipeline"),
    "cpu": ("kernels",),
}
AGAINST = ("torch",)
# That the PyTorch loop has.
_TORCH_RULES = ("lls", "lls_m", "lls_mxm", "bp")
# What a suite measures unless told otherwise.
_DEFAULTS: dict[str, dict[str, list[Any]]] = {
    "training": {"models": ["small_conv"], "batch_sizes": [128], "precisions": ["float32"]},
    "epochs": {"models": ["small_conv"], "batch_sizes": [64, 128], "precisions": ["float32"]},
    "pipeline": {"models": ["small_conv"], "batch_sizes": [128], "precisions": ["float32"]},
    "kernels": {
        "models": ["small_conv", "vgg8", "mobilenet_v1"],
        "batch_sizes": [128, 1024],
        "precisions": ["float32"],
    },
}


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Measure on random images."""

    suite: str = "training"
    """training: whole steps of each rule; epochs: whole runs with evaluation; kernels: the local
    loss by each implementation; pipeline: blocks on several devices."""
    rules: list[str] = field(default_factory=lambda: ["lls", "lls_m", "lls_mxm", "bp"])
    """Rules to measure; bp is added for the ratio."""
    models: list[str] = field(default_factory=list)
    """Networks [default: small_conv; all that kernels are for with --suite kernels]."""
    batch_sizes: list[int] = field(default_factory=list)
    """Images a step [default: 128; 64 128 with --suite epochs; 128 1024 with --suite kernels]."""
    width: float = 1.0
    """Of --suite training and epochs: factor of the networks' published widths."""
    precisions: list[str] = field(default_factory=list)
    """Of --suite training and epochs: float32, bfloat16, or both, which race each other with
    training [default: float32]."""
    kernels: str = "auto"
    """Of --suite training and epochs, what computes the local losses: auto, xla, split, pallas,
    triton."""
    reach: list[reach_options.TypedReach] = reach_options.several(1)
    """Of --suite training, epochs and pipeline: blocks that a local loss teaches, its own and those
    below it, like 1 2, or 1,2,2,1,1 as of a training run; each rule with local losses is measured
    with each."""
    groups: str | None = None
    """Of --suite training: blocks that share a local loss, as of a training run; bp is without."""
    remat: int | None = None
    """Of --suite training, epochs and pipeline: as of a training run; of local rules."""
    slice: int | None = None
    """Of --suite training, epochs and pipeline: as of a training run; of local rules."""
    against: str | None = None
    """Of --suite training: torch, a plain PyTorch loop of the same network and rule, which takes
    turns with the library; both then train with adamw."""
    torch_python: str | None = None
    """Of --against torch: the Python that has PyTorch [default: the one that runs this]."""
    dataset: str = "cifar10"
    """Of --suite epochs: the data set."""
    data_dir: str | None = None
    """Of --suite epochs: folder of prepared data sets [default: as of a training run]."""
    epochs: int = 25
    """Of --suite epochs: passes over the training images, at least 2."""
    turns: int = 10
    """Of --suite training, kernels and pipeline, whose figures are medians over turns: those that
    each contestant takes, five steps each with training; of the steps of kernels 5 at most; of
    pipeline half as many, 3 at least."""
    cpu: bool = False
    """Run --suite kernels on a CPU, where there are no kernels to measure but XLA's own."""
    seed: int = 0
    """Of the random images and weights; with --suite epochs of every random draw of a run."""
    out: str = "benchmark"
    """Folder for benchmark.json and benchmark.md."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming option and value, for what cannot be."""
        if self.suite not in SUITES:
            raise ValueError(f"unknown suite {self.suite!r}; expected one of {', '.join(SUITES)}.")
        for defaulted, default in _DEFAULTS[self.suite].items():
            if not getattr(self, defaulted):
                object.__setattr__(self, defaulted, default)
        self._check_suite()
        sizes: dict[str, list[int]] = {"batch_sizes": self.batch_sizes, "turns": [self.turns]}
        if self.epochs < 2:
            raise ValueError(
                f"--epochs is {self.epochs}; it must be at least 2, the first one compiles."
            )
        for name, counts in sizes.items():
            if min(counts) < 1:
                raise ValueError(f"{option(name)} is {min(counts)}; it must be at least 1.")
        for name, values, known in (
            ("precisions", self.precisions, PRECISIONS),
            ("kernels", [self.kernels], KERNELS),
        ):
            if unknown := sorted(set(values) - set(known)):
                raise ValueError(
                    f"{option(name)} is {unknown[0]!r}; expected one of {', '.join(known)}."
                )
        reach_options.check(self.reach)
        check_seeds("--seed", [self.seed])
        self._check_against()

    def _check_suite(self) -> None:
        """Raise ValueError for an option that the suite has no use for."""
        for one in dataclasses.fields(self):
            suites, default = _OF_SUITES.get(one.name, SUITES), one.default
            if one.default_factory is not dataclasses.MISSING:
                default = _DEFAULTS[self.suite].get(one.name) or one.default_factory()
            if self.suite not in suites and getattr(self, one.name) != default:
                raise ValueError(
                    f"{option(one.name)} is of --suite {', '.join(suites)}, not {self.suite}; "
                    "leave it out."
                )

    def _check_against(self) -> None:
        """Raise ValueError where there is no race of the library against another."""
        if self.against is None:
            if self.torch_python is not None:
                raise ValueError("--torch-python is of --against torch; give that too.")
            return
        if self.against not in AGAINST:
            raise ValueError(
                f"--against is {self.against!r}; expected one of {', '.join(AGAINST)}."
            )
        if self.groups is not None:
            raise ValueError(
                f"--groups {self.groups} does not go with --against {self.against}, whose blocks "
                "have a loss each; leave it out."
            )
        given: tuple[tuple[str, list[Any], tuple[Any, ...]], ...] = (
            ("rules", self.rules, _TORCH_RULES),
            ("reach", self.reach, (1,)),
        )
        for name, values, known in given:
            if unknown := sorted(set(values) - set(known), key=str):
                raise ValueError(
                    f"{option(name)} {unknown[0]} does not go with --against {self.against}, "
                    f"which races {', '.join(map(str, known))}."
                )


def benchmark(config: BenchmarkConfig) -> int:
    """Measure, print a table, write JSON and Markdown; returns the exit status."""
    # Imported late: JAX takes longer to start than `--help` may take to answer.
    from experiments.setup import as_user_error

    suite = importlib.import_module(f"experiments.suites.{config.suite}")
    with as_user_error():
        return suite.run(config)


if __name__ == "__main__":
    config = parse(BenchmarkConfig, "benchmark", __doc__ or "")
    startup.prepare()
    run(lambda: benchmark(config))
