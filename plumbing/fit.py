"""Does a run fit? What each GPU holds in each phase of it, before anything is loaded.

    python -m plumbing.fit --model qwen2.5-vl-7b --gpus 4 --memory 80     (and any flag of train.py)

What a run keeps are sums (plumbing/memory.py); what comes and goes during an update is simulated
(plumbing/simulation.py). GB are 10^9 bytes. docs/gpus.md has a table of machines and models, and
says what this does not know.
"""

import json
import sys
from pathlib import Path

from plumbing.common import fail
from plumbing.config import Config, check, parser, resolve
from plumbing.console import doing, say, track
from plumbing.memory import Model, nearest, pass_tokens, plan
from plumbing.shapes import SHAPES
from plumbing.simulation import count_parameters, settings_of, simulate


def measuring(settings, world):
    """A measure for plan that simulates each kind of pass once."""
    measured = {}

    def measure(cfg, exchange):
        kind = cfg.activation_checkpointing, pass_tokens(cfg), exchange, cfg.lora_rank
        if kind not in measured:
            measured[kind] = simulate(settings, cfg, world, kind[1], exchange)
        return measured[kind]

    return measure


def settings_named(name):
    """The config.json of a folder, or of a published name, as a dict."""
    known = next((key for key in SHAPES if key in name.lower()), None)
    if (Path(name) / "config.json").is_file():
        return settings_of(name)
    if not known:
        fail(f"--model {name}: no folder with a config.json, and none of {', '.join(SHAPES)}")
    return SHAPES[known]


def models(settings):
    """-> a function of cfg that counts the parameters of each --lora_rank once -> Model"""
    counted = {}

    def model_of(cfg):
        if cfg.lora_rank not in counted:
            counted[cfg.lora_rank] = count_parameters(settings, cfg)
        trained, frozen = counted[cfg.lora_rank]
        return Model(settings, trained + frozen, frozen)

    return model_of


def gb(n):
    return f"{n / 1e9:.1f}"


def table(made):
    """A Plan as a Markdown table, a line a phase, GB on each GPU."""
    parts = "weights moments gradients reference activations engine outside".split()
    lines = ["| phase | " + " | ".join(parts) + " | all |", "|---" * (len(parts) + 2) + "|"]
    for phase, row in made.phases.items():
        cells = [gb(row.get(part, 0.0)) for part in parts] + [gb(sum(row.values()))]
        lines.append(f"| {phase} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict(model_of, cfg, world, memory, measure):
    """-> (Plan, "" if it fits, or one sentence with what is short and the nearest that fits)"""
    made = plan(model_of(cfg), cfg, world, memory, measure)
    if made.fits:
        return made, ""
    if made.missing > max(made.totals.values()) - memory:
        short = (
            f"the engine needs {gb(made.missing)} GB more than its --gpu_memory_utilization "
            f"{cfg.gpu_memory_utilization} of {gb(memory)} GB"
        )
    else:
        phase = max(made.totals, key=made.totals.get)
        needed = gb(made.totals[phase])
        short = f"{phase} needs {needed} GB on each of {world} GPUs that have {gb(memory)}"
    ways = [" with ".join(moves) for moves in nearest(model_of, cfg, world, memory, measure)]
    if world == 1 and memory < 32e9 and not cfg.card:
        ways.append("--card 24gb, settings for such a card")
    advice = f"these fit: {', or '.join(ways)}" if ways else "no change that is known here fits"
    return made, f"this does not fit: {short}; {advice} (docs/gpus.md)"


def row(name, world, gigabytes, flags=""):
    """A line of the table in docs/gpus.md: what the planner says of one machine and model."""
    given = vars(parser().parse_args(["--model", name, "--sampler", "vllm", *flags.split()]))
    cfg = resolve(given, cuda=True)[0]
    settings = settings_named(name)
    answered = models(settings), cfg, world, gigabytes * 1e9, measuring(settings, world)
    made, short = verdict(*answered)
    totals = " | ".join(gb(sum(parts.values())) for parts in made.phases.values())
    says = short.split("; ")[-1].removesuffix(" (docs/gpus.md)") if short else "fits"
    flags = f" `{flags}`" if flags else ""
    return f"| {world} x {gigabytes} GB | {name}{flags} | {totals} | {gb(made.disk)} | {says} |"


# The machines and models of docs/gpus.md.
ROWS = [
    ("qwen3-vl-2b", 1, 80),
    ("qwen3-vl-2b", 2, 80),
    ("qwen2.5-vl-3b", 1, 80),
    ("qwen2.5-vl-3b", 2, 80),
    ("qwen2.5-vl-3b", 4, 80),
    ("qwen2.5-vl-7b", 2, 80),
    ("qwen2.5-vl-7b", 4, 80),
    ("qwen2.5-vl-7b", 8, 80),
    ("qwen2.5-vl-3b", 1, 24, "--card 24gb"),
]


def answer(question):
    """What setup asks, {folder, cfg, world, memory} -> "" or the sentence to stop with"""
    cfg, world = Config(**question["cfg"]), question["world"]
    settings = settings_named(question["folder"])
    how = measuring(settings, world)
    return verdict(models(settings), cfg, world, question["memory"], how)[1]


def main():
    """Print what a run would take; exit with a sentence if it does not fit."""
    if sys.argv[1:] == ["--question"]:
        print(json.dumps(answer(json.load(sys.stdin))))
        return
    p = parser(Config, __doc__.split("\n")[0])
    p.add_argument("--gpus", type=int, default=1, help="processes, one on each GPU")
    p.add_argument("--memory", type=float, default=80, help="of one GPU, in GB of 10^9 bytes")
    p.add_argument("--rows", action="store_true", help="print the table of docs/gpus.md instead")
    flags = vars(p.parse_args())
    if flags.pop("rows", False):
        for line in track(ROWS, "planning", "rows"):
            say(row(*line))
        return
    world, memory = flags.pop("gpus"), 1e9 * flags.pop("memory")
    flags.setdefault("sampler", "vllm")
    cfg = resolve(flags, cuda=True)[0]
    check(cfg, world, cuda=True)
    settings = settings_named(cfg.model)
    model_of = models(settings)
    with doing("simulating what each GPU has to hold", aloud=True):
        made, short = verdict(model_of, cfg, world, memory, measuring(settings, world))
    print(
        f"{cfg.model}, {model_of(cfg).parameters / 1e9:.2f} billion parameters; {world} x "
        f"{gb(memory)} GB\n"
    )
    print(table(made))
    how = "at every pass" if made.exchange else "once an update"
    print(
        f"\ngradients are exchanged {how}; --sleep {made.level}; {gb(made.disk)} GB of checkpoints"
    )
    if made.host:
        print(f"in host memory: {gb(made.host)} GB for each process")
    print("it fits" if not short else f"error: {short}")
    sys.exit(1 if short else 0)


if __name__ == "__main__":
    main()
