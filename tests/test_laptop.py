"""bench/paper_on_a_laptop.py and side_by_side.py: their rules on numbers whose verdict is known,
and their results; and the figures of results/ that pages quote."""

import json
import re
import statistics
import sys

import pytest
from conftest import ROOT

from plumbing.report.record import collapse_warnings, first_anomaly
from plumbing.run.config import parser

sys.path.insert(0, str(ROOT / "bench"))

laptop = pytest.importorskip("paper_on_a_laptop", reason="there is no bench/ here")
side_by_side = pytest.importorskip("side_by_side")

RESULTS = ROOT / "results"


def test_an_interval_is_students_over_seeds():
    mean, half = laptop.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # The standard deviation is 1.5811, its standard error 0.7071, and t(4) = 2.776.
    assert (mean, half) == (3.0, pytest.approx(1.963, abs=1e-3))


@pytest.mark.parametrize(
    "differences, at_least, expected",
    [
        ([16, 18, 17, 20, 19], 15, "confirmed"),
        ([16, 18, 17, 20, 19], 20, "not confirmed"),  # above 0, but not by so much
        ([40, -10, 30, -5, 35], 15, "not confirmed"),  # enough on average, but it may be chance
        ([-6, -5, -7, -6, -5], 15, "contradicted"),
        ([1, -1, 0, 1, -1], 0, "not confirmed"),
    ],
)
def test_a_verdict_needs_size_and_certainty(differences, at_least, expected):
    assert laptop.verdict(differences, at_least)[0] == expected


def test_every_run_has_a_folder_of_its_own_and_a_program_that_knows_its_flags(tmp_path):
    jobs = {job for claim in laptop.claims() for job in claim.jobs()}
    jobs |= {(side_by_side.flags_of(algo), 1) for _, algo, _, _ in side_by_side.METHODS}
    assert len({laptop.Runs(tmp_path).path(*job) for job in jobs}) == len(jobs) > 60
    for flags in {flags for flags, _ in jobs}:
        program, *words = laptop.command(flags).split()
        assert (ROOT / program).exists() and (program == "train.py" or not words)
        # The reward that says nothing is registered in the process of its run.
        parser().parse_args([word for word in words if word not in ("--reward", "nothing")])


