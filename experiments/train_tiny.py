"""Copies the results of a finished training run to benchmarks/results/train_tiny.json.

make train ARGS="--run-dir runs/tiny"
python -m experiments.train_tiny runs/tiny
"""

import json
import pathlib

from benchmarks.record import parser, save


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("run_dir", type=pathlib.Path, help="directory of a finished run")
    given = options.parse_args()
    path = given.run_dir / "results.json"
    if not path.exists():
        options.error(f"expected a finished run, with {path}")
    results = json.loads(path.read_text())
    results.pop("sample")
    save("train_tiny", [results], given.folder)


if __name__ == "__main__":
    main()
