"""report.html: what is on it, that no data become markup, and how a browser shows it."""

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from conftest import ROOT

from plumbing import page, report

HOSTILE = "<script>alert('x')</script>&amp;\"'"
OPEN_TAGS = {"meta", "img", "path", "circle", "polyline", "br"}  # that nothing closes
PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGA"
    "hKmMIQAAAABJRU5ErkJggg=="
)


class Reader(HTMLParser):
    """Tags, text and what a browser would fetch, of a page whose tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.words, self.fetched = [], [], [], []
        self.feed(text)
        assert not self.stack

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.stack += [tag] if tag not in OPEN_TAGS else []
        self.fetched += [v for k, v in attributes if k in ("src", "href", "data", "action")]

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, text):
        self.words += [text] if self.stack[-1:] != ["style"] else []


MORE = ["100.0 → 100.0", "25.0 → 25.0"]  # pass@n, and hints that are followed


def summary(accuracy):
    return {
        "accuracy": accuracy,
        "low": accuracy - 0.05,
        "high": accuracy + 0.05,
        "pass": 1.0,
        "followed": 0.25,
    }


def a_run(folder, gain=0.3, steps=6, **config):
    """The files of a run, as train.py leaves them."""
    (folder / "samples").mkdir(parents=True)
    about = {"config": {"algo": "papo_g", "steps": 6, "gamma": 0.01} | config, "commit": "abc1234"}
    (folder / "config.json").write_text(json.dumps(about | {"command": ["train.py", HOSTILE]}))
    lines = [
        {"step": s, "reward": 0.1 * s * (1 + gain), "grad_norm": math.inf if s == 2 else 1.0}
        for s in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    before, after = ({s: summary(x) for s in ("general", HOSTILE)} for x in (0.4, 0.4 + gain))
    (folder / "evaluation.json").write_text(json.dumps({"before": before, "after": after}))
    for step in (2, 4, 6, 8):
        word = f'<code><span style="--s:0.90" title="2.7 nats">word{step}</span></code>'
        text = f'<div class=p><div><img alt="" src="{PICTURE}"></div><div>{word}</div></div>'
        (folder / "samples" / f"{step:06d}.html").write_text(text)
    return folder


def test_a_page_tells_all_of_a_run_and_fetches_nothing(tmp_path):
    out = a_run(tmp_path / "run", problem_column=HOSTILE)
    report.write_page(out)
    read = Reader((out / "report.html").read_text())
    said = " ".join(read.words)
    assert "script" not in {tag for tag, _ in read.tags} and HOSTILE in said
    assert read.fetched and all(x.startswith("data:") for x in read.fetched)
    policy = next(a["content"] for t, a in read.tags if a.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for words in ("run: step 6 of 6, algo papo_g", "40.0", "70.0", "+30.0", "65.0 .. 75.0"):
        assert words in said
    assert "run: Accuracy rose on general (from 40.0 to 70.0 %)" in said
    assert "25.0 → 25.0" in said and "gamma" in said and "abc1234" in said
    # Samples of steps that were run, the newest one open.
    assert re.findall(r"word\d", said) == ["word6", "word4", "word2"]
    assert [a for t, a in read.tags if t == "details"][:3] == [{"open": None}, {}, {}]
    # An infinite gradient norm is not drawn.
    assert said.count("grad_norm") == 1 and sum(t == "polyline" for t, _ in read.tags) == 2
    assert "inf" not in [p for t, a in read.tags if t == "polyline" for p in a["points"].split()]


def test_a_page_begins_with_what_came_of_the_run(tmp_path):
    """Clearly changed is what lies outside of the interval; a signal that left is named, with its
    step; and the toy's splits are explained."""
    out = a_run(tmp_path / "run", val_data="toy")
    before, after = ({"vision": summary(x), "blind": summary(x)} for x in (0.4, 0.4))
    after |= {"vision": summary(0.1), "blind": summary(0.42)}
    (out / "evaluation.json").write_text(json.dumps({"before": before, "after": after}))
    first = report.load_run(out)
    assert page.outcome(first) == (
        "run: Accuracy fell on vision (from 40.0 to 10.0 %); it did not clearly change on blind "
        "(from 40.0 to 42.0 %)."
    )
    assert "blind: the questions of vision with a black picture" in page.what_was_measured([first])
    lines = [{"step": s, "reward": 0.5, "perception_kl": 0.1} for s in range(1, 30)]
    lines.append({"step": 30, "reward": 0.1, "perception_kl": 3.0})
    (out / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    said = page.outcome(report.load_run(out))
    assert said.endswith(
        "collapse: perception_kl at step 30, reward at step 30 left where it used to be."
    )
    (out / "evaluation.json").unlink()
    assert "no accuracy after training yet" in page.outcome(report.load_run(out))


def test_two_runs_stand_side_by_side(tmp_path):
    a_run(tmp_path / "a", gamma=0.0, algo="grpo"), a_run(tmp_path / "b", gain=0.4)
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    command = [sys.executable, "-m", "plumbing.report", tmp_path / "a", tmp_path / "b"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"written: {tmp_path / 'a-and-b.html'}\n", done.stderr[-2000:]
    text = (tmp_path / "a-and-b.html").read_text()
    figures = {f.split("<b>")[1].split("</b>")[0]: f for f in text.split("<figure>")[1:]}
    # A run keeps its colour where the other one has nothing to show.
    assert re.findall(r'class="key" style="--k:var\(--c(\d)\)">(\w)', figures["reward"]) == [
        ("0", "a"),
        ("1", "b"),
    ]
    assert re.findall(r'class="key" style="--k:var\(--c(\d)\)">(\w)', figures["grad_norm"]) == [
        ("1", "b")
    ]
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]
    assert ["general", "a", "40.0", "70.0", "+30.0", "65.0 .. 75.0", *MORE] in cells
    assert ["general", "b", "40.0", "80.0", "+40.0", "75.0 .. 85.0", *MORE] in cells
    differs = text.split("<h2>Settings</h2>")[1].split("<details>")[0]
    assert "gamma" in differs and "algo" in differs and ">steps<" not in differs
    assert Reader(text).fetched


def test_a_folder_without_a_run_gets_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match="holds no run: there is no config.json"):
        report.load_run(tmp_path)


