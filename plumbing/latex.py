r"""LaTeX, plain text and signs as one flat formula: \dfrac12 x² becomes ((1)/(2))x^(2).

Characters are replaced first. Then come the sections below, in their order. The rules of a section
are applied in their order, again and again until nothing changes, so that nested groups are taken
from the inside out. A rule is (what it finds, what that becomes, an example) under a sentence that
says why. The example "a == b != c" is a test: a equals b, which it does not without the rule, and
it does not equal c. A new rule stands after those that it builds on, and before those that would
take away what it looks for.
"""

import re
import unicodedata

# 1. Characters.
CHARACTERS = {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)}  # （１） is (1)
CHARACTERS |= {c: unicodedata.normalize("NFKC", c) for c in map(chr, range(0x1D400, 0x1D800))}
CHARACTERS |= dict.fromkeys("\u200b\u200c\u200d\u200e\u200f\u2060\ufeff", "")
CHARACTERS |= dict(zip("−–—‐‑×·⋅∗÷∕⁄∶。、\u00a0\u2009\u202f\u3000\n\t", "-----****///:.,      "))
CHARACTERS |= dict(zip("“”‘’′⩽⩾ℓ【】", "\"\"'''≤≥l()"))
CHARACTERS |= {"√": r"\sqrt ", "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta "}
CHARACTERS |= {"µ": r"\mu ", "μ": r"\mu ", "Ω": r"\Omega ", "\u2126": r"\Omega "}
CHARACTERS |= {"ℝ": r"\mathbb{R}", "∠": r"\angle ", "△": r"\triangle "}
CHARACTERS |= {"℃": r"^\circ C", "℉": r"^\circ F"} | dict.fromkeys("°º˚", r"^\circ ")
CHARACTERS |= {"£": " gbp ", "€": " euro ", "¥": " yuan "}
FRACTIONS = dict(zip("½⅓¼⅕⅙⅛⅔¾⅖⅗⅘⅚⅜⅝⅞", "12 13 14 15 16 18 23 34 25 35 45 56 38 58 78".split()))
CHARACTERS |= {c: rf"\frac{digits}" for c, digits in FRACTIONS.items()}
CHARACTERS = str.maketrans(CHARACTERS)
RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n"))
LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789"))

