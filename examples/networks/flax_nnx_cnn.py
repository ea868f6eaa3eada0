"""An NNX model that knows nothing of local learning, cut into blocks that learn locally.

The model is the convolutional network of Flax's MNIST tutorial
(https://flax.readthedocs.io/en/stable/mnist_tutorial.html), for images of any size.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lls_jax import fit, rules
from lls_jax.frameworks.nnx import localize


class CNN(nnx.Module):
    def __init__(self, side, *, rngs):
        self.conv1 = nnx.Conv(1, 32, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm1 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.dropout1 = nnx.Dropout(rate=0.025)
        self.conv2 = nnx.Conv(32, 64, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm2 = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.avg_pool = functools.partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.linear1 = nnx.Linear(64 * (side // 4) ** 2, 256, rngs=rngs)
        self.dropout2 = nnx.Dropout(rate=0.025)
        self.linear2 = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x, rngs=None):
        normalized = self.batch_norm1(self.dropout1(self.conv1(x), rngs=rngs))
        x = self.avg_pool(nnx.relu(normalized))
        x = self.avg_pool(nnx.relu(self.batch_norm2(self.conv2(x))))
        x = self.linear1(x.reshape(x.shape[0], -1))
        return self.linear2(nnx.relu(self.dropout2(x, rngs=rngs)))


def train(train_split, test_split, epochs, workdir=None):
    """The result of :func:`lls_jax.fit` on grey images."""
    shape = (1, *train_split.images.shape[1:])
    model = CNN(shape[1], rngs=nnx.Rngs(0))
    example = jax.ShapeDtypeStruct(shape, jnp.float32)
    network = localize(model, example, cut_at=["conv2", "linear1", "linear2"])
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
        workdir=workdir,
    )
