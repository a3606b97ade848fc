"""The shape of the project: what may import what, how long a file may be, and that the README, the
help text and the registries name the same things."""

import ast
import re
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

from credit import CREDIT
from loss import PERCEPTION
from masking import MASKS
from masking import SOURCES as PICTURES
from papo import ALGORITHMS
from plumbing.config import algorithms, parser
from reward import REWARDS

LESSON = ROOT / "walkthrough.py"  # calls the method, and is no part of it
TOP = [path for path in sorted(ROOT.glob("*.py")) if path != LESSON]
SOURCES = [*TOP, LESSON, *sorted(ROOT.glob("plumbing/*.py")), *sorted(ROOT.glob("toy/*.py"))]
ALL = [*SOURCES, *sorted(ROOT.glob("tests/*.py")), *sorted(ROOT.glob("bench/*.py"))]


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path, modules):
    """The project's own modules that a file imports, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & modules


def functions(path):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


def test_no_import_circle():
    modules = {module_name(path) for path in SOURCES}
    graph = {module_name(path): imported(path, modules) for path in SOURCES}
    assert graph["train"] >= {"papo", "reward"} and graph["papo"] >= {"loss"}  # it does look
    assert all(graph[name] <= {"loss"} for name in ("loss", "papo"))  # the method, by itself
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_method_is_all_that_lies_at_the_top():
    names = "credit eval groups loss masking papo reward rollout sft train".split()
    assert [path.stem for path in TOP] == names


def test_the_method_can_be_read_in_an_afternoon():
    lengths = {path.name: len(path.read_text().splitlines()) for path in TOP}
    assert sum(lengths.values()) <= 1950 and max(lengths.values()) <= 260, lengths


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_and_functions_fit_a_screen(path):
    assert max(map(len, path.read_text().splitlines()), default=0) <= 100
    for function in functions(path) if path in SOURCES else []:
        arguments = function.args
        own = [a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
        assert function.end_lineno - function.lineno < 60, function.name
        assert len([name for name in own if name != "self"]) <= 6, function.name


def test_help_and_readme_offer_what_the_registries_hold():
    actions = {action.dest: action for action in parser()._actions}
    readme = (ROOT / "README.md").read_text()
    offered = {
        "algo": algorithms(),
        "mask": list(MASKS),
        "reward": list(REWARDS),
        "perception": [*PERCEPTION, "exact"],
        "credit": ["none", *CREDIT],
        "rollout_picture": ["clean", *PICTURES],
    }
    assert offered["algo"] == [name for name in ALGORITHMS if "/" not in name]
    for flag, names in offered.items():
        assert list(actions[flag].choices) == names
        row = next(line for line in readme.splitlines() if line.startswith(f"| `--{flag}`"))
        assert re.findall(r"`(\w+)`", row.split("|")[2]) == names, flag


def test_a_page_leads_to_every_equation_in_one_hop():
    """The rows "in the paper / in the code" quote a line, and the file has it exactly once."""
    page = (ROOT / "docs" / "equations.md").read_text()
    table = page[page.index("| in the paper") : page.index("## What the terms")]
    rows = re.findall(r"\| \[`([\w/.]+)`\]\(../([\w/.]+)\), `(\w+)` \| `(.+?)` \|", table)
    assert len(rows) == table.count("\n|") - 1 >= 10
    for name, target, function, line in rows:
        assert name == target
        source = (ROOT / name).read_text()
        node = next(n for n in functions(ROOT / name) if n.name == function)
        assert source.count(line) == 1, (name, line)
        assert node.lineno <= source[: source.index(line)].count("\n") + 1 <= node.end_lineno


def test_the_readme_fits_a_reader():
    """150 lines of 100 columns, but for tables; its steps lead to the lines that it quotes, and its
    list of what to read says how long each file is."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150 and all(len(x) <= 100 for x in lines if x[:1] != "|")
    links = [re.search(r"\[`(.+)`\]\((\w+\.py)#L(\d+)\)", line) for line in lines]
    links = [link.groups() for link in links if link]
    assert len(links) == 7
    for quoted, name, number in links:
        source = (ROOT / name).read_text().splitlines()
        places = [n for n, line in enumerate(source, 1) if quoted in line]
        assert places == [int(number)], (quoted, name)
    said = dict(re.findall(r"\[`(\w+\.py)`\]\(\1\) (\d+)", " ".join(lines)))
    assert said == {path.name: str(len(path.read_text().splitlines())) for path in TOP}


PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_what_exists(page):
    text = (ROOT / page).read_text()
    for name, function in re.findall(r"`((?:plumbing/|toy/|bench/)?\w+\.py)`, `(\w+)`", text):
        source = (ROOT / name).read_text()
        assert re.search(rf"\b{function}\b", source), (name, function)
    for target in re.findall(r"\]\(([\w/.-]+)\)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_the_map_names_every_file():
    named = set(re.findall(r"(\w+\.py)", (ROOT / "docs" / "map.md").read_text()))
    there = {
        path.name for folder in ("plumbing", "toy", "bench") for path in ROOT.glob(f"{folder}/*.py")
    }
    assert there - named == {"__init__.py"}


def test_results_say_nothing_of_the_machine_they_come_from():
    for file in ROOT.glob("results/*.json*"):
        assert not re.findall(r'["\' =]/[a-z]+/[^"]*', file.read_text()), file.name
