"""PyTorch FlexAttention with the same pattern in the same process, so that clocks and heat are those of the others.

Its blocks come exactly from the pattern's rule, in two sizes: its default of 128 × 128, and 128 × 64, so that stripes
of 64 tokens are not widened. Tiles are of its own choice.
"""

import dataclasses
import functools
import time
import typing
from collections.abc import Callable

import jax

from benchmarks.cases import Case
from benchmarks.gpu.errors import LeftOut
from benchmarks.gpu.implementations import Arrays, Executable
from s2jax.patterns import HeadGroups, LocalStride, Pattern

MAX_TOKENS = 32 << 10
"""Longest sequence for blocks of 128 keys; longer ones are compared at one block size to save memory."""


@dataclasses.dataclass(frozen=True)
class Flex:
    """FlexAttention as an implementation.

    Attributes:
      columns: keys in its blocks of 128 queries.
    """

    name: str
    columns: int
    dense = False

    def pattern(self, case: Case) -> Pattern:
        return case.pattern()

    def prepare(self, case: Case, name: str, function: Callable, inputs: Arrays) -> Callable[[], Executable]:
        """Compiles a pass in this thread, as PyTorch requires; raises LeftOut."""
        if self.columns > 64 and case.tokens > MAX_TOKENS:
            raise LeftOut(f"beyond {MAX_TOKENS >> 10}k tokens only in blocks of 64 keys")
        import torch
        import torch.nn.attention.flex_attention as flex

        start, tensors = time.perf_counter(), to_tensors(inputs)
        wait = (lambda result: torch.cuda.synchronize()) if tensors[0].is_cuda else (lambda result: None)
        # A compiled function is compiled anew for other shapes only so many times.
        torch._dynamo.config.recompile_limit = 1000
        attention = functools.partial(
            torch.compile(flex.flex_attention, dynamic=False),
            block_mask=block_mask(case, (128, self.columns), tensors[0].device),
            enable_gqa=True,
        )
        run = functools.partial(_forward if name == "forward" else _forward_backward, attention)
        wait(run(tensors))
        executable = Executable(
            functools.partial(run, tensors),
            lambda inputs: tuple(map(_to_jax, run(to_tensors(inputs)))),
            wait,
            {"compile s": time.perf_counter() - start},
        )
        return lambda: executable


FLEX = (Flex("flex 128x64", 64), Flex("flex 128x128", 128))


def _forward(attention: Callable, tensors: list) -> tuple:
    import torch

    with torch.no_grad():
        return (attention(*tensors[:3]),)


def _forward_backward(attention: Callable, tensors: list) -> tuple:
    import torch

    leaves = [each.detach().requires_grad_() for each in tensors[:3]]
    out = attention(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, tensors[3])


@functools.lru_cache(1)
def block_mask(case: Case, sizes: tuple[int, int], device: typing.Any) -> typing.Any:
    """A `BlockMask` of the case's pattern: the blocks that are read, and the rule for tokens within them."""
    import torch
    import torch.nn.attention.flex_attention as flex

    pattern = typing.cast(LocalStride, case.pattern())
    heads, size = HeadGroups(case.num_heads, case.num_kv_heads), pattern.block_size
    window, stride = pattern.local_blocks, pattern.vert_stride
    residues = [pattern.residues_of(heads, head)[0] for head in range(case.num_heads)]
    residue = torch.tensor(residues, dtype=torch.int32, device=device)

    def mask_mod(batch, head, query, key):
        i, j = query // size, key // size
        return (query >= key) & ((i - j < window) | ((j + residue[head]) % stride == 0))

    block = torch.arange(-(-case.tokens // size), device=device, dtype=torch.int32)
    apart = block[:, None] - block
    stripe = (block + residue[:, None]) % stride == 0
    read = (apart >= 0) & ((apart < window) | stripe[:, None, :])  # [h, n, n]
    rows, columns = (each // size for each in sizes)
    tiles = (len(residues), len(block) // rows, rows, len(block) // columns, columns)
    some = read.reshape(tiles).any(4).any(2)
    full = (read & (apart > 0)).reshape(tiles).all(4).all(2)
    tables = []
    for blocks in (some & ~full, full):  # counts [1, h, n], and block numbers with the set ones first [1, h, n, n]
        numbers = blocks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        tables += [blocks.sum(-1, dtype=torch.int32)[None], numbers.to(torch.int32)[None]]
    lengths = case.tokens, case.tokens
    if device.type == "cuda":
        torch.cuda.empty_cache()  # sorting took much
    return flex.BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=sizes, mask_mod=mask_mod, seq_lengths=lengths)


@functools.lru_cache(1)  # for both passes and both block sizes
def to_tensors(arrays: Arrays) -> list:
    """Query, key, value and dout as PyTorch tensors, [b, h, t, d] in memory, as FlexAttention prefers."""
    import torch

    tensors = map(torch.from_dlpack, (arrays.query, arrays.key, arrays.value, arrays.dout))
    return [each.transpose(1, 2).contiguous() for each in tensors]


def _to_jax(tensor) -> jax.Array:
    """Converts [b, h, t, d] of PyTorch to [b, t, h, d] of JAX."""
    return jax.numpy.from_dlpack(tensor.detach().transpose(1, 2).contiguous())
