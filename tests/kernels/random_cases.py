"""Random cases: any pattern, composition or selection, with any shape and any of the options."""

from hypothesis import strategies as st

from tests.kernels.cases import Case, Selected
from tests.patterns.families import HEADS, compositions

LENGTHS = st.sampled_from([1, 15, 33, 64, 90, 131])
FLAGS = st.booleans()


@st.composite
def selections(draw, batch: int, heads) -> Selected:
    return Selected(
        block_size=draw(st.sampled_from([8, 16, 32])),
        query_block=draw(st.sampled_from([4, 16, 64])),
        causal=draw(FLAGS),
        batch=draw(st.sampled_from([1, batch])),
        heads=draw(st.sampled_from([1, heads.num_kv_heads, heads.num_heads])),
        most=draw(st.integers(1, 5)),
    )


@st.composite
def random_cases(draw) -> Case:
    heads, batch, traced = draw(HEADS), draw(st.sampled_from([1, 2])), draw(FLAGS)
    query_length, kv_length = draw(LENGTHS), draw(LENGTHS)
    offset = st.integers(0, kv_length if traced else 40)
    offsets = tuple(draw(offset) for _ in range(batch)) if traced and draw(FLAGS) else draw(offset)
    if draw(st.integers(0, 4)):
        # Known at run time only, the offset may be up to the keys' length, and so must a mask reach.
        reach = max(kv_length, query_length + (kv_length if traced else offsets))
        pattern = draw(compositions(heads, reach))
    else:
        pattern = draw(selections(batch, heads))
    return Case(
        f"random {draw(st.integers(0, 1 << 20))}",
        pattern,
        draw(st.sampled_from(["float32", "bfloat16", "float16", "float64"])),
        batch, query_length, kv_length, heads.num_heads, heads.num_kv_heads,
        features=8,
        value_features=draw(st.sampled_from([8, 5])),
        offsets=offsets,
        traced=traced,
        segments=draw(st.sampled_from([None, None, "packed", "strangers"])),
        scale=draw(st.sampled_from([None, 0.5])),
        soft_cap=draw(st.sampled_from([None, None, 2.0])),
        sinks=draw(FLAGS),
        tiling=draw(st.sampled_from(["merged", "small", "default"])),
    )  # fmt: skip
