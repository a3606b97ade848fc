"""When two answers are the same, kind by kind; every pair in both directions.

A pair that must not be equal matters more than one that must: a policy learns what is forgiven.
"""

import builtins
import re

import pytest
from conftest import ROOT
from grading_table import TABLE
from sympy.parsing import sympy_parser

from plumbing.grading import answers, latex
from plumbing.grading.answers import equal_answers
from plumbing.grading.formulas import formula
from plumbing.grading.latex import flatten

# An answer, what is the same, what is not; two spaces part them, four the next answer.
PAIRS = r"""
# choices
A  ==  A. [0,1]  A. (0,1)  A. \{1,2\}  A. +5  \mathbf{A}  \boldsymbol{A}  **A**  "A"  “A”  `A`
A  ==  答案：A  !=  B. P(A)  A. [0,1] B. (0,1)  (A) or (B)  A. (B)  A and B  A, B, C, D  A/B  A|B
A  !=  A+B    A  !=  [A,B]  A - B  any  not A  A?  A, since 5
B  ==  B. \leq 3  B. |x|  B. P(A)  \textbf{(B)}  \textbf{B. } 5  **B.** 5  故选 B  !=  A. [0,1]
B  !=  **A**  "A"    D  ==  D. -3  D) -3  (D) -3  D. \infty  \underline{D}
C  ==  C. "yes"  C:5  C - 5 cm  \mathsf{C}    J  ==  J. 5 cm  (J) 5  !=  A. 5
I  ==  I: 5  !=  J. 5  I or J    C. \frac{1}{2}  ==  C. 0.5  !=  C. 0.4    i  !=  j    A. 5  !=  5
# units
5  ==  5 \Omega  5 N·m  5 \mu m  5厘米  5平方厘米  5元  5个  （5）厘米  5 red apples  !=  5万
5  !=  6厘米  5未知
5  !=  5 millions  5 apple dozens  5 not apples  5 mod 3  5 choose 2  5k  5 m g h  5*m  5/s
5  !=  5 per second  5 halfs  5 something  5 dozens  5 tenth  5 cubed  5 halves  5 gross  5 pairs
5  !=  5 thirds  5 sevenths  5 hundredths  5 millionths  5 zillions  5 scores  5 negative
5 dozen  ==  5 dozen  !=  5 dozen eggs    5 k\Omega  ==  5 kilohms  !=  5 \Omega
3 newtons  ==  3 N  !=  3 joules    0.1  ==  0.1 mol  0.1 mol/L    5 km  ==  5 KM  5公里
5 m/s  ==  5米/秒  5米每秒    5 apples  ==  5 apples    x+1  ==  (x+1) cm  !=  (x+1) m
5\ \mathrm{N\cdot m}  ==  5 N m    5 Nm  ==  5 N·m    5 \mu m  ==  5 micrometers    5 μm  !=  5 mm
9.8 m s^{-2}  ==  9.8 m/s^2    9.8\ \mathrm{m\,s^{-1}}  ==  9.8 m/s    9.8 m s^{-1}  !=  9.8 m s
4.2 J/(kg·K)  ==  4.2 J kg^{-1} K^{-1}    3 J  ==  3 joules    3 kW  ==  3 kilowatts
3 MW  !=  3 mW    3 Pa  ==  3 pascals    3 kPa  ==  3    3 amperes  ==  3 A
20℃  ==  20 degrees Celsius    2 kWh  ==  2 kW·h    60 mph  ==  60 miles per hour
5 平方厘米  ==  5 cm^2    5立方米  ==  5 m^3    5千克  ==  5 kg    5度  ==  5^\circ
5小时  ==  5 hours    5万元  ==  50000    5亿  ==  5 \times 10^8    5厘米  !=  5米
5平方厘米  !=  5立方厘米    \$5  !=  £5    -\$5  ==  -5    €5 million  ==  5 million euros
25 square meters  ==  25 m^2    25 cm squared  ==  25 cm^2    25 squared  !=  25
25 cubic cm  ==  25 cm^3    x^2 m  !=  x^2    5 per cent  ==  0.05    2 \cos x  !=  2
50 percentage points  !=  0.5
# signs and sets
3  ==  {3}  !=  x \not= 3  x \ne 3  x != 3  not x = 3  x is not = 3
0.\overline{3}  ==  1/3  !=  0.3  0  0.33333333    {1,2}  ==  \{1,2\}  !=  \{1,3\}  (1,2)
\overline{A}  ==  \overline{A}    1/3  ==  0.\dot3  0.(3)    2.5(3)  ==  7.5  !=  2.5\overline{3}
x \not= 3  ==  x \neq 3    \overline{A \cup B}  !=  A \cup B    \overline{AB}  !=  AC
\vec{a}  !=  a    A \wedge B  !=  A \vee B    0.\bar{3}  ==  \frac13    0.\dot{3}  ==  \frac{1}{3}
2.\overline{45}  ==  \frac{27}{11}    -0.\overline{3}  ==  -\frac13
0.\dot{1}\dot{2}  ==  \frac{4}{33}    0.\dot{1}2\dot{3}  ==  123/999    0.\overline{9}  ==  1
3\overline{3}  !=  33    x \in {1,2}  ==  {2,1}    {\frac12, 3}  ==  \{3, 0.5\}
\{\}  ==  \emptyset    {1,000}  ==  1000
# values
√12  ==  2\sqrt3  !=  2    \sin x^2  ==  \sin(x^2)  !=  \sin^2 x
\sin\omega t  ==  \sin(\omega t)  !=  t\sin\omega    \sin x e^{2x}  ==  e^{2x}\sin(x)
\ln x^2  ==  2\ln|x|    \ln e^2  ==  2    \binom{n}{2}  ==  \frac{n(n-1)}{2}
-2^2  ==  -4  !=  4    8/4/2  ==  1    2\times-3  ==  -6
1/2x  ==  \frac{x}{2}  !=  \frac{1}{2x}    2^{-1}x  ==  \frac x2    \sqrt[3]{-8}  ==  -2
\sqrt23  ==  3\sqrt2  !=  \sqrt{23}    x^2\frac12  ==  \frac{x^2}{2}    2\frac12x  ==  2.5x  !=  x
a_{n+1}  ==  a_{n + 1}  !=  a_n+1    0.7  !=  3.5.2
0  ==  \sin^2 x+\cos^2 x-1  \sin(\pi)  !=  e^{-50}  e^{-400}  \sin^2 x+\cos^2 x-1+10^{-60}
\ln(ab)  ==  \ln a + \ln b  !=  \ln a \ln b    \sqrt{x-5}  ==  (x-5)^{1/2}  !=  \sqrt{x-4}
1/ab  ==  \frac{1}{ab}  !=  b/a    5/mm  !=  5  5 mm    2i  ==  (1+i)^2  \sqrt{-4}
\sqrt{\frac{a}{b}}  ==  \frac{\sqrt a}{\sqrt b}    \sqrt{ab}  ==  \sqrt a \sqrt b
\ln\frac{a}{b}  ==  \ln a - \ln b    \sqrt{x^3}  ==  x\sqrt x    \ln(x^2)  ==  2\ln|x|
\ln|x|  ==  \ln x    \sqrt{(x-1)^2}  !=  x-1    \arcsin x  !=  \arccos x
\sqrt{a+b}  !=  \sqrt a+\sqrt b    (-1)^{n+1}  ==  -(-1)^n    1/\ln x  ==  \frac{1}{\ln x}
2\pi \times 10^{-16}  !=  \pi \times 10^{-16}    e^{-99}  ==  \frac{1}{e^{99}}
\pi^{-99}  !=  6.63 \times 10^{-34}    2x\times10^{-19}  !=  x\times10^{-19}
\frac{h}{4\pi}\times10^{-34}  !=  \frac{h}{2\pi}\times10^{-34}
\pi\times10^{-300}  !=  e\times10^{-300}    \frac{1}{0}  !=  5    \pi  !=  3.14159265358979
\sqrt{2}  !=  1.4142135623731    \frac13  !=  0.3333333333333333333333333
2\sqrt{2}\times10^{-19}  ==  \sqrt{8}\times10^{-19}
# intervals
x<5 \text{ and } x \geq 3  ==  [3,5)    x \not\in [1,2]  ==  x \notin [1,2]  !=  x \in [1,2]
x>=3  ==  x≥3  !=  x>3
x \geq 2  ==  x \in [2, \infty)  !=  (2,\infty)  x \in (2, \infty)  m \geq 2
x \in (0,1)  ==  0<x<1  !=  0\le x<1  y \in (0,1)    (-\infty,\infty)  ==  x \in \mathbb{R}  ℝ
\mathbb{R}  ==  -\infty<x<\infty  !=  [0,\infty)
x>3 \text{ and } x<5  ==  3<x<5  !=  x>3 \text{ or } x<5
m \geq \sqrt{2}  ==  m \in [\sqrt{2}, +\infty)    x<1 \text{ and } x>3  !=  x<1 \text{ or } x>3
x>3 \text{ and } y<5  !=  3<x<5
# equations
AB=CD  ==  CD=AB    3  !=  \sqrt{x}=3  -x=3    y-3=0  !=  y=3    4x-2y+2=0  ==  y=2x+1
x=y  ==  y=x    x^2=9  !=  x=3    ax=6  !=  6    P(X=2)=0.3  ==  0.3    f(2)=5  ==  5
\angle ABC=30^\circ  ==  30    \left\{\begin{array}{l} x=1 \\ y=2 \end{array}\right.  ==  x=1, y=2
\begin{cases} x=1 \\ y=2 \end{cases}  ==  y=2, x=1
\begin{cases} x & x>0 \\ -x & x<0 \end{cases}  !=  \begin{cases} x & x<0 \\ -x & x>0 \end{cases}
# words
right-angled triangle  ==  right angled triangle    -abc  !=  abc    abc(d+e)  !=  abcd+e
xyz-1  !=  xyz1    \lna--\lnb  !=  \lna-\lnb
# half an answer
x=3  !=  x=  |x=3|    1,000  !=  1,0  1,0z    0 \le x<  !=  0 \le x<1    x \ne  !=  x \ne 3
\geq 2  !=  x \geq 2    3<  !=  3<x    |x^2+y^2=25|  !=  x^2+y^2=25    5|2  !=  7
1,050  !=  1, 50    1,234  ==  1234
# as people write
+/-2  ==  2, -2  !=  2    5:30 pm  ==  5:30 PM    5  ==  {\bf 5}  !=  5 6  5;6  5-6
10⁻³  ==  0.001  !=  0.01    x₁  ==  x_1  !=  x_2    ⅓  ==  1/3  !=  0.33    3  !=  3x  3x^2
twenty-one  ==  21  !=  19    5×10⁴  ==  50000    6.02 × 10²³  ==  6.02\times10^{23}
x⁴  ==  x^4    1⅓  ==  4/3    ∠A=30°  ==  30    3 X 10^{-2}  ==  0.03    **73**  ==  73
2**3  ==  8    2**3**2  ==  512    𝟕  ==  7    \frac{\pi}2  ==  \frac\pi2    5 6  !=  56
red cube 2 3  !=  red cube 23    2024!  !=  2025!
"""


