"""What is read: patterns compiled to schedules, the same seen from the keys, tiles, and selections."""

from tests.kernels.faults.fault import Fault, case, in_two_passes

TILES, SCHEDULE, BACKWARD = "pallas_kernels/tiles.py", "pallas_kernels/schedule.py", "pallas_kernels/xla/backward.py"
WALKS, LAYOUT = "pallas_kernels/xla/walks.py", "pallas_kernels/xla/layout.py"
COMPILER, BANDS = "s2jax/compiler.py", "s2jax/patterns/bands.py"

COMPILED = "tests/s2jax/test_compiler.py::test_"

FAULTS = [
    # What is read.
    Fault(
        "the window one block too wide", "s2jax/patterns/local_stride.py",
        "block_high=left)", "block_high=left + 1)",
        COMPILED + "a_schedule_reads_what_its_pattern_reads",
    ),
    Fault(
        "stripes a block off", "s2jax/patterns/striped.py",
        "np.arange(num_columns) + residue)", "np.arange(num_columns) + residue + 1)",
        COMPILED + "a_schedule_reads_what_its_pattern_reads",
    ),
    Fault(
        "every list cut short by one", COMPILER,
        "np.searchsorted(blocks, row - low + 1)", "np.searchsorted(blocks, row - low)",
        COMPILED + "a_schedule_reads_what_its_pattern_reads",
    ),
    Fault(
        "every list begins one late", COMPILER,
        "np.searchsorted(blocks, row - high + 1)", "np.searchsorted(blocks, row - high + 2)",
        COMPILED + "a_schedule_reads_what_its_pattern_reads",
    ),
    Fault(
        "a window of tokens one token short", COMPILER,
        "(apart >= band.token_low)", "(apart > band.token_low)",
        case("window of tokens"),
    ),
    Fault(
        "one token mask for all blocks at a distance", COMPILER,
        "ids[rest] = named[which.reshape(-1)]", "ids[rest] = named[0]",
        COMPILED + "a_schedule_of_the_case_table",
    ),
    Fault(
        "the edge of a coarse block cut short", BANDS,
        "core[1], core[1] + ratio - 1", "core[1], core[1] + ratio - 2",
        COMPILED + "a_schedule_of_the_case_table",
    ),
    Fault(
        "a schedule for every layer", COMPILER,
        "@functools.lru_cache(maxsize=256)\n", "",
        COMPILED + "schedules_are_cached",
    ),
    # The same from the keys.
    Fault(
        "the first reader of a stripe left out", SCHEDULE,
        'np.searchsorted(high, positions, side="right")', 'np.searchsorted(high, positions, side="left")',
        COMPILED + "transposed_lists_hold_the_same_entries",
    ),
    Fault(
        "transposed entries by row, not by column", SCHEDULE,
        "np.lexsort((rows, columns))", "np.lexsort((columns, rows))",
        COMPILED + "transposed_lists_hold_the_same_entries",
    ),
    Fault(
        "masks of transposed entries in the old order", SCHEDULE,
        "lists.masks[positions][order]", "lists.masks[positions]",
        COMPILED + "transposed_lists_hold_the_same_entries",
    ),
    Fault(
        "masks swapped between the rows of a tile", TILES,
        "kinds[entry.reshape(-1), row] =", "kinds[entry.reshape(-1), size - 1 - row] =",
        COMPILED + "merged_neighbours_read_what_each_reads",
    ),
    Fault(
        "a tile loses a block where its rows begin apart", TILES,
        "np.where(shared[:, None], low[:, None], stop)", "np.where(shared[:, None], low[:, None] - 1, stop)",
        COMPILED + "merged_packs_read_what_each_reads",
    ),
    Fault(
        "a token mask not transposed for the keys", BACKWARD,
        "masks.transpose(0, 2, 4, 1, 3)", "masks.transpose(0, 2, 3, 1, 4)",
        in_two_passes("local stride"),
    ),
    # Selections.
    Fault(
        "all blocks of a selection read, whatever their count", WALKS,
        "first + jnp.clip(selection.counts, 0, most)", "first + jnp.full_like(selection.counts, most)",
        case("selection"),
    ),
    Fault(
        "a selection transposed by entry, not by row", WALKS,
        "dtype=jnp.int32) // most)[None]", "dtype=jnp.int32) % most)[None]",
        in_two_passes("selection"),
    ),
    Fault(
        "queries of a selection do not see themselves", LAYOUT,
        "allowed &= key.position <= query.position", "allowed &= key.position < query.position",
        case("selection for each"),
    ),
    Fault(
        "a selection that forgets the offset", LAYOUT,
        "position = index if offset is None else index + offset[batch][..., None]", "position = index",
        case("selection from an offset"),
    ),
]  # fmt: skip
