"""The tokenizer of models that train on bytes, in the form of a tokenizer.json that transformers loads, too."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

BOUNDARY = 256
"""Opens and closes a document; ids 0 to 255 are the bytes."""
BOUNDARY_TOKEN = "<|endoftext|>"


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose ids are the bytes of the UTF-8 text, after the boundary that opens a document.

    A byte-level BPE without merges. `BOUNDARY_TOKEN` in a text is the boundary, as special tokens are elsewhere.
    """
    vocab = {character: byte for byte, character in enumerate(_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens([AddedToken(BOUNDARY_TOKEN, special=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    opened = f"{BOUNDARY_TOKEN} $A"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=opened, pair=f"{opened} $B", special_tokens=[(BOUNDARY_TOKEN, BOUNDARY)]
    )
    return tokenizer


def _characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]
