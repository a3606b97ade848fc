r"""LaTeX, plain text and signs as one flat text: 5\text{ cm}² is "5 cm^(2)", \dfrac12 "\frac12".

Of LaTeX only \frac, \sqrt, \binom and \overline are left, for formulas.py to read. A rule is (what
it finds, what that becomes); a test switches each off, and finds a pair that is then misjudged.
"""

import re
import unicodedata

# What NFKC would take apart, though it is needed as it is.
BEFORE = str.maketrans({"ℝ": r"\mathbb{R}", "˚": "°", "º": "°", "⁄": "/"})
# What NFKC leaves; by then ½ is \frac{1⁄2}, and the stroke of its own parts the braces.
AFTER = dict.fromkeys("\u200b\u200c\u200d\u200e\u200f\u2060\ufeff", "") | {"⁄": "}{"}
AFTER |= dict(zip("−–—‐×·⋅∗÷∕∶。、\n\t“”‘’′⩽⩾≈&【】", "----****//:.,  \"\"'''≤≥=,()"))
AFTER |= {"√": " sqrt ", "π": " pi ", "θ": " theta ", "α": " alpha ", "β": " beta "}
AFTER |= {"μ": " mu ", "Ω": " Omega ", "∠": " angle ", "△": " triangle ", "°": r"\degree "}
AFTER = str.maketrans(AFTER | {"£": " gbp ", "€": " euro ", "¥": " yuan "})
COMMANDS = dict(
    pair.split()
    for pair in r"frac \frac,dfrac \frac,tfrac \frac,cfrac \frac,nicefrac \frac,sfrac \frac,"
    r"sqrt \sqrt,overline \overline,"
    r"{ «,} »,binom \binom,dbinom \binom,tbinom \binom,cdot *,times *,ast *,div /,pm ±,not !,"
    "colon :,lt <,gt >,le ≤,leq ≤,leqslant ≤,leqq ≤,ge ≥,geq ≥,geqslant ≥,geqq ≥,ne ≠,neq ≠,"
    "approx =,vert |,lvert |,rvert |,mid |,varnothing ∅,emptyset ∅,in ∈,notin ∉,infty ∞,cup ∪,"
    "lbrace «,rbrace »".split(",")
)
ONES = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
COUNT = dict(zip(f"zero {ONES} sixteen seventeen eighteen nineteen".split(), range(20)))
for k, ten in enumerate(TENS, 2):  # twenty-one before twenty, since the first that fits is taken
    COUNT |= {f"{ten}-{one}": 10 * k + COUNT[one] for one in ONES.split()[:9]} | {ten: 10 * k}
SCALE = dict(zip("hundred thousand million billion 万 亿".split(), (2, 3, 6, 9, 4, 8)))
HOURS = {"a": lambda h: str(int(h) % 12), "p": lambda h: str(int(h) % 12 + 12)}
TURNED = str.maketrans("<>≤≥", "><≥≤")
BOTH = r"^ *(\w+) *([<>≤≥])([^<>≤≥=]+) and +\1 *([<>≤≥])([^<>≤≥=]+)$"  # x > 3 and x < 5
LABEL = r"(?:the |my )?(?:final |correct )?(?:answer|option|choice|答案|故?选项?)(?![a-z])"
FONTS = r"\\(?:(?:text|math)[a-z]*|bm|emph|boldsymbol|underline|[mhf]box|boxed|operatorname\*?)"
INNER = r"(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*"  # what braces hold, with other braces in it
AMOUNT = r"\d[\d.,]*(?<=\d)(?: ?(?:thousand|million|billion))?"
ARRAY = r"array\}(?:\{[clr|]*\})?"
MATRIX = rf" *\{{(?:(?:[pb]?|small)matrix\}}|{ARRAY})"
LEFT_BRACE = rf"\\left *\\\{{ *\\begin *\{{{ARRAY}(.*)\\end *\{{array\}} *\\right *\."

