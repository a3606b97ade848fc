"""When are two answers the same?

\\frac{1}{2} and 0.5 are, [0, 1] and (0, 1) are not; tests/grading_table.py holds the rest.

The released grader, mathruler, misjudges about every third case of that table (results/grading.md).
So answers are read here first: rewritten by RULES, taken apart by `same`, their formulas compared
by value. mathruler has the last word on what cannot be read that way.

Nothing here has a time limit; plumbing/grader.py calls it in processes that it can kill. This file
is such a process when it is called with --worker, so it imports nothing of the project.
"""

import faulthandler
import json
import os
import re
import signal
import sys
from itertools import accumulate

# Not for mathruler, which evaluates what it is given.
CODE = re.compile(r"_.*_|\\_|[A-Za-z_]\w*\W*\.\W*[A-Za-z_]|lambda|import|eval|exec|open|[\"'`;:@#]")

SYMBOLS = {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)}  # （１） is (1)
SYMBOLS |= dict.fromkeys("\u200b£€¥")
SYMBOLS |= dict(zip("−–—×·⋅÷。、\u00a0\u3000\n\t", "---***/.,    "))
SYMBOLS |= {"√": r"\sqrt ", "π": r"\pi ", "θ": r"\theta ", "°": r"^\circ ", "º": r"^\circ "}
SYMBOLS |= {"˚": r"^\circ ", "∠": r"\angle "}
SYMBOLS |= {"℃": r"^\circ C", "℉": r"^\circ F"}
SYMBOLS |= {"½": r"\frac12", "⅓": r"\frac13", "¼": r"\frac14", "⅕": r"\frac15", "⅙": r"\frac16"}
SYMBOLS |= {"⅛": r"\frac18", "⅔": r"\frac23", "¾": r"\frac34", "⅖": r"\frac25", "⅗": r"\frac35"}
SYMBOLS |= {"⅘": r"\frac45", "⅚": r"\frac56", "⅜": r"\frac38", "⅝": r"\frac58", "⅞": r"\frac78"}
SYMBOLS = str.maketrans(SYMBOLS)
SIGNS = [
    ("cdot|times|ast", "*"),
    ("div", "/"),
    ("pm", "±"),
    ("colon", ":"),
    ("leq?(?:slant)?", "≤"),
    ("geq?(?:slant)?", "≥"),
    ("neq?", "≠"),
    ("lt", "<"),
    ("gt", ">"),
    ("in", "∈"),
    ("approx", "="),
    ("[lr]?vert|mid", "|"),
    ("infty", "∞"),
    ("cup", "∪"),
    ("varnothing|emptyset", "∅"),
]
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty hundred thousand million billion"
)
COUNT = dict(zip(NUMBERS.split(), [*range(21), "*100", "*1000", "*10^6", "*10^9"]))
GROUPS = [
    (r"([\^_]) *\{([^{}]*)\}", r"\1(\2)"),
    (r"\\frac *\{([^{}]*)\} *\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\\sqrt *\[([^][{}]*)\] *\{([^{}]*)\}", r"root(\2;\1)"),
    (r"\\sqrt *\{([^{}]*)\}", r"sqrt(\1)"),
]
TEXT = "text|textbf|textit|textrm|mathrm|mathbf|mathbb|operatorname|mbox|boxed"


def _matrix(m):
    """A matrix as the tuple of its rows."""
    return "[" + ",".join(f"({row})" for row in m[2].replace("&", ",").split("\\\\")) + "]"


RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n"))
LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789"))


def _script(sign, plain):
    """A rule for characters above or below the line: x⁻² is x^{-2}, x₁ is x_{1}."""

    def becomes(m):
        return f"{sign}{{{''.join(plain[c] for c in m[0])}}}"

    return (f"[{''.join(plain)}]+", becomes)


