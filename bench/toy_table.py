"""The README's table from finished runs: python bench/toy_table.py results

Reads <folder>/<algo>-seed<n>/evaluation.json; prints mean and range over seeds of avg@8 before and
after, per split.
"""

import json
import sys
from pathlib import Path


def main(folder):
    runs = {}
    for path in sorted(Path(folder).glob("*-seed*/evaluation.json")):
        runs.setdefault(path.parent.name.split("-seed")[0], []).append(json.loads(path.read_text()))
    print("| algorithm | split | before | after, mean of seeds | seeds, low to high | change |")
    print("|---|---|---|---|---|---|")
    for algo, evaluations in runs.items():
        for split in evaluations[0]["after"]:
            before, after = (
                [100 * e[when][split]["accuracy"] for e in evaluations]
                for when in ("before", "after")
            )
            mean, start = sum(after) / len(after), sum(before) / len(before)
            seeds = " ".join(f"{a:.1f}" for a in sorted(after))
            change = f"{mean - start:+.1f}"
            print(f"| {algo} | {split} | {start:.1f} | {mean:.1f} | {seeds} | {change} |")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "results")
