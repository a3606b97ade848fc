"""Triplets: positives and negatives of the right classes, drawn under names, bytes as they were."""

import base64
import collections
import json
import random
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Image as Picture
from datasets import load_dataset
from PIL import Image, ImageDraw

from plumbing.encoders import encoder_of
from plumbing.families import TOYS
from plumbing.pictures import rgb
from plumbing.sources import Rows
from plumbing.triplets import ASK, look_alikes, main, unseen_of, with_options
from toy.model import keep, new_policy, processor, tokenizer

# Two pairs of look-alikes: discs and crosses, each in two shades.
CLASSES = {
    "amber disc": (255, 190, 0),
    "golden disc": (235, 170, 20),
    "navy cross": (0, 10, 120),
    "indigo cross": (30, 0, 140),
}
TWIN = dict(zip(CLASSES, ["golden disc", "amber disc", "indigo cross", "navy cross"]))


def picture(name, rng):
    """A picture of a class, of another size and with its shape at another place each time."""
    disc, size = name.endswith("disc"), (rng.randint(60, 90), rng.randint(60, 90))
    image = Image.new("RGB", size, (255, 255, 255) if disc else (60, 60, 60))
    pen, x, y = ImageDraw.Draw(image), rng.randint(2, 20), rng.randint(2, 20)
    if disc:
        pen.ellipse([x, y, x + 38, y + 38], fill=CLASSES[name])
    else:
        pen.rectangle([x, y + 14, x + 38, y + 22], fill=CLASSES[name])
        pen.rectangle([x + 14, y, x + 22, y + 38], fill=CLASSES[name])
    return image


def draw_rows(folder, n=5, seed=0):
    """n rows of each class, and their pictures as JPEG files in a folder."""
    rng, rows = random.Random(seed), []
    folder.mkdir(exist_ok=True)
    for i in range(n):
        for name in CLASSES:
            file = f"{name}-{seed}-{i}.jpg"
            picture(name, rng).save(folder / file, quality=87)
            rows.append({"problem": "<image>Which?", "answer": name, "images": [file], "n": i})
    return rows


