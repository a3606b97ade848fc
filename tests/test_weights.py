"""A model folder as people have it: whole, or one sentence says what is missing. Never is a random
weight trained."""

import json
import shutil

import pytest
import torch
from conftest import SMALL, command
from safetensors.torch import load_file, save_file

from plumbing.policy import load_processors, load_vlm
from plumbing.setup import model_folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def rewrite(folder, change):
    """The same folder with other weights: change(weights) -> weights"""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def without(word):
    return lambda weights: {k: v for k, v in weights.items() if word not in k}


def prefixed(weights):
    return {f"module.{k}": v for k, v in weights.items()}


def other_shape(weights):
    return {k: torch.zeros(3, 3) if "layers.1.mlp.down" in k else v for k, v in weights.items()}


@pytest.mark.parametrize(
    "change, words",
    [
        (prefixed, r"lacks \d+ weights, the first is .*; it has module\."),
        (without("visual"), r"lacks \d+ weights, the first is model.visual"),
        (without("layers.1.mlp.down"), "lacks 1 weights, the first is .*mlp.down_proj.weight"),
        (without("embed_tokens"), r"lacks \d weights, the first is"),
        (other_shape, "cannot be loaded as a vision-language model"),
    ],
)
def test_weights_that_do_not_fill_the_model(change, words, copy):
    with pytest.raises(SystemExit, match=words):
        load_vlm(rewrite(copy, change))


def test_an_untied_head_that_is_absent(copy):
    """The folder says that the head is a matrix of its own, and has none."""
    config = json.loads((copy / "config.json").read_text())
    for part in (config, config["text_config"]):
        part["tie_word_embeddings"] = False
    (copy / "config.json").write_text(json.dumps(config))
    rewrite(copy, without("lm_head"))
    with pytest.raises(SystemExit, match="lacks 1 weights, the first is lm_head.weight"):
        load_vlm(copy)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"", None])
def test_a_file_of_weights_that_is_none(content, copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000] if content is None else content)
    with pytest.raises(SystemExit, match="cannot be loaded as a vision-language model"):
        load_vlm(copy)


def test_whole_folders_load(copy):
    assert next(load_vlm(copy).parameters()).dtype == torch.float32


def test_a_folder_without_a_model(copy, cfg):
    (copy / "config.json").unlink()
    with pytest.raises(SystemExit, match="holds no model: there is no config.json"):
        model_folder(str(copy), cfg)
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds an adapter only; merge it"):
        model_folder(str(copy), cfg)


def test_a_chat_template_in_the_older_file_is_read(copy, cfg, processors):
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(SystemExit, match="has no chat template"):
        load_processors(copy, cfg)
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_processors(copy, cfg)[0].chat_template == processors[0].chat_template


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ messages[0]['content'][1]['text'] }}", "makes no <|image_pad|> of a picture"),
        ("{{ raise_exception('no pictures') }}", "no pictures"),
        ("{% for", "has no usable tokenizer"),
    ],
)
def test_a_chat_template_that_loses_the_picture(template, words, copy, cfg):
    (copy / "chat_template.jinja").write_text(template)
    with pytest.raises(SystemExit, match=words.replace("|", r"\|")):
        load_processors(copy, cfg)


def test_a_run_ends_with_that_sentence_and_no_traceback(copy, tmp_path):
    rewrite(copy, without("visual"))
    flags = ["--model", copy, "--data", "toy", "--steps", 1, "--out", tmp_path / "run"]
    done = command("train.py", *flags, *SMALL)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: " in done.stderr and "the first is model.visual" in done.stderr
