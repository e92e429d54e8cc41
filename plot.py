"""
The pictures, from CSV files alone. Each is written into the folder of its files.

    python plot.py out/                             a sweep's folder
    python plot.py out/ assets/paper_readings.csv   with the paper's P* as stars in collapse.png
    python plot.py out/ out/contrast.csv            with the prediction of P* from the rules alone
    python plot.py 0.csv 1.csv                      traces of data2vec.py, or of predictor.py
    python plot.py contrast.csv                     from grammar.py --contrast --csv contrast.csv

  samples_vs_depth.png   P* against depth: line style and marker show the learner, the colour its
                         target; P* of the root has its own panel
  methods.png            if a size has one depth and there is no collapse.png: P* of all methods
  collapse.png           for a method with several m, at its largest such depth: accuracy of level
                         L-1 against P, P/(v m^3) and P over another law (figures 3 and 11)
  phases.png             when each level rises while a network is trained, and from how many
                         strings if the traces are of several P (the paper's figures 5, 10, 13)
  contrast.png           how far apart parents' contexts are on each level, for each target
  prediction.png         P* of clustering against the P at which noise equals that distance

All files are read and checked before anything is drawn.
"""

import argparse
import csv
import io
import logging
import math
import os
import re
import sys
import textwrap
from pathlib import Path

import numpy as np

# light and dark enough to be told apart in grey, and by colour-blind eyes
COLOURS = {"latent": "#005a9c", "token": "#d55e00", "root": "#000000", "joint": "#5cc8a5"}
SPARE_COLOURS = ("#aa3377", "#e6b000", "#7fb8e8", "#7a6a53", "#999999")
LINES = {"cluster": ("-", "o"), "predictor": ("--", "s"), "data2vec": (":", "^")}
SPARE_LINES = (("-.", "D"), ("-.", "v"), ("-.", "P"), ("-.", "X"))
MARKERS = "osD^vPX*"

# targets as legends name them; the paper's name of a learner -> ours
NAMES = {"latent": "own latents", "token": "tokens", "root": "labels"}
PAPER = {"ilc": "cluster", "slc": "predictor", "data2vec": "data2vec"}

LAWS = {  # a law of P*: its power of m at depth L
    "v\\,m^2": lambda L: 2,
    "v\\,m^3": lambda L: 3,
    "v\\,m^L": lambda L: L,
    "v\\,m^{L+1}": lambda L: L + 1,
}
OWN_LAW = {"joint": "v\\,m^2", "root": "v\\,m^L", "token": "v\\,m^{L+1}"}  # of others: v m^3

# why P* is only bounded: the sign at its open marker
BEYOND = {
    "beyond the ladder": "\u2191", "limited by steps": "\u2191s",
    "limited by memory": "\u2191m", "not finished": "\u2191?",
}
SIGNS = BEYOND | {"below Pmin": "\u2193"}
STYLE = {
    "font.size": 12, "axes.titlesize": 12, "figure.titlesize": 13, "figure.labelsize": 11,
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "savefig.bbox": "tight", "savefig.dpi": 130,
}


# --------------------------------------------------------------------------------------------------
# read and check


KINDS = {  # the columns that tell what a file is
    "depth": ["method", "v", "s", "m", "L", "P50", "P50_lo", "P50_hi"],
    "runs": ["method", "v", "s", "m", "L", "P", "seed", "level", "accuracy"],
    "contrast": ["v", "s", "m", "L", "target", "level", "contrast", "P_noise"],
    "paper": ["method", "v", "s", "m", "L", "target", "P_star"],
    "data2vec": ["step", "unseen 1", "synonyms 1"],
    "predictor": ["step", "accuracy 1", "prediction 1"],
}
MISSING = {  # the cells of columns that some files lack
    "zipf": "0", "status": "", "root_P50": "", "root_P50_lo": "", "root_P50_hi": "",
}
LIMITS = {  # type, lowest and highest number of a column; "unseen" is that of "unseen 1"
    "v": (int, 2, 2**16), "s": (int, 2, 2**16), "m": (int, 1, 2**31), "L": (int, 2, 24),
    "P": (int, 1, 10**15), "seed": (int, 0, 10**15), "level": (int, 0, 24),
    "step": (int, 0, 10**15), "zipf": (float, 0, 1000), "contrast": (float, 0, 1e9),
    "accuracy": (float, 0, 1), "unseen": (float, 0, 1), "synonyms": (float, -1e9, 1e9),
    "prediction": (float, -1e9, 1e9), "P_star": (float, 1e-9, 1e18),
    "P_noise": (float, 0, math.inf),
    "P50_lo": (float, 1e-9, 1e18), "P50_hi": (float, 1e-9, 1e18),
}


