"""
The pictures, from CSV files alone. The header of a file says what it is:

    python plot.py out/samples_vs_depth.csv                 P* against depth
    python plot.py out/samples_vs_depth.csv --collapse      P* / (v m^3) against m
    python plot.py out/samples_vs_depth.csv contrast.csv    P* over its prediction from the rules
    python plot.py contrast.csv                             written by grammar.py --contrast
    python plot.py 128.csv 256.csv 512.csv                  traces of predictor.py, data2vec.py

A picture is written beside its first file and has that file's name: out/samples_vs_depth.png, with
-collapse or -prediction at the end for these two. In Python: plot.samples_vs_depth(path).
"""

import csv
import math
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure                # not pyplot, which may look for a display

NAMES = {"latent": "own latents", "token": "tokens", "root": "root label", "joint": "joint"}
COLOURS = {"latent": "#005a9c", "token": "#d55e00", "root": "#000000", "joint": "#3fae8a"}
MARKERS = "os^Dv*PX<>phd8"                              # which tell settings apart, and in grey
# the law of P* for each target: how it is written, and its power of m at depth L
LAWS = {"latent": ("$v\\,m^3$", lambda L: 3), "joint": ("$v\\,m^2$", lambda L: 2),
        "token": ("$v\\,m^{L+1}$", lambda L: L + 1), "root": ("$v\\,m^L$", lambda L: L)}
vm3 = lambda row: row["v"] * row["m"] ** 3          # what P* is compared with
# what traces measure: "accuracy 1" is the column of level 1
MEASURES = {"accuracy": "accuracy", "prediction": "prediction loss",
            "unseen": "accuracy on unseen synonyms", "synonyms": "synonym score"}
# the paper's P*, and for its figures the methods that repeat their setting
PAPER = Path(__file__).parent / "assets" / "paper_readings.csv"
REPEATS = {"3-left": "cluster:.*(positions=cousins|preset=paper)", "3-right": "predictor(:|$)",
           "4": "data2vec:.*online=true"}
KINDS = {"P50": "vsmL", "contrast": "vsmL", "P_star": "vsmL",       # the column that tells what
         "accuracy 1": ["step"], "unseen 1": ["step"]}              # a file is: what it needs, too
NUMBERS = {"v", "s", "m", "L", "zipf", "P", "P50_lo", "P50_hi", "root_P50_lo", "root_P50_hi",
           "level", "contrast", "P_noise", "P_star", "step", *MEASURES}         # the rest is text
MISSING = {"zipf": 0.0, "root_P50": ("", math.nan), "v": math.nan, "m": math.nan, "P": 0.0}
OUR_STYLE = matplotlib.style.context(["default", {  # a user's own style would change the bytes
    "font.size": 11, "axes.titlesize": 11, "axes.titlelocation": "left", "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.formatter.min_exponent": 3,
    "savefig.bbox": "tight", "savefig.dpi": 130}])


def value(column, cell):
    """A cell as a number, nan if it is empty. A P50 may be a bound, so it is (sign, P):
    "413" becomes ("=", 413.0), "> 412" (">", 412.0), "" and "?" ("", nan)."""
    if column in ("P50", "root_P50"):
        sign, _, P = cell.replace("?", "").rpartition(" ")
        return (sign or "=", float(P)) if P else ("", math.nan)     # "" if nothing is known
    return float(cell or "nan") if column.split(" ")[0] in NUMBERS else cell


def parts(row):
    """What a method's name says: data2vec-token:mask=0.15 has a learner, a target and settings."""
    name, _, settings = row.get("method", "").partition(":")
    learner, _, target = name.partition("-")        # own latents have no suffix
    target = row.get("target") or target or "latent"        # contrast has targets, no methods
    label = NAMES.get(target, target) + (f", {settings}" if settings else "")       # for legends
    return {"learner": learner, "target": target, "settings": settings, "label": label}


