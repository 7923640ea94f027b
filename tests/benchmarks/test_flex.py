"""FlexAttention gets exactly our pattern. These tests need PyTorch, which the project does not require."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import s2jax
from benchmarks.cases import CASES, Case
from benchmarks.gpu.errors import LeftOut
from benchmarks.gpu.flex import FLEX, block_mask
from benchmarks.gpu.implementations import FUNCTIONS, forward_backward, make_arrays, s2jax_attention

CASE = Case("tiny", 1, 4, 2, 32, 3, 4, 1024)

pytestmark = pytest.mark.filterwarnings("default")  # PyTorch's own warnings are too many to name


def prepared(flex, step, arrays):
    return flex.prepare(CASE, step, FUNCTIONS[step], arrays)()


def test_long_sequences_are_compared_at_one_block_size():
    pytest.importorskip("torch")
    long = next(case for case in CASES if case.name == "phi3-128k")
    with pytest.raises(LeftOut, match="beyond 32k tokens"):
        FLEX[1].prepare(long, "forward", FUNCTIONS["forward"], make_arrays(CASE))


@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_block_mask_is_the_pattern(columns, kv_heads):
    torch = pytest.importorskip("torch")
    case = Case("tiny", 1, 4, kv_heads, 32, 3, 4, 1024)
    pattern = case.pattern()
    assert isinstance(pattern, s2jax.LocalStride)
    expected = pattern.token_mask(4, kv_heads, 1024, 1024)
    mask = block_mask(case, (128, columns), torch.device("cpu"))
    index = [torch.arange(size).reshape(shape) for size, shape in ((4, (4, 1, 1)), (1024, (-1, 1)), (1024, (-1,)))]
    assert (np.asarray(mask.mask_mod(0, *index)) == expected).all()
    blocks = expected.reshape(4, 1024 // 128, 128, 1024 // columns, columns)
    some, full = blocks.any((2, 4)), blocks.all((2, 4))
    for numbers, counts, read in (
        (mask.kv_indices, mask.kv_num_blocks, some & ~full),
        (mask.full_kv_indices, mask.full_kv_num_blocks, full),
    ):
        for head, row in np.ndindex(read.shape[:2]):
            listed = np.asarray(numbers)[0, head, row, : int(counts[0, head, row])]
            assert (listed == np.flatnonzero(read[head, row])).all()
    assert mask.seq_lengths == (1024, 1024)


@pytest.mark.slow  # PyTorch compiles C++
@pytest.mark.parametrize("flex", FLEX, ids=lambda flex: flex.name)
def test_it_gives_our_result(flex):
    pytest.importorskip("torch")
    arrays = make_arrays(CASE, "float32")
    (out,) = prepared(flex, "forward", arrays).results(arrays)
    expected = s2jax.attention(arrays.query, arrays.key, arrays.value, CASE.pattern(), implementation="reference")
    assert isinstance(out, jax.Array)
    assert jnp.abs(out - expected).max() < 1e-5


def test_gradients_are_those_of_its_inputs(monkeypatch):
    """PyTorch's dense attention takes its place, as FlexAttention has no backward pass on a CPU."""
    torch = pytest.importorskip("torch")
    mask = torch.from_numpy(CASE.pattern().token_mask(4, 2, 1024, 1024))

    def dense(query, key, value, block_mask, enable_gqa):
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(query, key, value, attn_mask=mask, enable_gqa=enable_gqa)

    monkeypatch.setattr(torch, "compile", lambda function, **options: dense)
    arrays = make_arrays(CASE, "float32")
    found = prepared(FLEX[0], "forward + backward", arrays).results(arrays)
    expected = jax.jit(forward_backward(s2jax_attention("reference", CASE.pattern())))(arrays)
    for one, other in zip(found, expected, strict=True):
        assert jnp.abs(one - other).max() < 1e-4
