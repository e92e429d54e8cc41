"""
The table: how many samples P* each learner needs, against the depth of the grammar.

    python sweep.py --depth 2..6                        the table of the README
    python sweep.py --depth 4 --m 3..6 --methods cluster,cluster-joint --out out/m
    python sweep.py --methods data2vec-token:mask=0.3:steps=8000
    torchrun --nproc-per-node 4 -- sweep.py --depth 2..6    processes share one sweep

A method is written LEARNER-TARGET:SETTING=VALUE:... (without a target: its own latents). For every
method, size and seed (a fresh grammar and sample), P = 2^k is doubled until level L-1, the highest
below the root, has an accuracy of --threshold on fresh strings, twice in a row. P* is the smallest
such P, interpolated in log P. It is a bound where the climb ends before: at --max-samples, or where
a network's steps would see each string fewer than 8 times ("limited by steps").

The runs (runs/*.csv, and runs.csv in order), the table (samples_vs_depth.csv, .md) and its picture
go to --out. Stop it at any time: the same command continues. Any number of sweeps may share a
folder. Runs of code that has been changed since are not used.
"""

import argparse
import ast
import csv
import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import zlib
from collections import namedtuple
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from datetime import timedelta
from functools import cache
from pathlib import Path

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
    **dict.fromkeys(["cluster", "cluster-token", "cluster-root", "cluster-joint"], range(2, 25)),
    "predictor": range(2, 5), "predictor-token": range(2, 4),
    "data2vec": range(3, 5), "data2vec-token": range(3, 5),
}
# for each target, the factor by which P* grows with every level in the theory
LAW = {"latent": "1", "joint": "1", "stacked": "1", "several": "1", "token": "m", "root": "m"}
Cell = namedtuple("Cell", "method v s m L zipf")    # a row of the table


# ---- methods, and the runs of one seed -------------------------------------------------


@cache
def read_method(text):
    """LEARNER-TARGET:SETTING=VALUE:... -> (learner, target, settings). Raises ValueError."""
    words, *changes = text.split(":")           # the first is LEARNER-TARGET
    key, _, target = words.partition("-")
    if key not in LEARNERS:
        raise ValueError(f"methods: no learner {key!r}; there is {', '.join(LEARNERS)}")
    learner, target = LEARNERS[key], target or "latent"
    targets = getattr(learner, "TARGETS", ["latent"])
    if target not in targets:
        raise ValueError(f"methods: {key} has no target {target!r}; it has {', '.join(targets)}")
    settings = {}
    for change in changes:
        name, _, value = change.partition("=")
        try:
            # a number or a truth value; any other text is a word
            value = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
        except (ValueError, SyntaxError):
            pass
        settings[name.replace("-", "_")] = value
    return learner, target, settings


