"""What the options of a training run choose from, and how they are typed."""

SCHEDULES = ("constant", "multistep", "cosine", "linear", "plateau")
VIEWS = ("none", "flip", "flip_translate")
PRECISIONS = ("float32", "bfloat16")
LOOPS = ("auto", "dispatch", "scan")
ON_DEVICE = ("auto", "yes", "no")
MEASURES = ("alignment", "norms", "probes", "heads")
KERNELS = ("auto", "xla", "split", "pallas", "triton")
# Rules whose blocks have no losses of their own.
BASELINES = ("bp", "dfa", "drtp")
# Options of rules, by the field of a config that holds them: the name that a rule's class has.
OF_RULES = {
    "waveform": "waveform",
    "temperature": "temperature",
    "label_smoothing": "label_smoothing",
    "basis_rows": "basis_rows",
    "kernels": "implementation",
    "feedback_sign": "sign",
    "auxiliary_depth": "auxiliary_depth",
}
# How a block's batch is cut, where that is of any use.
OF_CUTS = ("remat", "slice")
# What blocks with losses of their own alone can be told, beside what their rule has.
OF_LOCAL_LOSSES = ("reach", *OF_CUTS, "pipeline", "stages")

# Averages of the weights take the place of a falling learning rate.
AVERAGING = ("schedule_free_adamw", "optax_schedule_free_adamw", "schedule_free_sgd")
OPTIMIZERS = (*AVERAGING, "adamw", "adam", "sgd", "muon")
# Schedules that spread over all epochs: another number of them is another run from the start.
SPREADING = ("multistep", "cosine", "linear")
TRACKERS = ("tensorboard", "mlflow", "wandb")


def option(name: str) -> str:
    """An option as it is typed: ``batch_size`` is ``--batch-size``."""
    return "--" + name.replace("_", "-")
