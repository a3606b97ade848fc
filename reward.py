"""Rule reward: is the response well formed, and is its answer right?

    <think> red : 1 + 0 = 1 </think> \\boxed{ 1 }      truth 1: accuracy 1, format 1
    \\boxed{ 1 }                                       truth 1: accuracy 1, format 0
    <think> I see two. </think> \\boxed{ 2 }           truth 1: accuracy 0, format 1

plumbing/grading/ decides when two answers are equal, in processes that it can kill. A reward rule
is one function below under @rule("name"), and --reward offers every name. With it goes the form in
which an answer is asked for and looked for, BOXED or TAGGED.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from plumbing.base.common import register
from plumbing.grading.workers import Grader

REWARDS: dict[str, Callable] = {}  # what --reward can be


class Form(NamedTuple):
    """How an answer is given."""

    instruction: str  # stands behind every problem of a data set
    answer: Callable  # f(response) -> the answer as it stands there, or None
    well_formed: Callable  # f(response) -> bool
    named: bool = False  # has the answer to be the truth's own words, or only its value?


FORMS: dict[str, Form] = {}  # the form of each of REWARDS


class Graded(NamedTuple):
    """What a rule may look at: accuracy and format are 0.0 or 1.0."""

    response: str
    truth: str
    accuracy: float
    format: float


def score(
    responses: list[str], truths: list[str], grader: Grader, kind: str = "official"
) -> list[dict[str, float]]:
    """Grade responses, each once -> a list of {"overall", "format", "accuracy"}

    responses, truths: lists of equally many strings; kind: a name in REWARDS. Answers that have to
    be parsed are read in the grader's worker processes, all of them at once.
    """
    form = FORMS[kind]
    answers = [form.answer(response) for response in responses]
    pairs = list(zip(answers, truths))
    right = [same_name(*pair) for pair in pairs] if form.named else grader.grade_all(pairs)
    scores = []
    for response, truth, accurate in zip(responses, truths, right):
        graded = Graded(response, truth, float(accurate), float(form.well_formed(response)))
        overall = REWARDS[kind](graded)
        scores.append({"overall": overall, "format": graded.format, "accuracy": graded.accuracy})
    return scores


def compute_score(
    response: str, truth: str, grader: Grader | None = None, kind: str = "official"
) -> dict[str, float]:
    """`score` for one response. Without a grader it makes one for this call."""
    if grader is not None:
        return score([response], [truth], grader, kind)[0]
    grader = Grader(workers=1)
    try:
        return compute_score(response, truth, grader, kind)
    finally:
        grader.close()


def boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} with balanced braces, stripped; None without one. As in
    LaTeX, \\{ and \\} are signs, and do not count as braces."""
    start, depth = text.rfind("\\boxed{"), 0
    for brace in re.finditer(r"\\[{}\\]|[{}]", text[start:]) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return text[start + len("\\boxed{") : start + brace.start()].strip()
    return None


def well_formed(response: str) -> bool:
    """Does the response match <think>.*</think>.*\\boxed{.*}.* from its first character?

    This is what the released regular expression finds once the spaces around < > / are stripped. On
    a hostile response that expression takes cubic time, and this takes linear time.
    """
    text = "".join(part.strip() for part in re.split("([<>/])", response))
    at, whole = 0, text.startswith("<think>")
    for mark in ("<think>", "</think>", "\\boxed{", "}"):
        found = text.find(mark, at)
        whole, at = whole and found >= 0, found + len(mark)
    return whole


def tagged(text: str) -> str | None:
    """What stands in the last <answer>...</answer>, stripped; None without one."""
    found = re.findall(r"<answer>([^<]*)</answer>", text)
    return found[-1].strip() if found else None


def well_tagged(response: str) -> bool:
    """Is the response <think>...</think> and <answer>...</answer>, with nothing around them?"""
    thought, closed, said = response.strip().partition("</think>")
    return bool(
        closed
        and thought.startswith("<think>")
        and re.fullmatch(r"\s*<answer>[^<]*</answer>", said)
    )


def same_name(answer: str | None, truth: str) -> bool:
    """Are these the same words? Upper case, white space, _ for a space and a full stop at the end
    make no difference. A name is not calculated with: 747-100 is not 647. answer: a text or None"""
    said, name = (" ".join((x or "").replace("_", " ").split()).casefold() for x in (answer, truth))
    return answer is not None and said.rstrip(". ") == name.rstrip(". ")


# ---------------------------------------------------------------------------- forms and rules

# The released template (examples/format_prompt/math_perception.jinja), its meaning in our words.
BOXED = Form(
    "\n\nThink before you answer: write your reasoning as an inner monologue between <think> and "
    "</think>, then give the final answer inside \\boxed{}.",
    boxed,
    well_formed,
)
# The same with tags in the place of a box, for answers that are names.
TAGGED = Form(
    "\n\nThink before you answer: write your reasoning as an inner monologue between <think> and "
    "</think>, then give the final answer between <answer> and </answer>.",
    tagged,
    well_tagged,
    named=True,
)
# No word of it, for a model that answers in a box unasked: the toy knows none of BOXED's words.
BARE = BOXED._replace(instruction="")


def rule(name: str, form: Form = BOXED) -> Callable:
    """Register a reward rule: f(Graded) -> overall reward, a float"""

    def enter(function):
        FORMS[name] = form
        return register(REWARDS, name)(function)

    return enter


@rule("official")
def official(graded: Graded) -> float:
    """The released code's reward (examples/reward_function/math.py)."""
    return 0.9 * graded.accuracy + 0.1 * graded.format


@rule("paper")
def paper(graded: Graded) -> float:
    """The paper's reward: R in {0, 1} (section 2.1)."""
    return graded.accuracy


@rule("tagged", TAGGED)
def class_name(graded: Graded) -> float:
    """For the name of a class in tags; the whole answer has to be that name."""
    return official(graded)


@rule("bare", BARE)
def unasked(graded: Graded) -> float:
    """For a model that needs no instruction."""
    return official(graded)