def limits(cell, cap):
    """(first P, last P, do its steps set the last) of a climb. Raises ValueError if the learner
    can't have these sizes or settings."""
    learner, _, settings = read_method(cell.method)
    v, s, m, L = cell[1:5]
    cap = min(cap, MOST_TOKENS // s**L)         # what Grammar.sample allows
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
    level = -1 if args.until == "root" else cell.L - 2      # the root is last, where it is read
    above = []
    while P in rungs:
        above.append(rungs[P][level] >= args.threshold)     # nan is not
        P *= 2
    return None if above[-2:] == [True, True] or P > last else P


def climb(args, cell, seed, rungs):
    """The runs of one seed, P doubling until P* is known; each is put on disk when it is done.
    rungs: {P: accuracies} of runs that are known. Returns (cell, seed, what went wrong, failed)."""
    learner, target, settings = read_method(cell.method)
    lines = []              # of runs that diverged
    while P := next_P(cell, rungs, args):   # P, 2 P, 4 P, ... until P* is known
        start = time.perf_counter()
        try:
            g = Grammar.random(*cell[1:5], seed, cell.zipf)
            rungs[P] = learner.recover(g, P, seed, target=target, device=args.device, **settings)
            if len(rungs[P]) not in (cell.L - 1, cell.L):
                raise ValueError(f"recover: must return {cell.L - 1} or {cell.L} accuracies")
        except FloatingPointError as error:                 # a loss was not finite
            rungs[P] = [math.nan] * (cell.L - 1)
            lines.append(f"P={P}: {error}")
        except Exception:                                   # a bug; other seeds go on
            return cell, seed, [*lines, f"P={P}: {traceback.format_exc()}"], True
        append(args, cell, P, seed, rungs[P], time.perf_counter() - start)
    return cell, seed, lines, False


# ---- the folder: finished runs on disk -------------------------------------------------


COLUMNS = "method,v,s,m,L,zipf,P,seed,level,accuracy,seconds,device,code".split(",")
# nobody else writes the file of this process; all else is made from such files
OWN_FILE = f"{os.urandom(6).hex()}.csv"


@cache
def code_of(learner):
    """Eight hex digits for the code of a learner and of the grammar; comments don't count."""
    files = [Path(module.__file__) for module in (learner, grammar)]
    trees = [ast.dump(ast.parse(file.read_text(encoding="utf-8"))) for file in files]
    return f"{zlib.crc32(repr(trees).encode()):08x}"


def append(args, cell, P, seed, accuracy, seconds):
    """Put a run on disk: a row for each level, level 1 last, as a seal; in one write."""
    path, code = Path(args.out, "runs", OWN_FILE), code_of(read_method(cell.method)[0])
    text = "" if path.exists() else ",".join(COLUMNS) + "\n"  # a new file begins with them
    for level in reversed(range(1, len(accuracy) + 1)):
        score = f"{accuracy[level - 1]:.6f}"
        row = [*cell, P, seed, level, score, f"{seconds:.3f}", args.device, code]
        text += ",".join(map(str, row)) + "\n"
    with open(path, "ab") as file:              # bytes: the same line ends on Windows
        file.write(text.encode())


def read_runs(out, warn=lambda line: None):
    """All whole runs of today's code: {(Cell, seed): {P: accuracies}}, and {Cell: their rows}."""
    found, others = {}, set()                   # {(Cell, seed, P): {level: row}}
    for path in sorted(Path(out).glob("runs/*.csv")):
        # a spreadsheet may have put a mark before the first column
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            for row in csv.DictReader(file):
                try:
                    sizes = [int(row[name]) for name in ("v", "s", "m", "L")]
                    cell = Cell(row["method"], *sizes, float(row["zipf"]))
                    key, level = (cell, int(row["seed"]), int(row["P"])), int(row["level"])
                    code = code_of(read_method(cell.method)[0])
                    float(row["accuracy"])
                except KeyError:
                    warn(f"{path} is no file of runs, and is ignored")
                    break
                except (TypeError, ValueError):             # a last line that was cut short
                    continue
                # what other code has made stays there, for the day it comes back
                if row["code"] == code:
                    found.setdefault(key, {})[level] = row
                else:
                    others.add((key, row["code"]))
    if others:
        warn(f"{len(others)} runs in {out} are of other code, and are not used")
    runs, rows = {}, {}
    for (cell, seed, P), levels in sorted(found.items()):
        if set(levels) >= set(range(1, cell.L)):            # not torn
            in_order = [levels[level] for level in sorted(levels)]
            rows.setdefault(cell, []).extend(in_order)
            runs.setdefault((cell, seed), {})[P] = [float(row["accuracy"]) for row in in_order]
    return runs, rows


# ---- the tables. stars: [(P*, sign)] of the seeds of a cell, as crossing returns them --


def estimate(stars):
    """Texts (P*, lowest, highest): the geometric mean over seeds, and the ends of their range. If
    a seed has only a bound, the mean is one, "> 412" or "< 16", "?" if they pull both ways."""
    P, signs = zip(*stars)
    mean = f"{np.exp(np.log(P).mean()):.0f}"
    if {-1, 1} <= set(signs):
        return "?", "", ""
    if any(signs):
        return f"{'>' if 1 in signs else '<'} {mean}", "", ""
    return mean, f"{min(P):.0f}", f"{max(P):.0f}"


def slope(points, is_factor):
    """Least squares of log P* over all seeds against x, with its standard error: a text, "" if
    there is none. points: {x: stars}; is_factor: exp(slope), the growth of P* per unit of x."""
    if len(points) < 2:
        return ""
    # one point for every seed
    x, P, signs = np.array([(x, *star) for x, stars in points.items() for star in stars]).T
    x, log = x - x.mean(), np.log(P) - np.log(P).mean()
    value = x @ log / (x @ x)
    error = np.linalg.norm(log - value * x) / math.sqrt(x @ x * max(len(x) - 2, 1))
    if is_factor:                               # the error of exp(a) is exp(a) times that of a
        value = math.exp(value)
        error *= value
    # seeds that are bounds pull it up or down; if all do the same, the slope is a bound
    pulls = set(np.sign(x * signs)) - {0}
    if pulls:
        return "" if len(pulls) == 2 else f"{'>' if 1 in pulls else '<'}{value:.2f}"
    return f"{value:.2f} ± {error:.2f}" if len(x) > 2 else f"{value:.2f}"


def table_row(cell, runs, args):
    """One row of samples_vs_depth.csv, and beside it the stars of level L-1 and of the root."""
    ladders = [rungs for key, rungs in runs.items() if key[0] == cell]
    row = {**cell._asdict(), "seeds": len(ladders), "status": ""}
    for level, name in (cell.L - 1, "P50"), (cell.L, "root_P50"):
        row[name + "_stars"] = stars = []       # one for each seed
        for rungs in ladders:
            # not every learner reads the root
            read = {P: values[level - 1] for P, values in rungs.items() if len(values) >= level}
            if read:
                stars.append(crossing([*read], [*read.values()], args.threshold))
        if stars:
            row[name], row[name + "_lo"], row[name + "_hi"] = estimate(stars)
    signs = [sign for _, sign in row["P50_stars"]]
    row["censored"] = sum(sign != 0 for sign in signs)
    if signs and not row["censored"]:           # against the paper's v m^3
        row["P50_over_vm3"] = f"{float(row['P50']) / (cell.v * cell.m**3):.4g}"
    # why P* is missing or only a bound
    if not ladders:
        row["status"] = "not run"
    elif any(math.isnan(values[0]) for rungs in ladders for values in rungs.values()):
        row["status"] = "diverged"
    elif 1 in signs and any(next_P(cell, rungs, args) for rungs in ladders):
        row["status"] = "not finished"
    elif 1 in signs:
        by_steps = limits(cell, args.max_samples)[2]
        row["status"] = "limited by steps" if by_steps else "beyond Pmax"
    return row


TABLE = ("method,v,s,m,L,zipf,P50,P50_lo,P50_hi,P50_over_vm3,root_P50,root_P50_lo,root_P50_hi,"
         "seeds,censored,status").split(",")
MARKS = {"limited by steps": "s", "not finished": "..", "diverged": "x", "not run": "-"}


def cell_text(row, part="P50"):
    """One entry of a printed table, such as 296 [237, 362] or >2048 s."""
    text = row.get(part, "").replace(" ", "")
    if row.get(part + "_lo") and row["seeds"] > 1:
        text += f" [{row[part + '_lo']}, {row[part + '_hi']}]"
    mark = MARKS.get(row["status"], "") if part == "P50" else ""
    return f"{text} {mark}".strip()


def size_table(size, rows):
    """The Markdown table of one size: level L-1 of all methods, a line each, then all their roots.
    growth: the factor of P* per level, and the depths that it covers."""
    depths = sorted({row["L"] for row in rows})
    table = [[size, *(f"L={L}" for L in depths), "growth, L", "law"]]
    methods = dict.fromkeys(row["method"] for row in rows)
    for part, method in itertools.product(("P50", "root_P50"), methods):
        line = {row["L"]: row for row in rows if row["method"] == method}   # of one method
        stars = {L: row[part + "_stars"] for L, row in line.items() if row[part + "_stars"]}
        deep = {L: stars[L] for L in stars if L > 2}        # at L = 2 the root is the grandparent
        if growth := slope(deep, is_factor=True):
            growth += f", {min(deep)}..{max(deep)}"
        texts = [cell_text(line[L], part) if L in line else "" for L in depths]
        # the theory has no law for a probe of the root
        is_root = part == "root_P50"
        law = "" if is_root else LAW.get(read_method(method)[1], "")
        if stars or not is_root:
            table.append([method + ", root" * is_root, *texts, growth, law])
    # columns of one width
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(map(str.ljust, line, widths)) for line in table)
    return "\n".join(line.rstrip() for line in lines)


