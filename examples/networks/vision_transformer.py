"""A small vision transformer whose every encoder block learns from its own loss, on the digits.

python examples/networks/vision_transformer.py
"""

import flax.linen as nn
import jax

from lls_jax import fit, rules
from lls_jax.models import BlockSpec, Network
from lls_jax.optimizers import schedule_free_adamw


class Patches(nn.Module):
    """From an image to tokens with learned positions: ``[batch, length, channels]``."""

    features: int
    size: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        side = (self.size, self.size)
        x = nn.Conv(self.features, side, side)(x)
        tokens = x.reshape(x.shape[0], -1, self.features)
        init = nn.initializers.normal(0.02)
        return tokens + self.param("positions", init, (1, *tokens.shape[1:]))


class Encoder(nn.Module):
    """Attention and a perceptron, each added to what came in: one local block."""

    features: int
    heads: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
        y = nn.gelu(nn.Dense(2 * self.features)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.features)(y)


def make_network(num_classes: int, width: int = 32, depth: int = 3) -> Network:
    """Patches, then `depth` encoder blocks; a local loss sees four means along the sequence."""
    blocks = [BlockSpec(Patches(width), pool_size=4)]
    blocks += [BlockSpec(Encoder(width), pool_size=4) for _ in range(depth)]
    blocks[-1] = BlockSpec(Encoder(width), pool_size=4, flatten=True)
    return Network("vision_transformer", num_classes, tuple(blocks))


def train(examples, test, epochs=8, callbacks=()):
    """Train on images and labels; see :func:`lls_jax.fit`."""
    rule = rules.LLS(num_classes=10, modulation="matrix")
    return fit(
        make_network(10),
        rule,
        schedule_free_adamw(5e-3),
        train=examples,
        test=test,
        epochs=epochs,
        batch_size=64,
        callbacks=callbacks,
    )


if __name__ == "__main__":
    import pathlib

    from lls_jax import data

    spec, nowhere = data.get_spec("digits"), pathlib.Path()
    result = train(*(data.load(spec, split, nowhere) for split in ("train", "test")))
    for record in result.records:
        print(f"epoch {record['epoch']}: test accuracy {record['test_accuracy']:.2f} %")
