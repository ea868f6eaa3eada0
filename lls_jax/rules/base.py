"""What a rule is: all that the rest of the library asks of one."""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, TypeVar

import jax

from lls_jax.rules.checks import check_labels
from lls_jax.rules.surroundings import Surroundings, Targets
from pallas_kernels.local_loss import mean_head_loss, pool_latents

Params = dict[str, Any]
Self = TypeVar("Self", bound="HeadRule")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What all rules have in common, the baselines too. Immutable and hashable.

    A rule of your own is a frozen dataclass that derives from :class:`LocalRule` or
    :class:`HeadRule`; its fields are its options.
    """

    @property
    def name(self) -> str:
        """What logs and run folders call it."""
        return type(self).__name__.lower()

    @property
    def fixed(self) -> frozenset[str]:
        """Names of those parameters that no optimizer may touch; a class attribute will do."""
        return frozenset()

    @property
    def classes(self) -> int | None:
        """The classes that a model must have: its field `num_classes`; None: any number."""
        return vars(self).get("num_classes")

    def init(self, key: jax.Array, activation_shape: tuple[int, ...], pool_size: int) -> Params:
        """The rule's parameters at a block, learned and fixed; ``{}`` where it has none.

        Args:
            key: random key.
            activation_shape: of one example: ``(height, width, channels)``, ``(length, channels)``
                or ``(features,)``.
            pool_size: bins along each spatial axis, or along the features.
        """
        del key, activation_shape, pool_size
        return {}

    def at_block(self, index: int, num_blocks: int | None = None) -> "Rule":
        """The rule of one block.

        Args:
            index: of the block, from 0.
            num_blocks: how many there are; None where it is known to fit.

        Raises:
            ValueError: the rule is made for another number of blocks.
        """
        del index, num_blocks
        return self

    def in_network(self, surroundings: Surroundings) -> "Rule":
        """The rule as it is initialised in a network: where a rule may ask what stands around it.

        A :class:`lls_jax.models.Network` calls this, after :meth:`at_block`, for :meth:`init`
        alone; the loss gets what it needs of it by the parameters. Most rules have no use for it.

        Args:
            surroundings: designs, and nothing that is learned elsewhere.
        """
        del surroundings
        return self

    @property
    def interprets(self) -> bool:
        """Whether a kernel of it is interpreted, and runs anywhere."""
        return False

    def with_implementation(self, name: str) -> "Rule":
        """The same rule with its losses computed so, where it has a head.

        Args:
            name: of :data:`pallas_kernels.local_loss.IMPLEMENTATIONS`.
        """
        del name
        return self

    def on_mesh(self, mesh: jax.sharding.Mesh) -> "Rule":
        """The same rule for batches that are sharded; the compiler cannot cut a kernel itself.

        Args:
            mesh: of one axis, over which a batch is sharded.
        """
        del mesh
        return self


@dataclasses.dataclass(frozen=True)
class LocalRule(Rule):
    """What a block learns from by itself: a loss of its own activation.

    Attributes:
        sees: ``"activation"``: the loss is given what the block makes, and pools it itself if it
            wants to. ``"latents"``: it is given the pooled activation, flattened; the caller pools,
            in the pass over the activation that normalises it, where the block offers that.
        needs_image: whether the loss is given the network's input too: its `labels` are then
            :class:`lls_jax.rules.LabeledImages`, which travel with the activation from block to
            block.
        compares_examples: whether the loss of an example by itself says nothing of its class, as
            it compares examples, or normalises by them: its head's accuracy is not measured.
    """

    sees: ClassVar[Literal["latents", "activation"]] = "activation"
    needs_image: ClassVar[bool] = False
    compares_examples: ClassVar[bool] = False

    def loss(
        self, params: Params, seen: jax.Array, labels: Any, *, pool_size: int | None
    ) -> jax.Array:
        """The block's loss, a float32 scalar: the mean over the batch.

        Args:
            params: from :meth:`init`.
            seen: the activation, ``[batch, height, width, channels]``, ``[batch, length,
                channels]`` or ``[batch, features]``; or, where `pool_size` is None and the rule
                sees latents, the latents, float32 ``[batch, latents]``.
            labels: integers ``[batch]``.
            pool_size: bins along each spatial axis, or along the features; None for latents.

        Raises:
            ValueError: a label is no class of a rule that is made for some number of them
                (:func:`lls_jax.rules.checks.check_labels`).
        """
        raise NotImplementedError

    def observe(self, activation: jax.Array, pool_size: int | None) -> jax.Array:
        """What the rule sees of an activation: its latents, or the activation itself.

        Args:
            activation: ``[batch, ...]``; latents already where `pool_size` is None.
            pool_size: bins along each spatial axis, or along the features.
        """
        if self.sees == "activation" or pool_size is None:
            return activation
        return pool_latents(activation, pool_size)

    def block_loss(
        self,
        params: Params,
        activation: jax.Array,
        labels: Targets,
        *,
        pool_size: int,
        pooled: jax.Array | None = None,
    ) -> jax.Array:
        """:meth:`loss` as a block calls it, whatever the rule sees.

        Args:
            params: from :meth:`init`.
            activation: what the block makes.
            labels: integers ``[batch]``; with the images where the rule needs them.
            pool_size: the block's.
            pooled: the means over the activation's windows, ``[batch, p, p, channels]``, where the
                block has them already.
        """
        if self.sees == "activation":
            return self.loss(params, activation, labels, pool_size=pool_size)
        latents = self.observe(activation if pooled is None else pooled, pool_size)
        return self.loss(params, latents, labels, pool_size=None)


@dataclasses.dataclass(frozen=True)
class HeadRule(LocalRule):
    """A projection of the latents and a head: a function of one example's scores.

    With ``z`` the latents of an example and ``W`` the projection::

        s = W z,    q = |z|^2,    loss = mean over the batch of head(s, q, params, label)

    Normalisation, modulation, temperature and the cross-entropy are all in the head: with unit
    latents the scores are ``s / sqrt(q)``. Any such rule has the GPU kernels of
    :func:`pallas_kernels.local_loss.mean_head_loss`, with its head inside.

    Attributes:
        implementation: of :func:`pallas_kernels.local_loss.mean_head_loss`; None chooses.
        interpret: whether to interpret the kernel: on any device, slowly, to try a rule out.
        mesh: of one axis, over which the batch is sharded; None where it is on one device.
    """

    sees: ClassVar[Literal["latents", "activation"]] = "latents"
    implementation: str | None = dataclasses.field(default=None, kw_only=True)
    interpret: bool = dataclasses.field(default=False, kw_only=True)
    mesh: jax.sharding.Mesh | None = dataclasses.field(default=None, kw_only=True, repr=False)

    def projection(self, params: Params, latent_dim: int) -> jax.Array:
        """``W``, float32 ``[rows, latents]``; a constant, or from the parameters.

        Args:
            params: from :meth:`init`.
            latent_dim: number of latents.
        """
        raise NotImplementedError

    def head(
        self, scores: jax.Array, square: jax.Array, params: Params, label: jax.Array
    ) -> jax.Array:
        """The loss of one example, a scalar.

        Args:
            scores: ``s``, float32 ``[rows]``.
            square: ``q``, a float32 scalar.
            params: from :meth:`init`.
            label: an integer scalar.
        """
        raise NotImplementedError

    def loss(
        self, params: Params, seen: jax.Array, labels: jax.Array, *, pool_size: int | None = None
    ) -> jax.Array:
        """The mean of :meth:`head` over the batch; see :meth:`LocalRule.loss`."""
        check_labels(labels, self.classes)
        latents = self.observe(seen, pool_size)
        return mean_head_loss(
            latents, self.projection(params, latents.shape[1]), labels, self.head, params,
            implementation=self.implementation, interpret=self.interpret, mesh=self.mesh,
        )  # fmt: skip

    def interpreted(self: Self) -> Self:
        """The same rule with its kernel interpreted: on any device, slowly."""
        return dataclasses.replace(self, interpret=True)

    @property
    def interprets(self) -> bool:
        """See :attr:`Rule.interprets`."""
        return self.interpret

    def with_implementation(self: Self, name: str) -> Self:
        """See :meth:`Rule.with_implementation`."""
        return dataclasses.replace(self, implementation=name)

    def on_mesh(self: Self, mesh: jax.sharding.Mesh) -> Self:
        """See :meth:`Rule.on_mesh`."""
        return dataclasses.replace(self, mesh=mesh)


@dataclasses.dataclass(frozen=True)
class PerBlock(Rule):
    """A rule for each block.

    Attributes:
        rules: one local rule a block, in order.
    """

    rules: tuple[LocalRule, ...]

    def __post_init__(self) -> None:
        """Raise ValueError for a rule without local losses."""
        object.__setattr__(self, "rules", tuple(self.rules))
        for index, rule in enumerate(self.rules):
            if not isinstance(rule, LocalRule):
                raise ValueError(f"`rules` has {rule!r} at {index}; give a LocalRule a block.")

    @property
    def name(self) -> str:
        """The rules' names, joined by commas."""
        return ",".join(rule.name for rule in self.rules)

    def at_block(self, index: int, num_blocks: int | None = None) -> Rule:
        """The rule of one block; see :meth:`Rule.at_block`."""
        check_count("rules, one a block,", len(self.rules), num_blocks)
        return self.rules[index].at_block(index, num_blocks)

    @property
    def interprets(self) -> bool:
        """Whether every kernel is interpreted."""
        return all(rule.interprets for rule in self.rules)

    def with_implementation(self, name: str) -> Rule:
        """Each rule so."""
        rules = tuple(rule.with_implementation(name) for rule in self.rules)
        return PerBlock(rules)  # type: ignore[arg-type]

    def on_mesh(self, mesh: jax.sharding.Mesh) -> Rule:
        """Each rule for batches that are sharded."""
        return PerBlock(tuple(rule.on_mesh(mesh) for rule in self.rules))  # type: ignore[misc]


