"""How well each block's own loss tells the classes apart."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lls_jax.blocks import apply_module
from lls_jax.models import Network
from lls_jax.rules import LocalRule, Rule, has_local_losses


def head_losses(
    rule: LocalRule, params: Any, activation: jax.Array, num_classes: int, pool_size: int
) -> jax.Array:
    """The local loss of each example by itself, under each label that it might have.

    The class of the least one is what the block's head would answer: of a cross-entropy, the
    largest logit. A rule that compares examples with each other has no such answer
    (:attr:`lls_jax.rules.LocalRule.compares_examples`).

    Args:
        rule: a local rule.
        params: its parameters at the block.
        activation: ``[batch, ...]``.
        num_classes: number of classes.
        pool_size: the block's.

    Returns:
        float32 ``[batch, classes]``.
    """
    seen = rule.observe(activation, pool_size)
    size = None if rule.sees == "latents" else pool_size

    def loss(one: jax.Array, label: jax.Array) -> jax.Array:
        return rule.loss(params, one[None], label[None], pool_size=size)

    by_label = jax.vmap(loss, (None, 0))
    return jax.vmap(by_label, (0, None))(seen, jnp.arange(num_classes))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _answers(model: Network, rule: Rule, variables: Any, image: jax.Array) -> list[jax.Array]:
    """What each block's head answers, integers ``[batch]``; -1 for nothing."""
    x, answers = image.astype(model.dtype), []
    params = variables["params"]
    rows = list(zip(model.block_names, model.specs, model.block_rules(rule)))
    for name, spec, own_rule in rows[: len(rows) - model.classifier_in_last_group]:
        own, stats = params[name], variables["batch_stats"][name]["block"]
        activation, _ = apply_module(spec.module, own["block"], stats, x, train=False)
        if own_rule.compares_examples or own_rule.needs_image:
            answers.append(jnp.full(len(x), -1))
        else:
            losses = head_losses(
                own_rule, own.get("rule", {}), activation, model.num_classes, spec.pool_size
            )
            # Of a user's own rule, which may not say so.
            is_none = ~(losses.max(1) > losses.min(1))
            answers.append(jnp.where(is_none, -1, jnp.argmin(losses, 1)))
        x = spec.transition(activation, None)
    return answers


def head_accuracies(
    model: Network, rule: Rule, variables: Any, examples: Iterable[tuple[jax.Array, jax.Array]]
) -> list[float | None]:
    """Share of examples for which each block's own loss is least at the right class, in percent.

    Args:
        model: the network.
        rule: any rule.
        variables: ``{"params", "batch_stats"}``, the weights and statistics to evaluate.
        examples: ``(image, label)``, batches.

    Returns:
        One a block; None where it has no loss of its own, or one that answers nothing.

    Raises:
        ValueError: there are no examples.
    """
    blocks = len(model.specs)
    if not has_local_losses(rule):
        return [None] * blocks
    rule = rule.with_implementation("xla")
    right, answered, count = np.zeros(blocks), np.zeros(blocks), 0
    for image, label in examples:
        for index, answer in enumerate(_answers(model, rule, variables, image)):
            right[index] += np.sum(np.asarray(answer) == np.asarray(label))
            answered[index] += np.sum(np.asarray(answer) >= 0)
        count += len(label)
    if not count:
        raise ValueError("`examples` has none.")
    return [100 * float(r) / count if a else None for r, a in zip(right, answered)]
