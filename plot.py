"""
The pictures, from CSV files alone. Each is written into the folder of its files.

    python plot.py out/                        a sweep's folder
    python plot.py out/ paper_readings.csv     with the paper's P* as stars in collapse.png
    python plot.py 0.csv 1.csv                 traces of data2vec.py, or of predictor.py
    python plot.py contrast.csv                from grammar.py --contrast --csv contrast.csv

  samples_vs_depth.png   P* against depth: the learner is the style of a line and its marker, the
                         target its colour; P* of the root has a panel of its own
  collapse.png           where several m are there, at the largest depth: accuracy of level L-1
                         against P, P/(v m^3) and P over another law (the paper's figures 3, 11)
  phases.png             when each level rises while a network is trained (figures 5, 10, 13)
  contrast.png           how far apart parents' contexts are on each level, for each target

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
import uuid
from pathlib import Path

import numpy as np

# light and dark enough to be told apart in grey, and by colour-blind eyes
COLOURS = {"latent": "#005a9c", "token": "#d55e00", "root": "#000000", "joint": "#5cc8a5"}
SPARE_COLOURS = ("#aa3377", "#e6b000", "#7fb8e8", "#7a6a53", "#999999")
LINES = {"cluster": ("-", "o"), "predictor": ("--", "s"), "data2vec": (":", "^")}
SPARE_LINES = (("-.", "D"), ("-.", "v"), ("-.", "P"), ("-.", "X"))
MARKERS = "osD^vPX*"
NAMES = {"latent": "own latents", "token": "tokens", "root": "labels", "joint": "joint"}
PAPER = {"ilc": "cluster", "slc": "predictor", "data2vec": "data2vec"}  # its methods: our learners

POWERS = {  # a law's name: its power of m at depth L
    "v\\,m^2": lambda L: 2,
    "v\\,m^3": lambda L: 3,
    "v\\,m^L": lambda L: L,
    "v\\,m^{L+1}": lambda L: L + 1,
}
OWN_LAW = {"joint": "v\\,m^2", "root": "v\\,m^L", "token": "v\\,m^{L+1}"}  # of others: v m^3
SIGNS = {  # status of a cell that is only bounded: what stands at its open marker
    "beyond Pmax": ("\u2191", "beyond the ladder"),
    "limited by steps": ("\u22a4", "limited by steps"),
    "not finished": ("?", "ladder not finished"),
    "below Pmin": ("\u2193", "below the ladder"),
    "untrained": ("\u2020", "above 0.5 without training"),
}
MOST_LINES = 8  # of a panel; where there are more, every variant of the settings gets a panel
STYLE = {
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.dpi": 130,
    "savefig.bbox": "tight",
}


# --------------------------------------------------------------------------------------------------
# read and check


def whole(low, high):
    """A reader of whole numbers from low to high; raises ValueError, as all readers here."""

    def read(text):
        digits = text.isascii() and text.isdigit() and len(text) < 16
        if not (digits and low <= int(text) <= high):
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(text)

    return read


def real(low, high, empty=None):
    """A reader of numbers; an empty cell, where it may be, is the value of empty."""

    def read(text):
        # without a default an empty cell is not a number
        if not text and empty is not None:
            return empty
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            raise ValueError(f"must be a number from {low:g} to {high:g}")
        return number

    return read


def matching(pattern):
    """A reader of text that matches a pattern from end to end."""

    def read(text):
        if not re.fullmatch(pattern, text):
            raise ValueError("is nothing that our scripts write there")
        return text

    return read


def star(text):
    """A cell of P*: "413", "> 4096", "< 16" or empty -> (sign, number); a number's sign is "="."""
    if not text:
        return "", math.nan
    sign, _, bound = text.rpartition(" ")
    if sign not in ("", "<", ">"):
        raise ValueError("must be a number, > number or < number")
    return sign or "=", count(bound)


