"""Count what each rule costs on a model: parameters, multiply-accumulates, activation memory.

Counts are for one image; nothing is run. "signal" is what a block learns from: its local loss and
that loss's gradient, or backpropagation's gradient to its activation.
"""

import dataclasses
import json

from simple_parsing import field, flag

from experiments.command_line import parse, run
from experiments.config import TrainConfig
from lls_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class AccountingConfig:
    """Count a model's costs under several rules."""

    model: str = "small_conv"
    """Network."""
    dataset: str = "cifar10"
    """Data set, for the size of its images and the number of classes."""
    rules: list[str] = field(
        default_factory=lambda: [
            *("lls", "lls_m", "lls_mxm", "lls_mxm_reduced", "lls_random", "local_classifier"),
            *("predsim", "contrastive", "decoupled", "dfa", "drtp", "bp"),
        ]
    )
    """Rules to count; bp and local_classifier are added for the ratios."""
    data_dir: str | None = None
    """Folder of prepared data sets [default: $TFDS_DATA_DIR or ~/tensorflow_datasets]."""
    json: bool = flag(default=False, negative_prefix="--no-")
    """Print JSON."""


def accounting(config: AccountingConfig) -> int:
    """Count and print; returns the exit status."""
    from experiments.setup import make_task
    from experiments.suites.report import markdown
    from lls_jax.accounting import account

    names = [*dict.fromkeys([*config.rules, "local_classifier", "bp"])]
    accounts = {}
    for name in names:
        task = make_task(
            TrainConfig(
                rule=name, model=config.model, dataset=config.dataset, data_dir=config.data_dir
            )
        )
        try:
            accounts[name] = account(task.model, task.rule, task.spec.input_shape)
        except ValueError as error:
            raise UserError(str(error)) from error
    bp, classifier = accounts["bp"], accounts["local_classifier"]
    totals = [
        {
            "rule": name,
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
        for name, one in accounts.items()
    ]
    blocks = [
        {"rule": name, **cost._asdict()} for name, one in accounts.items() for cost in one.blocks
    ]
    if config.json:
        print(json.dumps({"totals": totals, "blocks": blocks}, indent=2))
        return 0
    counts = {"forward": "MACs forward", "weight_gradient": "to weights", "signal": "signal"}
    print(f"{config.model} on {config.dataset}, one image\n")
    print(
        markdown(
            {
                "rule": "rule",
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
