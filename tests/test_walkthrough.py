"""The walkthrough: it runs from the top, the answers to its exercises hold, and the notebook is
made of the same cells."""

import json
import re

import pytest
from conftest import WARM

from plumbing.notebook import NOTEBOOK, SCRIPT, answers, cells, sources, tidy, with_new_text

CELLS = cells(SCRIPT.read_text())
SECTIONS = [source for kind, source in CELLS if kind == "markdown" and source.startswith("## ")]


@pytest.fixture(scope="module")
def notebook():
    return json.loads(NOTEBOOK.read_text())


def test_cells_and_answers_of_a_script():
    text = "# %% [markdown]\n# # A title\n#\n# ```python\n# x = 2\n#\n# y = x\n# ```\n"
    script = '"""What it is."""\n\n' + text + "\n# %%\nx = 1\n\n\n# a comment\n"
    found = cells(script)
    assert found[0] == ("markdown", "# A title\n\n```python\nx = 2\n\ny = x\n```")
    assert found[1:] == [("code", "x = 1\n\n\n# a comment")]
    assert answers(found[0][1]) == ["x = 2\n\ny = x\n"] and answers("`x`") == []


def test_a_notebook_keeps_neither_answers_nor_progress_bars():
    def code(source, **metadata):
        outputs = [{"output_type": "stream", "name": name} for name in ("stdout", "stderr")]
        cell = dict(cell_type="code", source=source, metadata=metadata, outputs=outputs)
        return cell | {"execution_count": 7}

    made = {"cells": [code("x = 1", execution={}), code("assert x", answer=True), code("x")]}
    kept = tidy(made | {"metadata": {"language_info": {}}})
    assert sources(kept) == [("code", "x = 1"), ("code", "x")] and not kept["metadata"]
    for number, cell in enumerate(kept["cells"], 1):
        assert cell["execution_count"] == number and cell["metadata"] == {}
        assert [output["name"] for output in cell["outputs"]] == ["stdout"]


def test_the_notebook_says_how_long_it_took(notebook):
    """At most 12 minutes on two cores, and each cell at most 2: what the last run of all took."""
    minutes = notebook["metadata"]["minutes"]
    assert minutes["longest cell"] <= 2 and minutes["all"] <= 12
    about = re.search(r"all cells together take about (\w+) minutes", SCRIPT.read_text())[1]
    assert abs(minutes["all"] - {"six": 6, "seven": 7, "eight": 8}[about]) < 1


def test_text_that_has_changed_is_taken_over_and_code_is_not():
    def cell(kind, source):
        return {"cell_type": kind, "source": source, "metadata": {}}

    kept = cell("code", "x = 1") | {"outputs": ["a picture"]}
    made = with_new_text({"cells": [cell("markdown", "# Old"), kept]}, [("code", "x = 1")])
    assert made["cells"] == [kept]
    found = [("markdown", "# New"), ("code", "x = 1")]
    made = with_new_text(made, found)
    assert sources(made) == found and made["cells"][1] == kept
    with pytest.raises(SystemExit, match="more than the text of walkthrough.py has changed"):
        with_new_text(made, [("code", "x = 2")])


def test_eight_sections_of_ninety_minutes_with_an_exercise_and_a_folded_answer_each():
    minutes = [re.search(r"^## (\d)\. .*\(minutes (\d+)-(\d+)\)$", s, re.M) for s in SECTIONS]
    assert [int(m[1]) for m in minutes] == list(range(1, 9))
    starts, ends = ([int(m[k]) for m in minutes] for k in (2, 3))
    assert starts == [0, *ends[:-1]] and ends[-1] == 90
    text = "\n".join(source for kind, source in CELLS if kind == "markdown")
    for section in map(str, range(1, 9)):
        assert text.count(f"**Exercise {section}.**") == 1
    folded = re.findall(r"<details><summary>Answer</summary>\n\n(.*?)</details>", text, re.S)
    assert len(folded) == 8 and all(len(answers(answer)) == 1 for answer in folded)
    assert all("assert " in answer for answer in folded)
    assert sum(source == "# Your answer goes here." for _, source in CELLS) == 8


def test_a_cell_of_code_fits_a_screen():
    assert max(source.count("\n") for kind, source in CELLS if kind == "code") < 45


def test_the_notebook_is_not_stale(notebook):
    """If this fails: python -m plumbing.notebook"""
    assert sources(notebook) == CELLS


def test_the_notebook_shows_every_picture_and_no_error(notebook):
    assert NOTEBOOK.stat().st_size < 2e6
    for cell in notebook["cells"]:
        outputs, source = cell.get("outputs", []), "".join(cell["source"])
        assert not [output for output in outputs if output["output_type"] == "error"]
        pictures = [o for o in outputs if "image/png" in o.get("data", {})]
        assert len(pictures) == len(re.findall(r"^show\(", source, re.M)), source
    said = "".join(str(o.get("text")) for c in notebook["cells"] for o in c.get("outputs", []))
    assert not re.findall(r'["\' =]/[a-z]+/[^"]*', said)  # nothing of the machine it was made on


@pytest.mark.slow
def test_it_runs_from_the_top_and_its_answers_hold(monkeypatch, tmp_path):
    """The same cells with fewer steps, each answer behind its exercise."""
    monkeypatch.setenv("WALKTHROUGH_FAST", "1")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "walkthrough"}
    for kind, source in CELLS:
        for code in [source] if kind == "code" else answers(source):
            exec(compile(code, SCRIPT.name, "exec"), names)
    assert names["cfg"].warm_steps == WARM  # shared with the other tests
    drawn = {path.stem for path in (tmp_path / "out" / "walkthrough").glob("*.png")}
    shown = re.findall(r'^show\("(.*)"\)', SCRIPT.read_text(), re.M)
    assert len(shown) >= 10 and drawn == set(shown)