def pairs_of(line):
    """ "a  ==  b  !=  c    d  ==  e" -> (a, b, True), (a, c, False), (d, e, True)"""
    for group in line.split("    "):
        answer, *others = group.split("  ")
        for other in others:
            if other in ("==", "!="):
                equal = other == "=="
            else:
                yield answer, other, equal


def rows_of_the_page():
    """The pairs of each row of the table in docs/grader.md, as of a line of PAIRS."""
    for row in re.findall(r"^\|.*`.*\|$", (ROOT / "docs" / "grader.md").read_text(), re.M):
        cells = re.split(r"(?<!\\)\|", row)[2:5]
        (answer,), same, others = (re.findall("`(.*?)`", c.replace("\\|", "|")) for c in cells)
        yield "  ".join([answer, "==", *same, "!=", *others])


LINES = [line for line in PAIRS.split("\n") if line and line[0] != "#"]
PAGE = list(rows_of_the_page())
CASES = [pair for line in LINES + PAGE for pair in pairs_of(line)] + [case[:3] for case in TABLE]


def misjudged(cases):
    """Those with another equal_answers than they should have, whichever of the two is the truth."""
    return [
        (a, b) for a, b, equal in cases if not equal_answers(a, b) == equal_answers(b, a) == equal
    ]


@pytest.mark.parametrize("line", LINES + PAGE)
def test_pairs(line):
    assert not misjudged(pairs_of(line))


