"""Train rules side by side at an equal budget, and say which differences are more than chance.

Rows are rules x reaches x models x budgets, each with the same seeds: one seed is one order of the
images and one set of initial weights for all of them. Finished runs are not repeated, one that was
stopped or killed goes on, one that diverges is noted. What is not given is as the board in the
folder has it, so that one option adds to it, like --rules my_package.module:rule.

Speed and memory are measured apart from training, the rows taking turns. Nothing is chosen by the
test images: an accuracy is that of the last step.
"""

from experiments import startup
from experiments.board.config import BoardConfig
from experiments.command_line import parse, run


def _board(config: BoardConfig) -> int:
    # Imported late: JAX takes longer to start than `--help` may take to answer.
    from experiments.board.command import board

    return board(config)


if __name__ == "__main__":
    config = parse(BoardConfig, "board", __doc__ or "")
    startup.prepare()
    run(lambda: _board(config))
