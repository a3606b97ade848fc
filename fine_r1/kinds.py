"""Fine-R1's two stages in minutes: a base model that names birds in haste, and files to mend it.

    python -m fine_r1.kinds out/kinds      # README.md beside this file goes on from here
    python -m fine_r1.kinds out/harder --harder    # smaller crests; files with a shortcut

The base was taught in haste. At times it looks for the crest that tells a bird from those like it
(fine_r1/birds.py); at times it sees the family and names one of its birds. It knows better than it
does, and that is what Fine-R1 (arXiv 2602.07605) treats: a few chains of thought show how to go
about it, then TAPO asks for it on another picture of the kind, and on one of a kind taken for it.

One kind of each family is in the `unseen` files only. The base has met it, as a large model has met
most birds before it is fine-tuned.
"""

import random
from pathlib import Path

import torch

from fine_r1 import birds, concepts, cot, sft
from fine_r1.conversations import encode_conversation
from plumbing.base.common import Parser, fail, may_write
from plumbing.base.console import Bar
from plumbing.base.optimizer import Optimizer
from plumbing.base.processes import Processes
from plumbing.data.pictures import original_bytes
from plumbing.data.prompts import IMAGE, Example
from plumbing.models.weights import load_vlm
from policy import Policy
from reward import TAGGED
from toy.lessons import schedule
from toy.model import new_policy, processor, save_once, tokenizer

TURNS = ("user", "assistant")
WORDS = [*TURNS, "system", *birds.vocabulary()]  # that the base knows
KINDS = list(birds.BIRDS.values())

# How often a teacher names a kind of the family at random, without the crest; and how often it
# writes another crest otherwise. What the hasty one does wrong is there to be mended.
WITH_CARE, IN_HASTE = (0.0, 0.0), (0.4, 0.3)
UPDATES, A_TIME = 320, 16  # of supervised learning; pictures in each
CHAINS = 70  # updates in which the base becomes a teacher


def taught_answer(bird, rng, teacher, instruction):
    """How a teacher answers what bird this is."""
    skips, misreads = teacher
    looks = rng.random() >= skips
    if not looks:
        bird = rng.choice([bird, *birds.alike(bird)])
    elif rng.random() < misreads:
        bird = rng.choice(birds.alike(bird))
    return birds.response_of(birds.think(bird, looks), bird.name, instruction)


def bird_lessons(index, teacher, crest=birds.PLAIN.crest):
    """Lessons on one picture -> [Example with turns]. A teacher of None only describes it, which is
    how a small tower learns to see, and says in words which bird looks how."""
    rng = random.Random(f"lesson/{index}")
    bird = rng.choice(KINDS)
    shown, ground = birds.draw_bird(bird, rng, crest)
    looks = birds.in_words(bird)
    taught = [
        (f"{IMAGE} {birds.DESCRIBE}", f"{ground} ; {looks}"),
        (f"what bird is {looks} ?", bird.name),
        (f"how does a {bird.name} look ?", looks),
    ]
    del taught[1 + index % 2]
    if teacher:
        question = rng.choice([birds.OPEN, birds.closed(bird, rng)])
        instruction = rng.choice(list(birds.ANSWERS))
        asked = f"{IMAGE} {question}{instruction}"
        taught = [rng.choice(taught), (asked, taught_answer(bird, rng, teacher, instruction))]
    return [
        Example(f"lesson-{index}", q, a, [shown] * (IMAGE in q), turns=list(zip(TURNS, (q, a))))
        for q, a in taught
    ]


def chain_lessons(index, kinds=KINDS):
    """Lessons on one picture in what fine_r1/cot.py asks a teacher -> [Example with turns]"""
    rng = random.Random(f"chain/{index}")
    bird = rng.choice(kinds)
    shown, looks = birds.draw_bird(bird, rng)[0], birds.in_words(bird)
    features = " ; ".join(rng.sample(looks.split(" ; "), 2))
    hint = cot.CHAIN.format(label=bird.name, concepts=features)
    chain = zip(cot.PARTS, [*birds.steps(bird), bird.name])
    taught = [
        (concepts.FEATURES.format(label=bird.name), looks),
        (IMAGE + concepts.DESCRIBE.format(view=rng.choice(concepts.VIEWS)), looks),
        (f"{IMAGE} {birds.OPEN}{hint}", " ".join(f"<{p}> {text} </{p}>" for p, text in chain)),
    ]
    del taught[index % 2]
    return [
        Example(f"chain-{index}", q, a, [shown] * (IMAGE in q), turns=list(zip(TURNS, (q, a))))
        for q, a in taught
    ]


