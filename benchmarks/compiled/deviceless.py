"""Compiles for absent chips, and reads the code of Mosaic GPU kernels.

    from benchmarks.compiled.deviceless import compile_for, kernels_of

    compile_for("v5e:2x2", function, shape).memory_analysis()
    (kernel,) = kernels_of("h100", function, shape)
    print(kernel.registers, kernel.spill_bytes, [loop.instructions["HGMMA"] for loop in kernel.inner_loops()])

The real compilers run, and nothing is executed. `make compilers` installs them; `missing` says if one is absent. NVIDIA
chips are those described in `chips/`, several of them as "h100:4". TPUs are named by topology ("v5e:2x2", "v5p:2x2x1",
"v6e:2x2"). Sharded functions are compiled under `jax.set_mesh` of a mesh of the chip's `devices`, with Auto axes.
Without a GPU, JAX_PLATFORMS=cpu must be set before jax starts, as `make` and the tests do.
"""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import typing
from collections import Counter
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import topologies
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

CHIPS = pathlib.Path(__file__).parent / "chips"


def missing(chip: str) -> str | None:
    """The reason why nothing can be compiled for `chip`, in one line, or None."""
    if _is_tpu(chip):
        lacking = [] if importlib.util.find_spec("libtpu") else ["libtpu"]
    else:
        lacking = [] if importlib.util.find_spec("jax_cuda13_plugin") else ["jax-cuda13-plugin"]
        lacking += [tool for tool in ("ptxas", "nvdisasm") if _tool(tool) is None]
    if lacking:
        return f"{', '.join(lacking)} not found: `make compilers` installs the compilers"
    if not _is_tpu(chip) and not jax.config.jax_platforms and not os.path.exists("/dev/nvidia0"):
        return "with no GPU here, the CUDA plugin loads only under JAX_PLATFORMS=cpu"
    return None


