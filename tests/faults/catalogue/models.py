"""Invariants of layers, of the model and what chooses its tokens, and of checkpoints."""

from tests.faults.fault import Fault
from tests.faults.operators import begins, decides, drops_call, replaces, returns

FAULTS = [
    Fault(
        "Keys come into a cache rotated by their positions in the context",
        "s2jax:cache_positions",
        decides(True, "begin"),
        "s2jax/test_layers.py::test_both_go_on_from_a_cache",
    ),
    Fault(
        "Packed documents do not see each other",
        "models:run_layer",
        begins("segment_ids = None"),
        "models/test_transformer.py::test_packed_documents_are_as_if_alone",
    ),
    Fault(
        "Layers whose caches differ in length give NaN",
        "models:Transformer._cached",
        replaces("jnp.nan", "logits"),
        "models/test_transformer.py::test_layers_that_were_not_treated_alike_give_nan",
    ),
    Fault(
        "Padded prompts go on from their own last token",
        "models:Transformer._cached",
        decides(True, "counts"),
        "models/test_decoder.py::TestModel::test_prompts_of_any_length_go_on_as_if_alone",
    ),
    Fault(
        "top_p keeps the likeliest tokens that reach it",
        "models:Sampling._ranked",
        replaces("jnp.cumsum(shares, -1) - shares", "jnp.cumsum(shares, -1)"),
        "models/test_sampling.py::test_the_distribution_is_its_definition",
    ),
    Fault(
        "Rotary pairs of a GGUF file come in the model's order",
        "models:_halves_together",
        returns("rows"),
        "models/checkpoints/test_gguf.py::test_the_model_is_the_one_that_was_written",
    ),
    Fault(
        "An interrupted save leaves no directory that looks complete",
        "models.checkpoints.pretrained:save",
        drops_call("unlink"),
        "models/checkpoints/test_pretrained.py::test_an_interrupted_save_is_not_taken_for_whole",
    ),
]
