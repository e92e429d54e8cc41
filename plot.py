"""
The pictures, from the files that sweep.py writes.

    python plot.py out/                                           a sweep's folder
    python data2vec.py --depth 4 --trace 0.csv; python plot.py 0.csv    the trace of a run, or of several

  samples_vs_depth.png   P* against depth: a line per method with its 95 % interval over the seeds, an open marker
                         with an arrow where P* lies beyond the longest ladder, and the laws of the theory as guides;
                         a column of panels for every grammar size, a row for every variant of a learner such as
                         another mask; thicker lines for the same with more steps
  collapse.png           where several m are there, at the largest depth: the accuracy of level L-1 against P, against
                         P/(v m^3) and against P/(v m^(L+1)), a line per seed (the paper's figures 3 and 11). The
                         panel in which the lines of all m fall together shows the law
  phases.png             from traces: when each level rises while data2vec is trained (the paper's figures 5 and 13)
"""

import argparse
import csv
import sys
from itertools import zip_longest
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files, needs no screen
import matplotlib.pyplot as plt

STYLES = {  # by target: colour and marker, told apart in grey and by colour-blind eyes
    "latent": ("#0072b2", "o"), "token": ("#d55e00", "s"), "root": ("#000000", "^"), "joint": ("#009e73", "D"),
    "cousins": ("#56b4e9", "v"), "element": ("#cc79a7", "P"), "stacked": ("#e69f00", "X"),
}
DASHES = {"cluster": "-", "predictor": (0, (5, 1)), "data2vec": (0, (1, 1))}  # by learner
THICKNESS = {"long": 2.5, "longer": 3.5}  # of lines, by steps
GUIDES = {"$v\\,m^3$": lambda v, m, L: v * m**3, "$v\\,m^{L+1}$": lambda v, m, L: v * m ** (L + 1),
          "$v\\,m^L$": lambda v, m, L: v * m**L, "$v\\,m^2$": lambda v, m, L: v * m**2}


