"""The pattern and the dense layers of a model in its checkpoint's config.json, under the key `s2jax`.

    "s2jax": {"pattern": "LocalStride(block_size=64, local_blocks=16, vert_stride=8)", "dense_layers": [0, 1]}

Other readers ignore the key and attend densely in every layer.
"""

from collections.abc import Mapping
from typing import Any

from models.config import TransformerConfig
from models.untrusted import quoted
from s2jax.patterns import parse_pattern

KEY = "s2jax"


def saved_pattern(config: TransformerConfig) -> dict[str, Any]:
    """The entry of config.json that records what the layers of a model attend to."""
    return {KEY: {"pattern": str(config.pattern), "dense_layers": list(config.dense_layers)}}


def pattern_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields `pattern` and `dense_layers` of `TransformerConfig` that a config.json records; none if it has no key.

    Args:
        values: the object in config.json.

    Raises:
        ValueError: in one line, if the entry is malformed, or its pattern has no text from which it can be built.
    """
    if KEY not in values:
        return {}
    entry = values[KEY]
    if not isinstance(entry, dict) or entry.keys() != {"pattern", "dense_layers"}:
        raise ValueError(f"config.json must have an object of pattern and dense_layers as {KEY!r}, got {quoted(entry)}")
    text, layers = entry["pattern"], entry["dense_layers"]
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise ValueError(f"config.json must have a list of layer indices as dense_layers, got {quoted(layers)}")
    if not isinstance(text, str):
        raise ValueError(f"config.json must have the text of a pattern as {KEY!r}, got {quoted(text)}")
    try:
        return {"pattern": parse_pattern(text), "dense_layers": tuple(layers)}
    except ValueError as error:
        raise ValueError(
            f"config.json names a pattern that cannot be built from its text, {quoted(text)}; give the pattern that "
            "the model was trained with (pattern= in load, --pattern on the command line)"
        ) from error