def check(column, text):
    """A cell -> its value. Raises ValueError that says what its column may have.

    P50: "413" becomes ("=", 413.0), "> 4096" (">", 4096.0), empty or "?" ("", nan)."""
    if column in ("method", "target"):
        # a picture would take $ for a formula
        if not re.fullmatch(r"[\w.+=:()^-]+", text):
            raise ValueError("must be a name of letters, digits and . + = : ( ) ^ -")
        return text
    if column == "P50":
        if text in ("", "?"):
            return "", math.nan
        if text[:2] in ("> ", "< "):
            return text[0], check("P_star", text[2:])
        return "=", check("P_star", text)

    # an interval may be missing, and nan in a trace is a gap in its line
    quantity, _, level = column.partition(" ")
    if (text == "" and column in ("P50_lo", "P50_hi")) or (text == "nan" and level):
        return math.nan
    kind, low, high = LIMITS[quantity]
    what = {int: "a whole number", float: "a number"}[kind]
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        raise ValueError(f"must be {what} from {low:g} to {high:g}")
    return number


def read(path):
    """A CSV file -> its kind, by its columns, and its rows as dictionaries of checked values.

    Raises ValueError, of one line that names the file and the line in it."""
    # all at once: a file that is being written must not change under us
    try:
        text = path.read_bytes().decode()
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        lines = [(table.line_num, cells) for cells in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: cannot be read ({reason})") from None

    # the columns say what it is
    header = set(table.fieldnames or [])
    kinds = [kind for kind, needed in KINDS.items() if header >= set(needed)]
    if not kinds or not lines:
        raise ValueError(f"{path}: is no table or trace of our scripts, or has no rows")
    if not text.endswith("\n"):
        raise ValueError(f"{path}: is cut off in its last line")

    # what is not drawn is not checked; a trace has columns for every level, "unseen 3"
    kind = kinds[0]
    checked = ({*KINDS[kind], *MISSING} - {"status"}) | ({"v", "m", "P"} & header)
    levels = [name for name in header if re.fullmatch(r"\w+ \d+", name)]
    checked |= {name for name in levels if name.split()[0] in LIMITS}
    rows = []
    for number, cells in lines:
        if None in cells or None in cells.values():
            raise ValueError(f"{path}: line {number}: must have {len(header)} cells")
        row = MISSING | cells | {"file": path}
        for name in sorted(checked):
            try:
                row[name] = check(name.removeprefix("root_"), row[name])
            except ValueError as error:
                cell = f"{name} = {row[name][:20]!r}"
                raise ValueError(f"{path}: line {number}: {cell}: {error}") from None
        rows.append(row)
    return kind, rows


def gather(names):
    """Files, and folders of sweep.py -> {folder: {kind: rows}}."""
    found = {}
    for path in map(Path, names):
        files = [path]
        if path.is_dir():
            both = path / "samples_vs_depth.csv", path / "runs.csv"
            files = [file for file in both if file.exists()]
        for file in files:
            kind, rows = read(file)
            tables = found.setdefault(file.parent, {name: [] for name in KINDS})
            tables[kind] += rows
    return found


# --------------------------------------------------------------------------------------------------
# what the pictures share


def parts(method):
    """data2vec-token:mask=0.15 -> ("data2vec", "token")"""
    name = method.split(":")[0]
    learner, _, target = name.partition("-")
    return learner, target or "latent"


def with_spare(known, spare, names):
    """{name: style}; names that are not known share out the spare styles."""
    # sorted, so that the order of rows changes no colour
    unknown = sorted(set(names) - set(known))
    return known | {name: spare[i % len(spare)] for i, name in enumerate(unknown)}


def group(rows, *columns):
    """{the values of some columns: the rows that have them}"""
    groups = {}
    for row in rows:
        key = tuple(row[name] for name in columns)
        groups.setdefault(key, []).append(row)
    return groups


def describe(**sizes):
    """v=8 s=2 m=3, without what is 0"""
    return " ".join(f"{name}={x:g}" for name, x in sizes.items() if x)


def new_figure(rows, columns, width, height):
    """A figure and its panels; width and height of one panel in inches."""
    from matplotlib.figure import Figure  # not pyplot, which would look for a screen

    # constrained: titles and legends make their own room
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    return figure, figure.subplots(rows, columns, squeeze=False)


def shade(k, n):
    """Colour and marker of the k-th of n lines; colours get lighter."""
    from matplotlib import colormaps

    # viridis' last tenth is too light on white
    colour = colormaps["viridis"](0.88 * k / max(1, n - 1))
    return {"color": colour, "marker": MARKERS[k % len(MARKERS)]}


def draw_line(axis, rows, x, y, scale=1.0, **style):
    """Plot column y of rows against column x / scale. Returns (last y, line)."""
    rows = sorted(rows, key=lambda row: row[x])
    heights = [row[y] for row in rows]
    line, = axis.plot([row[x] / scale for row in rows], heights, **style)
    return heights[-1], line


def add_legend(axis, ends):
    """Names to the right of a panel, in the order in which lines end there: [(last y, line)]."""
    ends = sorted(ends, key=lambda end: -end[0])
    lines = [line for _, line in ends]
    axis.legend(handles=lines, loc="center left", bbox_to_anchor=(1.02, 0.5), handlelength=3.5)


# --------------------------------------------------------------------------------------------------
# samples_vs_depth.png


def cells_of(rows):
    """Rows of samples_vs_depth.csv -> a cell for every P* that was measured, by depth.

    A row has up to two, of level L-1 and of the root. The state of a cell is why its P is only a
    bound, or empty."""
    cells = []
    for row in sorted(rows, key=lambda row: row["L"]):
        for part, what in (("", "level L\u22121"), ("root_", "root, read by a probe")):
            sign, P = row[f"{part}P50"]
            if not sign:
                continue  # not measured, or "?": some seeds bound it above, some below

            # the status is that of level L-1, so it may not explain the root's bound
            beyond = row["status"] if row["status"] in BEYOND else "beyond the ladder"
            state = {"=": "", "<": "below Pmin", ">": beyond}[sign]
            low = math.nan if state else row[f"{part}P50_lo"]
            high = math.nan if state else row[f"{part}P50_hi"]
            cells.append(row | {"what": what, "P": P, "low": low, "high": high, "state": state})
    return cells


def conclusion(curves, m):
    """A title: for which methods P* is flat from L = 3 on, and for which it grows.

    curves: {method: cells}. A method whose intervals allow both, or are not there, is not named."""
    flat, growing = [], []
    for method, cells in curves.items():
        # at L = 2 most targets are the same
        cells = [cell for cell in cells if cell["L"] >= 3]
        if not cells:
            continue

        # a level multiplies P* by 1 (flat) or by m (growing): sqrt(m) lies between them
        first, last = cells[0], cells[-1]
        between = m ** ((last["L"] - first["L"]) / 2)
        if last["high"] / first["low"] < between:
            flat.append(method)
        if last["low"] / first["high"] > between:
            growing.append(method)

    said = {"is flat for": flat, "grows with depth for": growing}
    words = [f"{verdict} {', '.join(methods)}" for verdict, methods in said.items() if methods]
    title = f"From L = 3 on, P* {'; '.join(words)}" if words else "P* against depth"
    return textwrap.fill(title, 75, break_on_hyphens=False)


def styles_of(methods):
    """{method: style}: the learner is line and marker, the target is the colour."""
    learners = with_spare(LINES, SPARE_LINES, [parts(method)[0] for method in methods])
    targets = with_spare(COLOURS, SPARE_COLOURS, [parts(method)[1] for method in methods])
    styles = {}
    for i, method in enumerate(methods):
        learner, target = parts(method)
        line, marker = learners[learner]
        style = {"color": targets[target], "linestyle": line, "marker": marker, "markersize": 7}

        # further settings of the same learner and target are lighter and thinner
        alike = [parts(other) for other in methods[:i]].count((learner, target))
        strength = 1 / (1 + 0.7 * alike)
        styles[method] = style | {"alpha": strength, "linewidth": 1.1 + 1.1 * strength}
    return styles


def draw_method(axis, method, cells, shift, style):
    """One line, with intervals, and bounds as open markers. Returns (last P, line)."""
    # bold signs are read at this size, thin ones are not
    look = {"color": style["color"], "weight": "bold", "ha": "center", "va": "center"}
    numbers = []
    for cell in cells:
        x, P, state = cell["L"] + shift, cell["P"], cell["state"]
        numbers.append(cell | {"x": x, "number": math.nan if state else P})

        # a missing interval is nan, which matplotlib does not draw
        axis.vlines(x, cell["low"], cell["high"], color=style["color"], alpha=style["alpha"])
        if state:
            axis.plot(x, P, **style | {"markerfacecolor": "white"})
            offset = 0, -13 if state == "below Pmin" else 13
            axis.annotate(SIGNS[state], (x, P), offset, textcoords="offset points", **look)

    # a thin line joins all points, the full one only those that are no bounds
    last, _ = draw_line(axis, numbers, "x", "P", color=style["color"], linewidth=0.8, alpha=0.5)
    _, line = draw_line(axis, numbers, "x", "number", label=method, **style)
    return last, line


def draw_panel(axis, v, m, depths, curves, styles):
    """The laws as guides, the methods, and the names of both. curves: {method: cells}"""
    ends = []
    look = {"color": "0.6", "linewidth": 1, "linestyle": (0, (4, 4)), "zorder": 0}
    for law, power in LAWS.items():
        guide = [{"L": L, "P": v * m ** power(L)} for L in depths]
        ends.append(draw_line(axis, guide, "L", "P", label=f"${law}$", **look))

    # methods stand a little apart, so that no interval hides another
    apart = min(0.05, 0.4 / len(curves))
    middle = (len(curves) - 1) / 2
    for i, (method, cells) in enumerate(curves.items()):
        shift = apart * (i - middle)
        ends.append(draw_method(axis, method, cells, shift, styles[method]))
    add_legend(axis, ends)


def draw_depth(tables):
    """The figure of samples_vs_depth.png; None unless a size has several depths and a P*."""
    # a size of one depth is methods.png's
    sizes = group(tables["depth"], "v", "s", "m", "zipf").values()
    rows = [row for size in sizes if len(group(size, "L")) > 1 for row in size]
    cells = cells_of(rows)
    panels = group(cells, "v", "s", "m", "zipf", "what")
    if not panels:
        return None

    # one style for a name, and one range of P, in all panels
    styles = styles_of([method for method, in group(rows, "method")])
    depths = sorted({row["L"] for row in rows})
    P = [cell[name] for cell in cells for name in ("P", "low", "high")]

    # a panel is as high as its names need
    height = max(5.5, 0.27 * (len(LAWS) + len(styles)))
    figure, axes = new_figure(len(panels), 1, 11, height)
    for axis, (size, lines) in zip(axes[:, 0], sorted(panels.items())):
        v, s, m, zipf, what = size
        curves = {method: line for (method,), line in group(lines, "method").items()}
        axis.set_title(f"{conclusion(curves, m)}\n{what}: {describe(v=v, s=s, m=m, zipf=zipf)}")
        axis.set(yscale="log", ylim=(np.nanmin(P) / 3, np.nanmax(P) * 3), xticks=depths)
        axis.set(xlabel="depth L", ylabel="P*, training strings")
        axis.set_xlim(depths[0] - 0.25, depths[-1] + 0.25)
        draw_panel(axis, v, m, depths, curves, styles)

    # what the signs mean, for those that occur
    states = {cell["state"] for cell in cells}
    notes = ["bars: 95 % intervals over seeds"]
    notes += [f"{sign} {state}" for state, sign in SIGNS.items() if state in states]
    figure.supxlabel(";  ".join(notes), x=0, ha="left")
    return figure


# --------------------------------------------------------------------------------------------------
# methods.png


def draw_methods(tables):
    """The figure of methods.png: P* of every method at a size of one depth, a line for each
    learner and its settings, a colour for each target. None if there is no such size, or if
    collapse.png is drawn."""
    if collapse_groups(tables["runs"]):
        return None
    sizes = group(tables["depth"], "v", "s", "m", "zipf").values()
    rows = [row for size in sizes if len(group(size, "L")) == 1 for row in size]
    panels = group(cells_of(rows), "v", "s", "m", "L", "zipf", "what")
    if not panels:
        return None
    colours = with_spare(COLOURS, SPARE_COLOURS, [parts(row["method"])[1] for row in rows])

    # panels are as high as the lines they need
    lines = max(len({line_name(cell["method"]) for cell in cells}) for cells in panels.values())
    figure, axes = new_figure(len(panels), 1, 11, 1.4 + 0.42 * lines)
    for axis, (size, cells) in zip(axes[:, 0], sorted(panels.items())):
        v, s, m, L, zipf, what = size
        names = list(dict.fromkeys(line_name(cell["method"]) for cell in cells))
        targets = list(dict.fromkeys(parts(cell["method"])[1] for cell in cells))
        for cell in cells:
            target = parts(cell["method"])[1]
            # targets of one line stand a little apart
            shift = 0.16 * (targets.index(target) - (len(targets) - 1) / 2)
            y, colour = names.index(line_name(cell["method"])) + shift, colours[target]
            axis.hlines(y, cell["low"], cell["high"], color=colour)
            fill = "white" if cell["state"] else colour
            look = {"marker": MARKERS[targets.index(target)], "markerfacecolor": fill}
            axis.plot(cell["P"], y, color=colour, linestyle="", **look)
            # here a larger P is to the right
            turned = str.maketrans("\u2191\u2193", "\u2192\u2190")
            sign = SIGNS.get(cell["state"], "").translate(turned)
            axis.annotate(sign, (cell["P"], y), (8, 0), textcoords="offset points", va="center")
        for k, target in enumerate(targets):
            look = {"marker": MARKERS[k], "color": colours[target], "linestyle": ""}
            axis.plot([], [], label=NAMES.get(target, target), **look)
        axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))

        # the rungs of a ladder are powers of 2; the first line is on top
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(ylim=(len(names) - 0.4, -0.6), yticks=range(len(names)))
        axis.set_yticklabels(names)
        axis.grid(axis="y", color="0.92")
        axis.set(xlabel="P*, training strings")
        axis.set_title(f"P* of {what}: {describe(v=v, s=s, m=m, L=L, zipf=zipf)}")
    return figure


