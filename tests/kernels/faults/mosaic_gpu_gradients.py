"""The Hopper kernels of the gradients: what they walk, compute and wait for."""

from tests.kernels.faults.fault import Fault, gradients, machine_code

KEYS, TABLES, ARRANGE, QUERIES, SLOPE, STEPS, BACKEND, LAUNCH, SIZES = (
    f"pallas_kernels/mosaic_gpu/{name}.py"
    for name in (
        "key_gradient",
        "key_tables",
        "arrange_keys",
        "query_gradient",
        "gradient",
        "steps",
        "__init__",
        "launch",
        "tiles",
    )
)
SEGMENTS, PACKED = "pallas_kernels/segments.py", "pallas_kernels/packs.py"
LOCAL, APART, OFFSET, CHOSEN = (
    gradients(name) for name in ("local stride", "stripes by query head", "an offset for each", "selection by KV head")
)
CAPPED, STRANGERS, WIDE = (gradients(name) for name in ("soft cap, low precision", "strangers", "wide heads"))
ALONE = "tests/kernels/test_mosaic_gpu_keys.py::"
PACKS, TRANSPOSED = ALONE + "test_packs_are_walked_by_what_reads_them", ALONE + "test_a_selection_transposed"
DOCUMENTS, ROOM, MESH = (
    ALONE + "test_packs_and_segments",
    ALONE + "test_copies_have_room",
    ALONE + "test_packs_over_a_mesh",
)
RACES = "tests/kernels/test_mosaic_gpu_races.py::test_every_copy_is_waited_for[gradients]"
NAN = "tests/kernels/test_mosaic_gpu_gradients.py::test_a_nan_goes_no_further_than_it_is_read"

WALKED = [
    Fault(
        "a block of keys in two packs",
        PACKED,
        "np.setdiff1d(np.arange(lists.num_rows), read)",
        "np.arange(lists.num_rows)",
        PACKS,
    ),
    Fault(
        "blocks that nobody reads in no pack",
        PACKED,
        "read[(read >= 0).any(-1)], idle]",
        "read[(read >= 0).any(-1)]]",
        PACKS,
    ),
    Fault(
        "packs in another order than their lists",
        PACKED,
        "members = np.take_along_axis(packs, order[:, :, None], 1)",
        "members = packs",
        PACKS,
    ),
    Fault(
        "every group the first one",
        TABLES,
        "packs.slices[packs.group_of][None]",
        "packs.slices[0 * packs.group_of][None]",
        PACKS,
    ),
    Fault(
        "heads that read apart taken for one",
        PACKED,
        "rounds = 1 if schedule.shares_groups else",
        "rounds = 1 if True else",
        PACKS,
    ),
    Fault("masks of keys by queries", PACKED, "schedule.token_masks.swapaxes(1, 2)", "schedule.token_masks", PACKS),
    Fault(
        "packs of what the first head of a group reads alike",
        PACKED,
        "for each in range(groups.shape[1])]",
        "for each in range(1)]",
        PACKS,
        unseen="The results are the same: what the other heads read alike decides how much is walked.",
    ),
    Fault(
        "a transposed list short by one",
        PACKED,
        "ends = ends + jnp.arange(batch",
        "ends = jnp.maximum(ends - 1, 0) + jnp.arange(batch",
        TRANSPOSED,
    ),
    Fault("rows of two blocks walked twice", PACKED, "jnp.cumsum(~again,", "jnp.cumsum(again | True,", TRANSPOSED),
    Fault("blocks beyond the keys in the last pack", PACKED, "& (selection.kv_blocks < num_blocks)", "", TRANSPOSED),
    Fault(
        "all blocks of a row transposed, whatever their count",
        PACKED,
        "used = jnp.arange(most, dtype=jnp.int32) < selection.counts[..., None]",
        "used = jnp.arange(most, dtype=jnp.int32) <= most + 0 * selection.counts[..., None]",
        TRANSPOSED,
    ),
    Fault("all blocks of a pack seen where one is", TABLES, "bits + 2", "0 * bits", TRANSPOSED),
    Fault("the first round's lists in every round", KEYS, "mine.at[number]", "mine.at[0 * number]", APART),
    Fault(
        "the first head's queries in every turn",
        KEYS,
        "self.head * self.plan.group + entry.turn",
        "self.head * self.plan.group",
        LOCAL,
    ),
    Fault(
        "a group head left out",
        KEYS,
        "mine.at[number], plan.turns, number)",
        "mine.at[number], max(1, plan.turns - 1), number)",
        LOCAL,
    ),
    Fault(
        "masked steps of a round stand where the first one's do",
        STEPS,
        "            return steps + walk.masked_steps\n",
        "            return steps\n",
        APART,
    ),
    Fault(
        "steps of the last round alone",
        STEPS,
        "steps + walk.full_steps, jnp.int32(0))",
        "walk.full_steps, jnp.int32(0))",
        APART,
    ),
    Fault("rows of another call taken for one's own", KEYS, "(entry.piece - self.first)", "(entry.piece)", OFFSET),
    Fault(
        "rows that do not exist",
        ARRANGE,
        "for edge in (first, first + grid.tiles)]",
        "for edge in (first, first + grid.tiles + 9)]",
        ALONE + "test_an_offset_leaves_rows_that_exist",
    ),
    Fault(
        "documents lose their last row",
        SEGMENTS,
        '_place(jax.lax.cummin(least, 1, reverse=True), last, "right")',
        '_place(jax.lax.cummin(least, 1, reverse=True), last, "left")',
        DOCUMENTS,
    ),
    Fault(
        "documents lose their first row",
        SEGMENTS,
        '_place(jax.lax.cummax(most, 1), first, "left")',
        '_place(jax.lax.cummax(most, 1), first, "right")',
        DOCUMENTS,
    ),
    Fault(
        "no mask for ids in any order",
        SEGMENTS,
        "own = ascending & (first == last)",
        "own = (first == last)",
        DOCUMENTS,
    ),
    Fault(
        "no mask for a pack of two documents",
        SEGMENTS,
        "own = ascending & (first == last) &",
        "own = ascending &",
        DOCUMENTS,
    ),
    Fault(
        "rows at a document's edge without a mask",
        SEGMENTS,
        '_place(most, first, "right")',
        '_place(least, first, "right")',
        DOCUMENTS,
    ),
    Fault(
        "the packs of the first shard's heads for all",
        BACKEND,
        "members=sharding.of(heads=0, ndim=3)",
        "members=PartitionSpec()",
        MESH,
    ),
    Fault(
        "the rows of the first shard's heads for all",
        BACKEND,
        "slices=sharding.of(heads=1, ndim=6)",
        "slices=PartitionSpec()",
        MESH,
    ),
]

