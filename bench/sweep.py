"""What a step costs against G and against the picture's size.

    python bench/sweep.py [flags of bench/step.py]

Runs bench/step.py once for each G and each picture, and draws results/cost.png from the JSON lines,
which it keeps in results/cost.jsonl.
"""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from plumbing.common import pyplot  # noqa: E402

GROUPS, SIDES = [2, 4, 8, 16], [56, 112, 168, 224]


def measure(**flags):
    """One run of step.py -> its JSON line."""
    words = [w for name, value in flags.items() for w in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, HERE / "step.py", *words, *sys.argv[1:]],
        capture_output=True,
        text=True,
        check=True,
    )
    print(done.stdout.splitlines()[-2])
    return json.loads(done.stdout.splitlines()[-1])


def main():
    """Measure, keep, draw."""
    plt = pyplot()
    runs = {
        "G, responses per prompt": [measure(group=g) for g in GROUPS],
        "picture (tokens of the prompt)": [measure(pixels=s * s) for s in SIDES],
    }
    out = HERE.parent / "results"
    (out / "cost.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for lines in runs.values() for r in lines)
    )
    figure, axes = plt.subplots(1, 4, figsize=(18, 3.6), constrained_layout=True)
    for (label, lines), pair in zip(runs.items(), (axes[:2], axes[2:])):
        x = [r["group"] if label.startswith("G") else r["prompt"] for r in lines]
        for axis, what, unit in zip(
            pair, ("training", "memory"), ("training phases (s a step)", "memory they add (GB)")
        ):
            for name in lines[0]["seconds"]:
                axis.plot(x, [r["seconds"][name][what] for r in lines], marker="o", label=name)
            axis.set(xlabel=label, ylabel=unit, ylim=(0, None))
            axis.grid(alpha=0.3)
            axis.legend()
    figure.savefig(out / "cost.png", dpi=70)


if __name__ == "__main__":
    main()