def test_the_table():
    assert not misjudged(case[:3] for case in TABLE)


def test_the_page_has_a_row_for_every_kind():
    assert len(PAGE) >= 25 and all("  ==  " in row and "  !=  " in row for row in PAGE)


def test_every_rule_is_needed(monkeypatch):
    """Without it, some pair is misjudged."""
    uses = {pattern: [] for pattern, _ in latex.RULES}
    for case in CASES:
        for text in case[:2]:
            flatten(text, [(p, noted(uses[p], case, becomes)) for p, becomes in latex.RULES])
    idle = []
    for pattern, cases in uses.items():
        rules = [rule for rule in latex.RULES if rule[0] != pattern]
        monkeypatch.setattr(answers, "flatten", lambda text, rules=rules: flatten(text, rules))
        if not any(equal_answers(a, b) is not equal for a, b, equal in cases):
            idle.append(pattern)
    assert not idle


def noted(cases, case, becomes):
    """What a rule puts in place of what it finds, as a function that also notes the case."""

    def replacement(m):
        cases.append(case)
        return becomes(m) if callable(becomes) else m.expand(becomes)

    return replacement


HOSTILE = r"""
x1.n(9)  x.n()  x.__class__  ().__class__.__base__.__subclasses__()  pi.evalf(50)  9.__class__
1.real  __import__('os').system('touch q')  open('q','w')  \text{open}('q','w')
\text{op}\text{en}('q','w')  \sqrt{o p e n('q','w')}  exec("open('q','w')")  lambda: 0
(lambda x: x)(1)  [x for x in (1,)]  {x:1}  f'{x}'  getattr(x,'n')  Symbol('x')  exit()  2exit()
\sin exit()  \mathrm{exit}(1)  test()  preview(x)  factorial(10^9)  a if b else c  x;y  x@y  x//y
x'  ｏｐｅｎ('q','w')  5!!  9^{9^{9^9}}  9**9**9**9  10^{-34!}  2^{100001}  (10^9)!  \binom{10^9}{5}
((9^{9999})^{9999})^{9999}  \pi^{\pi^{\pi^{\pi^{\pi}}}}  x^{x^{x^x}}
\sin(e^{e^x})  3+  (3  3)  |3  \frac{1}  \sqrt[3  x_
"""
NESTED = [
    *("(" * 140 + "1" + ")" * 140, "-" * 200 + "1", "2^" * 140 + "2", r"\ln" * 90 + "x"),
    *("|" * 140, r"\sqrt{" * 45 + "2", "(" * 290, "[" * 290),
]


