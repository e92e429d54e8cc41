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
from concurrent.futures import ProcessPoolExecutor, as_completed
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
    learner, target, settings = LEARNERS[key], target or "latent", {}
    targets = getattr(learner, "TARGETS", ["latent"])
    if target not in targets:
        raise ValueError(f"methods: {key} has no target {target!r}; it has {', '.join(targets)}")
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


def crossing(rungs, threshold):
    """The smallest P from which the accuracy is at or above the threshold on two rungs in a row,
    interpolated linearly in log P between the rung before and the first of the two.

    rungs: {P: accuracy}. Returns (P*, sign): sign 0 if P* lies between rungs; -1, with the lowest
    rung, if below it; 1, with the last rung below the threshold, if above it."""
    P, right = np.array(sorted(rungs.items())).T
    above = right >= threshold                  # nan, of a run that diverged, is not
    if above[:2].all():                         # both lowest rungs, or the only one
        return float(P[0]), -1
    # one rung above it may be luck; two in a row count
    twice = np.flatnonzero(above[:-1] & above[1:])
    if not len(twice):
        return float(P[~above].max()), 1
    i = twice[0]
    before = np.nan_to_num(right[i - 1])
    share = (threshold - before) / (right[i] - before)
    return float(P[i - 1] * (P[i] / P[i - 1]) ** share), 0


def next_P(cell, rungs, args):
    """The P that a seed's climb needs next, None at its end. rungs: {P: accuracies}."""
    P, last, _ = limits(cell, args.max_samples)
    level = -1 if args.until == "root" else cell.L - 2      # the root is last, where it is read
    above = []                                  # of all rungs so far
    while P in rungs:
        above.append(rungs[P][level] >= args.threshold)     # nan is not
        P *= 2
    return None if above[-2:] == [True, True] or P > last else P


def climb(args, cell, seed, rungs):
    """The runs of one seed, P doubling until P* is known; each is put on disk when it is done.
    rungs: {P: accuracies} that are known. Returns (cell, seed, all rungs, what went wrong, was it
    a bug)."""
    learner, target, settings = read_method(cell.method)
    lines = []              # of runs that diverged
    while P := next_P(cell, rungs, args):   # P, 2 P, 4 P, ... until P* is known
        start = time.perf_counter()
        try:
            # the only call of a learner
            g = Grammar.random(*cell[1:5], seed, cell.zipf)
            found = learner.recover(g, P, seed, target=target, device=args.device, **settings)
            if len(found) not in (cell.L - 1, cell.L):
                raise ValueError(f"recover: must return {cell.L - 1} or {cell.L} accuracies")
            rungs[P] = [round(float(right), 6) for right in found]      # as on disk
        except FloatingPointError as error:                 # a loss was not finite
            rungs[P] = [math.nan] * (cell.L - 1)
            lines.append(f"P={P}: {error}")
        except Exception:                                   # a bug; other seeds go on
            return cell, seed, rungs, [*lines, f"P={P}: {traceback.format_exc()}"], True
        append(args, cell, P, seed, rungs[P], time.perf_counter() - start)
    return cell, seed, rungs, lines, False


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


def read_runs(out):
    """All whole runs of today's code: {(Cell, seed): {P: accuracies}}, their rows {(Cell, seed, P):
    [a row for each level]}, and lines that say what is left out."""
    found, others, lines = {}, set(), []        # {(Cell, seed, P): {level: row}}
    for path in sorted(Path(out).glob("runs/*.csv")):
        # a spreadsheet may have put a mark before the first column
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            reader = csv.DictReader(file)
            if not set(COLUMNS) <= set(reader.fieldnames or []):
                lines.append(f"{path} is no file of runs, and is ignored")
                continue
            for row in reader:
                try:
                    sizes = [int(row[name]) for name in "vsmL"]
                    cell = Cell(row["method"], *sizes, float(row["zipf"]))
                    key, level = (cell, int(row["seed"]), int(row["P"])), int(row["level"])
                    code, _ = code_of(read_method(cell.method)[0]), float(row["accuracy"])
                except (TypeError, ValueError):     # cut short, or of a learner that has gone
                    continue
                # what other code has made stays there, for the day it comes back
                if row["code"] == code:
                    found.setdefault(key, {})[level] = row
                else:
                    others.add((key, row["code"]))
    if others:
        lines.append(f"{len(others)} runs in {out} are of other code, and are not used")
    runs, rows = {}, {}
    for key, levels in found.items():
        if set(range(1, key[0].L)) <= set(levels):  # not torn
            rows[key] = [levels[level] for level in sorted(levels)]
            runs.setdefault(key[:2], {})[key[2]] = [float(row["accuracy"]) for row in rows[key]]
    return runs, rows, lines


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
    """Least squares of log P* against x, with its standard error: a text, "" if there is none.
    points: [(x, P*, sign)]; is_factor: exp(slope), the growth of P* per x."""
    if len({x for x, _, _ in points}) < 2:
        return ""
    x, P, signs = np.array(points).T            # one entry for every seed
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
    ladders = [rungs for key, rungs in runs.items() if rungs and key[0] == cell]
    row = {**cell._asdict(), "seeds": len(ladders), "status": ""}
    for level, name in (cell.L - 1, "P50"), (cell.L, "root_P50"):
        # not every learner reads the root
        read = [{P: right[level - 1] for P, right in rungs.items() if len(right) >= level}
                for rungs in ladders]
        row[name + "_stars"] = stars = [crossing(rungs, args.threshold) for rungs in read if rungs]
        if stars:
            row[name], row[name + "_lo"], row[name + "_hi"] = estimate(stars)
    # why P* is only a bound
    signs = [sign for _, sign in row["P50_stars"]]
    if any(math.isnan(right[0]) for rungs in ladders for right in rungs.values()):
        row["status"] = "diverged"
    elif 1 in signs and any(next_P(cell, rungs, args) for rungs in ladders):
        row["status"] = "not finished"
    elif 1 in signs:
        by_steps = limits(cell, args.max_samples)[2]
        row["status"] = "limited by steps" if by_steps else "beyond Pmax"
    return row


