"""The Hopper kernel's barriers, rings of buffers and registers."""

from tests.kernels.faults.fault import Fault, hopper_shape, interpreted, machine_code

STEPS, TILE = "pallas_kernels/mosaic_gpu/steps.py", "pallas_kernels/mosaic_gpu/query_tile.py"
FORWARD, PRODUCTS = "pallas_kernels/mosaic_gpu/forward.py", "pallas_kernels/mosaic_gpu/products.py"
FOUR_HEADS, SMALL = hopper_shape("four heads a tile"), interpreted("groups of four")

FAULTS = [
    Fault(
        "keys and values loaded into buffers in use", STEPS,
        "            plgpu.barrier_wait(stream.free.at[stage])\n"
        "            for part_of",
        "            for part_of",
        SMALL,
    ),
    Fault(
        "masks loaded into buffers in use", STEPS,
        "            plgpu.barrier_wait(stream.free.at[stage])\n"
        "            for part_of",
        "            if stream is not self.masks:\n"
        "                plgpu.barrier_wait(stream.free.at[stage])\n"
        "            for part_of",
        SMALL,
    ),
    Fault(
        "keys given back before they are multiplied", FORWARD,
        "        logits = product(query,",
        '        plgpu.barrier_arrive(scratch["key_free"].at[step.stage])\n'
        "        logits = product(query,",
        SMALL,
    ),
    Fault(
        "keys given back while the tensor cores read them", FORWARD,
        "(WARPGROUP_ROWS, plan.step), self._take_turns)\n"
        '        plgpu.barrier_arrive(scratch["key_free"].at[step.stage])\n',
        '(WARPGROUP_ROWS, plan.step), lambda: (self._take_turns(), '
        'plgpu.barrier_arrive(scratch["key_free"].at[step.stage])))\n',
        SMALL,
    ),
    Fault(
        "values given back while the tensor cores read them", FORWARD,
        "        out = add_product(out, weights, value, wait_for_next_key)\n"
        '        plgpu.barrier_arrive(scratch["value_free"].at[step.stage])\n',
        '        back = scratch["value_free"].at[step.stage]\n'
        "        out = add_product(out, weights, value, lambda: (wait_for_next_key(), plgpu.barrier_arrive(back)))\n",
        SMALL,
    ),
    Fault(
        "values waited for while the tensor cores read them", FORWARD,
        '        plgpu.barrier_wait(scratch["value_ready"].at[step.stage])\n'
        '        plgpu.barrier_wait(scratch["turn"])\n'
        "\n"
        "        def wait_for_next_key():\n",
        '        plgpu.barrier_wait(scratch["turn"])\n'
        "\n"
        "        def wait_for_next_key():\n"
        '            plgpu.barrier_wait(scratch["value_ready"].at[step.stage])\n'
        "\n",
        SMALL,
    ),
    Fault(
        "keys never given back", FORWARD,
        '        plgpu.barrier_arrive(scratch["key_free"].at[step.stage])\n'
        "        scale =",
        "        scale =",
        SMALL,
    ),
    Fault(
        "values never given back", FORWARD,
        '        plgpu.barrier_arrive(scratch["value_free"].at[step.stage])\n'
        "        return out, new, total",
        "        return out, new, total",
        SMALL,
    ),
    Fault(
        "masks never given back", STEPS,
        "        plgpu.barrier_arrive(self.masks.free.at[stage])\n"
        "        allowed =",
        "        allowed =",
        SMALL,
    ),
    Fault(
        "masks given back before they are read", STEPS,
        "        found = []\n        if self.words",
        "        found = []\n"
        "        plgpu.barrier_arrive(self.masks.free.at[stage])\n"
        "        if self.words",
        SMALL,
    ),
    Fault(
        "the first keys not waited for", FORWARD,
        '            plgpu.barrier_wait(scratch["key_ready"].at[0])\n',
        "            pass\n",
        SMALL,
    ),
    Fault(
        "the next keys not waited for", FORWARD,
        '                plgpu.barrier_wait(scratch["key_ready"].at[self.next(step.stage)])\n',
        "                pass\n",
        SMALL,
    ),
    Fault(
        "keys waited for that do not come", FORWARD,
        "@pl.when(step.number + 1 < self",
        "@pl.when(step.number < self",
        SMALL,
    ),
    Fault(
        "a wait for keys where a tile reads nothing", FORWARD,
        "self.masked_steps > 0)",
        "self.masked_steps >= 0)",
        interpreted("selection"),
    ),
    Fault(
        "the stage of this step's keys waited for again", FORWARD,
        "at[self.next(step.stage)]", "at[step.stage]",
        SMALL,
    ),
    Fault(
        "values not waited for", FORWARD,
        '        plgpu.barrier_wait(scratch["value_ready"].at[step.stage])\n'
        '        plgpu.barrier_wait(scratch["turn"])\n',
        '        plgpu.barrier_wait(scratch["turn"])\n',
        SMALL,
    ),
    Fault(
        "masks not waited for", STEPS,
        "        plgpu.barrier_wait(self.masks.ready.at[stage])\n",
        "",
        SMALL,
    ),
    Fault(
        "queries not waited for", TILE,
        "        plgpu.barrier_wait(ready)\n",
        "",
        "tests/kernels/test_mosaic_gpu_races.py::test_every_copy_is_waited_for",
    ),
    Fault(
        "masks overwritten by the other way to shared memory", STEPS,
        "        plgpu.commit_smem()\n"
        "        plgpu.barrier_arrive(self.masks.free.at[stage])\n",
        "        plgpu.barrier_arrive(self.masks.free.at[stage])\n",
        SMALL,
        unseen="The interpreter's own product reads values as the chip does not, and commits that: masks with it.",
    ),
    Fault(
        "results copied before they are in shared memory", FORWARD,
        "        plgpu.commit_smem()\n"
        "        out_ref",
        "        out_ref",
        SMALL,
    ),
    Fault("the last copies not waited for", FORWARD, "        plgpu.wait_smem_to_gmem(0)\n", "", SMALL),
    Fault(
        "one copy of keys counts for all", TILE,
        '"key_ready": barriers(stages, plan.slots)',
        '"key_ready": barriers(stages, 1)',
        FOUR_HEADS,
    ),
    Fault(
        "one copy of queries counts for all", FORWARD,
        "barriers(WARPGROUPS, plan.pieces)", "barriers(WARPGROUPS, 1)",
        FOUR_HEADS,
    ),
    Fault(
        "segments count for the masks", TILE,
        "barriers(stages, plan.slots * masks)",
        "barriers(stages, plan.slots)",
        interpreted("strangers"),
    ),
    Fault(
        "one warpgroup gives keys back for both", TILE,
        '"key_free": barriers(stages, WARPGROUPS)',
        '"key_free": barriers(stages, 1)',
        SMALL,
    ),
    Fault(
        "one warpgroup gives masks back for both", TILE,
        '"mask_free": barriers(stages, WARPGROUPS)',
        '"mask_free": barriers(stages, 1)',
        SMALL,
    ),
    Fault("a turn taken alone", FORWARD, "barriers(1, WARPGROUPS)", "barriers(1, 1)", SMALL),
    Fault(
        "both warpgroups take the first turn", FORWARD,
        "        pl.when(self.warpgroup == 1)(self._take_turns)\n", "",
        SMALL,
    ),
    Fault("the last turn not taken", FORWARD, "        pl.when(self.warpgroup == 0)(self._take_turns)\n", "", SMALL),
    Fault(
        "a stage too few", STEPS,
        "stage == self.plan.stages - 1",
        "stage == self.plan.stages - 2",
        SMALL,
    ),
    Fault(
        "masks in the ring of the keys", FORWARD,
        "self.allowed(step.mask_stage)",
        "self.allowed(step.stage)",
        hopper_shape("four heads a tile"),
    ),
    Fault(
        "two rings begin together", STEPS,
        "self._load_step(self.streams, self.full_steps + steps + step, found)",
        "self._load_step(self.streams, steps + step, found)",
        FOUR_HEADS,
    ),
    Fault(
        "results in the queries' buffer, whatever their width", FORWARD,
        "plan.value_dim != plan.head_dim", "False",
        FOUR_HEADS,
    ),
    Fault(
        "too few registers to compute", STEPS,
        "USUAL = Registers(224, 56)",
        "USUAL = Registers(160, 56)",
        machine_code("d 256"),
    ),
    Fault(
        "too few registers to load", STEPS,
        "USUAL = Registers(224, 56)",
        "USUAL = Registers(240, 24)",
        machine_code("block 16"),
    ),
    Fault(
        "exponentials wait for the other warpgroup's turn", FORWARD,
        "        out, total, new, weights = jax.lax.optimization_barrier((out, total, new, weights))\n", "",
        machine_code("d 64"),
        unseen="The results are the same: what the order costs is time.",
    ),
    Fault(
        "tensor cores waited for at once", PRODUCTS,
        "        meanwhile()\n        if not", "        accumulator[...]\n        meanwhile()\n        if not",
        machine_code("d 64"),
        unseen="The results are the same: what the wait costs is time.",
    ),
]  # fmt: skip
