r"""When are two answers the same?

\frac{1}{2} and 0.5 are, [0, 1] and (0, 1) are not: docs/grader.md says what is equal to what, and
tests/grading_table.py holds it. An answer is rewritten (plumbing/latex.py), taken apart by `same`,
its units read (plumbing/units.py) and its formulas compared by value. What cannot be read is equal
only to what is written the same.

Nothing here has a time limit: plumbing/grader.py runs `work` in processes that it can kill, so the
three files import nothing else of the project.
"""

import faulthandler
import json
import os
import random
import re
import signal
import sys
from functools import cache
from itertools import accumulate

from plumbing.latex import flatten
from plumbing.units import quantity

FUNCTION = "sqrt|root|arcsin|arccos|arctan|sin|cos|tan|sec|csc|cot|ln|log|lg|exp"
GREEK = "alpha|beta|gamma|delta|theta|lambda|mu|phi|omega"
# The last ++ means: no second try.
NUMBER = r"\d+\.?\d*(?:e[+-]?\d\d?(?!\d))?|\.\d+"
FORMULA = re.compile(
    rf"(?:{NUMBER}|(?:{FUNCTION}|pi|{GREEK}|[a-z])(?:_\w|_\(\w+\))?|[-+*/^()!|; ])++"
)
# A word, not a product of variables.
LETTERS = re.compile(rf"(?<![a-z])(?!(?:{FUNCTION}|pi|{GREEK})(?![a-z]))[a-z]{{3,}}")
ARGUMENT = rf"(?:[\d.]+ *)?(?:(?:pi|{GREEK}|[a-z])(?:_\w)?(?![a-z(])|[\d.]+(?![\d.]))"
# From a formula to what sympy's parser takes.
PYTHON = [
    (rf"({FUNCTION})((?:\^\(?\d\)?)?) *({ARGUMENT})", r"\1\2(\3)"),  # sin 2x
    (r"log_(?:\((\w+)\)|(\w)) *(?:\(([^()]*)\)|(\w+))", r"log(\3\4,\1\2)"),
    (r"lg\(([^()]*)\)", r"log(\1,10)"),
    (r"([a-z]+)\^\(?(\d)\)?(\([^()]*\))", r"(\1\3)^\2"),  # sin^2(x)
    (r"/ *([a-z]{2})(?![a-z_^!(])", r"/(\1)"),  # 1/ab is 1/(ab)
    (r"\|([^|]*)\|", r"(Abs(\1))"),
    (r"_\((\w+)\)", r"_\1"),
    (r"(?<![\d.])0+(?=\d)", ""),
    ("lambda", "lamda"),
    ("root", "real_root"),
    (r"\^", "**"),
    (";", ","),
    ("arc", "a"),
]
RELATIONS = "=<>≤≥≠∈∉:"
DATE = re.compile(r"\d-\d\d?-\d")  # not a subtraction
# A choice and its text: (A) 5, A) 5, A. 5, A: 5, A - 5 or A alone; but (A)+1 is a sum, a:2 a ratio.
CHOICES = [
    r"(?i)\((?P<letter>[A-J])\)(?P<text>| *[^-+*/^=<>!,;\s].*| +[-+=<>]\S.*)",
    r"(?i)(?P<letter>[A-J])(?:[.)]|: |$)(?P<text>.*)",
    r"(?P<letter>[A-J])(?::| - )(?P<text>.*)",
]
# Another choice in that text; P(A) is none.
OTHER = re.compile(r"(?<![A-Z])\([A-J]\)|(?<![A-Z.(])[A-J](?:[.):]| - )|^ *[A-J]$", re.I)
# What may stand before an equals sign: x, x_1, f(x), AB, area of ABC; not ax, sqrt(x) or not x.
VARIABLE = rf"(?:[A-Za-z]|[A-Z]+|(?i:{GREEK}))"
PHRASE = r"(?=.*[A-Za-z]{3})[A-Za-z]+(?: [A-Za-z]+)*"
NAME = re.compile(
    r"(?!.*\b(?:not|never|no|sqrt|root|ln|log|lg|exp)\b)(?:[fghPEV]\([^()]*\)"
    rf"|(?:{VARIABLE}|{PHRASE})(?:_?\d|_\w|_\(\w+\))?'*(?: *\([A-Za-z, ]*\))?)"
)


