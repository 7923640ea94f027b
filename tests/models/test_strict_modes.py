"""Generation under JAX's strict modes: prompts of several lengths, decoding, taking back, emptying, loading."""

import pytest
from flax import nnx

from models import Transformer, TransformerConfig
from models.checkpoints.pretrained import Pretrained
from models.decoder import Decoder
from models.generation import generate_batch
from models.sampling import Sampling
from s2jax import LocalStride
from tests import strict_modes

pytestmark = [
    pytest.mark.filterwarnings("ignore::s2jax.PatternWarning"),
]

ALL, SLOW = list(strict_modes.MODES), pytest.mark.slow
SETS = pytest.mark.parametrize(
    "modes",
    [
        pytest.param(strict_modes.QUICK, id="quick"),
        pytest.param(ALL, id="all", marks=SLOW),
        *(pytest.param([mode], id=mode, marks=SLOW) for mode in ALL),
    ],
)
PROMPTS = [list(range(3, 30)), [7], list(range(40, 45))]


def pretrained(num_layers: int, dtype: str) -> Pretrained:
    config = TransformerConfig(
        vocab_size=50, num_layers=num_layers, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48,
        pattern=LocalStride(16, 1, 2), dense_layers=(1,)[: num_layers - 1], qk_norm=True, dtype=dtype,
    )  # fmt: skip
    return Pretrained(model=Transformer(config, rngs=nnx.Rngs(0)), max_context=200)


@SETS
def test_a_decoder(modes: list[str]):
    """One sequence has no token at first; what it holds then is no NaN that leaves a compiled function."""
    ours = pretrained(1, "bfloat16")
    with strict_modes.on(*modes):
        decoder = Decoder(
            ours.model, batch=2, max_length=60, max_rollback=2, sampling=Sampling(0.8, top_k=9, top_p=0.9)
        )
        decoder.feed([PROMPTS[0], []])
        decoder.draw([True, False])
        with pytest.raises(FloatingPointError, match="sequence 2: the model's logits for the token at position 0"):
            decoder.draw()
        decoder.feed([[1, 2], PROMPTS[2]])
        decoder.rollback([1, 0])
        decoder.reset([False, True])
        decoder.feed([[2], [9]])
        drawn = decoder.draw()
        decoder.empty()
    assert all(0 <= token < 50 for token in drawn)
    assert decoder.lengths.tolist() == [0, 0]


@SLOW
@pytest.mark.parametrize(
    ("modes", "settings"),
    [
        pytest.param(ALL, {}, id="all"),
        pytest.param(ALL, {"chunk": 16, "cache_dtype": "int8"}, id="all-chunks-int8"),
        *(pytest.param([mode], {"chunk": 16}, id=mode) for mode in ALL),
    ],
)
def test_tokens(modes: list[str], settings: dict):
    """Those of the likeliest path are the same with the modes on."""
    ours = pretrained(2, "float32")

    def tokens() -> list[dict[int, int]]:
        return list(generate_batch(ours, PROMPTS, 4, sampling=Sampling(), **settings))

    with strict_modes.on(*modes):
        found = tokens()
    assert found == tokens()
