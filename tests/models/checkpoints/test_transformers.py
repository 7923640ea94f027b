"""The package transformers on the same weights. Needs the extra `peers`."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.checkpoints.chat_template import chat_tokens
from models.checkpoints.pretrained import Pretrained, load, save
from tests.models.tiny_checkpoints import LLAMA, LLAMA3, QWEN3, SCALED, UNTIED, transformer

# Theirs are not ours to mend.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SETTINGS = {"dtype": "float32", "implementation": "reference"}
TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-3,
}
TEXT = """Once upon a time, in 1,024 BC, they'd said: "It's 3.14 o'clock!"\r\n
\tdef f(x):
    return x**2  # naïve — 東京 🙂
<|im_start|>user\nHow many?<|im_end|>
"""


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def transformers(torch):
    return pytest.importorskip("transformers")


def ours(model, ids):
    return np.asarray(nnx.jit(lambda model, ids: model(ids))(model, jnp.asarray(ids)))


def theirs(torch, model, ids):
    with torch.no_grad():
        return model.eval()(torch.tensor(ids)).logits.float().numpy()


def relative_error(given, expected):
    return np.abs(given - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 1e-1)])
def test_smollm2_has_their_logits(torch, transformers, smollm2_path, dtype, tolerance):
    directory, name = str(smollm2_path.parent), smollm2_path.name
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, gguf_file=name, dtype=torch.float32)
    pretrained = load(smollm2_path, dtype=dtype)
    ids = [pretrained.tokenizer.encode(TEXT * 8).ids]
    assert len(ids[0]) > 500
    error = relative_error(ours(pretrained.model, ids), theirs(torch, model, ids))
    print(f"relative error in {dtype}, over {len(ids[0])} tokens: {error:.2e}")
    assert error < tolerance


def test_smollm2_has_their_tokens(transformers, smollm2_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(smollm2_path.parent), gguf_file=smollm2_path.name)
    # Reading GGUF, they leave out that digits stand alone.
    text = "".join(" " if character.isdigit() else character for character in TEXT)
    assert load(smollm2_path).tokenizer.encode(text).ids == tokenizer(text).input_ids


@pytest.mark.parametrize("config", [LLAMA, UNTIED, QWEN3, SCALED], ids=["llama", "untied", "qwen3", "scaled"])
def test_they_load_what_we_save(torch, transformers, tmp_path, config):
    model = transformer(config)
    save(tmp_path, Pretrained(model=model, max_context=128))
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert type(loaded).__name__ == ("Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM")
    ids = np.arange(96).reshape(2, 48)
    assert relative_error(ours(model, ids), theirs(torch, loaded, ids)) < 1e-5


def test_they_load_the_tokenizer_that_we_save(transformers, smollm2_path, tmp_path):
    pretrained = load(smollm2_path)
    tiny = Pretrained(
        model=transformer(LLAMA),
        **{
            name: getattr(pretrained, name)
            for name in ("max_context", "tokenizer", "eos_ids", "bos_id", "chat_template")
        },
    )
    save(tmp_path, tiny)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXT).input_ids == pretrained.tokenizer.encode(TEXT).ids
    assert (loaded.eos_token_id, loaded.bos_token_id) == (2, 1)
    messages = [{"role": "user", "content": "Hi"}]
    theirs = loaded.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat_tokens(pretrained, messages) == theirs


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("Llama", {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}, "max_position_embeddings": 512}),
        ("Mistral", {"sliding_window": None}),
        ("Qwen3", {"head_dim": 24}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_we_load_what_they_save(torch, transformers, tmp_path, name, changes, dtype):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(TINY | changes))
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():  # no gain is 1, no logit tiny
        torch.nn.init.uniform_(parameter, -0.3, 0.6)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ids = np.arange(96).reshape(2, 48)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32)  # `model` has its frequencies in bfloat16
    assert relative_error(ours(load(tmp_path, **SETTINGS).model, ids), theirs(torch, again, ids)) < 1e-5
