"""Augmentation of a batch, on the device, inside jit."""

import math

import jax
import jax.numpy as jnp

# What each does, in this order; where windows are cut from larger images, these are the crops.
AUGMENTATIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "flip": ("flip",),
    "crop": ("crop",),
    "flip_crop": ("flip", "crop"),
    "flip_erase": ("flip", "erase"),
    "full": ("flip", "crop", "erase"),
    "alternating_flip": ("alternating_flip",),
    "alternating_flip_translate": ("alternating_flip", "translate"),
    "alternating_flip_translate_cutout": ("alternating_flip", "translate", "cutout"),
}

_CROP_PADDING = 4
_TRANSLATION = 2
_CUTOUT_SIZE = 8
_ERASE_PROBABILITY = 0.2
_ERASE_AREA = (0.02, 0.33)
_ERASE_ASPECT = (0.3, 3.3)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirror each image left to right with probability one half; ``[batch, height, width, c]``."""
    flips = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flips, images[:, :, ::-1], images)


def mirror(images: jax.Array) -> jax.Array:
    """Each image left to right; ``[batch, height, width, channels]``."""
    return images[:, :, ::-1]


def pad_reflected(images: jax.Array, padding: int) -> jax.Array:
    """Continue each image by `padding` pixels a side as its mirror image, the edge not repeated."""
    sides = (padding, padding)
    return jnp.pad(images, ((0, 0), sides, sides, (0, 0)), mode="reflect")


def random_translation(key: jax.Array, images: jax.Array, padding: int = _TRANSLATION) -> jax.Array:
    """Move each image by up to `padding` pixels along each axis; what comes in is its reflection.

    Args:
        key: random key.
        images: ``[batch, height, width, channels]``.
        padding: in pixels.
    """
    return _random_windows(key, pad_reflected(images, padding), images.shape)


def random_crop(key: jax.Array, images: jax.Array, padding: int = _CROP_PADDING) -> jax.Array:
    """Pad each image with `padding` black pixels a side, and cut a window of its own size.

    Args:
        key: random key.
        images: ``[batch, height, width, channels]``.
        padding: in pixels.
    """
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    return _random_windows(key, padded, images.shape)


def random_window(key: jax.Array, images: jax.Array, size: int) -> jax.Array:
    """Cut a random square from each image; ``[batch, height, width, c]``, `size` in pixels."""
    batch, *_, channels = images.shape
    return _random_windows(key, images, (batch, size, size, channels))


def _random_windows(key: jax.Array, images: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A window of each image, at a place of its own: `shape`, ``[batch, height, width, c]``."""
    batch, *size = shape
    room = jnp.array([[images.shape[1] - size[0] + 1, images.shape[2] - size[1] + 1]])
    offsets = jax.random.randint(key, (batch, 2), 0, room)
    cut = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), size))
    return cut(images, offsets)


def middle_window(images: jax.Array, size: int) -> jax.Array:
    """Cut the middle square from each image."""
    top, left = ((length - size) // 2 for length in images.shape[1:3])
    return images[:, top : top + size, left : left + size]


def random_erase(
    key: jax.Array, images: jax.Array, probability: float = _ERASE_PROBABILITY
) -> jax.Array:
    """Set a random rectangle of some images to zero, which is the mean of normalised ones.

    The rectangle's area is 2 to 33 % of the image's, its aspect ratio 0.3 to 3.3, log-uniform.

    Args:
        key: random key.
        images: normalised, ``[batch, height, width, channels]``.
        probability: that an image is touched.

    References:
        Zhong et al., "Random Erasing Data Augmentation", https://arxiv.org/abs/1708.04896.
    """
    batch, height, width, _ = images.shape
    keys = jax.random.split(key, 5)
    chosen = jax.random.bernoulli(keys[0], probability, (batch,))
    area = height * width * jax.random.uniform(keys[1], (batch,), jnp.float32, *_ERASE_AREA)
    log_aspect = jax.random.uniform(
        keys[2], (batch,), jnp.float32, *(math.log(a) for a in _ERASE_ASPECT)
    )
    root_aspect = jnp.exp(0.5 * log_aspect)
    rows = _random_span(keys[3], jnp.sqrt(area) * root_aspect, height)
    columns = _random_span(keys[4], jnp.sqrt(area) / root_aspect, width)
    return _without_rectangle(images, chosen[:, None] & rows, columns)


def random_cutout(key: jax.Array, images: jax.Array, size: int = _CUTOUT_SIZE) -> jax.Array:
    """Set a random square of each image to zero, which is the mean of normalised ones.

    The square lies wholly inside the image, as in the speed-runs; the paper's may reach over the
    edge.

    Args:
        key: random key.
        images: normalised, ``[batch, height, width, channels]``.
        size: of the square, in pixels; along a shorter axis, all of it.

    References:
        DeVries, Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout",
        https://arxiv.org/abs/1708.04552.
    """
    batch, height, width, _ = images.shape
    length = jnp.full((batch,), size, jnp.float32)
    keys = jax.random.split(key)
    spans = (_random_span(k, length, side) for k, side in zip(keys, (height, width)))
    return _without_rectangle(images, *spans)


def _random_span(key: jax.Array, length: jax.Array, size: int) -> jax.Array:
    """Whether each of `size` positions is inside a random span of `length`: ``[batch, size]``."""
    length = jnp.clip(jnp.round(length), 1, size)
    start = jnp.floor(jax.random.uniform(key, length.shape) * (size - length + 1))
    position = jnp.arange(size, dtype=jnp.float32)[None, :]
    return (position >= start[:, None]) & (position < (start + length)[:, None])


def _without_rectangle(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Zero where both a row and a column are in; ``[batch, height]`` and ``[batch, width]``."""
    inside = rows[:, :, None] & columns[:, None, :]
    return jnp.where(inside[..., None], jnp.zeros_like(images), images)