@pytest.mark.parametrize(
    "text", [*re.split(" {2}|\n", HOSTILE.strip()), *NESTED], ids=lambda t: t[:30]
)
def test_what_is_hostile_is_not_a_formula(text, monkeypatch, tmp_path):
    """And so equal only to what is written the same, also within another answer."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError):
        formula(flatten(text))
    for answer in (text, f"1,{text}", f"x={text}", f"({text}, 2)", f"{text} cm"):
        assert not equal_answers(answer, "x=3") and not equal_answers("2x=6", answer)
    assert equal_answers(text, text) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["(" * 50 + "2" + ")" * 50, "2^{2^{2^2}}/2^{15}", "5000!/4999!/2500"]
)
def test_what_is_nested_or_large_but_not_too_much_is_read(text):
    assert equal_answers(text, "2")


def test_nothing_evaluates(monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("text was evaluated")

    for module, name in [
        *((builtins, name) for name in ("eval", "exec", "compile")),
        *((sympy_parser, name) for name in ("parse_expr", "eval_expr", "stringify_expr")),
    ]:
        monkeypatch.setattr(module, name, refused)
    assert not misjudged(CASES[::3])


def test_the_folder_imports_nothing_else_of_the_project():
    files = sorted((ROOT / "plumbing" / "grading").glob("*.py"))
    ours = "loss|papo|masking|policy|rollout|reward|train|eval"
    imports = rf"^(?:from|import) (?:{ours}|toy|plumbing(?!\.grading))\b"
    assert len(files) >= 5
    assert not [f.name for f in files if re.search(imports, f.read_text(), re.M)]
