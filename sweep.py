"""
The table: how many samples P* each learner needs, against the depth of the grammar. Learners x targets x depths.

    python sweep.py --depth 2..6                                   clustering for four targets, v=8 s=2 m=4
    python sweep.py --depth 2..6 --seeds 3 --methods predictor     adds the network's row to the same table
    python sweep.py --depth 2..5 --m 3 --seeds 2 --max-samples 2048 --methods data2vec,data2vec-token,data2vec-stacked
    python sweep.py --depth 4 --m 3..6 --methods cluster,cluster-joint --out out/m

For every method, depth, m and seed it climbs a ladder of sample sizes P, each twice the last, until the highest
non-root level L-1 is recovered (accuracy >= 0.95) on two rungs in a row, or the next P would pass --max-samples. One
seed is one fresh grammar and one fresh sample; the accuracy is that on 4096 fresh strings. P50 and P90 are the sample
sizes from which on the accuracy of level L-1 stays above 0.5 and 0.9, interpolated in log P. It writes to --out
  runs.csv                 a row for every run and level, as soon as the run is finished
  settings.json            what the rows don't carry: the settings of the sweep and of each learner
  samples_vs_depth.csv     a row for every method, m and depth: P50 and P90, geometric means over the seeds
  samples_vs_depth.md      the same as a table to read, with the growth per level; it is printed too
  samples_vs_depth.png     drawn by plot.py, where matplotlib is installed
Stop it at any time: the same command continues. Other methods, depths, m, seeds or longer ladders add to the folder.

On 2 cores of an x86 virtual machine (torch 2.13) they take 19 s, 7 minutes, 17 minutes, and a minute.
"""

import csv
import io
import json
import multiprocessing
import os
import signal
import threading
import time
from argparse import ArgumentTypeError
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import cluster
import data2vec
import predictor
from grammar import Grammar, Parser, check_sizes, pick_device, whole

RECOVERED = 0.95  # accuracy of level L-1 from which a rung counts as recovered
RUNG = 2          # a ladder's sample sizes grow by this factor
BOOTSTRAP = 2000  # resamples of the seeds behind every 95 % interval


# ----------------------------------------------------------------------------------------------------------------------
# the methods: a learner and what it predicts


class Method(NamedTuple):
    recover: Callable  # (grammar, P, seed, device=..., **arguments) -> accuracy and collapsed, for the levels 1..L-1
    arguments: dict    # its target, first of all
    growth: str        # of P* per level in the theory: "1" or "m"


METHODS = {
    "cluster": Method(cluster.recover, {"target": "latent"}, "1"),
    "cluster-token": Method(cluster.recover, {"target": "token"}, "m"),
    "cluster-root": Method(cluster.recover, {"target": "root"}, "m"),
    "cluster-joint": Method(cluster.recover, {"target": "joint"}, "1"),
    "cluster-cousins": Method(cluster.recover, {"target": "latent", "context": "cousins"}, "1"),
    "cluster-element": Method(cluster.recover, {"target": "latent", "context": "element"}, "1"),
    "predictor": Method(predictor.recover, {"target": "latent"}, "1"),
    "predictor-token": Method(predictor.recover, {"target": "token"}, "m"),
    "predictor-joint": Method(predictor.recover, {"target": "joint"}, "1"),
    # is it steps or strings?
    "predictor-long": Method(predictor.recover, {"target": "latent", "steps": 3200, "epochs": 800}, "1"),
    "predictor-token-long": Method(predictor.recover, {"target": "token", "steps": 3200, "epochs": 800}, "m"),
    "predictor-layers": Method(predictor.recover, {"detach": "layers"}, "1"),  # the other three curves of figure 9
    "predictor-layers-noema": Method(predictor.recover, {"detach": "layers", "ema": 0.0}, "1"),
    "predictor-local-noema": Method(predictor.recover, {"detach": "layers+clusterer", "ema": 0.0}, "1"),
    "data2vec": Method(data2vec.recover, {"target": "latent"}, "1"),
    "data2vec-token": Method(data2vec.recover, {"target": "token"}, "m"),
    "data2vec-stacked": Method(data2vec.recover, {"target": "stacked"}, "1"),
}
MASKS = {  # of data2vec and data2vec-token; without a word, mixed blocks at 30 %
    "-mask15": {"mask_block": 0, "mask": 0.15},  # single tokens at the paper's rate
    "-mask30": {"mask_block": 0, "mask": 0.3},   # as many tokens hidden as by default, but each by itself
    "-mask50": {"mask_block": 0, "mask": 0.5},
    "-block1": {"mask_block": 1},                # the siblings of a hidden token are hidden, too
    "-blocktop": {"mask_block": "top"},          # nothing but cousins of level L-2 to predict from
}
STEPS = {"-long": {"steps": 8000}, "-longer": {"steps": 16000}}  # instead of 4000: is it steps or strings?
PLAIN = tuple(METHODS)
for name in ("data2vec", "data2vec-token"):
    for mask, where in {"": {}, **MASKS}.items():
        for length, steps in {"": {}, **STEPS}.items():
            METHODS[name + mask + length] = METHODS[name]._replace(arguments=METHODS[name].arguments | where | steps)
