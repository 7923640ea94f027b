"""The cases that every backend computes: one table, and the arrays that go with each."""

import dataclasses
import functools
import zlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from s2jax import (
    BlockMask,
    Dense,
    FirstBlocks,
    FirstTokens,
    Local,
    LocalStride,
    MaskMod,
    PerHead,
    Ranges,
    RelativeStride,
    TokenMask,
)
from s2jax.patterns import Pattern, Strided

EPS = {name: float(ml_dtypes.finfo(name).eps) for name in ("float64", "float32", "float16", "bfloat16")}


@dataclasses.dataclass(frozen=True)
class Selected:
    """Blocks chosen at run time, at random: how many, for how many sequences and heads.

    Attributes:
      batch, heads: those axes of the selection.
      most: its `max_blocks`; counts go from 0 to that.
    """

    block_size: int = 16
    query_block: int = 16
    causal: bool = True
    batch: int = 1
    heads: int = 1
    most: int = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """One computation.

    Attributes:
      offsets: position of the first query: an integer known while tracing, or with `traced` one integer or one for each
        sequence, known at run time only.
      segments: None; "packed", three documents in each sequence; "strangers", some queries find nothing of their own.
      tiling: which tile sizes; a backend has its own for "merged" (several rows a tile, several steps), "small" (one
        block at a time) and "default".
      slow: left to the slow tests, as each of its traits stands in another case too.
    """

    name: str
    pattern: Pattern | Selected
    dtype: str = "float32"
    batch: int = 2
    query_length: int = 90
    kv_length: int = 90
    num_heads: int = 4
    num_kv_heads: int = 2
    features: int = 16
    value_features: int = 16
    offsets: int | tuple[int, ...] = 0
    traced: bool = False
    segments: str | None = None
    scale: float | None = None
    soft_cap: float | None = None
    sinks: bool = False
    tiling: str = "merged"
    slow: bool = False

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def logit_scale(self) -> float:
        return self.features**-0.5 if self.scale is None else self.scale

    @property
    def offset_of(self) -> list[int]:
        """The offset of every sequence."""
        return [self.offsets] * self.batch if isinstance(self.offsets, int) else list(self.offsets)


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """The inputs of a case and the cotangents of its results, in numpy."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    sinks: np.ndarray | None
    query_segment_ids: np.ndarray | None
    kv_segment_ids: np.ndarray | None
    kv_blocks: np.ndarray | None
    counts: np.ndarray | None
    dout: np.ndarray
    dlse: np.ndarray


@functools.lru_cache(maxsize=4)
def arrays(case: Case) -> Arrays:
    """The same numbers for a case every time."""
    random = np.random.default_rng(zlib.crc32(case.name.encode()))
    wide = "float64" if case.dtype == "float64" else "float32"

    def normal(*shape, dtype=case.dtype):
        return random.standard_normal(shape).astype(dtype)

    b, t, s, h, k = case.batch, case.query_length, case.kv_length, case.num_heads, case.num_kv_heads
    segments = _segments(random, case) if case.segments else (None, None)
    selection = _selection(random, case) if isinstance(case.pattern, Selected) else (None, None)
    return Arrays(
        normal(b, t, h, case.features),
        normal(b, s, k, case.features),
        normal(b, s, k, case.value_features),
        normal(h, dtype=wide) if case.sinks else None,
        *segments,
        *selection,
        dout=normal(b, t, h, case.value_features),
        dlse=normal(b, h, t, dtype=wide),
    )


def _segments(random, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Ids of documents that lie one after the other, negative ones and far ones among them."""
    names = np.array([7, -3, 1 << 30, 0])
    ends = np.sort(random.integers(0, case.kv_length, (case.batch, 2)))
    key = (np.arange(case.kv_length) >= ends[:, :, None]).sum(1)
    position = np.array(case.offset_of)[:, None] + np.arange(case.query_length)
    query = (position[:, None] >= ends[:, :, None]).sum(1)
    if case.segments == "strangers":
        query[:, case.query_length // 3 : case.query_length // 2] = 3
        key[0][key[0] == 1] = 2
    return names[query].astype(np.int32), names[key].astype(np.int32)


def _selection(random, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Distinct blocks in any order, some beyond the keys; nonsense beyond the counts."""
    chosen: Selected = case.pattern
    rows, blocks = -(-case.query_length // chosen.query_block), -(-case.kv_length // chosen.block_size)
    shape = chosen.batch, chosen.heads, rows
    every = np.broadcast_to(np.arange(max(blocks + 1, chosen.most)), (*shape, max(blocks + 1, chosen.most)))
    order = random.permuted(every, axis=-1)[..., : chosen.most]
    counts = random.integers(0, chosen.most + 1, shape)
    counts[..., 0], counts[..., -1] = chosen.most, 0
    used = np.arange(chosen.most) < counts[..., None]
    kv_blocks = np.where(used, order, random.choice([-7, 0, 1 << 20], order.shape))
    return kv_blocks.astype(np.int32), counts.astype(np.int32)


def random_mask(heads: int, blocks: int, density: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((heads, blocks, blocks)) < density


BLOCK = 16
WINDOW = LocalStride(BLOCK, 1, 3)
NOT_OWN = LocalStride(BLOCK, 0, 4, head_offset=1)  # many rows read nothing

FAMILIES = [
    Case("dense", Dense(), slow=True),
    Case("dense both ways", Dense(causal=False), query_length=70, kv_length=45),
    Case("local stride", WINDOW, "bfloat16"),
    Case("local stride with dense heads", LocalStride(BLOCK, 2, 4, num_dense_heads=1), slow=True),
    Case("local stride both ways", LocalStride(BLOCK, (2, 1), 4, causal=False), "bfloat16", slow=True),
    Case("stripes by query head", LocalStride(BLOCK, 1, 5, residues="query_head"), "bfloat16"),
    Case("stripes by query head, DKernel's", LocalStride(BLOCK, 1, 4, 1, 1, residues="query_head"), slow=True),
    Case("one for all heads", LocalStride(BLOCK, 1, 3, homo_head=True), "float16", slow=True),
    Case("strided", Strided(BLOCK, 3), sinks=True),
    Case("ranges", Ranges(((2, 1), (4, 2), (None, 4)), BLOCK), "bfloat16", query_length=150, kv_length=150, slow=True),
    Case("ranges both ways, bounded", Ranges(((1, 1), (3, 2)), BLOCK, causal=False)),
    Case("relative stride", RelativeStride(BLOCK, 1, 3), "bfloat16"),
    Case("relative stride, causal", RelativeStride(BLOCK, 2, 2, causal=True, homo_head=True), slow=True),
    Case("window of blocks", Local(2, block_size=BLOCK), slow=True),
    Case("window of tokens", Local(tokens=21), "bfloat16", slow=True),
    Case("window of tokens both ways", Local(tokens=(9, 30), causal=False) | FirstBlocks(1, BLOCK)),
    Case("first tokens and a window", FirstTokens(5) | Local(tokens=18) | FirstBlocks(0, BLOCK), "float16", slow=True),
    Case("first tokens both ways", FirstTokens(37, causal=False) & LocalStride(BLOCK, 2, 2, causal=False)),
    Case("block mask for each head", BlockMask(random_mask(4, 6, 0.4), BLOCK), "bfloat16"),
    Case("block mask both ways", BlockMask(random_mask(1, 7, 0.3), BLOCK, causal=False), sinks=True, slow=True),
    Case("block mask within a window", BlockMask(random_mask(4, 3, 0.6), 32) & Local(tokens=40), slow=True),
    Case("patterns by query head", PerHead([Dense(), WINDOW, Local(tokens=9), NOT_OWN]), "bfloat16"),
    Case("patterns by KV head", PerHead([FirstTokens(19) | Local(1, block_size=32), Strided(BLOCK, 2)]), slow=True),
    Case("mixed block sizes", LocalStride(32, 1, 2) & (Local(3, block_size=BLOCK) | FirstTokens(20))),
    Case("cut into stripes", LocalStride(32, 1, 3) & LocalStride(BLOCK, 1, 2, residues="query_head"), slow=True),
]

DOCUMENTS = np.repeat(np.arange(4), [9, 31, 3, 57])  # of 100 tokens


def dilated_by_head(head, query, key):
    return (query - key) % (head + 1) == 0


def prefix(head, query, key):
    return (key < 23) | (key <= query)


def same_document(head, query, key):
    return jnp.asarray(DOCUMENTS)[query] == jnp.asarray(DOCUMENTS)[key]


def near_in_the_picture(head, query, key):
    """Pixels of a picture of rows of ten."""
    return (abs(query // 10 - key // 10) <= 2) & (abs(query % 10 - key % 10) <= 1)


def odd_queries(head, query, key):
    return (query % 2 == 1) & (np.minimum(key, 60) != 60)


FUNCTIONS = [
    Case("dilated by head", MaskMod(dilated_by_head, BLOCK), "bfloat16", query_length=70, kv_length=70),
    Case("prefix LM", MaskMod(prefix, BLOCK, causal=False), query_length=61, kv_length=70, sinks=True),
    Case(
        "documents by a function", MaskMod(same_document, BLOCK), query_length=40, offsets=37, kv_length=77, slow=True
    ),
    Case("2-D neighbourhood", MaskMod(near_in_the_picture, BLOCK, causal=False), "bfloat16", tiling="small", slow=True),
    Case("empty rows by a function", MaskMod(odd_queries, BLOCK), query_length=50, offsets=(30, 9), traced=True),
    Case(
        "mask of tokens", TokenMask(random_mask(4, 70, 0.1)[:, :50], BLOCK), query_length=50, kv_length=70, sinks=True
    ),
    Case("a function in a composition", MaskMod(prefix, 32) & Local(tokens=33) | Strided(BLOCK, 3), slow=True),
    Case("functions by head", PerHead([MaskMod(dilated_by_head, BLOCK), WINDOW]), "float16", slow=True),
]

SHAPES = [
    Case("one query", WINDOW, query_length=1, kv_length=90, offsets=89, sinks=True),
    Case("one of each", WINDOW, "bfloat16", 1, 1, 1, 1, 1),
    Case("t < s", WINDOW, "bfloat16", query_length=37, kv_length=130, offsets=93),
    Case("t < s at the start", WINDOW, query_length=20, kv_length=130, slow=True),
    Case("t > s", LocalStride(BLOCK, 2, 3), query_length=101, kv_length=50),
    Case("offset within a block", WINDOW | FirstTokens(3), query_length=45, kv_length=90, offsets=21),
    Case("queries beyond the keys", WINDOW | FirstTokens(3), query_length=45, kv_length=64, offsets=50, slow=True),
    Case("no groups", WINDOW, "float16", num_heads=2, slow=True),
    Case("groups of four", LocalStride(BLOCK, 1, 2), "bfloat16", num_heads=4, num_kv_heads=1, tiling="small"),
    Case("narrow values", WINDOW, "float64", features=8, value_features=3),
    Case("wide values", Local(2, block_size=BLOCK), "bfloat16", features=4, value_features=24, slow=True),
    Case("blocks of 64", LocalStride(64, 1, 2), "bfloat16", query_length=200, kv_length=200, tiling="default"),
    Case(
        "block by block",
        LocalStride(BLOCK, 2, 2) | FirstTokens(3),
        query_length=100,
        kv_length=100,
        tiling="small",
        slow=True,
    ),
]

OPTIONS = [
    Case("scale", WINDOW, scale=0.7, slow=True),
    Case("soft cap", WINDOW, soft_cap=1.5, slow=True),
    Case("soft cap, low precision", WINDOW, "bfloat16", soft_cap=5.0, scale=1.0, sinks=True, segments="packed"),
    Case("sinks", WINDOW, "bfloat16", sinks=True, slow=True),
    Case("sinks in float64", NOT_OWN, "float64", sinks=True, soft_cap=2.0, segments="packed"),
    Case("empty rows", NOT_OWN, slow=True),
    Case("nothing read at all", NOT_OWN, "bfloat16", query_length=7, kv_length=7),
    Case("empty rows with sinks", NOT_OWN, "bfloat16", sinks=True),
    Case("documents", WINDOW | FirstTokens(5), segments="packed", slow=True),
    Case("documents both ways", Dense(causal=False), "bfloat16", segments="packed", query_length=70),
    Case("strangers", LocalStride(BLOCK, 1, 2), segments="strangers", tiling="small"),
    Case("strangers with sinks", Local(tokens=25), "float16", segments="strangers", sinks=True, slow=True),
]

OFFSETS = [
    Case("offset at run time", WINDOW, query_length=40, offsets=33, traced=True, slow=True),
    Case(
        "offsets in step",
        LocalStride(BLOCK, 1, 2, causal=False),
        query_length=32, kv_length=96, offsets=(16, 48), traced=True, tiling="small",
    ),
    Case("an offset for each", WINDOW | FirstTokens(3), "bfloat16", query_length=33, offsets=(0, 57), traced=True),
    Case("offset up to the end", Local(tokens=30), "float64", query_length=20, offsets=(90, 71), traced=True),
    Case("an offset and documents", Dense(), query_length=21, offsets=(5, 69), traced=True, segments="strangers"),
    Case(
        "an offset both ways", LocalStride(BLOCK, 1, 2, causal=False),
        query_length=50, offsets=17, traced=True, slow=True,
    ),
    Case(
        "one query of each, at run time",
        LocalStride(BLOCK, 1, 3, residues="query_head"), "bfloat16",
        query_length=1, offsets=(13, 89), traced=True, tiling="small", slow=True,
    ),
]  # fmt: skip

SELECTIONS = [
    Case("selection", Selected(), query_length=96, kv_length=96, slow=True),
    Case("selection for each", Selected(batch=2, heads=4), "bfloat16", sinks=True),
    Case("selection by KV head", Selected(heads=2, block_size=32, most=2), "bfloat16", segments="packed", slow=True),
    Case("selection, long rows", Selected(query_block=32, block_size=8, most=9), soft_cap=3.0),
    Case("selection, short rows", Selected(query_block=8, block_size=32, heads=4, most=3), "float16", query_length=45),
    Case("selection both ways", Selected(causal=False, heads=2, most=3), query_length=33, tiling="small"),
    Case("selection from an offset", Selected(heads=2), query_length=40, offsets=(50, 3), traced=True),
    Case("selection from a static offset", Selected(), "bfloat16", query_length=31, offsets=59, slow=True),
    Case("selection of one", Selected(most=1, query_block=64, batch=2), slow=True),
    Case("selection in float64", Selected(heads=4), "float64", sinks=True, slow=True),
]

CASES = [*FAMILIES, *FUNCTIONS, *SHAPES, *OPTIONS, *OFFSETS, *SELECTIONS]

BY_NAME = {each.name: each for each in CASES}


def parameters(*names: str, quick: tuple[str, ...] | None = None) -> list:
    """The named cases for `pytest.mark.parametrize`; or the table, all but the quick cases marked as slow."""
    if names:
        return [pytest.param(BY_NAME[name], id=name) for name in names]
    slow = [each.slow if quick is None else each.name not in quick for each in CASES]
    return [
        pytest.param(each, id=each.name, marks=[pytest.mark.slow] if late else [])
        for each, late in zip(CASES, slow, strict=True)
    ]