def ptxas_version() -> tuple[int, ...]:
    """The version of ptxas, as (13, 5, 37). CUDA 12.8.0 to 12.9.0 miscompile masks on Hopper."""
    told = subprocess.run([str(_tool("ptxas")), "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(int(part) for part in _groups(r"\bV(\d+)\.(\d+)\.(\d+)", told))


def devices(chip: str) -> list:
    """The devices of a chip or topology, for meshes and shardings; nothing runs on them."""
    if reason := missing(chip):
        raise RuntimeError(reason)
    if _is_tpu(chip):
        # libtpu reads these when it is loaded; without them it looks for a TPU host.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        return topologies.get_topology_desc(chip, platform="tpu").devices
    topology = f"1x1x{chip.partition(':')[2] or 1}"
    return topologies.get_topology_desc("", "cuda", target_config=_description(chip), topology=topology).devices


def _description(chip: str) -> str:
    return (CHIPS / f"{chip.partition(':')[0]}.txtpb").read_text()


def compile_for(chip: str, function: Callable, *shapes: typing.Any) -> jax.stages.Compiled:
    """`function` compiled for `chip`.

    Args:
      shapes: pytrees of `jax.ShapeDtypeStruct`, the arguments; those without a sharding are put on the first device.
    """
    first = jax.sharding.SingleDeviceSharding(devices(chip)[0])
    shapes = jax.tree.map(lambda shape: shape if shape.sharding else shape.update(sharding=first), shapes)
    # XLA takes the first ptxas on the PATH and keeps it; it must be the one of the installed compilers.
    path = os.pathsep.join([*_folders(), os.environ.get("PATH", "")])
    with _environment("PATH", path), _lowering_context(chip):
        # A new function each time; otherwise jax would take the kernel from its cache and dump nothing.
        return jax.jit(lambda *arguments: function(*arguments)).lower(*shapes).compile()


@dataclasses.dataclass(frozen=True)
class Loop:
    """One loop of the machine code.

    Attributes:
        address: offset of the first instruction in bytes.
        instructions: counts by opcode ("HGMMA", "LDL"), inner loops included.
        loops: inner loops, waits on barriers among them.
    """

    address: int
    instructions: Counter[str]
    loops: tuple["Loop", ...]


@dataclasses.dataclass(frozen=True)
class KernelCode:
    """Machine code of one Mosaic GPU kernel.

    Attributes:
        name: name of the kernel's function.
        ptx_version: version of the PTX, which follows that of ptxas: 9.5 for CUDA 13.5.
        registers: registers per thread at launch; `set_max_registers` takes effect later and is not shown.
        stack_bytes, spill_store_bytes, spill_load_bytes: bytes per thread, as ptxas counts them.
        shared_bytes: dynamic shared memory of a thread block, barriers included.
        instructions: counts by opcode up to the first dot ("HGMMA", "UTMALDG", "LDL").
        loops: the outermost loops.
        sass: the disassembly.
    """

    name: str
    ptx_version: str
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int
    instructions: Counter[str]
    loops: tuple[Loop, ...]
    sass: str = dataclasses.field(repr=False)

    @property
    def spill_bytes(self) -> int:
        return self.spill_store_bytes + self.spill_load_bytes

    def inner_loops(self, opcode: str = "HGMMA") -> tuple[Loop, ...]:
        """The loops that hold `opcode` while none of their inner loops does: a kernel's steps."""
        return tuple(found for loop in self.loops for found in _innermost(loop, opcode))


def kernels_of(chip: str, function: Callable, *shapes: typing.Any) -> tuple[KernelCode, ...]:
    """The Mosaic GPU kernels of `function` compiled for `chip`, in the order of their lowering.

    A kernel that occurs twice with the same code and shapes may be listed once.
    """
    with tempfile.TemporaryDirectory() as folder, _environment("MOSAIC_GPU_DUMP_TO", folder):
        compile_for(chip, function, *shapes)
        reports = {int(_groups(r"_(\d+)$", path.stem)[0]): path for path in pathlib.Path(folder).glob("*.ptxas")}
        return tuple(_kernel(reports[number]) for number in sorted(reports))


def loops_in(sass: str) -> tuple[Loop, ...]:
    """The outermost loops of a disassembly, as `nvdisasm -c` writes it, in the order of their addresses.

    ptxas moves waits to the end of the code, from where they branch back, so a backward branch need not span a loop. A
    loop is a set of basic blocks that all reach one another; without the block that is entered, its inner loops remain.
    """
    blocks = _blocks(sass)
    return _loops(blocks, _edges(blocks), np.ones(len(blocks), bool))


@dataclasses.dataclass
class _Block:
    """A basic block: `labels` lead into it, `targets` are the labels that it branches to."""

    labels: set[str]
    address: int = 0
    instructions: Counter[str] = dataclasses.field(default_factory=Counter)
    targets: set[str] = dataclasses.field(default_factory=set)
    falls_through: bool = True


_LABEL = re.compile(r"^(\.L_\w+):", re.MULTILINE)
_LINE = re.compile(r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<guard>@!?\w+\s+)?(?P<opcode>[A-Z]\w*)(?P<rest>.*)")
_BRANCHES = {"BRA", "BRX", "JMP", "JMX", "CALL"}


def _blocks(sass: str) -> list[_Block]:
    blocks = [_Block(set())]
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            if blocks[-1].instructions:
                blocks.append(_Block(set()))
            blocks[-1].labels.add(label[1])
        elif found := _LINE.search(line):
            block, opcode = blocks[-1], found["opcode"]
            block.address = block.address if block.instructions else int(found["address"], 16)
            block.instructions[opcode] += 1
            if opcode in _BRANCHES | {"EXIT", "RET"}:
                if opcode in _BRANCHES:
                    block.targets.update(re.findall(r"\.L_\w+", found["rest"]))
                # The condition stands before the branch (`@P0 BRA`) or among its operands (`BRA.U UP0, …`).
                conditional = found["guard"] or re.search(r"\bU?P\d|\.DIV", found["rest"])
                block.falls_through = bool(conditional) or opcode == "CALL"
                blocks.append(_Block(set()))
    return [block for block in blocks if block.instructions]


def _edges(blocks: list[_Block]) -> np.ndarray:
    """Pairs of a block and a possible successor, [edges, 2]."""
    ways_in = {label: number for number, block in enumerate(blocks) for label in block.labels}
    edges = [(number, number + 1) for number, block in enumerate(blocks[:-1]) if block.falls_through]
    edges += [(number, ways_in[target]) for number, block in enumerate(blocks) for target in block.targets]
    return np.array(edges, int).reshape(-1, 2)


def _loops(blocks: list[_Block], edges: np.ndarray, inside: np.ndarray) -> tuple[Loop, ...]:
    """The outermost loops among the blocks that `inside` marks."""
    kept = edges[inside[edges].all(1)]
    graph = coo_array((np.ones(len(kept)), kept.T), shape=(len(blocks), len(blocks)))
    _, component = connected_components(graph, connection="strong")
    loops = []
    for number in {int(component[source]) for source, target in kept if component[source] == component[target]}:
        members = inside & (component == number)
        counts = sum((blocks[which].instructions for which in np.flatnonzero(members)), Counter())
        entered = edges[~members[edges[:, 0]] & members[edges[:, 1]], 1]
        rest = members.copy()
        rest[entered.min() if len(entered) else members.argmax()] = False
        loops.append(Loop(blocks[members.argmax()].address, counts, _loops(blocks, edges, rest)))
    return tuple(sorted(loops, key=lambda loop: loop.address))


def _innermost(loop: Loop, opcode: str) -> list[Loop]:
    inner = [found for child in loop.loops for found in _innermost(child, opcode)]
    return inner or ([loop] if loop.instructions[opcode] else [])


def _kernel(report: pathlib.Path) -> KernelCode:
    """A kernel from Mosaic GPU's dumps: NAME.ptxas, NAME.ptx, NAME.sass_ctrl and NAME.mlir-passes.log."""
    told = report.read_text()
    entry = _groups(r"Compiling entry function '(\w+)'", told)[0]
    frame = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    stack, stores, loads = _groups(rf"Function properties for {entry}\s+{frame}", told)
    sass = report.with_suffix(".sass_ctrl").read_text()
    return KernelCode(
        name=entry.removesuffix("_mosaic_gpu_kernel"),
        ptx_version=_groups(r"\.version (\d+\.\d+)", report.with_suffix(".ptx").read_text())[0],
        registers=int(_groups(r"Used (\d+) registers", told)[0]),
        stack_bytes=int(stack),
        spill_store_bytes=int(stores),
        spill_load_bytes=int(loads),
        shared_bytes=_shared_bytes(report.with_suffix(".mlir-passes.log")),
        instructions=Counter(found["opcode"] for found in _LINE.finditer(sass)),
        loops=loops_in(sass),
        sass=sass,
    )


def _shared_bytes(passes: pathlib.Path) -> int:
    """The dynamic shared memory in the launch's operand, which ptxas does not see; read from the first pass."""
    constants = {}
    with passes.open() as lines:
        for line in lines:
            if found := re.search(r"(%\w+) = arith\.constant (\d+) : i32", line):
                constants[found[1]] = int(found[2])
            if found := re.search(r"dynamic_shared_memory_size (%\w+)", line):
                return constants[found[1]]
    raise ValueError(f"no launch in {passes}")


def _lowering_context(chip: str) -> contextlib.AbstractContextManager:
    """The abstract mesh by which Pallas knows the chip; without a compute capability it assumes 9.0."""
    if _is_tpu(chip):
        return contextlib.nullcontext()
    described = _description(chip)
    major, minor = _groups(r"cuda_compute_capability \{ major: (\d+) minor: (\d+)", described)
    kind = type("Chip", (jax.sharding.AbstractDevice,), {"compute_capability": f"{major}.{minor}"})
    cores = int(_groups(r"core_count: (\d+)", described)[0])
    device = kind(device_kind=devices(chip)[0].device_kind, num_cores=cores, platform="gpu")
    mesh = jax.sharding.get_abstract_mesh()
    mesh = jax.sharding.AbstractMesh(mesh.axis_sizes, mesh.axis_names, mesh.axis_types, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _tool(name: str) -> str | None:
    """The path of a CUDA program, from the wheels or else the PATH."""
    return shutil.which(name, path=os.pathsep.join(_folders())) or shutil.which(name)


def _folders() -> list[str]:
    """The folders of CUDA's programs in the wheels."""
    packages = importlib.util.find_spec("nvidia")
    return [f"{folder}/cu13/bin" for folder in packages.submodule_search_locations or ()] if packages else []


def _is_tpu(chip: str) -> bool:
    return not (CHIPS / f"{chip.partition(':')[0]}.txtpb").exists()


def _groups(pattern: str, text: str) -> tuple[str, ...]:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in:\n{text[:1000]}")
    return found.groups()
