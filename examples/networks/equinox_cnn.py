"""An Equinox model that knows nothing of local learning, cut into blocks that learn locally.

The model is a convolution and three dense layers in a list, as in Equinox's MNIST example
(https://docs.kidger.site/equinox/examples/mnist/), for images of any size.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from lls_jax import fit, rules
from lls_jax.frameworks.equinox import localize


class CNN(eqx.Module):
    layers: list

    def __init__(self, side, key):
        keys = jax.random.split(key, 4)
        self.layers = [
            eqx.nn.Conv2d(1, 16, kernel_size=3, key=keys[0]),
            eqx.nn.MaxPool2d(kernel_size=2),
            jax.nn.relu,
            jnp.ravel,
            eqx.nn.Linear(16 * (side - 3) ** 2, 512, key=keys[1]),
            jax.nn.sigmoid,
            eqx.nn.Linear(512, 64, key=keys[2]),
            jax.nn.relu,
            eqx.nn.Linear(64, 10, key=keys[3]),
            jax.nn.log_softmax,
        ]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def train(train_split, test_split, epochs):
    """The result of :func:`lls_jax.fit` on grey images."""
    shape = (1, *train_split.images.shape[1:])
    model = CNN(shape[1], jax.random.key(0))
    example = jax.ShapeDtypeStruct(shape, jnp.float32)
    # What comes in at `ravel` is an image still, which the first block's loss pools as one.
    network = localize(model, example, cut_at=["layers.3", "layers.6", "layers.8"])
    rule = rules.make("lls_mxm", num_classes=10)
    # `network.to_model(result.evaluation)` is a CNN again, with the weights that were learned.
    return fit(
        network,
        rule,
        optax.adam(1e-2),
        train=train_split,
        test=test_split,
        epochs=epochs,
        batch_size=32,
    )