COMPUTED = [
    Fault("dq without its scale", QUERIES, "(dquery * self.factor)", "dquery", LOCAL),
    Fault("dk without its scale", KEYS, 'gradient * plan.scale if name == "key" else gradient', "gradient", LOCAL),
    Fault("dv with a scale", KEYS, '* plan.scale if name == "key" else gradient', "* plan.scale", LOCAL),
    Fault(
        "dq without masks",
        QUERIES,
        "jnp.where(self.allowed(step.mask_stage), gradient, 0)",
        "jnp.where(self.allowed(step.mask_stage), gradient, gradient)",
        LOCAL,
    ),
    Fault(
        "dk and dv without masks",
        KEYS,
        "jnp.where(self.allowed(step.mask_stage), weights, 0)",
        "jnp.where(self.allowed(step.mask_stage), weights, weights)",
        LOCAL,
    ),
    Fault(
        "a NaN reaches keys that are hidden from it",
        KEYS,
        "gradient = jnp.where(sloped != 0, gradient, 0)",
        "pass",
        NAN,
    ),
    Fault("the slope of the cap forgotten", SLOPE, "weights if slope is None else weights * slope", "weights", CAPPED),
    Fault("the slope of the cap not of what was capped", SLOPE, "1 - capped * capped", "1 - capped", CAPPED),
    Fault("lse in the wrong base", ARRANGE, "of_queries(lse * LOG2E, np.inf)", "of_queries(lse, np.inf)", LOCAL),
    Fault(
        "unread keys not zeroed",
        BACKEND,
        '_on_read_arrays(problem, operands, ("key", "value"), run)',
        "run(operands)",
        STRANGERS,
    ),
    Fault(
        "a query does not see itself",
        KEYS,
        "inputs.kv_positions.at[self.pack], jnp.greater_equal",
        "inputs.kv_positions.at[self.pack], jnp.greater",
        CHOSEN,
    ),
    Fault(
        "a selection's gradients forget the offset",
        ARRANGE,
        "position + offset",
        "position",
        "tests/kernels/test_mosaic_gpu_gradients.py::TestGradients::test_other_case[from an offset]",
    ),
    Fault(
        "segments of queries compared with nobody's",
        KEYS,
        "inputs.query_segments, of_rows, jnp.equal",
        "inputs.query_segments, of_rows, jnp.greater_equal",
        STRANGERS,
    ),
    Fault("all rows in the first piece's place", KEYS, "pl.ds(row, plan.piece))", "pl.ds(0 * row, plan.piece))", LOCAL),
    Fault(
        "a place without a block stored as the first block",
        KEYS,
        "@pl.when(block >= 0)",
        "@pl.when(block >= -1)",
        LOCAL,
    ),
    Fault(
        "lse and delta as long as the queries",
        ARRANGE,
        "swapaxes(1, 2), grid.tiles * size, nothing)",
        "swapaxes(1, 2), length, nothing)",
        ROOM,
    ),
    Fault(
        "both gradients of wide heads at once",
        KEYS,
        "if plan.head_dim + plan.value_dim <= SUMMED_AT_ONCE:",
        "if True:",
        machine_code("d 256"),
    ),
    Fault(
        "the usual registers for wide heads",
        QUERIES,
        "Registers(240, 24) if",
        "REGISTERS if",
        machine_code("d 256"),
    ),
    Fault(
        "keys in a wider swizzle than a step has queries",
        KEYS,
        '"key": row_buffer(plan, plan.head_dim, summed=True)',
        '"key": row_buffer(plan, plan.head_dim)',
        machine_code("d 256"),
    ),
    Fault(
        "the slope kept until it is needed",
        KEYS,
        "        sloped = times(weights, slope)\n",
        "        sloped = weights\n",
        CAPPED,
    ),
]

