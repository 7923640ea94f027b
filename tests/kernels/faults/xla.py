"""XLA's backend, what every backend shares, and the merging of parts."""

from tests.kernels.faults.fault import CASE, CHANGED, Fault, case, in_two_passes

OP, PROBLEM, SINKS = (f"pallas_kernels/{name}.py" for name in ("passes", "problem", "sinks"))
FORWARD, BACKWARD, ONE_PASS, LAYOUT, WALKING, WALKS = (
    f"pallas_kernels/xla/{name}.py" for name in ("forward", "backward", "one_pass", "layout", "walking", "walks")
)
XLA, FUNCTIONAL = "pallas_kernels/xla/__init__.py", "s2jax/functional.py"

FAULTS = [
    # Arithmetic.
    Fault(
        "the sum not rescaled when a larger logit comes", FORWARD,
        "out * shrink[..., None] + update", "out + update",
        case("block by block"),
    ),
    Fault(
        "scale forgotten in dq and dk", BACKWARD,
        "(dweights - delta) * jnp.asarray(layout.problem.scale, logits.dtype)", "(dweights - delta)",
        case("local stride"),
    ),
    Fault(
        "the slope of the cap forgotten", BACKWARD,
        "    if slope is not None:\n        gradient = gradient * slope\n", "",
        case("soft cap"),
    ),
    Fault(
        "the mask forgotten in dv", BACKWARD,
        "return jnp.where(allowed, weights, 0), ", "return weights, ",
        case("local stride"),
    ),
    Fault(
        "the mask forgotten in dq and dk", BACKWARD,
        "0), jnp.where(allowed, gradient, 0)", "0), gradient",
        case("local stride"),
    ),
    # dk and dv added up in place.
    Fault(
        "units that fill the last chunk add once more", FORWARD,
        "jnp.where(counts[:, None, None], layout.query_slices(grid, units), 0)", "layout.query_slices(grid, units)",
        case("local stride"),
    ),
    Fault(
        "the last query to read a key has its gradient alone", FORWARD,
        '.add(part, mode="drop")', '.set(part, mode="drop")',
        case("local stride"),
    ),
    Fault(
        "no entry counts as the first block", FORWARD,
        "jnp.where(valid, step.blocks, layout.num_blocks)", "jnp.where(valid, step.blocks, 0)",
        case("local stride"),
    ),
    Fault(
        "gradients added to the block after the one that was read", FORWARD,
        "total.at[batch, blocks, :, head]", "total.at[batch, blocks + 1, :, head]",
        case("local stride"),
    ),
    Fault(
        "gradients of keys from the queries of other chunks lost", ONE_PASS,
        "return totals, dquery\n", "return [0 * total for total in totals], dquery\n",
        case("local stride"),
    ),
    Fault(
        "one pass on every platform", XLA,
        "_one_pass if problem.platform in ONE_PASS else _two_passes", "_one_pass",
        CASE + "one_pass_is_for_the_cpu_alone",
    ),
    Fault(
        "tiles without a query read", LAYOUT,
        "jnp.where(used[:, None, None], self._slices(batch, walker, first + tile), 0)",
        "self._slices(batch, walker, first + tile)",
        case("offsets in step"),
    ),
    Fault("delta without dlse", OP, "dout.astype(lse.dtype)) - dlse", "dout.astype(lse.dtype))", case("local stride")),
    Fault(
        "sinks dropped", SINKS,
        "return out * kept.swapaxes(1, 2)[..., None].astype(out.dtype), total", "return out, lse",
        case("sinks"),
    ),
    Fault("the gradient of sinks with the wrong sign", SINKS, "-_weights(", "_weights(", case("sinks")),
    Fault(
        "sums in the inputs' own precision", PROBLEM,
        "np.promote_types(dtype, np.float32)", "np.dtype(dtype)",
        case("local stride"),
    ),
    # Heads, offsets, segments.
    Fault(
        "a group's other heads left out of dk and dv", BACKWARD,
        "groups, -1, gradient.shape[-1]).sum(2)", "groups, -1, gradient.shape[-1])[:, :, 0]",
        in_two_passes("stripes by query head"),
    ),
    Fault(
        "query head i reads KV head i mod k", LAYOUT,
        "walker * self.num_kv_heads // self.walkers", "walker % self.num_kv_heads",
        case("stripes by query head"),
    ),
    Fault(
        "the shift of an offset off by one", LAYOUT,
        "0, self.problem.schedule.query_offset %", "0, 1 + self.problem.schedule.query_offset %",
        case("offset within a block"),
    ),
    Fault(
        "the shift of an offset at run time off by one", LAYOUT,
        "offset // size, offset % size", "offset // size, (offset + 1) % size",
        case("offset at run time"),
    ),
    Fault(
        "rows of another call taken for one's own", BACKWARD,
        "rows = rows - grid.first[batch][:, None]", "rows = rows",
        in_two_passes("offset up to the end"),
    ),
    Fault(
        "numbers for positions beyond the keys", OP,
        "(offset <= last)", "(offset <= last + 1)",
        CASE + "offsets_beyond",
    ),
    Fault(
        "segments forgotten in the backward pass", BACKWARD,
        "if step.kinds is None and not layout.masks_all:", "if step.kinds is None:",
        in_two_passes("documents both ways"),
    ),
    Fault(
        "segments forgotten in the forward pass", FORWARD,
        "if step.kinds is None and not layout.masks_all:", "if step.kinds is None:",
        case("documents both ways"),
    ),
    # What is unread, and empty rows.
    Fault(
        "unread keys not zeroed, forward", FORWARD,
        "return jnp.where(read, key, 0), jnp.where(read, value, 0), allowed", "return key, value, allowed",
        case("first tokens both ways"),
    ),
    Fault(
        "unread keys not zeroed, backward", BACKWARD,
        "jnp.where(read, keys_here, 0), jnp.where(read, values_here, 0)", "keys_here, values_here",
        in_two_passes("first tokens both ways"),
    ),
    Fault(
        "rows without a query count as readers", BACKWARD,
        "(rows < used)", "(rows < grid.rows)",
        in_two_passes("offsets in step"),
    ),
    Fault(
        "keys that nobody reads get another's gradient", BACKWARD,
        "jnp.where((places >= 0)[None, :, :, None, None], blocks, 0)", "blocks",
        in_two_passes("strided"),
    ),
    Fault(
        "an empty row's weights are infinite, and so their gradient", XLA,
        "jnp.where(jnp.isneginf(lse), jnp.inf, lse)", "lse",
        CHANGED + "gradient_of_the_gradient",
    ),
    Fault(
        "a NaN taken for an empty row", FORWARD,
        "reads = total != 0", "reads = total > 0",
        CASE + "offsets_beyond",
    ),
    # Loops.
    Fault("the last step left out", WALKING, "-(-most // count)", "most // count", case("ranges")),
    Fault(
        "the order of chunks not undone", WALKING,
        "array.reshape(-1, *array.shape[2:])[back]", "array.reshape(-1, *array.shape[2:])[:units]",
        case("local stride"),
    ),
    Fault(
        "a step beyond the end of a list", WALKS,
        "valid = entry < ends[:, -1:]", "valid = entry <= ends[:, -1:]",
        case("local stride"),
    ),
    # Transformations and merging.
    Fault(
        "a residual without its name", OP,
        "checkpoint_name(out, OUT_NAME)", "out",
        CHANGED + "named_residuals_spare_the_forward_pass",
    ),
    Fault(
        "parts weighed alike", FUNCTIONAL,
        "(weights / total[None])", "(jnp.sign(weights) / jnp.sign(weights).sum(0)[None])",
        "tests/s2jax/test_combine.py::test_parts_make_the_whole",
    ),
    Fault(
        "parts without a maximum", FUNCTIONAL,
        "most = jax.lax.stop_gradient(stacked.max(0))", "most = jax.lax.stop_gradient(0 * stacked.max(0))",
        "tests/s2jax/test_combine.py::test_far_apart_logits",
    ),
]  # fmt: skip
