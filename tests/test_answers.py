"""When two answers are the same, kind by kind; every pair in both directions.

A pair that must not be equal matters more than one that must: a policy learns what is forgiven.
"""

import re

import pytest
from conftest import ROOT
from grading_table import TABLE

from plumbing import answers, latex
from plumbing.answers import verdict

RULES = [rule for section in latex.SECTIONS for rule in section]


def both_ways(a, b):
    """The verdict, which must not depend on which of the two is the truth."""
    assert verdict(a, b) is verdict(b, a), (a, b)
    return verdict(a, b)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule[2])
def test_a_rule_does_what_its_example_says(rule, monkeypatch):
    """It makes the first two answers equal, which they are not without it, and not the third."""
    written, equal, other = re.fullmatch("(.+) == (.+) != (.+)", rule[2]).groups()
    assert both_ways(written, equal) and not both_ways(written, other)
    others = [[r for r in section if r is not rule] for section in latex.SECTIONS]
    monkeypatch.setattr(answers, "flatten", lambda text: latex.flatten(text, others))
    assert not verdict(written, equal)


# Pairs by kind: "a == b" and "a != b".
PAIRS = {
    "choices": r"""
J. 5 cm == J
I: 5 == I
(J) 5 == J
J. 5 != I
A. 5 != J
I or J != I
i != j
A. [0,1] == A
A. [0,1] != B
A. (0,1) == A
A. \{1,2\} == A
B. \leq 3 == B
B. |x| == B
B. P(A) == B
B. P(A) != A
C. "yes" == C
D. -3 == D
D) -3 == D
(D) -3 == D
D. \infty == D
A. +5 == A
C:5 == C
C - 5 cm == C
C. \frac{1}{2} == C. 0.5
C. \frac{1}{2} != C. 0.4
\mathbf{A} == A
\textbf{(B)} == B
\textbf{B. } 5 == B
\mathsf{C} == C
\underline{D} == D
\boldsymbol{A} == A
**A** == A
**B.** 5 == B
"A" == A
“A” == A
`A` == A
**A** != B
"A" != B
答案：A == A
故选 B == B
A. [0,1] B. (0,1) != A
(A) or (B) != A
A. (B) != A
A and B != A
A, B, C, D != A
A/B != A
A|B != A
A+B != A
[A,B] != A
A - B != A
(A)+1 != A
A. 5 != 5
any != A
not A != A
A? != A
A, since 5 != A
""",
    "units": r"""
5 \Omega == 5
5\,\Omega == 5 ohms
5 Ω == 5 ohm
5 k\Omega == 5 kilohms
5 \Omega != 5 k\Omega
5 N·m == 5
5\ \mathrm{N\cdot m} == 5 N m
5 Nm == 5 N·m
5 \mu m == 5
5 \mu m == 5 micrometers
5 μm != 5 mm
9.8 m s^{-2} == 9.8 m/s^2
9.8\ \mathrm{m\,s^{-1}} == 9.8 m/s
9.8 m s^{-1} != 9.8 m s
4.2 J/(kg·K) == 4.2 J kg^{-1} K^{-1}
3 newtons == 3 N
3 newtons != 3 joules
3 J == 3 joules
3 W == 3 watts
3 kW == 3 kilowatts
3 MW != 3 mW
3 Pa == 3 pascals
3 kPa == 3
3 volts == 3 V
3 amperes == 3 A
3 kelvin == 3 K
0.1 mol == 0.1
0.1 mol/L == 0.1
20℃ == 20
20℃ == 20 degrees Celsius
20℃ == 20^\circ C
20℃ != 20℉
2 kWh == 2 kW·h
60 mph == 60 miles per hour
5 KM == 5 km
5厘米 == 5
5 厘米 == 5 cm
5平方厘米 == 5
5 平方厘米 == 5 cm^2
5立方米 == 5 m^3
5米/秒 == 5 m/s
5米每秒 == 5 m/s
5千克 == 5 kg
5公里 == 5 km
5元 == 5
5度 == 5^\circ
5秒 == 5 s
5小时 == 5 hours
5个 == 5
（5）厘米 == 5
5万元 == 50000
5万 != 5
5亿 == 5 \times 10^8
6厘米 != 5
5厘米 != 5米
5平方厘米 != 5立方厘米
5未知 != 5
\$5 != £5
\$5 == 5 dollars
-\$5 == -5
€5 million == 5 million euros
25 square meters == 25 m^2
25 cm squared == 25 cm^2
25 squared != 25
25 cubic cm == 25 cm^3
5 apples == 5
5 red apples == 5
5 people == 5
5 apples == 5 apples
5 apples != 5 pears
5 dozen == 5 dozen
5 dozen != 5 dozen eggs
5 million != 5
5 millions != 5
5 apple dozens != 5
5 not apples != 5
5 mod 3 != 5
5 choose 2 != 5
5k != 5
5 x != 5
5m != 5
5 m g h != 5
(x+1) m != x+1
(x+1) cm == x+1
x^2 m != x^2
5*m != 5
5/s != 5
5 per second != 5
5 per cent == 0.05
5 halfs != 5
220V == 220 V
2 \cos x != 2
5 something != 5
50 percentage points != 0.5
"""
    + "\n".join(
        f"5 {word} != 5"
        for word in "dozen dozens tenth tenths squared cubed factorial halves gross pairs thirds "
        "sevenths hundredths millionths zillions scores negative".split()
    ),
    "signs and sets": r"""
x \not= 3 != 3
x \not= 3 != x=3
x \ne 3 != 3
x != 3 != 3
x \not= 3 == x \neq 3
not x = 3 != 3
x is not = 3 != 3
\overline{A} != A
\bar{A} != A
\overline{A} == \overline{A}
\overline{A \cup B} != A \cup B
\overline{AB} == AB
\overline{AB} != AC
\vec{a} != a
A \wedge B != A \vee B
0.\overline{3} == 1/3
0.\bar{3} == \frac13
0.\dot{3} == \frac{1}{3}
0.\dot3 == 1/3
0.1\overline{6} == 1/6
2.\overline{45} == \frac{27}{11}
-0.\overline{3} == -\frac13
0.\dot{1}\dot{2} == \frac{4}{33}
0.\dot{1}2\dot{3} == 123/999
0.(3) == 1/3
2.5(3) == 7.5
2.5(3) != 2.5\overline{3}
0.\overline{3} != 0.3
0.\overline{3} != 0
0.\overline{9} == 1
0.\overline{3} != 0.33333333
3\overline{3} != 33
{1,2} == \{1,2\}
\{1,2\} == {2,1}
{1,2} != \{1,3\}
{1,2} != (1,2)
\{1,2\} != (1,2)
x \in {1,2} == {2,1}
{\frac12, 3} == \{3, 0.5\}
\{\} == \emptyset
{1,000} == 1000
{3} == 3
1{,}000 == 1000
""",
    "values": r"""
\sqrt{\frac{a}{b}} == \frac{\sqrt a}{\sqrt b}
\sqrt{ab} == \sqrt a \sqrt b
\ln(ab) == \ln a + \ln b
\ln\frac{a}{b} == \ln a - \ln b
\sqrt{x^3} == x\sqrt x
\sqrt{x^2} != x
|x| != x
|x| == \sqrt{x^2}
\ln(x^2) == 2\ln|x|
\ln|x| == \ln x
\sqrt{x^2} != -x
\sqrt{(x-1)^2} != x-1
\sqrt{x-5} == (x-5)^{1/2}
\sqrt{x-5} != \sqrt{x-4}
\arcsin x != \arccos x
\ln(ab) != \ln a \ln b
\sqrt{a+b} != \sqrt a+\sqrt b
(-1)^{n+1} == -(-1)^n
1/ab == \frac{1}{ab}
1/ab != b/a
5/mm != 5
5/mm != 5 mm
1/\ln x == \frac{1}{\ln x}
\pi(R^2-r^2) == \pi(R+r)(R-r)
\pi(R^2-r^2) != \pi(r^2-R^2)
\pi(R^2-r^2) != 0
2\pi \times 10^{-16} != \pi \times 10^{-16}
e^{-99} != 1.6\times10^{-19}
e^{-99} == \frac{1}{e^{99}}
\pi^{-99} != 6.63 \times 10^{-34}
2x\times10^{-19} != x\times10^{-19}
\frac{h}{4\pi}\times10^{-34} != \frac{h}{2\pi}\times10^{-34}
e^{-50} != 0
e^{-400} != 0
\pi\times10^{-300} != e\times10^{-300}
\sin^2 x+\cos^2 x-1+10^{-60} != 0
\frac{1}{0} != 5
\pi != 3.14159265358979
\sqrt{2} != 1.4142135623731
\frac13 != 0.3333333333333333333333333
2\sqrt{2}\times10^{-19} == \sqrt{8}\times10^{-19}
\sin^2 x+\cos^2 x-1 == 0
\sin(\pi) == 0
(1+i)^2 == 2i
\sqrt{-4} == 2i
\sqrt{-4} != 2
""",
    "intervals": r"""
x \in [2, \infty) == x \geq 2
x \in [2, \infty) == [2,\infty)
x \geq 2 == [2,\infty)
x \geq 2 != (2,\infty)
x \in (2, \infty) != x \geq 2
m \geq \sqrt{2} == m \in [\sqrt{2}, +\infty)
x \in (0,1) == 0<x<1
x \in (0,1) != 0\le x<1
x \in (0,1) != y \in (0,1)
x \geq 2 != m \geq 2
\mathbb{R} == (-\infty,\infty)
x \in \mathbb{R} == (-\infty,\infty)
\mathbb{R} == \text{all real numbers}
ℝ == (-\infty,\infty)
-\infty<x<\infty == \mathbb{R}
\mathbb{R} != [0,\infty)
\mathbb{R} != R
x>3 \text{ and } x<5 == 3<x<5
x<5 \text{ and } 3 \le x == [3,5)
x>3 \text{ and } x<5 != x>3 \text{ or } x<5
x<1 \text{ and } x>3 != x<1 \text{ or } x>3
x>3 \text{ and } y<5 != 3<x<5
""",
    "equations": r"""
2x+1=0 != x=-\frac12
2x=6 != x=3
x-3=0 != x=3
3=x == x=3
y-3=0 != y=3
2x-y+1=0 == y=2x+1
4x-2y+2=0 == y=2x+1
y=2x+1 != y=2x-1
x=y == y=x
x^2=9 != x=3
ax=6 != 6
\sqrt{x}=3 != 3
-x=3 != 3
P(X=2)=0.3 == 0.3
f(2)=5 == 5
\angle ABC=30^\circ == 30
\left\{\begin{array}{l} x=1 \\ y=2 \end{array}\right. == x=1, y=2
\begin{cases} x=1 \\ y=2 \end{cases} == y=2, x=1
\begin{cases} x & x>0 \\ -x & x<0 \end{cases} != \begin{cases} x & x<0 \\ -x & x>0 \end{cases}
""",
    "words": r"""
right-angled triangle == right angled triangle
-abc != abc
abc(d+e) != abcd+e
xyz-1 != xyz1
\lna--\lnb != \lna-\lnb
red circle != circle red
red cube 2 != red cube 3
""",
    "half an answer": r"""
0 \le x< != 0 \le x<1
x \ne != x \ne 3
\geq 2 != x \geq 2
3< != 3<x
x= != x=3
|x=3| != x=3
|x^2+y^2=25| != x^2+y^2=25
5|2 != 7
1,0 != 1,000
1,0z != 1,000
1,000 == 1000
1,050 != 1, 50
1,234 == 1, 234
1,234 == 1234
""",
    "as people write": r"""
5×10⁴ == 50000
6.02 × 10²³ == 6.02\times10^{23}
10⁻³ == 0.001
10⁻³ != 0.01
x⁴ == x^4
x₁ == x_1
x₁ != x_2
⅓ == 1/3
⅓ != 0.33
1⅓ == 4/3
30˚ == 30^\circ
∠A=30° == 30
3 x 10^5 == 300000
3x10^5 == 3 \times 10^5
3 X 10^{-2} == 0.03
3 x 10^5 != 3 \times 10^6
3x != 3
3x^2 != 3
**73** == 73
2**3 == 8
2**3**2 == 512
𝟕 == 7
twenty-one == 21
twenty-one != 19
{\bf 5} == 5
\frac{\pi}2 == \frac\pi2
5 6 != 5
5 6 != 56
red cube 2 3 != red cube 23
5;6 != 5
5-6 != 5
2024! != 2025!
""",
}


