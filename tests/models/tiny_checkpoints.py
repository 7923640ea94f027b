"""Tiny checkpoints: models of two layers, and the GGUF files that llama.cpp's converter would make of them."""

import dataclasses
import functools
import math

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import Transformer, TransformerConfig
from models.checkpoints.huggingface_weights import to_huggingface
from s2jax.patterns import Dense
from s2jax.rotary import RopeScaling

LLAMA = TransformerConfig(
    vocab_size=96,
    num_layers=2,
    d_model=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    d_ff=96,
    pattern=Dense(),
    rope_theta=500.0,  # so that a wrong one shows within a few tokens
    norm_eps=1e-3,
    tie_embeddings=True,
    dtype="float32",
    implementation="reference",  # compiles fastest
)
UNTIED = dataclasses.replace(LLAMA, tie_embeddings=False, rope_theta=10_000.0, num_kv_heads=4)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True, head_dim=24)  # heads wider than the stream
# Of the frequencies of eight pairs, some are kept, some lowered by a part, some by the whole factor.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 256}
SCALED = dataclasses.replace(LLAMA, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 256))

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# 90 tokens, one of them from a merge; a control token and one that a user defined. The space is spelt Ġ.
TOKENS = [*map(chr, range(39, 127)), "Ġ", "ab", "<|end|>", "<tool>"]
TYPES = [1] * 90 + [3, 4]
TOKENIZER = {"model": "gpt2", "pre": "smollm", "tokens": TOKENS, "token_type": TYPES, "merges": ["a b"]}


def transformer(config, seed=0, *, unit_gains=False):
    """A model with random weights of the usual sizes, drawn by numpy: nothing is compiled for it.

    Its gains are no ones, so that leaving one out shows, unless `unit_gains`.
    """
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(seed)
    state = nnx.state(model)
    for path, leaf in nnx.to_flat_state(state):
        shape = leaf.get_value().shape
        if path[-1] in ("scale", "query_gain", "key_gain"):
            values = np.ones(shape) if unit_gains else random.uniform(0.5, 1.5, shape)
        else:
            inputs = shape[:-1] if path[-2] == "out" else shape[:1]
            values = random.normal(0, 0.02 if path[-1] == "embedding" else math.prod(inputs) ** -0.5, shape)
        leaf.set_value(jnp.asarray(values.astype(np.float32)))
    nnx.update(model, state)
    return model


def logits(model, length=24):
    tokens = np.random.default_rng(7).integers(0, model.config.vocab_size, (1, length))
    return np.asarray(nnx.jit(lambda model, tokens: model(tokens))(model, tokens))


def neighbours(rows, heads):
    """The rows of a projection as llama.cpp's converter orders them: i and i + d/2 of each head side by side."""
    head_dim = len(rows) // heads
    order = [h * head_dim + i + half for h in range(heads) for i in range(head_dim // 2) for half in (0, head_dim // 2)]
    return rows[order]


def gguf_tensors(model):
    """A model's tensors under llama.cpp's names, in its order."""
    config = model.config
    tensors = {}
    for name, tensor in to_huggingface(model).items():
        if not config.qk_norm and ("q_proj" in name or "k_proj" in name):
            tensor = neighbours(tensor, config.num_heads if "q_proj" in name else config.num_kv_heads)
        stem = name.removesuffix(".weight")
        layer = ""
        if stem.startswith("model.layers."):
            number, stem = stem.removeprefix("model.layers.").split(".", 1)
            layer = f"blk.{number}."
        tensors[f"{layer}{GGUF_NAMES[stem]}.weight"] = tensor
    return tensors


def gguf_metadata(config):
    prefix = "qwen3" if config.qk_norm else "llama"
    return {
        f"{prefix}.block_count": config.num_layers,
        f"{prefix}.context_length": 128,
        f"{prefix}.embedding_length": config.d_model,
        f"{prefix}.feed_forward_length": config.d_ff,
        f"{prefix}.attention.head_count": config.num_heads,
        f"{prefix}.attention.head_count_kv": config.num_kv_heads,
        f"{prefix}.attention.key_length": config.head_dim,
        f"{prefix}.attention.value_length": config.head_dim,
        f"{prefix}.rope.dimension_count": config.head_dim,
        f"{prefix}.rope.freq_base": config.rope_theta,
        f"{prefix}.attention.layer_norm_rms_epsilon": config.norm_eps,
        "tokenizer.ggml.eos_token_id": 90,
        "tokenizer.ggml.eot_token_id": 91,
        "tokenizer.chat_template": "{{ messages }}",
        **{f"tokenizer.ggml.{name}": value for name, value in TOKENIZER.items()},
    }


def write_gguf(path, model, *, metadata=None, tensors=None, quantisation="F32", architecture=None, **options):
    """Writes a model as GGUF.

    Args:
        path: of the file.
        model: a `Transformer`.
        metadata: to add to the model's own; None as a value takes a key out.
        tensors: to add to the model's own.
        quantisation: of the matrices of the layers, the rest is F32.
        architecture: in place of the model's own.
        options: of `gguf.GGUFWriter`.
    """
    own = "qwen3" if model.config.qk_norm else "llama"
    writer = gguf.GGUFWriter(path, architecture or own, **options)
    for key, value in (gguf_metadata(model.config) | (metadata or {})).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add.get(type(value), writer.add_array)(key, value)
    kind = gguf.GGMLQuantizationType[quantisation]
    for name, tensor in (gguf_tensors(model) | (tensors or {})).items():
        tensor = np.ascontiguousarray(tensor)
        if tensor.ndim == 2 and name.startswith("blk."):
            writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@functools.partial(jax.jit, static_argnums=0)
def _all_logits(graph, state, tokens):
    return nnx.merge(graph, state)(tokens)


def greedy(model, ids, count):
    """The likeliest tokens after `ids`, each by a whole forward pass without a cache; up to 256 in all."""
    ids, split = list(ids), nnx.split(model)
    for _ in range(count):
        tokens = np.zeros((1, 256), np.int32)
        tokens[0, : len(ids)] = ids
        ids.append(int(np.asarray(_all_logits(*split, tokens))[0, len(ids) - 1].argmax()))
    return ids[len(ids) - count :]
