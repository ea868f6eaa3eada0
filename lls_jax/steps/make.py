"""The compiled step of a rule, and prediction."""

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

import jax
from flax.errors import ScopeParamShapeError

from lls_jax.models import Network
from lls_jax.rules import Backpropagation, DirectFeedback, Rule, has_local_losses
from lls_jax.steps.averaging import check_averaged
from lls_jax.steps.backpropagation import backpropagation_step
from lls_jax.steps.feedback import feedback_step
from lls_jax.steps.local import local_step
from lls_jax.steps.reach import reach_step
from lls_jax.steps.reach_schedule import Reach, check_reach
from lls_jax.steps.slice_plan import Cuts, check_cuts
from lls_jax.steps.state import Optimizer, TrainState, TrainStep

# What asks for nothing: no output has more bytes than the largest number.
_ASKS_NOTHING = (None, sys.maxsize)


def _check_local(rule: Rule, **options: int | None) -> None:
    """Raise ValueError, naming it, for an option that asks for what local losses alone have."""
    if not isinstance(rule, Rule) or has_local_losses(rule):
        return
    for name, value in options.items():
        if value not in _ASKS_NOTHING:
            raise ValueError(
                f"`{name}` is {value}, but rule {rule.name!r} has no local losses, which it is "
                "for; leave it out, or use a local rule."
            )


def make_train_step(
    model: Network,
    rule: Rule,
    tx: Optimizer,
    *,
    reach: Reach = 1,
    remat_above: int | None = None,
    slice_above: int | None = None,
    in_order: bool = True,
    donate: bool = True,
) -> TrainStep:
    """The jit-compiled update of a whole network.

    With a local rule it walks block by block: the gradient of the block's own loss with respect to
    the block's own parameters, their update, then the next block, on the activation computed
    before that update. No gradient toward a block's input is computed unless `reach` asks for it.
    With ``bp`` one gradient of the classifier's loss updates everything; with ``dfa`` and ``drtp``
    every block gets a random projection of the output's error or of the target.

    Args:
        model: from :func:`lls_jax.models.make`.
        rule: from :func:`lls_jax.rules.make`, or your own.
        tx: what the state was created with: an optax transformation, or one a block.
        reach: how many blocks a local loss teaches: its own, and ``reach - 1`` below it, for which
            the gradient goes on down so far. The classifier counts as the block after the last.
            Any number from the blocks and the classifier on is all of them. Or a number for the
            loss of each block, and at last the classifier's, which is the last block's where both
            are in one group. Local rules only (:mod:`lls_jax.steps.reach`).
        remat_above: bytes; a convolution whose output takes more is computed again, in slices of
            the batch, instead of keeping it (:mod:`lls_jax.steps.sliced`). None keeps every one
            but, with a `reach` of 2 or more or in a group of blocks, and no `slice_above`, that of
            an image's own convolution, which on CPUs is cheap to compute again. Local rules only.
        slice_above: bytes; the gradients of a convolution whose output takes more are computed in
            slices of the batch. The output itself is kept, and nothing is convolved twice
            (:mod:`lls_jax.steps.sliced`). None for 2 MiB on CPUs, in about eight slices at most,
            which are no slower, and for never elsewhere. Not of what is computed again
            (`remat_above`). Local rules only.
        in_order: whether a local block waits for the gradient of the block below, so that its
            memory is free. Without, sums of gradients over devices may go on meanwhile. Other
            rules have no such order.
        donate: whether the step takes the memory of the state that it is given, which is of no use
            afterwards. False where you want to go back to it, as in a notebook.

    Returns:
        ``step(state, batch) -> (state, metrics)``. `batch` has ``image``, normalised
        ``[batch, height, width, channels]``, and ``label``, integers ``[batch]``. `metrics` has
        ``layer_loss`` ``[local blocks]`` (none for baselines), ``loss``, the classifier's, and
        ``logits`` ``[batch, classes]``.

    Raises:
        ValueError: `reach` is no number of blocks, or not one a loss; `remat_above` or
            `slice_above` is below 1, or both are given; or one of the options is given that only
            local losses have a use for.

    >>> import jax.numpy as jnp, optax
    >>> from lls_jax import models, rules
    >>> from lls_jax.training import create_train_state
    >>> model = models.make("small_conv", num_classes=10)
    >>> rule, tx = rules.make("lls", num_classes=10), optax.sgd(0.1)
    >>> images, labels = jnp.ones((4, 8, 8, 3)), jnp.arange(4)
    >>> state = create_train_state(model, rule, tx, jax.random.key(0), images)
    >>> state, metrics = make_train_step(model, rule, tx)(state, {"image": images, "label": labels})
    >>> int(state.step), metrics["layer_loss"].shape
    (1, (4,))
    """
    reach = check_reach(model, rule, reach)
    cuts = Cuts(remat_above, slice_above)
    check_cuts(cuts)
    _check_local(rule, **cuts._asdict())
    step: Any = local_step if reach == 1 else functools.partial(reach_step, reach=reach)
    step = functools.partial(step, cuts=cuts, in_order=in_order)
    if isinstance(rule, Backpropagation):
        step = backpropagation_step
    elif isinstance(rule, DirectFeedback):
        step = feedback_step
    return jax.jit(functools.partial(step, model, rule, tx), donate_argnums=0 if donate else ())


@functools.partial(jax.jit, static_argnums=0)
def _predict(model: Network, params: Any, batch_stats: Any, image: jax.Array) -> jax.Array:
    return model.apply(params, batch_stats, image)[0]


@contextlib.contextmanager
def checked(model: Network, state: TrainState, shape: tuple[int, ...]) -> Iterator[None]:
    """Where a state is asked about images: ValueError for those, or weights, that give no answer.

    Args:
        model: the state's model.
        state: the state.
        shape: of a batch of images.
    """
    model.check_image(shape)
    check_averaged(state)
    try:
        yield
    except ScopeParamShapeError as error:
        # Its first sentence; the others are about Flax.
        raise ValueError(
            f"images of shape {tuple(shape[1:])} do not fit the weights of model {model.name!r} "
            f"({str(error).split('. ')[0]}); give such as it was trained on."
        ) from error


def predict(model: Network, state: TrainState, image: jax.Array) -> jax.Array:
    """Logits in evaluation mode, from the state's own weights and running statistics.

    Args:
        model: the state's model.
        state: a state from before training, one whose optimizer averages no weights, or what
            :func:`lls_jax.evaluation.evaluation_state` gives.
        image: normalised, ``[batch, height, width, channels]``.

    Returns:
        float32 ``[batch, classes]``.

    Raises:
        ValueError: the image does not fit, or the state is one that is being trained by a
            schedule-free optimizer: its weights are those at which gradients are taken, with which
            every answer would be wrong.
    """
    with checked(model, state, image.shape):
        return _predict(model, state.params, state.batch_stats, image)
