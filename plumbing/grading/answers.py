"""When are two answers the same?

docs/grader.md says it. An answer is flattened (latex.py) and taken apart, its units are read
(units.py) and its formulas compared by value (formulas.py). There is no time limit here: workers.py
runs `work` in processes that it can kill, so these files import nothing else of the project.
"""

import contextlib
import faulthandler
import json
import re
import signal
import sys
from itertools import accumulate

from plumbing.grading.formulas import GREEK, WORD, equal_values, formula
from plumbing.grading.latex import TURNED, flatten
from plumbing.grading.units import quantity

MEMORY = 4 << 30  # bytes that a worker may take
RELATIONS = "=<>≤≥≠∈∉:"
THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?!\d)")
DATE = re.compile(r"\d-\d\d?-\d")  # not a subtraction
# A choice and its text: (A) 5, A) 5, A. 5, A: 5, A - 5 or A alone; but (A)+1 is a sum, a:2 a ratio.
CHOICE = re.compile(
    r"(?i:\(([A-J])\)(| *[^-+*/^=<>!,;\s].*| +[-+=<>]\S.*)|([A-J])(?:[.)]|: |$)(.*))"
    r"|([A-J])(?::| - )(.*)"
)
# Another choice in that text; P(A) is none.
OTHER_CHOICE = re.compile(r"(?i)(?<![A-Z])\([A-J]\)|(?<![A-Z.(])[A-J](?:[.):]| - )|^ *[A-J]$")
# What may stand before an equals sign: x, x_1, f(x), AB, area of ABC; not ax, sqrt(x) or not x.
LEFT_SIDE = re.compile(
    r"(?!.*\b(?:not|never|no|sqrt|ln|log|lg|exp)\b)(?:[fghPEV]\([^()]*\)"
    rf"|(?:[A-Za-z]|[A-Z]+|(?i:{'|'.join(GREEK)})|(?=.*[A-Za-z]{{3}})[A-Za-z]+(?: [A-Za-z]+)*)"
    r"(?:_?\d|_\w|_\(\w+\))?'*(?: *\([A-Za-z, ]*\))?)"
)


def choice(text):
    """-> (letter, text) of one choice; None for other answers, also if they name two choices."""
    if not (found := CHOICE.fullmatch(text)):
        return None
    letter, content = (group for group in found.groups() if group is not None)
    return None if OTHER_CHOICE.search(content) else (letter.lower(), content.strip())


def depths(text):
    """How many brackets are open after each character; any kind closes any: [0, 1)."""
    return list(accumulate((c in "([«") - (c in ")]»") for c in text))


def split_outside(text, signs):
    """Split where no bracket is open: "(1,2), 3" at "," -> ["(1,2)", "3"], [","]"""
    parts = [("\0" if c in signs and not depth else "") + c for c, depth in zip(text, depths(text))]
    pieces = re.split("\0(.)", "".join(parts))
    return [piece.strip() for piece in pieces[::2]], pieces[1::2]


def taken_apart(text):
    """-> (name, kind, parts): ("x", "", ["3"]) of x = 3, ("", "", ["1", "2"]) of a set or list, in
    which order does not count; ("x", "()", ["-∞", "2"]) of x < 2, ("", "()", ["1", "2"]) of (1, 2),
    ("", "=", ["2x", "6"]) of 2x = 6. Raises ValueError if a side is missing."""
    parts = [part for part in split_outside(text, "∪,")[0] if part]
    sides, signs = split_outside(text, RELATIONS)
    if len(parts) > 1:
        return "", "", parts
    if not signs:
        if len(text) < 3 or text[0] not in "([«" or depths(text).index(0) < len(text) - 1:
            return "", "", [text]
        parts, _ = split_outside(text[1:-1], ",")
        kind = "" if text[0] == "«" else text[0] + text[-1]
        return ("", kind, parts) if len(parts) > 1 else taken_apart(parts[0])
    if not all(sides):
        raise ValueError("a side is missing")
    signs = "".join(signs)
    if {">", "≥"} & set(signs):
        sides, signs = sides[::-1], signs[::-1].translate(TURNED)
    if signs in ("=", "∈"):
        for name, values in (sides, sides[::-1]):
            if LEFT_SIDE.fullmatch(name):
                return name, *taken_apart(values)[1:]
    endless = [(["-∞", *sides], f"<{signs}"), ([*sides, "∞"], f"{signs}<")]
    for chain, marks in endless if len(sides) == 2 else [(sides, signs)]:
        if LEFT_SIDE.fullmatch(chain[1]) and len(chain) == 3 and set(marks) <= {"<", "≤"}:
            return chain[1], f"{'(['[marks[0] == '≤']}{')]'[marks[1] == '≤']}", chain[::2]
    return "", signs, sides