def save(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def bytes_of(folder, row):
    return (folder / row["images"][0]).read_bytes()


def tiny_dino(kind, folder):
    """A real DINOv2, very small, with random weights."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=56,
        patch_size=14,
        mlp_ratio=1,
    )
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    return tiny_dino("Dinov2", tmp_path_factory.mktemp("dino"))


@pytest.fixture(params=TOYS)
def vlm(request, tmp_path):
    """A tiny model of each family, with random weights."""
    tok = tokenizer()
    parts = new_policy(tok, request.param), tok, processor(request.param)
    return keep(parts, tmp_path / request.param)


@pytest.fixture
def run(monkeypatch, dino):
    """The command line, in this process -> the rows of the file that it writes."""

    def run(data, out, *flags, encoder=dino):
        argv = ["triplets", data, "--out", out, "--encoder", encoder, *flags]
        monkeypatch.setattr("sys.argv", [str(x) for x in argv])
        main()
        return pq.read_table(out).to_pylist()

    return run


def test_positives_and_negatives_are_of_the_right_classes(tmp_path, run, capsys):
    rows = draw_rows(tmp_path)
    out = tmp_path / "new" / "triplets.parquet"
    new = run(save(tmp_path / "rows.jsonl", rows), out)
    known = {bytes_of(tmp_path, row): row["answer"] for row in rows}
    assert len(new) == len(rows) == len(known) == 20
    for before, row in zip(rows, new):
        assert all(row[k] == before[k] for k in ("problem", "answer", "n"))
        own = bytes_of(tmp_path, before)
        assert [p["bytes"] for p in row["images"]] == [own]  # the file lies in another folder
        positive, negative = row["positive"]["bytes"], row["negative"]["bytes"]
        assert positive != own and known[positive] == before["answer"]
        assert known[negative] == TWIN[before["answer"]]
    told = json.loads(out.with_suffix(".json").read_text())["classes"]
    assert {c["class"]: c["look_alike"] for c in told} == TWIN
    assert all(c["rows"] == 5 and 0 < c["cosine"] <= 1 for c in told)
    assert [c["cosine"] for c in told] == sorted((c["cosine"] for c in told), reverse=True)
    shown = capsys.readouterr().out
    assert all(f"\n{name:<30}     5  {TWIN[name]:<30}" in shown for name in CLASSES)
    assert "without a positive" not in shown


def test_the_file_is_read_as_any_other(tmp_path, run):
    rows = draw_rows(tmp_path, 2)
    run(save(tmp_path / "rows.jsonl", rows), tmp_path / "triplets.parquet")
    data = Rows(tmp_path / "triplets.parquet", "train")
    for before, example in zip(rows, data):
        assert example.answer == before["answer"] and example.problem.startswith("<image>Which?")
        assert rgb(example.images[0]).size == Image.open(tmp_path / before["images"][0]).size
    # And `datasets` takes the new columns for pictures.
    path = str(tmp_path / "triplets.parquet")
    found = load_dataset("parquet", data_files=path, split="train")
    assert found.features["positive"] == found.features["negative"] == Picture()
    assert isinstance(found[0]["negative"], Image.Image)
    # Mined again, the columns are replaced.
    again = run(tmp_path / "triplets.parquet", tmp_path / "again.parquet", "--seed", 5)
    assert list(again[0]) == ["problem", "answer", "images", "n", "positive", "negative"]


def test_a_seed_says_it_all(tmp_path, run):
    data = save(tmp_path / "rows.jsonl", draw_rows(tmp_path))
    first = run(data, tmp_path / "a.parquet", "--options", 3)
    assert run(data, tmp_path / "b.parquet", "--options", 3) == first
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    other = run(data, tmp_path / "c.parquet", "--options", 3, "--seed", 2)
    for column in ("problem", "positive", "negative"):
        assert [row[column] for row in other] != [row[column] for row in first]


def test_options_are_the_look_alikes_and_the_answer_stays_a_name(tmp_path, run):
    rows = draw_rows(tmp_path, 3)
    new = run(save(tmp_path / "rows.jsonl", rows), tmp_path / "t.parquet", "--options", 2)
    for before, row in zip(rows, new):
        problem, _, listed = row["problem"].partition(ASK + "\n")
        assert problem == before["problem"] and row["answer"] == before["answer"]
        letters, names = zip(*(line.split(". ") for line in listed.split("\n")))
        assert letters == ("A", "B") and set(names) == {row["answer"], TWIN[row["answer"]]}


def test_the_truth_stands_at_each_place_equally_often():
    classes, places = ["truth", "x", "y", "z"], collections.Counter()
    for row in range(4000):
        lines = with_options("?", classes, 1, "options", row).split("\n")[-4:]
        assert sorted(line[3:] for line in lines) == sorted(classes)
        places[[line[3:] for line in lines].index("truth")] += 1
    # A share of 1 / 4 of 4000: mean 1000, standard deviation 27.
    assert all(abs(places[k] - 1000) < 110 for k in range(4))


def test_unseen_classes_have_a_file_of_their_own(tmp_path, run):
    """Neither file shows a picture, or names a class, of the other; and another split of the same
    classes, in another order, has the same unseen ones."""
    rows = draw_rows(tmp_path, 3)
    run(save(tmp_path / "rows.jsonl", rows), tmp_path / "t.parquet", "--unseen", 2, "--options", 2)
    known = {bytes_of(tmp_path, row): row["answer"] for row in rows}
    files = [pq.read_table(tmp_path / f"{name}.parquet").to_pylist() for name in ("t", "t_unseen")]
    seen, unseen = ({row["answer"] for row in file} for file in files)
    assert len(seen) == len(unseen) == 2 and seen | unseen == set(CLASSES)
    for file, own in zip(files, (seen, unseen)):
        assert len(file) == 6
        for row in file:
            assert {known[row[c]["bytes"]] for c in ("positive", "negative")} == own
            assert known[row["positive"]["bytes"]] == row["answer"]
            listed = row["problem"].partition(ASK + "\n")[2].split("\n")
            assert {line.partition(". ")[2] for line in listed} == own
    told = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("t", "t_unseen")]
    assert [{c["class"] for c in x["classes"]} for x in told] == [seen, unseen]
    other = save(tmp_path / "other.jsonl", draw_rows(tmp_path, 2, 1)[::-1])
    test = run(other, tmp_path / "test.parquet", "--unseen", 2)
    assert {row["answer"] for row in test} == seen


def test_every_class_is_unseen_equally_often():
    counts = collections.Counter()
    for seed in range(2000):
        counts.update(unseen_of(CLASSES, SimpleNamespace(seed=seed, unseen=2)))
    # A share of 1 / 2 of 2000: mean 1000, standard deviation 22.
    assert all(abs(counts[name] - 1000) < 90 for name in CLASSES)


def test_look_alikes_are_ranked_by_the_cosine():
    means = {"a": [1.0, 0.0], "b": [3.0, 3.0], "c": [0.0, 5.0], "d": [-1.0, 0.1]}
    found = look_alikes({name: torch.tensor(m) for name, m in means.items()}, 3)
    assert [name for name, _ in found["a"]] == ["b", "c", "d"]
    assert [c for _, c in found["a"]] == pytest.approx([0.7071, 0, -0.9950], abs=1e-4)
    assert [name for name, _ in found["d"]] == ["c", "b", "a"]


def test_several_questions_about_a_picture(tmp_path, run):
    """A positive is another picture, not the same one of another row; nor is a picture counted
    twice in the mean of a class."""
    rows = draw_rows(tmp_path, 2)
    twice = [row | {"problem": f"<image>{q}?"} for row in rows for q in ("What", "Which")]
    new = run(save(tmp_path / "rows.jsonl", twice), tmp_path / "t.parquet")
    assert len(new) == 16
    assert all(row["positive"]["bytes"] != row["images"][0]["bytes"] for row in new)
    run(save(tmp_path / "once.jsonl", rows), tmp_path / "once.parquet")
    both = [json.loads((tmp_path / f).read_text())["classes"] for f in ("t.json", "once.json")]
    assert [[c | {"rows": 0} for c in told] for told in both][0] == [
        c | {"rows": 0} for c in both[1]
    ]


def test_a_class_of_one_picture_and_a_broken_one(tmp_path, run, capsys):
    rows = draw_rows(tmp_path, 3)
    rows = [r for r in rows if r["answer"] != "navy cross" or r["n"] == 0]
    (tmp_path / rows[0]["images"][0]).write_bytes(b"\xff\xd8 no picture")
    rows.append({**rows[1], "images": rows[1]["images"] * 2})
    rows.append({**rows[1], "answer": " "})
    rows.append({**rows[1], "images": ["nowhere.jpg"]})
    new = run(save(tmp_path / "rows.jsonl", rows), tmp_path / "t.parquet")
    shown = capsys.readouterr().out
    assert "4 of 13 rows of rows are left out" in shown
    left = [
        json.loads(x) for x in (tmp_path / "left_out-rows-train.jsonl").read_text().split("\n") if x
    ]
    assert [x["row"] for x in left] == [0, 10, 11, 12]
    reasons = ["a picture cannot be read", "2 pictures", "the answer is empty", "cannot be read"]
    assert all(reason in x["why"] for reason, x in zip(reasons, left))
    assert len(new) == 9
    alone = [row for row in new if row["positive"] is None]
    assert [row["answer"] for row in alone] == ["navy cross"] and alone[0]["negative"]
    assert "rows without a positive, their class having one picture: 1 (navy cross)" in shown


def test_only_pictures_of_the_split_are_used(tmp_path, run):
    for split, seed in (("train", 0), ("test", 1)):
        save(tmp_path / f"{split}.jsonl", draw_rows(tmp_path, 3, seed))
    for split, seed in (("train", 0), ("test", 1)):
        own = {path.read_bytes() for path in tmp_path.glob(f"*-{seed}-*.jpg")}
        new = run(f"{tmp_path}@{split}", tmp_path / "out" / f"{split}.parquet")
        used = {row[c]["bytes"] for row in new for c in ("positive", "negative")}
        assert len(new) == 12 and len(used) > 6 and used <= own


def test_pictures_in_other_forms_keep_their_bytes(tmp_path, run):
    rows = draw_rows(tmp_path, 2)
    original = [bytes_of(tmp_path, row) for row in rows]
    rows = [
        {"question": r["problem"], "class": r["answer"], "photo": base64.b64encode(b).decode()}
        for r, b in zip(rows, original)
    ]
    flags = "--problem_column question --answer_column class --images_column photo".split()
    new = run(save(tmp_path / "rows.jsonl", rows), tmp_path / "t.parquet", *flags)
    assert [row["photo"][0]["bytes"] for row in new] == original
    assert {row["positive"]["bytes"] for row in new} <= set(original)


def test_the_policys_own_tower_is_an_encoder_too(tmp_path, run, vlm):
    rows = draw_rows(tmp_path, 2)
    new = run(save(tmp_path / "rows.jsonl", rows), tmp_path / "t.parquet", encoder=vlm)
    known = {bytes_of(tmp_path, row): row["answer"] for row in rows}
    assert all(known[row["negative"]["bytes"]] == TWIN[row["answer"]] for row in new)


def test_a_batch_is_its_pictures_one_by_one(tmp_path, vlm):
    rng = random.Random(0)
    pictures = [picture(name, rng) for name in CLASSES]
    for name in (vlm, tiny_dino("Dinov2WithRegisters", tmp_path)):
        encoder = encoder_of(str(name), "cpu")
        with torch.no_grad():
            read = [encoder.read(p) for p in pictures]
            together, alone = encoder(read), torch.cat([encoder([x]) for x in read])
        assert together.shape[0] == 4 and torch.allclose(together, alone, atol=1e-5)
        assert (together[0] - together[2]).abs().max() > 1e-3


def test_what_cannot_be_done_gets_one_sentence(tmp_path, run, dino):
    rows = draw_rows(tmp_path, 1)
    data, out = save(tmp_path / "rows.jsonl", rows), tmp_path / "t.parquet"
    one = save(tmp_path / "one.jsonl", [r for r in rows if r["answer"] == "navy cross"])
    chat = save(
        tmp_path / "chat.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": r["problem"]},
                    {"role": "assistant", "content": r["answer"]},
                ],
                "images": r["images"],
            }
            for r in rows
        ],
    )
    for message, flags in {
        "one.jsonl has one class only, navy cross: it has no negatives": (one, out),
        "--options 5: from 2 to 4, for 4 classes and 26 letters": (data, out, "--options", 5),
        "--options 1: from 2 to 4": (data, out, "--options", 1),
        "--unseen 3 of 4 classes: 2 or more have to be": (data, out, "--unseen", 3),
        "--unseen -1 of 4 classes": (data, out, "--unseen", -1),
        "--options 3: from 2 to 2, for 2 classes": (data, out, "--options", 3, "--unseen", 2),
        "--out .*t.csv: give a name that ends in .parquet": (data, tmp_path / "t.csv"),
        "--options adds to a column of problems; .* has messages": (chat, out, "--options", 2),
        "no column label": (data, out, "--answer_column", "label"),
    }.items():
        with pytest.raises(SystemExit, match=message):
            run(*flags, encoder="/nowhere")  # none is loaded before this is known
    with pytest.raises(SystemExit, match="--encoder /nowhere cannot be loaded"):
        run(data, out, encoder="/nowhere")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SystemExit, match="bert is a bert; give one of dinov2, .*qwen3_vl"):
        run(data, out, encoder=tmp_path / "bert")
    assert not out.exists()
    assert len(run(chat, out)) == 4  # a chat's answer is a class too


def test_an_encoder_that_lacks_weights_is_refused(tmp_path, run, dino):
    from safetensors.torch import load_file, save_file

    weights = load_file(dino / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((dino / "config.json").read_text())
    data = save(tmp_path / "rows.jsonl", draw_rows(tmp_path, 1))
    with pytest.raises(SystemExit, match="cannot be loaded .it lacks 1 weights"):
        run(data, tmp_path / "t.parquet", encoder=tmp_path)
