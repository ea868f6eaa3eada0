"""What the tree promises: no Flax where there need be none, lazy modules, small files."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def python(script):
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_rules_layers_and_the_local_update_import_no_flax():
    script = """
import sys
sys.modules["flax"] = None  # Importing it is an error.
import jax, optax
from lls_jax import local_update, rules
from lls_jax.layers import convolution, initializers, normalization, ordering, winograd
from lls_jax.steps.block import start_block
for name in rules.NAMES:
    rule = rules.make(name, num_classes=3, **({"basis_rows": 2} if "reduced" in name else {}))
rule = rules.make("lls_mxm", num_classes=3)
state = start_block(rule, optax.sgd(0.1), jax.random.key(0), jax.numpy.eye(8), (8,), pool_size=8)
print("flax" in {module.split(".")[0] for module, found in sys.modules.items() if found})
"""
    assert python(script).strip() == "False"


def test_the_package_is_imported_without_jax_and_its_modules_when_they_are_used():
    script = """
import sys, lls_jax
assert "jax" not in sys.modules and "numpy" not in sys.modules
assert "rules" in dir(lls_jax) and lls_jax.rules.LLS and callable(lls_jax.fit)
from lls_jax import evaluation, fit, interop, models, rules, training
import jax
# No device was touched: one may still be chosen.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 3)
assert len(jax.devices()) == 3
try:
    lls_jax.no_such_thing
except AttributeError as error:
    print(error)
"""
    assert "no attribute 'no_such_thing'" in python(script)


@pytest.mark.parametrize("package", ["lls_jax", "pallas_kernels", "experiments"])
def test_files_are_small_and_nobody_probes(package):
    for path in (ROOT / package).rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 350, path
        assert not re.search(r"\b(get|has)attr\((self\.)?(rule|block|module|spec)\b", text), path