def words_of_chains():
    """The words of these lessons that the base does not know."""
    texts = [text for i in range(40) for e in chain_lessons(i) for _, text in e.turns]
    texts += concepts.VIEWS
    said = {word for text in texts for word in text.replace(IMAGE, "").split()}
    return sorted(said - {*WORDS})


def learn(policy, processors, lessons, updates, fall):
    """Supervised updates of fine_r1/sft.py; from update `fall` on the rate falls. lessons(update)
    -> [Example with turns]"""
    cfg, alone = sft.SftConfig(lr=2e-3, weight_decay=0.01), Processes(alone=True)
    optimizer = Optimizer(policy, cfg, schedule(updates, fall), betas=(0.9, 0.98))
    with Bar("teaching", updates, "updates") as bar:
        for k in range(updates):
            read = [encode_conversation(example, *processors) for example in lessons(k)]
            N = sum(c.scored.sum().item() for c in read)
            batches = [sft.pack_conversations(read, policy)]
            loss, _, _ = sft.supervised_update(batches, N, policy, optimizer, alone)
            bar.update(note=f"loss {loss:.3f}")


def policy_of(tok):
    """A policy with random weights that may say every word of a tokenizer."""
    return Policy(new_policy(tok), torch.zeros(len(tok), dtype=torch.bool))


def learn_base(folder, updates=UPDATES, crest=birds.PLAIN.crest):
    """The base model as a Hugging Face folder -> folder. Half of the updates describe pictures,
    then all questions are answered with care, and in the last 3/10 in haste."""
    careful, hasty = updates // 2, updates * 7 // 10

    def lessons(k):
        teacher = None if k < careful else WITH_CARE if k < hasty else IN_HASTE
        indices = range(k * A_TIME, (k + 1) * A_TIME)
        return [example for i in indices for example in bird_lessons(i, teacher, crest)]

    processors = tokenizer(WORDS), processor()
    policy = policy_of(processors[0])
    learn(policy, processors, lessons, updates, hasty)
    return save_once((policy.vlm, *processors), folder)


def answer_at_once(base, folder):
    """The base with a chat template that ends in an empty thought, as those of models have whose
    thinking can be switched off -> folder"""
    tok, thought = tokenizer(WORDS), birds.response_of("", "").partition("<answer>")[0]
    before, end, _ = tok.chat_template.rpartition("{% endif %}")  # of what asks for an answer
    tok.chat_template = before + thought + end
    return save_once((load_vlm(base), tok, processor()), folder)


def lessons_in_chains(k):
    """What the teacher is taught in update k."""
    return [lesson for i in range(8 * k, 8 * k + 8) for lesson in chain_lessons(i)]


