"""Perplexity, time and cache of a dense model whose attention is made sparse: SmolLM2-135M on a novel.

    python -m experiments.perplexity                     # needs `make .venv/.test`; about 15 minutes on two cores

No weight changes: every row is the same model with another pattern. Perplexity is that of 8,192 tokens in one context,
the model's longest, by position. Times are those of one prefill, the logits of all tokens included, and of one decoded
token at the end, compiled and warm. Bytes are those of all layers' caches. Everything is float32.
"""

import functools
import itertools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from benchmarks.record import parser, save, table
from experiments.novels import novels
from models.checkpoints import smollm2
from models.checkpoints.pretrained import load
from models.convert import lost_mass
from s2jax.patterns import parse_pattern

TITLE = "Persuasion"
BANDS = (0, 1024, 2048, 4096, 8192)
STEPS = 12
SPARSE = "LocalStride(64, 4, 3) | FirstBlocks(1)"
EVERY_FIFTH = (0, 1, 6, 11, 16, 21, 26)
CALIBRATION, CALIBRATION_TOKENS = "Emma", 4096
"""The text on which models.convert ranks layers, for the case whose dense layers are None."""
CASES = (
    ("dense", "Dense()", ()),
    ("window of 512", "Local(8)", ()),
    ("window of 512, first block", "Local(8) | FirstBlocks(1)", ()),
    ("window of 3520, first block", "Local(55) | FirstBlocks(1)", ()),
    ("stride 3, window of 1024, first block", "LocalStride(64, 16, 3) | FirstBlocks(1)", ()),
    ("stride 3, window of 256, first block", SPARSE, ()),
    ("stride 8, window of 256, first block", "LocalStride(64, 4, 8) | FirstBlocks(1)", ()),
    ("stride 3, window of 256", "LocalStride(64, 4, 3)", ()),
    ("all heads alike, first block", "LocalStride(64, 4, 3, homo_head=True) | FirstBlocks(1)", ()),
    ("hybrid: that, and layers 0 and 1 dense", SPARSE, (0, 1)),
    ("hybrid: 0, 1 and one in five dense", SPARSE, EVERY_FIFTH),
    ("hybrid: as many dense, those that lose most", SPARSE, None),
)


def measure(
    name: str,
    text: str,
    dense_layers: tuple[int, ...],
    tokens: np.ndarray,
    path: pathlib.Path | None = None,  # of a model other than SmolLM2 itself
) -> dict:
    pretrained = load(path or smollm2.fetch(), parse_pattern(text), dense_layers=dense_layers, dtype="float32")
    model, length = pretrained.model, tokens.shape[1]
    graph, state = nnx.split(model)
    caches = model.create_caches(1, max_length=length + 64)

    @functools.partial(jax.jit, donate_argnums=2)
    def prefill(state, tokens, caches):
        logits, caches = nnx.merge(graph, state).prefill(tokens, caches, last=False)
        logits, following = logits[0, :-1], tokens[0, 1:]
        chosen = jnp.take_along_axis(logits, following[:, None], 1)[:, 0]
        return jax.nn.logsumexp(logits, -1) - chosen, caches

    @functools.partial(jax.jit, donate_argnums=2)
    def decode(state, token, caches):
        logits, caches = nnx.merge(graph, state).extend(token, caches)
        return logits[:, -1].argmax(-1, keepdims=True), caches

    begin = prefill.lower(state, tokens, caches).compile()
    start = time.perf_counter()
    losses, caches = jax.block_until_ready(begin(state, tokens, caches))
    prefill_s, token, times = time.perf_counter() - start, jnp.asarray(tokens[:, -1:]), []
    for _ in range(STEPS):
        start = time.perf_counter()
        token, caches = jax.block_until_ready(decode(state, token, caches))
        times.append(time.perf_counter() - start)
    row = {"reads": name, "pattern": text, "dense layers": list(dense_layers)}
    row |= {f"to {stop}": float(np.exp(losses[start : stop - 1].mean())) for start, stop in _bands(length)}
    return row | {
        "all": float(np.exp(losses.mean())),
        "cache MiB": sum(cache.nbytes for cache in caches) / 2**20,
        "prefill s": prefill_s,
        "decode ms": float(np.median(times[2:])) * 1e3,
    }


def losing_most(tokenizer: Tokenizer, count: int) -> tuple[int, ...]:
    """The layers whose softmax loses most to the pattern, on another novel."""
    ids = tokenizer.encode(novels()[CALIBRATION]).ids[:CALIBRATION_TOKENS]
    lost = lost_mass(load(smollm2.fetch(), dtype="float32").model, parse_pattern(SPARSE), jnp.asarray([ids]))
    return tuple(sorted(np.argsort(-lost)[:count].tolist()))


def _bands(length: int) -> list[tuple[int, int]]:
    return [(start, stop) for start, stop in itertools.pairwise(BANDS) if stop <= length]


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--tokens", type=int, default=BANDS[-1], help="tokens of the context")
    arguments.add_argument(
        "--rows",
        nargs="+",
        choices=[case[0] for case in CASES],
        help="rows to measure; others keep their figures",
    )
    given = arguments.parse_args()
    tokenizer = load(smollm2.fetch()).tokenizer
    ids = tokenizer.encode(novels()[TITLE]).ids[: given.tokens]
    tokens, rows = np.array([ids], np.int32), []
    for name, text, dense_layers in CASES:
        if given.rows is None or name in given.rows:
            layers = losing_most(tokenizer, len(EVERY_FIFTH)) if dense_layers is None else dense_layers
            rows.append(measure(name, text, layers, tokens))
            print({name: value for name, value in rows[-1].items() if name != "pattern"}, flush=True)
    print(table(rows, list(rows[0])))
    if len(ids) == BANDS[-1]:
        path = given.folder / "perplexity.json"
        known = {row["reads"]: row for row in (json.loads(path.read_text())["rows"] if given.rows else rows)}
        known |= {row["reads"]: row for row in rows}
        rows = [known[name] for name, *_ in CASES if name in known]
        save("perplexity", rows, given.folder, model=smollm2.REQUIREMENT, text=f"{TITLE}, the first {len(ids)} tokens")


if __name__ == "__main__":
    main()
