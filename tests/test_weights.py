"""A model folder as people have it: whole, or one sentence says what is missing."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from plumbing.data.prompts import encode
from plumbing.models.weights import banned_tokens, load_processors, load_vlm, save_hf
from plumbing.run.setup import model_folder
from policy import Policy
from rollout import TransformersSampler
from toy.task import ToyData


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def rewrite(folder, rename):
    """The same folder with other names of its weights; None leaves one out."""
    file = folder / "model.safetensors"
    weights = {rename(name): w for name, w in load_file(file).items()}
    save_file({k: w for k, w in weights.items() if k}, file, metadata={"format": "pt"})
    return folder


def without(word):
    return lambda name: None if word in name else name


@pytest.mark.parametrize(
    "rename, words",
    [
        ("module.{}".format, r"lacks \d+ weights, the first is .*; it has module\."),
        (without("visual"), r"lacks \d+ weights, the first is model.visual"),
        (without("layers.1.mlp.down"), "lacks 1 weights, the first is .*mlp.down_proj.weight"),
        (without("embed_tokens"), r"lacks \d weights, the first is"),
        (lambda n: n.replace("gate_", "down_"), "cannot be loaded as a vision-language model"),
    ],
)
def test_weights_that_do_not_fill_the_model(rename, words, copy):
    with pytest.raises(SystemExit, match=words):
        load_vlm(rewrite(copy, rename))


def test_an_untied_head_that_is_absent(copy):
    config = json.loads((copy / "config.json").read_text())
    for part in (config, config["text_config"]):
        part["tie_word_embeddings"] = False
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="lacks 1 weights, the first is lm_head.weight"):
        load_vlm(rewrite(copy, without("lm_head")))


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"", None])
def test_a_file_of_weights_that_is_none(content, copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000] if content is None else content)
    with pytest.raises(SystemExit, match="cannot be loaded as a vision-language model"):
        load_vlm(copy)


@pytest.mark.parametrize("number", [math.nan, 4e37])
def test_weights_that_are_not_numbers(number, copy, cfg, processors):
    """Or are some, and make log-probs that are none; a tokenizer needs no token to fill up with."""
    file, tok = copy / "model.safetensors", load_processors(copy, cfg)[0]
    weights, tok.pad_token = load_file(file), None
    sample = lambda: TransformersSampler(
        load_vlm(copy), tok, banned_tokens(copy, tok), cfg
    ).generate([encode(ToyData("train", 1)[0], *processors)], 1, [(1,)])
    assert sample()[0].texts
    weights[next(name for name in weights if "mlp" in name)][0, 0] = number
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="finite"):
        sample()


def test_a_tokenizer_of_another_model_is_a_sentence(copy, cfg):
    tok = load_processors(copy, cfg)[0]
    tok.add_tokens([f"word{i}" for i in range(200)])
    with pytest.raises(SystemExit, match=r"has 69 tokens, and its tokenizer 269"):
        banned_tokens(copy, tok)


def test_a_folder_without_a_model(copy):
    assert next(load_vlm(copy).parameters()).dtype == torch.float32  # it is whole before
    (copy / "config.json").unlink()
    with pytest.raises(SystemExit, match="holds no model: there is no config.json"):
        model_folder(str(copy))
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds an adapter only; merge it"):
        model_folder(str(copy))


@pytest.mark.parametrize(
    "template, words",
    [
        (None, "chat_template is not set"),
        ("{{ messages[0]['content'][1]['text'] }}", "makes no <.image_pad.> of a picture"),
        ("{{ raise_exception('no pictures') }}", "no pictures"),
        ("{% for", "has no usable tokenizer"),
        ("{{ 'x' + messages[0]['content'] }}", "can only concatenate str"),  # of a text model
        ("{{ messages[0]['content'].strip() }}", "has no usable tokenizer"),
    ],
)
def test_a_chat_template_that_loses_the_picture(template, words, copy, cfg, processors):
    file = copy / "chat_template.jinja"
    older = json.dumps({"chat_template": file.read_text()})
    file.write_text(template) if template else file.unlink()
    with pytest.raises(SystemExit, match=words):
        load_processors(copy, cfg)
    file.unlink(missing_ok=True)  # and one in the older file is read
    (copy / "chat_template.json").write_text(older)
    assert load_processors(copy, cfg)[0].chat_template == processors[0].chat_template


def test_a_tokenizer_whose_end_is_not_the_templates_is_said(copy, cfg, capsys):
    load_processors(copy, cfg)
    assert "warning" not in capsys.readouterr().out
    file = copy / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<|endoftext|>"}))
    load_processors(copy, cfg)
    said = capsys.readouterr().out
    assert "ends a turn with '<|im_end|>'" in said and "'<|endoftext|>': responses may" in said


def test_a_generation_config_that_transformers_refuses_to_write_is_kept(copy, tmp_path):
    """A checkpoint is not lost to it, and holds the file as it was."""
    odd = {"do_sample": False, "temperature": 0.1, "eos_token_id": 2}
    (copy / "generation_config.json").write_text(json.dumps(odd))
    policy = Policy(load_vlm(copy), torch.zeros(1, dtype=torch.bool))
    own = policy.vlm.generation_config
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        policy.vlm.save_pretrained(tmp_path / "refused")
    save_hf(policy, tmp_path / "saved", copy, first=True)
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text()) == odd
    assert policy.vlm.generation_config is own and load_vlm(tmp_path / "saved")