def write_tables(args, unrun):
    """Make runs.csv and both tables from all files. Returns the text of the tables."""
    runs, run_rows = read_runs(args.out)
    methods = [*ALL, *sorted({cell.method for cell in run_rows} - set(ALL))]
    # sizes, then methods in the order of ALL
    cells = sorted({*run_rows, *unrun},
                   key=lambda cell: (cell[1:4], cell.zipf, methods.index(cell.method), cell.L))
    rows = [table_row(cell, runs, args) for cell in cells]
    run_rows = [row for cell in cells for row in run_rows.get(cell, [])]
    files = ("runs.csv", COLUMNS, run_rows), ("samples_vs_depth.csv", TABLE, rows)
    for name, columns, lines in files:
        with open(Path(args.out, name), "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)

    by_size = itertools.groupby(rows, "v={v} s={s} m={m} zipf={zipf:g}".format_map)
    text = [size_table(size.removesuffix(" zipf=0"), list(group)) for size, group in by_size]
    # the exponent of m, where there are several
    over_m = {}
    for row in rows:
        if row["P50_stars"]:
            series = "{method}, v={v} s={s} L={L} zipf={zipf:g}".format(**row)
            over_m.setdefault(series, {})[math.log(row["m"])] = row["P50_stars"]
    for series, stars in over_m.items():
        if exponent := slope(stars, is_factor=False):
            text.append(f"{series}: P* goes with m to the power of {exponent}")
    legend = ["P*: geometric mean of seeds [lowest, highest]", "growth: least squares ± its error"]
    last = {row["status"]: row for row in rows}
    legend += [f"{mark} {status}" for status, mark in MARKS.items() if status in last]
    text.append(", ".join(legend))
    if "not run" in last:
        hint = "--methods {method} --depth {L} runs the last of these"
        text.append(hint.format(**last["not run"]))
    text = "\n\n".join(text)
    Path(args.out, "samples_vs_depth.md").write_text(text + "\n", encoding="utf-8")
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
    """Climb all ladders, [(cell, seed, rungs)], and yield what climb returns as they end."""
    if jobs == 1:               # here, so that a debugger works
        yield from (climb(args, *ladder) for ladder in ladders)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, start_worker) as pool:
        futures = [pool.submit(climb, args, *ladder) for ladder in ladders]
        try:
            yield from (future.result() for future in as_completed(futures))
        except BaseException:   # Ctrl-C: don't wait for runs that will be done again
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def sweep(cells, args, jobs, rank, world):
    """Climb for all seeds of {Cell: seeds}. Prints P* of each cell when it is done, and returns how
    many climbs ended in an error."""
    runs, _ = read_runs(args.out, tqdm.write if rank == 0 else lambda line: None)
    ladders = [(cell, seed, runs.get((cell, seed), {})) for cell in cells for seed in cells[cell]]
    # quick learners first, so that they can be read soon; of each the costly climbs first
    order = [*LEARNERS.values()]
    ladders.sort(key=lambda ladder: (order.index(read_method(ladder[0].method)[0]), -ladder[0].L))
    ladders = ladders[rank::world]
    left = {cell: len(seeds) for cell, seeds in cells.items()}  # climbs still to come
    failures = 0                                # climbs that ended in an error
    with tqdm(total=len(ladders), unit="seed", disable=rank > 0) as bar:
        for cell, seed, lines, failed in finished(ladders, args, jobs):
            name = f"{cell.method} L={cell.L} m={cell.m}"
            bar.set_postfix_str(f"{name} seed {seed}", refresh=False)
            bar.update()
            failures += failed
            for line in lines:
                tqdm.write(f"{name} seed {seed} {line}")
            # a line of the table as soon as all of its seeds are done
            left[cell] -= 1
            if left[cell] == 0 and world == 1:
                row = table_row(cell, read_runs(args.out)[0], args)
                tqdm.write(f"{name}: P* = {cell_text(row)}")
    return failures