def line_name(method):
    """predictor-token:elements=one -> predictor:elements=one"""
    name, colon, settings = method.partition(":")
    return parts(name)[0] + colon + settings


# --------------------------------------------------------------------------------------------------
# collapse.png


def collapse_groups(runs):
    """{(method, v, s, zipf): rows of level L-1}, at the largest depth that has several m."""
    top = [row for row in runs if row["level"] == row["L"] - 1]
    top = sorted(top, key=lambda row: row["L"])

    # deeper trees come later and replace shallower ones
    deepest = {}
    for (*key, _), rows in group(top, "method", "v", "s", "zipf", "L").items():
        if len(group(rows, "m")) > 1:
            deepest[tuple(key)] = rows
    return deepest


def paper_stars(method, v, s, zipf, L, paper):
    """{m: the paper's P*} for a method that it has: own latents, equal rules."""
    learner, target = parts(method)
    if target in OWN_LAW or zipf:
        return {}

    # h^(L-1) is the paper's name of level L-1
    rows = group(paper, "v", "s", "L", "target").get((v, s, L, "h^(L-1)"), [])
    return {row["m"]: row["P_star"] for row in rows if PAPER.get(row["method"]) == learner}


def draw_ladders(axis, rows, scale, paper):
    """Accuracy against P / scale(m), a line for every m and seed, and a star for the paper's P*."""
    from matplotlib.ticker import LogLocator

    several = sorted({row["m"] for row in rows})
    star = {"marker": "*", "markersize": 15, "markeredgecolor": "black", "linestyle": ""}
    for k, m in enumerate(several):
        look = shade(k, len(several)) | {"markersize": 4, "linewidth": 1.2}
        axis.plot([], [], label=f"m={m}", **look)  # one name for all seeds
        ladders = group([row for row in rows if row["m"] == m], "seed")
        for ladder in ladders.values():
            draw_line(axis, ladder, "P", "accuracy", scale(m), **look)
        if m in paper:
            axis.plot(paper[m] / scale(m), 0.5, zorder=5, **look | star)
    if paper:
        axis.plot([], [], label="paper's P*", color="white", **star)
    axis.axhline(0.5, color="0.7", linewidth=0.8, zorder=0)
    axis.set(xscale="log", ylim=(-0.02, 1.05))
    low, high = axis.get_xlim()
    if high / low < 100:  # powers of ten alone are too few
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()


