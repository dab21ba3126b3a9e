"""
A figure of runs, from their logs: BrierLM over FLOPs, written as SVG.
Nothing here is needed to understand CALM.
"""
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path

from data.checkpoint import read_log
from data.console import fail

X_LABELS = {"flops": "training FLOPs", "inference_flops": "inference FLOPs per token"}
# Colours that colour-blind readers tell apart, too; the markers differ as well.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9")
WIDTH = 720
HEIGHT = 440
LEFT = 56        # edges of the plot; its upper one depends on the legend
RIGHT = 696
BOTTOM = 388
FONT = 14        # pixels; a character is about 0.6 of it wide


@dataclass
class Point:
    x: float          # FLOPs
    score: float      # BrierLM, or what the y axis says
    name: str         # CALM K = 4, or AR


@dataclass
class Series:
    """What is drawn as one line."""
    name: str
    points: list[Point]


# --- From logs to series -------------------------------------------------------------------


def read_series(folder, x):
    """A run gives a line through its evaluations, CALM's and AR's; a folder of runs gives a line
    through the ends of its runs -> list of Series.

    x: "flops" spent in training, or "inference_flops" of a token, which only the end of a run has.
    """
    folder = Path(folder)
    logs = sorted(folder.glob("*/log.jsonl"))
    found = {"calm": [], "ar": []}
    if logs:
        for log in logs:
            for stage, points in evaluations(log, x, only_final=True).items():
                found[stage] += points[-1:]   # of a resumed run the last
    elif (folder / "log.jsonl").is_file():
        found = evaluations(folder / "log.jsonl", x)
    if not any(found.values()):
        fail(f"{folder} has no evaluation with BrierLM yet, or is no run: train, "
             "or lower --eval_interval")

    series = []
    for points in found.values():
        names = {point.name for point in points}
        if points:
            name = names.pop() if len(names) == 1 else "CALM"   # of several K
            series.append(Series(name, sorted(points, key=lambda point: point.x)))
    return series


def evaluations(log, x, only_final=False):
    """The evaluations in a log -> {"calm": points, "ar": points}."""
    found = {"calm": [], "ar": []}
    for entry in read_log(log):
        if "brierlm" not in entry or entry.get(x, 0) <= 0:
            continue
        if only_final and "final" not in entry:
            continue
        name = "AR"
        if entry["stage"] == "calm":
            name = f"CALM K = {entry['chunk_size']}" if "chunk_size" in entry else "CALM"
        found[entry["stage"]].append(Point(entry[x], entry["brierlm"], name))
    return found


def plot(path, folders, x):
    """Write the figure of runs, or folders of runs, to a new SVG file."""
    lines = []
    for folder in folders:
        for series in read_series(folder, x):
            lines.append((series, Path(folder).name))
    names = [series.name for series, _ in lines]
    for series, folder in lines:
        if names.count(series.name) > 1:
            series.name += f" ({folder})"
    drawn = [series for series, _ in lines]
    drawn.sort(key=lambda series: -series.points[-1].score)   # best first
    with open(path, "x", encoding="utf-8", errors="replace") as file:   # never over another file
        file.write(draw(drawn, X_LABELS[x], "BrierLM"))
    print(f"{len(drawn)} lines in {path}")


# --- From series to SVG --------------------------------------------------------------------


def draw(series, x_label, y_label):
    """A list of Series -> the text of an SVG: a logarithmic x axis, scores from 0 upwards."""
    points = [point for line in series for point in line.points]
    legend, top = legend_above(series)
    y_ticks = linear_ticks(max(point.score for point in points))
    x_low = min(point.x for point in points) / 1.2
    x_high = max(point.x for point in points) * 1.2

    def place(x, score):
        """-> where it lies on the sheet, in pixels."""
        along = math.log(x / x_low) / math.log(x_high / x_low)
        return LEFT + (RIGHT - LEFT) * along, BOTTOM - (BOTTOM - top) * score / y_ticks[-1]

    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
           f'font-family="sans-serif" font-size="{FONT}">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *legend]
    for tick in y_ticks:
        y = place(x_low, tick)[1]
        svg += [segment(LEFT, y, RIGHT, y, "#e4e4e4"), text(LEFT - 8, y + 5, f"{tick:g}", "end")]
    for tick in log_ticks(x_low, x_high):
        x = place(tick, 0)[0]
        digit, exponent = f"{tick:.0e}".split("e")
        label = f"{digit}e{int(exponent)}"
        svg += [segment(x, top, x, BOTTOM, "#e4e4e4"), text(x, BOTTOM + 20, label, "middle")]
    svg += [segment(LEFT, top, LEFT, BOTTOM, "black"),
            segment(LEFT, BOTTOM, RIGHT, BOTTOM, "black"),
            text(8, top - 14, y_label),
            text((LEFT + RIGHT) / 2, BOTTOM + 44, x_label, "middle")]

    corners = [[place(point.x, point.score) for point in line.points] for line in series]
    for i, line in enumerate(corners):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
        svg.append(f'<polyline points="{path}" fill="none" stroke="{color(i)}" stroke-width="2"/>')
        svg += [marker(i, x, y) for x, y in line]
    svg += point_labels(series, corners)
    return "\n".join([*svg, "</svg>"]) + "\n"