NAMES = f"{', '.join(PLAIN)}; and data2vec and data2vec-token with {', '.join(MASKS)}, then with {' or '.join(STEPS)}"
DEFAULT = ("cluster", "cluster-token", "cluster-root", "cluster-joint")
SETTINGS = {  # what a row of runs.csv does not say, by file: other values mean another folder
    "sweep": {"format": 1, "recovered": RECOVERED, "rung": RUNG},
    "cluster": cluster.SETTINGS,
    "predictor": predictor.SETTINGS,
    "data2vec": data2vec.SETTINGS,
}


class Ladder(NamedTuple):
    """One climb; with P, the first six columns of runs.csv."""

    method: str
    v: int
    s: int
    m: int
    L: int
    seed: int


def learner(method):
    return method.split("-")[0]


FIRST = {  # where ladders start, in (v, s, m), for each learner; the power of 2 at or below
    "cluster": lambda v, s, m: v * m / (2 * s),     # fewer than half of the tuples of level L-2 can have been seen
    "predictor": lambda v, s, m: v * m**2,          # a network's run is dearer, and as dear at a small P as at a large
    "data2vec": lambda v, s, m: v * m**3,
}


def first_rung(ladder):
    """The P that a ladder starts at, a power of 2."""
    return 2 ** max(0, int(np.log2(FIRST[learner(ladder.method)](ladder.v, ladder.s, ladder.m))))


def last_rung(ladder, max_samples):
    """A network with a fixed number of steps looks at steps x batch strings and never sees more of a larger sample."""
    settings = SETTINGS[learner(ladder.method)] | METHODS[ladder.method].arguments
    if "steps" not in settings:
        return max_samples
    return min(max_samples, settings["steps"] * (settings["batch"] or 8 * ladder.v))  # batch 0 stands for 8 v


def next_rung(ladder, runs, max_samples):
    """The P to try next, or None at the end of the ladder. runs: {P: accuracies of the levels 1..L-1}."""
    P, streak = first_rung(ladder), 0
    while P in runs:
        streak = streak + 1 if runs[P][-1] >= RECOVERED else 0
        if streak == 2:
            return None
        P *= RUNG
    return P if P <= last_rung(ladder, max_samples) else None


def climb(ladder, P, device):
    """One rung, in a worker process. Returns its rows of runs.csv, one for every level 1..L-1."""
    method = METHODS[ladder.method]
    grammar = Grammar.random(ladder.v, ladder.s, ladder.m, ladder.L, ladder.seed)
    start = time.perf_counter()
    accuracy, collapsed = method.recover(grammar, P, ladder.seed, device=device, **method.arguments)
    seconds = time.perf_counter() - start
    return [
        [*ladder[:5], P, ladder.seed, level, f"{a:.6f}", f"{seconds:.3f}", device, int(c)]
        for level, (a, c) in enumerate(zip(accuracy, collapsed), 1)
    ]


