"""What the Hopper kernel computes: the walk, masks, softmax."""

from tests.kernels.faults.fault import Fault, gradients, hopper_shape, interpreted

STEPS, TILE = "pallas_kernels/mosaic_gpu/steps.py", "pallas_kernels/mosaic_gpu/query_tile.py"
WALK_FILE, PLAN = "pallas_kernels/mosaic_gpu/walk.py", "pallas_kernels/mosaic_gpu/plan.py"
FORWARD = "pallas_kernels/mosaic_gpu/forward.py"
FOUR_HEADS, HALF_BLOCKS = hopper_shape("four heads a tile"), hopper_shape("half a block a step")
SMALL = interpreted("groups of four")

WALK = [
    # The lists.
    Fault(
        "left-over blocks left out", WALK_FILE,
        "left = turns * self.full - self.full_steps * plan.slots",
        "left = 0",
        interpreted("strided"),
    ),
    Fault(
        "masked entries begin behind the left-over blocks", WALK_FILE,
        "return Cursor(turn, walked - turn * self.full)",
        "return Cursor(self.turns, 0 * walked)",
        FOUR_HEADS,
    ),
    Fault(
        "masked entries begin where the first turn does", WALK_FILE,
        "walked // jnp.maximum(self.full, 1)",
        "0",
        gradients("local stride"),
    ),
    Fault(
        "one entry more than there is", WALK_FILE,
        "((turn < 2 * self.turns) & (self.masked > 0))",
        "((turn <= 2 * self.turns) & (self.masked > 0))",
        FOUR_HEADS,
    ),
    Fault(
        "a slot that holds nothing holds what others read", WALK_FILE,
        "jnp.where(exists, piece, jnp.where(full, self.full, self.masked) - 1)",
        "jnp.where(exists, piece, jnp.where(full, self.full, self.masked))",
        interpreted("patterns by KV head"),
    ),
    Fault(
        "a slot that holds nothing keeps its mask", WALK_FILE,
        "jnp.where(exists, self.masks[position], EMPTY)",
        "self.masks[position]",
        FOUR_HEADS,
    ),
    Fault(
        "the last entry of a part left out", WALK_FILE,
        "entry >= end, start",
        "entry >= end - 1, start",
        FOUR_HEADS,
    ),
    Fault(
        "the third part begins where the second does", WALK_FILE,
        "end = end + stop - start",
        "end = stop - start",
        FOUR_HEADS,
    ),
    Fault(
        "the last masked step left out", WALK_FILE,
        "-(-(left + turns * self.masked) // plan.slots)",
        "(left + turns * self.masked) // plan.slots",
        FOUR_HEADS,
    ),
    Fault(
        "parts of a block swapped for the next block's", WALK_FILE,
        "* pieces + jax.lax.rem(piece, pieces)",
        "* pieces",
        HALF_BLOCKS,
    ),
    Fault(
        "a word of mask for two parts of a block", PLAN,
        "return min(slot, WORD)",
        "return WORD if slot else slot",
        hopper_shape("half a word a step"),
    ),
    Fault(
        "the mask of a block's first part for all", TILE,
        "jax.lax.rem(entry.piece, plan.pieces_of_block)",
        "0 * entry.piece",
        HALF_BLOCKS,
    ),
    Fault(
        "the tables of the first sequence for all", TILE,
        "self.batch if table.shape[0] > 1 else 0",
        "0 if table.shape[0] > 1 else 0",
        interpreted("an offset and documents"),
    ),
    # Heads and rows.
    Fault(
        "query head i reads KV head i mod k", TILE,
        "kv_head = self.heads * plan.heads // plan.group",
        "kv_head = jax.lax.rem(self.heads * plan.heads, plan.num_kv_heads)",
        FOUR_HEADS,
    ),
    Fault(
        "all rows of a tile of one head", TILE,
        "self.heads * plan.heads + first // plan.queries",
        "self.heads * plan.heads",
        FOUR_HEADS,
    ),
    Fault(
        "heads of a tile one after the other in time", TILE,
        "self.tile * plan.queries + jax.lax.rem(first, plan.queries)",
        "self.tile * plan.queries + first",
        FOUR_HEADS,
    ),
    Fault(
        "the second warpgroup has the first one's masks", STEPS,
        "self.words.at[stage, index, self.rows]",
        "self.words.at[stage, index, pl.ds(0, WARPGROUP_ROWS)]",
        SMALL,
    ),
    Fault(
        "the second warpgroup has the first one's sinks", FORWARD,
        "inputs.sinks.at[self.heads, self.rows]",
        "inputs.sinks.at[self.heads, pl.ds(0, WARPGROUP_ROWS)]",
        FOUR_HEADS,
    ),
    # Masks.
    Fault(
        "bits of neighbouring columns swapped", STEPS,
        "word >> (column & 6)",
        "word >> (column & 2)",
        SMALL,
    ),
    Fault(
        "the words of a row in the wrong order", STEPS,
        "column // width == index,",
        "column // width == index - 1,",
        FOUR_HEADS,
    ),
    Fault(
        "segments compared with nobody's", TILE,
        "inputs.query_segments, jnp.equal)",
        "inputs.query_segments, jnp.greater_equal)",
        interpreted("documents both ways"),
    ),
    Fault(
        "a query does not see itself", TILE,
        "inputs.query_positions, jnp.less_equal)",
        "inputs.query_positions, jnp.less)",
        interpreted("selection"),
    ),
    Fault(
        "slots that hold nothing stand where their block does", TILE,
        "jnp.where(entry.kind == EMPTY, nowhere, entry.piece * plan.slot)",
        "entry.piece * plan.slot",
        interpreted("selection"),
    ),
    Fault(
        "one of two masks", STEPS,
        "allowed = allowed & each",
        "allowed = each",
        interpreted("documents both ways"),
    ),
    Fault(
        "masked steps without their masks", FORWARD,
        "            logits = jnp.where(self.allowed(step.mask_stage), logits, -jnp.inf)\n",
        "            self.allowed(step.mask_stage)\n",
        SMALL,
    ),
]  # fmt: skip

