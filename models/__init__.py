"""A Llama-style decoder with sparsely-sharded attention, in Flax NNX.

The names below are imported when they are first used: JAX's import takes seconds, before which a program of this
package must have its handler of Ctrl-C.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from models.accounting import flops_per_token, param_count
    from models.config import TransformerConfig, hybrid_dense_layers
    from models.presets import PRESETS
    from models.sharding import partition_specs
    from models.transformer import Transformer

__all__ = [
    "PRESETS",
    "Transformer",
    "TransformerConfig",
    "flops_per_token",
    "hybrid_dense_layers",
    "param_count",
    "partition_specs",
]

_MODULES = {
    "PRESETS": "models.presets",
    "Transformer": "models.transformer",
    "TransformerConfig": "models.config",
    "flops_per_token": "models.accounting",
    "hybrid_dense_layers": "models.config",
    "param_count": "models.accounting",
    "partition_specs": "models.sharding",
}


def __getattr__(name: str) -> typing.Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'models' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
