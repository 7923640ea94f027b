"""Files of a checkpoint that a stranger might send: mutated at random, each from its seed; and what becomes of them.

python -m tests.models.checkpoints.hostile_files   # reads directories and GGUF files from stdin, answers in JSON lines
"""

import copy
import json
import pathlib
import random
import resource
import struct
import sys
import time

SMALL_LIMIT = 1 << 30
VALUES = (
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        3,
        10**9,
        2**31 - 1,
        2**40,
        2**63,
        10**30,
        0.5,
        -1.5,
        1e308,
        float("inf"),
        float("nan"),
    ),
    *(
        "",
        "x",
        "x" * 20_000,
        "\ud800",
        "a\nb",
        "../../etc/passwd",
        "\x00",
        [],
        {},
        [[]],
        [1, "a", None],
        {"a": {"b": []}},
    ),
    *([5] * 2_000, ["<x>"] * 300, "silu", "llama3", "(a+)+$", "{{ 1 }}", {"content": 5}, {"type": "Replace"}),
)
NUMBERS = (0, 1, 2, 7, 8, 9, 12, 13, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
TEMPLATES = (
    "{{ messages }}", "{{ bos_token }}", "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ 'a' * 10**9 }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ strftime_now('%Y' * 10**6) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 'a' | center(10**9) }}", "{{ '%999999999d' % 3 }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}", "{{ raise_exception('no') }}", "{% include 'x' %}",
    "{{ namespace.__init__.__globals__ }}", "{{ 7 ** 99999999 }}", "{{ messages.append(1) }}",
    "{% import 'os' as os %}",
    "{{ messages | map(attribute='__class__') | list }}", "{% set x = namespace(a=1) %}{{ x.a }}", "{{ ((((1)))) }}",
    "{{ self.__init__.__globals__ }}", "{{ '{:999999999}'.format(1) }}", "{{ range(10) | batch(10**9, 1) | list }}",
    "{% generation %}a{% endgeneration %}", "{{ messages | tojson(indent=10**9) }}", "{{ [1] | sum(start=[]) }}", "{%",
)  # fmt: skip


def mutated_json(values: object, chance: random.Random) -> object:
    """A copy in which one to three values, wherever they are, are others, missing, or nested deeply."""
    values = json.loads(json.dumps(values))
    for _ in range(chance.randint(1, 3)):
        places = _places(values)
        if not places:
            break
        node, key = chance.choice(places)
        kind = chance.randrange(8)
        if kind == 0:
            del node[key]
        elif kind == 1:
            node[key] = json.loads("[" * 50 + "]" * 50)
        elif kind == 2 and isinstance(node, dict):
            node["x" * chance.choice((1, 30_000))] = node[key]
        elif kind == 3:
            other, at = chance.choice(places)
            node[key] = json.loads(json.dumps(other[at]))
        else:
            node[key] = copy.deepcopy(chance.choice(VALUES))
    return values


def _places(node: object) -> list[tuple]:
    """Each value within another, as the other and the key or index in it."""
    keys = list(node) if isinstance(node, dict) else range(min(len(node), 20)) if isinstance(node, list) else ()
    return [(node, key) for key in keys] + [place for key in keys for place in _places(node[key])]


def mutated_bytes(contents: bytes, chance: random.Random, *, within: int | None = None) -> bytes:
    """A copy of which a few bytes, most often in the first `within`, are others, missing, or there twice."""
    contents, span = bytearray(contents), min(within or len(contents), len(contents))
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        at = chance.randrange(max(1, span))
        kind = chance.randrange(6)
        if kind == 0:
            contents[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            contents[at : at + 8] = struct.pack("<Q", chance.choice(NUMBERS))
        elif kind == 2:
            contents[at : at + 4] = struct.pack("<I", chance.choice(NUMBERS) % 2**32)
        elif kind == 3:
            del contents[at : at + chance.choice((1, 8, 64, len(contents)))]
        elif kind == 4:
            contents[at:at] = contents[at : at + chance.choice((1, 8, 200))]
        else:
            contents[at:at] = bytes(chance.randrange(256) for _ in range(chance.choice((1, 8))))
    return bytes(contents)


def mutated_gguf(contents: bytes, chance: random.Random) -> bytes:
    """A GGUF file with a number in its header, most often one of a setting that counts, replaced."""
    data_begins = contents.index(b"output_norm.weight") + 64
    if chance.random() < 0.5:
        return mutated_bytes(contents, chance, within=data_begins)
    names = (b"llama.", b"tokenizer.", b"blk.", b"token_embd", b"general.")
    places = [at for name in names for at in _all(contents[:data_begins], name)]
    at = chance.choice([0, *places])
    end = at + chance.choice((4, 8, 16, 24, 30, 34, 40, 48))
    width = chance.choice((4, 8))
    number = chance.choice(NUMBERS) % 2 ** (8 * width)
    return contents[:end] + number.to_bytes(width, "little") + contents[end + width :]


def _all(contents: bytes, name: bytes) -> list[int]:
    places, at = [], contents.find(name)
    while at >= 0:
        places.append(at)
        at = contents.find(name, at + 1)
    return places


def write_case(seed: int, files: dict[str, bytes], gguf: bytes, into: pathlib.Path) -> tuple[str, pathlib.Path]:
    """Writes the mutated files of a seed; returns what was mutated, and what to load."""
    chance = random.Random(seed)
    kind = chance.choices(
        ("gguf", "safetensors", "index", "config", "generation_config", "tokenizer", "tokenizer_config", "template"),
        (30, 16, 6, 16, 8, 14, 8, 2),
    )[0]
    into.mkdir()
    if kind == "gguf":
        (into / "model.gguf").write_bytes(mutated_gguf(gguf, chance))
        return kind, into / "model.gguf"
    files = dict(files)
    if kind == "safetensors":
        files["model.safetensors"] = mutated_bytes(files["model.safetensors"], chance, within=2600)
    elif kind == "index":
        whole = files.pop("model.safetensors")
        files["model-1.safetensors"] = whole
        header = json.loads(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]])
        index = {
            "metadata": {},
            "weight_map": {name: "model-1.safetensors" for name in header if name != "__metadata__"},
        }
        files["model.safetensors.index.json"] = _text(mutated_json(index, chance))
    elif kind == "template":
        template = "".join(chance.choices(TEMPLATES, k=chance.randint(1, 3)))
        if chance.random() < 0.3:
            template = mutated_bytes(template.encode(), chance).decode("utf-8", "replace")
        files["chat_template.jinja"] = template.encode()
    else:
        name = f"{kind}.json"
        if chance.random() < 0.25:
            files[name] = mutated_bytes(files[name], chance)
        elif chance.random() < 0.05:
            files[name] = b'{"a":' * 100_000
        else:
            files[name] = _text(mutated_json(json.loads(files[name]), chance))
    for name, contents in files.items():
        (into / name).write_bytes(contents)
    return kind, into


