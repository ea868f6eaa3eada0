"""One block's own update, in any framework: its loss, its gradient, its optimizer.

Everything that trains locally here goes through :func:`local_update`: the step on one device, the
units of a pipeline, and the blocks of other frameworks. No Flax.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lls_jax.rules.base import LocalRule, Params, Rule, split_fixed
from lls_jax.rules.checks import is_class


class BlockState(NamedTuple):
    """What one block, or the classifier, learns with.

    Attributes:
        params: ``{"block": its parameters, "rule": its rule's}``, the latter where it has some;
            of the classifier its own.
        batch_stats: what it keeps beside them, like BatchNorm's statistics; ``{}`` for nothing.
        opt_state: its optimizer's.
    """

    params: Any
    batch_stats: Any
    opt_state: Any


class BlockOutput(NamedTuple):
    """What a block's function gives.

    Attributes:
        activation: what the rule sees, or pools; ``[batch, ...]``. None where `pooled` is all that
            the rule needs.
        batch_stats: the new ones; ``{}`` for none.
        passed_on: what the next block takes; None for the activation. No gradient flows through it.
        pooled: the means over the activation's windows, ``[batch, p, p, channels]``, where the
            block has them already.
    """

    activation: Any
    batch_stats: Any = {}  # noqa: RUF012
    passed_on: Any = None
    pooled: jax.Array | None = None


Apply = Callable[[Any, Any, jax.Array, jax.Array | None], BlockOutput]
LocalUpdate = Callable[..., tuple[BlockState, jax.Array, Any]]


def split_params(rule: Rule | None, params: Params) -> tuple[Params, Params]:
    """A block's parameters in two: those that are trained, and those of its rule that are not.

    Args:
        rule: the block's own rule; None for the classifier.
        params: ``{"block": ..., "rule": ...}``, the latter where the rule has parameters.

    Returns:
        Two trees that :func:`merge_params` puts together again.
    """
    if rule is None:
        return params, {}
    learned, fixed = split_fixed(rule, params.get("rule", {}))
    if not fixed:
        return params, {}
    rest = {name: value for name, value in params.items() if name != "rule"}
    return ({**rest, "rule": learned} if learned else rest), fixed


def merge_params(trained: Params, fixed: Params) -> Params:
    """The inverse of :func:`split_params`."""
    return {**trained, "rule": {**trained.get("rule", {}), **fixed}} if fixed else trained


def apply_gradients(
    tx: optax.GradientTransformation, opt_state: Any, trained: Any, grads: Any, loss: jax.Array
) -> tuple[Any, Any]:
    """New values of the trained parameters, and of the optimizer's state."""
    extra = optax.with_extra_args_support(tx)
    # Optax's own transformations mix dtypes (adam raises a float to an integer), which a program
    # that asks JAX for strict promotion need not do without.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = extra.update(grads, opt_state, trained, value=loss)
    return optax.apply_updates(trained, updates), opt_state


def start_block(
    rule: LocalRule,
    tx: optax.GradientTransformation,
    key: jax.Array,
    params: Any,
    activation_shape: tuple[int, ...],
    pool_size: int,
    batch_stats: Any = None,
) -> BlockState:
    """A block before its first :func:`local_update`.

    Args:
        rule: the block's local rule; its parameters are drawn here.
        tx: the block's optimizer.
        key: random key of the rule's parameters.
        params: the block's own parameters, a pytree of any framework.
        activation_shape: of one example.
        pool_size: bins along each spatial axis, or along the features.
        batch_stats: what the block keeps beside its parameters; None for nothing.
    """
    own = rule.init(key, activation_shape, pool_size)
    whole = {"block": params, "rule": own} if own else {"block": params}
    trained, _ = split_params(rule, whole)
    return BlockState(whole, {} if batch_stats is None else batch_stats, tx.init(trained))


def local_update(
    apply: Apply, rule: LocalRule, tx: optax.GradientTransformation, *, pool_size: int
) -> LocalUpdate:
    """The update of one block from its own loss, whatever framework the block is of.

    Args:
        apply: ``apply(params, batch_stats, x, key) -> BlockOutput``: the block's function, pure.
        rule: a local rule.
        tx: any optax transformation; it never sees what the rule keeps fixed.
        pool_size: bins along each spatial axis, or along the features, that the rule's latents
            have.

    Returns:
        ``update(state, x, labels, key=None) -> (state, loss, passed_on)``: one step of
        :class:`BlockState`. The input goes through ``stop_gradient``; what is passed on was
        computed before the update. Pure: to be compiled, alone or with others.

    >>> from lls_jax import rules
    >>> rule, tx = rules.make("lls_mxm", num_classes=3), optax.sgd(0.1)
    >>> def apply(weight, batch_stats, x, key):
    ...     return BlockOutput(jax.nn.relu(x @ weight))
    >>> state = start_block(rule, tx, jax.random.key(0), jnp.eye(8), (8,), pool_size=8)
    >>> update = jax.jit(local_update(apply, rule, tx, pool_size=8))
    >>> state, loss, x = update(state, jnp.ones((2, 8)), jnp.array([0, 1]))
    >>> x.shape, loss.shape
    ((2, 8), ())
    """

    def update(
        state: BlockState, x: jax.Array, labels: jax.Array, key: jax.Array | None = None
    ) -> tuple[BlockState, jax.Array, Any]:
        trained, fixed = split_params(rule, state.params)

        def block_loss(trained: Any) -> tuple[jax.Array, Any]:
            params = merge_params(trained, fixed)
            output = apply(params["block"], state.batch_stats, jax.lax.stop_gradient(x), key)
            loss = rule.block_loss(
                params.get("rule", {}),
                output.activation,
                labels,
                pool_size=pool_size,
                pooled=output.pooled,
            )
            passed_on = output.activation if output.passed_on is None else output.passed_on
            return loss, (passed_on, output.batch_stats)

        value_and_grad = jax.value_and_grad(block_loss, has_aux=True)
        (loss, (passed_on, batch_stats)), grads = value_and_grad(trained)
        trained, opt_state = apply_gradients(tx, state.opt_state, trained, grads, loss)
        return BlockState(merge_params(trained, fixed), batch_stats, opt_state), loss, passed_on

    return update


def classifier_loss(
    logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """Softmax cross-entropy, the mean over the batch; ``[batch, classes], [batch] -> []``.

    NaN if a label is no class.

    Args:
        logits: ``[batch, classes]``.
        labels: integers ``[batch]``.
        label_smoothing: share of the target spread evenly over the classes, in [0, 1).
    """
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if label_smoothing:
        # The mean over all classes of what each would cost.
        even = jax.nn.logsumexp(logits, axis=1) - jnp.mean(logits, axis=1)
        losses = (1.0 - label_smoothing) * losses + label_smoothing * even
    # Optax takes -1 for the last class.
    return jnp.mean(jnp.where(is_class(labels, logits.shape[1]), losses, jnp.nan))