# (what, becomes), in this order, on LaTeX as it was written.
RULES = [
    _script("^", RAISED),
    _script("_", LOWERED),
    # 3 x 10^5, with the letter for the sign.
    (r"(?<=\d) *[xX] *(?=10 *\^)", "*"),
    # Words in each other, such as \text{\textbf{5}}.
    *[(rf"\\(?:{TEXT}) *\{{([^{{}}]*)\}}", r" \1 ")] * 3,
    # What only changes how it looks.
    (r"\\?\$|(?<!\\)\\[()[\]]|\\!|\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![a-z])", ""),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad", " "),
    # 1{,}000 and 1 000.
    (r"\{,\}", ","),
    (r"(?<=\d) +(?=\d{3}(?![\d/.]))", ""),
    (r"\^ *(?:\{ *\\circ *\}|\\circ)|\\degree", " degree "),
    (r"\\%| ?\bpercent\b", "%"),
    # A set, also one without backslashes if it is the whole answer; other braces only group.
    (r"^ *\{([^{}]*,[^{}]*)\} *$", r"\\{\1\\}"),
    (r"(?<!\\)\\\{|\\lbrace", "«"),
    (r"(?<!\\)\\\}|\\rbrace", "»"),
    (r"« *»", "∅"),
    (
        r"\\begin *\{([pb]?matrix|array)\}(?:\{[clr|]*\})?(.*?)(?:\\\\ *)?\\end *\{\1\}",
        _matrix,
    ),
    *[(rf"\\(?:{word})(?![a-z])", sign) for word, sign in SIGNS],
    (r"<=", "≤"),
    (r">=", "≥"),
    (r"≈", "="),
    (r"\+ ?/ ?-", "±"),
    (r"\+? *∞|\binfinity\b", "∞"),
    (r"(?<=[)\]]) *U *(?=[(\[])", "∪"),
    # A segment.
    (r"\\overline *\{([A-Za-z]+)\}", r"\1"),
    # \dfrac12 is \frac{1}{2}.
    (r"\\[dtc]?frac(?![a-z])", r"\\frac"),
    (r"\\frac *(\w)", r"\\frac{\1}"),
    (r"(\\frac *\{[^{}]*\}) *(\w)", r"\1{\2}"),
    # Mixed numbers: 1\frac{1}{2} and 1 1/2.
    (r"(?<![\w.^)/])(\d+) *\\frac *\{(\d+)\} *\{(\d+)\}", r"(\1+\2/\3)"),
    (r"(?<![\w.^/])(\d+) +(\d+) */ *(\d+)(?![\w.])", r"(\1+\2/\3)"),
    (r"\\[dt]?binom *\{(\d+)\} *\{(\d+)\}", r"(\1!/(\2!(\1-\2)!))"),
    (r"\\sqrt *(\w)", r"\\sqrt{\1}"),
    # Groups, from the inside out.
    *GROUPS * 8,
    (r"\\([A-Za-z]+)", r" \1 "),
    (r"\{", "("),
    (r"\}", ")"),
    (rf"(?i)\b({'|'.join(COUNT)})\b", lambda m: str(COUNT[m[1].lower()])),
    (r",? +(?:or|and) +", ", "),
    (r" +(?=[ ^_(])", ""),
    (r"(?i)^ *(?:the )?(?:final |correct )?(?:answer|option|choice)(?: is)? *:? *(?=\S)", ""),
]

# What follows reads answers that RULES have rewritten and that are in lower case.
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
    (r"\|([^|]*)\|", r"Abs(\1)"),
    (r"_\((\w+)\)", r"_\1"),
    (r"(?<![\d.])0+(?=\d)", ""),
    ("lambda", "lamda"),
    ("root", "real_root"),
    (r"\^", "**"),
    (";", ","),
    ("arc", "a"),
]
SHORT = [
    ("centimet(er|re)", "cm"),
    ("millimet(er|re)", "mm"),
    ("kilomet(er|re)", "km"),
    ("met(er|re)", "m"),
    ("inche?", "in"),
    ("foot|feet", "ft"),
    ("yard", "yd"),
    ("mile", "mi"),
    ("second|sec", "s"),
    ("minute", "min"),
    ("hour|hr", "h"),
    ("kilogram", "kg"),
    ("gram", "g"),
    ("lit(er|re)", "l"),
    ("pound", "lb"),
    ("ounce", "oz"),
    ("deg(ree)?", "degree"),
]
# Known units may touch their number, 5cm; after a space any word is one, 5 apples.
NAMED = "|".join(word for word, _ in SHORT)
WORD = (
    rf"(?: ?(?:{NAMED}|[mcdk]m|in|ft|yd|mi|[km]g|lb|oz|ml|min|mph|hz|sq)s?| [mgslhnjwcf]"
    rf"| {LETTERS.pattern})(?![a-z])(?: ?\^ ?\(?\d\)?)?"
)
UNIT = re.compile(rf"(.*(?:[\d)]|pi)) ?(%|{WORD}(?: ?/ ?[a-z]+(?: ?\^ ?\(?\d\)?)?|{WORD})*)")
# Words behind a number that make another number of it: no units.
FACTOR = re.compile(
    r"\b(?:pairs?|dozens?|scores?|gross|trillions?|lakhs?|crores?|hal(?:f|ves)|thirds?|quarters?"
    r"|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand|million|billion)ths?|squared|cubed"
    r"|factorial|plus|minus|over|divided|modulo|mod|power|root|not)\b"
)
DATE = re.compile(r"\d-\d\d?-\d")  # not a subtraction
# One choice, perhaps with its text: (a), a. or a: and then no other choice.
CHOICE = re.compile(
    r"(?:\(([a-j])\)|([a-j])[.)]|([a-j]):(?= )|([a-j])$)"
    r"(?: *(?![a-j]$|.*(?:\([a-j]\)|\b[a-j][.)]))(-?[\w(«\\.].*))?"
)
# x, x_1, f(x), area of abc.
NAME = re.compile(r"[a-z][a-z ]*(?:_?\d|_\(\w+\))?'* *(?:\([a-z, ]*\))?")