def spread_text(rows, scale):
    """How far P* of several m are apart once divided by scale(m); "" if fewer than two are known.

    rows: those of samples_vs_depth.csv."""
    known = [row["P50"][1] / scale(row["m"]) for row in rows if row["P50"][0] == "="]
    return f"P* within a factor of {max(known) / min(known):.3g}" if len(known) > 1 else ""


def draw_collapse(tables):
    """The figure of collapse.png; None unless a method has several m at one depth."""
    groups = collapse_groups(tables["runs"])
    if not groups:
        return None
    figure, axes = new_figure(len(groups), 3, 4.3, 3.4)
    for panels, (key, rows) in zip(axes, sorted(groups.items())):
        method, v, s, zipf = key
        L = rows[0]["L"]
        stars = paper_stars(method, v, s, zipf, L, tables["paper"])
        known = group(tables["depth"], "method", "v", "s", "zipf", "L").get((*key, L), [])

        # P as it is, over the law of own latents, and over the method's own law or the tokens'
        _, target = parts(method)
        own = OWN_LAW.get(target, OWN_LAW["token"])
        for axis, law in zip(panels, ("", "v\\,m^3", own)):
            scale = lambda m: v * m ** LAWS[law](L) if law else 1
            draw_ladders(axis, rows, scale, stars)
            label = f"$P\\,/\\,({law})$" if law else "$P$"
            axis.set_xlabel(f"{label}\n{spread_text(known, scale)}")
        panels[0].set_title(f"{method}\n{describe(v=v, s=s, L=L, zipf=zipf)}")
        panels[0].set_ylabel(f"accuracy of level {L - 1}")
        panels[2].legend(loc="upper left", bbox_to_anchor=(1, 1.05))
    title = "Accuracy against training strings; lines of all m fall together where a law holds"
    figure.suptitle(title, x=0, ha="left")
    return figure