@pytest.mark.parametrize("pair", [p for pairs in PAIRS.values() for p in pairs.split("\n") if p])
def test_pairs(pair):
    a, sign, b = re.fullmatch("(.+) (==|!=) (.+)", pair).groups()
    assert both_ways(a, b) is (sign == "==")


def test_the_table_with_answer_and_truth_exchanged():
    assert [case for case in TABLE if verdict(case[1], case[0]) is not case[2]] == []


def rows_of_the_page():
    """(answer, [the same], [not the same]) of each row of the table in docs/grader.md."""
    rows = re.findall(r"^\|.*`.*\|$", (ROOT / "docs" / "grader.md").read_text(), re.M)
    for row in rows:
        _, _, *cells, _ = re.split(r"(?<!\\)\|", row)
        yield tuple([x.replace("\\|", "|") for x in re.findall("`(.*?)`", c)] for c in cells)


@pytest.mark.parametrize("answer, same, others", rows_of_the_page(), ids=lambda cell: cell[0])
def test_the_page_says_what_is_done(answer, same, others):
    (answer,) = answer
    assert same and others
    assert [x for x in same if not both_ways(answer, x)] == []
    assert [x for x in others if both_ways(answer, x)] == []


def test_the_page_has_a_row_for_every_kind():
    assert len(list(rows_of_the_page())) >= 25