count = real(1e-9, 1e18)
end = real(1e-9, 1e18, empty=math.nan)  # of an interval
word = matching(r"[\w.+=:()^-]+")  # nothing that a picture would take for a formula
READERS = {
    "method": word, "target": word, "status": matching("|".join(["", "not run", *SIGNS])),
    "v": whole(2, 2**16), "s": whole(2, 2**16), "m": whole(1, 2**31), "L": whole(2, 24),
    "zipf": real(0, 1e3, empty=0.0), "P": whole(1, 1e15), "seed": whole(0, 1e15),
    "seeds": whole(0, 1e6), "level": whole(0, 24), "accuracy": real(0, 1),
    "P50": star, "P50_lo": end, "P50_hi": end, "root_P50": star, "root_P50_lo": end,
    "root_P50_hi": end, "root_floor": real(0, 1, empty=0.0), "contrast": real(0, 1e9),
    "P_star": count, "step": whole(0, 1e15),
}
KINDS = {  # what a file with these columns is
    "depth": "method v s m L P50 P50_lo P50_hi seeds".split(),
    "runs": "method v s m L P seed level accuracy".split(),
    "contrast": "v s m L target level contrast".split(),
    "paper": "method v s m L target P_star".split(),
    "data2vec": ["step", "unseen 1", "synonyms 1"],
    "predictor": ["step", "accuracy 1", "prediction 1"],
}
MAY_BE_MISSING = "zipf status root_P50 root_P50_lo root_P50_hi root_floor".split()


def read(path):
    """A CSV file -> its kind, by its columns, and its rows as dictionaries of checked values.

    Raises ValueError, of one line that names the file and the line in it."""
    # all at once: a file that is being written must not change under us
    try:
        text = path.read_bytes().decode()
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        lines = [(table.line_num, row) for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: cannot be read ({reason})") from None

    # the columns say what it is
    header = table.fieldnames or []
    kind = next((kind for kind, needs in KINDS.items() if set(needs) <= set(header)), None)
    if kind is None or not lines:
        raise ValueError(f"{path}: is no table or trace of our scripts, or has no rows")
    if not text.endswith("\n"):
        raise ValueError(f"{path}: is cut off in its last line")

    # only columns that are drawn are checked; a trace has some for every level, "unseen 3"
    needs = KINDS[kind] + MAY_BE_MISSING
    readers = {name: READERS[name] for name in needs if name in READERS}
    levels = [name for name in header if re.fullmatch(r"[a-z]+ \d+", name)]
    readers |= {name: float for name in levels}  # nan is a gap in its line

    rows = []
    for number, row in lines:
        if None in row or None in row.values():
            raise ValueError(f"{path}: line {number}: must have {len(header)} cells")
        for name, reader in readers.items():
            cell = row.get(name, "")
            try:
                row[name] = reader(cell)
            except ValueError as error:
                where = f"line {number}: {name} = {cell[:20]!r}"
                raise ValueError(f"{path}: {where}: {error}") from None
        rows.append(row)
    return kind, rows


def gather(names):
    """Files, and folders of sweep.py -> {folder: {kind: [the rows of a file, ...]}}"""
    files = []
    for path in map(Path, names):
        if path.is_dir():
            files.append(path / "samples_vs_depth.csv")
            runs = path / "runs.csv"
            files += [runs] if runs.exists() else []
        else:
            files.append(path)
    found = {}
    for path in files:
        kind, rows = read(path)
        found.setdefault(path.parent, {}).setdefault(kind, []).append(rows)
    return found


# --------------------------------------------------------------------------------------------------
# what the pictures share


def parts(method):
    """data2vec-token:mask=0.15 -> ("data2vec", "token", "mask=0.15")"""
    head, _, settings = method.partition(":")
    learner, _, target = head.partition("-")
    return learner, target or "latent", settings


def with_spare(known, spare, names):
    """{name: style}; the names that are not known share out the spare styles."""
    unknown = sorted(set(names) - set(known))
    return known | {name: spare[i % len(spare)] for i, name in enumerate(unknown)}


def group(rows, *columns):
    """{the values of some columns: the rows that have them}"""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in columns), []).append(row)
    return groups