# ---- the command line ------------------------------------------------------------------


def span(text):
    """An argparse type: 4, or 2..6, or 2,4,6 -> a list of whole numbers, each once."""
    numbers = set()
    for part in text.split(","):
        low, _, high = part.partition("..")     # high is "" for a single number
        numbers.update(range(int(low), int(high or low) + 1))
    if not numbers or min(numbers) < 0:
        raise ValueError
    return sorted(numbers)


def seeds(text):
    """An argparse type: 5 for 0..4, or as span."""
    return span(f"0..{int(text) - 1}" if text.isdigit() else text)


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
        runs = Path(args.out, "runs")
        if Path(args.out, "runs.csv").exists() and not runs.exists():
            raise ValueError(f"out: {args.out} has results without their runs; name another folder")
        runs.mkdir(parents=True, exist_ok=True)
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
    # spaces don't count, and cluster-latent is cluster
    named = args.methods.replace(" ", "").replace("-latent", "").split(",")
    methods = dict.fromkeys([*ALL, *named] if "all" in named else named)
    methods.pop("all", None)
    cells, unrun = {}, []
    for method, m, L in itertools.product(methods, args.m, args.depth):
        check_sizes(args.v, args.s, m, L)       # names the flag
        learner, _, _ = read_method(method)
        cell = Cell(method, args.v, args.s, m, L, args.zipf)
        is_left_out = method not in named and L not in ALL[method]
        try:
            first, last, by_steps = limits(cell, args.max_samples)
        except ValueError as error:
            if method in named:
                raise ValueError(f"methods: {method}: {error}") from None
            is_left_out = True                  # this learner can't have that size
        if is_left_out:
            unrun.append(cell)                  # a dash in the table
        elif first > last:                      # or it would be missing in silence
            flag = "methods" if by_steps else "max-samples"
            raise ValueError(f"{flag}: {method} at m = {m} starts at {first}, the last is {last}")
        else:
            cells[cell] = args.seeds or range(getattr(learner, "SEEDS", 5))
    return cells, unrun


