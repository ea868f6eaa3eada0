"""What `python -m experiments.benchmark` can measure, one module a suite."""
