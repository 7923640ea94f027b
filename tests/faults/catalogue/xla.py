"""Invariants of the op (derivative, offsets, sinks, transformations, sharding) and of its backend in plain XLA."""

from tests.faults.fault import Fault
from tests.faults.operators import (
    begins,
    compares,
    decides,
    drops_operand,
    replaces,
    returns,
    unwraps,
)  # fmt: skip

XLA = "kernels/test_xla.py::TestXla::test_"
CHANGED = "kernels/test_xla.py::TestTransformations::test_"
CASE, TWO_PASSES = XLA + "case", XLA + "two_passes"
PARTS = "s2jax/test_combine.py::"

FAULTS = [
    # The backend.
    Fault(
        "The running sum and output are rescaled when a larger logit comes",
        "pallas_kernels.xla:attend.tile.body",
        drops_operand("*", "alpha", hits=2),
        CASE + "[groups of four]",
    ),
    Fault(
        "dq and dk carry the scale",
        "pallas_kernels.xla:weights_and_gradient",
        drops_operand("*", "scale"),
        CASE + "[local stride]",
    ),
    Fault(
        "dq and dk carry the slope of the soft cap",
        "pallas_kernels.xla:weights_and_gradient",
        decides(False, "slope"),
        CASE + "[soft cap, low precision]",
    ),
    Fault(
        "Hidden keys have no weight in the gradients",
        "pallas_kernels.xla:weights_and_gradient",
        decides(True, "allowed"),
        CASE + "[local stride]",
    ),
    Fault(
        "Unread keys are zeroed in the forward pass",
        "pallas_kernels.xla:QueryPass.gather",
        unwraps("where", 1, about="read", hits=2),
        CASE + "[first tokens both ways]",
    ),
    Fault(
        "Unread keys are zeroed in the backward pass",
        "pallas_kernels.xla:key_value_gradients",
        unwraps("where", 1, about="read", hits=2),
        TWO_PASSES + "[offset within a block]",
    ),
    Fault(
        "dk and dv are summed over the query heads of a group",
        "pallas_kernels.xla:KeyPass._in_place",
        returns("result / groups"),
        TWO_PASSES + "[stripes by query head]",
    ),
    Fault(
        "A query head reads the KV head of its group",
        "pallas_kernels.xla:Layout.kv_head",
        returns("0 * result"),
        CASE + "[stripes by query head]",
    ),
    Fault(
        "A query reads the keys of its own segment only",
        "pallas_kernels.xla:Layout.pairs",
        decides(False, "segment"),
        CASE + "[documents both ways]",
    ),
    Fault(
        "Segments mask the pass over the keys, too",
        "pallas_kernels.xla:KeyPass.allowed",
        replaces("not layout.masks_all", "True"),
        TWO_PASSES + "[an offset and documents]",
    ),
    Fault(
        "A NaN is not taken for a row that reads nothing",
        "pallas_kernels.xla:attend.tile",
        compares("!=", ">"),
        XLA + "offsets_beyond_the_keys_and_nan_queries_give_nan",
    ),
    Fault(
        "A selection's count ends its row",
        "pallas_kernels.xla:selection_lists",
        replaces("jnp.clip(selection.counts, 0, most)", "most"),
        CASE + "[selection both ways]",
    ),
    # The op.
    Fault(
        "An offset within a block shifts the rows of queries",
        "pallas_kernels:make_query_grid",
        drops_operand("%", "block_size"),
        CASE + "[offset within a block]",
    ),
    Fault(
        "Offsets beyond the schedule give NaN",
        "pallas_kernels:_nan_beyond",
        decides(True, "offset"),
        XLA + "offsets_beyond_the_keys_and_nan_queries_give_nan",
    ),
    Fault(
        "delta holds the gradient of lse",
        "pallas_kernels:_compute_gradients.local",
        drops_operand("-", "dlse"),
        CASE + "[local stride]",
    ),
    Fault(
        "lse and out count the sinks",
        "pallas_kernels:add_sinks",
        begins("sinks = None"),
        CASE + "[prefix LM]",
    ),
    Fault(
        "In forward mode the weights of a row move against each other",
        "pallas_kernels:_compute_tangents.local",
        drops_operand("-", "dlse"),
        "kernels/test_strict_modes.py::test_tangents",
    ),
    Fault(
        "Kept residuals spare the forward pass",
        "pallas_kernels:_attention_jvp",
        unwraps("checkpoint_name", 0, about="OUT_NAME"),
        CHANGED + "named_residuals_spare_the_forward_pass",
    ),
    Fault(
        "Heads that a caller split walk their own lists",
        "pallas_kernels:own_rows",
        replaces("first_head * size // total", "0 * first_head"),
        CHANGED + "heads_split_by_a_shard_map",
    ),
    Fault(
        "Heads split over a mesh walk their own lists",
        "pallas_kernels.xla:XlaBackend.table_specs",
        returns("jax.tree.map(lambda result: PartitionSpec(), result)"),
        CHANGED + "over_a_mesh",
    ),
    Fault(
        "A gradient is summed over a vmap that shares its argument",
        "pallas_kernels:Signature.as_argument",
        replaces("result.sum(at)", "result.mean(at)"),
        CHANGED + "gradient_of_a_vmap_over_offsets",
    ),
    # Parts.
    Fault(
        "Parts whose logits are far apart do not overflow",
        "pallas_kernels.softmax:merge",
        replaces("functools.reduce(jnp.maximum, [part.m for part in parts])", "0 * parts[0].m"),
        PARTS + "test_far_apart_logits",
    ),
    Fault(
        "Parts that read nothing make a row that reads nothing",
        "pallas_kernels.softmax:PartialAttention.finish",
        replaces("jnp.where(reads, self.l, 1)", "self.l"),
        PARTS + "TestEmptyRows",
    ),
]
