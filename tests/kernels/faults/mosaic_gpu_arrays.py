"""What the Hopper kernel is given and what is made of its results: padding, tables, segments, tiles, refusals."""

from tests.kernels.faults.fault import Fault, hopper_shape, interpreted, machine_code

ARRANGE, TABLES, SIZES, PLAN, CHIP, BACKEND, FORWARD, LAUNCH = (
    f"pallas_kernels/mosaic_gpu/{name}.py"
    for name in ("arrange", "tables", "tiles", "plan", "chip", "__init__", "forward", "launch")
)
GRID, MERGED, SEGMENTS, UNREAD = (f"pallas_kernels/{name}.py" for name in ("grid", "tiles", "segments", "unread"))
FOUR_HEADS, TWO_HEADS = hopper_shape("four heads a tile"), hopper_shape("two heads a tile")
CHOSEN = "tests/kernels/test_mosaic_gpu_selections.py::test_selection"
ALONE = "tests/kernels/test_mosaic_gpu_arrays.py::"
REFUSED, MESH = ALONE + "test_what_the_kernel_cannot_do_is_refused", ALONE + "test_tables_over_a_mesh"
CHIPS, ROOM = ALONE + "test_only_hopper_is_lowered_for", ALONE + "test_copies_of_lse_have_room"
DOCUMENTS, ANY_IDS = ALONE + "TestNarrow::test_documents", ALONE + "TestNarrow::test_any_ids"

ROWS_AND_KEYS = [
    Fault(
        "features not padded to what the tensor cores multiply", ARRANGE,
        "FEATURES = 16\n", "FEATURES = 8\n",
        FOUR_HEADS,
    ),
    Fault(
        "lengths that no copy takes", ARRANGE,
        "LENGTH = 8\n", "LENGTH = 1\n",
        ROOM,
    ),
    Fault(
        "values in a wider swizzle than a step has keys", LAUNCH,
        "plan.step if summed else None", "None",
        machine_code("few keys"),
    ),
    Fault(
        "lse without room for whole tiles", FORWARD,
        "plan.num_heads, plan.tiles * plan.queries)", "plan.num_heads, inputs.query.shape[1])",
        ROOM,
    ),
    Fault(
        "the shift of an offset off by one", GRID,
        "shift = problem.schedule.query_offset % problem.schedule.block_size",
        "shift = 1 + problem.schedule.query_offset % problem.schedule.block_size",
        interpreted("offset within a block"),
    ),
    Fault(
        "the tile of an offset at run time counted in blocks", GRID,
        "offset % queries, offset // queries, queries - 1",
        "offset % queries, offset // problem.schedule.block_size, queries - 1",
        interpreted("offset at run time"),
    ),
    Fault(
        "the last tile forgotten where an offset at run time shifts", GRID,
        "offset // queries, queries - 1", "offset // queries, 0",
        interpreted("an offset for each"),
    ),
    Fault(
        "the scale of a turned query not turned", GRID,
        "(-query, -scale) if scale < 0", "(query, -scale) if scale < 0",
        FOUR_HEADS,
    ),
    Fault(
        "a scale of zero divides", GRID,
        "(query * 0, 1.0)", "(query, scale)",
        ALONE + "test_a_scale_that_is_not_positive",
    ),
    Fault(
        "sinks dealt to rows, not to heads", ARRANGE,
        "jnp.repeat(sinks.astype(jnp.float32).reshape(-1, tiles.heads), tiles.queries, 1)",
        "jnp.tile(sinks.astype(jnp.float32).reshape(-1, tiles.heads), (1, tiles.queries))",
        FOUR_HEADS,
    ),
    Fault(
        "segments not shifted with the rows", GRID,
        "jnp.clip(index - shift[:, None], 0, grid.length - 1)",
        "jnp.clip(index + 0 * shift[:, None], 0, grid.length - 1)",
        interpreted("an offset and documents"),
    ),
    Fault(
        "positions of rows for every head in turn", GRID,
        "return jnp.tile(array, (1, 1, rows // self.queries))", "return jnp.repeat(array, rows // self.queries, 2)",
        CHOSEN + "[from an offset]",
    ),
    Fault(
        "a selection that forgets the offset", ARRANGE,
        "position = position + operands.query_offset[:, None]", "position = position",
        CHOSEN + "[from an offset]",
    ),
    Fault(
        "keys beyond the end read both ways", ARRANGE,
        "jnp.where(keys < operands.key.shape[1], keys, NOWHERE)", "keys",
        CHOSEN + "[both ways]",
    ),
]  # fmt: skip