def read(paths):
    """CSV files -> {kind: rows}, a kind being a key of KINDS. A ValueError names a wrong file."""
    tables = {}                                     # a kind may have several files
    for path in paths:
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:      # Excel adds a BOM
                rows = [{name: value(name, cell) for name, cell in row.items()} | {"file": path}
                        for row in csv.DictReader(file, restkey="rest", restval="cut off")]
        except (OSError, ValueError, csv.Error) as error:
            raise ValueError(f"{path}: {error}") from None
        kinds = [kind for kind in KINDS if rows and {kind, *KINDS[kind]} <= set(rows[0])]
        if not kinds:
            raise ValueError(f"{path}: is no table or trace of our scripts, or has no rows")
        tables.setdefault(kinds[0], []).extend(MISSING | parts(row) | row for row in rows)
    return tables


def group(rows, *columns):
    """{the values of some columns: the rows that have them}"""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in columns), []).append(row)
    return groups


def styles_of(rows):
    """{label: style}: a colour for each target, a marker for each label."""
    styles = {}
    for i, (label, target) in enumerate(group(rows, "label", "target")):
        colour = COLOURS.get(target, f"C{i}")       # a forker's target has one of matplotlib's
        styles[label] = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "label": label}
    return styles


def new_figure(title, panels, columns=4, sharey=True):
    """A figure and its panels, in rows of so many columns."""
    rows, columns = math.ceil(panels / columns), min(panels, columns)
    figure = Figure((max(6.5, columns * 3.8), rows * 3.5 + 0.7), layout="constrained")
    figure.suptitle(title, x=0, ha="left")          # what is shown, and no conclusion
    axes = figure.subplots(rows, columns, sharey=sharey, squeeze=False).flatten()
    for axis in axes[panels:]:                      # the last row may not be full
        axis.remove()
    return figure, axes[:panels]


def save(figure, path, ending, out):
    """Add one legend for all panels; write to out, or beside the CSV file path. Returns where."""
    handles = {}
    for axis in figure.axes:
        lines, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, lines))         # a label that is in several panels comes once
    figure.set_figheight(max(figure.get_figheight(), 0.25 * len(handles)))  # room for all
    figure.legend(handles.values(), handles, loc="center left", bbox_to_anchor=(1, 0.5))
    out = Path(out or Path(path).with_name(f"{Path(path).stem}{ending}.png"))
    figure.savefig(out, format="png", metadata={"Software": None})  # no version: the same bytes
    return out