# --------------------------------------------------------------------------------------------------
# phases.png


PHASES = {  # the columns of a trace that are drawn, and the titles of their panels
    "data2vec": {"unseen": "accuracy on unseen synonyms", "synonyms": "synonym score"},
    "predictor": {"accuracy": "accuracy", "prediction": "prediction loss"},
}


def level_columns(rows, what):
    """[(column, its style)] of one quantity, level 1 first."""
    names = {name for row in rows for name in row if name.startswith(f"{what} ")}
    names = sorted(names, key=lambda name: int(name.split()[1]))  # level 10 after level 9
    return [(name, shade(k, len(names)) | {"markersize": 5}) for k, name in enumerate(names)]


def draw_steps(axis, rows, what):
    """One quantity against the step: a colour a level, a line a run. Runs may differ in depth."""
    for name, look in level_columns(rows, what):
        axis.plot([], [], label=name.replace(what, "level"), **look)  # one name for all runs
        runs = group([row for row in rows if name in row], "file").values()
        for run in runs:
            draw_line(axis, run, "step", name, **look)

        # the first row of each run: at the start of training, or soon after it
        first = np.mean([run[0][name] for run in runs])
        axis.axhline(first, color=look["color"], linestyle=":", zorder=0)
    axis.set(xlabel="step")


