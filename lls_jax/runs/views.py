"""Test-time views: an image judged by the mean of what a network says of it and its likes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lls_jax.data.augment import mirror, pad_reflected

VIEWS = ("none", "flip", "flip_translate")


def check_views(name: str, views: str) -> None:
    """Raise ValueError, naming the argument, for views that are unknown."""
    if views not in VIEWS:
        raise ValueError(f"`{name}` is {views!r}; expected one of {', '.join(VIEWS)}.")


def mean_logits(
    classify: Callable[[jax.Array], jax.Array], images: jax.Array, views: str
) -> jax.Array:
    """Logits, averaged over views of each image.

    Args:
        classify: from images to logits ``[batch, classes]``.
        images: normalised, ``[batch, height, width, channels]``.
        views: ``"none"``: the image alone. ``"flip"``: the image and its mirror image.
            ``"flip_translate"``: half of the weight on these, the other half on the same of the
            image moved by one pixel, up and left or down and right, its edges reflected.

    Returns:
        ``[batch, classes]``.

    References:
        Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", https://arxiv.org/abs/2404.00498
        (whose evaluation is ``"flip_translate"``).
    """
    if views == "none":
        return classify(images)

    def both_ways(images: jax.Array) -> jax.Array:
        return (classify(images) + classify(mirror(images))) / 2.0

    if views == "flip":
        return both_ways(images)
    height, width = images.shape[1:3]
    padded = pad_reflected(images, 1)
    moved = [both_ways(padded[:, at : at + height, at : at + width]) for at in (0, 2)]
    return (both_ways(images) + jnp.mean(jnp.stack(moved), axis=0)) / 2.0