def choice(text):
    """-> (letter, text) of one choice; None for other answers, also if they name two choices."""
    found = next(filter(None, (re.fullmatch(pattern, text) for pattern in CHOICES)), None)
    if found and not OTHER.search(found["text"]):
        return found["letter"].lower(), found["text"].strip()
    return None


def depths(text):
    """How many brackets are open after each character; any kind closes any: [0, 1)."""
    return list(accumulate((c in "([«") - (c in ")]»") for c in text))


def split(text, signs):
    """Split where no bracket is open, signs kept: "(1,2), 3" at "," -> ["(1,2)", ",", "3"]"""
    marked = "".join(
        f"\0{c}\0" if c in signs and depth == 0 else c for c, depth in zip(text, depths(text))
    )
    return [part.strip() for part in marked.split("\0") if part.strip()]


def items(text):
    """-> (kind, parts): kind is the brackets of a tuple, an interval or a matrix, in which order
    counts; "" where it does not."""
    parts = [part for part in split(text, "∪,") if part not in "∪,"]
    if len(parts) > 1 or "±" in text:
        return "", [p.replace("±", sign) for p in parts for sign in ("+-" if "±" in p else "+")]
    if len(text) < 3 or text[0] not in "([«" or depths(text).index(0) < len(text) - 1:
        return "", [text]
    parts = split(text[1:-1], ",")[::2]
    if len(parts) == 1:  # brackets that only group
        return items(text[1:-1].strip())
    return "" if text[0] == "«" else text[0] + text[-1], parts


def relation(text):
    """ "x > 3" -> ["3", "<", "x"]: sides and signs, always pointing left; ["3"] without a sign.

    Raises ValueError if a side is missing.
    """
    sides = split(text, RELATIONS)
    if len(sides) % 2 == 0 or any((s in RELATIONS) != (k % 2) for k, s in enumerate(sides)):
        raise ValueError(f"a side is missing: {text}")
    if not {">", "≥"} & set(sides):
        return sides
    return [{">": "<", "≥": "≤"}.get(s, s) for s in reversed(sides)]


def bound(sides):
    """A solved relation -> (its variable, its values); None for another.

    ["x", "=", "3"] -> ("x", "3"),  ["0", "≤", "x", "<", "1"] -> ("x", "[0,1)"),
    ["x", "<", "1"] -> ("x", "(-∞,1)"),  ["x", "∈", "[0,1]"] -> ("x", "[0,1]")
    """
    if len(sides) == 3 and sides[1] in "=∈":
        name, values = (sides[0], sides[2]) if NAME.fullmatch(sides[0]) else (sides[2], sides[0])
        return (name, values) if NAME.fullmatch(name) else None
    if len(sides) == 3:
        sides = ["-∞", "<", *sides] if NAME.fullmatch(sides[0]) else [*sides, "<", "∞"]
    if len(sides) != 5 or not NAME.fullmatch(sides[2]) or not {sides[1], sides[3]} <= {"<", "≤"}:
        return None
    return sides[2], f"{'(['[sides[1] == '≤']}{sides[0]},{sides[4]}{')]'[sides[3] == '≤']}"


def solved(sides):
    """Whether an equation says what a variable is, as x = 3 does and y = 2x + 1 does not."""
    name, values = bound(sides) or ("", "")
    values = re.sub(rf"{FUNCTION}|pi", "", quantity(values)[0].lower())
    return bool(name) and not re.search(r"[a-dfghj-z]", values)


