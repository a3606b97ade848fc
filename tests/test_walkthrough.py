"""The walkthrough runs from the top, its answers hold, and the notebook has the same cells."""

import json
import re
import sys

import pytest
from conftest import ROOT

import masking

SCRIPT, NOTEBOOK = ROOT / "walkthrough.py", ROOT / "walkthrough.ipynb"


def cells_of(text):
    """The cells of a script in jupytext's percent format: ("markdown" or "code", source)"""
    parts = re.split(r"^# %%(.*)\n", text, flags=re.M)[1:]
    for mark, part in zip(parts[::2], (part.strip("\n") for part in parts[1::2])):
        text = "[markdown]" in mark
        yield ("markdown", re.sub(r"^# ?", "", part, flags=re.M)) if text else ("code", part)


def answers(source):
    return re.findall(r"^```python\n(.*?)^```", source, re.M | re.S)


CELLS = list(cells_of(SCRIPT.read_text()))


def test_the_notebook_is_made_of_these_cells_and_shows_every_picture():
    """If this fails, make it again; the first cell of walkthrough.py says how."""
    notebook = json.loads(NOTEBOOK.read_text())
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert found == CELLS and NOTEBOOK.stat().st_size < 2e6
    for cell, (_, source) in zip(notebook["cells"], CELLS):
        outputs = cell.get("outputs", [])
        pictures = [o for o in outputs if "image/png" in o.get("data", {})]
        assert len(pictures) == len(re.findall(r"^show\(", source, re.M)), source
        printed = "".join("".join(o.get("text", "")) for o in outputs)
        assert not re.findall(r'["\' =]/[a-z]+/[^"]*', printed)  # nothing of the machine
        assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]


@pytest.mark.prose
def test_the_notebook_says_how_long_it_took():
    """Of computing, which a busy machine changes little: all of it, and nearly all in section 7."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    texts = ["".join(o.get("text", "")) for cell in cells for o in cell.get("outputs", [])]
    said = re.findall(r"section (\d): .* (\d+) seconds of computing", "\n".join(texts))
    sections, seconds = zip(*(map(int, pair) for pair in said))
    assert sections == tuple(range(1, 9)) and seconds[6] > 0.7 * sum(seconds)
    about = re.search(r"compute for about (\w+) minutes", SCRIPT.read_text())[1]
    assert abs(sum(seconds) / 60 - {"three": 3, "four": 4, "five": 5, "six": 6}[about]) < 1


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "exercises").exists(), reason="the lesson asks for its stubs")
def test_it_runs_from_the_top_and_its_answers_hold(monkeypatch, tmp_path):
    """The same cells with fewer steps, each answer behind its exercise."""
    monkeypatch.setenv("WALKTHROUGH_FAST", "1")
    house = {name: masking.MASKS[name] for name in ("random", "raw", "semantic", "noise")}
    monkeypatch.setattr(masking, "MASKS", house)  # whatever a variant has entered in this process
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "walkthrough", "__file__": str(SCRIPT)}  # from another folder
    for kind, source in CELLS:
        for code in [source] if kind == "code" else answers(source):
            assert kind == "code" or "assert " in code
            exec(compile(code, SCRIPT.name, "exec"), names)
    drawn = {path.stem for path in tmp_path.glob("out/walkthrough/*.png")}
    assert drawn and drawn == set(re.findall(r'^show\("(.*)"\)', SCRIPT.read_text(), re.M))
