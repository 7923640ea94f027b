"""Ring buffer in VMEM, filled by DMA from HBM while earlier steps are computed."""

import typing

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.mosaic_tpu.config import STEPS_PER_GROUP, KernelSpec

RING_SLOTS = 2 * STEPS_PER_GROUP
"""Steps in the ring: one group is computed while the next one is copied. A power of two."""


class Chunk(typing.NamedTuple):
    """Contents of a chunk: the id of its mask, and its first token."""

    mask_id: typing.Any
    token: typing.Any


class Ring(typing.NamedTuple):
    """Refs of the ring. A slot holds one step, in chunks of `chunk_size` tokens, one DMA each.

    Attributes:
      buffer: [RING_SLOTS · chunks · step_heads, chunk_size, head_dim + value_dim] in VMEM.
      entries: int32 [RING_SLOTS · chunks] in SMEM, the list entry of every chunk in the buffer.
      semaphores: DMA semaphores [RING_SLOTS].
    """

    buffer: typing.Any
    entries: typing.Any
    semaphores: typing.Any

    @classmethod
    def scratch(cls, spec: KernelSpec) -> "Ring":
        """Scratch shapes of the ring."""
        num_chunks = RING_SLOTS * spec.chunks_per_step
        shape = num_chunks * spec.step_heads, spec.chunk_size, spec.head_dim + spec.value_dim
        return cls(
            pltpu.VMEM(shape, spec.dtype), pltpu.SMEM((num_chunks,), jnp.int32), pltpu.SemaphoreType.DMA((RING_SLOTS,))
        )

    def start_copy(self, spec: KernelSpec, slot, chunk: int, entry, streamed, head, first_chunk) -> None:
        """Starts the DMA of one chunk of a slot.

        Args:
          entry: list entry of the chunk.
          streamed: ref [heads, chunks, chunk_size, features] in HBM.
          head: first of the `step_heads` heads to copy.
          first_chunk: number of the first chunk in `streamed`; None for 0.
        """
        index, source_chunk = slot * spec.chunks_per_step + chunk, entry_chunk(spec, entry)
        if first_chunk is not None:
            # The list of a head that reads nothing may hold chunks outside of the array.
            source_chunk = jnp.clip(source_chunk - first_chunk, 0, streamed.shape[1] - 1)
            entry = source_chunk | (entry & -1 << spec.chunk_bits)
        self.entries[index] = entry
        source = streamed.at[pl.ds(head, spec.step_heads), source_chunk]
        target = self.buffer.at[pl.ds(index * spec.step_heads, spec.step_heads)]
        pltpu.make_async_copy(source, target, self.semaphores.at[slot]).start()

    def wait(self, spec: KernelSpec, slot) -> None:
        """Waits for all chunks of a slot: the semaphore counts bytes."""
        target = self._slot(spec, slot)
        pltpu.make_async_copy(target, target, self.semaphores.at[slot]).wait()

    def read(self, spec: KernelSpec, slot) -> tuple[Array, Array]:
        """The two operands of a step, side by side in the buffer: [step_size, head_dim] and [step_size, value_dim]."""
        ref = self._slot(spec, slot)
        first, second = ref[:, :, : spec.head_dim], ref[:, :, spec.head_dim :]
        return first.reshape(spec.step_size, spec.head_dim), second.reshape(spec.step_size, spec.value_dim)

    def chunks(self, spec: KernelSpec, slot) -> list[Chunk]:
        """The contents of a slot's chunks, from their entries."""
        entries = [self.entries[slot * spec.chunks_per_step + chunk] for chunk in range(spec.chunks_per_step)]
        return [
            Chunk(jax.lax.shift_right_logical(entry, spec.chunk_bits), entry_chunk(spec, entry) * spec.chunk_size)
            for entry in entries
        ]

    def _slot(self, spec: KernelSpec, slot):
        copies = spec.chunks_per_step * spec.step_heads
        return self.buffer.at[pl.ds(slot * copies, copies)]


def entry_chunk(spec: KernelSpec, entry):
    """The number of the chunk in the streamed array that a list entry refers to."""
    return entry & ((1 << spec.chunk_bits) - 1)


def advance(slot, steps: int = 1):
    """The ring slot `steps` further on."""
    return slot + steps & RING_SLOTS - 1
