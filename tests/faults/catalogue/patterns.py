"""Invariants of patterns, of the compiler, of schedules, and of rows merged into tiles."""

from tests.faults.fault import Fault
from tests.faults.operators import compares, decides, drops_decorator, drops_operand, passes, replaces, returns

COMPILER = "s2jax/test_compiler.py::test_"
READS = COMPILER + "a_schedule_reads_what_its_pattern_reads"

FAULTS = [
    Fault(
        "A family's bands read what its rule reads",
        "s2jax.patterns:Striped.block_bands",
        replaces("each.high", "each.high + 1"),
        "patterns/test_closed_form.py::test_edges_of_every_family",
    ),
    Fault(
        "KV heads together read every block of the context",
        "s2jax.patterns:HeadResidues.residues_of",
        replaces("heads.kv_head(head)", "0"),
        "patterns/test_statistics.py::test_published_densities",
    ),
    Fault(
        "An intersection of patterns reads what both read",
        "s2jax:intersect",
        replaces("max(first.token_low, second.token_low)", "first.token_low"),
        "patterns/test_closed_form.py::test_bands_intersect",
    ),
    Fault(
        "A closed form that contradicts its rule is refused",
        "s2jax.patterns:_compare",
        decides(False, "wrong"),
        "patterns/test_agreement.py::test_contradictions_are_found",
    ),
    Fault(
        "A function whose global has changed is another pattern",
        "s2jax.patterns:_names",
        returns("frozenset()"),
        "patterns/test_mask_mod.py::test_a_changed_global_is_another_function",
    ),
    Fault(
        "Every operand of a pattern's text is part of the pattern",
        "s2jax.patterns:_Parser._joined",
        returns("result[:1]"),
        "patterns/test_parsing.py::test_patterns",
    ),
    Fault(
        "A list's last entry is read",
        "s2jax:_Compiler._ranges",
        drops_operand("+", "1", about="low"),
        READS,
    ),
    Fault(
        "The edge of a window of tokens is read",
        "s2jax:_Compiler._token_mask",
        compares(">=", ">"),
        "kernels/test_xla.py::TestXla::test_case[window of tokens both ways]",
    ),
    Fault(
        "Layers of one pattern share one schedule",
        "s2jax.compiler:_compiled",
        drops_decorator("bounded_cache"),
        COMPILER + "schedules_are_cached",
    ),
    Fault(
        "Key blocks list all queries that read them",
        "pallas_kernels:_column_intervals",
        passes("searchsorted", "side", "'left'", about="high"),
        COMPILER + "transposed_lists_hold_the_same_entries",
    ),
    Fault(
        "A merged tile masks each of its rows by its own mask",
        "pallas_kernels:_margins",
        replaces("label % size", "size - 1 - label % size"),
        COMPILER + "merged_neighbours_read_what_each_reads",
    ),
]
