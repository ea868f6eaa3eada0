"""How good weights are on a data set: loss, accuracies, confusion."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lls_jax.arguments import whole_number
from lls_jax.data import DatasetSpec, Split, batches
from lls_jax.data.arrays import describe, to_split
from lls_jax.models import Network
from lls_jax.runs.checks import check_examples, check_of_images
from lls_jax.runs.source import Arrays
from lls_jax.runs.views import check_views, mean_logits
from lls_jax.steps.make import checked
from lls_jax.training import TrainState


class Evaluation(NamedTuple):
    """How good weights are.

    Attributes:
        loss: mean cross-entropy of the classifier.
        accuracy: share of images whose best class is right, in percent.
        top5: share of images whose five best classes hold the right one, in percent; None where
            there are five classes or fewer.
        confusion: counts ``[true class, predicted class]``, without images with a NaN logit.
    """

    loss: float
    accuracy: float
    top5: float | None
    confusion: np.ndarray


def correct_within(logits: jax.Array, labels: jax.Array, best: int) -> jax.Array:
    """Whether the label is among the `best` largest logits; bool ``[batch]``.

    Of equal logits the first counts as the largest, as with ``argmax``. Where one is NaN the label
    is not among them.

    Args:
        logits: ``[batch, classes]``.
        labels: integers ``[batch]``.
        best: how many.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    before = jnp.arange(logits.shape[1])[None, :] < labels[:, None]
    ahead = (logits > own) | ((logits == own) & before)
    return (jnp.sum(ahead, axis=1) < best) & ~jnp.isnan(logits).any(axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _evaluate_batch(
    model: Network,
    views: str,
    variables: Any,
    image: jax.Array,
    label: jax.Array,
    weight: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def classify(image: jax.Array) -> jax.Array:
        return model.apply(variables["params"], variables["batch_stats"], image)[0]

    logits = mean_logits(classify, image, views)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    top5 = jnp.sum(weight * correct_within(logits, label, 5).astype(weight.dtype))
    confusion = jnp.zeros((model.num_classes, model.num_classes), jnp.int32)
    # Where a logit is NaN nothing is predicted.
    counted = jnp.where(jnp.isnan(logits).any(axis=1), 0, weight.astype(jnp.int32))
    confusion = confusion.at[label, jnp.argmax(logits, axis=1)].add(counted)
    return jnp.sum(weight * losses), top5, confusion


@functools.partial(jax.jit, static_argnums=(0, 1, 3, 5, 6))
def _evaluate_all(
    model: Network,
    views: str,
    variables: Any,
    spec: DatasetSpec,
    data: batches.DeviceSplit,
    batch_size: int,
    sharding: jax.sharding.NamedSharding | None,
) -> Any:
    batch_size = batches.whole_rows(batch_size, sharding)

    def part(index: Any) -> Any:
        batch = batches.evaluation_batch(spec, data, index * batch_size, batch_size, sharding)
        return _evaluate_batch(model, views, variables, *batch)

    def add(index: jax.Array, total: Any) -> Any:
        return jax.tree.map(jnp.add, total, part(index))

    count = -(-data.labels.shape[0] // batch_size)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(part, 0))
    return jax.lax.fori_loop(0, count, add, nothing)


def evaluate_weights(
    model: Network,
    variables: Any,
    spec: DatasetSpec,
    data: batches.DeviceSplit | Split,
    batch_size: int,
    one_launch: bool = False,
    sharding: jax.sharding.NamedSharding | None = None,
    views: str = "none",
) -> Evaluation:
    """Evaluate weights on all examples of a split.

    Args:
        model: the network.
        variables: ``{"params", "batch_stats"}``.
        spec: the data set, for its normalisation.
        data: the examples, on the device or on the host.
        batch_size: examples a step; does not change the result beyond rounding.
        one_launch: whether a compiled loop goes over the batches, where the data are on the device.
        sharding: of the batches, where several devices or processes evaluate together; `variables`
            are then on all of them.
        views: of :func:`lls_jax.runs.views.mean_logits`.
    """
    count = int(data.labels.shape[0])
    size = min(batch_size, count)
    if one_launch and isinstance(data, batches.DeviceSplit):
        total: Any = _evaluate_all(model, views, variables, spec, data, size, sharding)
    else:
        parts = (
            _evaluate_batch(model, views, variables, *batch)
            for batch in batches.evaluation_batches(spec, data, size, sharding)
        )
        total = functools.reduce(functools.partial(jax.tree.map, jnp.add), parts)
    loss, top5, confusion = jax.tree.map(np.asarray, total)
    return Evaluation(
        loss=float(loss) / count,
        accuracy=100 * float(np.trace(confusion)) / count,
        top5=100 * float(top5) / count if spec.num_classes > 5 else None,
        confusion=confusion,
    )


def evaluate(
    model: Network,
    state: TrainState,
    examples: Arrays,
    *,
    spec: DatasetSpec | None = None,
    batch_size: int = 500,
    views: str = "none",
) -> Evaluation:
    """Evaluate a network on images and labels.

    Args:
        model: the state's model.
        state: what :func:`lls_jax.evaluation.evaluation_state` gives, ``fit(...).evaluation``, or
            any state whose optimizer averages no weights.
        examples: ``(images, labels)``: images uint8 ``[count, height, width, channels]``, or floats
            ``[count, ...]`` that are normalised already; labels integers ``[count]``.
        spec: how uint8 images are normalised and cut, ``fit(...).spec``; needed for those.
        batch_size: examples a step; changes speed and memory only.
        views: ``"none"``; ``"flip"``: the mean of an image's logits and its mirror image's; or
            ``"flip_translate"``: and of those of the image moved by a pixel.

    Raises:
        ValueError: images and labels do not fit each other, the model or the `spec`; or the state
            is one that is being trained by a schedule-free optimizer.
    """
    check_views("views", views)
    batch_size = whole_number("batch_size", batch_size, 1)
    split = to_split("examples", examples)
    if spec is None:
        if split.images.dtype == np.uint8:
            raise ValueError(
                "`spec` is None and the images are uint8; give the `spec` that they were trained "
                "with, which says how they are normalised."
            )
        spec = describe(split, model.num_classes)
    check_examples("examples", split, spec, model.num_classes)
    check_of_images("views", views, spec.input_shape)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    with checked(model, state, (batch_size, *spec.input_shape)):
        return evaluate_weights(model, variables, spec, split, batch_size, views=views)
