"""walkthrough.py as a notebook: what its cells are, and walkthrough.ipynb made afresh from them.

    pip install -r requirements-dev.txt
    python -m plumbing.notebook           # runs every cell; 7 minutes on 2 cores
    python -m plumbing.notebook --text    # only text has changed: takes it over, and runs nothing

A cell begins at a line `# %%`, or `# %% [markdown]` for one of text, which stands in comments. Text
may hold Python code between fences (```python): the answer to an exercise. It is run after the text
that it stands in, so that a wrong answer makes no notebook, but it is not kept as a cell.
"""

import re
from datetime import datetime
from pathlib import Path

from plumbing.common import Parser, fail, write_atomically

PROJECT = Path(__file__).resolve().parent.parent
SCRIPT, NOTEBOOK = PROJECT / "walkthrough.py", PROJECT / "walkthrough.ipynb"
ANSWER = "answer"  # marks the cells that are run and not kept
STATES = "busy", "idle"  # what the kernel says when a cell begins and when it ends


def cells(text):
    """The cells of a script -> [("markdown" or "code", source)], without what precedes them."""
    parts = re.split(r"^# %%(.*)\n", text, flags=re.M)[1:]
    kinds = ["markdown" if "[markdown]" in mark else "code" for mark in parts[::2]]
    return [(kind, source_of(kind, part)) for kind, part in zip(kinds, parts[1::2])]


def source_of(kind, part):
    """What stands in one cell; text loses its comment signs."""
    part = part.strip("\n")
    return part if kind == "code" else re.sub(r"^# ?", "", part, flags=re.M)


def answers(source):
    """The Python code in a cell of text -> list of sources"""
    return re.findall(r"^```python\n(.*?)^```", source, re.M | re.S)


def sources(notebook):
    """The same as `cells`, from a notebook's JSON."""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


def with_answers(found):
    """A notebook of these cells that has not been run, each answer behind its text."""
    from nbformat import v4

    made = []
    for kind, source in found:
        new = v4.new_markdown_cell if kind == "markdown" else v4.new_code_cell
        made.append(new(source))
        if kind == "markdown":
            made += [v4.new_code_cell(code, metadata={ANSWER: True}) for code in answers(source)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return v4.new_notebook(cells=made, metadata={"kernelspec": kernel})


def tidy(notebook):
    """Only what a reader looks at: no answers' cells, progress bars or times of each cell."""
    notebook["cells"] = [c for c in notebook["cells"] if ANSWER not in c["metadata"]]
    count = 0
    for i, cell in enumerate(notebook["cells"]):
        cell["id"], cell["metadata"] = f"cell-{i}", {}
        if cell["cell_type"] == "code":
            count += 1
            cell["execution_count"] = count
            cell["outputs"] = [o for o in cell["outputs"] if o.get("name") != "stderr"]
    notebook["metadata"].pop("language_info", None)
    return notebook


def times(notebook):
    """How long each cell of a run notebook took -> {its first line: minutes}"""
    taken = {}
    for cell in notebook["cells"]:
        if known := cell["metadata"].get("execution"):
            start, end = (datetime.fromisoformat(known[f"iopub.status.{s}"]) for s in STATES)
            line = cell["source"].partition("\n")[0]
            taken[line] = taken.get(line, 0) + (end - start).total_seconds() / 60
    return taken


def with_new_text(notebook, found):
    """A notebook that has been run, with the text of these cells. Ends with a sentence if their
    code is not the notebook's."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    if [c["source"] for c in code] != [source for kind, source in found if kind == "code"]:
        fail(f"more than the text of {SCRIPT.name} has changed; run it, without --text")
    text = {"cell_type": "markdown", "metadata": {}}
    both = [code.pop(0) if kind == "code" else text | {"source": s} for kind, s in found]
    return notebook | {"cells": both}


def main():
    """Run the walkthrough as a notebook, and write it with its outputs."""
    p = Parser(__doc__)
    p.add_argument("--text", action="store_true", help="run nothing: take over changed text")
    only_text, found = p.parse_args().text, cells(SCRIPT.read_text())
    try:
        import nbformat
        from nbclient import NotebookClient
    except ImportError:
        fail("a notebook needs nbclient and ipykernel: pip install -r requirements-dev.txt")
    if only_text:
        made = with_new_text(nbformat.read(NOTEBOOK, 4), found)
    else:
        made = with_answers(found)
        NotebookClient(made, resources={"metadata": {"path": str(PROJECT)}}).execute()
        taken = times(made)
        longest = max(taken, key=taken.get)
        print(f"{sum(taken.values()):.1f} minutes, of which {taken[longest]:.1f}: {longest}")
        spent = {"all": sum(taken.values()), "longest cell": taken[longest]}
        made["metadata"]["minutes"] = {name: round(m, 1) for name, m in spent.items()}
    write_atomically(NOTEBOOK, nbformat.writes(nbformat.from_dict(tidy(made))) + "\n")
    print(f"written: {NOTEBOOK.name}, {NOTEBOOK.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
