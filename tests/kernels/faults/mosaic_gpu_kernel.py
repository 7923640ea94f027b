"""What the Hopper kernel computes: the walk, masks, softmax."""

from tests.kernels.faults.fault import Fault, hopper_shape, interpreted

FORWARD = "pallas_kernels/mosaic_gpu/forward.py"
FOUR_HEADS, HALF_BLOCKS = hopper_shape("four heads a tile"), hopper_shape("half a block a step")
SMALL = interpreted("groups of four")

WALK = [
    # The lists.
    Fault(
        "left-over blocks left out", FORWARD,
        "self.left = self.full - self.full_steps * plan.slots", "self.left = 0",
        FOUR_HEADS,
    ),
    Fault(
        "masked entries begin behind the left-over blocks", FORWARD,
        "first = self.full_steps * self.plan.slots\n", "first = self.full\n",
        FOUR_HEADS,
    ),
    Fault(
        "one entry more than there is", FORWARD,
        "exists = entry < self.left", "exists = entry <= self.left",
        FOUR_HEADS,
    ),
    Fault(
        "a slot that holds nothing holds what others read", FORWARD,
        "        entry = jnp.minimum(entry, self.left + self.masked - 1)\n", "",
        interpreted("patterns by KV head"),
    ),
    Fault(
        "a slot that holds nothing keeps its mask", FORWARD,
        "return block, jnp.where(exists, kind, EMPTY)", "return block, kind",
        FOUR_HEADS,
    ),
    Fault("the last entry of a part left out", FORWARD, "entry >= end, start", "entry >= end - 1, start", FOUR_HEADS),
    Fault(
        "the third part begins where the second does", FORWARD,
        "end = end + stop - start", "end = stop - start",
        FOUR_HEADS,
    ),
    Fault(
        "the last masked step left out", FORWARD,
        "-(-(self.left + self.masked) // plan.slots)", "(self.left + self.masked) // plan.slots",
        FOUR_HEADS,
    ),
    Fault(
        "parts of a block swapped for the next block's", FORWARD,
        "* plan.parts_of_block + part_of_block, position", "* plan.parts_of_block, position",
        HALF_BLOCKS,
    ),
    Fault(
        "the mask of a block's first part for all", FORWARD,
        "jax.lax.rem(block, plan.parts_of_block) * plan.words", "0 * block",
        HALF_BLOCKS,
    ),
    Fault(
        "the tables of the first sequence for all", FORWARD,
        "batch if table.shape[0] > 1 else 0", "0 if table.shape[0] > 1 else 0",
        interpreted("an offset and documents"),
    ),
    # Heads and rows.
    Fault(
        "query head i reads KV head i mod k", FORWARD,
        "self.heads * plan.heads // (plan.num_heads // plan.num_kv_heads)",
        "jax.lax.rem(self.heads * plan.heads, plan.num_kv_heads)",
        FOUR_HEADS,
    ),
    Fault(
        "all rows of a tile of one head", FORWARD,
        "self.heads * plan.heads + first // plan.queries", "self.heads * plan.heads",
        FOUR_HEADS,
    ),
    Fault(
        "heads of a tile one after the other in time", FORWARD,
        "self.tile * plan.queries + jax.lax.rem(first, plan.queries)", "self.tile * plan.queries + first",
        FOUR_HEADS,
    ),
    Fault(
        "the second warpgroup has the first one's masks", FORWARD,
        "        rows = pl.ds(self.warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)\n        conditions",
        "        rows = pl.ds(0, WARPGROUP_ROWS)\n        conditions",
        SMALL,
    ),
    Fault(
        "the second warpgroup has the first one's sinks", FORWARD,
        "        rows = pl.ds(self.warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)\n        return",
        "        rows = pl.ds(0, WARPGROUP_ROWS)\n        return",
        FOUR_HEADS,
    ),
    # Masks.
    Fault("bits of neighbouring columns swapped", FORWARD, "word >> (column & 6)", "word >> (column & 2)", SMALL),
    Fault(
        "the words of a row in the wrong order", FORWARD,
        "column // width == index,", "column // width == index - 1,",
        FOUR_HEADS,
    ),
    Fault(
        "segments compared with nobody's", FORWARD,
        "inputs.query_segments, jnp.equal)", "inputs.query_segments, jnp.greater_equal)",
        interpreted("documents both ways"),
    ),
    Fault(
        "a query does not see itself", FORWARD,
        "inputs.query_positions, jnp.less_equal)", "inputs.query_positions, jnp.less)",
        interpreted("selection"),
    ),
    Fault(
        "slots that hold nothing stand where their block does", FORWARD,
        "jnp.where(kind == EMPTY, inputs.kv_positions.shape[0] - plan.slot, block * plan.slot)", "block * plan.slot",
        interpreted("selection"),
    ),
    Fault(
        "one of two masks", FORWARD,
        "allowed = allowed & condition", "allowed = condition",
        interpreted("documents both ways"),
    ),
    Fault(
        "masked steps without their masks", FORWARD,
        "        if masked_step is not None:\n"
        "            logits = jnp.where(self._allowed(masked_step), logits, -jnp.inf)\n",
        "        if masked_step is not None:\n            self._allowed(masked_step)\n",
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
        "        out = out * jax.lax.broadcast_in_dim(shrink, out.shape, [0])\n"
        "        total = total * shrink + weights",
        "        total = total * shrink + weights",
        SMALL,
    ),
    Fault(
        "the greatest of no logits is -inf", FORWARD,
        "LOWEST = -0.5 * float(np.finfo(np.float32).max)", "LOWEST = -math.inf",
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
        hopper_shape("two tiles a row"),
    ),
    Fault(
        "the output of an empty row divided by zero", FORWARD,
        "safe = jnp.where(total != 0, total, 1.0)", "safe = total",
        interpreted("empty rows"),
    ),
]  # fmt: skip

FAULTS = [*WALK, *SOFTMAX]