def draw_ends(axis, rows, what):
    """One quantity at the last step of every run, against P / (v m^3): a line a level."""
    last = {row["file"]: row | {"x": row["P"] / (row["v"] * row["m"] ** 3)} for row in rows}
    for name, look in level_columns(rows, what):
        ends = [row for row in last.values() if name in row]
        draw_line(axis, ends, "x", name, label=name.replace(what, "level"), **look)
    axis.set(xscale="log", xlabel="$P\\,/\\,(v\\,m^3)$, at the last step")


def draw_phases(tables):
    """The figure of phases.png: a row of panels for every learner that has traces, and one more
    if they are of several P."""
    lines = []
    for learner in PHASES:
        rows = tables[learner]
        if rows:
            lines.append((learner, draw_steps))
        ends = {row["file"]: row.get("P") for row in rows}
        if len(set(ends.values())) > 1 and None not in ends.values():
            lines.append((learner, draw_ends))
    if not lines:
        return None
    figure, axes = new_figure(len(lines), 2, 6.3, 4.8)
    for line, (learner, draw_quantity) in zip(axes, lines):
        for axis, (what, title) in zip(line, PHASES[learner].items()):
            draw_quantity(axis, tables[learner], what)
            axis.set_title(f"{learner}: {title}")
        line[0].set_ylim(-0.02, 1.05)

        # the highest level on top, as in the tree
        handles, _ = line[1].get_legend_handles_labels()
        line[1].legend(handles=handles[::-1], loc="upper left", bbox_to_anchor=(1, 1))
    title = "When each level is learned (a line a run; dotted: where it starts)"
    figure.suptitle(title, x=0, ha="left")
    return figure