def normalise(text):
    """LaTeX as a flat lower-case formula, by RULES.

    \\dfrac{1}{2} -> ((1)/(2)),  \\text{ cm} -> " cm",  \\{1, 2\\} -> «1, 2»
    """
    text = text.translate(SYMBOLS)
    for rule in RULES:
        text = re.sub(*rule, text)
    return text.lower().strip().rstrip(".,:; ")


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
    if len(parts := split(text, "∪,")) > 1 or "±" in text:
        return "", [
            p.replace("±", sign)
            for p in parts
            if p not in "∪,"
            for sign in ("+-" if "±" in p else "+")
        ]
    if len(text) > 2 and text[0] in "([«" and depths(text).index(0) == len(text) - 1:
        parts = split(text[1:-1], ",")[::2]
        return (
            ("" if text[0] == "«" else text[0] + text[-1], parts)
            if len(parts) > 1
            else items(text[1:-1].strip())
        )
    return "", [text]


def relation(text):
    """ "x > 3" -> ["3", "<", "x"]: sides and signs, always pointing left; ["3"] without a sign."""
    sides = split(text, "=<>≤≥≠∈:")
    return (
        [{">": "<", "≥": "≤"}.get(s, s) for s in reversed(sides)]
        if {">", "≥"} & set(sides)
        else sides
    )


def unnamed(sides):
    """A relation without its variable; "" where that does not work.

    ["0", "≤", "x", "<", "1"] -> "[0,1)",  ["x", "<", "1"] -> "(-∞,1)",  ["x", "=", "3"] -> "3"
    """
    if len(sides) == 3 and sides[1] in "=∈":
        return (
            sides[2] if NAME.fullmatch(sides[0]) else sides[0] if NAME.fullmatch(sides[2]) else ""
        )
    if len(sides) == 3:
        sides = ["-∞", "<", *sides] if NAME.fullmatch(sides[0]) else [*sides, "<", "∞"]
    if len(sides) != 5 or not NAME.fullmatch(sides[2]) or not {sides[1], sides[3]} <= {"<", "≤"}:
        return ""
    return f"{'(['[sides[1] == '≤']}{sides[0]},{sides[4]}{')]'[sides[3] == '≤']}"


def same(a, b):
    """Whether two normalised answers mean the same.

    Raises if a part is neither words nor a formula that can be read.
    """
    if a.replace(" ", "") == b.replace(" ", ""):
        return True
    if (x := CHOICE.fullmatch(a)) and (y := CHOICE.fullmatch(b)):  # "(A)" or "A. 5 cm" for "A"
        return next(filter(None, x.groups())) == next(filter(None, y.groups())) and (
            not x[5] or not y[5] or same(x[5], y[5])
        )
    (kind, ours), (other, theirs) = items(a), items(b)
    left, right = (relation(x[0]) if len(x) == 1 else [] for x in (ours, theirs))
    if (len(left) > 1) != (len(right) > 1):  # x = 3 for 3, x > 3 for (3, ∞)
        a, b = (unnamed(left), b) if len(left) > 1 else (a, unnamed(right))
        return bool(a and b) and same(a, b)
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
    if len(left) > 1:
        if left[1::2] == right[1::2] == ["="] and left[0] != right[0]:  # 2x = 6 for x = 3
            return equal_values(*(f"({x[0]})-({x[2]})" for x in (left, right)), ratio=True)
        return left[1::2] == right[1::2] and all(map(same, left[::2], right[::2]))
    return same_quantity(ours[0], theirs[0])


