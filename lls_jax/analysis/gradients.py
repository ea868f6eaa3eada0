"""The gradients that a rule gives to each block, beside backpropagation's."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lls_jax.models import Network
from lls_jax.rules import Backpropagation, Rule
from lls_jax.training import Batch, Reach, TrainState, make_train_step

Gradients = dict[str, Any]
MakeGradients = Callable[[TrainState, Batch], Gradients]

# An optimizer that changes nothing, and whose state is the gradient that it was given.
_KEEP = optax.GradientTransformation(
    lambda params: (),
    lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
)


def make_gradients(model: Network, rule: Rule, *, reach: Reach = 1) -> MakeGradients:
    """A compiled function that gives what a training step gives to the optimizers.

    It is the training step itself that is run, of any rule, ``bp`` included, with an optimizer that
    keeps the gradient and leaves the parameters alone.

    Args:
        model: the network.
        rule: any rule.
        reach: as of :func:`lls_jax.training.make_train_step`.

    Returns:
        ``gradients(state, batch) -> {name: gradients}``, of each block ``{"block": ..., "rule":
        ...}``, the latter where its rule learns, and of ``"classifier"``. State and batch are as
        of :func:`lls_jax.training.make_train_step`; the state's optimizer does not matter, and a
        schedule-free one's gradients are those at the weights where it takes them.

    Raises:
        ValueError: `reach` is no number of blocks, or not one a loss, or the rule has no losses
            that could reach.

    >>> import optax
    >>> from lls_jax import models, rules, training
    >>> model, rule = models.make("small_conv", num_classes=3), rules.make("lls", num_classes=3)
    >>> batch = {"image": jnp.ones((4, 8, 8, 3)), "label": jnp.array([0, 1, 2, 0])}
    >>> key = jax.random.key(0)
    >>> state = training.create_train_state(model, rule, optax.sgd(0.1), key, batch["image"])
    >>> make_gradients(model, rule)(state, batch)["block_0"]["block"]["conv"]["kernel"].shape
    (3, 3, 3, 32)
    """
    step = make_train_step(model, rule, _KEEP, reach=reach, donate=False)
    is_one = isinstance(rule, Backpropagation)

    def gradients(state: TrainState, batch: Batch) -> Gradients:
        params = state.params
        if is_one:
            # A local rule's own parameters are none of backpropagation's.
            params = {
                name: {"block": own["block"]} if name in model.block_names else own
                for name, own in params.items()
            }
        opt_state = () if is_one else dict.fromkeys(params, ())
        new, _ = step(state._replace(params=params, opt_state=opt_state), batch)
        return new.opt_state

    return gradients


def _flat(tree: Any) -> jax.Array:
    leaves = [leaf.astype(jnp.float32).ravel() for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate([jnp.zeros(0), *leaves])


@jax.jit
def _compare(ours: Gradients, theirs: Gradients) -> jax.Array:
    """Norm of each block's gradient, the norm of its counterpart, and their cosine."""

    def one(a: Any, b: Any) -> jax.Array:
        a, b = _flat(a["block"]), _flat(b["block"])
        norms = jnp.linalg.norm(a), jnp.linalg.norm(b)
        # Each by its own norm first: their product may be too small for a float.
        unit_a, unit_b = a / norms[0], b / norms[1]
        return jnp.stack([*norms, jnp.vdot(unit_a, unit_b, precision="highest")])

    return jnp.stack([one(ours[name], theirs[name]) for name in ours])


class GradientComparison(NamedTuple):
    """A rule's gradients beside backpropagation's, of the blocks' own parameters.

    Attributes:
        cosine: of each block, ``[blocks]``, float64, the mean over batches; NaN where a gradient is
            zero.
        norm: of the rule's gradients, likewise.
        bp_norm: of backpropagation's, likewise.
    """

    cosine: np.ndarray
    norm: np.ndarray
    bp_norm: np.ndarray


def gradient_norms(gradients: Gradients) -> dict[str, float]:
    """The L2 norm of all that each block, or the classifier, is given.

    Args:
        gradients: from the function that :func:`make_gradients` makes.
    """
    return {name: float(jnp.linalg.norm(_flat(own))) for name, own in gradients.items()}


def compare_gradients(
    model: Network,
    ours: MakeGradients,
    theirs: MakeGradients,
    state: TrainState,
    batches: Iterable[Batch],
) -> GradientComparison:
    """Cosine and norms of two ways to make gradients, the mean over some batches::

        cosine = <g, g_bp> / (|g| |g_bp|)

    with a block's own parameters, all of them in one vector; its rule's are left out.

    Args:
        model: the network.
        ours: of the rule, from :func:`make_gradients`.
        theirs: of ``bp``, likewise.
        state: the state at which both are taken.
        batches: training batches, each with the same dropout.

    Raises:
        ValueError: there is no batch.
    """
    values = []
    for batch in batches:
        pairs = ours(state, batch), theirs(state, batch)
        kept = ({name: g[name] for name in model.block_names} for g in pairs)
        values.append(np.asarray(_compare(*kept), np.float64))
    if not values:
        raise ValueError("`batches` has no batch; give one or more.")
    norm, bp_norm, cosine = np.mean(values, axis=0).T
    return GradientComparison(cosine, norm, bp_norm)