LISTS = [
    Fault(
        "keys beyond the end of the last block", MERGED,
        "if schedule.kv_length % schedule.block_size == 0 or", "if True or",
        interpreted("local stride both ways"),
    ),
    Fault(
        "one key too many in the last block", MERGED,
        "(np.arange(size) < remaining)", "(np.arange(size) <= remaining)",
        interpreted("local stride both ways"),
    ),
    Fault(
        "the last block lost where it is not filled", MERGED,
        "ends.any(-1)[..., None], np.array([entry, entry + 1], np.int32)",
        "ends.any(-1)[..., None], np.array([entry, entry], np.int32)",
        interpreted("dense both ways"),
    ),
    Fault(
        "masks for every row of a head in turn", TABLES,
        "np.tile(seen, (1, ROWS // seen.shape[1], 1))", "np.repeat(seen, ROWS // seen.shape[1], 1)",
        FOUR_HEADS,
    ),
    Fault("the bits of a word in the wrong order", TABLES, 'bitorder="little"', 'bitorder="big"', FOUR_HEADS),
    Fault(
        "all blocks of a selection read, whatever their count", TABLES,
        "first + jnp.clip(selection.counts, 0, most)", "first + most + 0 * selection.counts",
        interpreted("selection"),
    ),
    Fault(
        "blocks beyond the keys read as the first", TABLES,
        "jnp.where(inside, WHOLE, EMPTY)", "jnp.where(inside, WHOLE, WHOLE)",
        interpreted("selection"),
    ),
    Fault(
        "a row of a selection for every tile", TABLES,
        "jnp.arange(-(-length // tiles.queries)) * tiles.queries // selection.query_block",
        "jnp.arange(-(-length // tiles.queries))",
        CHOSEN + "[two tiles a row]",
    ),
    Fault(
        "query head i has the choice of KV head i mod k", TABLES,
        "jnp.arange(0, num_heads, tiles.heads) * heads // num_heads", "jnp.arange(0, num_heads, tiles.heads) % heads",
        TWO_HEADS,
    ),
    # Segments.
    Fault(
        "one block of a document too few", SEGMENTS,
        "end = count - jnp.argmax(condition[..., ::-1], -1).astype(jnp.int32)",
        "end = count - 1 - jnp.argmax(condition[..., ::-1], -1).astype(jnp.int32)",
        DOCUMENTS,
    ),
    Fault(
        "one block of another document", SEGMENTS,
        "jnp.where(some, first, 0), jnp.where(some, end, 0)",
        "jnp.where(some, jnp.maximum(first, 1) - 1, 0), jnp.where(some, end, 0)",
        DOCUMENTS,
    ),
    Fault(
        "other documents not skipped", SEGMENTS,
        "(least <= most_key) & (least_key <= most)", "(least <= most_key) | (least_key <= most)",
        DOCUMENTS,
    ),
    Fault(
        "blocks at a document's edge without a mask", SEGMENTS,
        "(least_key == least) & (most_key == least)", "(least_key == least)",
        DOCUMENTS,
    ),
    Fault(
        "the first run of a document that comes twice taken for all", SEGMENTS,
        "    if whole:\n", "    if True:\n",
        ANY_IDS,
    ),
    Fault(
        "a search that passes what it looks for", SEGMENTS,
        "blocks.shape[0] - 1)] < block)", "blocks.shape[0] - 1)] <= block)",
        DOCUMENTS,
    ),
    # What nobody reads.
    Fault(
        "unread values not zeroed", UNREAD,
        "return arrays if read is None else", "return arrays if True else",
        interpreted("first tokens both ways"),
    ),
    Fault(
        "unread values not zeroed where segments have a say", UNREAD,
        "read = _read(problem, operands, walks)", "read = None",
        interpreted("strangers"),
    ),
    Fault(
        "segments have no say in what is read", UNREAD,
        "if operands.query_segment_ids is None:", "if True:",
        interpreted("strangers"),
    ),
]  # fmt: skip

CHOICES = [
    Fault(
        "a buffer counted once, whatever the stages", SIZES,
        "self.stages * self.keys * value_dim * 2,", "self.keys * value_dim * 2,",
        machine_code("d 256"),
    ),
    Fault(
        "no smaller steps for wide heads of two widths", SIZES,
        "return tiles\n        keys //= 2  # HopperTiles", "return tiles\n        return tiles  # HopperTiles",
        ALONE + "test_there_are_tiles_for_all_sizes",
    ),
    Fault(
        "a tile of heads that read apart", SIZES,
        "group % heads == 0 and schedule.shares_groups and", "group % heads == 0 and",
        REFUSED,
    ),
    Fault(
        "a tile of heads of two groups", SIZES,
        "(group % heads == 0 and schedule.shares_groups", "(schedule.shares_groups",
        REFUSED,
    ),
    Fault("a tile of heads that choose apart", SIZES, "(shared or heads == 1)", "(shared or True)", REFUSED),
    Fault("a tile of two rows of a selection", SIZES, " and selection.query_block % (ROWS // heads) == 0", "", REFUSED),
    Fault("tiles that do not fit", BACKEND, "if shared > SHARED_BYTES:", "if False:", REFUSED),
    Fault("Blackwell taken for Hopper", CHIP, "if int(capability) != int(HOPPER):", "if capability < HOPPER:", CHIPS),
    Fault("a compiler that spoils masks", CHIP, "12080 <= version < 12091", "12080 < version < 12091", CHIPS),
    Fault(
        "the lists of the first shard's heads for all", BACKEND,
        "slices=sharding.of(heads=1, ndim=5)", "slices=PartitionSpec()",
        MESH,
    ),
    Fault(
        "what the first shard's heads do not read zeroed for all", BACKEND,
        "sharding.of(heads=0, ndim=2)", "PartitionSpec()",
        MESH,
    ),
]  # fmt: skip

FAULTS = [*ROWS_AND_KEYS, *LISTS, *CHOICES]
