"""One page on one run, or on several side by side, beside the first run; a browser shows it.

    python -m plumbing.report out/toy-grpo out/toy-papo_g    # two runs side by side
    python -m plumbing.report out/toy-grpo                   # one run's own page again

A run that is under way brings its own page up to date by itself.
"""

from pathlib import Path

from plumbing.base.common import Parser, fail, may_write
from plumbing.report import page
from plumbing.report.record import load_run


def main():
    """Put runs side by side, or write one run's page again, and say where it is."""
    p = Parser(__doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="output folder of a run")
    p.add_argument("--out", type=Path, help="the page; default: beside the first run")
    args = p.parse_args()
    try:
        runs = [load_run(out) for out in args.runs]
    except ValueError as error:
        fail(error)
    names = [out.name for out in args.runs]
    if len(set(names)) < len(names):
        runs = [run | {"name": str(out)} for run, out in zip(runs, args.runs)]
    page_of_all = args.runs[0].parent / f"{'-and-'.join(names)}.html"
    path = args.out or (page_of_all if len(runs) > 1 else args.runs[0] / "report.html")
    may_write(path.parent)
    page.write(path, runs)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
