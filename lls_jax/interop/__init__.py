"""To and from other libraries: LLS-DNN's PyTorch files, PyTorch state dicts, safetensors."""

from lls_jax.interop.lls_dnn import from_lls_dnn, to_lls_dnn
from lls_jax.interop.state_dicts import (
    from_state_dict,
    load_safetensors,
    save_safetensors,
    to_state_dict,
)

__all__ = [
    "from_lls_dnn",
    "from_state_dict",
    "load_safetensors",
    "save_safetensors",
    "to_lls_dnn",
    "to_state_dict",
]