def describe(v, s, m, zipf, L=None):
    words = {"v": v, "s": s, "m": m, "L": L, "zipf": zipf or None}
    return " ".join(f"{name}={x:g}" for name, x in words.items() if x is not None)


def new_figure(rows, columns, width, height):
    """A figure of panels, and these; width and height of one panel in inches."""
    from matplotlib.figure import Figure  # not pyplot, which would look for a screen

    if rows * height > 400:
        raise ValueError(f"{rows} rows of panels are too many for a picture; give fewer sizes")
    figure = Figure(figsize=(columns * width, rows * height))
    return figure, figure.subplots(rows, columns, squeeze=False)


def shade(k, n):
    """The k-th of n colours that get lighter."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.88 * k / max(1, n - 1))


def spread(heights, gap):
    """Ascending heights, moved as little as possible (least squares) to be a gap apart."""
    # less i gaps they must only not fall: what falls is pooled and gets its mean
    blocks = []
    for i, height in enumerate(heights):
        blocks.append([height - i * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    room = max(0, 1 - (len(heights) - 1) * gap)
    moved = [min(max(np.mean(block), 0), room) for block in blocks for _ in block]
    return [height + i * gap for i, height in enumerate(moved)]


def label_ends(axis, ends, gap):
    """Names to the right of a panel, none upon another, each with a piece of its line as a key.

    ends: (x, y, name, style) of the last point of every line. A line that reaches the right side
    is led to its name."""
    # limits are fixed first: places are fractions of the panel
    left, right = axis.set_xlim(axis.get_xlim())
    low, high = np.log(axis.set_ylim(axis.get_ylim()))
    ends = sorted(ends, key=lambda end: end[1])
    wanted = [(math.log(y) - low) / (high - low) for _, y, *_ in ends]
    panel = {"transform": axis.transAxes, "clip_on": False}
    for (x, y, name, style), start, place in zip(ends, wanted, spread(wanted, gap)):
        if right - x < 0.5:
            lead = [(x - left) / (right - left) + 0.013, 1.03]
            axis.plot(lead, [start, place], color="0.75", linewidth=0.8, zorder=0, **panel)
        axis.plot([1.04, 1.085, 1.13], [place] * 3, markevery=[1], **panel, **style)
        axis.text(1.145, place, name, va="center", **panel)


# --------------------------------------------------------------------------------------------------
# samples_vs_depth.png


def cells_of(rows, prefix):
    """The rows of one method -> its cells by depth, of P50 or root_P50, except what was not run."""
    cells = {}
    for row in rows:
        sign, P = row[prefix + "P50"]
        if not sign or row["status"] == "not run":
            continue

        # old files have no interval for a bound, and none may exclude its own number
        ends = row[prefix + "P50_lo"], row[prefix + "P50_hi"]
        low, high = np.nanmin([P, *ends]), np.nanmax([P, *ends])

        # the state says why there is only a bound; it is empty for a number
        state = ""
        if prefix and row["root_floor"] > 0.5:
            state = "untrained"
        elif sign in ("<", ">"):
            state = row["status"] or {"<": "below Pmin", ">": "beyond Pmax"}[sign]
        cell = {"L": row["L"], "P": P, "low": low, "high": high}
        cells[row["L"]] = cell | {"state": state, "seeds": row["seeds"]}
    return [cells[L] for L in sorted(cells)]


def growth(cells, m):
    """How P* of one method grows with depth, in words; None where its cells don't tell.

    Least squares of ln P* on L from L = 3 on (at L = 2 most targets are the same), with the error
    that the intervals imply. A cell that is only bounded, or of one seed, tells nothing."""
    cells = [cell for cell in cells if cell["L"] >= 3]
    if len(cells) < 2 or any(cell["state"] or cell["seeds"] < 2 for cell in cells):
        return None

    # the slope is a weighted sum of ln P*, so its error is one of theirs
    L = np.array([cell["L"] for cell in cells], float)
    weight = (L - L.mean()) / ((L - L.mean()) ** 2).sum()
    slope = weight @ np.log([cell["P"] for cell in cells])
    half = np.log([cell["high"] / cell["low"] for cell in cells]) / 2
    error = np.sqrt((weight**2) @ (half**2))

    # sqrt(m) lies between the two laws, which are a factor of 1 and of m a level
    law = math.log(m)
    if slope < law / 4 and slope + error < law / 2:
        return "is flat"
    if abs(slope - law) < law / 4 and slope - error > law / 2:
        return "grows by about m a level"
    if slope - error > 0:
        return "grows"
    return None


def conclusion(curves, m):
    """What the known cells say of every target, or of single methods where they differ."""
    # {target: {method: verdict}}
    verdicts = {}
    for method, cells in curves.items():
        verdicts.setdefault(parts(method)[1], {})[method] = growth(cells, m)

    # {verdict: names}; a target of which all learners say the same stands for them
    said = {}
    for target, found in verdicts.items():
        if len(set(found.values())) == 1 and target in NAMES:
            found = {NAMES[target]: found.popitem()[1]}
        for name, verdict in found.items():
            said.setdefault(verdict, []).append(name)
    said.pop(None, None)

    words = []
    for verdict, names in sorted(said.items(), reverse=True):
        many = f"{len(names)} methods" if len(names) > 5 else ", ".join(names)
        words.append(f"{verdict} for {many}")
    return f"From L = 3 on, P* {'; '.join(words)}" if words else "Samples needed against depth"


def panels_of(rows):
    """[((v, s, m, zipf), title, curves)], curves: {method: cells}. All lines of a size share a
    panel if they are not too many; the root has its own."""
    panels = []
    for size, lines in group(rows, "v", "s", "m", "zipf").items():
        variants = {}
        many = len(group(lines, "method")) > MOST_LINES
        for row in lines:
            variants.setdefault(parts(row["method"])[2] if many else "", []).append(row)
        for variant, part in variants.items():
            for prefix, what in (("", "level L\u22121"), ("root_", "root, read by a probe")):
                methods = group(part, "method").items()
                curves = {method: cells_of(own, prefix) for (method,), own in methods}
                curves = {method: cells for method, cells in curves.items() if cells}
                title = f"{what}: {describe(*size)} {variant}"
                if curves:
                    panels.append((size, title, curves))
    return panels


def line_styles(methods, targets, learners):
    """{method: style}; settings of one learner and target differ by lightness and thickness."""
    styles, alike = {}, {}
    for method in methods:
        learner, target, _ = parts(method)
        # the first is full, those after it are mixed with white
        number = alike[learner, target] = alike.get((learner, target), -1) + 1
        keep = 1 / (1 + 0.7 * number)
        rgb = [int(targets[target][i : i + 2], 16) / 255 for i in (1, 3, 5)]
        colour = [1 - keep * (1 - x) for x in rgb]
        dash, marker = learners[learner]
        styles[method] = {"color": colour, "linestyle": dash, "marker": marker}
        styles[method] |= {"markersize": 7, "linewidth": 1.1 + 1.1 * keep}
    return styles


def draw_line(axis, cells, shift, style):
    """One method: intervals as bars, and a cell that is only bounded open, with its sign."""
    x = [cell["L"] + shift for cell in cells]
    P = [cell["P"] for cell in cells]
    known = [math.nan if cell["state"] else cell["P"] for cell in cells]
    colour = style["color"]
    # a thin line leads to bounds, the full one joins numbers alone
    axis.plot(x, P, color=colour, linewidth=0.8, alpha=0.5)
    axis.plot(x, known, **style)
    look = {"color": colour, "fontsize": 13, "weight": "bold", "ha": "center", "va": "center"}
    for cell, x in zip(cells, x):
        state = cell["state"]
        if state:
            axis.plot(x, cell["P"], **style | {"markerfacecolor": "white"})
            points = 0, -12 if state == "below Pmin" else 12
            place = {"xy": (x, cell["P"]), "xytext": points, "textcoords": "offset points"}
            axis.annotate(SIGNS[state][0], **place, **look)
        elif cell["seeds"] > 1:
            axis.plot([x, x], [cell["low"], cell["high"]], color=colour, linewidth=1.2)


def draw_lines(axis, curves, styles):
    """All methods of a panel, a little apart so that no bar hides another; returns their ends."""
    ends = []
    apart = min(0.05, 0.4 / len(curves))
    for i, (method, cells) in enumerate(curves.items()):
        shift = apart * (i - (len(curves) - 1) / 2)
        draw_line(axis, cells, shift, styles[method])
        ends.append((cells[-1]["L"] + shift, cells[-1]["P"], method, styles[method]))
    return ends


def draw_laws(axis, size, depths, low, high):
    """The laws as guides, except those that end outside of low..high; returns their ends."""
    v, s, m, zipf = size
    ends = []
    for name, power in POWERS.items():
        law = [v * m ** power(L) for L in depths]
        guide = {"color": "0.6", "linewidth": 1, "linestyle": (0, (4, 4)), "zorder": 0}
        if low < law[-1] < high:
            axis.plot(depths, law, **guide)
            ends.append((depths[-1], law[-1], f"${name}$", guide))
    return ends


def notes_on(cells):
    """What bars and signs mean, for those that occur."""
    seeds = sorted({cell["seeds"] for cell in cells})
    several = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else seeds[0]
    notes = [f"bars: 95 % intervals, {several} seeds"]
    if seeds[0] < 2:
        notes.append("no bar: one seed")
    states = {cell["state"] for cell in cells}
    notes += [f"open, {sign}: {words}" for state, (sign, words) in SIGNS.items() if state in states]
    unbroken = [note.replace(" ", "\u00a0") for note in notes]
    return textwrap.fill(";  ".join(unbroken), 90)


def draw_depth(rows):
    """The figure of samples_vs_depth.png from rows of samples_vs_depth.csv; None if nothing ran."""
    panels = panels_of(rows)
    if not panels:
        return None

    # one style for a name in all panels
    split = [parts(row["method"]) for row in rows]
    learners = with_spare(LINES, SPARE_LINES, [learner for learner, _, _ in split])
    targets = with_spare(COLOURS, SPARE_COLOURS, [target for _, target, _ in split])

    cells = [cell for *_, curves in panels for line in curves.values() for cell in line]
    low, high = min(cell["low"] for cell in cells), max(cell["high"] for cell in cells)
    depths = sorted({row["L"] for row in rows})
    # a panel is as high as its names need
    height = max(4.6, 0.27 * (len(POWERS) + max(len(curves) for *_, curves in panels)))
    figure, axes = new_figure(len(panels), 1, 8, height + 1.1)
    figure.subplots_adjust(hspace=1.3 / height)
    for axis, (size, title, curves) in zip(axes[:, 0], panels):
        axis.set(yscale="log", xticks=depths, xlim=(depths[0] - 0.25, depths[-1] + 0.25))
        axis.set(xlabel="depth L", ylabel="P*, training strings")
        axis.set_title(f"{textwrap.fill(conclusion(curves, size[2]), 85)}\n{title}")
        ends = draw_laws(axis, size, depths, low / 30, high * 30)
        ends += draw_lines(axis, curves, line_styles(curves, targets, learners))
        axis.set_ylim(min(axis.get_ylim()[0], low / 2), max(axis.get_ylim()[1], high * 2))
        label_ends(axis, ends, 0.26 / height)
    axis.text(0, -0.85 / height, notes_on(cells), transform=axis.transAxes, va="top", fontsize=11)
    return figure


# --------------------------------------------------------------------------------------------------
# collapse.png


def collapse_groups(runs):
    """{(method, v, s, zipf, L): rows of level L-1}, at the largest depth that has several m."""
    runs = [row for row in runs if row["level"] == row["L"] - 1]
    deepest = {}
    for key, rows in group(runs, "method", "v", "s", "zipf", "L").items():
        *rest, L = key
        if len(group(rows, "m")) > 1 and L >= deepest.get(tuple(rest), (0,))[0]:
            deepest[tuple(rest)] = L, key, rows
    return {key: rows for _, key, rows in deepest.values()}


def stars_of(key, depth, paper):
    """({m: P*} of samples_vs_depth.csv, {m: the paper's P*}) for one row of panels."""
    method, v, s, zipf, L = key
    learner, target, _ = parts(method)
    ours = group(depth, "method", "v", "s", "zipf", "L").get(key, [])
    ours = {row["m"]: row["P50"][1] for row in ours if row["P50"][0] == "="}
    theirs = group(paper, "v", "s", "L", "target").get((v, s, L, "h^(L-1)"), [])
    if target in OWN_LAW or zipf:  # the paper reads own latents and equal rules
        theirs = []
    return ours, {r["m"]: r["P_star"] for r in theirs if PAPER.get(r["method"]) == learner}


def spread_over_m(stars, power):
    """Standard deviation of ln(P* / m^power) over m: 0 where P* follows this law."""
    return float(np.std([math.log(P / m**power) for m, P in stars.items()]))


def draw_ladders(axis, rows, several, scale, theirs):
    """Accuracy against P / scale(m), a line for every m and seed, and a star for the paper's P*."""
    for k, m in enumerate(several):
        look = {"color": shade(k, len(several)), "marker": MARKERS[k % 8], "markersize": 4}
        label = f"m={m}"
        for seed in group(rows, "seed"):
            found = {r["P"]: r["accuracy"] for r in rows if (r["m"], (r["seed"],)) == (m, seed)}
            x = [P / scale(m) for P in sorted(found)]
            axis.plot(x, [found[P] for P in sorted(found)], **look, linewidth=1.2, label=label)
            label = None
    for m in sorted(set(several) & set(theirs)):
        label = None if m > min(theirs) else "paper's P*"
        look = {"color": shade(several.index(m), len(several)), "marker": "*", "markersize": 15}
        look |= {"markeredgecolor": "black", "zorder": 5, "linestyle": "", "label": label}
        axis.plot(theirs[m] / scale(m), 0.5, **look)
    axis.axhline(0.5, color="0.7", linewidth=0.8, zorder=0)
    axis.set(xscale="log", ylim=(-0.02, 1.05))
    axis.minorticks_off()


def draw_collapse(runs, depth, paper):
    """The figure of collapse.png; None unless a method has several m at one depth."""
    groups = collapse_groups(runs)
    if not groups:
        return None
    figure, axes = new_figure(len(groups), 3, 4, 3.2)
    figure.subplots_adjust(wspace=0.1, hspace=0.7)
    best = []
    for line, (key, rows) in zip(axes, groups.items()):
        method, v, s, zipf, L = key
        several = sorted({row["m"] for row in rows})
        ours, theirs = stars_of(key, depth, paper)

        # P as it is, over the law of own latents, and over the method's own law or the tokens'
        other = OWN_LAW.get(parts(method)[1], "v\\,m^{L+1}")
        for axis, law in zip(line, ("", "v\\,m^3", other)):
            power = POWERS[law](L) if law else 0
            draw_ladders(axis, rows, several, lambda m: v * m**power if law else 1, theirs)
            axis.set_xlabel(f"$P\\,/\\,({law})$" if law else "$P$")
            axis.tick_params(labelleft=axis is line[0])
            if len(ours) > 2:
                number = f"spread {spread_over_m(ours, power):.2f}"
                axis.set_title(number, loc="right", fontsize=11)
        line[0].set_title(f"{method}\n{describe(v, s, None, zipf, L)}")
        line[0].set_ylabel(f"accuracy of level {L - 1}")
        line[2].legend(loc="upper left", bbox_to_anchor=(1, 1.05))
        if len(ours) > 2:
            spreads = {law: spread_over_m(ours, power(L)) for law, power in POWERS.items()}
            best.append(f"{method} by ${min(spreads, key=spreads.get)}$")
    title = "Accuracy against training strings, for every m"
    if best:
        title = f"Lines of all m fall together best, by the spread of ln P*: {', '.join(best)}"
    axes[0, 0].text(0, 1.4, textwrap.fill(title, 100), transform=axes[0, 0].transAxes, fontsize=13)
    return figure


# --------------------------------------------------------------------------------------------------
# phases.png


def level_of(column):
    """"unseen 3" -> 3"""
    return int(column.split()[1])


def one_after_the_other(rows, what):
    """Whether accuracies reach 0.5 in the order of their levels, and two of them do."""
    reached = []
    columns = [name for name in rows[0] if name.startswith(f"{what} ")]
    for column in sorted(columns, key=level_of):
        reached.append(next((row["step"] for row in rows if row[column] >= 0.5), math.inf))
    finite = [step for step in reached if step < math.inf]
    return len(finite) > 1 and reached == sorted(reached) and len(set(finite)) == len(finite)


def draw_phases(kind, traces):
    """The figure of phases.png, from traces of one learner: a colour a level, a line a run."""
    panels = {
        "data2vec": {"unseen": "accuracy on unseen synonyms", "synonyms": "synonym score"},
        "predictor": {"accuracy": "accuracy", "prediction": "prediction loss"},
    }[kind]

    # {"unseen": {"unseen 1", ...}}: traces may differ in depth
    columns = {}
    for name in [name for rows in traces for name in rows[0]]:
        columns.setdefault(name.split(" ")[0], set()).add(name)
    figure, axes = new_figure(1, 2, 5.8, 4.4)
    for axis, (what, title) in zip(axes[0], panels.items()):
        names = sorted(columns[what], key=level_of)
        for k, name in enumerate(names):
            look = {"color": shade(k, len(names)), "marker": MARKERS[k % 8], "markersize": 5}
            lines = [rows for rows in traces if name in rows[0]]
            for i, rows in enumerate(lines):
                label = "" if i else f"level {level_of(name)}"
                axis.plot([r["step"] for r in rows], [r[name] for r in rows], label=label, **look)
            # what an untrained network gets
            first = np.mean([rows[0][name] for rows in lines])
            axis.axhline(first, color=look["color"], linestyle=":", zorder=0)
        axis.set(xlabel="step", title=title)

    # the highest level on top, as in the tree
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1, 1))
    axis.text(1.04, 0, "dotted:\nfirst step", transform=axis.transAxes)
    axes[0, 0].set_ylim(-0.02, 1.05)

    title = "When each level is learned"
    accuracy = next(iter(panels))
    if all(one_after_the_other(rows, accuracy) for rows in traces):
        title = "Levels are learned one after the other, from the tokens up"
    title += f" ({kind}, {len(traces)} run{'s' * (len(traces) > 1)})"
    axes[0, 0].text(0, 1.14, title, transform=axes[0, 0].transAxes, fontsize=13)
    return figure


