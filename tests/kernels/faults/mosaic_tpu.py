"""The TPU kernels: what they walk, copy, mask and sum."""

from tests.kernels.faults.fault import Fault

WALK, COPIES, TILE, MASKS, LAUNCH, FORWARD, GRADIENT, KEYS, QUERIES, TABLES, ARRANGE, PACKS = (
    f"pallas_kernels/mosaic_tpu/{name}.py"
    for name in (
        "walk",
        "copies",
        "tile",
        "masks",
        "launch",
        "forward",
        "gradient",
        "key_gradient",
        "query_gradient",
        "tables",
        "arrange",
        "arrange_keys",
    )
)
CLASS = "tests/kernels/test_mosaic_tpu.py::TestInterpreted::test_"
LOCAL, OFFSET, CHOSEN = (
    f"{CLASS}case[{name}]" for name in ("local stride", "an offset for each", "selection by KV head")
)
TURNS, NO_KEYS = (f"{CLASS}shape[{name}]" for name in ("many turns", "tiles without keys"))
SHARED = CLASS + "rows_that_share_lists[many turns]"

FAULTS = [
    Fault(
        "a step computed before its copies came", TILE,
        "                for place in places:\n                    ring.wait(plan, place)\n", "",
        LOCAL,
    ),
    Fault(
        "fewer places than steps on their way", COPIES,
        "PLACES = 2 * AT_ONCE", "PLACES = AT_ONCE",
        TURNS,
        "What a step needs is read before the next copies start, so that nothing but time is lost.",
    ),
    Fault(
        "copies beyond the end not waited for", TILE,
        "            for step in range(AT_ONCE):\n                self.ring.wait(self.plan",
        "            for step in range(0):\n                self.ring.wait(self.plan",
        LOCAL,
        "The interpreter does not look at semaphores when a kernel ends.",
    ),
    Fault("the same row copied again", TILE, "jnp.where(ends, row.following, cursor.row)", "cursor.row", LOCAL),
    Fault(
        "copies for a row that reads nothing", WALK,
        "jax.lax.cummin(jnp.where(reads, row, rows)", "jax.lax.cummin(jnp.where(reads, row, row)",
        NO_KEYS,
    ),
    Fault("the second part of a row taken for the first", WALK, "last >= end, other", "last > end, other", SHARED),
    Fault(
        "the last block seen twice", WALK,
        "jnp.where(number < row.total, entry", "jnp.where(number <= row.total, entry",
        SHARED,
    ),
    Fault(
        "what fills the last step seen", TABLES,
        "ends[total > 0] - 1]] | nothing << piece_bits", "ends[total > 0] - 1]] | 0 * nothing << piece_bits",
        LOCAL,
    ),
    Fault(
        "entries of a row not in whole steps", TABLES,
        "room, ends = -(-total // slots) * slots,", "room, ends = total,",
        LOCAL,
    ),
    Fault("a masked entry walked without a mask", WALK, "if part < plan.num_full", "if part <= plan.num_full", TURNS),
    Fault("masks of the slot before", MASKS, "jnp.where(lane < at, found,", "jnp.where(lane <= at, found,", LOCAL),
    Fault("positions of keys off by one", MASKS, "(plan.slot - 1)) + conditions.first", "(plan.slot - 1)) + 1", CHOSEN),
    Fault("the maximum not carried on", FORWARD, "before, most = most,", "before, _ = most,", LOCAL),
    Fault(
        "the sum not rescaled when a larger logit comes", FORWARD,
        "total = total * shrink + sum(", "total = total + sum(",
        TURNS,
    ),
    Fault("sums of the tile before", FORWARD, "    sums.clear()\n", "", TURNS),
    Fault("hidden gradients not zeroed", GRADIENT, ", jnp.where(seen, gradient, 0.0)", ", gradient", LOCAL),
    Fault("delta left out", GRADIENT, "weights * (dweights - delta)\n", "weights * dweights\n", LOCAL),
    Fault("lse of another head", KEYS, "round * plan.step_heads + head", "round * plan.step_heads", LOCAL),
    Fault("dk not scaled", KEYS, "sums.dkey[...] * plan.scale", "sums.dkey[...]", LOCAL),
    Fault("dq not scaled", QUERIES, "rows.gradient[...] * plan.scale", "rows.gradient[...]", LOCAL),
    Fault(
        "a list of another head", LAUNCH,
        "return lists[b * self.plan.head_tiles + h if whole else h], 0, 0", "return lists[0], 0, 0",
        TURNS,
    ),
    Fault("queries' first row forgotten", PACKS, "first_row * walked.pieces,", "first_row * 0,", OFFSET),
    Fault("packs put back in their own order", PACKS, "place[None, :, :num_blocks, None, None]",
          "jnp.arange(num_blocks)[None, None, :, None, None]", LOCAL),
    Fault("lse not to base 2", ARRANGE, "lse * LOG2E", "lse", LOCAL),
]  # fmt: skip
