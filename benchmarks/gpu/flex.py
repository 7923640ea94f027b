"""PyTorch FlexAttention with the same pattern, in the same process: the GPU's clocks and heat are those of the others.

Blocks are told to it exactly, from the pattern's own rule, in one of two sizes: its default of 128 × 128, with its own
choice of tiles; and 128 × 64, so that stripes of 64 tokens are not widened. For the latter PyTorch 2.11 has no backward
tiles on Hopper unless it searches them at length: it is given those of its own search list that fit.
"""

import contextlib
import functools
import importlib.util
import time
import typing
import unittest.mock
from collections.abc import Callable

import jax

from benchmarks.cases import Case
from benchmarks.gpu.attempt import LeftOut, attempt
from benchmarks.gpu.sides import PASSES, Arrays, Prepared
from s2jax.patterns import HeadGroups, LocalStride

NAMES = {"flex 128x64": (128, 64), "flex 128x128": (128, 128)}
"""The sides, and the queries and keys of their blocks."""

SMALL_BLOCKS, MOST_TOKENS = "flex 128x64", 32 << 10

BACKWARD_TILES = (64, 64, 64, 64, 3, 4)
"""Queries and keys of the passes over keys and over queries, stages, warps."""


def prepare_flex(
    name: str,
    case: Case,
    arrays: Arrays,
    device: str = "cuda",
    left_out: dict[str, str] | None = None,
    doing: Callable[[str], None] = lambda what: None,
) -> Prepared:
    """FlexAttention ready for a case; raises LeftOut.

    Args:
      left_out: passes that are not to be tried, and why.
      doing: told of which pass the next part is.
    """
    left_out = dict(left_out or {})
    if "forward" in left_out:
        raise LeftOut(left_out["forward"])
    if importlib.util.find_spec("torch") is None:
        raise LeftOut("torch is not installed")
    import torch
    import torch.nn.attention.flex_attention as flex

    if device == "cuda" and not torch.cuda.is_available():
        raise LeftOut("torch sees no GPU")
    pattern = case.pattern()
    if not isinstance(pattern, LocalStride):
        raise LeftOut("dense attention is not what FlexAttention is here for")
    if name != SMALL_BLOCKS and case.tokens > MOST_TOKENS:
        raise LeftOut(f"beyond {MOST_TOKENS >> 10}k tokens only {SMALL_BLOCKS}: each has inputs of its own in memory")
    if device == "cuda":
        torch.cuda.empty_cache()
    start = time.perf_counter()
    doing("forward")
    mask = block_mask(pattern, case, NAMES[name], device)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # sorting took much
    seconds = {"block mask": time.perf_counter() - start}
    # A compiled function is compiled anew for other shapes only so many times.
    torch.compiler.reset()
    inputs = [_head_first(torch.from_dlpack(array)) for array in (arrays.query, arrays.key, arrays.value)]
    cotangent = _head_first(torch.from_dlpack(arrays.dout))
    attention = functools.partial(
        torch.compile(flex.flex_attention, dynamic=False), block_mask=mask, enable_gqa=True,
    )  # fmt: skip

    def forward():
        with torch.no_grad():
            return attention(*inputs)

    def wait(result):
        if device == "cuda":
            torch.cuda.synchronize()

    results = {"forward": lambda dout: (_back(forward()),)}
    prepared = Prepared({"forward": forward}, results, wait, left_out, seconds)
    start = time.perf_counter()
    doing("forward")
    with _tiles(name):
        forward()
        wait(None)
        seconds["compile forward"], start = time.perf_counter() - start, time.perf_counter()
        if not left_out:
            doing("backward")
            # The forward pass stands without it.
            _, reason = attempt(lambda: _add_backward(prepared, attention, inputs, cotangent))
            if reason is not None:
                prepared.left_out |= dict.fromkeys(PASSES[1:], reason)
        wait(None)
    seconds["compile backward"] = time.perf_counter() - start
    return prepared


def _add_backward(prepared: Prepared, attention: typing.Any, inputs: list, cotangent: typing.Any) -> None:
    """The passes with gradients, run once, which compiles them."""
    import torch

    leaves = [each.detach().requires_grad_() for each in inputs]

    def both(dout=cotangent):
        out = attention(*leaves)
        return out.detach(), torch.autograd.grad(out, leaves, dout)

    kept = attention(*leaves)

    def backward(dout=cotangent):
        return torch.autograd.grad(kept, leaves, dout, retain_graph=True)

    def gradients(dout: jax.Array):
        return tuple(_back(each) for each in backward(_head_first(torch.from_dlpack(dout))))

    def results(dout: jax.Array):
        out, found = both(_head_first(torch.from_dlpack(dout)))
        return tuple(_back(each) for each in (out, *found))

    backward()
    prepared.calls |= {"backward": backward, "forward + backward": both}
    prepared.results |= {"backward": gradients, "forward + backward": results}


def block_mask(pattern: LocalStride, case: Case, sizes: tuple[int, int], device: str):
    """A `BlockMask` of the pattern: what is read of every block, and within blocks the rule token by token."""
    import torch
    import torch.nn.attention.flex_attention as flex

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
    whole = read & (apart > 0)
    rows, columns = (each // size for each in sizes)
    tiles = (len(residues), len(block) // rows, rows, len(block) // columns, columns)
    some = read.reshape(tiles).any(4).any(2)
    full = whole.reshape(tiles).all(4).all(2)
    tables = [each for kind in (some & ~full, full) for each in _ordered(kind[None])]
    return flex.BlockMask.from_kv_blocks(
        *tables, BLOCK_SIZE=sizes, mask_mod=mask_mod, seq_lengths=(case.tokens, case.tokens)
    )


def _ordered(dense):
    """How many blocks of every row are set, and all blocks with those first: int32 [1, h, n], [1, h, n, n]."""
    import torch

    numbers = dense.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return dense.sum(-1, dtype=torch.int32), numbers.to(torch.int32)


def _tiles(name: str) -> contextlib.AbstractContextManager:
    """While compiling: backward tiles that fit blocks of 64 keys."""
    if name != SMALL_BLOCKS:
        return contextlib.nullcontext()
    from torch._inductor.choices import InductorChoices
    from torch._inductor.template_heuristics.triton import FlexBwDConfig

    def choose(*arguments, **options):
        return [FlexBwDConfig(*BACKWARD_TILES)]

    # Not by a handler of choices: that is a thread's own, and PyTorch differentiates in another thread.
    return unittest.mock.patch.object(InductorChoices, "get_flex_attention_bwd_configs", choose)


def _head_first(tensor):
    """[b, t, h, d] -> [b, h, t, d], in memory too: the order that FlexAttention is written for."""
    return tensor.transpose(1, 2).contiguous()


def _back(tensor) -> jax.Array:
    """[b, h, t, d] of PyTorch -> [b, t, h, d] of JAX."""
    return jax.numpy.from_dlpack(tensor.detach().transpose(1, 2).contiguous())
