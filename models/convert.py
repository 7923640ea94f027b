"""Chooses the layers of a dense model that become sparse: those whose attention the pattern already has.

    python -m models.convert --text novel.txt --pattern "LocalStride(64, 4, 3) | FirstBlocks(1)" --kv-budget 0.5

A layer's lost mass is the share of its softmax weights, over a calibration text, that lies where the pattern does not
read. The layers that lose most stay dense, as many as the budget allows. The choice goes to stdout as the flags that
models.generate takes, what it rests on to stderr.
"""

from models.interruption import end_at_once

if __name__ == "__main__":
    end_at_once("models.convert")  # the imports below take seconds

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from models.config import TransformerConfig
from models.extras import exit_for_missing
from models.transformer import Transformer
from s2jax import Dense, Pattern, attention, compile_cache
from s2jax.messages import counted
from s2jax.patterns import parse_pattern

try:
    from models.command_line import MODEL_HELP, Parser, check_text, load_named, run, say
except ModuleNotFoundError as error:
    exit_for_missing(error, "models.convert", "generate")


def lost_mass(model: Transformer, pattern: Pattern, tokens: Int[Array, "b t"]) -> Float[np.ndarray, " layers"]:
    """The mean share of softmax weights that every layer of a model, as it is, has outside the pattern.

    The sum of weights over a part of the keys is exp(lse of the part - lse of all), so that no weight is written out.
    """
    x = model.embed(tokens).astype(model.config.dtype)
    lost = []
    for layer in model.layers:
        share, x = _lost_by_layer(pattern, *nnx.split(layer), x)
        lost.append(share)
    return np.array(jax.device_get(lost))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _lost_by_layer(pattern: Pattern, graph: nnx.GraphDef, state: nnx.State, x: Array) -> tuple[Array, Array]:
    """The share, and the output of the layer as it is."""
    layer = nnx.merge(graph, state)
    layer_input, attend = layer.attention_norm(x), layer.attention
    query, (key, value) = attend.queries(layer_input), attend.keys_values(layer_input)
    settings = {"scale": attend.scale, "implementation": attend.implementation, "return_lse": True}
    own = attend.pattern
    heads, whole = attention(query, key, value, own, **settings)
    _, part = attention(query, key, value, pattern if own == Dense() else own & pattern, **settings)
    x = x + attend.out(heads)
    return 1 - jnp.exp(part - whole).mean(), x + layer.mlp(layer.mlp_norm(x))


def dense_layers_within(lost: Float[np.ndarray, " layers"], share: float, budget: float) -> tuple[int, ...]:
    """The layers that lose most, as many as may stay dense.

    Args:
        lost: the lost mass of each layer.
        share: what a sparse layer takes of what a dense one does.
        budget: what all layers together may take of what they did.

    Raises:
        ValueError: the budget is below what sparse layers alone take.
    """
    if not share <= budget <= 1:
        raise ValueError(
            f"the budget must be from {share:.3f}, which the pattern takes in all layers, to 1, got {budget}"
        )
    count = len(lost) if share == 1 else int(len(lost) * (budget - share) / (1 - share) + 1e-9)
    return tuple(sorted(np.argsort(-lost, kind="stable")[:count].tolist()))


def kv_share(config: TransformerConfig, pattern: Pattern, length: int) -> float:
    """The share of a dense layer's cache that a sparse layer needs at a context of `length` tokens."""
    layout = compile_cache(pattern, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, max_length=length)
    return layout.nbytes(1, 1, 1) / (2 * config.num_kv_heads * -(-length // layout.block_size) * layout.block_size)


def main(argv: list[str] | None = None) -> int:
    """Runs the program; returns its exit code, see `models.command_line.run`."""
    return run("models.convert", _convert, argv)


def _convert(argv: list[str] | None) -> None:
    given = _parser().parse(argv)
    pattern = parse_pattern(given.pattern)
    for flag, count in (("--tokens", given.tokens), ("--length", given.length)):
        if count is not None and count < 1:
            raise ValueError(f"{flag} must be at least 1, got {count}")
    text = _text(given.text)
    pretrained = load_named(given.model)
    config, length = pretrained.model.config, pretrained.max_context if given.length is None else given.length
    ids = pretrained.encode(text)[: given.tokens]
    if len(ids) < given.tokens:
        raise ValueError(f"{given.text} must hold {counted(given.tokens, 'token')}, see --tokens, got {len(ids)}")
    if given.kv_budget is not None:
        share, budget = kv_share(config, pattern, length), given.kv_budget
    else:
        share, budget = pattern.density(config.num_heads, config.num_kv_heads, length), given.flops_budget
    dense_layers_within(np.zeros(config.num_layers), share, budget)  # before anything takes long
    say(f"measuring {counted(config.num_layers, 'layer')} …")
    lost = lost_mass(pretrained.model, pattern, jax.device_put(np.asarray([ids], np.int32)))
    if not np.isfinite(lost).all():
        raise FloatingPointError("the model's attention is NaN on this text: its weights are broken, or it overflows")
    dense = np.array([config.layer_pattern(layer) == Dense() for layer in range(config.num_layers)])
    # A layer that the checkpoint records as sparse cannot stay dense.
    ranked = dense_layers_within(np.where(dense, lost, -1), share, budget)
    chosen = [layer for layer in ranked if dense[layer]]
    for layer, each in enumerate(lost):
        say(f"layer {layer:2}: {each:6.1%} lost{', stays dense' if layer in chosen else ''}")
    say(f"a sparse layer takes {share:.1%} of a dense one, at {counted(length, 'token')}")
    layers = " ".join(["", "--dense-layers", *map(str, chosen)]) if chosen else ""
    print(f'--pattern "{check_text("--pattern", given.pattern)}"{layers}')


def _text(path: str) -> str:
    try:
        return pathlib.Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path} must be UTF-8 text: {error.reason} at byte {error.start}") from error


def _parser() -> Parser:
    parser = Parser(prog="python -m models.convert", description=__doc__)
    parser.add_argument("--model", help=MODEL_HELP)
    parser.add_argument("--text", required=True, help="a UTF-8 file to calibrate on")
    parser.add_argument(
        "--pattern", required=True, help="pattern of the sparse layers, such as 'LocalStride(64, 16, 3)'"
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--kv-budget", type=float, help="share of a dense model's KV cache, from 0 to 1")
    budget.add_argument("--flops-budget", type=float, help="share of a dense model's attention FLOPs, from 0 to 1")
    parser.add_argument("--length", type=int, help="context length of the budget; default the model's longest")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the text to use; default %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
