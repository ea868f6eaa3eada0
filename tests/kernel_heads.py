"""Heads of many kinds, each in JAX for one example and in float64 NumPy for a batch."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lls_jax import rules
from lls_jax.rules.basis import periodic_basis

CLASSES = 10


class Case(NamedTuple):
    """A head.

    Attributes:
        head: ``head(scores, square, params, label)``, of one example.
        oracle: ``oracle(scores [batch, rows], square [batch], params, labels)``, in float64.
        shapes: of the parameters, by name.
        rows: of the projection.
    """

    head: Callable[..., Any]
    oracle: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    rows: int = CLASSES


def unit(scores, square):
    return scores * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def unit_64(scores, square):
    return scores / np.maximum(np.sqrt(square), 1e-12)[:, None]


def log_softmax_64(logits):
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def picked_64(rows, labels):
    return rows[np.arange(len(labels)), labels]


def cross_entropy_64(logits, labels, smoothing=0.0):
    log_p = log_softmax_64(logits)
    return -(1 - smoothing) * picked_64(log_p, labels) - smoothing * log_p.mean(1)


def integer_labels(scores, square, params, label):
    return optax.softmax_cross_entropy_with_integer_labels(unit(scores, square) / 0.5, label)


def margin(scores, square, params, label):
    sign = 2.0 * jax.nn.one_hot(label, CLASSES) - 1.0
    return jnp.sum(jnp.square(jax.nn.relu(1.0 - sign * params["scale"] * unit(scores, square))))


def margin_64(scores, square, params, labels):
    sign = 2.0 * np.eye(CLASSES)[labels] - 1.0
    return (np.maximum(0, 1 - sign * params["scale"] * unit_64(scores, square)) ** 2).sum(1)


def focal(scores, square, params, label):
    log_p = jax.nn.log_softmax(unit(scores, square) / 0.5)[label]
    return -((1.0 - jnp.exp(log_p)) ** 2) * log_p


def focal_64(scores, square, params, labels):
    log_p = picked_64(log_softmax_64(unit_64(scores, square) / 0.5), labels)
    return -((1 - np.exp(log_p)) ** 2) * log_p


def smoothed(scores, square, params, label):
    target = optax.smooth_labels(jax.nn.one_hot(label, CLASSES), 0.1)
    return optax.softmax_cross_entropy(unit(scores, square) @ params["matrix"], target)


def cosine(scores, square, params, label):
    prototypes = params["prototypes"]
    prototypes = prototypes / jnp.linalg.norm(prototypes, axis=1, keepdims=True)
    direction = scores / jnp.sqrt(jnp.sum(scores * scores) + 1e-6)
    return 1.0 - (prototypes @ direction)[label]


def cosine_64(scores, square, params, labels):
    prototypes = params["prototypes"]
    prototypes = prototypes / np.sqrt((prototypes**2).sum(1, keepdims=True))
    direction = scores / np.sqrt((scores**2).sum(1, keepdims=True) + 1e-6)
    return 1 - picked_64(direction @ prototypes.T, labels)


def mlp(scores, square, params, label):
    hidden = jnp.tanh(unit(scores, square) @ params["first"] + params["bias"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["second"], label)


def mlp_64(scores, square, params, labels):
    hidden = np.tanh(unit_64(scores, square) @ params["first"] + params["bias"])
    return cross_entropy_64(hidden @ params["second"], labels)


def gated(scores, square, params, label):
    gate = jax.nn.sigmoid(params["gain"] * jnp.log1p(square) + params["bias"])
    return optax.softmax_cross_entropy(unit(scores, square) * gate, jax.nn.one_hot(label, CLASSES))


def gated_64(scores, square, params, labels):
    gate = 1 / (1 + np.exp(-(params["gain"] * np.log1p(square)[:, None] + params["bias"])))
    return cross_entropy_64(unit_64(scores, square) * gate, labels)


def temperature(scores, square, params, label):
    logits = unit(scores, square) * jnp.exp(params["log_scale"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def goodness(scores, square, params, label):
    groups = jnp.mean(jnp.square(unit(scores, square)).reshape(CLASSES, 4), axis=1)
    return optax.softmax_cross_entropy_with_integer_labels(groups, label)


def goodness_64(scores, square, params, labels):
    groups = (unit_64(scores, square) ** 2).reshape(-1, CLASSES, 4).mean(2)
    return cross_entropy_64(groups, labels)


def regression(scores, square, params, label):
    distance = unit(scores, square) @ params["map"] - params["targets"][label]
    return jnp.mean(jnp.square(distance)) + jnp.where(label == jnp.argmax(scores), 0.0, 0.5)


def regression_64(scores, square, params, labels):
    distance = unit_64(scores, square) @ params["map"] - params["targets"][labels]
    return (distance**2).mean(1) + 0.5 * (labels != scores.argmax(1))


def own_target(scores, square, params, label):
    # Part of a vector, a weight a class, a cubic and tanh: what else heads are made of.
    kept = unit(scores, square)[2:9]
    gelu = jax.nn.gelu(kept)
    return params["weights"][label] * jnp.max(gelu) + jnp.sum(jnp.abs(jnp.sin(kept)))


def own_target_64(scores, square, params, labels):
    kept = unit_64(scores, square)[:, 2:9]
    gelu = kept * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (kept + 0.044715 * kept**3)))
    return params["weights"][labels] * gelu.max(1) + np.abs(np.sin(kept)).sum(1)


def gelu(scores, square, params, label):
    # Two functions that newer JAX differentiates in pieces of bits.
    hidden = jax.nn.gelu(params["gain"] * unit(scores, square), approximate=False)
    return optax.softmax_cross_entropy_with_integer_labels(hidden + jax.lax.erf(scores), label)


def gelu_64(scores, square, params, labels):
    erf = np.vectorize(math.erf)
    wide = params["gain"] * unit_64(scores, square)
    hidden = 0.5 * wide * (1 + erf(wide / np.sqrt(2)))
    return cross_entropy_64(hidden + erf(scores), labels)


def powers(scores, square, params, label):
    # Real powers of negative numbers, and what is left of erf where it is 1 to the last bit.
    cosine = unit(scores, square)
    tail = jnp.log(jax.lax.erfc(4.0 + cosine))
    return params["weights"][label] * jnp.sum(cosine**2.0) + jnp.sum((3.0 * cosine) ** 3.0 + tail)


def powers_64(scores, square, params, labels):
    cosine = unit_64(scores, square)
    tail = np.log(np.vectorize(math.erfc)(4.0 + cosine))
    return params["weights"][labels] * (cosine**2).sum(1) + ((3.0 * cosine) ** 3 + tail).sum(1)


def walked(scores, square, params, label):
    # Each matrix is too large for registers: with either side in the sum, and with rows picked.
    hidden = jnp.tanh(unit(scores, square) @ params["first"])
    gate = jax.nn.sigmoid(params["gate"] @ hidden)
    logits = (hidden * params["table"][label]) @ params["second"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, label) + jnp.mean(gate)


def walked_64(scores, square, params, labels):
    hidden = np.tanh(unit_64(scores, square) @ params["first"])
    gate = 1 / (1 + np.exp(-(hidden @ params["gate"].T)))
    logits = (hidden * params["table"][labels]) @ params["second"]
    return cross_entropy_64(logits, labels) + gate.mean(1)


@dataclasses.dataclass(frozen=True)
class Margin(rules.HeadRule):
    """A rule of one's own: hinge losses of the classes' scores, with a learned scale."""

    num_classes: int = 10

    def init(self, key, activation_shape, pool_size):
        return {"scale": jnp.ones(())}

    def projection(self, params, latent_dim):
        return jnp.asarray(periodic_basis(self.num_classes, latent_dim, "square"))

    def head(self, scores, square, params, label):
        unit = scores * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
        sign = 2.0 * jax.nn.one_hot(label, self.num_classes) - 1.0
        return jnp.sum(jax.nn.relu(1.0 - sign * params["scale"] * unit))


def shipped(name, shapes, oracle, rows=CLASSES, **options):
    rule = rules.make(name, num_classes=CLASSES, label_smoothing=0.1, **options)
    return Case(rule.head, oracle, shapes, rows)


def modulated_64(normalizes, transposed=False):
    def oracle(scores, square, params, labels):
        logits = unit_64(scores, square) if normalizes else scores
        modulation = params.get("modulation", np.ones(CLASSES))
        modulation = modulation.T if transposed else modulation
        logits = logits * modulation if modulation.ndim == 1 else logits @ modulation
        return cross_entropy_64(logits / 0.5, labels, 0.1)

    return oracle


VECTOR, MATRIX = {"modulation": (CLASSES,)}, {"modulation": (CLASSES, CLASSES)}
CASES = {
    "lls": shipped("lls", {}, modulated_64(True)),
    "lls_m": shipped("lls_m", VECTOR, modulated_64(True)),
    "lls_mxm": shipped("lls_mxm", MATRIX, modulated_64(True)),
    "lls_mxm_reduced": shipped(
        "lls_mxm_reduced", {"modulation": (20, CLASSES)}, modulated_64(True), 20, basis_rows=20
    ),
    "lls_random": shipped("lls_random", {}, modulated_64(False)),
    "lls_m_random": shipped("lls_m_random", VECTOR, modulated_64(False)),
    "lls_mxm_random": shipped("lls_mxm_random", MATRIX, modulated_64(False, True)),
    "local_classifier": shipped("local_classifier", {}, modulated_64(False)),
    "integer_labels": Case(
        integer_labels, lambda s, q, p, y: cross_entropy_64(unit_64(s, q) / 0.5, y), {}
    ),
    "margin": Case(margin, margin_64, {"scale": ()}),
    "focal": Case(focal, focal_64, {}),
    "smoothed": Case(
        smoothed,
        lambda s, q, p, y: cross_entropy_64(unit_64(s, q) @ p["matrix"], y, 0.1),
        {"matrix": (12, CLASSES)},
        12,
    ),
    "cosine": Case(cosine, cosine_64, {"prototypes": (CLASSES, 24)}, 24),
    "mlp": Case(mlp, mlp_64, {"first": (12, 33), "bias": (33,), "second": (33, CLASSES)}, 12),
    "gated": Case(gated, gated_64, {"gain": (), "bias": (CLASSES,)}),
    "temperature": Case(
        temperature,
        lambda s, q, p, y: cross_entropy_64(unit_64(s, q) * np.exp(p["log_scale"]), y),
        {"log_scale": ()},
    ),
    "goodness": Case(goodness, goodness_64, {}, 4 * CLASSES),
    "regression": Case(regression, regression_64, {"map": (20, 5), "targets": (CLASSES, 5)}, 20),
    "hundred": shipped("lls_mxm", {"modulation": (100, 100)}, modulated_64(True), 100),
    "walked": Case(
        walked,
        walked_64,
        {"first": (20, 200), "gate": (40, 200), "second": (200, 17), "table": (33, 200)},
        20,
    ),
    "gelu": Case(gelu, gelu_64, {"gain": (CLASSES,)}),
    "powers": Case(powers, powers_64, {"weights": (CLASSES,)}),
    "own_target": Case(own_target, own_target_64, {"weights": (CLASSES,)}),
}
