"""Invariants of the KV cache: its layout, its slots, its steps, and its shards."""

from tests.faults.fault import Fault
from tests.faults.operators import compares, decides, drops_operand, replaces, unwraps

SAFE = "s2jax/test_cache_safety.py::test_"

FAULTS = [
    Fault(
        "A slot is freed only after its block's last reader",
        "s2jax:_linear_scan",
        compares("<", "<="),
        "s2jax/test_cache_layout.py::test_a_block_has_its_slot_for_itself_while_it_is_read",
    ),
    Fault(
        "What rollback may bring back is kept",
        "s2jax.cache.layout:_compiled",
        drops_operand("+", "slack", hits=2),
        "s2jax/test_cache.py::TestSequences::test_rollback[local stride]",
    ),
    Fault(
        "A slot that holds another block is not read",
        "s2jax:BufferSchedule",
        drops_operand("&", "held"),
        "s2jax/test_cache.py::TestEqualsTheOp::test_chunks",
    ),
    Fault(
        "A chunk attends to what it overwrites in the cache",
        "s2jax:Step.extend",
        decides(True, "max_rollback"),
        "s2jax/test_cache.py::TestEqualsTheOp::test_chunks",
    ),
    Fault(
        "Rows of a pattern that streams repeat themselves",
        "s2jax:BufferSchedule",
        decides(False, "max_length"),
        "s2jax/test_cache.py::TestEqualsTheOp::test_streams_without_end",
    ),
    Fault(
        "Tokens beyond the cache give NaN",
        "s2jax:KVCache._extended",
        replaces("jnp.nan", "0.0", hits=2),
        SAFE + "tokens_beyond_the_cache_give_nan_and_harm_nobody",
    ),
    Fault(
        "A NaN that is not read again is gone",
        "s2jax:_attend",
        unwraps("where", 1, about="any"),
        SAFE + "a_nan_in_a_block_of_which_others_are_read",
    ),
    Fault(
        "A shard's cache looks up its own heads",
        "s2jax:DeferredTables.make",
        drops_operand("*", "index"),
        "s2jax/test_split_caches.py::test_created_inside",
    ),
]
