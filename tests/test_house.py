"""The shape of the project: its sizes, what may import what, and that pages name what there is."""

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter

import pytest
import yaml
from conftest import ROOT

from loss import PERCEPTION
from masking import MASKS
from papo import ALGORITHMS
from plumbing.run.config import algorithms, parser
from reward import REWARDS

NAMES = "loss papo masking policy rollout reward train eval".split()
TOP = [ROOT / f"{name}.py" for name in NAMES]
LESSON = ROOT / "walkthrough.py"  # calls the method, and is no part of it
HOUSE = [*TOP, *sorted(ROOT.glob("plumbing/**/*.py")), *sorted(ROOT.glob("toy/*.py"))]
ANNEXES = [path for name in ("variants", "fine_r1") for path in sorted(ROOT.glob(f"{name}/*.py"))]
SOURCES = [*HOUSE, *ANNEXES, LESSON]


def lines(*patterns):
    return sum(len(p.read_text().splitlines()) for g in patterns for p in ROOT.glob(g))


def loaded_by_train():
    """The project's own modules after `import train`, in a process of its own -> [lines of each]"""
    code = (  # an environment may lie in the project's folder, or beside it
        "import sys, train\nfor m in list(sys.modules.values()):\n"
        "    f = getattr(m, '__file__', None) or ''\n"
        f"    f.startswith({f'{ROOT}/'!r}) and 'site-packages' not in f and print(f)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return [len(open(name).read().splitlines()) for name in done.stdout.split()]


@pytest.mark.prose  # a fork may grow
def test_the_house_is_small():
    """What each part has, and what it may have at the most; these numbers may fall."""
    loaded = loaded_by_train()
    flags = [a for a in parser()._actions if a.dest != "help"]
    sizes = {
        "the top": (sum(lines(p.name) for p in TOP), 1650),
        "the longest file of the top": (max(lines(p.name) for p in TOP), 260),
        "plumbing": (lines("plumbing/**/*.py"), 5815),
        "variants and fine_r1": (lines("variants/*.py", "fine_r1/*.py"), 2225),
        "toy": (lines("toy/*.py"), 955),
        "bench": (lines("bench/*.py"), 2480),
        "exercises": (lines("exercises/*.py"), 540),
        "tests": (lines("tests/*.py"), 8686),
        "lines of ours that train loads": (sum(loaded), 6100),
        "modules of ours that train loads": (len(loaded), 41),
        "lines of train.py --help": (len(parser().format_help().splitlines()), 126),
        "flags of train.py": (len(flags), 59),
    }
    for name, (size, most) in sizes.items():
        print(f"{name:<34}{size:>7}  of {most}")
    assert not [name for name, (size, most) in sizes.items() if size > most]


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path, modules):
    """The project's own modules that a file imports, also inside functions; not those of types."""
    tree, found = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body.clear()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & modules


def functions(path):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


# The tower: a room imports what stands below it, or beside it, and nothing above.
FLOORS = [
    ["plumbing.base"],
    ["plumbing.grading", "plumbing.models", "plumbing.data"],
    ["loss", "papo", "masking", "policy", "rollout", "reward"],
    ["plumbing.run"],
    ["plumbing.report"],
    ["train", "eval"],
]


def floor_of(module):
    inside = lambda room: f"{module}.".startswith(f"{room}.")
    return next((i for i, rooms in enumerate(FLOORS) if any(map(inside, rooms))), None)


def test_nothing_imports_what_stands_above_it():
    modules = {module_name(path) for path in SOURCES}
    graph = {module_name(path): imported(path, modules) for path in SOURCES}
    assert graph["train"] >= {"papo", "reward"} and graph["papo"] >= {"loss"}  # it does look
    assert all(graph[name] <= {"loss"} for name in ("loss", "papo"))  # the method, by itself
    list(TopologicalSorter(graph).static_order())  # raises CycleError
    upwards = [
        (a, b)
        for a, known in graph.items()
        for b in known
        if floor_of(a) is not None and floor_of(b) is not None and floor_of(b) > floor_of(a)
    ]
    assert upwards == []
    house = {module_name(path) for path in HOUSE}
    annexes = tuple(f"{name}." for name in ("variants", "fine_r1", "bench"))
    assert not [(a, b) for a in house for b in graph[a] if b.startswith(annexes)]
    story = {"train", "eval"}  # they let the toy enter its data set
    assert not [a for a in house - story if not a.startswith("toy") and "toy.task" in graph[a]]


def test_the_method_does_not_know_what_came_after_it():
    for path in TOP:
        assert not re.findall(r"vppo|pgpo|noisy|tapo|fine.?r1", path.read_text(), re.I), path.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_fit_a_screen(path):
    """Ruff counts columns and arguments (pyproject.toml), but statements, and not lines."""
    assert not [f.name for f in functions(path) if f.end_lineno - f.lineno >= 60]


