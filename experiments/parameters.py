"""How many parameters a network's blocks have, and how many their rule adds."""

from typing import Any, NamedTuple

import jax

from experiments.setup import Task, example_image


class BlockParameters(NamedTuple):
    """Of a block, or of the classifier.

    Attributes:
        name: the block's.
        own: numbers that the block learns.
        rule: numbers that its rule has beside it, learned or fixed.
    """

    name: str
    own: int
    rule: int


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def count_parameters(task: Task) -> list[BlockParameters]:
    """Count from shapes; nothing is drawn.

    Args:
        task: network and rule.

    Returns:
        One entry a block, in order, then the classifier's.
    """
    image = example_image(task.spec)
    params, _ = jax.eval_shape(
        lambda key: task.model.init(task.rule, key, image), jax.random.key(0)
    )
    blocks = [
        BlockParameters(name, _size(params[name]["block"]), _size(params[name].get("rule", {})))
        for name in task.model.block_names
    ]
    return [*blocks, BlockParameters("classifier", _size(params["classifier"]), 0)]