def check_options(num_classes: int, temperature: float = 1.0, label_smoothing: float = 0.0) -> None:
    """Raise ValueError, naming option and value, for what no rule could use."""
    if num_classes < 2:
        raise ValueError(f"`num_classes` is {num_classes}; it must be at least 2.")
    if not temperature > 0:
        raise ValueError(f"`temperature` is {temperature}; it must be positive.")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"`label_smoothing` is {label_smoothing}; it must lie in [0, 1).")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise ValueError, naming the option, for a value that is none of its choices."""
    if value not in tuple(choices):
        raise ValueError(f"`{name}` is {value!r}; expected one of {', '.join(choices)}.")


def check_classes(rules: Iterable[Rule], num_classes: int) -> None:
    """Raise ValueError for the first rule that is made for other classes than a model has."""
    for rule in rules:
        if rule.classes not in (None, num_classes):
            raise ValueError(
                f"rule {rule.name!r} is made for {rule.classes} classes, and the model for "
                f"{num_classes}; give both one `num_classes`."
            )


def check_count(what: str, count: int, num_blocks: int | None) -> None:
    """Raise ValueError where something that is given for each block is not there for each."""
    if num_blocks is not None and count != num_blocks:
        raise ValueError(
            f"{count} {what} for {num_blocks} blocks; give one for all, or {num_blocks} of them."
        )


def has_local_losses(rule: Rule) -> bool:
    """Whether blocks learn from losses of their own; not so with ``bp``, ``dfa`` and ``drtp``."""
    return isinstance(rule, LocalRule | PerBlock)


def split_fixed(rule: Rule, params: Params) -> tuple[Params, Params]:
    """A rule's parameters in two: those that an optimizer trains, and those that stay.

    In a training loop of your own, give an optimizer the first alone, and the rule's loss both
    together: ``{**trained, **fixed}``.

    Args:
        rule: the rule.
        params: from its ``init``.

    >>> from lls_jax import rules
    >>> rule = rules.make("lls_m_random", num_classes=3)
    >>> params = rule.init(jax.random.key(0), (8,), pool_size=8)
    >>> trained, fixed = split_fixed(rule, params)
    >>> list(trained), list(fixed)
    (['modulation'], ['feedback'])
    """
    fixed = {name: value for name, value in params.items() if name in rule.fixed}
    return {name: value for name, value in params.items() if name not in fixed}, fixed