TABLE = ("method,v,s,m,L,zipf,P50,P50_lo,P50_hi,root_P50,root_P50_lo,root_P50_hi,"
         "seeds,status").split(",")
MARKS = {"limited by steps": " s", "not finished": " ..", "diverged": " x"}
LEGEND = """P*: geometric mean of seeds [lowest, highest]; growth: least squares ± its error
s limited by steps, .. not finished, x diverged, - not run: --methods NAME --depth L runs it"""


def cell_text(row, part="P50"):
    """One entry of a printed table, such as 296 [237, 362] or >2048 s."""
    text = row.get(part, "").replace(" ", "")   # empty if every seed failed
    if row.get(part + "_lo") and row["seeds"] > 1:
        text += f" [{row[part + '_lo']}, {row[part + '_hi']}]"
    return text + MARKS.get(row["status"], "") * (part == "P50")


def size_table(size, rows, shown):
    """The Markdown table of one size: level L-1 of all methods, a line each, then all their roots.
    growth: the factor of P* per level, and the depths that it covers. shown: methods that have a
    line even if nothing was run."""
    depths = sorted({row["L"] for row in rows})
    table = [[size, *(f"L={L}" for L in depths), "growth, L", "law"]]
    methods = dict.fromkeys([*shown, *(row["method"] for row in rows)])
    for part, method in itertools.product(("P50", "root_P50"), methods):
        line = {row["L"]: row for row in rows if row["method"] == method}
        texts = [cell_text(line[L], part) if L in line else "-" for L in depths]
        # at L = 2 the root is the grandparent
        points = [(L, *star) for L in line if L > 2 for star in line[L][part + "_stars"]]
        if growth := slope(points, is_factor=True):
            growth += f", {points[0][0]}..{points[-1][0]}"
        if part == "P50":
            table.append([method, *texts, growth, LAW.get(read_method(method)[1], "")])
        elif any(part in row for row in line.values()):     # a probe of the root has no law
            table.append([method + ", root", *texts, growth, ""])
    # columns of one width
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join(" | ".join(map(str.ljust, line, widths)).rstrip() for line in table)


