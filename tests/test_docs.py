"""The commands of the pages are understood, and the details of PAPO are held by tests."""

import re
import runpy
import shlex
import sys

import pytest
from conftest import ROOT, command

from plumbing.run.config import parser

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *ROOT.glob("fine_r1/*.md")]
# An annexe may not be there; and what enters algorithms and masks runs in a process of its own.
ANNEXES, APART = ("variants", "fine_r1", "bench"), ("variants", "fine_r1")


def commands():
    """(page, program, its flags, the comment behind it), the program as a path or a module"""
    for page in PAGES:
        written = page.read_text().replace("\\\n", " ")
        for text in re.findall(r"(?:torchrun|python) [^\n`|]+", written):
            said, _, comment = text.partition("#")
            words = shlex.split(said.replace("<", "").replace(">", "").replace("'", ""))
            at = [i for i, word in enumerate(words) if word.endswith(".py") or words[i - 1] == "-m"]
            room = re.split("[./]", words[at[0]])[0] if at else ""
            if at and (room not in ANNEXES or (ROOT / room).exists()):
                yield page.name, words[at[0]], words[at[0] + 1 :], comment


COMMANDS = list(commands())
PROGRAMS = sorted({program for _, program, _, _ in COMMANDS})


def test_training_commands_of_the_pages_are_understood():
    given = [flags for _, program, flags, _ in COMMANDS if program == "train.py"]
    assert len([parser().parse_args(flags) for flags in given]) > 8  # or it ends with a sentence


def test_commands_that_need_a_gpu_or_a_hub_say_so():
    for page, program, flags, comment in COMMANDS:
        if any(flag.startswith("Qwen/") for flag in flags):
            assert re.search(r"H100|GPU", comment), (page, program, flags)


@pytest.mark.parametrize("program", [name for name in PROGRAMS if not name.startswith(APART)])
def test_every_program_of_the_pages_has_the_flags_that_they_give(program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path, str(ROOT / "bench")])
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    run = runpy.run_path if program.endswith(".py") else runpy.run_module
    with pytest.raises(SystemExit):
        run(str(ROOT / program) if program.endswith(".py") else program, run_name="__main__")
    has_flags(program, capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("program", [name for name in PROGRAMS if name.startswith(APART)])
def test_so_has_every_program_of_an_annexe(program):
    has_flags(program, command(*["-m"] * (".py" not in program), program, "--help").stdout)


def has_flags(program, printed):
    words = [word for _, name, flags, _ in COMMANDS if name == program for word in flags]
    given, offered = {w for w in words if w.startswith("--")}, re.findall(r"--\w+", printed)
    assert "usage" in printed and given <= {"--help", *offered}, (program, given, printed)


def test_each_detail_has_a_number_and_a_test_that_there_is():
    """And the intervals that they quote are those of the runs."""
    page = " ".join((ROOT / "docs" / "details.md").read_text().split())
    text, _ = page.split("## VPPO", 1)
    about, *details = re.split(r" (?=\d+\. \*\*)", text)
    numbers = [int(detail.split(".")[0]) for detail in details]
    assert numbers == [*range(1, len(details) + 1)]
    assert about.startswith(f"# The {len(details)} details of PAPO ")
    sources = "".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    for number, detail in zip(numbers, details):
        _, released, here, test, toy = re.split(r"\*Released|[Hh]ere:\*|\*Test:\*|\*Toy:\*", detail)
        named = re.findall(r"`(test_\w+)`", test)
        assert named and all(f"\ndef {name}(" in sources for name in named), number
    listed = re.search(r"it changes ([\d, and]+) \(", about)[1]
    printed = [n for n, detail in zip(numbers, details) if "--objective paper" in detail]
    assert [int(n) for n in re.findall(r"\d+", listed)] == printed
    runs = (ROOT / "results" / "paper_on_a_laptop.md").read_text()
    spans = re.findall(r"[+-][\d.]+ \([+-][\d.]+ \.\. [+-][\d.]+\)", text)
    assert len(spans) >= 6 and all(span in runs for span in spans)