def same(a, b):
    """Whether two flat answers mean the same.

    Raises if a part is neither words nor a formula that can be read.
    """
    if without_spaces(a) == without_spaces(b):
        return True
    if (x := choice(a)) and (y := choice(b)):  # a text may be missing
        return x[0] == y[0] and (not x[1] or not y[1] or same(x[1], y[1]))
    (kind, ours), (other, theirs) = items(a), items(b)
    left, right = (relation(x[0]) if len(x) == 1 else [] for x in (ours, theirs))
    if len(left) > 1 and len(right) > 1:
        return same_relation(left, right)
    if len(left) > 1 or len(right) > 1:  # x = 3 for 3, x > 3 for (3, ∞)
        solution, answer = (bound(left), b) if len(left) > 1 else (bound(right), a)
        return bool(solution) and same(solution[1], answer)
    if kind != other or len(ours) != len(theirs):
        return False
    if len(ours) > 1 and kind:
        return all(map(same, ours, theirs))
    if len(ours) > 1:  # in any order
        for x in ours:
            match = next((y for y in theirs if same(x, y)), None)
            if match is None:
                return False
            theirs.remove(match)
        return True
    return same_quantity(ours[0], theirs[0])


def same_relation(left, right):
    """Two equations, inequalities or memberships.

    A line is the same in every form, y = 2x + 1 or 2x - y + 1 = 0: the sides differ by a constant
    factor. But x = 3 is an answer and 2x = 6 the question, so they are not the same.
    """
    ours, theirs = bound(left), bound(right)
    if ours and theirs and all(map(same, ours, theirs)):
        return True
    if left[1::2] == right[1::2] == ["="]:
        if solved(left) or solved(right):
            return False
        return equal_values(*(formula(x[0]) - formula(x[2]) for x in (left, right)), ratio=True)
    return left[1::2] == right[1::2] and all(map(same, left[::2], right[::2]))


def same_quantity(a, b):
    """Number, formula or words, perhaps with a unit.

    A missing unit is forgiven, a different one is not; 50% is 50 and 0.5.
    """
    (a, unit), (b, other) = (quantity(x) for x in (a, b))
    if unit and other and unit != other:
        return False
    a, b = cased(a), cased(b)
    if LETTERS.search(a) or LETTERS.search(b) or DATE.search(a) or a.isalpha() and b.isalpha():
        return words(a) == words(b)
    if "∞" in a + b:
        return False
    a, b = formula(a), formula(b)
    if "%^1" in (unit, other) and unit != other:
        return equal_values(a, b) or (
            equal_values(a, 100 * b) if unit else equal_values(100 * a, b)
        )
    return equal_values(a, b)


def words(text):
    """What has to be the same in words: not spaces, quotes, a comma, a full stop or a hyphen.

    A sign or a bracket counts: -abc and abc(d+e) could be products.
    """
    text = re.sub(r"['\"]|[,.](?!\d)|(?<=[a-z]{3})-(?=[a-z]{3})", "", text.lower())
    return without_spaces(text)


def without_spaces(text):
    """Spaces between digits stay: 1 2 is not 12."""
    return re.sub(r"(?<!\d) +| +(?!\d)", "", text)


def cased(text):
    r"""In lower case; but where a formula has a letter in both cases, the capital is another one.

    \pi(R^2-r^2) -> pi(r_(r)^2-r^2)
    """
    lower, variables = text.lower(), re.sub(f"{FUNCTION}|{GREEK}|pi", "", text)
    if not FORMULA.fullmatch(lower) or LETTERS.search(lower):
        return lower
    both = {c for c in variables if c.isupper() and c.lower() in variables}
    return "".join(f"{c}_({c})" if c in both else c for c in text).lower()


def equal_values(x, y, ratio=False):
    """Whether two formulas of sympy have the same value wherever both are real.

    ratio: or a constant ratio, as the two sides of equations do. They are compared at points of
    both signs, so |x| is not x. Where they are real at fewer than four, and where they have an i,
    their complex values have to be the same too. Raises ValueError if a value is infinite.
    """
    import sympy

    if x.is_Rational and y.is_Rational and not ratio:
        return x == y
    u, v, real, everywhere = 1, 1, 0, True
    for k, at in enumerate(points(x.free_symbols | y.free_symbols)):
        p, q = value(x.subs(at)), value(y.subs(at))
        if ratio and k == 0:
            u, v = p, q
        fits = u != 0 != v and close(p * v, q * u)
        if is_real(p) and is_real(q):
            if not fits:
                return False
            real += 1
        everywhere = everywhere and fits
    return everywhere or real >= 4 and not (x.has(sympy.I) or y.has(sympy.I))