def draw_methods(axis, rows, x, ticks, styles, part, unit):
    """P* / unit of every label against x, which is L or m, and the laws of their targets. Bars go
    from the lowest to the highest seed; bounds have an open marker, an arrow and no line."""
    place = math.log2 if x == "m" else float        # a power of m becomes a straight line
    edges = place(ticks[0]) - 0.3, place(ticks[-1]) + 0.3
    axis.set(yscale="log", xlim=edges, xlabel="m" if x == "m" else "depth L")
    axis.set_xticks([place(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])
    for target in [target for target in LAWS if (target,) in group(rows, "target")]:
        text, power = LAWS[target]                  # a law has constant 1
        sizes = [rows[0] | {x: 2**edge if x == "m" else edge} for edge in edges]
        ys = [size["v"] * size["m"] ** power(size["L"]) / unit(size) for size in sizes]
        axis.plot(edges, ys, color=COLOURS[target], linewidth=0.8, linestyle="--", zorder=0)
        side = "bottom" if target in ("latent", "token") else "top"     # some laws agree at L = 3
        axis.annotate(text, (edges[1], ys[1]), (4, 0), textcoords="offset points", va=side,
                      color=COLOURS[target], annotation_clip=False)

    lines = group(rows, "label")
    apart = min(0.07, 0.5 / len(lines))             # a shift, so that no bar hides another
    for i, ((label,), line) in enumerate(lines.items()):
        style, xs, ys = styles[label], [], []
        for row in sorted(line, key=lambda row: row[x]):
            sign, P = row[f"{part}P50"]
            y = P / unit(row)
            xs.append(place(row[x]) + apart * (i - (len(lines) - 1) / 2))
            ys.append(y if sign == "=" else math.nan)               # nan interrupts the line
            if sign == "=":
                ends = [row[f"{part}P50_{end}"] / unit(row) for end in ("lo", "hi")]
                axis.vlines(xs[-1], *ends, style["color"])
            elif sign:                              # "?" has none
                arrow = {"lolims": sign == ">", "uplims": sign == "<", "markerfacecolor": "white"}
                axis.errorbar(xs[-1], y, 0.4 * y, **style | arrow | {"label": None})
        axis.plot(xs, ys, **style)


def draw_panels(rows, title, quantity, unit=lambda row: 1):
    """A panel for each size and learner, and for its root if it is a network's and known. Returns
    the figure and [(axis, rows, part)], where part is "root_" for the root and "" otherwise."""
    x, other = ("L", "m") if len(group(rows, "L")) > 1 else ("m", "L")      # what is along the axis
    tables = sorted(group(rows, "v", "s", other, "zipf", "learner").items(), key=lambda t: t[0][:4])
    panels = [(key, table, "") for key, table in tables]    # level L-1 first
    panels += [(key, table, "root_") for key, table in tables
               if key[-1] != "cluster" and any(row["root_P50"][0] == "=" for row in table)]
    learners, ticks = len(group(rows, "learner")), sorted({row[x] for row in rows})
    title += "\nbars: lowest and highest seed; open markers: bounds; dashed: laws of theory"
    figure, axes = new_figure(title, len(panels), learners if learners > 1 else 4)
    figure.supylabel(quantity, fontsize=11)
    for axis, ((v, s, fixed, zipf, learner), table, part) in zip(axes, panels):
        draw_methods(axis, table, x, ticks, styles_of(rows), part, unit)
        size = f"v={v:g} s={s:g} {other}={fixed:g} zipf={zipf:g}".removesuffix(" zipf=0")
        axis.set_title(f"{learner}{', root' if part else ''}\n{size}")
    return figure, [(axis, table, part) for axis, (_, table, part) in zip(axes, panels)]


@OUR_STYLE
def samples_vs_depth(*paths, out=None):
    """P* against depth L, or against m if L is one. Returns the picture's path, as all do."""
    figure, _ = draw_panels(read(paths)["P50"], "P*: training strings that recover level L-1", "P*")
    return save(figure, paths[0], "", out)


@OUR_STYLE
def collapse(*paths, out=None):
    """P* / (v m^3) against m at the largest depth that has several m; stars: the paper's P*."""
    depths = group(read(paths)["P50"], "L")
    deepest = max(depths, key=lambda L: (len(group(depths[L], "m")) > 1, L))
    title = "P* as a multiple of v m^3; stars: the paper's, beside methods that repeat its setting"
    figure, panels = draw_panels(depths[deepest], title, "P* / (v m^3)", vm3)
    stars = read([PAPER])["P_star"] if PAPER.exists() else []       # this file may be alone
    for axis, rows, part in panels:
        for star, row in [(star, row) for star in stars for row in rows]:
            same_size = all(star[name] == row[name] for name in ("v", "s", "L", "m"))
            same_level = (star["target"] == "root") == (part == "root_")    # the paper has either
            same_method = re.match(REPEATS.get(star["figure"], "$"), row["method"])
            if same_size and same_level and same_method and not row["zipf"]:
                axis.plot(math.log2(row["m"]), star["P_star"] / vm3(star), "*", markersize=14,
                          color=COLOURS["latent"], markeredgecolor="black")
    return save(figure, paths[0], "-collapse", out)


@OUR_STYLE
def contrast(*paths, out=None):
    """How far apart contexts of parents are on each level, a line for each target."""
    rows = [row for row in read(paths)["contrast"] if row["contrast"] > 0]      # 0 has no logarithm
    sizes = group(rows, "v", "s", "m", "zipf")
    figure, axes = new_figure("Distance between the contexts of two parents", len(sizes))
    for axis, ((v, s, m, zipf), size) in zip(axes, sizes.items()):
        L = max(row["L"] for row in size)           # it has the levels of all shallower trees
        for (label,), line in group([row for row in size if row["L"] == L], "label").items():
            xs, ys = [[row[name] for row in line] for name in ("level", "contrast")]
            axis.plot(xs, ys, **styles_of(rows)[label])
        axis.set(yscale="log", xlabel="level", ylabel="root mean square", xticks=xs)
        axis.set_title(f"v={v:g} s={s:g} m={m:g} L={L:g} zipf={zipf:g}".removesuffix(" zipf=0"))
    return save(figure, paths[0], "", out)


@OUR_STYLE
def phases(*paths, out=None):
    """Each level's measures against the step; the last ones against P / (v m^3) if P differs."""
    traces = group(sum(read(paths).values(), []), "file").values()
    # after a resume a step comes twice: the last one counts
    runs = [list({row["step"]: row for row in trace}.values()) for trace in traces]
    by_P = len({run[-1]["P"] for run in runs} - {0}) > 1    # 0: an old trace without P
    if by_P:
        rows = sorted([run[-1] for run in runs], key=lambda row: row["P"] / vm3(row))
        x, xs = "P / (v m^3), at the last step", [row["P"] / vm3(row) for row in rows]
    else:
        rows = [row for run in runs for row in [*run, {}]]              # {} interrupts the lines
        x, xs = "step", [row.get("step", math.nan) for row in rows]
    measures = [name for name in MEASURES if f"{name} 1" in rows[0]]
    figure, axes = new_figure("Each level of the tree", len(measures), sharey=False)
    for axis, measure in zip(axes, measures):
        columns = {name: 0 for row in rows for name in row if name.startswith(f"{measure} ")}
        for i, name in enumerate(columns):
            ys = [row.get(name, math.nan) for row in rows]              # trees may differ in depth
            colour = matplotlib.colormaps["viridis"](i / len(columns))  # less its light end
            axis.plot(xs, ys, color=colour, marker=".", label=f"level {i + 1}")
        axis.set(title=MEASURES[measure], xlabel=x, xscale="log" if by_P else "linear")
    return save(figure, paths[0], "", out)


def fit(name, rows):
    """The constant in P* = constant x P_noise. Prints it, with the spread about it."""
    logs = [math.log(row["P50"][1] / row["P_noise"]) for row in rows]
    constant, spread = math.exp(np.mean(logs)), math.exp(np.std(logs))
    print(f"{name}: {constant:.2f} x P_noise, to a factor of {spread:.2f} over {len(rows)} cells")
    return constant


@OUR_STYLE
def prediction(*paths, out=None):
    """P* of clustering over its prediction, one fitted constant times the largest P_noise over the
    levels of a tree. None if no size is in both tables."""
    tables, rows = read(paths), []
    size = "v", "s", "m", "L", "zipf", "target"
    noise = group(tables["contrast"], *size)        # a row for each level
    for row in tables["P50"]:
        levels = noise.get(tuple(row[name] for name in size))
        is_plain = row["learner"] == "cluster" and not row["settings"]
        if levels and is_plain and row["P50"][0] == "=":    # a bound can't be compared
            rows.append(row | {"P_noise": max(level["P_noise"] for level in levels)})
    if not rows:
        return None
    constant = fit("all targets", rows)
    figure, (axis,) = new_figure(f"P* of clustering; predicted: {constant:.2f} x P_noise", 1)
    for (label,), some in group(rows, "label").items():
        xs = [constant * row["P_noise"] for row in some]    # one constant for all targets
        ys = [row["P50"][1] / x for row, x in zip(some, xs)]
        look = {"linestyle": "", "label": f"{label} (own constant {fit(label, some):.2f})"}
        axis.plot(xs, ys, **styles_of(rows)[label] | look)
    axis.axhline(1, color="0.6", linewidth=0.8, zorder=0)   # where the prediction holds
    axis.set(xscale="log", yscale="log", xlabel="predicted P*", ylabel="measured / predicted P*")
    return save(figure, paths[0], "-prediction", out)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE.csv")
    parser.add_argument("--collapse", action="store_true", help="draw P* / (v m^3) against m")
    parser.add_argument("--out", metavar="FILE.png", help="write the picture there")
    args = parser.parse_args()
    if args.out and not args.out.endswith(".png"):
        parser.error("argument --out: must end in .png")
    try:
        kinds = tuple(sorted(read(args.files)))     # all are read before one is drawn
    except ValueError as error:
        parser.error(str(error))
    pictures = {("P50",): collapse if args.collapse else samples_vs_depth, ("contrast",): contrast,
                ("accuracy 1",): phases, ("unseen 1",): phases, ("P50", "contrast"): prediction}
    picture = pictures[kinds](*args.files, out=args.out) if kinds in pictures else None
    if picture is None:
        parser.error(f"{', '.join(args.files)}: nothing to draw")
    print(f"wrote {picture}")


if __name__ == "__main__":
    main()
