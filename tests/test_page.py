"""report.html: what is on it, that no data become markup or a formula, and that it ends no run."""

import json
import math
import os
import random
import re
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest
from conftest import ROOT, call, run_here

from plumbing.report import page, record
from plumbing.report.__main__ import main

HOSTILE = "_<script>alert('x')</script>&amp;\"' $\\frac{1$"
OPEN_TAGS = {"meta", "img", "br"}  # that nothing closes
PICTURE = "iVBORw0KGgo="
GAMMA_2 = "bench/controls.py --algo papo_g --gamma 2 --anneal_steps 0"


class Reader(HTMLParser):
    """Tags, text and what a browser would fetch, of a page whose tags close in order."""

    def __init__(self, file):
        super().__init__()
        self.stack, self.tags, self.words, self.fetched = [], [], [], []
        self.feed(file.read_text())
        assert not self.stack

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.stack += [tag] if tag not in OPEN_TAGS else []
        names = ("src", "href", "xlink:href", "data", "action")
        self.fetched += [v for k, v in attributes if k in names and v[0] != "#"]

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, text):
        self.words += [text] if "style" not in self.stack else []


def rows_of(file):
    """The cells of every row of its tables."""
    rows = re.findall("<tr>(.*?)</tr>", file.read_text())
    return [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in rows]


def summary(accuracy):
    interval = {"low": accuracy - 0.05, "high": accuracy + 0.05}
    return {"accuracy": accuracy, **interval, "pass": 1.0, "followed": 0.25}