def test_a_page_on_a_run_that_has_just_begun_and_on_one_of_sft(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text(json.dumps({"config": {"steps": 5}}))
    report.write_page(out)
    words = " ".join(Reader((out / "report.html").read_text()).words)
    assert "step 0 of 5" in words and "No accuracy was measured" in words
    (out / "evaluation.json").write_text(json.dumps({"before": 2.0, "after": 0.5}))
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "val_loss": 0.5}\n')
    report.write_page(out)
    read = Reader((out / "report.html").read_text())
    assert {"2.0000", "0.5000", "-1.5000"} <= set(read.words)
    assert "run: The validation loss was 2.0000, and is 0.5000." in read.words
    assert "Which words" not in " ".join(read.words)


def test_a_long_curve_is_drawn_as_means():
    run = page.Run("a", {}, [{"step": s, "x": float(s % 2)} for s in range(1, 4001)], {}, [])
    points = page.series(run, "x")
    assert len(points) == page.POINTS and points[0] == (5.5, 0.5) and points[-1] == (3995.5, 0.5)


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 1, [0, 0.5, 1]),
        (0.62, 0.88, [0.7, 0.8]),
        (-0.02, 0.03, [-0.02, 0, 0.02]),
        (1, 202, [50, 100, 150, 200]),
        (1e-7, 3e-7, [1e-7, 2e-7, 3e-7]),
    ],
)
def test_an_axis_has_round_numbers(low, high, expected):
    assert page.ticks(low, high) == pytest.approx(expected)


# ------------------------------------------------------------------------------------ in a browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
in_a_browser = pytest.mark.skipif(not BROWSER, reason=f"none of {', '.join(BROWSERS)} is installed")
LIGHT, DARK = 1, 0  # Blink's numbers for a reader's choice
# What a browser makes of the page, as a line of JSON in it.
PROBE = """<pre id="found"></pre><script>
const all = (query, see) => [...document.querySelectorAll(query)].map(see)
const style = e => getComputedStyle(e)
document.getElementById("found").textContent = JSON.stringify({
  across: document.documentElement.scrollWidth, width: innerWidth,
  curves: all("polyline", e => [e.getBoundingClientRect().width, style(e).stroke]),
  texts: all("body, .r, td, figcaption", e => style(e).color),
  back: style(document.body).backgroundColor, card: style(document.querySelector("figure"))
    .backgroundColor,
  heat: style(document.querySelector("p code span")).backgroundColor,
  on_heat: style(document.querySelector("p code span")).color,
  pictures: all("img", e => e.naturalWidth)})</script>"""


def browse(path, *flags):
    """A page in a headless browser -> the finished process."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *flags, f"file://{path}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=180)


def contrast(a, b):
    """Two colours of CSS -> the contrast ratio of WCAG 2.2, 1 to 21"""

    def luminance(colour):
        parts = [float(x) / 255 for x in re.findall(r"[\d.]+", colour)[:3]]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear))

    low, high = sorted(map(luminance, (a, b)))
    return (high + 0.05) / (low + 0.05)


@in_a_browser
@pytest.mark.parametrize("scheme, width", [(LIGHT, 1200), (DARK, 500)])
def test_a_browser_shows_it_readably(scheme, width, tmp_path):
    """Light and dark, wide and narrow: nothing sticks out, curves are drawn, and text and curves
    stand out from what is behind them."""
    a_run(tmp_path / "a"), a_run(tmp_path / "b", gain=0.4)
    runs = [report.load_run(tmp_path / name) for name in ("a", "b")][: 1 if width == 1200 else 2]
    text = page.render(runs, report.PANELS)
    text = re.sub(r"<meta http-equiv.*?>", "", text).replace("</body>", PROBE + "</body>")
    (tmp_path / "probe.html").write_text(text)
    settings = f"--blink-settings=preferredColorScheme={scheme}"
    done = browse(tmp_path / "probe.html", settings, f"--window-size={width},900", "--dump-dom")
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', done.stdout)[1])
    assert found["across"] <= found["width"]
    assert len(found["curves"]) == 2 * len(runs)
    assert all(w > 100 and contrast(c, found["card"]) > 3 for w, c in found["curves"])
    assert all(contrast(text, found["back"]) > 4.5 for text in found["texts"])
    assert contrast(found["on_heat"], found["heat"]) > 4.5
    assert contrast(found["back"], "rgb(0, 0, 0)") > 15 or scheme == DARK
    assert contrast(found["back"], "rgb(255, 255, 255)") > 15 or scheme == LIGHT
    assert found["pictures"] and all(found["pictures"])


@in_a_browser
def test_a_browser_has_nothing_to_complain_of(tmp_path):
    """The page itself, under its own policy, which the browser would say is broken."""
    out = a_run(tmp_path / "run")
    report.write_page(out)
    shot = tmp_path / "shot.png"
    done = browse(out / "report.html", "--enable-logging=stderr", f"--screenshot={shot}")
    assert shot.read_bytes()[:4] == b"\x89PNG" and "CONSOLE" not in done.stderr
    with open(out / "report.html", "a") as file:
        file.write("<script>1</script>")
    done = browse(out / "report.html", "--enable-logging=stderr", f"--screenshot={shot}")
    assert "CONSOLE" in done.stderr  # it would have been seen
