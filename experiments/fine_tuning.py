"""Perplexity that brief fine-tuning recovers after sparsification: SmolLM2-135M on novels.

    python -m experiments.fine_tuning                    # needs `make .venv/.test`; about an hour on two cores

Every row is a run of train.py over the same 40 rows of 2,048 tokens from four of Jane Austen's novels; train.py holds
out a fifth. The perplexity of 8,192 tokens of the sixth is measured before and after. The dense row shows the gain from
the text alone: only a sparse row's gain beyond it is recovered. Runs are kept in runs/ and resumed.
"""

import pathlib
import subprocess
import sys

import numpy as np

from benchmarks.record import parser, save, table
from experiments.novels import novels
from experiments.perplexity import BANDS, EVERY_FIFTH, TITLE, measure
from models.checkpoints import smollm2
from models.checkpoints.pretrained import load

ROOT = pathlib.Path(__file__).parents[1]
STEPS, LENGTH, RATE = 40, 2048, 2e-4
STRIDE_8 = "LocalStride(64, 4, 8) | FirstBlocks(1)"
CASES = (
    ("dense", "Dense()", ()),
    ("window of 512", "Local(8)", ()),
    ("stride 8, window of 256, first block", STRIDE_8, ()),
    ("hybrid: that; 0, 1 and one in five dense", STRIDE_8, EVERY_FIFTH),
)


def tuned(name: str, text: str, dense_layers: tuple[int, ...], folder: pathlib.Path) -> pathlib.Path:
    """The directory of the model that a run of train.py fine-tuned."""
    run = folder / "".join(letter if letter.isalnum() else "-" for letter in name)
    if not (run / "model" / "config.json").exists():  # written last
        command = [sys.executable, "train.py", "--pretrained", str(smollm2.fetch()), "--data", str(folder / "data")]
        command += ["--pattern", text, "--dtype", "float32", "--run-dir", str(run), "--log-every", "1"]
        command += ["--steps", str(STEPS), "--warmup-steps", "4", "--checkpoint-every", str(STEPS)]
        command += ["--seq-len", str(LENGTH), "--heldout-tokens", str(LENGTH)]
        command += ["--learning-rate", str(RATE), "--rest-learning-rate", str(RATE)]
        layers = ["--dense-layers", *map(str, dense_layers)] if dense_layers else []
        subprocess.run([*command, *layers], cwd=ROOT, check=True)
    return run / "model"


def write_data(folder: pathlib.Path) -> None:
    """Writes the training novels, a file each."""
    folder.mkdir(parents=True, exist_ok=True)
    for title, text in novels().items():
        if title != TITLE:
            (folder / f"{title}.txt").write_text(text)


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--rows", nargs="+", choices=[case[0] for case in CASES], help="by default all")
    given = arguments.parse_args()
    folder = ROOT / "runs" / f"fine_tuning-{STEPS}x{LENGTH}"
    write_data(folder / "data")
    tokenizer, rows = load(smollm2.fetch()).tokenizer, []
    tokens = np.array([tokenizer.encode(novels()[TITLE]).ids[: BANDS[-1]]], np.int32)
    for name, text, dense_layers in CASES:
        if given.rows is None or name in given.rows:
            model = tuned(name, text, dense_layers, folder)
            before = measure(name, text, dense_layers, tokens)
            after = measure(name, text, dense_layers, tokens, model)
            kept = {key: before[key] for key in ("reads", "pattern", "dense layers", "cache MiB")}
            rows.append(kept | {"before": before["all"], "after": after["all"]} | _bands(after))
            print(rows[-1], flush=True)
    print(table(rows, list(rows[0])))
    if given.rows is None:
        trained = f"{STEPS} steps of {LENGTH} tokens of four other novels"
        text = f"{TITLE}, the first {tokens.size} tokens"
        save("fine_tuning", rows, given.folder, model=smollm2.REQUIREMENT, text=text, trained=trained)


def _bands(row: dict) -> dict:
    return {f"after, {key}": value for key, value in row.items() if key.startswith("to ")}


if __name__ == "__main__":
    main()
