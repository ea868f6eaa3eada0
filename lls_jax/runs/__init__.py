"""Whole runs: training with callbacks, evaluation, metrics, checkpoints, resuming."""
