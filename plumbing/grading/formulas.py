r"""A formula as an expression of sympy, and when two of them have the same value.

Nothing evaluates text. A formula is read from left to right by recursive descent, its operators by
precedence climbing: its numbers and letters become sympy's numbers and symbols, and the only names
that are functions are those of FUNCTIONS.
"""

import operator
import random
import re
from fractions import Fraction

import sympy

FUNCTIONS = {"sqrt": sympy.sqrt, "abs": sympy.Abs, "exp": lambda x: raised(sympy.E, x)}
FUNCTIONS |= {"log": sympy.log, "ln": sympy.log, "lg": lambda x: sympy.log(x, 10)}
FUNCTIONS |= {"sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "cot": sympy.cot}
FUNCTIONS |= {"sec": sympy.sec, "csc": sympy.csc, "arcsin": sympy.asin, "arccos": sympy.acos}
FUNCTIONS |= {"arctan": sympy.atan}
CONSTANTS = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I}
GREEK = "alpha beta gamma delta theta lambda mu rho sigma tau phi omega".split()
KNOWN = "|".join([*FUNCTIONS, "pi", *GREEK])
VARIABLE = rf"(?:pi|{'|'.join(GREEK)}|[a-df-z])(?:_.*)?"
WORD = re.compile(rf"(?i)(?<![a-z\\])(?!(?:{KNOWN})(?![a-z]))[a-z]{{3,}}")  # of no formula
MIXED = r"(?<![\w.^)/])\d+ *(?:\\frac(?: *(?:\(\d+\)|\d)){2}| +\d+ */ *\d+(?![\w.]))"  # 1 1/2
SINGLE = r"(?<=\\frac)\d|(?<=\\frac\d)\d|(?<=\\sqrt)\d"  # \frac12 is a half
REPEATING = r"\d*\.\d*\\overline\(\d+\)"
NUMBER = r"\d+(?:\.\d+|\.(?![a-z(]))?(?:e[+-]?\d\d?(?!\d))?|\.\d+"
NAME_TOKEN = rf"log_\d|(?:(?:{KNOWN})(?![a-z])|[a-z])(?:_(?:\d+|[a-z]|\([^()]*\)))?|\\[a-z]+"
TOKEN = re.compile(rf"(?ai){MIXED}|{SINGLE}|{REPEATING}|{NUMBER}|{NAME_TOKEN}|\S")
DIGIT = "0123456789."
DEEPEST = 60  # expressions within each other
TALLEST = 2  # exponents within each other: one more, and a value has more digits than fit
BITS = 100_000  # of a power of numbers
DIGITS = 400  # of a value; what is below SMALLEST are terms that cancelled
SMALLEST, ERROR = sympy.Float("1e-350"), sympy.Float("1e-300")  # ERROR is relative


def formula(text):
    """A flat formula (latex.py) as an expression of sympy. Upper and lower case are the same; but
    where a letter is there in both, the capital is another: pi(R^2-r^2). Raises ValueError for what
    is no formula, is nested too deeply or has too many digits."""
    spelled = re.sub(r"\|([^|]*)\|", r" abs(\1)", text.replace("**", "^"))
    spelled = re.sub(r"(?i)/ *(?!ln|lg)([a-z]{2})(?![a-z_^!(])", r"/(\1)", spelled)  # 1/ab
    if WORD.search(text):
        raise ValueError(f"not a formula: {text}")
    tokens = [token[0] for token in TOKEN.finditer(spelled)]
    tokens = [token if token.lower() in tokens else token.lower() for token in tokens]
    return FormulaReader(["$", *reversed(tokens)]).expression(until="$")