@pytest.mark.parametrize("path", TOP, ids=lambda path: path.name)
def test_public_functions_of_the_top_have_types(path):
    """CI lets mypy check that they hold."""
    for function in (f for f in functions(path) if not f.name.startswith("_")):
        inner = function.col_offset > 4 or ast.get_docstring(function) is None
        for a in function.args.args if not inner else ():
            plain = a.arg in ("self", "tok", "image_processor", "device", "exact", "grad")
            assert plain or a.annotation, (function.name, a.arg)


@pytest.mark.prose  # a fork registers more
def test_help_and_readme_offer_what_the_registries_hold():
    actions = {action.dest: action for action in parser()._actions}
    readme = (ROOT / "README.md").read_text()
    assert algorithms() == [name for name in ALGORITHMS if "/" not in name]
    offered = {"perception": [*PERCEPTION, "exact"], "reward": list(REWARDS)}
    own = {"algo": algorithms(), "mask": list(MASKS)}  # a variant may have entered others by now
    for flag, names in (offered | own).items():
        assert list(actions[flag].choices) == names
        row = next(line for line in readme.splitlines() if line.startswith(f"| `--{flag}`"))
        said = re.findall(r"`(\w+)`", row.split("|")[2])
        assert said == names if flag in offered else set(said) <= set(names), flag


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


@pytest.mark.prose
def test_the_readme_fits_a_reader():
    """150 lines of 100 columns, but for tables; it quotes lines and lengths as they are."""
    text = (ROOT / "README.md").read_text().splitlines()
    assert len(text) <= 150 and all(len(x) <= 100 for x in text if x[:1] != "|")
    links = [re.search(r"\[`(.+)`\]\((\w+\.py)#L(\d+)\)", line) for line in text]
    links = [link.groups() for link in links if link]
    assert len(links) == 7
    for quoted, name, number in links:
        source = (ROOT / name).read_text().splitlines()
        places = [n for n, line in enumerate(source, 1) if quoted in line]
        assert places == [int(number)], (quoted, name)
    said = dict(re.findall(r"\[`(\w+\.py)`\]\(\1\) (\d+)", " ".join(text)))
    assert said == {path.name: str(lines(path.name)) for path in TOP}


PAGES = ["README.md", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("docs/*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_what_exists(page):
    text = (ROOT / page).read_text()
    for name, function in re.findall(r"`((?:\w+/)*\w+\.py)`, `(\w+)`", text):
        source = (ROOT / name).read_text() if (ROOT / name).exists() else ""
        assert re.search(rf"\b{function}\b", source), (name, function)
    for target in re.findall(r"\]\(([\w/.-]+)\)", text):
        there = (ROOT / page).parent.joinpath(target).exists()
        away = any(f"{name}/" in target for name in ("variants", "fine_r1", "bench"))
        assert there or away and not (ROOT / "variants").exists(), target


@pytest.mark.prose
def test_the_map_names_every_file():
    named = set(re.findall(r"(\w+\.py)", (ROOT / "docs" / "map.md").read_text()))
    folders = ("plumbing/**", "toy", "bench", "variants", "fine_r1")
    there = {path.name for folder in folders for path in ROOT.glob(f"{folder}/*.py")}
    assert there - named == {"__init__.py", "__main__.py"}


def test_every_place_names_the_same_pythons():
    """Workflows run those that the README names; the style and the types are of the oldest."""
    said = re.search(r"tried with Python ([\d., ]+)\)", (ROOT / "README.md").read_text())[1]
    tried, settings = said.split(", "), tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert settings["ruff"]["target-version"] == f"py{tried[0].replace('.', '')}"
    assert settings["mypy"]["python_version"] == tried[0]
    assert [ROOT / name for name in settings["mypy"]["files"]] == TOP
    assert re.search(r"FROM python:([\d.]+)-", (ROOT / "Dockerfile").read_text())[1] in tried
    files = {path.stem: path.read_text() for path in ROOT.glob(".github/workflows/*.yml")}
    named = [x for text in files.values() for x in re.findall(r'python-version: "(.+)"', text)]
    matrix = yaml.safe_load(files["tests"])["jobs"]["default"]["strategy"]["matrix"]
    assert matrix["python"] == tried and set(named) <= set(tried)
    actions = [x for text in files.values() for x in re.findall(r"uses: (\S+)", text)]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in actions)


def test_results_say_nothing_of_the_machine_they_come_from():
    for file in ROOT.glob("results/*.json*"):
        assert not re.findall(r'["\' =]/[a-z]+/[^"]*', file.read_text()), file.name