def write_tables(args):
    """Make runs.csv and both tables from all files. Returns the text of the tables."""
    runs, run_rows, lines = read_runs(args.out)
    # by size, then by method in the order of ALL, then by L
    cells = sorted({cell for cell, _ in runs}, key=lambda cell: (
        cell[1:4], cell.zipf, [*ALL, cell.method].index(cell.method), cell))
    rows = [table_row(cell, runs, args) for cell in cells]
    in_order = sorted(run_rows, key=lambda key: (cells.index(key[0]), *key[1:]))
    run_rows = [row for key in in_order for row in run_rows[key]]
    files = ("runs.csv", COLUMNS, run_rows), ("samples_vs_depth.csv", TABLE, rows)
    for name, columns, content in files:
        with open(Path(args.out, name), "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(content)

    shown = ALL if "all" in args.methods.split(",") else []
    by_size = itertools.groupby(rows, "v={v} s={s} m={m} zipf={zipf:g}".format_map)
    text = [size_table(size.removesuffix(" zipf=0"), list(group), shown) for size, group in by_size]
    # the exponent of m, where there are several
    series = "{method}, v={v} s={s} L={L} zipf={zipf:g}".format_map
    for name, group in itertools.groupby(sorted(rows, key=series), series):
        points = [(math.log(row["m"]), *star) for row in group for star in row["P50_stars"]]
        if exponent := slope(points, is_factor=False):
            text.append(f"{name}: P* goes with m to the power of {exponent}")
    text = "\n\n".join([*text, *lines, LEGEND])
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
    if jobs == 1:                               # here, so that a debugger works
        yield from (climb(args, *ladder) for ladder in ladders)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, start_worker) as pool:     # a Pool hangs if one is killed
        futures = [pool.submit(climb, args, *ladder) for ladder in ladders]
        try:
            yield from (future.result() for future in as_completed(futures))
        except BaseException:   # Ctrl-C, `| head`: don't wait for runs that will be done again
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def sweep(cells, args, jobs, rank, world):
    """Climb for all seeds of {Cell: seeds}. Prints P* of each cell when it is done, and returns how
    many climbs ended in an error."""
    runs, _, _ = read_runs(args.out)
    ladders = [(cell, seed, runs.get((cell, seed), {})) for cell in cells for seed in cells[cell]]
    # quick learners first, so that they can be read soon; of each the costly climbs first
    order = [*LEARNERS.values()]
    ladders.sort(key=lambda ladder: (order.index(read_method(ladder[0].method)[0]), -ladder[0].L))
    ladders = ladders[rank::world]              # of torchrun
    left = {cell: len(seeds) for cell, seeds in cells.items()}  # climbs still to come
    failures = 0                                # climbs that ended in an error
    bar = tqdm(finished(ladders, args, jobs), None, len(ladders), unit="seed", disable=rank > 0)
    for cell, seed, rungs, lines, failed in bar:
        name = f"{cell.method} L={cell.L} m={cell.m}"
        bar.set_postfix_str(f"{name} seed {seed}", refresh=False)
        failures += failed
        for line in lines:
            tqdm.write(f"{name} seed {seed} {line}")
        # a line of the table as soon as all of its seeds are done
        runs[cell, seed] = rungs
        left[cell] -= 1
        if left[cell] == 0:
            tqdm.write(f"{name}: P* = {cell_text(table_row(cell, runs, args))}")
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


def cells_of(args):
    """{Cell: seeds}, what is to be run. Raises ValueError."""
    check_range("zipf", args.zipf, 0, 10)
    check_range("threshold", args.threshold, 1e-9, 1)
    check_range("jobs", args.jobs or 1, 1, 61)  # Windows waits for no more processes
    # spaces don't count, and cluster-latent is cluster
    named = args.methods.replace(" ", "").replace("-latent", "").split(",")
    methods = [*ALL, *named] if "all" in named else named
    cells = {}
    for method, m, L in itertools.product(dict.fromkeys(methods), args.m, args.depth):
        check_sizes(args.v, args.s, m, L)       # names the flag
        if method == "all" or method not in named and L not in ALL[method]:
            continue
        learner, _, _ = read_method(method)
        cell = Cell(method, args.v, args.s, m, L, args.zipf)
        try:
            first, last, by_steps = limits(cell, args.max_samples)
        except ValueError as error:             # this learner can't have that size
            if method in named:
                raise ValueError(f"methods: {method}: {error}") from None
            continue
        if first > last:                        # or it would be missing in silence
            flag = "methods" if by_steps else "max-samples"
            raise ValueError(f"{flag}: {method} at m = {m} starts at {first}, the last is {last}")
        cells[cell] = args.seeds or range(getattr(learner, "SEEDS", 5))
    return cells


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
        cells, runs = cells_of(args), Path(args.out, "runs")
        if Path(args.out, "runs.csv").exists() and not runs.exists():
            raise ValueError(f"out: {args.out} has results without their runs; name another folder")
        runs.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(f"argument --{error}" if isinstance(error, ValueError) else f"--out: {error}")
    return args, cells


def main():
    rank, world, local_rank = ranks()
    args, cells = read_flags()
    torch.set_num_threads(1)                    # as in a worker: results don't depend on --jobs
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = args.jobs or (4 if args.device != "cpu" else min(cores, 61) if world == 1 else 1)
    if world > 1 and args.device == "cuda":     # one GPU a rank, by turns if there are fewer
        args.device = f"cuda:{local_rank % torch.cuda.device_count()}"
    failures = torch.tensor(sweep(cells, args, jobs, rank, world))
    if world > 1:               # wait until all ranks are done, and add up
        dist.init_process_group("gloo", timeout=timedelta(days=365))
        dist.all_reduce(failures)
        dist.destroy_process_group()
        if rank > 0:                            # rank 0 writes for all
            os._exit(0)                         # gloo's threads may abort an orderly exit
    print("\n" + write_tables(args))
    try:
        import plot  # here, since nothing else needs matplotlib
        print(f"\nwrote {plot.samples_vs_depth(Path(args.out, 'samples_vs_depth.csv'))}")
    except Exception as error:
        print(f"\nno picture: {error!r:.200}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    run(main)
