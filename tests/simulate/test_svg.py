"""Charts: well-formed, inside their frame, round axes."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from aserve.simulate.svg import line_chart, log_ticks, ticks

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("log_y", [False, True])
def test_lines_stay_inside_the_frame_and_rise_upwards(log_y: bool) -> None:
    series = {"up & <down>": [(1.0, 3.0), (2.0, 30.0), (5.0, 470.0)], "flat": [(1.0, 7.0), (5.0, 7.0)]}
    root = ElementTree.fromstring(line_chart("A <title>", "x", "y", series, log_y=log_y))
    assert [text.text for text in root.iter(f"{SVG}text") if "<" in (text.text or "")] == [
        "A <title>",
        "up & <down>",
    ]
    drawn = [path.get("d", "") for path in root.iter(f"{SVG}path") if path.get("stroke-width") == "2"]
    assert len(drawn) == 2
    numbers = [[float(each) for each in re.findall(r"[\d.]+", path)] for path in drawn]
    for line in numbers:
        assert all(70 <= x <= 700 for x in line[::2]) and all(62 <= y <= 350 for y in line[1::2])
    assert numbers[0][1] > numbers[0][3] > numbers[0][5]
    assert numbers[1][1] == numbers[1][3]


def test_one_point_and_no_point() -> None:
    ElementTree.fromstring(line_chart("t", "x", "y", {"dot": [(3.0, 0.0)]}))
    for wrong in ({}, {"a": []}, {"a": [(0.0, math.nan)]}):
        with pytest.raises(ValueError):
            line_chart("t", "x", "y", wrong)
    with pytest.raises(ValueError):
        line_chart("t", "x", "y", {"a": [(1.0, 0.0)]}, log_y=True)


def test_ticks_are_round_and_cover() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.13, 0.97)[0] == 0.0 and ticks(0.13, 0.97)[-1] == 1.0
    assert log_ticks(3, 470) == [2, 5, 10, 20, 50, 100, 200, 500]
    for low, high in ((1.0, 1.0), (5.0, 7.0), (-3.0, 1e6)):
        found = ticks(low, high)
        assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 11
