"""The parser of the TPU compiler's schedules, on a small one written by hand and on real ones."""

import pytest

from benchmarks.compiled.deviceless import missing
from benchmarks.compiled.tpu_bundles import kernels_in
from benchmarks.compiled.tpu_schedule import TPU_CASES, our_passes, schedule_of, scheduled

BUNDLES = """\
     0   :  { %1 = sbr.rel target }  /* Start region 1 */
   0x1   : > { %v2 = vld [vmem:[#a] sm:$0xff] } /* Start region 2 */
   0x2 LB: >> { %3 = vmatmul.bf16.gmra.mxu0 %v2 } /* Start region 3 :: Start region 4 */
   0x3   : >> { %v4 = vpop.f32.mrf.mxu0  ;;  %v5 = vadd.f32 %v4, %v4
and more of it } /* End region 4 :: End region 3 */
   0x4   : > { %6 = sadd.s32 1, %s1 } /* Start region 5 */
   0x5 PF: > { %7 = vst [vmem:[#b] sm:$0xff] %v5 } /* End region 5 */
   0x6   : > {} /* End region 2 */
   0x7   :  {} /* End region 1 */
"""

SLOTS = """\
what is used in every bundle
MXU, VALU, SALU
4 4 2
bundles
0 0 1
0 1 0
1 0 0
1 2 0
0 0 1
0 0 0
0 0 0
0 0 0
"""


def test_regions_and_slots(tmp_path):
    (tmp_path / "17-kernel.1-70-final_bundles.txt").write_text(BUNDLES)
    (tmp_path / "17-kernel.1-69-schedule-analysis_final_bundles.txt").write_text(BUNDLES)
    (tmp_path / "17-kernel.1-71-final_hlo-static-per-bundle-utilization.txt").write_text(SLOTS)
    (kernel,) = kernels_in(tmp_path)
    assert (kernel.name, kernel.bundles, kernel.capacity) == ("kernel.1", 8, {"MXU": 4, "VALU": 4, "SALU": 2})
    (outer,) = kernel.regions
    (row,) = outer.regions
    step, after = row.regions
    assert [(each.number, each.bundles) for each in (outer, row, step, after)] == [(1, 8), (2, 6), (3, 2), (5, 2)]
    assert outer.slots == {"MXU": 2, "VALU": 3, "SALU": 2}
    (found,) = kernel.innermost("MXU")
    assert (found.number, found.bundles, found.slots["MXU"], found.slots["VALU"]) == (4, 2, 2, 2)
    assert [each.number for each in kernel.innermost("SALU")] == [5]


def test_an_inner_region_may_end_after_its_outer_one(tmp_path):
    """The compiler may move an instruction over the edge: this is one step, not two."""
    moved = BUNDLES.replace("} /* End region 4 :: End region 3 */", "} /* End region 3 */")
    moved = moved.replace("/* Start region 5 */", "/* End region 4 :: Start region 5 */")
    (tmp_path / "17-kernel.1-70-final_bundles.txt").write_text(moved)
    (tmp_path / "17-kernel.1-71-final_hlo-static-per-bundle-utilization.txt").write_text(SLOTS)
    (kernel,) = kernels_in(tmp_path)
    assert [each.number for each in kernel.innermost("MXU")] == [3]
    assert [each.number for each in kernel.regions[0].regions[0].regions] == [4, 5]


def test_a_kernel_without_its_slots_is_an_error(tmp_path):
    (tmp_path / "17-kernel.1-70-final_bundles.txt").write_text(BUNDLES)
    with pytest.raises(ValueError, match="not enough values"):
        kernels_in(tmp_path)


def test_our_steps_are_counted_by_the_tables():
    """In a dense pattern, every second tile of queries has one more step of keys, and only the diagonal is masked."""
    passes = our_passes(schedule_of(TPU_CASES["dense"], 64))
    rows = 32 * 1024 // 512
    steps = passes["forward"].steps
    assert steps.rows == 16 * rows
    assert 2 * (steps.plain + steps.masked) + steps.alone == 16 * rows * (rows + 1) // 2
    assert steps.plain == 16 * sum(row // 2 for row in range(rows))


@pytest.mark.slow
@pytest.mark.skipif(missing("v5e:2x2") is not None, reason=str(missing("v5e:2x2")))
def test_the_steps_of_our_kernels():
    """Each kernel has regions of two steps and one of a single step, full of matrix products."""
    found = {kernel.name.partition(".")[0]: kernel for kernel in scheduled("v5e", "ours", "dense", 64)}
    for name in ("s2jax_forward", "s2jax_query_gradient", "s2jax_key_gradients"):
        plain, *_, alone = found[name].innermost("MXU")
        assert plain.slots["MXU"] > 0.8 * found[name].capacity["MXU"] * plain.bundles
        assert 1.8 < plain.bundles / alone.bundles < 2.2