def read(path, columns):
    """The rows of a CSV file as dictionaries, numbers as numbers. Raises ValueError if it is not one of sweep.py's."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read {path} ({error})") from None
    if not rows or not set(columns) <= set(rows[0]):
        raise ValueError(f"{path} has no rows with the columns {', '.join(columns)}")
    try:
        return [{k: int(x) if k in ("v", "s", "m", "L", "P", "seed", "level", "seeds") else x for k, x in row.items()}
                for row in rows]
    except (ValueError, TypeError):
        raise ValueError(f"{path} has a row that sweep.py did not write") from None


def draw_depth(rows, path):
    """samples_vs_depth.png from the rows of samples_vs_depth.csv; a column of panels for every grammar size (v, s, m),
    and a row for every variant of the learners, such as a mask, in which targets can be compared."""
    panels = {}
    for row in rows:
        words = row["method"].split("-")[1:]
        variant = "-".join(word for word in words if word not in STYLES and word not in THICKNESS)
        panels.setdefault((variant, (row["v"], row["s"], row["m"])), []).append(row)
    variants = list(dict.fromkeys(variant for variant, _ in panels))
    sizes = sorted({size for _, size in panels})
    wide, high = len(sizes), len(variants)
    if wide == 1 or high == 1:  # rows of three serve better
        wide, high = min(3, len(panels)), -(-len(panels) // 3)
    cells = [(variant, size) for variant in variants for size in sizes]
    depths = sorted({row["L"] for row in rows})
    inches = 1.5 + 5.2 * wide, 0.8 + (3.8 if high == 1 else 3.0) * high
    figure, axes = plt.subplots(high, wide, figsize=inches, squeeze=False, sharey=True)
    for axis, cell in zip_longest(axes.flat, cells):
        if cell not in panels:
            axis.remove()
            continue
        (variant, (v, s, m)), panel = cell, panels[cell]
        methods = list(dict.fromkeys(row["method"] for row in panel))
        for i, method in enumerate(methods):
            learner, *words = method.split("-")
            colour, marker = STYLES[next((word for word in words if word in STYLES), "latent")]
            thickness = next((THICKNESS[word] for word in words if word in THICKNESS), 1.5)
            style = {"color": colour, "marker": marker, "markersize": 4.5 + thickness, "linewidth": thickness}
            shift = 0.03 * (i - (len(methods) - 1) / 2)  # so that bars don't hide each other
            known = [row for row in panel if row["method"] == method and row["P50_lo"]]
            x = [row["L"] + shift for row in known]
            y = [float(row["P50"]) for row in known]
            bars = [[a - float(row["P50_lo"]) for a, row in zip(y, known)],
                    [float(row["P50_hi"]) - a for a, row in zip(y, known)]]
            axis.errorbar(x, y, bars, linestyle=DASHES.get(learner, "-."), capsize=3, label=method, **style)
            for row in panel:
                if row["method"] == method and not row["P50_lo"]:  # "> Pmax" or "< Pmin"
                    sign, bound = row["P50"].split()
                    axis.plot(row["L"] + shift, float(bound), fillstyle="none", **style)
                    tip = float(bound) * (1.8 if sign == ">" else 1 / 1.8)
                    axis.annotate("", (row["L"] + shift, tip), (row["L"] + shift, float(bound)),
                                  arrowprops={"arrowstyle": "->", "color": colour})
        for name, law in GUIDES.items():
            y = [law(v, m, L) for L in depths]
            axis.plot(depths, y, color="0.65", linewidth=0.9, linestyle=(0, (4, 4)), zorder=0)
            axis.annotate(name, (depths[-1], y[-1]), (6, 0), textcoords="offset points", color="0.4", va="center")
        axis.set(yscale="log", xlabel="depth $L$ (levels above the tokens)", xticks=depths)
        axis.set_title(f"v={v}, s={s}, m={m}" + f" ({variant})" * bool(variant), fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9 if len(methods) < 6 else 7, loc="upper left")  # a large one hides points
    seeds = sorted({row["seeds"] for row in rows})
    seeds = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else seeds[0]
    for row in axes:
        row[0].set_ylabel(f"$P^*$, samples for level $L-1$\n({seeds} seeds, 95 % interval)")
    save(figure, path)


def draw_collapse(rows, path):
    """collapse.png from the rows of runs.csv; a row of panels for every method that has several m at its depth."""
    rows = [row for row in rows if row["level"] == row["L"] - 1]
    groups = {}
    for row in rows:
        groups.setdefault((row["method"], row["v"], row["s"], row["L"]), []).append(row)
    groups = {key: g for key, g in groups.items() if len({row["m"] for row in g}) > 1}
    groups = {key: g for key, g in groups.items() if key[3] == max(k[3] for k in groups if k[:3] == key[:3])}
    if not groups:
        return False
    figure, axes = plt.subplots(len(groups), 3, figsize=(11, 0.6 + 2.7 * len(groups)), squeeze=False, sharey=True)
    for line, ((method, v, s, L), group) in zip(axes, groups.items()):
        several = sorted({row["m"] for row in group})
        scales = (("$P$", lambda m: 1), ("$P\\,/\\,(v\\,m^3)$", lambda m: v * m**3),
                  ("$P\\,/\\,(v\\,m^{L+1})$", lambda m: v * m ** (L + 1)))
        for axis, (name, scale) in zip(line, scales):
            for k, m in enumerate(several):
                colour = plt.cm.viridis(0.92 * k / (len(several) - 1))
                for seed in sorted({row["seed"] for row in group}):
                    ladder = sorted((row["P"] / scale(m), float(row["accuracy"])) for row in group
                                    if row["m"] == m and row["seed"] == seed)
                    if ladder:
                        axis.plot(*zip(*ladder), color=colour, linewidth=1.1, marker="osD^vP"[k % 6], markersize=3,
                                  label=f"m={m}" if seed == 0 else None)
            axis.axhline(0.5, color="0.7", linewidth=0.8, zorder=0)
            axis.set(xscale="log", ylim=(0, 1.03), xlabel=name)
            axis.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel(f"accuracy of level {L - 1}")
        line[0].set_title(f"{method}: v={v}, s={s}, L={L}", fontsize=11, loc="left")
        line[0].legend(frameon=False, fontsize=8)
    save(figure, path)
    return True


def draw_phases(traces, path):
    """phases.png from the rows of data2vec.py's --trace files: the unseen-synonym accuracy and the synonym score of
    every level against the step, a colour per level and a line per run."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    kinds = {"unseen": "unseen-synonym accuracy", "synonyms": "synonym score, best map"}
    for axis, (kind, name) in zip(axes, kinds.items()):
        for i, rows in enumerate(traces):
            columns = [column for column in rows[0] if column.startswith(kind)]
            for l, column in enumerate(columns, 1):
                axis.plot([int(row["step"]) for row in rows], [float(row[column]) for row in rows], linewidth=1.2,
                          color=plt.cm.viridis(0.85 * (l - 1) / max(1, len(columns) - 1)), marker="osD^vP"[l % 6],
                          markersize=3, label=f"level {l}" if i == 0 else None)
        axis.set(xlabel="step", ylabel=name)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9)
    save(figure, path)


def save(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def draw(out):
    """Draw what the folder's files allow; returns the paths. Raises ValueError if they are not a sweep's."""
    out = Path(out)
    depth = read(out / "samples_vs_depth.csv", ("method", "v", "s", "m", "L", "P50", "P50_lo", "P50_hi", "seeds"))
    runs = read(out / "runs.csv", ("method", "v", "s", "m", "L", "P", "seed", "level", "accuracy"))
    draw_depth(depth, out / "samples_vs_depth.png")
    drawn = draw_collapse(runs, out / "collapse.png")
    return [out / "samples_vs_depth.png"] + ([out / "collapse.png"] if drawn else [])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="*", default=["out"], help="folder of a sweep, or traces (default out)")
    out = [Path(name) for name in parser.parse_args().out]
    try:
        if out[0].suffix == ".csv":
            draw_phases([read(name, ("step", "unseen 1", "synonyms 1")) for name in out], out[0].parent / "phases.png")
            pictures = [out[0].parent / "phases.png"]
        else:
            pictures = [picture for folder in out for picture in draw(folder)]
        for picture in pictures:
            print(f"wrote {picture}")
    except ValueError as error:
        print(f"plot.py: argument out: {error}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