SOFTMAX = [
    Fault(
        "a NaN taken for an empty row", FORWARD,
        "reads, nothing = total != 0, -jnp.inf", "reads, nothing = total > 0, -jnp.inf",
        "tests/kernels/test_mosaic_gpu.py::TestInterpreted::test_offsets_beyond",
    ),
    Fault(
        "the sum not rescaled when a larger logit comes", FORWARD,
        "total = total * shrink + weights", "total = total + weights",
        SMALL,
    ),
    Fault(
        "the output not rescaled when a larger logit comes", FORWARD,
        "        out = out * spread(shrink, out.shape, 0)\n"
        "        total = total * shrink + weights",
        "        total = total * shrink + weights",
        SMALL,
    ),
    Fault(
        "the greatest of no logits is -inf", FORWARD,
        "LOWEST = -0.5 * float(np.finfo(np.float32).max)", 'LOWEST = -float("inf")',
        interpreted("empty rows"),
    ),
    Fault("lse in the wrong base", FORWARD, "(most + jnp.log2(safe)) * (1 / LOG2E)", "most + jnp.log2(safe)", SMALL),
    Fault(
        "soft cap before the scale", FORWARD,
        "jnp.tanh(logits * (plan.scale / plan.soft_cap))", "jnp.tanh(logits / plan.soft_cap) * plan.scale",
        interpreted("soft cap"),
    ),
    Fault("sinks in the wrong base", FORWARD, "nothing * LOG2E)", "nothing)", interpreted("sinks")),
    Fault(
        "the maximum without the sink", FORWARD,
        "    return out, new, total * shrink", "    return out, most, total * shrink",
        interpreted("sinks"),
    ),
    Fault(
        "the lse of an empty row rounded", FORWARD,
        "reads, nothing = total != 0, -jnp.inf", "reads, nothing = total == total, -jnp.inf",
        hopper_shape("two heads a tile"),
    ),
    Fault(
        "the output of an empty row divided by zero", FORWARD,
        "safe = jnp.where(total != 0, total, 1.0)", "safe = total",
        interpreted("empty rows"),
    ),
]  # fmt: skip

FAULTS = [*WALK, *SOFTMAX]
