"""The race against PyTorch, and the ways to save backpropagation's memory; nothing is timed."""

import dataclasses
import io
import json
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import benchmark
from experiments.config import TrainConfig
from experiments.suites import against_torch, baselines, torch_loop
from experiments.suites import training as suites_training
from lls_jax import models, rules, training
from lls_jax.errors import UserError
from lls_jax.rules.basis import periodic_basis

# Answers every line as the PyTorch loop does: step i of its life took i seconds.
ECHO = """
    import json, sys
    description = json.loads(sys.stdin.readline())
    print(json.dumps({"torch": "9.9", "threads": description["threads"]}), flush=True)
    done = 0
    for line in sys.stdin:
        steps = int(line)
        print(json.dumps({"seconds": list(range(done + 1, done + steps + 1))}), flush=True)
        done += steps
"""


def program(folder, text):
    path = folder / "program.py"
    path.write_text(textwrap.dedent(text))
    return [sys.executable, str(path)]


def described(rule="lls_mxm", model="small_conv", precision="float32"):
    config = TrainConfig(rule=rule, model=model, batch_size=4, precision=precision)
    return against_torch.describe(suites_training.make_benchmark_task(config), config, 0)


def test_turns_give_the_ratio_and_its_spread(tmp_path):
    with against_torch.Rival(program(tmp_path, ECHO), {"threads": 3}) as rival:
        rival.advance(2, keep=False)
        for _ in range(3):
            rival.advance(2, keep=True)
    # Turns of 3 + 4, 5 + 6 and 7 + 8 seconds.
    assert rival.times == [3, 4, 5, 6, 7, 8]
    row = against_torch.compare([1.0, 2.5, 0.5, 0.5, 1.0, 4.0], rival, 2, 11)
    assert row["times_torch_turns"] == [2.0, 11.0, 3.0]
    assert (row["times_torch"], row["times_torch_min"], row["times_torch_max"]) == (3.0, 2.0, 11.0)
    assert row["torch_images_per_second"] == 2.0
    assert row["torch_step_ms"] == [3e3, 4e3, 5e3, 6e3, 7e3, 8e3]
    assert (row["torch"], row["torch_threads"]) == ("9.9", 3)


def test_a_race_has_a_rival_for_each_rule_and_none_for_baselines(tmp_path, monkeypatch, capsys):
    script = ECHO.replace('description["threads"]', "2")
    monkeypatch.setattr(against_torch, "_PROGRAM", program(tmp_path, script)[1])
    config = benchmark.BenchmarkConfig(
        rules=["lls"], batch_sizes=[2], turns=2, against="torch", out=str(tmp_path)
    )
    assert benchmark.benchmark(config) == 0
    rows = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    # Two images make no four micro-batches.
    assert [row["rule"] for row in rows] == ["lls", "bp", "bp, checkpointed"]
    assert ["times_torch" in row for row in rows] == [True, True, False]
    for row in rows[:2]:
        # After three steps to warm up.
        assert row["torch_step_ms"] == [1e3 * second for second in range(4, 14)]
        ours = np.array(row["all_step_ms"]).reshape(2, 5).sum(1)
        np.testing.assert_allclose(row["times_torch_turns"], [30e3 / ours[0], 55e3 / ours[1]])
    printed = capsys.readouterr().out
    assert "torch 9.9 (2 threads), both with adamw" in printed
    assert "| torch images/s | times torch | least | most |" in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys; sys.exit('first\\nout of luck')", "ended with status 1: out of luck"),
        ("import os; os.kill(os.getpid(), 9)", "ended with status -9: it said nothing"),
        (ECHO + "        raise SystemExit('too many')", "ended with status 1: too many"),
    ],
)
def test_a_rival_that_ends_says_why(tmp_path, text, message):
    def play():
        with against_torch.Rival(program(tmp_path, text), {"threads": 1}) as rival:
            rival.advance(1, keep=True)
            rival.advance(1, keep=True)

    with pytest.raises(UserError, match=message):
        play()


def test_without_pytorch_one_line_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match=r"No module named 'torch'.*`pip install torch`.*--torch-p"):
        against_torch.Rival(against_torch.command(None), described())
    with pytest.raises(UserError, match=r"nowhere does not start .*--torch-python takes the path"):
        against_torch.Rival(against_torch.command("/nowhere"), {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"against": "jax"}, "--against is 'jax'; expected one of torch"),
        ({"against": "torch", "suite": "epochs"}, "--against is of --suite training, not epochs"),
        ({"against": "torch", "rules": ["dfa"]}, "--rules dfa does not go with --against torch"),
        ({"against": "torch", "groups": "2,2"}, "--groups 2,2 does not go with --against torch"),
        ({"torch_python": "python"}, "--torch-python is of --against torch"),
        ({"suite": "pipeline", "precisions": ["bfloat16"]}, "--precisions is of --suite training"),
    ],
)
def test_no_race_of_what_cannot_be_raced(options, message):
    with pytest.raises(ValueError, match=message):
        benchmark.BenchmarkConfig(**options)


def test_no_race_of_blocks_that_the_loop_lacks():
    with pytest.raises(UserError, match="kind WhitenedConvPair, which model 'airbench' has"):
        described(model="airbench")


