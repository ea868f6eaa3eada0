"""What a rule is, and what the rest of the library asks of one."""

import dataclasses
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax

from lls_jax.rules.backpropagation import Backpropagation
from lls_jax.rules.classifier import ClassifierRule
from lls_jax.rules.feedback import FeedbackRule
from lls_jax.rules.periodic import PeriodicRule
from pallas_kernels.local_loss import latent_dim

Params = dict[str, Any]


@runtime_checkable
class LocalRule(Protocol):
    """What a block needs of a rule. Hashable and immutable: a frozen dataclass is the easy way.

    Beside these members it has ``init(key, latent_dim, hidden_dim=None)``, which draws the
    parameters that it learns with the block, ``{}`` where it has none. A rule that works on the
    activation itself, ``[height, width, channels]`` or ``[features]``, and not on the pooled
    latents, has ``init_for(key, activation_shape, pool_size=...)`` instead. And ``fixed``, which
    may be missing, is a frozenset of the names of those parameters that stay as they were drawn: no
    gradient, no decay. ``works_on_latents``, likewise, says that the loss needs the pooled
    activation only; then it may be given that, ``[batch, p, p, channels]``, which saves memory.
    ``pools_itself`` says that it had better not: its kernel pools while it reads.
    """

    @property
    def name(self) -> str:
        """What logs and checkpoints call it."""

    def loss(
        self, params: Params, activation: jax.Array, labels: jax.Array, *, pool_size: int
    ) -> jax.Array:
        """The block's loss, a scalar: the mean over the batch."""


@dataclasses.dataclass(frozen=True)
class PerBlock:
    """A rule for each block.

    Attributes:
        rules: one local rule a block, in order.
    """

    rules: tuple[LocalRule, ...]

    @property
    def name(self) -> str:
        """The rules' names, joined by commas."""
        return ",".join(rule.name for rule in self.rules)


Rule: TypeAlias = LocalRule | PerBlock | Backpropagation | FeedbackRule


def has_local_losses(rule: Rule) -> bool:
    """Whether blocks learn from losses of their own; not so with ``bp``, ``dfa`` and ``drtp``."""
    return not isinstance(rule, Backpropagation | FeedbackRule)


def for_block(rule: Rule, index: int, num_blocks: int | None = None) -> Any:
    """The rule of one block.

    Args:
        rule: any rule.
        index: of the block, from 0.
        num_blocks: how many there are; None where it is known to fit.

    Raises:
        ValueError: there are more or fewer rules than blocks.
    """
    if not isinstance(rule, PerBlock):
        return rule
    if num_blocks is not None and len(rule.rules) != num_blocks:
        raise ValueError(
            f"{len(rule.rules)} rules, one a block, for {num_blocks} blocks; give one rule, or "
            f"{num_blocks} of them."
        )
    return rule.rules[index]


def without_kernels(rule: Rule) -> Rule:
    """The same rule with its losses by XLA, in programs that the compiler cuts into parts.

    Raises:
        ValueError: the rule names a kernel, which cannot be cut.
    """
    if isinstance(rule, PerBlock):
        return PerBlock(tuple(without_kernels(one) for one in rule.rules))  # type: ignore[misc]
    if not isinstance(rule, ClassifierRule | PeriodicRule) or rule.implementation == "xla":
        return rule
    if rule.implementation is not None:
        raise ValueError(
            f"rule {rule.name!r} has the implementation {rule.implementation!r}, a kernel, which "
            "the compiler cannot cut; use 'xla' or None."
        )
    return dataclasses.replace(rule, implementation="xla")


def init_params(
    rule: Any,
    key: jax.Array,
    *,
    activation_shape: tuple[int, ...],
    pool_size: int,
    hidden_dim: int | None,
) -> Params:
    """A rule's parameters at a block.

    Args:
        rule: a local rule.
        key: random key.
        activation_shape: of one example, ``(height, width, channels)`` or ``(features,)``.
        pool_size: the block's.
        hidden_dim: the block's.
    """
    own: Any = rule
    if hasattr(own, "init_for"):
        return own.init_for(key, activation_shape, pool_size=pool_size)
    return own.init(key, latent_dim(activation_shape, pool_size), hidden_dim)


def split_fixed(rule: Any, params: Params) -> tuple[Params, Params]:
    """A block's parameters in two: those that are trained, and those of its rule that are not.

    Args:
        rule: the block's own rule.
        params: ``{"block": ..., "rule": ...}``, the latter where the rule has parameters.

    Returns:
        Two trees that :func:`merge_fixed` puts together again.
    """
    names: frozenset[str] = getattr(rule, "fixed", frozenset())
    own = params.get("rule", {})
    fixed = {name: value for name, value in own.items() if name in names}
    if not fixed:
        return params, {}
    trained = {name: value for name, value in own.items() if name not in names}
    rest = {name: value for name, value in params.items() if name != "rule"}
    return ({**rest, "rule": trained} if trained else rest), fixed


def merge_fixed(trained: Params, fixed: Params) -> Params:
    """The inverse of :func:`split_fixed`."""
    return {**trained, "rule": {**trained.get("rule", {}), **fixed}} if fixed else trained
