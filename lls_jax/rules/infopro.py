"""InfoPro: a block keeps what the image and the class can be read from."""

import dataclasses
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import optax

from lls_jax.layers.normalization import along
from lls_jax.rules import auxiliary
from lls_jax.rules.base import LocalRule, check_options
from lls_jax.rules.cross_entropy import loss_of_classes
from lls_jax.rules.surroundings import LabeledImages, Surroundings

Self = TypeVar("Self", bound="InfoPro")

_DECODER_WIDTH = 12
_WIDEST_CLASSIFIER = 64
_HIDDEN = 128
# The classifier's convolution halves sides above this.
_HALVES_ABOVE = 8


@dataclasses.dataclass(frozen=True)
class InfoPro(LocalRule):
    """Reconstruction of the image and classification together, by two small networks a block.

    ``loss = w_x BCE(decoder(a), image) + w_y CE(classifier(a), y)``: the decoder takes the
    activation, enlarged to the image's size, through two 3x3 convolutions; the classifier has a 3x3
    convolution, a mean over the image, and two dense layers ("1c2f"). The weights go linearly from
    `first_weights` at the first block to `last_weights` at the one before the last; the last block
    has the classifier alone, with weight 1. Vectors count as an image of one pixel.

    The image has to travel with the activation: the rule asks for it (`needs_image`). This is the
    form with a cross-entropy ("softmax"), not the one with a contrastive loss.

    Attributes:
        num_classes: number of classes, ``K``.
        first_weights: ``(w_x, w_y)`` at the first block; the published ones of ResNet-32 in 16.
        last_weights: at the last block but one.
        pixel_mean: of each channel, or of all: what images were normalised with, pixels in [0, 1].
        pixel_std: likewise the deviation; a normalised image times this, plus the mean, cut to
            [0, 1], is what is reconstructed.
        position: of the block, 0 to 1 from the first one to the last but one; :meth:`at_block` sets
            it, and that of the last block to None.
        image_channels: of the image; :meth:`in_network` sets it.

    References:
        Wang, Ni, Song, Yang, Huang, "Revisiting Locally Supervised Learning: an Alternative to
        End-to-end Training", ICLR 2021, https://arxiv.org/abs/2101.10832.
    """

    num_classes: int
    first_weights: tuple[float, float] = (5.0, 0.05)
    last_weights: tuple[float, float] = (0.2, 0.5)
    pixel_mean: tuple[float, ...] = (0.5,)
    pixel_std: tuple[float, ...] = (0.25,)
    position: float | None = 0.0
    image_channels: int = 3

    needs_image: ClassVar[bool] = True
    compares_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raise ValueError for an option that is out of its range."""
        check_options(self.num_classes)
        both = {"first_weights": self.first_weights, "last_weights": self.last_weights}
        for name, weights in both.items():
            if len(weights) != 2 or min(weights) < 0:
                raise ValueError(
                    f"`{name}` is {weights}; expected two numbers, at least 0: of the "
                    "reconstruction and of the classification."
                )

    def at_block(self: Self, index: int, num_blocks: int | None = None) -> Self:
        """The rule with the weights of one block; see :meth:`Rule.at_block`."""
        if num_blocks is None:
            return self
        is_last = index == num_blocks - 1
        position = None if is_last else index / max(num_blocks - 2, 1)
        return dataclasses.replace(self, position=position)

    def in_network(self: Self, surroundings: Surroundings) -> Self:
        """The rule that knows the image's channels; see :meth:`Rule.in_network`.

        Raises:
            ValueError: the network's input is no image, or of other channels than the mean.
        """
        shape = surroundings.image_shape
        if len(shape) != 3:
            raise ValueError(
                f"rule 'infopro' reconstructs images [height, width, channels], and an example has "
                f"shape {shape}; use another rule."
            )
        for name, values in {"pixel_mean": self.pixel_mean, "pixel_std": self.pixel_std}.items():
            if len(values) not in (1, shape[-1]):
                raise ValueError(
                    f"`{name}` is {values}, for images of {shape[-1]} channels; give one number, "
                    "or one a channel."
                )
        return dataclasses.replace(self, image_channels=shape[-1])

    @property
    def weights(self) -> tuple[float, float]:
        """``(w_x, w_y)`` of this block."""
        if self.position is None:
            return 0.0, 1.0
        pairs = zip(self.first_weights, self.last_weights)
        reconstruction, classification = (a + self.position * (b - a) for a, b in pairs)
        return reconstruction, classification

    def init(
        self, key: jax.Array, activation_shape: tuple[int, ...], pool_size: int
    ) -> dict[str, Any]:
        """``classifier``, and ``decoder`` where there is something to reconstruct.

        Args are those of :meth:`Rule.init`.
        """
        del pool_size
        width = activation_shape[-1]
        features = min(2 * width, _WIDEST_CLASSIFIER)
        keys = jax.random.split(key, 5)
        classifier = {
            "kernel": auxiliary.init_convolution(keys[0], width, features),
            "norm": auxiliary.init_normalization(features),
            "hidden": auxiliary.init_linear(keys[1], features, _HIDDEN),
            "output": auxiliary.init_linear(keys[2], _HIDDEN, self.num_classes),
        }
        if not self.weights[0]:
            return {"classifier": classifier}
        decoder = {
            "kernel": auxiliary.init_convolution(keys[3], width, _DECODER_WIDTH),
            "norm": auxiliary.init_normalization(_DECODER_WIDTH),
            "output": auxiliary.init_convolution(keys[4], _DECODER_WIDTH, self.image_channels),
            "bias": jnp.zeros(self.image_channels, jnp.float32),
        }
        return {"classifier": classifier, "decoder": decoder}

    def loss(
        self,
        params: dict[str, Any],
        seen: jax.Array,
        labels: Any,
        *,
        pool_size: int | None,
    ) -> jax.Array:
        """The local loss, a float32 scalar; see :meth:`LocalRule.loss`.

        `labels` are :class:`lls_jax.rules.LabeledImages`.
        """
        del pool_size
        if not isinstance(labels, LabeledImages):
            raise ValueError(
                "rule 'infopro' needs the image beside the label; give `labels` as "
                "`lls_jax.rules.LabeledImages(labels, image)`."
            )
        a = seen.astype(jnp.float32)
        if a.ndim != 4:
            a = auxiliary.average_over_space(a)[:, None, None, :]
        reconstruction, classification = self.weights
        logits = _classify(params["classifier"], a)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels.labels)
        loss = classification * jnp.mean(losses)
        if "decoder" in params:
            image = labels.image.astype(jnp.float32)
            decoded = _decode(params["decoder"], a, image.shape[1:3])
            bce = optax.sigmoid_binary_cross_entropy(decoded, self._pixels(image))
            loss = loss + reconstruction * jnp.mean(bce)
        return loss_of_classes(loss, labels.labels, self.num_classes)

    def _pixels(self, image: jax.Array) -> jax.Array:
        mean, std = (
            jnp.broadcast_to(jnp.asarray(values, jnp.float32), (image.shape[-1],))
            for values in (self.pixel_mean, self.pixel_std)
        )
        pixels = image * along(std, image) + along(mean, image)
        return jnp.clip(pixels, 0.0, 1.0)


def classifier_stride(height: int) -> int:
    """Of the classifier's convolution: 2, which halves the sides, if they are above 8.

    Args:
        height: of the activation.
    """
    return 2 if height > _HALVES_ABOVE else 1


def _classify(params: dict[str, Any], a: jax.Array) -> jax.Array:
    stride = classifier_stride(a.shape[1])
    h = auxiliary.normalize(params["norm"], auxiliary.convolve(params["kernel"], a, stride))
    h = auxiliary.average_over_space(jax.nn.relu(h))
    h = jax.nn.relu(auxiliary.linear(params["hidden"], h))
    return auxiliary.linear(params["output"], h)


def _decode(params: dict[str, Any], a: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """What the sigmoid of is the image: ``[batch, height, width, channels]``."""
    a = jax.image.resize(a, (a.shape[0], *size, a.shape[-1]), "bilinear", antialias=False)
    h = auxiliary.normalize(params["norm"], auxiliary.convolve(params["kernel"], a))
    decoded = auxiliary.convolve(params["output"], jax.nn.relu(h))
    return decoded + along(params["bias"], decoded)