# Commands that are signs, and words that are numbers.
SIGNS = {
    **dict.fromkeys(["cdot", "times", "ast"], "*"),
    **dict.fromkeys(["le", "leq", "leqslant", "leqq"], "≤"),
    **dict.fromkeys(["ge", "geq", "geqslant", "geqq"], "≥"),
    **dict.fromkeys(["ne", "neq"], "≠"),
    **dict.fromkeys(["vert", "lvert", "rvert", "mid"], "|"),
    **dict.fromkeys(["varnothing", "emptyset"], "∅"),
    **{"div": "/", "pm": "±", "colon": ":", "lt": "<", "gt": ">", "in": "∈", "notin": "∉"},
    **{"approx": "=", "infty": "∞", "cup": "∪", "lbrace": "«", "rbrace": "»"},
}
ONES = "one two three four five six seven eight nine".split()
TEENS = (
    "zero ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
COUNT = dict(zip(ONES, range(1, 10))) | dict(zip(TEENS, [0, *range(10, 20)]))
COUNT |= dict(zip(TENS, range(20, 100, 10)))
SCALE = {"hundred": "*100", "thousand": "*1000", "million": "*10^6", "billion": "*10^9"}
SCALE |= {"万": "*10^4", "亿": "*10^8"}
LOOKS = (
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|math(?:rm|bf|sf|it|tt|cal|bb|frak|normal)|bm|emph"
    r"|boldsymbol|underline|[mhf]box|boxed|operatorname\*?)"
)
INNER = r"(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*"  # what braces hold, with other braces in it
NUMBER = r"\d[\d.,]*(?<=\d)"
TABLE = r"\\begin *\{(?P<table>%s)\}(?:\{[clr|]*\})?(?P<rows>.*?)\\end *\{(?P=table)\}"
SIDE = "[^<>≤≥=]+?"  # of a condition


def raised(m):
    """x⁻² is x^{-2}."""
    return f"^{{{''.join(RAISED[c] for c in m[0])}}}"


def lowered(m):
    """x₁ is x_{1}."""
    return f"_{{{''.join(LOWERED[c] for c in m[0])}}}"


def repeating(m):
    r"""0.1\overline{6} is (16 - 1)/90."""
    whole, fixed, again = m.groups()
    value = int(whole + fixed + again) - int(whole + fixed or "0")
    return f"({value}/{(10 ** len(again) - 1) * 10 ** len(fixed)})"


def rows(m):
    """The rows of a table, the entries of each between commas."""
    return [row.replace("&", ",") for row in m["rows"].split(r"\\") if row.strip()]


def matrix(m):
    """A matrix is the tuple of its rows."""
    return f"[{','.join(f'({row})' for row in rows(m))}]"


def system(m):
    """A system is the list of its rows; the parts of a row with a condition stay together."""
    return ", ".join(f"({row})" if "," in row else row for row in rows(m))


def between(m):
    """x > 3 and x < 5 is 3 < x < 5; conditions on different sides or names stay as they are."""
    sides = [
        (m[n], m[n + 1], m[n + 2]) if m[n + 1] in "<≤" else (m[n + 2], "<≤"[m[n + 1] == "≥"], m[n])
        for n in (1, 4)
    ]
    for (low, sign, name), (other, second, high) in (sides, sides[::-1]):
        if name.strip() == other.strip():
            return f"{low}{sign}{name}{second}{high}"
    return m[0]


MARKUP = [
    # An exponent or an index may be written in characters of its own.
    (f"[{''.join(RAISED)}]+", raised, r"10⁻³ == 0.001 != 0.01"),
    (f"[{''.join(LOWERED)}]+", lowered, r"x₁ == x_1 != x_2"),
    # The real numbers are an interval. Here, since the letter R alone is a variable.
    (r"\\(?:mathbb *(?:\{R\}|R)|R)(?![A-Za-z])", "(-∞,∞)", r"\mathbb{R} == (-\infty,\infty) != R"),
    # Quotes around the whole answer, and what Markdown prints bold.
    (r"^ *(?:``|[\"'`])([^\"'`]+)(?:''|[\"'`]) *$", r"\1", r'"A" == A != B'),
    (r"(?<![\w)}*])\*\*(?=[^\s*])([^*]+)\*\*(?![\w(*])", r"\1", "**73** == 73 != 7"),
    # Fonts change nothing, also within each other. The spaces keep words apart.
    (rf"{LOOKS} *\{{({INNER})\}}", r" \1 ", r"\mathbf{\underline{A}} == A != B"),
    (r"\\(?:bf|it|rm|displaystyle|textstyle)(?![A-Za-z])", " ", r"{\bf 5} == 5 != 6"),
    # Dollars are a unit that stands in front; other dollar signs are mathematics.
    (r"\\\$", " dollar ", r"\$5 == 5 dollars != 5 euros"),
    (
        rf" *\b(dollar|euro|gbp|yuan) +({NUMBER}(?: ?(?:thousand|million|billion))?)",
        r"\2 \1 ",
        r"-€5 == -5 != 5",
    ),
    (r"\$|(?<!\\)\\[()[\]]", "", r"\($5$\) == 5 != 6"),
    # A brace on the left only holds a system together.
    (
        rf"\\left *\\\{{ *{TABLE % 'array'} *\\right *\.",
        r"\\begin{cases}\g<rows>\\end{cases}",
        r"\left\{\begin{array}{l}x=1\\y=2\end{array}\right. == x=1, y=2 != x=2, y=1",
    ),
    (r"\\left *\\\{(.*)\\right *\.", r"\1", r"\left\{x=1, y=2\right. == x=1, y=2 != x=2, y=1"),
    (
        r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])",
        "",
        r"\left(1,2\right] == (1,2] != (1,2)",
    ),
    (r"\\!", "", r"1\!2 == 12 != 1, 2"),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-z])", " ", r"5~\,cm == 5 cm != 5 m"),
]
NUMBERS = [
    (r"\{,\}", ",", "1{,}000 == 1000 != 1"),
    (r"(?<=\d) +(?=\d{3}(?![\d/.]))", "", r"1\,000 == 1000.0 != 1"),
    (r"\\%| ?(?i:\bper ?cent\b)", "%", r"50 percent == 0.5 != 5"),
    (r"\^ *(?:\{ *\\circ *\}|\\circ)|\\degree", " degree ", r"30^{\circ} == 30 degrees != 3"),
    # The letter x as a sign, where nothing else makes sense.
    (r"(?<=\d) *[xX] *(?=10 *\^)", "*", "3 x 10^5 == 300000 != 3*10^6"),
    # Digits that repeat: under a bar, under dots at both ends, in brackets after the
    # point; 2.5(3) is a product.
    (r"\\dot *\{?(\d)\}?(\d*)\\dot *\{?(\d)\}?", r"\\bar{\1\2\3}", r"0.\dot1\dot2 == 4/33 != 0.12"),
    (
        r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot) *\{? *|(?<=\.)\()(\d+)(?: *\}|\)|(?!\d))",
        repeating,
        r"0.1\overline{6} == 1/6 != 0.16",
    ),
    # 1\frac{1}{2} and 1 1/2 are sums, once every fraction has its braces.
    (r"\\[dtc]frac(?![a-z])", r"\\frac", r"\dfrac12 == 0.5 != 2"),
    (r"\\frac *(\w|\\pi(?![a-z]))", r"\\frac{\1}", r"\frac12 == 0.5 != 2"),
    (r"(\\frac *\{[^{}]*\}) *(\w|\\pi(?![a-z]))", r"\1{\2}", r"\frac{1}2 == 0.5 != 2"),
    (
        r"(?<![\w.^)/])(\d+) *\\frac *\{(\d+)\} *\{(\d+)\}",
        r"(\1+\2/\3)",
        r"2\frac{1}{2} == 2.5 != 1",
    ),
    (r"(?<![\w.^/])(\d+) +(\d+) */ *(\d+)(?![\w.])", r"(\1+\2/\3)", "2 1/2 == 2.5 != 21/2"),
]
SIGNED = [
    # An equals sign that is crossed out.
    (r"\\not *=|!=(?!=)", "≠", r"x \not= 3 == x \neq 3 != x=3"),
    (r"\\not *(?:\\in(?![a-z])|∈)", "∉", r"x \not\in [1,2] == x \notin [1,2] != x \in [1,2]"),
    # A whole answer in braces with commas is a set, also without backslashes.
    (
        rf"((?:^|=|∈|\\in(?![a-z])) *)\{{({INNER},{INNER})\}} *$",
        r"\1«\2»",
        "{1,2} == {2,1} != (1,2)",
    ),
    (r"(?<!\\)\\\{", "«", r"\{1,2\} == 1,2 != (1,2)"),
    (r"(?<!\\)\\\}", "»", r"\{5\} == 5 != \{6\}"),
    (r"« *»", "∅", r"\{\} == \emptyset != 0"),
    (
        TABLE % "[pb]?matrix|smallmatrix|array",
        matrix,
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix} == \begin{bmatrix}1&2\\3&4\end{bmatrix} != 1,2,3,4",
    ),
    (
        TABLE % "cases|aligned",
        system,
        r"\begin{cases}x=1\\y=2\end{cases} == y=2, x=1 != x=2, y=1",
    ),
    (
        rf"\\({'|'.join(sorted(SIGNS, key=len, reverse=True))})(?![A-Za-z])",
        lambda m: SIGNS[m[1]],
        r"2 \times 3 == 6 != 5",
    ),
    (r"<=", "≤", "x<=3 == x≤3 != x<3"),
    (r">=", "≥", "x>=3 == x≥3 != x>3"),
    (r"≈", "=", "x≈3 == 3 != 4"),
    (r"\+ ?/ ?-", "±", "+/-2 == 2, -2 != 2"),
    (r"\+? *∞|\binfinity\b", "∞", r"(2,+\infty) == (2,∞) != (-\infty,2)"),
    (r"(?<=[)\]]) *U *(?=[(\[])", "∪", "(0,1) U (2,3) == (2,3)∪(0,1) != (0,1)"),
    (r"(?<=∈) *R *$", "(-∞,∞)", r"x \in R == \mathbb{R} != R"),
]
GROUPS = [
    # A bar over the ends of a segment; over one letter it means something else.
    (r"\\(?:overline|bar) *\{ *([A-Z]{2}) *\}", r"\1", r"\overline{AB} == AB != \overline{AC}"),
    (r"\\bar(?![a-z]) *(?:\{(\w+)\}|(\w))", r"\\overline{\1\2}", r"\bar x == \overline{x} != x"),
    (r"\\[dt]?binom *\{(\d+)\} *\{(\d+)\}", r"(\1!/(\2!(\1-\2)!))", r"\binom{5}{2} == 10 != 5"),
    (r"\\sqrt *(\w|\\pi(?![a-z]))", r"\\sqrt{\1}", r"\sqrt23 == 3\sqrt{2} != \sqrt{23}"),
    (r"([\^_]) *\{([^{}]*)\}", r"\1(\2)", r"\frac{x^{2}}{3} == x^2/3 != x/3"),
    (r"\\frac *\{([^{}]*)\} *\{([^{}]*)\}", r"((\1)/(\2))", r"\frac{7}{2} == 3.5 != 2/7"),
    (r"\\sqrt *\[([^][{}]*)\] *\{([^{}]*)\}", r" root(\2;\1)", r"\sqrt[3]{8} == 2 != \sqrt{8}"),
    (r"\\sqrt *\{([^{}]*)\}", r" sqrt(\1)", r"\frac{\sqrt{9}}{3} == 1 != 3"),
]
WORDS = [
    # What is still a command becomes a word, and braces that are left only group.
    (r"\\([A-Za-z]+)", r" \1 ", r"\sin x == sin(x) != \cos x"),
    (r"\{", "(", "{3} == 3 != 4"),
    (r"\}", ")", "{3}^2 == 9 != 3"),
    (
        r"(?i)^ *(?:the set of )?(?:all |any )?real(?: number)?s *$",
        "(-∞,∞)",
        r"all real numbers == \mathbb{R} != (0,\infty)",
    ),
    # Numbers in words.
    (
        rf"(?i)\b({'|'.join(TENS)})[- ]({'|'.join(ONES)})\b",
        lambda m: str(COUNT[m[1].lower()] + COUNT[m[2].lower()]),
        "twenty-one == 21 != 19",
    ),
    (rf"(?i)\b({'|'.join(COUNT)})\b", lambda m: str(COUNT[m[1].lower()]), "Two == 2 != 3"),
    (
        rf"(?i)(?<=[\d)]) *({'|'.join(SCALE)})(?![A-Za-z])",
        lambda m: SCALE[m[1].lower()],
        "5 million == 5000000 != 5",
    ),
    # Two conditions on one name.
    (
        rf"^({SIDE})([<>≤≥])({SIDE}) +and +({SIDE})([<>≤≥])({SIDE})$",
        between,
        r"x>3 \text{ and } x<5 == 3<x<5 != x>3 \text{ or } x<5",
    ),
    (r"(?i),? +(?:or|and) +| *[或和] *", ", ", "2 or 3 == 2, 3 != 2"),
    # A sentence around the answer.
    (
        r"(?i)^ *(?:the |my )?(?:final |correct )?(?:answer|option|choice|答案|故?选项?)(?![a-z])"
        r"(?: is|[为是])? *:? *(?=\S)",
        "",
        "The answer is: option A == A != B",
    ),
    (r" +(?=[ ^_])", "", r"5\ \text{red apples} == 5 != 6"),
]
SECTIONS = [MARKUP, NUMBERS, SIGNED, GROUPS, WORDS]


def flatten(text, sections=SECTIONS):
    r"""A flat formula, upper and lower case kept. LaTeX of at most a few hundred characters.

    \dfrac{1}{2} -> ((1)/(2)),  5\text{ cm} -> "5 cm",  \{1, 2\} -> «1, 2»
    """
    text = text.translate(CHARACTERS)
    for section in sections:
        before = None
        while text != before:
            before = text
            for pattern, becomes, _ in section:
                text = re.sub(pattern, becomes, text)
    return text.strip().rstrip(".,:; ")
