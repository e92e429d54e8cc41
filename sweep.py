"""
The table: how many samples P* each learner needs, against the depth of the grammar.

    python sweep.py --depth 2..6                        the table of the README
    python sweep.py --depth 5 --methods data2vec        a cell that it leaves out
    python sweep.py --depth 4 --m 3..6 --methods cluster,cluster-joint --out out/m
    python sweep.py --methods data2vec-token:mask=0.3:steps=8000
    torchrun --nproc-per-node 4 -- sweep.py --depth 2..6    processes share one sweep

A method is written LEARNER-TARGET:SETTING=VALUE:... Without a target the learner predicts its
own latents; a setting that is not written has its default.

For every method, size and seed, P = 2^k is doubled until the highest level of the tree below the
root, L-1, is known with an accuracy of --threshold on fresh strings, twice in a row. P* is the
smallest such P, interpolated in log P. A seed is one fresh grammar and one fresh sample. The climb
also ends at --max-samples, and, for a network, where its steps would see each string fewer than 8
times ("limited by steps"). P* is then a bound.

It writes to --out the runs as they are finished (runs/*.csv, and runs.csv in order), the table
(samples_vs_depth.csv, .md) and its picture. Stop it at any time: the same command continues. Any
number of sweeps may share a folder. Runs of code that has been changed since are not used.
"""

import argparse
import ast
import csv
import itertools
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
import uuid
import zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from datetime import timedelta
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import cluster
import data2vec
import grammar
import predictor
from grammar import MOST_TOKENS, Grammar, check_range, check_sizes, ranks, run, to_device

# A learner is a module with recover(grammar, P, seed, target, device, **settings) -> [accuracy of
# levels 1..L-1, and of the root if it is read]. It may also have TARGETS, Config, SEEDS (how many
# by default), lowest(v, s, m), the first P, and highest(v, config), the last that its steps allow.
LEARNERS = {"cluster": cluster, "predictor": predictor, "data2vec": data2vec}

# the methods of `--methods all`, and the depths at which it runs them. At L = 2 data2vec has
# one level to learn, and its untrained encoder knows the root already.
ALL = {
    "cluster": range(2, 25), "cluster-token": range(2, 25),
    "cluster-root": range(2, 25), "cluster-joint": range(2, 25),
    "predictor": range(2, 5), "predictor-token": range(2, 4),
    "data2vec": range(3, 5), "data2vec-token": range(3, 5),
}
# for each target, the factor by which P* grows with every level in the theory
LAW = {"latent": "1", "joint": "1", "stacked": "1", "several": "1", "token": "m", "root": "m"}


# ---- methods, and the runs of one seed -------------------------------------------------


class Cell(NamedTuple):
    """A row of the table."""

    method: str
    v: int
    s: int
    m: int
    L: int
    zipf: float


@lru_cache(maxsize=None)
def read_method(text):
    """LEARNER-TARGET:SETTING=VALUE:... -> (learner, target, settings). Raises ValueError."""
    words, *changes = text.split(":")
    key, _, target = words.partition("-")
    if key not in LEARNERS:
        raise ValueError(f"methods: no learner {key!r}; there is {', '.join(LEARNERS)}")
    targets = getattr(LEARNERS[key], "TARGETS", ("latent",))
    target = target or "latent"
    if target not in targets:
        raise ValueError(f"methods: {key} has no target {target!r}; it has {', '.join(targets)}")
    settings = {}
    for change in changes:      # :name=value
        name, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"methods: a setting is written :name=value, not {change!r}")
        settings[name.replace("-", "_")] = typed(value)
    return LEARNERS[key], target, settings


