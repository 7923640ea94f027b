"""Faults planted by hand, each with the test that fails on it.

    python tests/kernels/planted_faults.py            # plants them all, one after the other, and says what was found
    python tests/kernels/planted_faults.py --write    # the same, and writes docs/planted_faults.md
    python tests/kernels/planted_faults.py -k scale   # those with "scale" in their names

Each is a piece of text replaced in a copy of the tree; the test must pass before and fail after.
"""

import argparse
import dataclasses
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
TABLE = ROOT / "docs" / "planted_faults.md"

OP, CHECKS, PROBLEM = "pallas_kernels/op.py", "pallas_kernels/checks.py", "pallas_kernels/problem.py"
SINKS = "pallas_kernels/sinks.py"
SCHEDULE, TILES = "pallas_kernels/schedule.py", "pallas_kernels/tiles.py"
FORWARD, BACKWARD, ONE_PASS, LAYOUT, WALKING, WALKS = (
    f"pallas_kernels/xla/{name}.py" for name in ("forward", "backward", "one_pass", "layout", "walking", "walks")
)
XLA, COMPILER, BANDS = "pallas_kernels/xla/__init__.py", "s2jax/compiler.py", "s2jax/bands.py"
FUNCTIONAL = "s2jax/functional.py"

COMPILED = "tests/s2jax/test_compiler.py::test_"
CASE = "tests/kernels/test_xla.py::TestXla::test_"
CHANGED = "tests/kernels/test_xla.py::TestTransformations::test_"


@dataclasses.dataclass(frozen=True)
class Fault:
    """`old` becomes `new` in a file, and the test fails."""

    name: str
    file: str
    old: str
    new: str
    test: str


def case(name: str) -> str:
    return f"{CASE}case[{name}]"


def in_two_passes(name: str) -> str:
    """The backward pass that is not for CPUs."""
    return f"{CASE}two_passes[{name}]"


FAULTS = [
    # What is read.
    Fault(
        "the window one block too wide", "s2jax/patterns/local_stride.py",
        "block_high=left)", "block_high=left + 1)",
        COMPILED + "a_schedule_reads_what_its_pattern_reads",
    ),
    Fault(
        "stripes a block off", "s2jax/patterns/striped.py",
        "np.arange(num_columns) + residue)", "np.arange(num_columns) + residue + 1)",
        COMPILED + "a_schedule_reads_what_its_pattern_reads",
    ),
    Fault(
        "every list cut short by one", COMPILER,
        "np.searchsorted(blocks, row - low + 1)", "np.searchsorted(blocks, row - low)",
        COMPILED + "a_schedule_reads_what_its_pattern_reads",
    ),
    Fault(
        "every list begins one late", COMPILER,
        "np.searchsorted(blocks, row - high + 1)", "np.searchsorted(blocks, row - high + 2)",
        COMPILED + "a_schedule_reads_what_its_pattern_reads",
    ),
    Fault(
        "a window of tokens one token short", COMPILER,
        "(apart >= band.token_low)", "(apart > band.token_low)",
        case("window of tokens"),
    ),
    Fault(
        "one token mask for all blocks at a distance", COMPILER,
        "ids[rest] = named[which.reshape(-1)]", "ids[rest] = named[0]",
        COMPILED + "a_schedule_of_the_case_table",
    ),
    Fault(
        "the edge of a coarse block cut short", BANDS,
        "core[1], core[1] + ratio - 1", "core[1], core[1] + ratio - 2",
        COMPILED + "a_schedule_of_the_case_table",
    ),
    Fault(
        "a schedule for every layer", COMPILER,
        "@functools.lru_cache(maxsize=256)\n", "",
        COMPILED + "schedules_are_cached",
    ),
    # The same from the keys.
    Fault(
        "the first reader of a stripe left out", SCHEDULE,
        'np.searchsorted(high, positions, side="right")', 'np.searchsorted(high, positions, side="left")',
        COMPILED + "transposed_lists_hold_the_same_entries",
    ),
    Fault(
        "transposed entries by row, not by column", SCHEDULE,
        "np.lexsort((rows, columns))", "np.lexsort((columns, rows))",
        COMPILED + "transposed_lists_hold_the_same_entries",
    ),
    Fault(
        "masks of transposed entries in the old order", SCHEDULE,
        "lists.masks[positions][order]", "lists.masks[positions]",
        COMPILED + "transposed_lists_hold_the_same_entries",
    ),
    Fault(
        "masks swapped between the rows of a tile", TILES,
        "kinds[entry.reshape(-1), row] =", "kinds[entry.reshape(-1), size - 1 - row] =",
        COMPILED + "merged_neighbours_read_what_each_reads",
    ),
    Fault(
        "a tile loses a block where its rows begin apart", TILES,
        "np.where(shared[:, None], low[:, None], stop)", "np.where(shared[:, None], low[:, None] - 1, stop)",
        COMPILED + "merged_packs_read_what_each_reads",
    ),
    Fault(
        "a token mask not transposed for the keys", BACKWARD,
        "masks.transpose(0, 2, 4, 1, 3)", "masks.transpose(0, 2, 3, 1, 4)",
        in_two_passes("local stride"),
    ),
    # Selections.
    Fault(
        "all blocks of a selection read, whatever their count", WALKS,
        "first + jnp.clip(selection.counts, 0, most)", "first + jnp.full_like(selection.counts, most)",
        case("selection"),
    ),
    Fault(
        "a selection transposed by entry, not by row", WALKS,
        "dtype=jnp.int32) // most)[None]", "dtype=jnp.int32) % most)[None]",
        in_two_passes("selection"),
    ),
    Fault(
        "queries of a selection do not see themselves", LAYOUT,
        "allowed &= key.position <= query.position", "allowed &= key.position < query.position",
        case("selection for each"),
    ),
    Fault(
        "a selection that forgets the offset", LAYOUT,
        "position = index if offset is None else index + offset[batch][..., None]", "position = index",
        case("selection from an offset"),
    ),
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
        "default=two_passes, **one_pass", "default=one_pass.get('cpu', two_passes)",
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
    Fault("the gradient of sinks with the wrong sign", SINKS, "(-weights * delta)", "(weights * delta)", case("sinks")),
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
    # Loops.
    Fault("the last step left out", WALKING, "-(-most // count)", "most // count", case("ranges")),
    Fault(
        "the order of chunks not undone", WALKING,
        "array.reshape(-1, *array.shape[2:])[back]", "array.reshape(-1, *array.shape[2:])[:units]",
        case("local stride"),
    ),
    Fault(
        "a step beyond the end of a list", WALKS,
        "valid = entry[None, :] < ends[:, -1:]", "valid = entry[None, :] <= ends[:, -1:]",
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
        "(weights / total)", "(known / known.sum(0))",
        "tests/s2jax/test_combine.py::test_parts_make_the_whole",
    ),
    Fault(
        "parts without a maximum", FUNCTIONAL,
        "most = jax.lax.stop_gradient(stacked.max(0))", "most = jax.lax.stop_gradient(0 * stacked.max(0))",
        "tests/s2jax/test_combine.py::test_far_apart_logits",
    ),
]  # fmt: skip


