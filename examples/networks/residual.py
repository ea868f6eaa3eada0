"""A small residual network whose every residual block learns from its own loss, on the digits.

python examples/networks/residual.py
"""

from lls_jax import fit, rules
from lls_jax.blocks import ResidualBlock
from lls_jax.models import BlockSpec, Network
from lls_jax.optimizers import schedule_free_adamw


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