def legend_above(series):
    """The legend, in as many rows as it needs -> SVG elements, the y at which the plot begins."""
    svg = []
    x = LEFT
    y = 22
    for i, line in enumerate(series):
        width = 44 + 0.6 * FONT * len(line.name)
        if x + width > RIGHT and x > LEFT:   # the next row
            x = LEFT
            y += 24
        svg += [segment(x, y, x + 24, y, color(i), 2), marker(i, x + 12, y),
                text(x + 32, y + 5, line.name)]
        x += width
    return svg, y + 44


def point_labels(series, corners):
    """K beside each point of a line that mixes several, where there is room -> SVG elements."""
    taken = []   # boxes that are full: along the lines, and labels
    for line in corners:
        for (x, y), (next_x, next_y) in zip(line, line[1:] + line[-1:]):
            for i in range(20):
                px = x + (next_x - x) * i / 20
                py = y + (next_y - y) * i / 20
                taken.append((px - 6, py - 6, px + 6, py + 6))
    svg = []
    for i, line in enumerate(series):
        if len({point.name for point in line.points}) == 1:
            continue
        for point, (x, y) in zip(line.points, corners[i]):
            label = point.name.removeprefix("CALM ")
            half = 0.3 * FONT * len(label)
            places = [(x + 6 + half, y + 16), (x - 6 - half, y - 16),
                      (x + 6 + half, y - 16), (x - 6 - half, y + 16),
                      (x, y + 18), (x, y - 18), (x + 12 + half, y), (x - 12 - half, y)]
            for cx, cy in places:
                box = (cx - half, cy - 6, cx + half, cy + 6)
                if LEFT < box[0] and box[2] < RIGHT and not any(overlap(box, b) for b in taken):
                    break
            taken.append(box)
            svg.append(text(cx, cy + 5, label, "middle", color(i)))
    return svg


def overlap(a, b):
    """Do two boxes (left, top, right, bottom) share a point?"""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def linear_ticks(high):
    """From 0 to at least `high`, in at most eight steps of 1, 2 or 5 times a power of ten."""
    step = 1e-3
    for factor in (2, 2.5, 2) * 20:   # 1, 2, 5, 10, 20, 50, ...
        if high <= 8 * step:
            break
        step *= factor
    return [i * step for i in range(math.ceil(high / step) + 1)]


def log_ticks(low, high):
    """1, 2 and 5 times the powers of ten from low to high; only the powers where that is many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0 ** power for power in powers for m in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) > 14:
        ticks = [tick for tick in ticks if round(math.log10(tick), 9).is_integer()]
    return ticks


def color(i):
    return COLORS[i % len(COLORS)]


def segment(x1, y1, x2, y2, stroke, width=1):
    return (f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}" '
            f'stroke-width="{width}"/>')


def text(x, y, content, anchor="start", fill="black"):
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">'
            f'{escape(content)}</text>')


def marker(i, x, y):
    """A circle, square, triangle or diamond at (x, y) in the colour of line i."""
    if i % 4 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{color(i)}"/>'
    shapes = {1: [(-5, -5), (5, -5), (5, 5), (-5, 5)], 2: [(0, -6), (6, 5), (-6, 5)],
              3: [(0, -7), (7, 0), (0, 7), (-7, 0)]}
    corners = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in shapes[i % 4])
    return f'<polygon points="{corners}" fill="{color(i)}"/>'
