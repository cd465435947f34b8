"""Test that figures can be read on light and dark pages and that names do not overlap."""

from itertools import pairwise

import pytest
from page_colours import contrast

from benchmarks.plotting import (
    GREY,
    INK,
    PAGE,
    Name,
    apart,
    figure_at,
    plain_logarithmic,
    write_names,
)


@pytest.mark.parametrize(
    "heights, placed",
    [
        ([], []),
        ([0.1, 0.5], [0.1, 0.5]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.40, 0.45, 0.50], [0.35, 0.45, 0.55]),
        # the upper two move down into the lowest, and all three share the place
        ([0.42, 0.5, 0.52], [0.38, 0.48, 0.58]),
    ],
)
def test_heights_keep_their_order_and_distance(heights, placed):
    assert apart(heights, 0.1) == pytest.approx(placed)


def test_names_do_not_overlap_and_the_page_is_solid(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot
    from matplotlib.text import Text

    with figure_at(tmp_path / "plot.png", 1, figsize=(6, 3)) as (figure, axis):
        axis.set_yscale("log")
        plain_logarithmic(axis.yaxis)
        names = [Name(f"provider {n}", 2.0, 300.0 + n % 3, INK) for n in range(9)]
        for name in names:
            axis.plot([1, name.x], [100, name.y])
        write_names(axis, [*names, Name("floor", 2.0, 100.0, GREY)])
        figure.draw_without_rendering()
        ticks = [tick.get_text() for tick in axis.get_yticklabels()]
        boxes = [Text.get_window_extent(name) for name in axis.texts]  # without their lines
        boxes.sort(key=lambda box: box.y0)
        assert len(boxes) == 10
        assert all(above.y0 >= below.y1 - 3 for below, above in pairwise(boxes))
        assert all(box.x0 > axis.get_window_extent().x1 for box in boxes)
        assert all(box.x1 <= figure.bbox.x1 for box in boxes)
    assert {"100", "200"} <= set(ticks)
    picture = pyplot.imread(tmp_path / "plot.png")
    assert picture.shape[2] == 3 or picture[..., 3].min() == 1.0  # nothing shines through
    assert picture[0, 0, :3].tolist() == [1.0, 1.0, 1.0]


def test_the_style_is_readable():
    def levels(color):
        return tuple(bytes.fromhex(color[1:]))

    for color in (INK, GREY):
        assert contrast(levels(color), levels(PAGE)) >= 4.5
