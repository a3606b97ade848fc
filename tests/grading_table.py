"""Which answers are right: (what the box holds, ground truth, right?, why), written by hand.

All but the last two sections were written before reward.py had read a single one; those two collect
what other answers then taught.

The principles. Right is what a teacher who knows only the ground truth would accept as the same
answer:
- the same value in another form is right: fractions need not be reduced, decimals count when they
  are exact, never when rounded;
- a unit may be missing, but if both name one it must be the same; units are not converted;
- 50% is right for 50 (the question asked for per cent) and for 0.5 (the value);
- brackets count: open or closed, tuple or set; order counts within ( ) and [ ], not within { } or
  in a bare list;
- "x =" may be missing, but x is not y; a letter of a choice may come with its text;
- upper and lower case are the same, as for the released grader.

The pairs are grading_table.jsonl: [answer, truth, right?, why] a line, and lines that name what the
next ones are of. BOXES are (response, what its box holds or None, why).
"""

import json
from pathlib import Path

LINES = Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
TABLE = [tuple(row) for row in map(json.loads, LINES) if isinstance(row, list)]

BOXES = [
    ("\\boxed{3}", "3", "simple"),
    ("so \\boxed{ 3 }.", "3", "spaces"),
    ("\\boxed{1} then \\boxed{2}", "2", "the last one counts"),
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", "braces inside"),
    ("\\boxed{\\boxed{4}}", "4", "nested: the inner one is the last to begin"),
    ("\\boxed{\\{1,2\\}}", "\\{1,2\\}", "a set"),
    ("\\boxed{}", "", "empty"),
    ("", None, "nothing"),
    ("the answer is 3", None, "no box"),
    ("\\boxed{3", None, "never closed"),
    ("\\boxed{1} \\boxed{2", None, "the last one is never closed"),
    ("\\boxed{\\frac{1}{2}", None, "one brace short"),
    ("\\boxed 3", None, "no braces: not what was asked for"),
    ("\\boxed(3)", None, "wrong brackets"),
    ("\\boxed {3}", None, "a space before the brace: as the released code"),
    ("\\fbox{3}", None, "another command"),
    ("boxed{3}", None, "no backslash"),
    ("<think> \\boxed{1} </think> \\boxed{2}", "2", "after the thought"),
    ("<think> \\boxed{1} </think> 2", "1", "only in the thought: as the released code"),
    ("\\boxed{2} and {not this}", "2", "braces afterwards"),
    ("{\\boxed{2}}", "2", "braces around"),
    ("$$\\boxed{x^{2}}$$", "x^{2}", "in display math"),
    ("\\boxed{\\text{A}}", "\\text{A}", "text"),
    ("\\boxed{1\n2}", "1\n2", "two lines"),
    ("\\boxed{{{3}}}", "{{3}}", "many braces"),
    ("\\boxed{1 \\\\{2}}", "1 \\\\{2}", "a line break, and then a brace"),
]
