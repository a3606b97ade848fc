"""A model asked one question about one picture: a few responses, their words shaded by how much
they depend on the picture, in the terminal and as a page. eval.py --ask calls it."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from masking import Masker
from plumbing.base.common import fail, may_write
from plumbing.base.console import shown
from plumbing.base.processes import Processes
from plumbing.data.prompts import Example, encode
from plumbing.data.schemas import IMAGE
from plumbing.data.sources import DATA_SETS, warn_of_unknown_words
from plumbing.models.weights import load_processors
from plumbing.report import page
from plumbing.report.responses import as_trained
from plumbing.report.samples import look, told
from plumbing.run.config import resolve
from plumbing.run.setup import lone_sampler, model_folder, policy_maker
from reward import FORMS


def show(model, asked, n, out):
    """Print n responses and write the page. model: as eval.py's --model, asked as it was trained;
    asked: (picture, question); out: the page, None for ask.html beside the model. Ends with a
    sentence on what cannot be read."""
    (picture, question), cuda = asked, torch.cuda.is_available()
    trained = as_trained(model, "data mask mask_ratio mask_unit semantic_model")
    cfg, _ = resolve({"model": str(model), "sampler": "hf", **trained}, cuda)
    instruction = "" if cfg.data in DATA_SETS else FORMS[cfg.reward].instruction
    cfg = replace(cfg, data="", val_data="")  # they may be gone by now
    cfg.check(1, cuda)
    folder, processes = model_folder(model), Processes()
    out = Path(out or (folder if Path(model).is_dir() else Path("out")) / "ask.html")
    may_write(out.parent)
    processors = load_processors(folder, cfg)
    problem = (question if IMAGE in question else f"{IMAGE} {question}") + instruction
    try:
        prompt = encode(Example(Path(picture).name, problem, "", [picture]), *processors)
    except ValueError as error:
        fail(f"--ask: {error}")
    warn_of_unknown_words({"what is asked": problem}, processors[0])
    sampler = lone_sampler(cfg, folder, processors)
    (rollout,) = sampler.generate([prompt], n, [(cfg.seed, "ask", question)])
    if rollout is None:
        fail("--ask: the question is too long for this model; the warning above says by how much")
    policy = policy_maker(sampler.banned, cfg, processes)(sampler.vlm)
    masker = Masker(cfg, processors[1])
    parts = SimpleNamespace(policy=policy, masker=masker, cfg=cfg, processors=processors)
    parts.processes = processes
    unknown = lambda texts, _: [{"overall": None}] * len(texts)  # who asks need not know
    found = told(prompt, rollout, *look(parts, prompt, rollout), unknown, processors[0])
    for response in found["responses"]:
        print(painted(response["words"], sys.stdout.isatty()))
    run = dict(name=f"{model}, asked", about={"config": {}}, asked=[found], left={})
    page.write(out, [run | dict(evaluation={}, metrics=[], samples=[], meanings={})])
    print(f"written: {out}")


def painted(words, colours):
    """[(text, nats, shade)] as of samples.words -> a line for a terminal, from white at 0 nats to
    orange; without colours where it is none."""
    lines = []
    for text, _, shade in words:
        ground = f"255;{255 - round(115 * shade)};{255 - round(255 * shade)}"
        lines.append(f"\x1b[30;48;2;{ground}m{shown(text)}\x1b[0m" if colours else shown(text))
    return "".join(lines)
