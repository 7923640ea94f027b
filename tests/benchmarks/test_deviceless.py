"""Readers of the compilers' reports, on kernels whose code is known."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks.compiled import deviceless

TILE_M, TILE_K, TILES = 64, 64, 8
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def needs(chip: str):
    reason = deviceless.missing(chip)
    return pytest.mark.skipif(reason is not None, reason=reason or "")


def matmul(columns: int, accumulators: int):
    """The product [64, 512] · [512, columns] in bfloat16 by one warpgroup, summed in several accumulators."""

    def product(a_ref, b_ref, out_ref, a_smem, b_smem, out_smem, barrier):
        def step(tile, _):
            rows = pl.ds(tile * TILE_K, TILE_K)
            plgpu.copy_gmem_to_smem(a_ref.at[:, rows], a_smem, barrier)
            plgpu.copy_gmem_to_smem(b_ref.at[rows], b_smem, barrier)
            plgpu.barrier_wait(barrier)
            for sums in all_sums:
                plgpu.wgmma(sums, a_smem, b_smem)
            plgpu.wgmma_wait(0)

        def add_up(*sums):
            nonlocal all_sums
            all_sums = sums
            jax.lax.fori_loop(0, TILES, step, None)
            return sum(each[...] for each in sums)

        all_sums = ()
        out = pl.run_scoped(add_up, *[plgpu.ACC((TILE_M, columns), jnp.float32)] * accumulators)
        out_smem[...] = out.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_ref)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        product,
        out_type=jax.ShapeDtypeStruct((TILE_M, columns), jnp.bfloat16),
        scratch_types=[
            plgpu.SMEM((TILE_M, TILE_K), jnp.bfloat16, transforms=SWIZZLED),
            plgpu.SMEM((TILE_K, columns), jnp.bfloat16, transforms=SWIZZLED),
            plgpu.SMEM((TILE_M, columns), jnp.bfloat16, transforms=SWIZZLED),
            plgpu.Barrier(num_arrivals=2),
        ],
    )


def shapes(columns: int):
    sizes = ((TILE_M, TILES * TILE_K), (TILES * TILE_K, columns))
    return [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes]


@needs("h100")
def test_a_kernel_without_spills():
    # Twice, as neither jax nor Mosaic may take it from a cache.
    for _ in range(2):
        (kernel,) = deviceless.kernels_of("h100", matmul(128, accumulators=1), *shapes(128))
        assert kernel.name == "product"
        assert (kernel.stack_bytes, kernel.spill_bytes) == (0, 0)
        assert 64 < kernel.registers <= 255  # 64 of each thread hold the accumulator
        assert kernel.shared_bytes == 2 * (64 * 64 + 64 * 128 + 64 * 128) + 8
        # One instruction multiplies 16 of a tile's 64 columns.
        (loop,) = kernel.inner_loops("HGMMA")
        assert loop in kernel.inner_loops("UTMALDG")
        expected = {"HGMMA": 4, "UTMALDG": 2, "UTMASTG": 0, "LDL": 0, "STL": 0}
        assert {opcode: loop.instructions[opcode] for opcode in expected} == expected
        assert kernel.instructions["UTMASTG"] > 0


@needs("h100")
def test_two_accumulators_of_128_registers_spill():
    (kernel,) = deviceless.kernels_of("h100", matmul(256, accumulators=2), *shapes(256))
    (loop,) = kernel.inner_loops("HGMMA")
    assert loop.instructions["HGMMA"] == 8
    assert min(loop.instructions["LDL"], loop.instructions["STL"]) > 64
    assert min(kernel.stack_bytes, kernel.spill_store_bytes, kernel.spill_load_bytes) > 512


@needs("h100")
def test_kernels_come_in_the_order_of_their_lowering_and_from_the_branch_for_the_chip():
    def function(a, b):
        kernels = [matmul(columns, accumulators=1) for columns in (192, 64)]
        return [
            jax.lax.platform_dependent(a, b[:, :columns], cuda=kernel, default=jnp.matmul)
            for columns, kernel in zip((192, 64), kernels, strict=True)
        ]

    wide, narrow = deviceless.kernels_of("h100", function, *shapes(192))
    assert wide.shared_bytes > narrow.shared_bytes
    assert wide.registers > narrow.registers
    assert deviceless.compile_for("h100", function, *shapes(192)).memory_analysis() is not None


@needs("h100")
def test_xla_finds_its_own_library_of_functions():
    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    assert deviceless.kernels_of("h100", jax.lax.lgamma, shape) == ()


@needs("h100")
def test_ptxas_is_none_that_miscompiles_and_the_one_that_compiled():
    version = deviceless.ptxas_version()
    assert version >= (13, 0, 0)  # those of CUDA 12.8.0 to 12.9.0 miscompile masks
    (kernel,) = deviceless.kernels_of("h100", matmul(64, accumulators=1), *shapes(64))
    assert kernel.ptx_version == f"{version[0] - 4}.{version[1]}"


@needs("v5e:2x2")
def test_a_tpu_and_a_mesh_of_them():
    shape = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
    compiled = deviceless.compile_for("v5e:2x2", jnp.matmul, shape, shape)
    assert compiled.memory_analysis().argument_size_in_bytes == 2 * 2 * 256 * 256

    devices = deviceless.devices("v5e:2x2")
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,), devices=devices)
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
    compiled = deviceless.compile_for("v5e:2x2", lambda x: x.sum(0), shape.update(sharding=rows))
    assert compiled.memory_analysis().argument_size_in_bytes == 2 * 256 * 256 // 4
    assert "all-reduce" in compiled.as_text()


def test_missing_compilers_are_named(monkeypatch):
    monkeypatch.setattr(deviceless.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    for chip, name in (("v5e:2x2", "libtpu"), ("h100", "ptxas")):
        reason = deviceless.missing(chip)
        assert reason is not None
        assert name in reason
        assert "make compilers" in reason


SASS = """
        /*0000*/                   S2R R4, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDG.E R5, [R2] ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR5], R4 ;
        /*0030*/              @!P1 BRA `(.L_x_4) ;
.L_x_2:
        /*0040*/                   HGMMA.64x64x16.F32 R8, gdesc[UR4], R8 ;
        /*0050*/                   BRA.U UP0, `(.L_x_1) ;
        /*0060*/                   STG.E [R2], R5 ;
        /*0070*/               @P0 BRA `(.L_x_0) ;
        /*0080*/               @P2 EXIT ;
        /*0090*/                   MUFU.EX2 R5, R5 ;
        /*00a0*/                   EXIT ;
.L_x_4:
   -:-:2:Y:02        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR5], R4
   2:-:-:Y:05        /*00c0*/              @!P1 BRA `(.L_x_4)
   -:-:-:Y:05        /*00d0*/                   BRA `(.L_x_2)
"""


def test_loops_of_a_disassembly():
    """A wait that was moved behind the end branches back and is only its own loop; loops nest."""
    (outer,) = deviceless.loops_in(SASS)
    (inner,) = outer.loops
    (wait,) = inner.loops
    assert (outer.address, inner.address, wait.address) == (0x10, 0x20, 0xB0)
    assert wait.instructions == Counter(SYNCS=1, BRA=1)
    assert inner.instructions == wait.instructions + Counter(SYNCS=1, HGMMA=1, BRA=3)
    assert outer.instructions == inner.instructions + Counter(LDG=1, STG=1, BRA=1)


def test_straight_code_has_no_loops():
    assert deviceless.loops_in("\n".join(SASS.splitlines()[12:14])) == ()
    assert deviceless.loops_in("") == ()
