"""Invariants of the Hopper kernels: barriers and stages, forward, dq, dk and dv, and the tables they are given."""

from tests.faults.fault import Fault
from tests.faults.operators import begins, compares, drops_call, drops_operand, unwraps

KERNELS = "pallas_kernels.mosaic_gpu"
FORWARD = "kernels/test_mosaic_gpu_races.py::test_every_copy_is_waited_for[forward]"
STRANGERS = "kernels/test_mosaic_gpu.py::TestInterpreted::test_case[strangers]"
GRADIENTS = "kernels/test_mosaic_gpu_gradients.py::TestGradients::test_case[local stride]"

FAULTS = [
    Fault(
        "A stage is not overwritten before it is read",
        f"{KERNELS}:StepLoop._wait_until_empty",
        drops_call("barrier_wait"),
        FORWARD,
    ),
    Fault(
        "A stage is released only after its last product",
        f"{KERNELS}:_step",
        begins("plgpu.barrier_arrive(tile.smem['key_empty'].at[step.stage])"),
        FORWARD,
    ),
    Fault(
        "Every stage that was read is released",
        f"{KERNELS}:_step",
        drops_call("barrier_arrive", about="value_empty"),
        STRANGERS,
    ),
    Fault(
        "A full barrier counts every copy",
        f"{KERNELS}:dq_kernel",
        drops_operand("*", "2"),
        GRADIENTS,
    ),
    Fault(
        "Results are in shared memory before they are copied from it",
        f"{KERNELS}:_store",
        drops_call("commit_smem"),
        FORWARD,
    ),
    Fault(
        "Hopper's running sum and output are rescaled when a larger logit comes",
        f"{KERNELS}:_step",
        drops_operand("*", "alpha", hits=2),
        STRANGERS,
    ),
    Fault(
        "Hopper's dq carries the scale",
        f"{KERNELS}:_compute_dq",
        drops_operand("*", "factor"),
        GRADIENTS,
    ),
    Fault(
        "Hopper's dk and dv are summed over the query heads of a group",
        f"{KERNELS}:KVTile.__init__.head",
        drops_operand("+", "group_head"),
        GRADIENTS,
    ),
    Fault(
        "A NaN reaches no gradient of a key that is hidden from it",
        f"{KERNELS}:_step_dkv",
        unwraps("where", 1, about="p_slope"),
        "kernels/test_mosaic_gpu_gradients.py::test_a_nan_goes_no_further_than_it_is_read",
    ),
    Fault(
        "Each key block is in exactly one KV tile",
        "pallas_kernels:_group_blocks",
        unwraps("setdiff1d"),
        "kernels/test_mosaic_gpu_keys.py::test_packs_are_walked_by_what_reads_them",
    ),
    Fault(
        "A tile walks all blocks of its documents",
        "pallas_kernels:find.halve",
        compares("<", "<=", about="blocks"),
        "kernels/test_mosaic_gpu_arrays.py::TestNarrow::test_documents",
    ),
    Fault(
        "Reads of a mask come before the copies that overwrite it",
        f"{KERNELS}:StepLoop._mask",
        drops_call("commit_smem"),
        FORWARD,
        unseen="The interpreter's product reads values otherwise than the chip, and its commit covers masks, too.",
    ),
    Fault(
        "dq is in shared memory before it is copied from it",
        f"{KERNELS}:_compute_dq",
        drops_call("commit_smem"),
        GRADIENTS,
        unseen="The interpreter orders these writes before the copies; in the other kernels it does not.",
    ),
    Fault(
        "Exponentials do not wait for the other warpgroup's products",
        f"{KERNELS}:_step",
        unwraps("optimization_barrier"),
        STRANGERS,
        unseen="The results are the same; the order of instructions costs time only.",
    ),
]