def points(names):
    """12 points, always the same: 6 positive, 6 of any signs; one that is empty without names.

    Their coordinates are odd fractions, so two formulas that agree there agree everywhere.
    """
    import sympy

    chance = random.Random(0)
    for k in range(12 if names else 1):
        sizes = [sympy.Rational(chance.randrange(11, 97), (53, 53, 7)[k % 3]) for _ in names]
        signs = [1 if k < 6 else chance.choice((1, -1)) for _ in names]
        yield {v: size * sign for v, size, sign in zip(sorted(names, key=str), sizes, signs)}


def value(expression):
    """A formula without variables as a number of 20 digits. Raises ValueError for what is none.

    Terms that cancel leave something tiny; it is 0 if it changes with the digits one computes with.
    """
    import sympy

    number = expression.evalf(20, maxn=100)
    if not number.is_finite:
        raise ValueError(f"not a number: {expression}")
    if number != 0 and abs(number) < 1e-50:
        return number if close(number, expression.evalf(20, maxn=300)) else sympy.Integer(0)
    return number


def close(p, q):
    """Are two numbers the same but for a relative error, at any size?"""
    return bool(abs(p - q) <= 1e-17 * max(abs(p), abs(q)))


def is_real(number):
    """Whether a number has an imaginary part only by rounding."""
    return abs(number.as_real_imag()[1]) <= 1e-17 * abs(number)


def formula(text):
    """A flat formula in lower case as sympy's.

    Its parser evaluates Python, so only numbers, single letters, known functions and operators get
    there, and it knows no other name.
    """
    from sympy.parsing import sympy_parser as parser

    if not FORMULA.fullmatch(text) or LETTERS.search(text) or re.search(r"(?<!_)\d +[\d.]", text):
        raise ValueError(f"not a formula: {text}")
    for rule in PYTHON:
        text = re.sub(*rule, text)
    if "|" in text:  # Python's or
        raise ValueError(f"half an absolute value: {text}")
    steps = (
        *parser.standard_transformations,
        parser.rationalize,
        parser.split_symbols,
        parser.implicit_multiplication,
    )
    return parser.parse_expr(text, names(), steps, {"__builtins__": {}} | names())


@cache
def names():
    """What a name in a formula means to sympy's parser."""
    import sympy

    known = (
        "Number Integer Float Rational Symbol Abs factorial factorial2 sqrt real_root exp log ln pi"
    )
    known += " sin cos tan sec csc cot asin acos atan"
    letters = ["lamda", *GREEK.split("|"), *"abcdfghjklmnopqrstuvwxyz"]
    values = {name: sympy.Symbol(name) for name in letters} | {"e": sympy.E, "i": sympy.I}
    return values | {name: getattr(sympy, name) for name in known.split()}


def verdict(given, truth):
    """Whether two answers are equal, however long it takes: what a worker says."""
    pair = [flatten(x) for x in (given, truth)]
    joined = [re.sub(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?!\d)", without_commas, x) for x in pair]
    # 1,234 is one number or two, 1,000 is one.
    listed = not any(re.search(r"\d,0\d", x) for x in pair)
    return (listed or joined == pair) and readable(*pair) or joined != pair and readable(*joined)


def without_commas(m):
    return m[0].replace(",", "")


def readable(a, b):
    """`same`; what cannot be read, for whatever reason, has to be written the same."""
    try:
        return same(a, b)
    except Exception:  # every kind of error, since the text may be anything
        return without_spaces(a).lower() == without_spaces(b).lower()


def work():
    """The worker: one JSON pair a line in, one verdict a line out."""
    # Ctrl-C is for the run, which ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    verdict("a + \\frac{1}{2}", "b")  # sympy imports half of itself on first use
    print("ready", flush=True)
    with open(os.devnull, "w") as nowhere:
        for line in sys.stdin:
            # A clock that no computation can block ends a worker whose run was killed meanwhile.
            faulthandler.dump_traceback_later(60, exit=True, file=nowhere)
            answer = verdict(*json.loads(line))
            faulthandler.cancel_dump_traceback_later()  # waiting is not on this clock
            print(answer, flush=True)