# --------------------------------------------------------------------------------------------------
# contrast.png


def draw_contrast(rows):
    """The figure of contrast.png: a panel for every grammar size, a line for every target."""
    colours = with_spare(COLOURS, SPARE_COLOURS, [row["target"] for row in rows])
    sizes = group([row for row in rows if row["contrast"] > 0], "v", "s", "m", "zipf", "L")
    if not sizes:
        return None
    figure, axes = new_figure(len(sizes), 1, 7, 4.8)
    figure.subplots_adjust(hspace=0.45)
    for axis, (size, lines) in zip(axes[:, 0], sizes.items()):
        ends, changes = [], []
        for k, ((target,), line) in enumerate(group(lines, "target").items()):
            line = sorted(line, key=lambda row: row["level"])
            levels, contrast = [row["level"] for row in line], [row["contrast"] for row in line]
            name = NAMES.get(target, target)
            style = {"color": colours[target], "marker": MARKERS[k % 8], "linewidth": 2}
            axis.plot(levels, contrast, **style)
            ends.append((levels[-1], contrast[-1], name, style))
            if len(levels) > 1:
                slope = np.polyfit(levels, np.log(contrast), 1)[0]
                changes.append(f"{name} \u00d7{math.exp(slope):.2f}")

        # 0.05, 0.1, 0.2 instead of powers of ten alone
        ticks = [a * 10.0**k for k in range(-6, 2) for a in (1, 2, 5)]
        axis.set(yscale="log", xticks=sorted({row["level"] for row in lines}))
        limits = axis.get_ylim()
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set(ylim=limits, xlabel="level", ylabel="contrast of parents' contexts")
        said = textwrap.fill(f"One level up, contrast changes by: {', '.join(changes)}", 85)
        axis.set_title(f"{said if changes else 'Contrast of contexts'}\n{describe(*size)}")
        label_ends(axis, ends, 0.06)
    return figure


