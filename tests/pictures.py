"""Checks that a figure can be read: whole texts that do not overlap, and a legend of all marks."""

from itertools import combinations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import same_color

SLACK = 1.0  # pixels by which boxes may touch


def shown_texts(figure):
    """All texts of a figure that are drawn, without ticks beyond the limits of their axis."""
    texts = [figure._suptitle] if figure._suptitle else []
    for axis in figure.axes:
        if not axis.get_visible():
            continue
        if axis.axison:
            texts += [axis.xaxis.label, axis.yaxis.label]
            for ticks, limits, at in (
                (axis.get_xticklabels("both"), axis.get_xlim(), 0),
                (axis.get_yticklabels("both"), axis.get_ylim(), 1),
            ):
                low, high = sorted(limits)
                texts += [tick for tick in ticks if low <= tick.get_position()[at] <= high]
        texts += [axis.title, axis._left_title, axis._right_title, *axis.texts]
    texts += [text for legend in legends(figure) for text in legend.get_texts()]
    return [text for text in texts if text.get_visible() and text.get_text().strip()]


def legends(figure):
    """The legends of a figure and of its axes."""
    return [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]


def assert_readable(figure, all_lines=True):
    """Check the size, the texts and the legends of a figure; `all_lines` need one."""
    assert figure.bbox.width >= 1200
    figure.set_dpi(90)  # half the pixels take a quarter of the time
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [(text, text.get_window_extent(renderer)) for text in shown_texts(figure)]
    for text, box in boxes:
        assert text.get_fontsize() >= 8, text
        inside = box.x0 >= -SLACK and box.y0 >= -SLACK
        inside &= box.x1 <= figure.bbox.x1 + SLACK and box.y1 <= figure.bbox.y1 + SLACK
        assert inside, f"clipped: {text}"
    for (a, first), (b, second) in combinations(boxes, 2):
        width = min(first.x1, second.x1) - max(first.x0, second.x0)
        height = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert min(width, height) <= SLACK, f"overlap: {a} and {b}"
    assert_legends(figure, all_lines)


def assert_legends(figure, all_lines):
    """Check that each label is in a legend, and that lines without one share a labelled colour."""
    listed = {text.get_text() for legend in legends(figure) for text in legend.get_texts()}
    labelled = []
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        assert set(labels) <= listed, set(labels) - listed
        labelled += [color_of(handle) for handle in handles]
    for axis in figure.axes:
        if axis.axison and all_lines:
            for line in axis.lines:
                found = any(same_color(line.get_color(), color) for color in labelled)
                assert found, f"no legend: {line}"


def color_of(handle):
    """The colour of a line, of the points of an errorbar, or of an area."""
    if hasattr(handle, "get_color"):
        color = handle.get_color()
    elif hasattr(handle, "lines"):
        color = handle.lines[0].get_color()
    else:
        color = handle.get_facecolor()
    return color[0] if getattr(color, "ndim", 1) == 2 else color