# --------------------------------------------------------------------------------------------------
# contrast.png


def draw_contrast(tables):
    """The figure of contrast.png: a panel for every grammar size, a line for every target."""
    from matplotlib.ticker import LogLocator

    # a contrast of 0 has no logarithm; shallower trees say nothing that the deepest does not
    rows = [row for row in tables["contrast"] if row["contrast"] > 0]
    sizes = group(rows, "v", "s", "m", "zipf").values()
    rows = [row for size in sizes for row in size if row["L"] == max(r["L"] for r in size)]
    if not rows:
        return None
    colours = with_spare(COLOURS, SPARE_COLOURS, [row["target"] for row in rows])
    sizes = group(rows, "v", "s", "m", "L", "zipf")
    figure, axes = new_figure(len(sizes), 1, 10, 5)
    for axis, ((v, s, m, L, zipf), lines) in zip(axes[:, 0], sizes.items()):
        ends = []
        for k, ((target,), line) in enumerate(group(lines, "target").items()):
            label = NAMES.get(target, target)
            if len(line) > 1:
                # the factor of one level up, by least squares
                levels = [row["level"] for row in line]
                slope, _ = np.polyfit(levels, [math.log(row["contrast"]) for row in line], 1)
                label += f", \u00d7{math.exp(slope):.2f} a level"
            look = {"color": colours[target], "marker": MARKERS[k % len(MARKERS)], "linewidth": 2}
            ends.append(draw_line(axis, line, "level", "contrast", label=label, **look))
        add_legend(axis, ends)

        # 0.05, 0.1, 0.2 instead of powers of ten alone
        axis.set(yscale="log", xticks=sorted({row["level"] for row in lines}))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.set(xlabel="level", ylabel="contrast of parents' contexts")
        size = describe(v=v, s=s, m=m, L=L, zipf=zipf)
        axis.set_title(f"How far apart parents' contexts are\n{size}")
    return figure


# --------------------------------------------------------------------------------------------------
# prediction.png


def predictions(tables):
    """[(target, m, predicted P, measured P*)] of cluster.py, for sizes in both tables.

    Predicted: the P at which noise equals contrast, the largest over the levels of the tree."""
    needed = {}
    for size, rows in group(tables["contrast"], "v", "s", "m", "L", "zipf", "target").items():
        needed[size] = max(row["P_noise"] for row in rows)
    found = []
    for row in tables["depth"]:
        sign, measured = row["P50"]
        learner, target = parts(row["method"])
        size = (*(row[name] for name in ("v", "s", "m", "L", "zipf")), target)
        is_plain = learner == "cluster" and ":" not in row["method"]
        if sign == "=" and is_plain and size in needed:
            found.append((target, row["m"], needed[size], measured))
    return found