BARRIERS = [
    Fault(
        "keys and values not waited for",
        KEYS,
        '        plgpu.barrier_wait(scratch["rows_ready"].at[self.warpgroup])\n',
        "",
        RACES,
    ),
    Fault(
        "one copy of rows counts for all",
        KEYS,
        '"rows_ready": barriers(WARPGROUPS, 2 * plan.pieces)',
        '"rows_ready": barriers(WARPGROUPS, plan.pieces)',
        LOCAL,
    ),
    Fault(
        "queries not waited for", KEYS, '        plgpu.barrier_wait(scratch["query_ready"].at[step.stage])\n', "", LOCAL
    ),
    Fault(
        "douts not waited for",
        KEYS,
        '            plgpu.barrier_wait(scratch["dout_ready"].at[step.stage])\n',
        "            pass\n",
        LOCAL,
    ),
    Fault(
        "one copy of douts counts for lse and delta too",
        KEYS,
        "barriers(stages, 3 * plan.slots)",
        "barriers(stages, plan.slots)",
        LOCAL,
    ),
    Fault(
        "queries given back before they are multiplied",
        KEYS,
        "        products = product(scratch",
        '        plgpu.barrier_arrive(scratch["query_free"].at[step.stage])\n        products = product(scratch',
        LOCAL,
    ),
    Fault(
        "queries never given back",
        KEYS,
        '        plgpu.barrier_arrive(scratch["query_free"].at[step.stage])\n',
        "",
        LOCAL,
    ),
    Fault(
        "douts never given back", KEYS, '        plgpu.barrier_arrive(scratch["dout_free"].at[step.stage])\n', "", LOCAL
    ),
    Fault(
        "douts given back before delta is read",
        KEYS,
        '        gradient = None\n        if "key"',
        '        plgpu.barrier_arrive(scratch["dout_free"].at[step.stage])\n        gradient = None\n        if "key"',
        LOCAL,
    ),
    Fault(
        "gradients copied before they are in shared memory",
        KEYS,
        '        plgpu.commit_smem()\n        plgpu.barrier_arrive(scratch["rows_done"]',
        '        plgpu.barrier_arrive(scratch["rows_done"]',
        LOCAL,
    ),
    Fault(
        "gradients copied before the second warpgroup wrote them",
        KEYS,
        "self._counted(WARPGROUPS))",
        "self._counted(1))",
        LOCAL,
    ),
    Fault("the last copies not waited for", KEYS, "        plgpu.wait_smem_to_gmem(0)\n", "", LOCAL),
    Fault(
        "dq's queries and douts count for one",
        QUERIES,
        "barriers(WARPGROUPS, 2 * plan.pieces)",
        "barriers(WARPGROUPS, plan.pieces)",
        LOCAL,
    ),
    Fault(
        "dq gives keys back before the last product",
        QUERIES,
        "        dquery = add_product(dquery,",
        '        plgpu.barrier_arrive(scratch["key_free"].at[step.stage])\n        dquery = add_product(dquery,',
        LOCAL,
    ),
    Fault(
        "dq never gives values back",
        QUERIES,
        '        plgpu.barrier_arrive(scratch["value_free"].at[step.stage])\n',
        "",
        LOCAL,
    ),
    Fault(
        "dq does not wait for values",
        QUERIES,
        '        plgpu.barrier_wait(scratch["value_ready"].at[step.stage])\n',
        "",
        LOCAL,
    ),
    Fault(
        "dq copied before it is in shared memory",
        QUERIES,
        "        plgpu.commit_smem()\n",
        "",
        RACES,
        unseen="The interpreter finds as much in the other kernels, but not here.",
    ),
]

FAULTS = [*WALKED, *COMPUTED, *BARRIERS]
