"""Reads the TPU compiler's schedules: bundles and used slots of every region of a kernel.

    for kernel in kernels_in(folder):
        (body,) = kernel.innermost("MXU")
        print(kernel.name, body.bundles, body.slots["MXU"])

A TensorCore executes one bundle per cycle, so the bundles of a loop's body are its cycles, waits for copies aside.
LIBTPU_INIT_ARGS makes the compiler write them (see `DUMP`); libtpu reads it when it is loaded.
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
"""LIBTPU_INIT_ARGS that make the compiler write its schedules to `folder`."""

_FILE = re.compile(r"\d+-(?P<name>.+)-\d+-final_bundles\.txt")
_BUNDLE = re.compile(r"^ *(?P<address>0x[0-9a-f]+|0) +(?:[A-Z]{2})? *:")
_REGION = re.compile(r"(Start|End) region (\d+)")


@dataclasses.dataclass(frozen=True)
class Region:
    """A part of a kernel without branches other than those around its inner regions.

    Attributes:
      bundles: number of bundles, inner regions included.
      slots: used slots of each unit in these bundles.
      regions: the inner regions.
    """

    number: int
    bundles: int
    slots: Counter[str]
    regions: tuple["Region", ...]


@dataclasses.dataclass(frozen=True)
class TpuKernel:
    """The schedule of one kernel or XLA fusion.

    Attributes:
      capacity: slots of each unit in a bundle.
      regions: the outermost ones.
    """

    name: str
    bundles: int
    capacity: dict[str, int]
    regions: tuple[Region, ...]

    def innermost(self, unit: str) -> tuple[Region, ...]:
        """The regions that use a unit while none of their inner regions does."""
        return tuple(found for region in self.regions for found in _innermost(region, unit))


def kernels_in(folder: pathlib.Path) -> list[TpuKernel]:
    """Kernels in the order of their compilation."""
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
    """Slots of a bundle by unit, and the used slots of every bundle."""
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

    Instructions move over the edges of regions, so an inner region may end a few bundles after its outer one.
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
