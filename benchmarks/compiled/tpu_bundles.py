"""Reads the schedules that the TPU compiler prints: the bundles of every region of a kernel, and the slots they use.

    for kernel in kernels_in(folder):
        (body,) = kernel.innermost("MXU")
        print(kernel.name, body.bundles, body.slots["MXU"])

A bundle is what a TensorCore does in a cycle, so that the bundles of a loop's body are its cycles, waits for copies
aside. The compiler writes them where LIBTPU_INIT_ARGS says so, which is read when libtpu is loaded: see `DUMP`.
"""

import collections
import dataclasses
import glob
import pathlib
import re
from collections import Counter

DUMP = " ".join([
    "--xla_jf_dump_to={folder}", "--xla_jf_dump_hlo_text=true", "--xla_jf_dump_llo_text=true",
    "--xla_jf_emit_annotations=true", "--xla_jf_debug_level=2",
])  # fmt: skip
"""LIBTPU_INIT_ARGS that make it write."""

_FILE = re.compile(r"\d+-(?P<name>.+)-\d+-final_bundles\.txt")
_BUNDLE = re.compile(r"^ *(?P<address>0x[0-9a-f]+|0) +(?:[A-Z]{2})? *:")
_REGION = re.compile(r"(Start|End) region (\d+)")


@dataclasses.dataclass(frozen=True)
class Region:
    """A part of a kernel that runs in order, without a branch but those around the regions inside.

    Attributes:
      bundles: of all of it, the regions inside included.
      slots: how many slots of each unit are used in them.
      regions: those inside.
    """

    number: int
    bundles: int
    slots: Counter[str]
    regions: tuple["Region", ...]


@dataclasses.dataclass(frozen=True)
class TpuKernel:
    """What the compiler made of one kernel, or of what XLA fused.

    Attributes:
      capacity: slots of each unit in a bundle.
      regions: the outermost ones.
    """

    name: str
    bundles: int
    capacity: dict[str, int]
    regions: tuple[Region, ...]

    def innermost(self, unit: str) -> tuple[Region, ...]:
        """The regions that use a unit while no region inside them does."""
        return tuple(found for region in self.regions for found in _innermost(region, unit))


def kernels_in(folder: pathlib.Path) -> list[TpuKernel]:
    """In the order of their compilation."""
    found = {path: _FILE.fullmatch(path.name) for path in sorted(folder.glob("*final_bundles.txt"))}
    return [
        _kernel(path, match["name"]) for path, match in found.items() if match and "schedule-analysis" not in path.name
    ]


def _kernel(path: pathlib.Path, name: str) -> TpuKernel:
    capacity, used = _slots(path)
    edges = collections.defaultdict(dict)
    last = -1
    for line in path.read_text().splitlines():
        if bundle := _BUNDLE.match(line):
            last = int(bundle["address"], 16)
        for edge, number in _REGION.findall(line):
            edges[int(number)][edge] = last
    spans = sorted(
        ((span["Start"], span["End"], number) for number, span in edges.items() if len(span) == 2),
        key=lambda span: (span[0], -span[1], span[2]),
    )
    return TpuKernel(name, last + 1, capacity, _nested(spans, used))


def _slots(bundles: pathlib.Path) -> tuple[dict[str, int], list[Counter[str]]]:
    """Slots in a bundle, and those used in every bundle."""
    begins = glob.escape(re.sub(r"\d+-final_bundles\.txt$", "", bundles.name))
    (path,) = bundles.parent.glob(f"{begins}[0-9]*-final_hlo-static-per-bundle-utilization.txt")
    _, names, numbers, _, *rows = path.read_text().splitlines()
    units = [name.strip() for name in names.split(",")]
    return (
        dict(zip(units, map(int, numbers.split()), strict=True)),
        [Counter(dict(zip(units, map(int, row.split()), strict=True))) for row in rows],
    )


def _nested(spans: list[tuple[int, int, int]], used: list[Counter[str]]) -> tuple[Region, ...]:
    """Regions from (first bundle, last bundle, number), by first bundle, the longer before the shorter.

    Instructions move over the edges of regions, so that one may end a few bundles after the one that it is inside of.
    """
    regions = []
    while spans:
        (first, last, number), rest = spans[0], spans[1:]
        inside = [span for span in rest if 2 * (min(last, span[1]) + 1 - span[0]) > span[1] + 1 - span[0]]
        spans = [span for span in rest if span not in inside]
        slots = sum(used[first : last + 1], Counter())
        regions.append(Region(number, last + 1 - first, slots, _nested(inside, used)))
    return tuple(regions)


def _innermost(region: Region, unit: str) -> list[Region]:
    inner = [found for each in region.regions for found in _innermost(each, unit)]
    return inner or ([region] if region.slots[unit] else [])
