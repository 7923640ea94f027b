"""The examples that are scripts, run as they stand: they print what they promise."""

import os
import pathlib
import re
import runpy

import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"

# Regular expressions of all that each prints.
PRINTED = {
    "nnx_layer": r"""a window: loss \d\.\d\d before, 0\.[6-9]\d after 60 steps
a window and stripes: loss \d\.\d\d before, 0\.[0-4]\d after 60 steps
""",
    "linen_layer": r"""key.kernel \(64, 2, 16\)
key_gain \(16,\)
out.kernel \(4, 16, 64\)
query.kernel \(64, 4, 16\)
query_gain \(16,\)
value.kernel \(64, 2, 16\)
gradients are finite: True
the NNX layer gives the same: True
""",
    "equinox_attention": r"""output: \(8, 256, 64\)
loss at step 0: 1\.\d\d\d
loss at step 19: 0\.[0-7]\d\d
parameters: 12288
""",
    "custom_pattern": r"""PowersOfTwo\(block_size=64\)
(?s:.*)the same attention: True
1048576 tokens: density 0\.0017, compiled in \d+\.\d s
""",
    "routed_blocks": r"""2 of 32 blocks: off by [345]\d% with the gate, by 1\d\d% at random
4 of 32 blocks: off by [12]\d% with the gate, by [89]\d% at random
8 of 32 blocks: off by \d% with the gate, by [67]\d% at random
""",
    "generation": r"""bytes of the layers' caches: \[262272, 82080, 82080\]
generated: \[(\d+(, )?){16}\]
the same without a cache: True
""",
    "mesh_training": r"""a device's part of the query kernel: \(64, 2, 8\)
losses: \[1\.\d+, .*\]
those of one device: True
""",
}


@pytest.mark.parametrize("name", PRINTED)
def test_the_example_prints_what_it_promises(name, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # an example may add to it
    runpy.run_module(f"examples.{name}", run_name="__main__")
    printed = capsys.readouterr().out
    assert re.fullmatch(PRINTED[name], printed), printed


def test_every_example_is_run_described_and_short():
    loops = {"continuous_batching", "fork", "speculative_decoding"}  # of tests/examples/test_loops.py
    examples = {path.stem: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert examples.keys() == PRINTED.keys() | loops
    readme = (EXAMPLES / "README.md").read_text()
    for name, text in examples.items():
        assert f"`python -m examples.{name}`" in readme
        assert len(text.splitlines()) <= 60 or name in loops