def start_worker():
    """One thread of work per process. Ctrl-C ends it at once and silently, since finished runs are the parent's
    business, and so does the parent's death, which would leave it waiting for ever."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# ----------------------------------------------------------------------------------------------------------------------
# the folder: finished runs on disk


COLUMNS = "method,v,s,m,L,P,seed,level,accuracy,seconds,device,collapsed".split(",")


class Refused(Exception):
    """The folder holds something that this sweep must not mix with, or touch."""


def open_folder(out, learners):
    """Check DIR/settings.json and DIR/runs.csv against this sweep, create what is missing, and return the finished
    runs as {Ladder: {P: [accuracies]}}. Raises Refused, and has changed nothing, if they are of another kind."""
    settings_file, runs_file = out / "settings.json", out / "runs.csv"
    wanted = {name: SETTINGS[name] for name in ("sweep", *learners)}
    try:
        settings = json.loads(settings_file.read_text()) if settings_file.exists() else None
        text = runs_file.read_bytes().decode() if runs_file.exists() else None
    except (OSError, ValueError) as error:
        raise Refused(f"cannot read its settings.json and runs.csv ({error})") from None
    if text is not None and not isinstance(settings, dict):
        raise Refused("has a runs.csv but no settings.json that belongs to it")
    for name, values in wanted.items():
        if settings and settings.get(name, values) != values:
            raise Refused(f"was made with other settings of {name}.py: {settings[name]}, now {values}")
    runs, whole_lines = {}, None
    if text is not None:
        runs, whole_lines = read_runs(text)
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace(settings_file, json.dumps({**(settings or {}), **wanted}, indent=1) + "\n")
        if whole_lines != text or text is None:  # new, or a kill has cut the last run short
            replace(runs_file, whole_lines or ",".join(COLUMNS) + "\n")
    except OSError as error:
        raise Refused(f"cannot be written to ({error.strerror})") from None
    return runs


def read_runs(text):
    """The text of runs.csv -> ({Ladder: {P: [accuracies]}}, the text without a last run that was cut short)."""
    lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
    if not lines and text and not (",".join(COLUMNS) + "\n").startswith(text):
        raise Refused("has a runs.csv that is not this sweep's")
    runs, kept = {}, lines[:1] or [",".join(COLUMNS) + "\n"]
    if kept[0].strip().split(",") != COLUMNS:
        raise Refused(f"has a runs.csv with other columns than {','.join(COLUMNS)}")
    group = []  # the lines of one run, its rows in the order of their levels
    for number, line in enumerate(lines[1:], 2):
        try:
            row = dict(zip(COLUMNS, next(csv.reader([line])), strict=True))
            ladder = Ladder(row["method"], *(int(row[name]) for name in ("v", "s", "m", "L", "seed")))
            P, level, accuracy = int(row["P"]), int(row["level"]), float(row["accuracy"])
            if level != len(group) + 1 or group and group[0][2:] != (ladder, P) or not 0 <= accuracy <= 1:
                raise ValueError
        except ValueError:
            raise Refused(f"has a runs.csv whose line {number} is not a row of this sweep") from None
        group.append((line, accuracy, ladder, P))
        if level == ladder.L - 1:
            runs.setdefault(ladder, {})[P] = [run[1] for run in group]
            kept += [run[0] for run in group]
            group = []
    return runs, "".join(kept)


def replace(path, text):
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, newline="\n")
    os.replace(part, path)


def sort_runs(out):
    """Put the finished runs in order, whatever order they finished in, so that the same sweep gives the same file."""
    header, *lines = (out / "runs.csv").read_text().splitlines(keepends=True)
    kinds = [str if name in ("method", "device") else float for name in COLUMNS]
    lines.sort(key=lambda line: [kind(x) for kind, x in zip(kinds, line.strip().split(",")[:8])])
    replace(out / "runs.csv", header + "".join(lines))


# ----------------------------------------------------------------------------------------------------------------------
# the summary


def crossing(P, accuracy, threshold):
    """Where the accuracy crosses the threshold for the last time, interpolated linearly in log P.

    P, accuracy: equally long lists, P ascending. Returns (P*, sign): sign 1 and the largest P if the accuracy ends
    below the threshold (P* is larger), -1 and the smallest if it never was below (P* is smaller), else 0."""
    below = [i for i, a in enumerate(accuracy) if a < threshold]
    if not below:
        return float(P[0]), -1
    i = below[-1]
    if i == len(P) - 1:
        return float(P[-1]), 1
    share = (threshold - accuracy[i]) / (accuracy[i + 1] - accuracy[i])
    return float(P[i] * (P[i + 1] / P[i]) ** share), 0


def mean_and_interval(stars):
    """[(P*, sign), ...] over the seeds -> (cell text or geometric mean, low, high, censored seeds).

    One seed beyond its ladder makes the mean unknown: then the first is "> Pmax" ("< Pmin" if below)."""
    for sign, mark in ((1, ">"), (-1, "<")):
        beyond = [P for P, s in stars if s == sign]
        if beyond:
            return f"{mark} {min(beyond):.0f}", None, None, len(beyond)
    logs = np.log([P for P, _ in stars])
    resampled = np.random.default_rng(0).choice(logs, size=(BOOTSTRAP, len(logs))).mean(1)
    low, high = np.exp(np.percentile(resampled, [2.5, 97.5]))
    return float(np.exp(logs.mean())), float(low), float(high), 0


def fit(points):
    """{x: [P* of every seed]} -> (slope, low, high) of log P* against x, the interval from resampling the seeds."""
    x = np.array(sorted(points), float)
    rng = np.random.default_rng(0)
    y = [np.log(points[k]) for k in sorted(points)]
    means = np.stack([np.append(a.mean(), rng.choice(a, size=(BOOTSTRAP, len(a))).mean(1)) for a in y])
    slope = (x - x.mean()) @ means / ((x - x.mean()) ** 2).sum()  # the first is the data's own
    return slope[0], *np.percentile(slope[1:], [2.5, 97.5])


def summarise(runs):
    """{Ladder: {P: accuracies}} -> the rows of samples_vs_depth.csv, and the text of samples_vs_depth.md."""
    order = {name: i for i, name in enumerate(METHODS)}
    stars = {}  # (method, v, s, m, L) -> the P50 and the P90 of every seed
    for ladder in sorted(runs, key=lambda a: (a.v, a.s, order.get(a.method, 99), *a)):
        P, top = zip(*sorted((P, accuracy[-1]) for P, accuracy in runs[ladder].items()))
        stars.setdefault(ladder[:5], []).append([crossing(P, top, threshold) for threshold in (0.5, 0.9)])
    rows, cells, known = [], {}, {}
    for key, seeds in stars.items():
        P50, low, high, censored = mean_and_interval([P50 for P50, _ in seeds])
        P90 = mean_and_interval([P90 for _, P90 in seeds])[0]
        over_vm3 = "" if low is None else f"{P50 / (key[1] * key[3] ** 3):.4g}"
        rows.append([*key, *map(show, (P50, low, high, P90)), over_vm3, len(seeds), censored])
        if censored:
            cells[key] = f"{P50} ({censored} of {len(seeds)} seeds)"
        else:
            cells[key] = f"{P50:.0f} [{low:.0f}, {high:.0f}]"
            known[key] = [P for (P, _), _ in seeds]
    text = "P*, the samples at which level L-1 is recovered (accuracy 0.5): "
    text += "geometric mean over the seeds [95 % interval]\n\n"
    return rows, text + depth_table(cells, known) + exponent_table(known)


def depth_table(cells, known):
    """A row for every method and m, a column for every depth; last the growth per level, from L = 3 on: a tree of
    depth 2 has no cousins but under the root."""
    depths = sorted({key[4] for key in cells})
    table = [["method", "v", "s", "m", *(f"L = {L}" for L in depths), "growth per level", "theory"]]
    for group in dict.fromkeys(key[:4] for key in cells):
        points = {L: known[(*group, L)] for L in depths if L >= 3 and (*group, L) in known}
        growth = ""
        if len(points) > 1:
            growth = "{:.2f} [{:.2f}, {:.2f}]".format(*np.exp(fit(points))) + f", L = {min(points)}..{max(points)}"
        theory = METHODS[group[0]].growth if group[0] in METHODS else ""
        theory = f"m = {group[3]}" if theory == "m" else theory
        table.append([*group, *(cells.get((*group, L), "") for L in depths), growth, theory])
    return markdown(table)


def exponent_table(known):
    """The exponent of m, for every method and depth that has several."""
    table = [["method", "v", "s", "L", "m", "exponent of m in P*"]]
    for method, v, s, L in dict.fromkeys((*key[:3], key[4]) for key in known):
        several = sorted(key[3] for key in known if (*key[:3], key[4]) == (method, v, s, L))
        if len(several) > 1:
            points = {np.log(m): known[(method, v, s, m, L)] for m in several}
            exponent = "{:.2f} [{:.2f}, {:.2f}]".format(*fit(points))
            table.append([method, v, s, L, f"{several[0]}..{several[-1]}", exponent])
    return "\n" + markdown(table) if len(table) > 1 else ""


def markdown(table):
    table = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in table)


def show(number):
    """A number for the tables: text as it is, None as nothing."""
    return number if isinstance(number, str) else "" if number is None else f"{number:.0f}"


def write_summary(out, runs):
    """The two tables; returns the one to read."""
    rows, text = summarise(runs)
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow("method,v,s,m,L,P50,P50_lo,P50_hi,P90,P50_over_vm3,seeds,censored".split(","))
    table.writerows(rows)
    replace(out / "samples_vs_depth.csv", file.getvalue())
    replace(out / "samples_vs_depth.md", text)
    return text


# ----------------------------------------------------------------------------------------------------------------------
# the sweep


def sweep(ladders, runs, out, max_samples, device, jobs):
    """Climb all ladders, `jobs` at a time in processes of one thread each, and put every finished run on disk at once.
    runs, {Ladder: {P: accuracies}}, grows as they come in."""
    waiting = [a for a in sorted(ladders, key=lambda a: -a.L) if next_rung(a, runs.get(a, {}), max_samples)]
    layout = "{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}"  # in tokens per string, a guess at the work
    bar = tqdm(total=sum(a.s**a.L for a in waiting), bar_format=layout, miniters=0, mininterval=1)
    running = {}  # future -> (ladder, P)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:  # the deepest first: long work last would leave cores idle
                    ladder = waiting.pop(0)
                    P = next_rung(ladder, runs.get(ladder, {}), max_samples)
                    running[pool.submit(climb, ladder, P, device)] = ladder, P
                names = (f"{a.method} L={a.L} m={a.m} seed {a.seed} P={P}" for a, P in running.values())
                bar.set_postfix_str(", ".join(names), refresh=False)
                bar.update(0)
                for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                    ladder, P = running.pop(future)
                    rows = future.result()
                    with open(out / "runs.csv", "a", newline="") as file:  # anew, as another sweep may add to it, too
                        csv.writer(file, lineterminator="\n").writerows(rows)
                    runs.setdefault(ladder, {})[P] = [float(row[8]) for row in rows]
                    if next_rung(ladder, runs[ladder], max_samples):
                        waiting.insert(0, ladder)
                    else:
                        bar.update(ladder.s**ladder.L)
                        write_summary(out, runs)
        except BaseException:  # Ctrl-C above all: don't wait for runs that will be done again
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            bar.close()


def span(low):
    """An argparse type: 4, or 2..6, or 2,4,6; whole numbers from low on, ascending and each once."""

    def read(text):
        numbers = set()
        for part in text.split(","):
            ends = [whole(low)(end) for end in part.split("..")]
            if len(ends) > 2 or ends[0] > ends[-1]:
                raise ArgumentTypeError(f"must be like 4 or 2..6 or 2,4,6, not {text!r}")
            numbers |= set(range(ends[0], ends[-1] + 1))
        return sorted(numbers)

    return read


def main():
    parser = Parser(__doc__)
    parser.add_argument("--depth", type=span(2), default=[2, 3, 4, 5, 6], help="L: 4 or 2..6 or 2,4,6 (default 2..6)")
    parser.add_argument("--m", type=span(1), default=[4], help="rules per symbol, in the same forms (default 4)")
    parser.add_argument("--v", type=whole(2, 256), default=8, help="symbols per level (default 8)")
    parser.add_argument("--s", type=whole(2, 62), default=2, help="children per symbol (default 2)")
    parser.add_argument("--methods", default=",".join(DEFAULT), help=f"all, or some of {NAMES}")
    parser.add_argument("--seeds", type=whole(1), default=5, help="seeds 0..N-1, a grammar each (default 5)")
    parser.add_argument("--max-samples", type=whole(1), default=2**20, help="longest P of a ladder (default 2^20)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    parser.add_argument("--jobs", type=whole(1), help="processes (default: one per core on a CPU, one on a GPU)")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("out"), help="folder of results (default out)")
    args = parser.parse_args()
    methods = list(METHODS) if args.methods == "all" else args.methods.split(",")
    for name in methods:
        if name not in METHODS:
            parser.error(f"argument --methods: {name!r} is not all or one of {NAMES}")
    for m in args.m:
        for L in args.depth:
            try:
                check_sizes(args.v, args.s, m, L)
            except ValueError as error:
                parser.error(f"argument --{error}")
    ladders = [
        Ladder(name, args.v, args.s, m, L, seed)
        for name in methods for m in args.m for L in args.depth for seed in range(args.seeds)
    ]
    if 1 in args.m and any(learner(name) == "data2vec" for name in methods):
        parser.error("argument --m: must be 2 or more for data2vec, which is measured on synonyms")
    lowest = max(map(first_rung, ladders))
    if args.max_samples < lowest:
        parser.error(f"argument --max-samples: a ladder starts at {lowest}; allow that or more")
    device = pick_device(parser, args.device)
    jobs = args.jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    jobs = jobs if args.jobs or device == "cpu" else 1
    try:
        runs = open_folder(args.out, {learner(name) for name in methods})
    except Refused as error:
        parser.error(f"argument --out: {args.out} {error}; it is left as it was, choose another folder")
    try:
        sweep(ladders, runs, args.out, args.max_samples, device, jobs)
    except KeyboardInterrupt:
        print(f"\nstopped; {sum(map(len, runs.values()))} finished runs are in {args.out}, the same command continues")
        raise SystemExit(130)
    sort_runs(args.out)
    print(write_summary(args.out, runs))
    present = {learner(ladder.method) for ladder in runs}
    absent = [name for name in FIRST if name not in present]
    if absent:
        print(f"not in this table: {', '.join(absent)}; --methods adds their rows, minutes each, and all of them days")
    try:
        import plot  # matplotlib is its business alone, and a table without a picture is fine
    except ImportError:
        return print("no picture: plot.py needs matplotlib")
    for picture in plot.draw(args.out):
        print(f"wrote {picture}")


if __name__ == "__main__":
    main()
