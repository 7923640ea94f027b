"""Invariants of the TPU kernels: the ring of copies, tiles and their lists, forward and backward."""

from tests.faults.fault import Fault
from tests.faults.operators import becomes, begins, drops_call, drops_operand, replaces

KERNELS = "pallas_kernels.mosaic_tpu"
LOCAL = "kernels/test_mosaic_tpu.py::TestInterpreted::test_case[local stride]"

FAULTS = [
    Fault(
        "A step is computed after its copies have come",
        f"{KERNELS}:_run_pass",
        drops_call("wait"),
        LOCAL,
    ),
    Fault(
        "Every tile begins its sums anew",
        f"{KERNELS}:_finish",
        drops_call("reset"),
        "kernels/test_mosaic_tpu.py::TestInterpreted::test_shape[tiles without keys]",
    ),
    Fault(
        "A tile of heads walks its own list",
        f"{KERNELS}:current_tile.list_id",
        becomes("inputs.list_ids[0]"),
        LOCAL,
    ),
    Fault(
        "lse and delta are those of the query head",
        f"{KERNELS}:_column_values",
        drops_operand("+", "head"),
        LOCAL,
    ),
    Fault(
        "Gradients of a KV tile go back to its blocks",
        f"{KERNELS}:from_kv_tiles",
        begins("members = members[:, ::-1]"),
        LOCAL,
    ),
    Fault(
        "Copies beyond a head's last step are waited for",
        f"{KERNELS}:for_each_step_group",
        replaces("range(STEPS_PER_GROUP)", "range(0)"),
        LOCAL,
        unseen="The interpreter does not look at semaphores when a kernel ends; a TPU halts.",
    ),
]
