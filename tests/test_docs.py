"""The commands of README.md and docs/: programs that exist, with flags that they have, run as
tests elsewhere or marked with the machine that they need."""

import re
import runpy
import shlex
import sys

import pytest
from conftest import ROOT

from plumbing.config import parser
from plumbing.supervised import SFT, SftConfig

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def commands():
    """[(page, program, its flags, the comment behind it)], the program as a path or a module."""
    found = []
    for page in PAGES:
        written = page.read_text().replace("\\\n", " ")
        for text in re.findall(r"(?:torchrun|python) [^\n`|]+", written):
            said, _, comment = text.partition("#")
            words = shlex.split(said.replace("<", "").replace(">", "").replace("'", ""))
            at = [i for i, word in enumerate(words) if word.endswith(".py") or words[i - 1] == "-m"]
            if at:
                found.append((page.name, words[at[0]], words[at[0] + 1 :], comment))
    return found


def file_of(program):
    return ROOT / (program if program.endswith(".py") else program.replace(".", "/") + ".py")


def test_training_commands_of_the_pages_are_understood():
    programs = {"train.py": parser(), "sft.py": parser(SftConfig, SFT)}
    known = [(c[1], c[2]) for c in commands() if c[1] in programs]
    assert len(known) > 10 and {program for program, _ in known} == set(programs)
    for program, flags in known:
        programs[program].parse_args(flags)  # ends with a sentence if it is not understood


def test_commands_that_need_a_gpu_or_a_hub_say_so():
    """A line that trains or asks a hub's model: the machine stands behind it, or the page is about
    GPUs."""
    for page, program, flags, comment in commands():
        if any(flag.startswith("Qwen/") for flag in flags):
            assert re.search(r"H100|GPU", comment), (page, program, flags)


def test_every_program_of_the_pages_has_the_flags_that_they_give(monkeypatch, capsys):
    found, helps = commands(), {}
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path, str(ROOT / "bench")])
    for page, program, flags, _ in found:
        assert file_of(program).exists(), (page, program)
        if program not in helps:
            monkeypatch.setattr(sys, "argv", [program, "--help"])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(file_of(program)), run_name="__main__")
            assert not ended.value.code
            helps[program] = re.findall(r"--\w+", capsys.readouterr().out)
        given = [flag for flag in flags if flag.startswith("--")]
        assert set(given) <= set(helps[program]), (page, program, given)
    assert len(found) > 40 and len(helps) > 12