@pytest.mark.parametrize("model", ["small_conv", "vgg8", "mobilenet_v1"])
def test_the_description_is_that_of_the_network(model):
    description = json.loads(json.dumps(described(model=model)))
    network = models.make(model, num_classes=10)
    config = TrainConfig(model=model)
    image = jnp.zeros(suites_training.make_benchmark_task(config).spec.input_shape)
    shapes, _ = jax.eval_shape(
        lambda key: network.init(rules.make("lls", num_classes=10), key, image), jax.random.key(0)
    )
    assert len(description["blocks"]) == len(network.specs)
    for name, block in zip(network.block_names, description["blocks"]):
        first = jax.tree.leaves(
            {part: shapes[name]["block"].get(part) for part in ("conv", "linear", "depthwise")}
        )[-1]
        inputs = first.shape[-1 if block["kind"] == "depthwise_separable" else -2]
        assert block["inputs"] == inputs
        assert np.shape(block["basis"])[0] == 10
    assert description["features"] == shapes["classifier"]["linear"]["kernel"].shape[0]


def test_the_loss_is_the_librarys():
    torch = pytest.importorskip("torch")
    module = models.make("small_conv", num_classes=10).specs[1].module
    rule = rules.make("lls_mxm", num_classes=10)
    generator = np.random.default_rng(0)
    x = generator.standard_normal((6, 8, 8, 3)).astype(np.float32)
    labels = generator.integers(0, 10, 6)
    modulation = generator.standard_normal((10, 10)).astype(np.float32)
    variables = module.init(jax.random.key(0), x)
    kernel, bias = (np.array(variables["params"]["conv"][name]) for name in ("kernel", "bias"))
    activation, _ = module.apply(variables, x, train=True, mutable=["batch_stats"])
    expected = rule.loss({"modulation": modulation}, activation, labels, pool_size=2)
    block = {"kind": "conv", "inputs": 3, "features": module.features, "stride": 1}
    layers = torch_loop.make_layers(block)
    with torch.no_grad():
        layers[0].weight.copy_(torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()))
        layers[0].bias.copy_(torch.from_numpy(bias))
    found = torch_loop.local_loss(
        layers(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())),
        torch.from_numpy(periodic_basis(10, 4 * module.features).copy()),
        torch.from_numpy(modulation),
        torch.from_numpy(labels),
        pool_size=2,
        temperature=rule.temperature,
    )
    assert found.item() == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize(
    ("rule", "precision"),
    [
        *((rule, "float32") for rule in ("lls", "lls_m", "lls_mxm", "bp")),
        ("lls_mxm", "bfloat16"),
        ("bp", "bfloat16"),
    ],
)
def test_the_pytorch_loop_learns(rule, precision):
    torch = pytest.importorskip("torch")
    description = described(rule, precision=precision)
    answers = io.StringIO()
    lines = io.StringIO(json.dumps(description) + "\n2\n")
    torch_loop.serve(lines, answers)
    hello, seconds = map(json.loads, answers.getvalue().splitlines())
    assert hello["torch"] == torch.__version__
    assert len(seconds["seconds"]) == 2
    loop = torch_loop.Loop(description)
    before = [parameter.detach().clone() for parameter in loop.blocks[0].parameters()]
    loop.step()
    changed = [not torch.equal(old, new) for old, new in zip(before, loop.blocks[0].parameters())]
    assert all(changed)
    assert {parameter.dtype for parameter in loop.blocks[0].parameters()} == {torch.float32}
    computed = []
    loop.blocks[0].layers[0].register_forward_hook(lambda *call: computed.append(call[2].dtype))
    loop.step()
    assert computed == [getattr(torch, precision)]
    assert loop.losses.shape == ((1,) if rule == "bp" else (5,))


def bp_of(side=8, batch=8):
    model = models.make("small_conv", num_classes=10)
    rule, tx = rules.make("bp", num_classes=10), optax.sgd(0.1)
    image_key, label_key, key = jax.random.split(jax.random.key(0), 3)
    images = jax.random.normal(image_key, (batch, side, side, 3))
    labels = jax.random.randint(label_key, (batch,), 0, 10)
    state = training.create_train_state(model, rule, tx, key, images)
    step = training.make_train_step(model, rule, tx)
    return model, tx, state, step, {"image": images, "label": labels}


def assert_close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


@pytest.mark.parametrize("kind", ["checkpointed", "one part"])
def test_saving_memory_changes_no_number(kind):
    model, tx, state, step, batch = bp_of()
    if kind == "checkpointed":
        saving = baselines.make_checkpointed_step(model, tx)
    else:
        saving = baselines.make_accumulating_step(model, tx, 1)
    found, found_metrics = saving(jax.tree.map(jnp.copy, state), batch)
    expected, metrics = step(state, batch)
    assert_close(found._replace(key=0), expected._replace(key=0))
    assert_close(found_metrics, metrics)


def test_accumulated_gradients_are_the_mean_of_the_parts():
    model, tx, state, step, batch = bp_of()
    half = {name: array[:4] for name, array in batch.items()}
    twice = {name: jnp.concatenate([array, array]) for name, array in half.items()}
    accumulating = baselines.make_accumulating_step(model, tx, 2)
    found, metrics = accumulating(jax.tree.map(jnp.copy, state), twice)
    # Of two equal parts each has the gradient, and the statistics, of the whole.
    expected, whole = step(state, half)
    assert_close(found.params, expected.params)
    assert_close(metrics["loss"], whole["loss"])
    assert metrics["logits"].shape == (8, 10)
    with pytest.raises(ValueError, match="a batch of 8 has no 3 equal parts"):
        baselines.make_accumulating_step(model, tx, 3)(found, batch)


def test_baselines_are_raced_where_bp_is():
    config = TrainConfig(rule="bp", batch_size=128)
    labels = [entrant.label for entrant in suites_training.with_baselines(config)]
    assert labels == ["bp", "bp, checkpointed", "bp, 4 x 32"]
    labels = [
        entrant.label
        for entrant in suites_training.with_baselines(dataclasses.replace(config, batch_size=6))
    ]
    assert labels == ["bp", "bp, checkpointed"]
