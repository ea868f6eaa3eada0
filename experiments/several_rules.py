"""Options that are asked of several rules at once, of which not all have a use for each."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from experiments.config import TrainConfig
from experiments.config_choices import OF_CUTS, OF_LOCAL_LOSSES, OF_RULES, option
from experiments.reach_options import TypedReach
from experiments.setup import as_user_error, sketch_task, useful_options, why_uncut
from lls_jax import rules
from lls_jax.errors import UserError


def has_local_losses(config: TrainConfig) -> bool:
    """Whether blocks learn from losses of their own; a user's own rule is made to see.

    Raises:
        UserError: an unknown name, or an option out of range.
    """
    with as_user_error():
        return rules.has_local_losses(sketch_task(config).rule)


def without_useless(config: TrainConfig) -> TrainConfig:
    """A config without the options that its rule, or its network, has no use for.

    For commands that ask several rules for what not all of them have.

    Raises:
        UserError: an unknown name, or an option out of range.
    """
    with as_user_error():
        useful = useful_options(config.rule.split(","))
        config = config.without(name for name, own in OF_RULES.items() if own not in useful)
        # A rule of a user's own says of no kernels that it has no use for them.
        plain = config.without([*OF_LOCAL_LOSSES, "kernels"])
        task = sketch_task(plain)
        if not rules.has_local_losses(task.rule):
            return plain
        return config if why_uncut(config, task) is None else config.without(OF_CUTS)


def of_rules(
    config: TrainConfig, names: Iterable[str], reaches: Iterable[TypedReach]
) -> list[TrainConfig]:
    """Each rule with each reach, each once: without local losses there is one of 1 alone.

    ``bp`` is without groups: blocks have no losses there that they could share.

    Args:
        config: what they have in common.
        names: of the rules.
        reaches: of their losses.

    Raises:
        UserError: an unknown name, or an option out of range.
    """
    made = (
        without_useless(
            dataclasses.replace(
                config, rule=rule, reach=reach, groups=None if rule == "bp" else config.groups
            )
        )
        for rule, reach in itertools.product(names, reaches)
    )
    return [*dict.fromkeys(made)]


def check_used(common: TrainConfig, runs: Sequence[TrainConfig]) -> None:
    """Raise UserError for an option that is given, and that no run has a use for.

    Args:
        common: what was asked of all.
        runs: what is left of it, see :func:`without_useless`.
    """
    plain = TrainConfig()
    for name in (*OF_RULES, *OF_CUTS, "groups"):
        value = getattr(common, name)
        if value != getattr(plain, name) and all(getattr(one, name) != value for one in runs):
            rules_of_runs = ", ".join(dict.fromkeys(one.rule for one in runs))
            raise UserError(
                f"{option(name)} {value} is of no use to any of --rules {rules_of_runs}; leave it "
                "out."
            )