def written(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def a_run(folder, gain=0.3, **config):
    """The files of a run of six steps, as train.py leaves them."""
    (folder / "samples").mkdir(parents=True)
    about = {"config": {"algo": "papo_g", "steps": 6, "gamma": 0.01, "val_data": "toy"} | config}
    about["splits"] = {"general": "hints are right as often as in training"}
    written(folder / "config.json", about | {"command": ["train.py", HOSTILE], "commit": "abc1234"})
    norms = [1.0, math.inf, math.nan, 1.0, 1.0, 1.0]
    lines = [{"step": s, "reward": 0.1 * s, "grad_norm": g} for s, g in enumerate(norms, 1)]
    written(folder / "metrics.jsonl", *lines)
    splits = {"before": [0.4, 0.4], "after": [0.4 + gain, 0.42]}
    evaluation = {k: dict(zip(("general", HOSTILE), map(summary, v))) for k, v in splits.items()}
    written(folder / "evaluation.json", evaluation)
    for step in (2, 4, 6, 8):
        responses = [{"reward": 1.1, "words": [[f"word{step}", 2.7, 0.9], [HOSTILE, 0.0, 0.0]]}]
        sample = {"problem": HOSTILE, "answer": HOSTILE, "pictures": [PICTURE]}
        written(folder / "samples" / f"{step:06d}.json", [sample | {"responses": responses}])
    return folder


def test_a_page_tells_all_of_a_run_and_fetches_nothing(tmp_path):
    out = a_run(tmp_path / "run", columns=HOSTILE)
    record.write_page(out)
    read = Reader(out / "report.html")
    said = " ".join(read.words)
    assert "script" not in {tag for tag, _ in read.tags} and said.count(HOSTILE) >= 10
    assert read.fetched and all(x.startswith("data:image/png") for x in read.fetched)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert [a["content"] for _, a in read.tags if a.get("http-equiv")] == [policy]
    assert "step 6 of 6, algo papo_g" in said and "hints are right as often as" in said
    # Samples of steps that were run, the newest one open.
    assert re.findall(r"word\d", said) == ["word6", "word4", "word2"]
    assert [a for t, a in read.tags if t == "details"][:3] == [{"open": None}, {}, {}]
    assert ("span", {"style": "--s:0.90", "title": "2.700 nats"}) in read.tags
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    first = (out / "report.html").read_bytes()
    record.write_page(out)
    assert (out / "report.html").read_bytes() == first


def test_runs_stand_side_by_side(tmp_path):
    b = "_$b_1$"  # neither left out of a legend nor a formula
    a_run(tmp_path / "a", gamma=0.0, algo="grpo"), a_run(tmp_path / b, gain=0.4)
    written(tmp_path / "a" / "metrics.jsonl", {"step": 1, "reward": 0.5})
    file = tmp_path / f"a-and-{b}.html"
    assert run_here(main, tmp_path / "a", tmp_path / b) == f"written: {file}\n"
    # A run keeps its colour where the other one has nothing to show.
    key = r'stroke: (#\w+)[^#]*?</g>\s*<g id="text_\d+">\s*<text[^>]*>(a|_\$b_1\$) [\d.]+<'
    keys = re.findall(key, file.read_text())
    assert [name for _, name in keys] == ["a", b, b] and keys[1] == keys[2] != keys[0]
    rows, more = rows_of(file), ["100.0 → 100.0", "25.0 → 25.0"]  # pass@n, hints that are followed
    assert ["general", "a", "40.0", "70.0", "+30.0", "65.0 .. 75.0", *more] in rows
    assert ["general", b, "40.0", "80.0", "+40.0", "75.0 .. 85.0", *more] in rows
    assert any(row[4:5] == ["+2.0 (unclear)"] for row in rows)
    differs = file.read_text().split("<h2>Settings</h2>")[1].split("<details>")[0]
    assert "gamma" in differs and "algo" in differs and ">steps<" not in differs


def test_a_folder_without_a_run_gets_a_sentence(tmp_path):
    written(tmp_path / "config.json", {"model_type": "qwen2_5_vl"})  # as of a model
    with pytest.raises(SystemExit, match="holds no run: there is no config.json of one"):
        run_here(main, tmp_path)


def test_a_run_that_has_just_begun_and_one_of_sft(tmp_path):
    written(tmp_path / "config.json", {"config": {"steps": 5}})
    record.write_page(tmp_path)
    words = " ".join(Reader(tmp_path / "report.html").words)
    assert "step 0 of 5" in words and "without validation data" in words and "None yet." in words
    assert "Which words" not in words and not (tmp_path / "curves.png").exists()
    written(tmp_path / "evaluation.json", {"before": 2.0, "after": 0.5})
    written(tmp_path / "metrics.jsonl", {"step": 1, "loss": 2.0, "val_loss": 0.5})
    record.write_page(tmp_path)
    row = ["validation loss", tmp_path.name, "2.0000", "0.5000", "-1.5000"]
    assert row in rows_of(tmp_path / "report.html")


def test_signs_of_a_collapse_are_named_with_their_step(tmp_path):
    out = a_run(tmp_path / "run")
    lines = [{"step": s, "reward": 0.5, "perception_kl": 0.1} for s in range(1, 30)]
    left = [{"step": s, "reward": 0.1, "perception_kl": 3.0} for s in (30, 31)]
    written(out / "metrics.jsonl", *lines, *left)
    record.write_page(out)
    words = " ".join(" ".join(Reader(out / "report.html").words).split())
    where = "left where it used to be at step"
    assert f"Signs of a collapse: perception_kl {where} 30, reward {where} 31." in words


def test_a_long_run_is_drawn_as_means(tmp_path):
    out, names = a_run(tmp_path / "run"), [name for _, names in page.PANELS for name in names]
    lines = [{"step": s} | {name: s % 2 + 1e-3 * (s % 7) for name in names} for s in range(1, 3001)]
    written(out / "metrics.jsonl", *lines)
    points = page.series(record.load_run(out), "reward")
    assert len(points) == page.POINTS and points[0][0] == 5.5 and points[-1][0] == 2995.5
    record.write_page(out)
    assert (out / "report.html").stat().st_size < 400_000


def test_what_only_shows_a_run_never_ends_it(tmp_path, capsys, monkeypatch):
    out = a_run(tmp_path / "run")
    (out / "samples" / "notes.json").write_text("mine")
    (out / "samples" / "000004.json").write_text("{")
    monkeypatch.setattr(page, "draw", lambda *_: 1 / 0)
    record.write_page(out)
    warnings = capsys.readouterr().out.splitlines()
    assert re.match("warning: .*000004.json cannot be read", warnings[0])
    assert warnings[1:] == ["warning: the curves are not drawn (division by zero)"]
    read = " ".join(Reader(out / "report.html").words)
    assert re.findall(r"word\d", read) == ["word6", "word2"] and "None yet." in read
    (out / "report.html").unlink(), (out / "report.html").mkdir()
    record.write_page(out)
    assert "warning: report.html is not written (" in capsys.readouterr().out


def test_lines_of_metrics_that_are_none_are_left_out(tmp_path):
    whole = [{"step": 1, "reward": 0.5}, {"step": 4}]
    odd = ["[1]", "null", '{"step": "2"}', '{"reward": 1}', "\x00\x00", '{"step": 3, "rew']
    lines = [json.dumps(whole[0]), *odd, json.dumps(whole[1])]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\xff\n{")
    assert record.read_metrics(tmp_path) == whole[:1]  # and the last one ends in half a character
    record.cut_metrics(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == json.dumps(whole[0]) + "\n"


def test_signs_of_a_collapse_are_found_in_long_runs_too():
    """As by the definition, line by line; and for 10,000 steps in a moment."""
    chance = random.Random(1)

    def line(step, gone):
        kl = {} if step % 7 == 0 else {"perception_kl": (9.0 if gone else 0.1) * chance.random()}
        return {"step": step, "reward": 0.5, "entropy": 0.5 + chance.random(), **kl}

    lines = [line(step, step > 60) for step in range(1, 100)]
    (sign,) = [s for s in record.SIGNS_OF_COLLAPSE if s[0] == "perception_kl"]
    gone = [m["step"] for i, m in enumerate(lines) if record.is_anomalous(lines[: i + 1], sign)[0]]
    assert 60 < gone[0] < 66 and record.first_anomaly(lines) == {"perception_kl": gone[0]}
    began = time.process_time()
    assert record.first_anomaly([line(step, False) for step in range(10_000)]) == {}
    assert time.process_time() - began < 10


@pytest.mark.parametrize("usual", [10.0, 0.6, 0.0, -0.4])
def test_every_signal_is_judged_alike_and_as_early(usual):
    """From the sixth step on; and a reward may be below 0, or change its sign."""
    steps = range(1, 9)
    for name, factor, floor in record.SIGNS_OF_COLLAPSE:
        far = (1 if factor > 1 else -1) * 1.01 * max(abs((factor - 1) * usual), floor)
        for move, left in ((far, {name: 6}), (-far, {}), (far / 2, {})):
            lines = [{"step": s, name: usual + move * (s > 3)} for s in steps]
            assert record.first_anomaly(lines) == left
            assert len(record.collapse_warnings(lines[:6])) == len(left)
        assert record.first_anomaly([{"step": s, name: usual} for s in steps]) == {}


def test_signs_of_a_collapse_tell_the_runs_of_the_page():
    """No sound run has any, and each that collapses has; and what docs/metrics.md says of them."""
    runs = json.loads((ROOT / "results" / "paper_on_a_laptop.json").read_text())["runs"]
    series = {"train.py --algo papo_g": [], GAMMA_2: []}
    for run in runs:
        by_step = [zip(run["series"], values) for values in zip(*run["series"].values())]
        lines = [{"step": i} | dict(pairs) for i, pairs in enumerate(by_step, 1)]
        kept = [{k: v for k, v in line.items() if v is not None} for line in lines]
        series.get(run["command"], []).append(kept)
    sound, gone = series.values()
    assert len(sound) > 100 and len(gone) == 3
    assert not any(map(record.first_anomaly, sound))
    assert all("reward" in record.first_anomaly(lines) for lines in gone)
    rises = lambda lines, name: sum(x[name] for x in lines[-3:]) > sum(x[name] for x in lines[:3])
    assert all(rises(lines, "reward") and not rises(lines, "entropy") for lines in sound)
    kl = [[line for line in lines if "perception_kl" in line] for lines in sound]
    assert {rises(lines, "perception_kl") for lines in kl} == {True, False}
    assert {"perception_kl" in record.first_anomaly(lines, 2) for lines in kl} == {True, False}


def test_a_locale_that_is_not_utf_8_changes_nothing(tmp_path):
    """Paths, texts of data and the arrows of a table, in files and on the console."""
    (run := tmp_path / "é").mkdir()
    (run / "config.json").write_text(json.dumps({"config": {"out": str(run)}}))
    (run / "metrics.jsonl").write_text("")
    script = "from plumbing.report.__main__ import main; print(chr(0x2192)); main()"
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert "\\u2192" in call("-c", script, run, env=env)
    assert "é" in (run / "report.html").read_text("utf-8")


def test_two_programs_may_write_one_file(tmp_path):
    """Each whole, and nothing half-made is left."""
    texts = [word * 100_000 for word in "ab"]
    code = "import sys, pathlib, plumbing.base.common as c\nfor _ in range(200):\n"
    code += "    c.write_atomically(pathlib.Path(sys.argv[1]) / 'page', sys.argv[2] * 100_000)"
    asked = [[sys.executable, "-c", code, str(tmp_path), word] for word in "ab"]
    writers = [subprocess.Popen(words, cwd=ROOT) for words in asked]
    while any(writer.poll() is None for writer in writers):
        assert not (tmp_path / "page").exists() or (tmp_path / "page").read_text() in texts
    assert [writer.returncode for writer in writers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["page"]
