"""The published optimizer, schedule-free AdamW, as the runs of LLS were made with it; and Muon."""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def _check(what: str, value: Any, is_right: Callable[[Any], Any], must: str) -> None:
    """Raise ValueError for a value out of its range; what is being traced has none yet."""
    if not isinstance(value, jax.core.Tracer) and not is_right(value):
        raise ValueError(f"{what} is {value}; it must {must}.")


def schedule_free_adamw(
    learning_rate: optax.ScalarOrSchedule = 5e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Schedule-free AdamW, exactly as its authors' own implementation computes it.

    Gradients ``g`` are taken at ``y``, the parameters. In step k = 1, 2, ...::

        lr_k = learning_rate * sqrt(1 - b2^k)
        v    = b2 v + (1 - b2) g^2
        g'   = g / (sqrt(v) + eps) + weight_decay * y
        w_k  = (largest lr so far)^2,    c_k = w_k / (w_1 + ... + w_k)
        z    = z - lr_k g'
        y    = (1 - c_k) y + c_k z - lr_k (1 - c_k) (1 - b1) g'

    with the new `z` in the last line. The weights to evaluate are their average,
    ``x = y + (1 - 1 / b1) (z - y)``: :func:`lls_jax.evaluation.evaluation_state` finds it in a
    training state, ``optax.contrib.schedule_free_eval_params`` in this transformation's own state.

    ``optax.contrib.schedule_free_adamw`` is another algorithm: there the bias of `v` is corrected
    inside the gradient and not in the step size, so that the average weighs the first few
    thousand steps, which are far from good, like all others.

    Args:
        learning_rate: step size, or a function of the number of updates done that gives it.
        b1: share of the average in the point at which gradients are taken, in (0, 1).
        b2: decay of the mean of squared gradients, in [0, 1), a step.
        eps: added to the root of that mean.
        weight_decay: decoupled decay, times the step size a step; at least 0.

    Returns:
        An optax transformation, whose `update` needs the parameters. Its state takes as much memory
        as two copies of them.

    Raises:
        ValueError: a value is out of its range.

    References:
        Defazio, Yang, Mehta, Mishchenko, Khaled, Cutkosky, "The Road Less Scheduled",
        https://arxiv.org/abs/2405.15682, algorithm 1.

    >>> tx = schedule_free_adamw(learning_rate=0.1)
    >>> params = jnp.array([1.0, -1.0])
    >>> updates, state = tx.update(jnp.array([0.5, 2.0]), tx.init(params), params)
    >>> [f"{value:.3f}" for value in optax.apply_updates(params, updates)]
    ['0.900', '-1.100']
    """
    _check("`b1`", b1, lambda value: 0 < value < 1, "lie in (0, 1)")
    _check("`b2`", b2, lambda value: 0 <= value < 1, "lie in [0, 1)")
    _check("`weight_decay`", weight_decay, lambda value: value >= 0, "be at least 0")

    def init(params: optax.Params) -> optax.contrib.ScheduleFreeState:
        return optax.contrib.ScheduleFreeState(
            b1=jnp.float32(b1),
            weight_sum=jnp.float32(0.0),
            step_count=jnp.int32(1),
            max_lr=jnp.float32(0.0),
            base_optimizer_state=jax.tree.map(jnp.zeros_like, params),
            # A copy, so that a step may donate both.
            z=jax.tree.map(jnp.copy, params),
        )

    def bias_correction(step: jax.Array) -> jax.Array:
        # An array where `optax.inject_hyperparams` gives it; of a number in float64.
        if isinstance(b2, jax.Array):
            log_b2 = jnp.log(b2.astype(jnp.float32))
        elif not b2:
            return jnp.float32(1.0)
        else:
            log_b2 = math.log(b2)
        # 1 - b2^k loses half its digits in float32 where b2 is near 1; this loses none.
        return jnp.sqrt(-jnp.expm1(step.astype(jnp.float32) * log_b2))

    def update(
        grads: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.contrib.ScheduleFreeState]:
        if params is None:
            raise ValueError("`params` is None; schedule_free_adamw needs the parameters.")
        rate = learning_rate(state.step_count - 1) if callable(learning_rate) else learning_rate
        rate = jnp.asarray(rate, jnp.float32) * bias_correction(state.step_count)
        max_lr = jnp.maximum(state.max_lr, rate)
        weight = jnp.square(max_lr)
        weight_sum = state.weight_sum + weight
        # Without a single positive rate so far nothing has moved, and there is nothing to average.
        share = jnp.where(weight_sum > 0, weight / jnp.where(weight_sum > 0, weight_sum, 1.0), 0.0)
        slope = rate * (1.0 - share) * (b1 - 1.0)

        def mean_square(g: jax.Array, v: jax.Array) -> jax.Array:
            return b2 * v + (1.0 - b2) * jnp.square(g)

        def direction(g: jax.Array, v: jax.Array, y: jax.Array) -> jax.Array:
            return g / (jnp.sqrt(v) + eps) + weight_decay * y

        v = jax.tree.map(mean_square, grads, state.base_optimizer_state)
        directions = jax.tree.map(direction, grads, v, params)
        # The authors' code makes `y` of the `z` before the step, to the same result. On CPUs XLA
        # updates donated arrays in place in this order, and in theirs copies both y and z.
        z = jax.tree.map(lambda d, z: z - rate.astype(z.dtype) * d, directions, state.z)
        updates = jax.tree.map(
            lambda d, y, z: share.astype(y.dtype) * (z - y) + slope.astype(y.dtype) * d,
            *(directions, params, z),
        )
        return updates, optax.contrib.ScheduleFreeState(
            b1=state.b1,
            weight_sum=weight_sum,
            step_count=optax.safe_increment(state.step_count),
            max_lr=max_lr,
            base_optimizer_state=v,
            z=z,
        )

    return optax.GradientTransformation(init, update)


# Of the quintic iteration, and how often it is applied: that of the CIFAR-10 speed-runs.
_MUON_COEFFICIENTS = (3.4445, -4.775, 2.0315)
_MUON_STEPS = 3


def _as_matrices(updates: optax.Updates) -> Any:
    """How each kernel is a matrix: all axes but the last one, its inputs, by its outputs."""

    def numbers(leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers:
        return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree.map(numbers, updates)


def _to_unit_deviation(params: optax.Params) -> Any:
    """What takes each kernel to the norm ``sqrt(outputs)``."""

    def change(w: jax.Array) -> jax.Array:
        norm = jnp.sqrt(jnp.sum(jnp.square(w)))
        return w * (math.sqrt(w.shape[-1]) / jnp.maximum(norm, 1e-12) - 1.0)

    return jax.tree.map(change, params)


def muon_for_kernels(
    learning_rate: optax.ScalarOrSchedule = 0.24, momentum: float = 0.6
) -> optax.GradientTransformation:
    """Muon as the CIFAR-10 speed-runs have it, for trees of kernels alone.

    Of a kernel ``W``, as a matrix of inputs by outputs, with gradient ``G``::

        B = momentum B + G
        W = W sqrt(outputs) / |W| - learning_rate orthogonal(G + momentum B)

    where `orthogonal` divides by the Frobenius norm and brings the singular values near 1 by three
    steps of ``X <- 3.4445 X - 4.775 (X X^T) X + 2.0315 (X X^T)^2 X``. As both terms have sizes
    of their own, neither the gradient's scale nor the kernel's counts; so it is for kernels that
    a normalisation follows.

    The orthogonalisation is :func:`optax.contrib.scale_by_muon`'s, in float32; the speed-runs'
    is in bfloat16. Optax corrects the bias of its momentum, so that in the first steps the
    gradient weighs a little more against the momentum than in the formula.

    Args:
        learning_rate: step size, or a function of the number of updates done.
        momentum: in [0, 1).

    Returns:
        An optax transformation, whose `update` needs the parameters: arrays ``[..., inputs,
        outputs]`` of two axes or more.

    Raises:
        ValueError: the momentum is out of its range.

    References:
        Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
        https://kellerjordan.github.io/posts/muon/.
    """
    _check("`momentum`", momentum, lambda value: 0 <= value < 1, "lie in [0, 1)")
    direction = optax.chain(
        optax.contrib.scale_by_muon(
            _MUON_COEFFICIENTS,
            _MUON_STEPS,
            beta=momentum,
            weight_dimension_numbers=_as_matrices,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )

    def update(
        grads: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        if params is None:
            raise ValueError("`params` is None; muon_for_kernels needs the parameters.")
        updates, state = direction.update(grads, state, params)
        return jax.tree.map(jnp.add, updates, _to_unit_deviation(params)), state

    return optax.GradientTransformation(direction.init, update)


_NAME_OF: dict[type, Callable[[Any], Any]] = {
    jax.tree_util.DictKey: operator.attrgetter("key"),
    jax.tree_util.GetAttrKey: operator.attrgetter("name"),
    jax.tree_util.SequenceKey: operator.attrgetter("idx"),
    jax.tree_util.FlattenedIndexKey: operator.attrgetter("key"),
}


def _entry_name(entry: Any) -> Any:
    """What an entry of a tree's path is called; one of a type of somebody's own by its text."""
    return _NAME_OF.get(type(entry), str)(entry)


class NamedRate(NamedTuple):
    """How parameters of one name are trained.

    Attributes:
        learning_rate: at the full rate, positive.
        schedule: from the number of updates done to a factor of it; None for the others'.
    """

    learning_rate: float
    schedule: optax.Schedule | None = None


def muon(
    learning_rate: float = 0.24,
    momentum: float = 0.6,
    *,
    other_learning_rate: float = 0.01,
    weight_decay: float = 0.0,
    schedule: optax.Schedule | None = None,
    by_name: Mapping[str, NamedRate] | None = None,
) -> optax.GradientTransformation:
    """Muon for the kernels of a network's blocks, AdamW for everything else.

    Everything else is biases, what rules learn, and the classifier. A local loss's gradients have
    another scale than the classifier's: neither of the two asks for one.

    Args:
        learning_rate: of :func:`muon_for_kernels`, which the kernels get: what lies under
            ``"block"`` and has two axes or more, ``[..., inputs, outputs]`` as in a training
            state's parameters. That is Flax's layout; Equinox's and PyTorch's are others, of which
            inputs and outputs would be mistaken for each other.
        momentum: likewise; and AdamW's `b1`.
        other_learning_rate: AdamW's step size.
        weight_decay: the share of a parameter of AdamW's that a step takes off at the full rate,
            and less as the rate falls; at least 0. (Kernels are of one size always.)
        schedule: from the number of updates done to a factor of all rates; None for 1.
        by_name: other step sizes of AdamW, for parameters by their own names, which are neither
            ``"kernels"`` nor ``"other"``.

    Returns:
        An optax transformation, for a whole network's parameters or one block's.

    Raises:
        ValueError: a value is out of its range, or a name is none of a parameter.

    >>> params = {"block": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
    >>> state = muon(by_name={"bias": NamedRate(0.1)}).init(params)
    >>> sorted(state.inner_states)
    ['bias', 'kernels', 'other']
    """
    _check("`weight_decay`", weight_decay, lambda value: value >= 0, "be at least 0")

    def scaled(rate: float, own: optax.Schedule | None) -> optax.ScalarOrSchedule:
        factor = own or schedule
        return rate if factor is None else lambda count: rate * factor(count)

    for reserved, own in (("kernels", "learning_rate"), ("other", "other_learning_rate")):
        if reserved in (by_name or {}):
            raise ValueError(
                f"`by_name` has {reserved!r}, by which all parameters go that `{own}` is for; give "
                "that, or the parameter another name."
            )
    named = {"other": NamedRate(other_learning_rate), **(by_name or {})}
    optimizers = {"kernels": muon_for_kernels(scaled(learning_rate, None), momentum)}
    for name, (rate, own_schedule) in named.items():
        _check(f"the learning rate of {name!r}", rate, lambda value: value > 0, "be positive")
        optimizers[name] = optax.adamw(
            scaled(rate, own_schedule), b1=momentum, b2=0.99, weight_decay=weight_decay / rate
        )

    def kind(path: Any, leaf: jax.Array) -> str:
        # An array by itself has no path.
        *above, name = ("", *map(_entry_name, path))
        if name in named:
            return str(name)
        return "kernels" if leaf.ndim >= 2 and "block" in above else "other"

    return optax.partition(
        optimizers, lambda params: jax.tree_util.tree_map_with_path(kind, params)
    )