def test_verdicts_and_figures_from_runs(tmp_path):
    """The first claim on made-up runs in which PAPO-G is 20 points above GRPO on `vision`, and the
    order in which the signals of the third leave."""
    runs, (first, _, third) = laptop.Runs(tmp_path), laptop.claims()[:3]
    for flags, seed in (*first.jobs(), *third.jobs()):
        level = (0.5 if "papo_g" in flags else 0.3) + 0.001 * seed
        series = {"step": list(range(1, 21)), "reward": [0.5] * 15 + [0.1] * 5}
        series |= {"perception_kl": [0.1] * 13 + [1.0] * 7}
        series |= {"val_accuracy": [None] * 9 + [level] + [None] * 9 + [level]}
        runs.done[flags, seed] = {"series": series}
        for when, accuracy in (("before", 0.31), ("after", level)):
            summary = {"accuracy": accuracy, "followed": 1 - accuracy}
            runs.done[flags, seed][when] = {"general": summary, "vision": summary}
    found = first.judge(runs, first)
    assert found[0] == ("vision", "confirmed", "+20.0 points (+20.0 .. +20.0)")
    left = ("gamma 2: signals leave at step, seed 1", "", "perception_kl 14, reward 16")
    assert left in third.judge(runs, third)
    for draw in (laptop.figure, laptop.curves):
        draw(first, runs).savefig(tmp_path / "one.png", dpi=20)
        assert (tmp_path / "one.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The committed runs, known by today's flags."""
    runs = laptop.Runs(tmp_path_factory.mktemp("runs"))
    runs.load(RESULTS / f"{laptop.NAME}.json")
    return runs


def test_the_committed_runs_are_judged_as_they_were(kept, tmp_path):
    """Every verdict again, from runs that were called with the flags of their day."""
    laptop.page(kept, tmp_path, draw=False)
    for name in (f"{laptop.NAME}.json", f"{laptop.NAME}.md"):
        assert (tmp_path / name).read_text() == (RESULTS / name).read_text(), name


def test_the_watch_sees_a_collapse_coming_and_is_silent_on_sound_runs(kept):
    """Figure 11 of the paper: without annealing, the toy's gamma collapses. By one measure for all
    signals KL_prcp leaves first, as there, the entropies three to six steps later, and the reward 0
    to 2 after these; and the warning comes before the reward has halved."""

    def warnings(run):
        lines = laptop.lines_of(run)
        return [n for n in range(1, len(lines) + 1) if collapse_warnings(lines[:n])]

    for seed in laptop.SEEDS[:3]:
        run = kept.done["--algo papo_g --gamma 2 --anneal_steps 0", seed]
        left = first_anomaly(laptop.lines_of(run), factor=2)
        entropies = {left["entropy"], left["masked_entropy"]}
        assert {n - left["perception_kl"] for n in entropies} <= {3, 4, 5, 6}
        assert {left["reward"] - n for n in entropies} <= {0, 1, 2}
        assert all(left["perception_kl"] < left[name] for name in left if name != "perception_kl")
        assert min(warnings(run)) <= left["reward"]
    for algo in ("grpo", "papo_g"):
        for seed in laptop.SEEDS:
            assert warnings(kept.done[f"--algo {algo}", seed]) == []


def test_methods_side_by_side():
    """A line a method, over the seeds that there are, each against what its paper builds on; and
    the committed page is that of its runs."""
    runs, file = laptop.Runs("/nowhere"), RESULTS / "side_by_side.json"
    runs.load(file)
    pace = json.loads(file.read_text())["pace"]
    assert side_by_side.page(runs, pace) == file.with_suffix(".md").read_text()
    for level, (_, algo, _, _) in enumerate(side_by_side.METHODS):
        for seed in laptop.SEEDS:
            accuracy = 0.4 + 0.05 * level + 0.01 * seed
            summary = {"accuracy": accuracy, "followed": 1 - accuracy}
            run = {"after": {"general": summary, "vision": summary}}
            runs.done[side_by_side.flags_of(algo), seed] = run
    del (
        runs.done["--algo dapo", 1],
        runs.done["variants/vppo.py", 4],
        runs.done["variants/vppo.py", 5],
    )
    rows = [line.split(" | ") for line in side_by_side.page(runs).splitlines() if "`" in line]
    lines = {cells[0].strip("| "): cells for cells in rows if len(cells) > 3}
    # 40 + 1 .. 5 per cent: the mean is 43, and t(4) 1.5811 / sqrt(5) is 1.96.
    assert lines["GRPO"][3:6] == ["43.0 ± 2.0", "43.0 ± 2.0", "57.0 ± 2.0"]
    assert lines["GRPO"][6:8] == ["", ""]
    assert lines["PAPO_G"][6:8] == ["+5.0 points (+5.0 .. +5.0)", "confirmed"]
    # Two seeds that both have: 2 and 3.
    assert lines["VPPO"][6] == "+10.0 points (+10.0 .. +10.0)" and lines["VPPO"][9] == "3 |"


@pytest.mark.prose
def test_pages_quote_the_results():
    runs = r"^\| [\w, ]+ \| `.+"
    for page, pattern, count, result in [
        ("docs/findings.md", r"^\| .+", 10, "paper_on_a_laptop.md"),
        ("README.md", r"^\| \d\. .+", 3, "paper_on_a_laptop.md"),
        ("docs/after-papo.md", runs, 7, "side_by_side.md"),
        ("docs/lora.md", runs, 3, "lora.md"),
    ]:
        rows, known = re.findall(pattern, (ROOT / page).read_text(), re.M), RESULTS / result
        assert len(rows) >= count and all(row in known.read_text() for row in rows), page


@pytest.mark.prose
def test_the_page_of_speed_says_what_was_measured():
    page, names = (ROOT / "docs" / "speed.md").read_text(), ("step", "pipeline", "versus_trl")
    step, pipeline, trl = (json.loads((RESULTS / f"{name}.json").read_text()) for name in names)
    share = round(100 * step["memory_ratio"])
    assert f"{step['update_speedup']:.1f} times as fast, {share} % of the memory" in page
    assert f"+{100 * step['papo_over_grpo']:.0f} % (the paper" in page
    assert f"{step['compiled_speedup']:.2f} times as fast" in " ".join(page.split())
    for batch, name in (("8", "ours"), ("128", "ours"), ("8", "ours, masked_grad")):
        whole, training = trl["by_trl_batch"][batch][name]["times_as_fast"]
        assert f"| {whole:.1f} times, and {training:.1f} times without sampling |" in page
    for kind in ("JPEG, 640 x 480", "toy, 56 x 56"):
        cells = [f"{pipeline[kind][name]:.1f}" for name in ("read", "back", "again", "hand over")]
        for what in ("waiting", "work"):
            cells.append(f"{statistics.median(pipeline[kind][f'ratios of {what}']):.1f} times less")
        assert f"| {kind} | {' | '.join(cells)} |" in page
