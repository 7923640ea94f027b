"""FlexAttention is given exactly our pattern. Runs where PyTorch is installed, which the project does not ask for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import s2jax
from benchmarks.cases import CASES, DENSE_CASES, Case
from benchmarks.gpu.attempt import LeftOut
from benchmarks.gpu.flex import NAMES, block_mask, prepare_flex
from benchmarks.gpu.sides import make_arrays

CASE = Case("tiny", 1, 4, 2, 32, 3, 4, 1024)

pytestmark = pytest.mark.filterwarnings("default")  # PyTorch's own, too many to name


def test_what_is_not_compared_says_why():
    pytest.importorskip("torch")
    with pytest.raises(LeftOut, match="dense"):
        prepare_flex("flex 128x64", DENSE_CASES[0], make_arrays(CASE), device="cpu")
    with pytest.raises(LeftOut, match="no GPU"):
        prepare_flex("flex 128x64", CASES[0], make_arrays(CASE))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_block_mask_is_the_pattern(name, kv_heads):
    torch = pytest.importorskip("torch")
    case = Case("tiny", 1, 4, kv_heads, 32, 3, 4, 1024)
    pattern = case.pattern()
    assert isinstance(pattern, s2jax.LocalStride)
    expected = pattern.token_mask(4, kv_heads, 1024, 1024)
    mask = block_mask(pattern, case, NAMES[name], "cpu")
    index = [torch.arange(size).reshape(shape) for size, shape in ((4, (4, 1, 1)), (1024, (-1, 1)), (1024, (-1,)))]
    assert (np.asarray(mask.mask_mod(0, *index)) == expected).all()
    rows, columns = NAMES[name]
    blocks = expected.reshape(4, 1024 // rows, rows, 1024 // columns, columns)
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
@pytest.mark.parametrize("name", NAMES)
def test_compiled_it_gives_our_result(name):
    pytest.importorskip("torch")
    arrays = make_arrays(CASE, "float32")
    prepared = prepare_flex(name, CASE, arrays, device="cpu")
    (out,) = prepared.results["forward"](arrays.dout)
    expected = s2jax.attention(arrays.query, arrays.key, arrays.value, CASE.pattern(), implementation="reference")
    assert isinstance(out, jax.Array)
    assert jnp.abs(out - expected).max() < 1e-5
    assert "does not support backward on CPU" in prepared.left_out["backward"]