def _text(values: object) -> bytes:
    return json.dumps(values).encode("utf-8", "surrogatepass")


def outcome(kind: str, path: pathlib.Path) -> str:
    """What comes of reading all of a checkpoint: "right", or "refused: " and why."""
    from models.checkpoints.chat_template import chat_tokens
    from models.checkpoints.pretrained import open_checkpoint

    try:
        checkpoint = open_checkpoint(path)
        checkpoint.parameters()
        if checkpoint.tokenizer is not None:
            ids = checkpoint.encode("ab <|end|> cab <tool> Hi!\n" * 40)
            assert all(0 <= token < checkpoint.config.vocab_size for token in ids)
        if kind == "template":
            chat_tokens(checkpoint, [{"role": "user", "content": "ab"}])
        checkpoint.refused_sampling or checkpoint.own_sampling()
    except (ValueError, OSError) as error:
        return f"refused: {error}"
    return "right"


def most_megabytes() -> float:
    """Most memory that this process had; `ru_maxrss` would be its parent's, where that had more."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    """Answers each line of stdin, with what became of the checkpoint and what it took."""
    import models.checkpoints.chat_template  # noqa: F401  # before memory is limited

    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + SMALL_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for line in sys.stdin:
        kind, path = json.loads(line)
        start = time.perf_counter()
        try:
            answer = outcome(kind, pathlib.Path(path))
        except BaseException as error:  # what the test is about: there must be none
            answer = f"FAULT: {type(error).__name__}: {error}"
        print(json.dumps([answer, time.perf_counter() - start, most_megabytes()]), flush=True)


if __name__ == "__main__":
    main()