def plant(fault: Fault, tree: pathlib.Path) -> None:
    """Raises ValueError unless the text is there, once."""
    path = tree / fault.file
    text = path.read_text()
    times = text.count(fault.old)
    if times != 1:
        raise ValueError(f"{fault.name}: expected once in {fault.file}, got {times} times: {fault.old!r}")
    path.write_text(text.replace(fault.old, fault.new))


def copy_of_the_tree(to: pathlib.Path) -> None:
    for name in ("pallas_kernels", "s2jax", "tests"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", to)


def outcome(tree: pathlib.Path, test: str) -> str:
    """ "passed" or "failed"; raises RuntimeError where the test did not run."""
    path, _, selection = test.partition("::")
    # By its name's beginning, so that a parametrised test counts with all its cases.
    names = selection.split("::")
    exact = "[" in names[-1]
    where = [test] if exact else [path, "-k", " and ".join(names)]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *where]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{test} did not run: {done.stdout}{done.stderr}")
    return "passed" if done.returncode == 0 else "failed"


def try_out(fault: Fault) -> str:
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder)
        copy_of_the_tree(tree)
        plant(fault, tree)
        return outcome(tree, fault.test)


def table(outcomes: dict[Fault, str]) -> str:
    lines = [
        "# Faults planted by hand",
        "",
        "What tests are worth shows in what they find. Each of these was planted in a copy of the tree, and the test",
        "beside it, which passes without it, ran: `python tests/kernels/planted_faults.py --write` does it again and",
        "writes this page.",
        "",
        "| fault | where | the test | the test then |",
        "|---|---|---|---|",
    ]
    for fault, result in outcomes.items():
        test = fault.test.removeprefix("tests/").replace("|", "\\|")
        lines.append(f"| {fault.name} | `{fault.file}` | `{test}` | {result} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/planted_faults.md")
    parser.add_argument("-k", default="", help="only faults with this in their names")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if options.k in fault.name]
    outcomes = {}
    for fault in chosen:
        outcomes[fault] = try_out(fault)
        print(f"{outcomes[fault]:6}  {fault.name}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder)
        copy_of_the_tree(tree)
        tests = dict.fromkeys(fault.test for fault in chosen)
        broken = [test for test in tests if outcome(tree, test) != "passed"]
    missed = [fault.name for fault, result in outcomes.items() if result != "failed"]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} found; missed: {missed}; failing without a fault: {broken}")
    if options.write:
        TABLE.write_text(table(outcomes))
    return 1 if missed or broken else 0


if __name__ == "__main__":
    sys.exit(main())