def same_answer(a, b):
    """Whether two flat answers mean the same. Raises if a part is neither words nor a formula."""
    if without_spaces(a) == without_spaces(b):
        return True
    if (x := choice(a)) and (y := choice(b)):  # a text may be missing
        return x[0] == y[0] and (not x[1] or not y[1] or same_answer(x[1], y[1]))
    (name, kind, ours), (called, other, theirs) = left, right = taken_apart(a), taken_apart(b)
    if "=" in (kind, other) or name and called and not same_answer(name, called):
        return same_curve(left, right)
    if kind != other or len(ours) != len(theirs):
        return False
    if kind:
        return all(map(same_answer, ours, theirs))
    if len(ours) == 1:
        return same_quantity(ours[0], theirs[0])
    for x in ours:  # in any order
        match = next((k for k, y in enumerate(theirs) if judged(x, y)), None)
        if match is None:
            return False
        del theirs[match]
    return True


def same_curve(left, right):
    """Whether two equations that are `taken_apart` describe the same line or curve: y = 2x + 1 and
    2x - y + 1 = 0 do. But x = 3 is an answer and 2x = 6 the question: they are not the same."""
    for _, kind, parts in (left, right):
        if not kind and not formula(quantity(parts[0])[0]).free_symbols:
            return False
    curves = [parts if kind == "=" else [name, *parts] for name, kind, parts in (left, right)]
    if any(len(sides) != 2 for sides in curves):
        return False
    return equal_values(*(formula(x) - formula(y) for x, y in curves), ratio=True)


def same_quantity(a, b):
    """Number, formula or words. A missing unit is forgiven, another is not; 50% is 50 and 0.5."""
    (a, unit), (b, other) = (quantity(x) for x in (a, b))
    if unit and other and unit != other:
        return False
    if any(WORD.search(x) or DATE.search(x) for x in (a, b)) or a.isalpha() and b.isalpha():
        return bare_words(a) == bare_words(b)
    a, b = formula(a), formula(b)
    percent = unit != other and "%^1" in (unit, other)
    return equal_values(a, b) or percent and equal_values(*((a, 100 * b) if unit else (100 * a, b)))


def bare_words(text):
    """What has to be the same in words. A sign or a bracket counts: -abc could be a product."""
    marks = r"['\"]|[,.](?!\d)|(?<=[a-z]{3})-(?=[a-z]{3})"
    return without_spaces(re.sub(marks, "", text.lower()))


def without_spaces(text):
    """Spaces between digits stay: 1 2 is not 12."""
    return re.sub(r"(?<!\d) +| +(?!\d)", "", text)


def judged(a, b):
    """`same_answer`; what cannot be read, for whatever reason, has to be written the same."""
    try:
        return same_answer(a, b)
    except MemoryError:  # ends the worker, so that it is counted
        raise
    except Exception:  # every kind of error, since the text may be anything
        return without_spaces(a).lower() == without_spaces(b).lower()


def equal_answers(given, truth):
    """Whether two answers are equal, however long it takes: what a worker says."""
    pair = [flatten(x) for x in (given, truth)]
    joined = [THOUSANDS.sub(lambda m: m[0].replace(",", ""), x) for x in pair]
    # 1,234 is one number or two, 1,000 is one.
    listed = not any(re.search(r"\d,0\d", x) for x in pair)
    return (listed or joined == pair) and judged(*pair) or joined != pair and judged(*joined)


def work():
    """The worker: one JSON pair a line in, one verdict a line out."""
    # These are for the run, which ends its workers itself: a scheduler sends them to every process.
    for asked in (signal.SIGINT, signal.SIGTERM):
        signal.signal(asked, signal.SIG_IGN)
    with contextlib.suppress(ImportError, ValueError):  # Windows and macOS have no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    equal_answers("a + \\frac{1}{2}", "b")  # sympy imports half of itself on first use
    print("ready", flush=True)
    for line in sys.stdin:
        # A clock that no computation can block ends a worker whose run was killed meanwhile.
        faulthandler.dump_traceback_later(60, exit=True)
        try:
            print(equal_answers(*json.loads(line)), flush=True)
        except MemoryError:
            print("too large", flush=True)
        faulthandler.cancel_dump_traceback_later()  # waiting is not on this clock
