"""A block in a training step: forward, whole or in slices of the batch, and its way back.

A group of convolution and dense blocks is walked member by member, so that each of its convolutions
may be in slices too.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.tree_util import Partial

from lls_jax import blocks
from lls_jax.models import BlockSpec, Group
from lls_jax.rules import LocalRule
from lls_jax.steps import sliced
from lls_jax.steps.slice_plan import Cuts, plan_block, walks_members


class Outcome(NamedTuple):
    """What a block gives for a batch.

    Attributes:
        seen: its activation; where the block was in slices, what follows it but for dropout.
        pooled: the means over the activation's windows, where there are such.
        batch_stats: the new statistics.
        after: ``after(seen, dropout_key)`` gives the next block's input; a pytree.
    """

    seen: jax.Array
    pooled: jax.Array | None
    batch_stats: Any
    after: Callable[..., jax.Array]

    @property
    def activation(self) -> jax.Array | None:
        """What a rule is shown: one that is given means does not look at the activation.

        A block in slices always gives means to a rule: a rule that sees more has it whole.
        """
        return self.seen if self.pooled is None else None


# ``pull(d_seen, d_pooled, params=..., input=...)``, a pytree, gives the gradients with respect to a
# block's parameters and to its input, those that are asked for; a cotangent may be None, for zeros.
Pull = Callable[..., tuple[Any, Any]]


def run(
    spec: BlockSpec,
    rule: LocalRule | None,
    cuts: Cuts,
    params: Any,
    batch_stats: Any,
    x: jax.Array,
    key: jax.Array | None,
    *,
    from_above: bool = False,
    to_input: bool = True,
) -> tuple[Outcome, Pull]:
    """A block in training, and its way back.

    Args:
        spec: the block, and what follows it.
        rule: the block's own; None where it has no loss of its own.
        cuts: when the batch is cut.
        params: the block's own.
        batch_stats: the block's.
        x: its input, ``[batch, ...]``.
        key: random key of its dropout; None for none.
        from_above: whether gradients of what follows come back through it: else there is no way
            back from its activation where the rule is given means. With it an image's own
            convolution is computed again and not kept, where that is cheap.
        to_input: whether the gradient with respect to its input may be asked for: else the block
            need not be differentiable in it.

    Returns:
        What it gives, and its way back.
    """
    if isinstance(spec.module, Group) and walks_members(spec.module):
        return _run_members(spec, rule, cuts, params, batch_stats, x, key, from_above, to_input)
    plan = plan_block(spec, rule, x, cuts, from_above=from_above)
    if plan is None:
        return _run_whole(spec, rule, params, batch_stats, x, key, from_above, to_input)
    (seen, pooled), stats, pull = sliced.run_block(plan, params, batch_stats, x)
    return Outcome(seen, pooled, stats, Partial(spec.after_pooling)), pull


def _run_whole(
    spec: BlockSpec,
    rule: LocalRule | None,
    params: Any,
    stats: Any,
    x: jax.Array,
    key: jax.Array | None,
    from_above: bool,
    to_input: bool,
) -> tuple[Outcome, Pull]:
    """The batch at once, by automatic differentiation."""
    shows_means = rule is not None and rule.sees == "latents"

    def run_block(params: Any, x: jax.Array = x) -> Any:
        activation, pooled, new = blocks.run_block(
            spec.module,
            params,
            stats,
            x,
            pool_size=spec.pool_size if shows_means else None,
            rngs={} if key is None else {"dropout": key},
        )
        # Of means alone nothing comes back to the activation, and no gradient of its size is taken.
        learned_from = (activation, pooled) if from_above or pooled is None else (None, pooled)
        return learned_from, (activation, pooled, new)

    arguments = (params, x) if to_input else (params,)
    learned_from, pullback, outcome = jax.vjp(run_block, *arguments, has_aux=True)
    activation, pooled, new = outcome
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), learned_from)
    pull = Partial(functools.partial(_pull_whole, shapes), pullback)
    return Outcome(activation, pooled, new, Partial(spec.transition)), pull


def _pull_whole(
    shapes: tuple[Any, Any], pullback: Callable[..., Any], *cotangents: Any, **wanted: bool
) -> tuple[Any, Any]:
    """Both gradients; within one program the compiler leaves out what is not asked for."""
    d_params, *d_input = pullback(
        tuple(
            jnp.zeros(shape.shape, shape.dtype) if given is None and shape is not None else given
            for given, shape in zip(cotangents, shapes)
        )
    )
    return (d_params if wanted["params"] else None), (d_input[0] if wanted["input"] else None)


def _run_members(
    spec: BlockSpec,
    rule: LocalRule | None,
    cuts: Cuts,
    params: Any,
    stats: Any,
    x: jax.Array,
    key: jax.Array | None,
    from_above: bool,
    to_input: bool,
) -> tuple[Outcome, Pull]:
    group, names = spec.module, spec.module.member_names()
    rngs = {} if key is None else {"dropout": key}
    keys = group.apply({}, True, method="dropout_keys", rngs=rngs)

    def run_member(
        index: int, x: jax.Array, rule: LocalRule | None, from_above: bool
    ) -> tuple[Outcome, Pull]:
        member, own = group.specs[index], names[index]
        # No key: its dropout comes after it, and it has no other.
        return run(
            *(member, rule, cuts, params[own], stats.get(own, {}), x, None),
            from_above=from_above,
            to_input=to_input or index > 0,
        )

    links: list[tuple[Pull, Any]] = []
    new = {}
    for index, own_key in enumerate(keys):
        outcome, pull = run_member(index, x, None, from_above=True)
        after = functools.partial(outcome.after, dropout_key=own_key)
        x, pull_after = jax.vjp(after, outcome.seen)
        links.append((pull, pull_after))
        new[names[index]] = outcome.batch_stats
    outcome, pull = run_member(len(names) - 1, x, rule, from_above)
    links.append((pull, None))
    new[names[-1]] = outcome.batch_stats
    pull = Partial(functools.partial(_pull_members, names), tuple(links))
    return outcome._replace(batch_stats=new), pull


def _pull_members(
    names: tuple[str, ...],
    links: tuple[Any, ...],
    d_seen: jax.Array | None,
    d_pooled: jax.Array | None,
    *,
    params: bool,
    input: bool,
) -> tuple[Any, Any]:
    gradients, d_next = {}, None
    for name, (pull, pull_after) in reversed(list(zip(names, links))):
        if pull_after is not None:
            (d_seen,), d_pooled = pull_after(d_next), None
        wanted = input or name != names[0]
        gradients[name], d_next = pull(d_seen, d_pooled, params=params, input=wanted)
    return (gradients if params else None), d_next


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable(
    run_block: Callable[..., tuple[Outcome, Pull]],
    params: Any,
    batch_stats: Any,
    x: jax.Array,
    key: jax.Array | None,
) -> Outcome:
    """A block for automatic differentiation, in reverse, of what is seen and pooled.

    (Of what is seen only where :func:`run` is told that gradients come from above.)

    Args:
        run_block: ``run_block(params, batch_stats, x, key, to_input=...)``: :func:`run` of a block.
        params: the block's own.
        batch_stats: the block's.
        x: its input, ``[batch, ...]``.
        key: random key of its dropout; None for none.
    """
    return run_block(params, batch_stats, x, key, to_input=False)[0]


def _forward(run_block: Callable[..., tuple[Outcome, Pull]], *pairs: Any) -> tuple[Outcome, Any]:
    """With `symbolic_zeros` an array comes as its value, and whether it is perturbed."""
    values = jax.tree.map(lambda pair: pair.value, pairs, is_leaf=_is_pair)
    to_input = pairs[2].perturbed
    outcome, pull = run_block(*values, to_input=to_input)
    return outcome, Partial(functools.partial(_pull_for, to_input), pull)


def _is_pair(leaf: Any) -> bool:
    return isinstance(leaf, CustomVJPPrimal)


def _pull_for(input: bool, pull: Pull, *cotangents: Any) -> tuple[Any, Any]:
    return pull(*cotangents, params=True, input=input)


def _backward(run_block: Any, pull: Callable[..., Any], cotangents: Outcome) -> tuple:
    del run_block
    d_seen, d_pooled, *_ = cotangents
    d_params, d_input = pull(
        *(None if isinstance(one, SymbolicZero) else one for one in (d_seen, d_pooled))
    )
    return d_params, None, d_input, None


differentiable.defvjp(_forward, _backward, symbolic_zeros=True)