RULES = [
    # The real numbers are an interval. Here, since the letter R alone is a variable.
    (r"\\(?:mathbb *(?:\{R\}|R)|R)(?![A-Za-z])", "(-∞,∞)"),
    # Quotes around the whole answer, and what Markdown prints bold.
    (r"^ *(?:``|[\"'`])([^\"'`]+)(?:''|[\"'`]) *$", r"\1"),
    (r"(?<![\w)}*])\*\*(?=[^\s*])([^*]+)\*\*(?![\w(*])", r"\1"),
    # Fonts change nothing, also within each other. The spaces keep words apart.
    *[(rf"{FONTS} *\{{({INNER})\}}", r" \1 ")] * 3,
    (r"\\(?:bf|it|rm|displaystyle|textstyle)(?![A-Za-z])", " "),
    # Dollars are a unit that stands in front; other dollar signs are mathematics.
    (r"\\\$", " dollar "),
    (rf" *\b(dollar|euro|gbp|yuan) +({AMOUNT})", r"\2 \1 "),
    (r"\$|(?<!\\)\\[()[\]]|\\!", ""),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-z])", " "),
    (LEFT_BRACE, r"\\begin{cases}\1\\end{cases}"),
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])", ""),
    (r"\{([,:])\}", r"\1"),
    (r"^ *=", ""),
    (r"(?<=\d) +(?=\d{3}(?![\d/.]))", ""),
    (r"\\%| ?(?i:\bper ?cent\b)", "%"),
    # Of siunitx: \SI{5}{\centi\meter}, \ang{30}.
    (rf"\\(?:SI|qty) *\{{({INNER})\}} *\{{({INNER})\}}", r"\1 \2"),
    (r"\\(kilo|mega|giga|deci|centi|milli|micro|nano|pico) *\\(?=[a-z])", r"\\\1"),
    (r"\\ang *\{([^{}]*)\}", r"\1 degree "),
    (r"\\num *\{([^{}]*)\}", r" \1"),
    (r"\^ *(?:\{ *\\circ *\}|\\circ)|\\degree", " degree "),
    # The letter x as a sign, where nothing else makes sense.
    (r"(?<=\d) *[xX] *(?=10 *\^)", "*"),
    # A bar over digits that repeat, also written as dots or brackets; over the ends of a segment.
    (r"\\dot *\{?(\d)\}?(\d*)\\dot *\{?(\d)\}?", r"\\overline{\1\2\3}"),
    (r"\\(?:dot(?= *\{?\d)|bar(?![a-z]))", r"\\overline"),
    (r"\\overline *(\w)|(?<=\d\.)\((\d+)\)", r"\\overline{\1\2}"),
    (r"\\overline *\{ *([A-Z]{2}) *\}", r"\1"),
    # A matrix is the tuple of its rows, a system the list of them.
    (rf"\\begin{MATRIX}", "[("),
    (rf"(?:\\\\ *)?\\end{MATRIX}", ")]"),
    (r"\\begin *\{(?:cases|aligned)\}", "("),
    (r"(?:\\\\ *)?\\end *\{(?:cases|aligned)\}", ")"),
    (r"\\\\", "),("),
    # A whole answer in braces with commas is a set, also without backslashes.
    (rf"((?:^|=|∈|\\in(?![a-z])) *)\{{({INNER},{INNER})\}} *$", r"\1«\2»"),
    (r"\\([A-Za-z]+|[{}])", lambda m: COMMANDS.get(m[1], f" {m[1]} ")),
    (r" +(?=[ ^_])|(?<=\\frac) +(?=\d)|(?<=\\sqrt) +(?=\d)", ""),
    (r"« *»", "∅"),
    # {x | x > 2} is what is said of x, and a time of day one of 24 hours.
    (r"^« *[A-Za-z] *(?:∈[^|:]*)?[|:](?=.*[<>≤≥=≠∈])([^|:]+)»$", r"\1"),
    (r"(?i)\b(1[0-2]|0?[1-9])(?=:\d\d *([ap])\.?m\b)", lambda m: HOURS[m[2].lower()](m[1])),
    (r"(?i)(?<=:\d\d) *[ap]\.?m\b\.?", ""),
    (r"! *=(?!=)", "≠"),
    (r"! *∈", "∉"),
    (r"<=", "≤"),
    (r">=", "≥"),
    (r"\+ ?/ ?-", "±"),
    (r"\+? *∞|\binfinity\b", "∞"),
    (r"(?<=[)\]]) *U *(?=[(\[])", "∪"),
    (r"(?i)^ *(?:the set of )?(?:all |any )?real(?: number)?s *$", "(-∞,∞)"),
    (rf"(?i)\b({'|'.join(COUNT)})\b", lambda m: str(COUNT[m[1].lower()])),
    (rf"(?i)(?<=[\d)]) *({'|'.join(SCALE)})(?![A-Za-z])", lambda m: f"*10^{SCALE[m[1].lower()]}"),
    (BOTH, lambda m: f"{m[3]}{m[2].translate(TURNED)}{m[1]}{m[4]}{m[5]}"),  # 3 < x < 5
    (r"(?i),? +(?:or|and) +| *[或和] *", ", "),
    # A sign and the other.
    (r"^(.*±.*)$", lambda m: f"{m[1].replace('±', '+')}, {m[1].replace('±', '+-')}"),
    # A sentence around the answer.
    (rf"(?i)^ *(?:{LABEL}(?: is|[为是])? *:? *(?=\S))+", ""),
]


def flatten(text, rules=RULES):
    r"""An answer as a flat text in its own case: "5 cm" of 5\text{ cm}, «1, 2» of \{1, 2\}."""
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", r"^{\g<0>}", text.translate(BEFORE))
    text = re.sub("[₀-₉]+", r"_{\g<0>}", text)
    text = re.sub("[¼-¾⅓-⅞]", r"\\frac{\g<0>}", text)
    text = unicodedata.normalize("NFKC", text).translate(AFTER)
    for pattern, becomes in rules:
        text = re.sub(pattern, becomes, text)
    # Braces that are left only group.
    return text.translate(str.maketrans("{}", "()")).strip().rstrip(".,:; ")