def main():
    rank, world, local_rank = ranks()
    args, cells, unrun = read_flags()
    torch.set_num_threads(1)                    # as in a worker: results don't depend on --jobs
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = args.jobs or (4 if args.device != "cpu" else cores if world == 1 else 1)
    if world > 1 and args.device == "cuda":     # one GPU a rank, by turns if there are fewer
        args.device = f"cuda:{local_rank % torch.cuda.device_count()}"
    try:
        failures = torch.tensor(sweep(cells, args, min(jobs, 61), rank, world))
    except (KeyboardInterrupt, BrokenExecutor):     # the latter if a process was killed
        print(f"\nstopped; the same command continues from the runs in {args.out}", file=sys.stderr)
        sys.exit(130)
    if world > 1:               # wait until all ranks are done, and add up
        dist.init_process_group("gloo", timeout=timedelta(days=365))
        dist.all_reduce(failures)
        dist.destroy_process_group()
        if rank > 0:                            # rank 0 writes for all
            os._exit(int(failures > 0))         # gloo's threads may abort an orderly exit
    print("\n" + write_tables(args, unrun))
    try:
        import plot  # here, since nothing else needs matplotlib
        print(f"\nwrote {plot.samples_vs_depth(Path(args.out, 'samples_vs_depth.csv'))}")
    except Exception as error:
        print(f"\nno picture: {error!r:.200}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    run(main)
