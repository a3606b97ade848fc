"""bench/paper_on_a_laptop.py: its rules on numbers whose verdict is known, and its results."""

import json
import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import fine_grained  # noqa: E402
import paper_on_a_laptop as laptop  # noqa: E402
import side_by_side  # noqa: E402

from plumbing import report  # noqa: E402


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


def test_every_claim_has_its_runs_and_its_rule(tmp_path):
    claims = laptop.claims(quick=False)
    assert len(claims) == 8 and all(claim.rule and claim.arms for claim in claims)
    jobs = {job for claim in claims for job in claim.jobs()}
    assert len({laptop.Runs(tmp_path).path(*job) for job in jobs}) == len(jobs)  # a folder each
    quick = laptop.claims(quick=True)
    assert [claim.title for claim in quick] == [claims[0].title] and len(quick[0].seeds) == 3


def test_verdicts_figures_and_the_page_from_runs(tmp_path):
    """All claims on made-up runs in which PAPO-G is 20 points above GRPO on `vision`."""
    claims, runs = laptop.claims(quick=False), laptop.Runs(tmp_path)
    for flags, seed in (job for claim in claims for job in claim.jobs()):
        level = (0.5 if "papo_g" in flags else 0.3) + 0.001 * seed
        summary = {"accuracy": level, "followed": 1 - level}
        series = {"step": list(range(1, 21)), "reward": [0.5] * 15 + [0.1] * 5}
        series |= {"perception_kl": [0.1] * 13 + [1.0] * 7}
        series |= {"val_accuracy": [None] * 9 + [level] + [None] * 9 + [level]}
        before = {"accuracy": 0.31, "followed": 0.4}
        runs.done[flags, seed] = {
            "flags": flags,
            "seed": seed,
            "before": {s: before for s in ("general", "vision")},
            "after": {s: summary for s in ("general", "vision")},
            "series": series,
        }
    laptop.page(claims, runs, tmp_path)
    text = (tmp_path / "paper_on_a_laptop.md").read_text()
    assert "| vision | confirmed | +20.0 points (+20.0 .. +20.0) |" in text
    assert "| gamma 2: signals leave at step, seed 1 |  | perception_kl 14, reward 16 |" in text
    assert text.count("## ") == 8 and text.count("](paper_on_a_laptop-") == 11
    assert len(list(tmp_path.glob("*.png"))) == 11


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The committed runs."""
    runs = laptop.Runs(tmp_path_factory.mktemp("runs"))
    runs.load(ROOT / "results" / f"{laptop.NAME}.json")
    return runs


def test_the_page_says_what_the_runs_say_and_others_quote_the_page(kept, tmp_path):
    laptop.page(laptop.claims(quick=False), kept, tmp_path)
    page = (tmp_path / f"{laptop.NAME}.md").read_text()
    assert page == (ROOT / "results" / f"{laptop.NAME}.md").read_text()
    findings = (ROOT / "docs" / "findings.md").read_text()
    rows = [line for line in findings.splitlines() if line.startswith("| ")]
    assert len(rows) > 10 and all(row in page for row in rows)
    rows = re.findall(r"^\| \d\. .+", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) >= 3 and all(row in page for row in rows)


def warnings(run):
    """The steps at which a run would have warned of a collapse."""
    lines = laptop.lines_of(run)
    return [n for n in range(1, len(lines) + 1) if report.collapse_warnings(lines[:n])]


def test_the_watch_sees_a_collapse_coming_and_is_silent_on_sound_runs(kept):
    """Figure 11 of the paper: without annealing, the toy's gamma collapses. By one measure for all
    signals KL_prcp leaves first, as there, the entropies three to six steps later, and the reward 0
    to 2 after these; and the warning comes before the reward has halved."""
    for seed in laptop.SEEDS[:3]:
        run = kept.done[f"--algo papo_g {laptop.TOO_LARGE}", seed]
        left = report.left_at(laptop.lines_of(run), factor=2)
        entropies = {left["entropy"], left["masked_entropy"]}
        assert {n - left["perception_kl"] for n in entropies} <= {3, 4, 5, 6}
        assert {left["reward"] - n for n in entropies} <= {0, 1, 2}
        assert all(left["perception_kl"] < left[name] for name in left if name != "perception_kl")
        assert min(warnings(run)) <= left["reward"]
    for algo in ("grpo", "papo_g"):
        for seed in laptop.SEEDS:
            assert warnings(kept.done[f"--algo {algo}", seed]) == []


def test_methods_side_by_side(tmp_path):
    """A line a method, over the seeds that there are, each against what its paper builds on."""
    runs = laptop.Runs(tmp_path)
    for level, (_, algo, _, _) in enumerate(side_by_side.METHODS):
        for seed in laptop.SEEDS[: 3 if algo == "vppo" else 5]:
            accuracy = 0.4 + 0.05 * level + 0.01 * seed
            summary = {"accuracy": accuracy, "followed": 1 - accuracy}
            runs.done[side_by_side.job(algo, seed)] = {
                "after": {"general": summary, "vision": summary},
            }
    del runs.done[side_by_side.job("dapo", 1)]
    pace = {algo: 2.0 + level for level, (_, algo, _, _) in enumerate(side_by_side.METHODS)}
    table = [
        line.split(" | ") for line in side_by_side.page(runs, pace).splitlines() if "`" in line
    ]
    lines = {cells[0].strip("| "): cells for cells in table if len(cells) > 3}
    assert list(lines) == [label for label, *_ in side_by_side.METHODS]
    # 40 + 1 .. 5 per cent: the mean is 43, and t(4) 1.5811 / sqrt(5) is 1.96.
    assert lines["GRPO"][3:6] == ["43.0 ± 2.0", "43.0 ± 2.0", "57.0 ± 2.0"]
    assert lines["GRPO"][6:8] == ["", ""] and lines["GRPO"][8] == "1.0"
    assert lines["PAPO_G"][6:8] == ["+5.0 points (+5.0 .. +5.0)", "confirmed"]
    # Two seeds that both have: 2 and 3.
    assert lines["VPPO"][6] == "+10.0 points (+10.0 .. +10.0)"
    assert lines["VPPO"][8:] == ["3.5", "3 |"]  # 7 seconds to GRPO's 2


def test_two_stages_on_fine_grained_kinds(tmp_path):
    """A line a model, with the same seeds on both sides of a comparison."""
    results = {}
    for level, arm in enumerate(fine_grained.ARMS):
        for seed in fine_grained.SEEDS[: 1 if arm == "base" else 3]:
            accuracy = 0.4 + 0.1 * level + 0.01 * seed
            run = {"after": dict.fromkeys(fine_grained.TESTS, accuracy)}
            if arm in fine_grained.ALGORITHMS:
                run["val"] = [(0, 0.5), (5, accuracy)]
            results[arm, seed] = run
    page = fine_grained.page(results)
    # 50 + 1, 2, 3 per cent: the mean is 52, and t(2) / sqrt(3) is 2.48.
    assert "| CoT SFT | 52.0 ± 2.5 | 52.0 ± 2.5 | 52.0 ± 2.5 | 52.0 ± 2.5 |  |" in page
    assert "| base | 41.0 | 41.0 |" in page and "| 50 82 |" in page
    assert page.count("| TAPO above DAPO | ") == 4
    assert "| TAPO above DAPO | seen, open | confirmed | +20.0 points (+20.0 .. +20.0) |" in page
    fine_grained.figure(results, tmp_path / "val.png")
    assert (tmp_path / "val.png").stat().st_size > 1000


def test_the_page_of_the_kinds_is_that_of_its_runs_and_another_quotes_it():
    results = json.loads((ROOT / "results" / "fine_grained.json").read_text())
    page = fine_grained.page({(run["arm"], run["seed"]): run for run in results})
    assert page == (ROOT / "results" / "fine_grained.md").read_text()
    told = (ROOT / "docs" / "after-papo.md").read_text()
    rows = re.findall(r"^\| (?:base|CoT SFT|DAPO|PAPO_D|TAPO) \| \d.*", told, re.M)
    assert len(rows) == 5 and all(row in page for row in rows)


def test_the_page_of_the_methods_is_that_of_their_runs_and_another_quotes_it():
    runs, file = laptop.Runs("/nowhere"), ROOT / "results" / "side_by_side.json"
    runs.load(file)
    page = side_by_side.page(runs, json.loads(file.read_text())["pace"])
    assert page == file.with_suffix(".md").read_text()
    told = (ROOT / "docs" / "after-papo.md").read_text()
    rows = re.findall(r"^\| .*`train.py --algo .*", told, re.M)
    assert len(rows) == 7 and all(row in page for row in rows)


def test_the_page_of_lora_is_that_of_its_runs_and_another_quotes_it():
    import lora

    runs, file = laptop.Runs("/nowhere"), ROOT / "results" / "lora.json"
    runs.load(file)
    page = lora.page(runs, laptop.SEEDS, None)
    assert page == file.with_suffix(".md").read_text()
    told = (ROOT / "docs" / "lora.md").read_text()
    rows = re.findall(r"^\| .*`train.py --algo .*", told, re.M)
    assert len(rows) == 3 and all(row in page for row in rows)


def test_the_emoji_of_the_page_are_those_of_the_run():
    found = json.loads((ROOT / "results" / "emoji.json").read_text())
    page = (ROOT / "docs" / "after-papo.md").read_text()
    told = " ".join(page.split("bench/emoji.py")[-1].split())

    def accuracies(algo, when):
        runs = [run for run in found["runs"] if run["algo"] == algo]
        return [100 * run[when]["test"]["accuracy"] for run in runs]

    before, dapo, tapo = (
        accuracies(*x.split()) for x in ("dapo before", "dapo after", "tapo after")
    )
    assert accuracies("tapo", "before") == before  # both go on from the same policy of a seed
    shown = [side_by_side.with_interval(values) for values in (before, dapo, tapo)]
    assert re.findall(r"\d+\.\d ± \d+\.\d", told) == shown
    pairs = [(before, dapo), (before, tapo), (dapo, tapo)]
    losses = [laptop.verdict([y - x for x, y in zip(*pair)])[1] for pair in pairs]
    assert re.findall(r"-\S+ points \(.*?\)", told) == losses
    seen, unseen = (found["classes"][name] for name in ("seen", "unseen"))
    assert f"other {unseen} classes" in told and f"the {seen} classes" in told


def test_lora_is_held_against_full_training_and_against_no_training():
    """One line a method that has runs, what its own rank trains, and the right verdicts."""
    import lora

    runs, seeds = laptop.Runs("/nowhere"), laptop.SEEDS
    levels = {"--algo papo_g": 0.8, "--algo papo_g --lora_rank 16": 0.7}
    for flags, level in levels.items():
        for seed in seeds:
            split = {"accuracy": level + 0.001 * seed, "followed": 0.1}
            runs.done[flags, seed] = {
                "before": dict.fromkeys(("vision", "general"), {"accuracy": 0.5}),
                "after": dict.fromkeys(("vision", "general"), split),
            }
    lines = lora.page(runs, seeds, None).splitlines()
    full, adapters = ([c.strip() for c in line.split("|")[1:-1]] for line in lines[-2:])
    assert (full[0], adapters[0]) == ("PAPO_G", "PAPO_G, LoRA")
    assert (full[2], adapters[2]) == ("858,176", "131,072")
    assert adapters[6].startswith("+20.3 points") and adapters[7] == "confirmed"
    assert adapters[8].startswith("-10.0 points") and adapters[9] == "contradicted"
    assert full[8] == "" and full[-1] == "5"
