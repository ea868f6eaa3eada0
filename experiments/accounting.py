"""Count what each rule costs on a model: parameters, multiply-accumulates, activation memory.

Counts are for one image; nothing is run. "signal" is what a block learns from: its local loss and
that loss's gradient, with --reach those of the blocks above that teach it too, or backpropagation's
gradient to its activation.
"""

import dataclasses
import json

from simple_parsing import field, flag

from experiments import reach_options
from experiments.command_line import parse, run
from experiments.config import TrainConfig

_RULES = (
    *("lls", "lls_m", "lls_mxm", "lls_mxm_reduced", "lls_random", "local_classifier"),
    *("predsim", "contrastive", "decoupled", "dfa", "drtp", "bp"),
)


@dataclasses.dataclass(frozen=True)
class AccountingConfig:
    """Count a model's costs under several rules."""

    model: str = "small_conv"
    """Network."""
    dataset: str = "cifar10"
    """Data set, for the size of its images and the number of classes."""
    rules: list[str] = field(default_factory=lambda: list(_RULES))
    """Rules to count; bp and local_classifier are added for the ratios."""
    reach: list[reach_options.TypedReach] = reach_options.several(1)
    """Blocks that a local loss teaches, its own and those below it, like 1 2, or 1,2,2,1,1 as of a
    training run: each rule with local losses is counted with each."""
    groups: str | None = None
    """Blocks that share one local loss, as of a training run; bp is counted without."""
    data_dir: str | None = None
    """Folder of prepared data sets [default: $TFDS_DATA_DIR or ~/tensorflow_datasets]."""
    json: bool = flag(default=False, negative_prefix="--no-")
    """Print JSON."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming option and value, for what cannot be."""
        reach_options.check(self.reach)


def accounting(config: AccountingConfig) -> int:
    """Count and print; returns the exit status."""
    from experiments import several_rules
    from experiments.setup import as_user_error, make_task
    from experiments.suites.report import markdown
    from lls_jax.accounting import account

    names = [*config.rules, "local_classifier", "bp"]
    accounts = {}
    with as_user_error():
        common = TrainConfig(
            model=config.model,
            groups=config.groups,
            dataset=config.dataset,
            data_dir=config.data_dir,
        )
        asked = several_rules.of_rules(common, names, config.reach)
        several_rules.check_used(common, asked)
        # What is compared to is counted with a reach of 1 in any case.
        for one in [*asked, *several_rules.of_rules(common, ["local_classifier"], [1])]:
            task, reach = make_task(one), reach_options.of_losses(one.reach)
            counted = account(task.model, task.rule, task.spec.input_shape, reach)
            accounts[one.rule, one.reach] = counted
    bp, classifier = accounts["bp", 1], accounts["local_classifier", 1]
    totals = [
        {
            "rule": name,
            "reach": reach,
            "params": one.total("params"),
            "rule_params": one.total("rule_params"),
            "forward": one.total("forward"),
            "weight_gradient": one.total("weight_gradient"),
            "signal": one.total("signal"),
            "bp_signal_over_this": bp.total("signal") / max(one.total("signal"), 1),
            "classifier_signal_over_this": classifier.total("signal") / max(one.total("signal"), 1),
            "memory": one.peak_activation_bytes,
            "memory_over_bp": one.peak_activation_bytes / bp.peak_activation_bytes,
        }
        for (name, reach), one in accounts.items()
    ]
    blocks = [
        {"rule": name, "reach": reach, **cost._asdict()}
        for (name, reach), one in accounts.items()
        for cost in one.blocks
    ]
    if config.json:
        print(json.dumps({"totals": totals, "blocks": blocks}, indent=2))
        return 0
    counts = {"forward": "MACs forward", "weight_gradient": "to weights", "signal": "signal"}
    shared = "" if config.groups is None else f", groups of {config.groups} but for bp"
    print(f"{config.model} on {config.dataset}, one image{shared}\n")
    print(
        markdown(
            {
                "rule": "rule",
                "reach": "reach",
                "name": "block",
                "params": "parameters",
                "rule_params": "extra",
                **counts,
                "activation_bytes": "activations [bytes]",
            },
            blocks,
        )
    )
    print(
        markdown(
            {
                "rule": "rule",
                "reach": "reach",
                "params": "parameters",
                "rule_params": "extra",
                **counts,
                "bp_signal_over_this": "bp's signal / this",
                "classifier_signal_over_this": "local_classifier's / this",
                "memory": "activations kept [bytes]",
                "memory_over_bp": "over bp",
            },
            totals,
        )
    )
    return 0


if __name__ == "__main__":
    config = parse(AccountingConfig, "accounting", __doc__ or "")
    run(lambda: accounting(config))