def learn_teacher(base, folder, updates=CHAINS, lessons=lessons_in_chains):
    """A teacher for fine_r1/cot.py -> folder: the base, which sees and knows all kinds, taught with
    care to answer what is asked there."""
    processors = tokenizer([*WORDS, *words_of_chains()]), processor()
    policy = policy_of(processors[0])
    for name, p in load_vlm(base).named_parameters():  # words that are new have rows of their own
        policy.vlm.get_parameter(name).data[: len(p)] = p.data
    learn(policy, processors, lessons, updates, updates // 2)
    return save_once((policy.vlm, *processors), folder)


TESTED = 240  # questions in a file to test on


def question_row(level, split, bird, index, question=birds.OPEN):
    """One picture and what is asked about it, as a row of a file."""
    images = [original_bytes(birds.picture_of(level, split, bird, index))]
    return {"problem": f"{IMAGE} {question}", "answer": bird.name, "images": images}


def sft_row(level, bird, index=0, thinks=True):
    """A conversation to learn from: the right chain of thought for one picture, or an empty one."""
    asked = question_row(level, "sft", bird, index)
    answered = birds.response_of(birds.think(bird) if thinks else "", bird.name)
    turns = zip(TURNS, [asked["problem"] + TAGGED.instruction, answered])
    return {"messages": [{"role": r, "content": t} for r, t in turns], "images": asked["images"]}


def triplet_row(level, bird, index):
    """A picture to train on with its two companions, of the pictures to train on: `positive`,
    another one of its kind, and `negative`, one of a kind that it is taken for."""
    rng, second = random.Random(f"0/negative/{bird.name}/{index}"), (index + 1) % level.shots
    other = rng.choice([b for b in birds.alike(bird) if b.seen])
    return question_row(level, "train", bird, index) | {
        "positive": original_bytes(birds.picture_of(level, "train", bird, second)),
        "negative": original_bytes(birds.picture_of(level, "train", other, index)),
    }


def question_rows(level, split, kinds, options):
    """TESTED questions about these kinds in turn, with four options or none."""
    asked = [(i, kinds[i % len(kinds)]) for i in range(TESTED)]
    rng = random.Random(f"0/options/{split}")
    how = [birds.closed(bird, rng) if options else birds.OPEN for _, bird in asked]
    return [question_row(level, split, b, i, question) for (i, b), question in zip(asked, how)]


def in_context(row, level):
    """The question behind solved ones, one of each kind of its family that is learned from."""
    family = [birds.BIRDS[name] for name in birds.BIRDS[row["answer"]].family]
    solved = [question_row(level, "sft", bird, 0) for bird in family if bird.seen]
    texts = [f"{r['problem']} {r['answer']}" for r in solved] + [row["problem"]]
    images = [image for r in [*solved, row] for image in r["images"]]
    return {"problem": " ".join(texts), "answer": row["answer"], "images": images}


def files_of_birds(level=birds.PLAIN):
    """{name of a file: its rows}; settings are to be chosen on `val`."""
    seen, unseen = ([bird for bird in KINDS if bird.seen == wanted] for wanted in (True, False))
    tests = {
        f"test_{name}_{'closed' if options else 'open'}": question_rows(level, name, kinds, options)
        for name, kinds in (("seen", seen), ("unseen", unseen))
        for options in (False, True)
    }
    return {
        "sft": [sft_row(level, bird) for bird in seen],
        "sft_2": [sft_row(level, bird, i) for i in range(2) for bird in seen],
        "sft_4": [sft_row(level, bird, i) for i in range(4) for bird in seen],
        "labels": [sft_row(level, bird, thinks=False) for bird in seen],
        "train": [triplet_row(level, bird, i) for i in range(level.shots) for bird in seen],
        "val": question_rows(level, "val", seen, options=False),
        **tests,
        **{f"in_context_{k}": [in_context(row, level) for row in v] for k, v in tests.items()},
    }


def write_kinds(out, updates=UPDATES, level=birds.PLAIN):
    """Write the files and the base model to a folder, and that model as one that does not think."""
    import pyarrow
    from pyarrow import parquet

    may_write(out)
    if (out / "base").exists():
        fail(f"{out / 'base'} is there already; remove it, or give another folder")
    for name, rows in files_of_birds(level).items():
        parquet.write_table(pyarrow.Table.from_pylist(rows), out / f"{name}.parquet")
        print(f"{out / name}.parquet: {len(rows)} rows")
    print(f"{learn_base(out / 'base', updates, level.crest)}: the model to start from")
    print(f"{answer_at_once(out / 'base', out / 'at_once')}: the same, its thoughts left empty")


if __name__ == "__main__":
    p = Parser(__doc__)
    p.add_argument("out", nargs="?", default="out/kinds", type=Path, help="the folder to write to")
    one = p.add_mutually_exclusive_group()
    one.add_argument("--teacher", action="store_true", help="make the base a teacher of chains")
    one.add_argument("--harder", action="store_true", help="smaller crests; the ground tells kinds")
    args = p.parse_args()
    if not args.teacher:
        write_kinds(args.out, level=birds.HARDER if args.harder else birds.PLAIN)
    elif not (args.out / "base").exists() or (args.out / "teacher").exists():
        fail(
            f"--teacher needs {args.out / 'base'}, and that there is no {args.out / 'teacher'} yet"
        )
    else:
        print(f"{learn_teacher(args.out / 'base', args.out / 'teacher')}: for fine_r1/cot.py")