class FormulaReader(list):
    """Tokens that are still to be read, the next one last, and "$" for the end."""

    depth, behind_number = 0, False

    def take(self, *wanted):
        """Read the next token if it is one of these; else return ""."""
        return self.pop() if self[-1] in wanted else ""

    def expression(self, level=0, until=""):
        """What stands next, as far as its operators are stronger than `level`; then a bracket."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError("nested too deeply")
        sign = self.take("+", "-")
        left = self.expression(3) if sign else self.atom()
        left = -left if sign == "-" else left
        while (strength := self.strength()) > level:
            sign = self.take(*OPERATORS)
            if not sign and self.behind_number and self[-1][0] in DIGIT:
                raise ValueError("two numbers side by side")
            right = self.expression(strength - (sign == "^"))  # powers from the right
            left = OPERATORS[sign or "*"][1](left, right)
        if until and not self.take(until):
            raise ValueError(f"{until} is missing before {self[-1]}")
        self.depth -= 1
        return left

    def strength(self):
        """How strong the next operator is; a product needs no sign. 0 if there is none."""
        return OPERATORS.get(self[-1], (2 if re.match(r"[a-zA-Z\d.(\\]", self[-1]) else 0,))[0]

    def atom(self):
        """A number, a name, a bracket, a function or a command, perhaps with its factorial."""
        token = self.pop()
        name, _, subscript = token.partition("_")
        if token[0] in DIGIT:
            found = read_number(token)
        elif token == "(":
            found = self.expression(until=")")
        elif token == r"\sqrt":
            index = self.expression(until="]") if self.take("[") else sympy.Integer(2)
            found = sympy.real_root(self.expression(4), index)
        elif token in TWO_ARGUMENTS:
            found = TWO_ARGUMENTS[token](self.expression(4), self.expression(4))
        elif name.lower() in FUNCTIONS:
            found = self.function(name.lower(), [formula(subscript)] if subscript else [])
        elif re.match("[a-zA-Z]", name):
            found = CONSTANTS.get(token, sympy.Symbol(re.sub("[()]", "", token)))
        else:
            raise ValueError(f"a number or a name is missing before {token}")
        self.behind_number = token[0] in DIGIT
        return factorial(found) if self.take("!") else found

    def function(self, name, base):
        """sqrt 2, log_2(8), sin^2 x, sin^(-1) x for arcsin x. Without brackets sin 2xy is sin(2xy),
        but not sin x e^x."""
        exponent = self.expression(4) if self.take("^") else sympy.Integer(1)
        if exponent == -1 and f"arc{name}" in FUNCTIONS:
            name, exponent = f"arc{name}", sympy.Integer(1)
        if not exponent.is_Integer or exponent < 1:
            raise ValueError(f"not a power of a function: {exponent}")
        whole = name == "sqrt" or self[-1] == "("
        argument = self.expression(4 if whole else 3)
        while not whole and re.fullmatch(VARIABLE, self[-1], re.I):
            argument *= self.expression(3)
        low_enough(argument)
        return raised(FUNCTIONS[name](argument, *base), exponent)


def read_number(token):
    r"""3, .5, 1e-3; 0.1\overline(6); and the sums 1\frac(1)(2) and 1 1/2"""
    if mixed := re.fullmatch(r"(\d+) *( \d.*|\\frac.*)", token):
        return int(mixed[1]) + formula(mixed[2])
    digits, _, again = token.partition(r"\overline")
    found, again, places = Fraction(digits), again.strip("()"), len(digits.partition(".")[2])
    if again:
        found += Fraction(int(again), (10 ** len(again) - 1) * 10**places)
    return sympy.Rational(*found.as_integer_ratio())


def factorial(n):
    low_enough(n, 0)
    if n.is_number and abs(n) > BITS / 20:
        raise ValueError("too many digits")
    return sympy.factorial(n)


def height(x):
    """How many exponents that are no numbers stand within each other: two in e^(x^x)."""
    inner = [power.args[-1] for power in x.atoms(sympy.Pow, sympy.exp, sympy.factorial)]
    return max((1 + height(y) for y in inner if not y.is_Rational), default=0)


def low_enough(x, most=TALLEST - 1):
    """Raises ValueError if x is too high for an exponent, or the argument of a function."""
    if height(x) > most:
        raise ValueError("a tower of powers")


def raised(base, exponent):
    bits = base.p.bit_length() + base.q.bit_length() if base.is_Rational else 1
    low_enough(exponent)
    if exponent.is_number and abs(exponent) * bits > BITS:
        raise ValueError("too many digits")
    return base**exponent


# What is stronger is computed first; a sign has strength 3.
OPERATORS = {"+": (1, operator.add), "-": (1, operator.sub), "*": (2, operator.mul)}
OPERATORS |= {"/": (2, operator.truediv), "^": (4, raised)}
TWO_ARGUMENTS = {r"\frac": operator.truediv}
TWO_ARGUMENTS[r"\binom"] = lambda n, k: factorial(n) / (factorial(k) * factorial(n - k))


def equal_values(x, y, ratio=False):
    """Whether two expressions have the same value, or with `ratio` a constant ratio, wherever both
    are real. They are compared at 12 points, 6 of them of any signs, so |x| is not x. If they are
    real at fewer than four, or have an i, their complex values have to be the same. Raises
    ValueError if a value is infinite."""
    if x.is_Rational and y.is_Rational and not ratio:
        return x == y
    names, rng = sorted(x.free_symbols | y.free_symbols, key=str), random.Random(0)
    u, v, real, everywhere = 1, 1, 0, True
    for k in range(12 if names else 1):
        # Odd fractions, never whole, so two formulas that agree there agree everywhere.
        sizes = [(2, 1, 14)[k % 3] * sign for sign in (1, 1 if k < 6 else -1)]
        at = {s: sympy.Float(rng.randrange(11, 97) * rng.choice(sizes), DIGITS) / 97 for s in names}
        p, q = (expression.subs(at).evalf(DIGITS) for expression in (x, y))
        if not (p.is_finite and q.is_finite):
            raise ValueError("a value is infinite")
        p, q = (z if abs(z) > SMALLEST else sympy.Integer(0) for z in (p, q))
        if ratio and k == 0:
            u, v = p, q
        fits = bool(u != 0 != v and abs(p * v - q * u) <= ERROR * abs(p * v))
        if all(abs(z.as_real_imag()[1]) <= ERROR * abs(z) for z in (p, q)):
            if not fits:
                return False
            real += 1
        everywhere = everywhere and fits
    return everywhere or real >= 4 and not (x.has(sympy.I) or y.has(sympy.I))
