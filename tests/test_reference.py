"""Parity with numbers that the authors' PyTorch implementation produced (float32, CPU)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lls_jax import interop, models, rules, training
from lls_jax.rules.basis import periodic_basis

REFERENCE = pathlib.Path(__file__).parent / "reference"
MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32)
STD = np.array([0.2023, 0.1994, 0.2010], np.float32)
RULE_NAMES = {"lls": "lls", "m": "lls_m", "mxm": "lls_mxm", "mxmr": "lls_mxm_reduced"}
RULE_NAMES["classifier"] = "local_classifier"
LOSS_CASES = [
    "conv_lls_square",
    "conv_lls_cosine",
    "conv_lls_odd",
    "conv_lls_m",
    "conv_lls_mxm",
    "conv_lls_mxm_reduced",
    "linear_lls",
    "linear_lls_upsampled",
    "conv_classifier",
    "conv_classifier_reduced",
]


def relative(ours, reference) -> float:
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def test_basis():
    with np.load(REFERENCE / "basis.npz") as reference:
        for name in reference.files:
            rows, dim = map(int, name.removeprefix("sine_").split("_"))
            sine = periodic_basis(rows, dim, "cosine")
            assert np.abs(sine - reference[name]).max() <= 6e-8
            np.testing.assert_array_equal(
                periodic_basis(rows, dim, "square"), np.sign(reference[name])
            )


@pytest.mark.parametrize("case", LOSS_CASES)
def test_loss_and_gradients(case):
    with np.load(REFERENCE / "losses.npz") as store:
        data = {k.split("/")[1]: store[k] for k in store.files if k.split("/")[0] == case}
    name = RULE_NAMES[str(data["rule"])]
    rule = rules.make(
        name,
        num_classes=int(data["n_classes"]),
        waveform=None if name == "local_classifier" else str(data["waveform"]),
        temperature=float(data["temperature"]),
        label_smoothing=float(data["label_smoothing"]),
        basis_rows=int(data["basis_rows"]) if name == "lls_mxm_reduced" else None,
    )
    activation = data["activation"]
    if activation.ndim == 4:
        activation = activation.transpose(0, 2, 3, 1)
    learned = "feedback" if name == "local_classifier" else "modulation"
    params = {learned: jnp.asarray(data["feedback"])} if "feedback" in data else {}
    loss, (d_params, d_activation) = jax.value_and_grad(
        lambda p, a: rule.loss(p, a, jnp.asarray(data["labels"]), pool_size=int(data["pool"])),
        argnums=(0, 1),
    )(params, jnp.asarray(activation))
    d_activation = np.asarray(d_activation)
    if d_activation.ndim == 4:
        d_activation = d_activation.transpose(0, 3, 1, 2)
    # Losses above 1 have a float32 spacing in proportion.
    assert abs(float(loss) - float(data["loss"])) < 1e-6 * max(1.0, float(data["loss"]))
    assert relative(d_activation, data["d_activation"]) < 1e-5
    if params:
        assert relative(d_params[learned], data["d_feedback"]) < 1e-5


def normalized(image):
    return jnp.asarray((image.astype(np.float32) / 255 - MEAN) / STD)


# Rounding compounds through backpropagation's chained gradients: up to 1.7e-3 in the logits after
# four steps, by the processor's instructions. (Ten times that in the form of a convolution that is
# taken where nobody asks for less rounding, where another element is a window's largest.)
@pytest.mark.parametrize(
    ("rule_name", "precision", "logits_bound", "params_bound"),
    [
        ("lls_mxm", "highest", 1e-5, 1e-5),
        ("lls_mxm", None, 5e-5, 1e-4),
        ("bp", "highest", 5e-3, 1e-2),
    ],
)
def test_four_training_steps(rule_name, precision, logits_bound, params_bound):
    with np.load(REFERENCE / f"smallconv_{rule_name}_sgd.npz") as store:
        data = {k: store[k] for k in store.files}
    model = models.make("small_conv", num_classes=10)
    rule = rules.make(rule_name, num_classes=10)
    tx = optax.sgd(0.05, momentum=0.9)

    def part(prefix):
        return {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}

    with jax.default_matmul_precision(precision):
        state = interop.from_lls_dnn(model, rule, tx, part("init/"))
        step = training.make_train_step(model, rule, tx)
        for i in range(4):
            batch = {
                "image": normalized(data[f"step{i}/image"]),
                "label": jnp.asarray(data[f"step{i}/label"].astype(np.int32)),
            }
            state, metrics = step(state, batch)
            assert relative(metrics["logits"], data[f"step{i}/logits"]) < logits_bound
            if rule_name != "bp":
                difference = metrics["layer_loss"] - data[f"step{i}/layer_loss"]
                assert np.abs(difference).max() < 1e-6
        final = part("final/")
        ours = interop.to_lls_dnn(model, state)
        assert ours.keys() == final.keys()
        for name in final:
            if "running_" in name or "num_batches" in name:
                continue  # PyTorch keeps the unbiased variance.
            bound = 10 * params_bound if name.endswith("bn.bias") else params_bound
            assert relative(ours[name], final[name]) < bound, name
        imported = interop.from_lls_dnn(model, rule, tx, final)
        logits = training.predict(model, imported, normalized(data["eval/image"]))
        assert relative(logits, data["eval/logits"]) < 1e-5


def test_import_names_what_does_not_fit():
    with np.load(REFERENCE / "smallconv_lls_mxm_sgd.npz") as store:
        init = {k.removeprefix("init/"): store[k] for k in store.files if k.startswith("init/")}
    model = models.make("small_conv", num_classes=10)
    with pytest.raises(ValueError, match=r"conv_block1\.feedback is unexpected"):
        interop.from_lls_dnn(model, rules.make("lls", num_classes=10), optax.sgd(0.1), init)
    rule = rules.make("lls_mxm", num_classes=10)
    truncated = {**init, "linear.weight": init["linear.weight"][:5]}
    del truncated["conv_block2.block.bn.weight"]
    with pytest.raises(ValueError) as caught:
        interop.from_lls_dnn(model, rule, optax.sgd(0.1), truncated)
    assert "conv_block2.block.bn.weight is missing" in str(caught.value)
    assert "linear.weight has shape (5, 512)" in str(caught.value)