def draw_prediction(tables):
    """The figure of prediction.png: measured against predicted P*, times one fitted constant."""
    found = predictions(tables)
    if len(found) < 2:
        return None
    logs = np.log([measured / predicted for _, _, predicted, measured in found])
    factor, error = math.exp(logs.mean()), math.exp(logs.std())

    figure, axes = new_figure(1, 1, 9, 6)
    axis, several = axes[0, 0], sorted({m for _, m, _, _ in found})
    colours = with_spare(COLOURS, SPARE_COLOURS, [target for target, _, _, _ in found])
    for target, m, predicted, measured in found:
        look = {"color": colours[target], "marker": MARKERS[several.index(m) % len(MARKERS)]}
        axis.plot(factor * predicted, measured, linestyle="", **look)
    ends = [factor * predicted for _, _, predicted, _ in found]
    line = [min(ends), max(ends)]
    axis.plot(line, line, color="0.6", linewidth=1, zorder=0)

    # a name for every colour, and one for every marker
    for target in dict.fromkeys(target for target, _, _, _ in found):
        axis.plot([], [], "s", color=colours[target], label=NAMES.get(target, target))
    for k, m in enumerate(several):
        axis.plot([], [], MARKERS[k % len(MARKERS)], color="0.5", label=f"m={m}")
    axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    axis.set(xscale="log", yscale="log", ylabel="P* of cluster.py, training strings")
    axis.set_xlabel(f"{factor:.2g} \u00d7 the P at which sampling noise equals the contrast")
    title = f"P* from the rules alone, times one constant: right to a factor of {error:.2g}"
    axis.set_title(f"{title}\n(one standard deviation over {len(found)} cells)")
    return figure


# --------------------------------------------------------------------------------------------------
# draw


PICTURES = {
    "samples_vs_depth.png": draw_depth,
    "methods.png": draw_methods,
    "collapse.png": draw_collapse,
    "phases.png": draw_phases,
    "contrast.png": draw_contrast,
    "prediction.png": draw_prediction,
}


def draw(*names):
    """Draw what files and folders of sweep.py allow. Returns the paths of the pictures.

    Raises ValueError of one line if a file is not what it should be, or there is nothing to draw,
    ImportError without matplotlib and OSError if a picture cannot be written. No picture is drawn
    before all files are checked, and none is written before all are drawn."""
    found = gather(names)
    paper = [row for tables in found.values() for row in tables["paper"]]

    os.environ["MPLBACKEND"] = "agg"  # a notebook may have left another
    # matplotlib warns where it cannot keep its cache in the home folder
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib.style

    # a user's own style would change the bytes
    images = {}
    with matplotlib.style.context(["default", STYLE]):
        for folder, tables in found.items():
            for name, make in PICTURES.items():
                figure = make(tables | {"paper": paper})
                if figure is not None:
                    image = io.BytesIO()
                    figure.savefig(image, format="png", metadata={"Software": None})
                    images[folder / name] = image.getvalue()

    # all are drawn before the first is written
    if not images:
        raise ValueError(f"{', '.join(map(str, names))}: nothing to draw")
    for path, image in images.items():
        write(path, image)
    return list(images)


def write(path, image):
    """Write the whole picture or nothing, even if another process writes the same one."""
    # the process's number keeps two writers apart
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(image)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class Parser(argparse.ArgumentParser):
    """argparse, except that bad input gives one line and exit code 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=plain, allow_abbrev=False)
    parser.add_argument("out", nargs="*", default=["out"], help="folders of sweeps, or CSV files")
    names = parser.parse_args().out
    if hasattr(sys.stdout, "reconfigure"):
        # a path may have letters that a terminal has not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        for picture in draw(*names):
            print(f"wrote {picture}", flush=True)
    except ValueError as error:
        parser.error(f"argument out: {error}")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: stopped\n")
    except BrokenPipeError:
        # `| head`; Python flushes once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ImportError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