# --------------------------------------------------------------------------------------------------
# draw


def plan(names):
    """{path of a picture: (function that makes its figure, its arguments)}, from checked files."""
    found = gather(names)
    paper = [row for kinds in found.values() for rows in kinds.get("paper", []) for row in rows]
    pictures = {}
    for folder, kinds in found.items():
        depth = sum(kinds.get("depth", []), [])
        runs = sum(kinds.get("runs", []), [])
        if depth:
            # sizes with one depth are collapse.png's, where there is one
            sizes = group(depth, "v", "s", "m", "zipf").values()
            if collapse_groups(runs):
                sizes = [rows for rows in sizes if len(group(rows, "L")) > 1]
            pictures[folder / "samples_vs_depth.png"] = draw_depth, (sum(sizes, []),)
        if runs:
            pictures[folder / "collapse.png"] = draw_collapse, (runs, depth, paper)
        if "contrast" in kinds:
            pictures[folder / "contrast.png"] = draw_contrast, (sum(kinds["contrast"], []),)
        traced = [kind for kind in ("data2vec", "predictor") if kind in kinds]
        if len(traced) > 1:
            raise ValueError(f"{folder}: has traces of two learners; draw one at a time")
        for kind in traced:
            pictures[folder / "phases.png"] = draw_phases, (kind, kinds[kind])
    return pictures


