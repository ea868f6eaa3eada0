"""A small residual network whose every residual block learns from its own loss, on the digits.

python examples/networks/residual.py
"""

import flax.linen as nn
import jax

from lls_jax import fit, rules
from lls_jax.models import BlockSpec, Network
from lls_jax.optimizers import schedule_free_adamw


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to what came in: one local block."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        shortcut = x
        x = nn.Conv(self.features, (3, 3), (self.stride, self.stride), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Conv(self.features, (3, 3), use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        if shortcut.shape != x.shape:
            shortcut = nn.Conv(self.features, (1, 1), (self.stride, self.stride))(shortcut)
        return nn.relu(x + shortcut)


def make_network(num_classes: int, width: int = 16) -> Network:
    """Four residual blocks, halving the sides twice."""
    shapes = ((width, 1), (2 * width, 2), (2 * width, 1), (4 * width, 2))
    specs = [BlockSpec(ResidualBlock(features, stride), pool_size=2) for features, stride in shapes]
    specs[-1] = BlockSpec(ResidualBlock(*shapes[-1]), pool_size=2, average_pool=1, flatten=True)
    return Network("residual", num_classes, tuple(specs))


def train(examples, test, epochs=5, callbacks=()):
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
