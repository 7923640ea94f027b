"""Invariants of training: packed rows, shares of a batch, the step, and going on from a checkpoint."""

from tests.faults.fault import Fault
from tests.faults.operators import begins, decides, drops_operand, replaces

PACKING, DATA, STEP = (f"training/test_{name}.py::test_" for name in ("packing", "data", "step"))

FAULTS = [
    Fault(
        "Every pair of tokens counts once",
        "training:PackedRows.__getitem__",
        decides(False, "index"),
        PACKING + "every_pair_counts_exactly_once_and_in_order",
    ),
    Fault(
        "Processes load different rows of a batch",
        "training:training_batches",
        replaces("share.index", "0"),
        DATA + "the_shares_of_the_processes_are_the_batch",
    ),
    Fault(
        "A run goes on with the row where it stopped",
        "training:training_batches",
        begins("first_row = 0"),
        DATA + "going_on_from_a_row_is_having_come_there",
    ),
    Fault(
        "Held-out tokens are not trained on",
        "training:_after",
        begins("cut = max(cut - 1, 0)"),
        "training/test_held_out.py::test_the_share_is_of_tokens_and_no_token_is_on_both_sides",
    ),
    Fault(
        "Only counted targets weigh in the loss",
        "training:Trainer._token_nll",
        drops_operand("*", "loss_mask"),
        STEP + "only_counted_targets_weigh",
    ),
    Fault(
        "A batch in parts has the gradient of the batch",
        "training:accumulated_gradient",
        replaces(
            "summed_loss(params, part) / count",
            "summed_loss(params, part) / jnp.maximum(part['loss_mask'].sum(), 1.0) / parts",
        ),
        STEP + "a_batch_in_parts_has_the_gradient_of_the_batch",
    ),
    Fault(
        "A run does not go on from a torn checkpoint",
        "training:Checkpoints._whole_metadata",
        decides(False, "metadata", hits=2),
        "training/test_checkpoint.py::test_a_torn_newest_one_is_passed_over_and_named",
    ),
]
