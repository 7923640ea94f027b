"""Time to transpose blocks chosen at run time, as the gradients of keys and values require.

    python -m benchmarks.selection

A schedule is transposed once, on the host. A selection is transposed on the device in every backward pass: one sort of
its entries by KV tile and row of queries. The forward pass over the same selection, by the platform's backend, is timed
for comparison.
"""

import functools
import statistics

import jax

import s2jax
from benchmarks.attention import timed
from benchmarks.record import parser, save, table
from pallas_kernels.mosaic_gpu.sm90.inputs import selection_kv_tables
from pallas_kernels.problem import Operands

HEADS, FEATURES, BLOCK, MOST = 8, 128, 64, 32


def measure(tokens: int, repeats: int) -> dict:
    """Times a selection in which every row and head reads `MOST` random blocks of its past."""
    rows, shape = tokens // BLOCK, (1, tokens, HEADS, FEATURES)
    *keys, of_scores = jax.random.split(jax.random.key(0), 4)
    query, key, value = (jax.random.normal(each, shape, "bfloat16") for each in keys)
    scores = jax.random.normal(of_scores, (1, HEADS, rows, rows))
    selection = s2jax.BlockSelection.top_k(scores, MOST, block_size=BLOCK, query_block=BLOCK)

    def transpose(selection, query, key, value):
        tables = selection_kv_tables(Operands(query, key, value, selection), 32)
        return tables.blocks, tables.mask_ids, tables.ranges

    def forward(selection, query, key, value):
        return s2jax.attention(query, key, value, selection)

    functions = {"transpose": jax.jit(transpose), "forward": jax.jit(forward)}
    seconds = timed(functions, (selection, query, key, value), repeats)
    row = {"tokens": tokens, "KV heads": HEADS, "entries": int(selection.counts.sum())}
    row |= {f"{name} ms": statistics.median(each) * 1e3 for name, each in seconds.items()}
    return row | {"share": row["transpose ms"] / row["forward ms"]}


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--tokens", type=int, nargs="+", default=[8 << 10, 32 << 10], help="lengths")
    options.add_argument("--repeats", type=int, default=5, help="counted runs of each function")
    chosen = options.parse_args()
    rows = list(map(functools.partial(measure, repeats=chosen.repeats), chosen.tokens))
    print(table(rows, list(rows[0])))
    save("selection", rows)


if __name__ == "__main__":
    main()
