"""--reward tagged: the whole answer has to be the name of the class."""

import pytest

from reward import score, tagged, well_tagged

WREN = "<think> small , brown </think> <answer> Wren </answer>"
ANSWERS = [
    (WREN, 1, 1),
    (WREN.replace("Wren", "the wren"), 0, 1),
    # The released rule finds the truth in each of these.
    (WREN.replace("Wren", "finch, wren, lark"), 0, 1),
    (WREN.replace("Wren", "not a wren"), 0, 1),
    (WREN.replace("Wren", "finch = wren"), 0, 1),
    (WREN.replace("Wren", "answer: wren"), 0, 1),
    (WREN.replace("Wren", "[wren]"), 0, 1),
    (WREN.replace(" Wren ", "\n WREN. "), 1, 1),
    ("<answer>wren</answer>", 1, 0),
    (WREN + " or a finch", 1, 0),
    (WREN + " <answer> finch </answer>", 0, 0),
    ("<think> a wren </think> \\boxed{wren}", 0, 0),
    ("<answer>" * 50000, 0, 0),
]
# A name is not calculated with: (answer, truth, the same?)
NAMES = [
    ("Boeing 747-100", "747-100", False),
    ("647", "747-100", False),  # as a sum they are equal
    ("CD-3", "DC-3", False),
    ("dc-3", "DC-3", True),
    ("B, A", "A, B", False),
    ("bird of paradise", "Bird_of_paradise", True),
    ("St.  Bernard", "St. Bernard", True),
    ("2.0", "2", False),
]


@pytest.mark.parametrize("response, accuracy, form", ANSWERS)
def test_a_class_has_to_be_the_whole_answer(response, accuracy, form, grader):
    (got,) = score([response], ["wren"], grader, "tagged")
    assert (got["accuracy"], got["format"]) == (accuracy, form)
    assert got["overall"] == pytest.approx(0.9 * accuracy + 0.1 * form)
    assert well_tagged(response) == form
    assert (tagged(response) is None) == ("</answer" not in response)


@pytest.mark.parametrize("answer, truth, same", NAMES)
def test_a_name_is_not_calculated_with(answer, truth, same, grader):
    response = f"<think> it is seen </think> <answer> {answer} </answer>"
    assert score([response], [truth], grader, "tagged")[0]["accuracy"] == same
