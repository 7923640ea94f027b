"""Peers on TPUs: JAX's splash attention and tokamax's."""

import dataclasses
import importlib
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from pallas_kernels.schedule import BlockSchedule

TOKENS, HEADS, FEATURES = 4096, 4, 128
"""Sizes of the compiled call; only `FEATURES` changes the code."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """The queries and keys of a step."""

    queries: int
    keys: int

    def __str__(self) -> str:
        return f"{self.queries}×{self.keys}"


TILES = (Tile(512, 512), Tile(512, 128))
"""Tile sizes that are tried; on v5e, 256×128 and 128×128 were best in no case."""

KERNELS = {
    "splash": {"splash_mha_fwd": "forward", "splash_mha_dq": "dq", "splash_mha_dkv": "dk, dv"},
    "tokamax": {"splash_mha_fwd": "forward", "splash_mha_dkv": "dq, dk, dv"},
}
"""Passes by the prefix of the kernel's name. Tokamax has one kernel for all gradients."""


def splash_function(tile: Tile):
    """JAX's splash attention, causal, with its gradient."""
    mask = masks.MultiHeadMask([masks.CausalMask((TOKENS, TOKENS))] * HEADS)
    names = [field.name for field in dataclasses.fields(splash.BlockSizes) if field.name.startswith("block_")]
    sizes = splash.BlockSizes(**{name: tile.queries if "block_q" in name else tile.keys for name in names})
    return splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)


def tokamax_function(tile: Tile):
    """Tokamax's splash attention, causal, with its gradient. All heads share one mask, so no sparse pattern fits."""
    folder = "tokamax._src.ops.experimental.tpu.splash_attention.splash_attention_"
    kernel, mask = (importlib.import_module(folder + name) for name in ("kernel", "mask"))
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = {name: tile.queries if "block_q" in name else tile.keys for name in names}
    causal = mask.CausalMask((TOKENS, TOKENS))
    return kernel.make_splash_mha_single_device(causal, config=kernel.SplashConfig(**sizes))


FUNCTIONS = {"splash": splash_function, "tokamax": tokamax_function}


def has_tokamax() -> bool:
    return importlib.util.find_spec("tokamax") is not None


def gradients_of(name: str, tile: Tile):
    """A peer's output and gradients as a function of query, key, value and dout, and the shapes to compile for."""
    kernel = FUNCTIONS[name](tile)

    def function(query, key, value, dout):
        out, pull = jax.vjp(kernel, query, key, value)
        return out, pull(dout)

    return function, [jax.ShapeDtypeStruct((HEADS, TOKENS, FEATURES), jnp.bfloat16)] * 4


def tiles_read(schedule: BlockSchedule, tile: Tile) -> int:
    """The number of tiles in which a token pair is read, all heads together."""
    rows, columns = tile.queries // schedule.block_size, tile.keys // schedule.block_size
    wide = -(-schedule.num_columns // columns)
    by_unique_head = []
    for unique_head in range(schedule.lists.num_unique_heads):
        row, position = schedule.lists.entries(unique_head)
        by_unique_head.append(len(np.unique(row // rows * wide + schedule.lists.blocks[position] // columns)))
    return int(np.array(by_unique_head)[schedule.head_index].sum())