def draw(*names):
    """Draw what files and folders of sweep.py allow. Returns the paths of the pictures.

    Raises ValueError of one line if a file is not what it should be, or there is nothing to draw,
    and OSError if matplotlib is not there or a picture cannot be written. No picture is drawn
    before all files are checked, and none is written before all are drawn."""
    pictures = plan(names)

    # whatever the environment says, and with no word but our own
    os.environ["MPLBACKEND"] = "agg"  # a notebook may have left another
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a home without a cache is no news
    try:
        import matplotlib
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise OSError(f"matplotlib, which plot.py needs, cannot be imported: {reason}") from None

    # a user's own style would change the bytes
    defaults = {name: x for name, x in matplotlib.rcParamsDefault.items() if name != "backend"}
    images = {}
    with matplotlib.rc_context(defaults | STYLE):
        for path, (make, arguments) in pictures.items():
            figure = make(*arguments)
            if figure is not None:
                image = io.BytesIO()
                figure.savefig(image, format="png", metadata={"Software": None})
                images[path] = image.getvalue()
    if not images:
        raise ValueError(f"{', '.join(map(str, names))}: nothing to draw")
    for path, image in images.items():
        write(path, image)
    return list(images)


def write(path, image):
    """The whole picture or none, whoever writes beside us."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
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
    try:
        for picture in draw(*names):
            print(f"wrote {picture}", flush=True)
    except ValueError as error:
        parser.error(f"argument out: {error}")


def run_script():
    """What ends main from outside gives one line and no traceback."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nplot.py: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `| head`; Python flushes once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        name = error.filename2 or error.filename or "output"
        reason = f"{name}: {error.strerror}" if error.strerror else error
        print(f"plot.py: {reason}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    run_script()