def same_quantity(a, b):
    """Number, formula or words, perhaps with a unit.

    A missing unit is forgiven, a different one is not; 50% is 50 and 0.5.
    """
    (a, unit), (b, other) = (
        (m[1], m[2].strip()) if (m := UNIT.fullmatch(x)) else (x, "") for x in (a, b)
    )
    for word, short in SHORT:
        unit, other = (re.sub(rf"\b(?:{word})s?\b", short, u) for u in (unit, other))
    unit, other = (
        re.sub(r"\bcubic (\w+)", r"\1^3", re.sub(r"\bsq(?:uare)? (\w+)", r"\1^2", u))
        for u in (unit, other)
    )
    tidy = [re.sub(r"[ ()]|(?<=\w\w\w)s$", "", u.replace(" per ", "/")) for u in (unit, other)]
    if tidy[0] != tidy[1] and (tidy[0] and tidy[1] or FACTOR.search(f"{unit} {other}")):
        return False
    if (
        LETTERS.search(a) or LETTERS.search(b) or DATE.search(a) or a.isalpha() and b.isalpha()
    ):  # words
        return re.sub(r"[\s'\",.()-](?!\d)", "", a) == re.sub(r"[\s'\",.()-](?!\d)", "", b)
    if (
        tidy[0] != tidy[1]
        and "%" in tidy
        and equal_values(*(f"({x})/100" if u == "%" else x for x, u in zip((a, b), tidy)))
    ):
        return True
    return equal_values(a, b)


def equal_values(a, b, ratio=False):
    """Whether two formulas have the same value wherever the variables stand.

    ratio: or a constant ratio, as the two sides of equations do. Raises if one cannot be read.
    """
    import sympy

    if "∞" in a + b:
        return False
    x, y = formula(a), formula(b)
    if x.is_Rational and y.is_Rational and not ratio:
        return x == y
    pairs, names = [], sorted(x.free_symbols | y.free_symbols, key=str)
    for k in range(6):  # an identity that holds at six odd points, of both signs, holds
        at = {
            v: sympy.Rational((37 * k + 17 * i) % 101 + 23, 53) * (-1) ** (k >> i % 2)
            for i, v in enumerate(names)
        }
        pairs.append((value(x.subs(at)), value(y.subs(at))))
    u, v = pairs[0] if ratio else (1, 1)
    return u != 0 != v and all(close(p * v, q * u) for p, q in pairs)


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
    return bool(abs(p - q) <= 1e-11 * max(abs(p), abs(q)))


def formula(text):
    """A normalised formula as sympy's.

    Its parser evaluates Python, so only numbers, single letters, known functions and operators get
    there.
    """
    import sympy
    from sympy.parsing import sympy_parser as parser

    if not FORMULA.fullmatch(text) or LETTERS.search(text) or re.search(r"(?<!_)\d +[\d.]", text):
        raise ValueError(f"not a formula: {text}")
    for rule in PYTHON:
        text = re.sub(*rule, text)
    steps = (
        *parser.standard_transformations,
        parser.rationalize,
        parser.split_symbols,
        parser.implicit_multiplication,
    )
    letters = {
        c: sympy.Symbol(c) for c in ["lamda", *GREEK.split("|"), *"abcdfghjklmnopqrstuvwxyz"]
    } | {"e": sympy.E, "i": sympy.I}
    return parser.parse_expr(text, transformations=steps, local_dict=letters)


def verdict(given, truth):
    """Whether two answers are equal, however long it takes: what a worker says."""
    from mathruler.grader import grade_answer

    pair = [normalise(x) for x in (given, truth)]
    joined = [
        re.sub(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?!\d)", lambda m: m[0].replace(",", ""), x)
        for x in pair
    ]  # 1,000 is one number or two
    try:
        return same(*pair) or joined != pair and same(*joined)
    except Exception:  # cannot be read: every kind of error, since the text may be anything
        return not CODE.search(given + truth) and bool(grade_answer(given, truth))


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


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    work()