def typed(text):
    """The number, the truth value or the word that a text stands for."""
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def limits(cell, cap):
    """(first P, last P, do its steps set the last) of a climb. Raises ValueError if the learner
    can't have these sizes or settings."""
    learner, _, settings = read_method(cell.method)
    v, s, m, L = cell[1:5]
    cap = min(cap, MOST_TOKENS // s**L)
    config = learner.Config.of(**settings).sized(v, s, m, L) if hasattr(learner, "Config") else None
    first = learner.lowest(v, s, m) if hasattr(learner, "lowest") else v * m
    steps_allow = learner.highest(v, config) if hasattr(learner, "highest") else math.inf
    return 2 ** max(0, int(math.log2(first))), min(cap, steps_allow), steps_allow < cap


def crossing(P, accuracy, threshold):
    """The smallest P from which the accuracy is at or above the threshold on two rungs in a row,
    interpolated linearly in log P between the rung before and the first of the two.

    P, accuracy: lists, P ascending. Returns (P*, sign): sign 0 if P* lies on the ladder; -1, with
    the lowest rung, if below it; 1, with the last rung below the threshold, if above it."""
    above = [a >= threshold for a in accuracy]
    if all(above[:2]):                          # both lowest rungs, or the only one
        return float(P[0]), -1
    # one rung above it may be luck; two in a row count
    for i in range(1, len(P) - 1):
        if above[i] and above[i + 1]:
            before = np.nan_to_num(accuracy[i - 1])         # nan: that run diverged
            share = (threshold - before) / (accuracy[i] - before)
            return float(P[i - 1] * (P[i] / P[i - 1]) ** share), 0
    return float(max(p for p, a in zip(P, above) if not a)), 1


def next_P(cell, rungs, args):
    """The P that a seed's climb needs next, None at its end. rungs: {P: accuracies}."""
    P, last, _ = limits(cell, args.max_samples)
    reached = []
    while P in rungs:           # what has been run
        is_read = args.until == "root" and len(rungs[P]) == cell.L
        reached.append(rungs[P][cell.L - 1 if is_read else cell.L - 2])
        P *= 2
    found = len(reached) > 1 and all(a >= args.threshold for a in reached[-2:])     # nan is not
    return None if found or P > last else P


def climb(args, cell, seed, rungs):
    """The runs of one seed, P doubling until P* is known; each is put on disk when it is done.
    rungs: {P: accuracies} of the runs that are known. Returns lines about those that diverged."""
    learner, target, settings = read_method(cell.method)
    lines = []
    while P := next_P(cell, rungs, args):   # P, 2 P, 4 P, ... until P* is known
        start = time.perf_counter()
        try:
            g = Grammar.random(*cell[1:5], seed, cell.zipf)
            rungs[P] = learner.recover(g, P, seed, target=target, device=args.device, **settings)
        except FloatingPointError as error:
            rungs[P] = [math.nan] * (cell.L - 1)            # a loss was not finite
            lines.append(f"{cell.method} L={cell.L} m={cell.m} P={P} seed {seed}: {error}")
        if len(rungs[P]) not in (cell.L - 1, cell.L):
            raise ValueError(f"recover: must return {cell.L - 1} or {cell.L} accuracies")
        append(args, cell, P, seed, rungs[P], time.perf_counter() - start)
    return lines


# ---- the folder: finished runs on disk -------------------------------------------------


COLUMNS = "method,v,s,m,L,zipf,P,seed,level,accuracy,seconds,device,code".split(",")


@lru_cache(maxsize=None)
def code_of(learner):
    """Eight hex digits that tell the code of a learner, and of the grammar, from others."""
    files = [Path(module.__file__) for module in (learner, grammar)]
    # syntax trees, so that comments don't count
    trees = [ast.dump(ast.parse(file.read_text(encoding="utf-8"))) for file in files]
    return f"{zlib.crc32(repr(trees).encode()):08x}"


@lru_cache(maxsize=None)
def own_file(out):
    """The file of this process, which nobody else writes; all else is made from such files."""
    path = Path(out) / "runs" / f"{uuid.uuid4().hex[:12]}.csv"
    path.write_text(",".join(COLUMNS) + "\n")
    return path


def append(args, cell, P, seed, accuracy, seconds):
    """Put a run on disk: a row for each level, level 1 last, as a seal; in one write."""
    code, lines = code_of(read_method(cell.method)[0]), ""
    for level in reversed(range(1, len(accuracy) + 1)):
        # method, v, s, m, L, zipf, P, seed, level, accuracy, seconds
        about = [*cell, P, seed, level, f"{accuracy[level - 1]:.6f}", f"{seconds:.3f}"]
        lines += ",".join(map(str, [*about, args.device, code])) + "\n"
    with open(own_file(args.out), "ab") as file:
        file.write(lines.encode())


def read_runs(out, warn=lambda line: None):
    """All whole runs of today's code: {(Cell, seed): {P: [rows of levels 1, 2, ...]}}."""
    found, others = {}, set()
    for path in sorted(Path(out).glob("runs/*.csv")):
        # a spreadsheet may have put a mark before the first column
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            reader = csv.DictReader(file)
            if not set(COLUMNS) <= set(reader.fieldnames or COLUMNS):
                warn(f"{path} is no file of runs, and is ignored")
                continue
            for row in reader:
                try:
                    sizes = [int(row[name]) for name in ("v", "s", "m", "L")]
                    cell = Cell(row["method"], *sizes, float(row["zipf"]))
                    key, level = (cell, int(row["seed"]), int(row["P"])), int(row["level"])
                    float(row["accuracy"]), float(row["seconds"])
                    learner, _, _ = read_method(cell.method)
                except (TypeError, ValueError):             # a last line that was cut short
                    continue
                # what other code has made stays there, for the day it comes back
                if row["code"] == code_of(learner):
                    found.setdefault(key, {})[level] = row
                else:
                    others.add((key, row["code"]))
    if others:
        warn(f"{len(others)} runs in {out} are of other code, and are not used")
    runs = {}
    for (cell, seed, P), levels in sorted(found.items()):
        if set(levels) >= set(range(1, cell.L)):            # not torn
            runs.setdefault((cell, seed), {})[P] = [levels[level] for level in sorted(levels)]
    return runs


def accuracies(runs):
    """{P: [rows]} -> {P: [accuracy of level 1, 2, ...]}."""
    return {P: [float(row["accuracy"]) for row in rows] for P, rows in runs.items()}


# ---- the tables. stars: [(P*, sign)] of the seeds of a cell, as crossing returns them --


def estimate(stars):
    """Texts (P*, lowest, highest): the geometric mean over seeds, and the ends of their range. If
    a seed has only a bound, the mean is one, "> 412" or "< 16", "?" if they pull both ways."""
    mean = math.exp(np.mean([math.log(P) for P, _ in stars]))
    signs = {sign for _, sign in stars} - {0}
    if len(signs) == 2:
        return "?", "", ""
    if signs:
        return f"{'>' if 1 in signs else '<'} {mean:.0f}", "", ""
    numbers = [P for P, _ in stars]
    return f"{mean:.0f}", f"{min(numbers):.0f}", f"{max(numbers):.0f}"


def slope(points, is_factor):
    """Least squares of log P* over all seeds against x, with its standard error: a text, "" if
    there is none. points: {x: stars}; is_factor: exp(slope), the growth of P* per unit of x."""
    # one point for every seed
    x = np.array([x for x, stars in points.items() for _ in stars], float)
    log = np.array([math.log(P) for stars in points.values() for P, _ in stars])
    signs = np.array([sign for stars in points.values() for _, sign in stars])
    if len(points) < 2:
        return ""
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()      # slope = weights . log
    value = weights @ log
    pulls = set(np.sign(weights * signs)) - {0.0}           # of the seeds that are bounds
    scale = math.exp(value) if is_factor else 1
    text = f"{math.exp(value) if is_factor else value:.2f}"
    if pulls:
        # all in one direction: the slope is a bound
        return f"{'>' if 1 in pulls else '<'}{text}" if len(pulls) == 1 else ""
    if len(x) < 3:
        return text
    residual = log - log.mean() - value * (x - x.mean())
    error = math.sqrt((residual**2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum())
    return f"{text} ± {scale * error:.2f}"


def table_row(cell, runs, args):
    """One row of samples_vs_depth.csv, and beside it the stars of level L-1 and of the root."""
    ladders = [accuracies(runs[key]) for key in sorted(runs) if key[0] == cell]
    row = {**cell._asdict(), "seeds": len(ladders), "status": "" if ladders else "not run"}
    for level, name in (cell.L - 1, "P50"), (cell.L, "root_P50"):
        stars = []
        for rungs in ladders:
            # not every learner reads the root
            P = sorted(P for P in rungs if len(rungs[P]) >= level)
            if P:
                accuracy = [rungs[p][level - 1] for p in P]
                stars.append(crossing(P, accuracy, args.threshold))
        row[name + "_stars"] = stars
        if stars:
            row[name], row[name + "_lo"], row[name + "_hi"] = estimate(stars)
    signs = [sign for _, sign in row["P50_stars"]]
    row["censored"] = sum(sign != 0 for sign in signs)
    if signs and not row["censored"]:
        row["P50_over_vm3"] = f"{float(row['P50']) / (cell.v * cell.m**3):.4g}"
    # why P* is only a bound
    if 1 in signs:
        by_steps = limits(cell, args.max_samples)[2]
        row["status"] = "limited by steps" if by_steps else "beyond Pmax"
        if any(next_P(cell, rungs, args) for rungs in ladders):
            row["status"] = "not finished"
    if any(math.isnan(values[0]) for rungs in ladders for values in rungs.values()):
        row["status"] = "diverged"
    return row


TABLE = ("method,v,s,m,L,zipf,P50,P50_lo,P50_hi,P50_over_vm3,root_P50,root_P50_lo,root_P50_hi,"
         "seeds,censored,status").split(",")
MARKS = {"limited by steps": "s", "not finished": "..", "diverged": "x", "not run": "-"}


def size_table(rows):
    """The Markdown table of one size: level L-1 of all methods, a line each, then all their roots.
    The column growth has the factor of P* per level and the depths that it covers. They begin at
    L = 3: in a tree of depth 2 the only grandparent is the root."""
    title = "v={v} s={s} m={m} zipf={zipf:g}".format(**rows[0]).removesuffix(" zipf=0")
    depths = sorted({row["L"] for row in rows})
    table = [[title, *(f"L={L}" for L in depths), "growth, L", "law"]]
    methods = dict.fromkeys(row["method"] for row in rows)
    for part, method in itertools.product(("P50", "root_P50"), methods):
        line = {row["L"]: row for row in rows if row["method"] == method}
        stars = {L: row[part + "_stars"] for L, row in line.items() if row[part + "_stars"]}
        if part == "root_P50" and not stars:
            continue
        texts = [cell_text(line[L], part) if L in line else "" for L in depths]
        # beyond the depth where the only grandparent is the root
        deep = {L: stars[L] for L in stars if L > 2}
        growth = slope(deep, is_factor=True)
        if growth:
            growth += f", {min(deep)}..{max(deep)}"
        # the theory has no law for a probe of the root
        law = LAW.get(read_method(method)[1], "") if part == "P50" else ""
        name = method if part == "P50" else f"{method}, root"
        table.append([name, *texts, growth, law])
    # columns of one width
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    lines = [[text.ljust(width) for text, width in zip(line, widths)] for line in table]
    return "\n".join(" | ".join(line).rstrip() for line in lines)


def cell_text(row, part):
    """One entry of a printed table, such as 296 [237, 362] or >2048 s."""
    text = row.get(part, "").replace(" ", "")
    if row.get(part + "_lo") and row["seeds"] > 1:
        text += f" [{row[part + '_lo']}, {row[part + '_hi']}]"
    mark = MARKS.get(row["status"], "") if part == "P50" else ""
    return f"{text} {mark}".strip()


def tables(rows):
    """All tables as one text; with the exponent of m where there are several."""
    size_of = itemgetter("v", "s", "m", "zipf")
    text, over_m = [], {}
    for _, group in itertools.groupby(rows, size_of):
        text.append(size_table(list(group)))
    for row in rows:
        series = "{method}, v={v} s={s} L={L} zipf={zipf:g}".format(**row)
        if row["P50_stars"]:
            over_m.setdefault(series, {})[math.log(row["m"])] = row["P50_stars"]
    for series, stars in over_m.items():
        if exponent := slope(stars, is_factor=False):
            text.append(f"{series}: P* goes with m to the power of {exponent}")
    legend = ["P*: geometric mean of seeds [lowest, highest]", "growth: least squares ± its error"]
    statuses = {row["status"] for row in rows}
    legend += [f"{mark} {status}" for status, mark in MARKS.items() if status in statuses]
    text.append(", ".join(legend))
    for row in [row for row in rows if row["status"] == "not run"][-1:]:
        text.append("--methods {method} --depth {L} runs the last of these".format(**row))
    return "\n\n".join(text)


def write_tables(args, unrun):
    """Make runs.csv and both tables from all files. Returns the text of the tables."""
    runs, out = read_runs(args.out), Path(args.out)
    methods = [*ALL, *sorted({cell.method for cell, _ in runs} - set(ALL))]

    def place(cell):            # sizes, then methods in the order of ALL
        return cell.v, cell.s, cell.m, cell.zipf, methods.index(cell.method), cell.L

    def write(name, columns, rows):
        with open(out / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    in_order = sorted(runs, key=lambda key: (place(key[0]), key[1]))
    write("runs.csv", COLUMNS, (row for key in in_order for P in runs[key] for row in runs[key][P]))
    cells = sorted({cell for cell, _ in runs} | set(unrun), key=place)
    rows = [table_row(cell, runs, args) for cell in cells]
    write("samples_vs_depth.csv", TABLE, rows)
    text = tables(rows)
    (out / "samples_vs_depth.md").write_text(text + "\n", encoding="utf-8")
    return text


# ---- all seeds of all cells, in several processes --------------------------------------


def start_worker():
    """Set up a worker process: one thread. It ends silently at Ctrl-C, and with its parent, for
    which it would otherwise wait for ever."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())            # its own would outlive a killed process
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def finished(ladders, args, jobs):
    """Climb all ladders, [(cell, seed, rungs)]. Yields (cell, seed, lines, its error or None)."""
    if jobs == 1:               # here, so that a debugger works
        for cell, seed, rungs in ladders:
            try:
                yield cell, seed, climb(args, cell, seed, rungs), None
            except Exception as error:
                yield cell, seed, [], error
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, start_worker) as pool:
        try:
            futures = {pool.submit(climb, args, *ladder): ladder for ladder in ladders}
            for future in as_completed(futures):
                cell, seed, _ = futures[future]
                error = future.exception()
                if isinstance(error, BrokenExecutor):       # a worker was killed
                    raise error
                yield cell, seed, [] if error else future.result(), error
        except BaseException:
            # Ctrl-C: don't wait for runs that will be done again
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def sweep(cells, args, jobs, rank, world):
    """Climb for all seeds of {Cell: seeds}. Prints P* of each cell when it is done, and returns how
    many climbs ended in an error."""
    runs = read_runs(args.out, tqdm.write if rank == 0 else lambda line: None)
    ladders = []
    for cell, seeds in cells.items():
        ladders += [(cell, seed, accuracies(runs.get((cell, seed), {}))) for seed in seeds]
    # quick learners first, so that they can be read soon; of each the costly climbs first
    place = {learner: i for i, learner in enumerate(LEARNERS.values())}
    ladders.sort(key=lambda ladder: (place[read_method(ladder[0].method)[0]], -ladder[0].L))
    ladders = ladders[rank::world]
    left = {cell: len(seeds) for cell, seeds in cells.items()}
    failures = 0
    with tqdm(total=len(ladders), unit="seed", disable=rank > 0) as bar:
        for cell, seed, lines, error in finished(ladders, args, jobs):
            name = f"{cell.method} L={cell.L} m={cell.m}"
            bar.set_postfix_str(f"{name} seed {seed}", refresh=False)
            bar.update()
            if error:
                failures += 1
                lines = [f"{name} seed {seed} failed:", *traceback.format_exception(error)]
            for line in lines:
                tqdm.write(line)
            # a line of the table as soon as all of its seeds are done
            left[cell] -= 1
            if left[cell] == 0 and world == 1:
                row = table_row(cell, read_runs(args.out), args)
                tqdm.write(f"{name}: P* = {cell_text(row, 'P50')}")
    return failures


# ---- the command line ------------------------------------------------------------------


def span(text):
    """An argparse type: 4, or 2..6, or 2,4,6 -> a list of whole numbers, each once."""
    numbers = set()
    for part in text.split(","):
        low, _, high = part.partition("..")     # high is "" for a single number
        numbers.update(range(int(low), int(high or low) + 1))
    if not numbers:
        raise ValueError
    return sorted(numbers)


def seeds(text):
    """An argparse type: 5 for 0..4, or as span."""
    is_number = ".." not in text and "," not in text
    return span(f"0..{int(text) - 1}" if is_number else text.replace("-", "x"))     # none below 0


def read_flags():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--depth", type=span, default=[2, 3, 4, 5, 6], help="L: 4 or 2..6 or 2,4,6 (default 2..6)")
    add("--m", type=span, default=[3], help="rules per symbol, as --depth (default 3)")
    add("--v", type=int, default=8, help="symbols per level (default 8)")
    add("--s", type=int, default=2, help="children per symbol (default 2)")
    add("--zipf", type=float, default=0.0, help="rule j has p ~ (j+1)^-zipf (default 0)")
    add("--methods", default="all", help=f"{', '.join(ALL)} or any LEARNER-TARGET:SETTING=VALUE, "
        "separated by commas; or all, which runs networks only at some depths of 2..4")
    add("--seeds", type=seeds, help="5 for 0..4, or 100..104 (default 5 seeds, networks 3)")
    add("--threshold", type=float, default=0.5, help="the accuracy that counts (default 0.5)")
    add("--until", choices=["level", "root"], default="level", help="whose P* ends a climb")
    add("--max-samples", type=int, default=2**20, help="largest P (default 2^20)")
    add("--device", type=to_device, default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--jobs", type=int, help="processes (default: one per core; 4 on a GPU; 1 for torchrun)")
    add("--out", metavar="DIR", default="out", help="folder of results (default out)")
    args = parser.parse_args()
    try:
        cells, unrun = cells_of(args)
        if Path(args.out, "runs.csv").exists() and not Path(args.out, "runs").exists():
            raise ValueError(f"out: {args.out} has results without their runs; name another folder")
        (Path(args.out) / "runs").mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        parser.error(f"argument --{error}")
    except OSError as error:
        parser.error(f"argument --out: {error}")
    return args, cells, unrun


def cells_of(args):
    """({Cell: seeds} to run, the cells that `all` leaves out). Raises ValueError."""
    check_range("zipf", args.zipf, 0, 10)
    check_range("threshold", args.threshold, 1e-9, 1)
    check_range("jobs", args.jobs or 1, 1, 61)  # Windows waits for no more processes
    words = [word.strip() for word in args.methods.split(",")]
    # cluster-latent is cluster
    named = [re.sub("-latent(?=:|$)", "", word) for word in words if word != "all"]
    methods = dict.fromkeys([*ALL, *named] if "all" in words else named)
    cells, unrun = {}, []
    for method, m, L in itertools.product(methods, args.m, args.depth):
        learner, _, _ = read_method(method)
        cell = Cell(method, args.v, args.s, m, L, args.zipf)
        check_sizes(args.v, args.s, m, L)       # names the flag
        if method not in named and L not in ALL[method]:
            unrun.append(cell)
            continue
        try:
            first, last, by_steps = limits(cell, args.max_samples)
        except ValueError as error:
            if method in named:
                raise ValueError(f"methods: {method}: {error}") from None
            unrun.append(cell)                  # of `all`: this learner can't have that size
            continue
        if first > last:                        # or it would be missing in silence
            flag = "methods" if by_steps else "max-samples"
            raise ValueError(f"{flag}: {method} at m = {m} starts at {first}, the last is {last}")
        cells[cell] = args.seeds or range(getattr(learner, "SEEDS", 5))
    return cells, unrun


def main():
    rank, world, local_rank = ranks()
    args, cells, unrun = read_flags()
    torch.set_num_threads(1)                    # as in a worker: results don't depend on --jobs
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    jobs = args.jobs or (4 if args.device != "cpu" else cores if world == 1 else 1)
    if world > 1 and args.device == "cuda":     # one GPU a rank, by turns if there are fewer
        args.device = f"cuda:{local_rank % torch.cuda.device_count()}"
    try:
        failures = sweep(cells, args, min(jobs, 61), rank, world)
    except (KeyboardInterrupt, BrokenExecutor) as error:
        reason = "a process was killed" if isinstance(error, BrokenExecutor) else "stopped"
        safe = f"the same command continues from the runs in {args.out}"
        print(f"\n{reason}; {safe}", file=sys.stderr)
        sys.exit(130)
    if world > 1:
        # wait until all ranks are done, and add up
        dist.init_process_group("gloo", timeout=timedelta(days=365))
        total = torch.tensor(failures)
        dist.all_reduce(total)
        dist.destroy_process_group()
        failures = int(total)
    if rank == 0:
        print("\n" + write_tables(args, unrun))
        try:
            import plot  # here, since nothing else needs matplotlib

            print(f"\nwrote {plot.samples_vs_depth(Path(args.out) / 'samples_vs_depth.csv')}")
        except Exception as error:
            print(f"\nno picture: {error!r:.200}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    run(main)
