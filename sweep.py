"""
The table: how many samples P* each learner needs, against the depth of the grammar.

    python sweep.py --depth 2..6                        the table of the README
    python sweep.py --depth 5 --methods data2vec        a cell that it leaves out
    python sweep.py --depth 4 --m 3..6 --methods cluster,cluster-joint --out out/m
    python sweep.py --methods data2vec-token:mask=0.3:steps=8000
    torchrun --nproc-per-node 4 -- sweep.py --depth 2..6    processes share one sweep

A method is written LEARNER-TARGET:SETTING=VALUE:... Without a target the learner predicts its
own latents; a setting that is not written has its default.

For every method, size, depth and seed the sweep climbs a *ladder* of sample sizes P, each
twice the last. One seed is one fresh grammar and one fresh sample. A ladder ends
  - when the highest level of the tree below the root, L-1, is recovered: an accuracy of
    0.95 or more on fresh strings, on two rungs in a row;
  - at --max-samples ("beyond Pmax"), or where a run would, by our estimate, need too much memory
    ("limited by memory");
  - for a network, whose steps are fixed ("limited by steps"): before it would see each
    string fewer than 8 times; or when level L-1 is above 0.5 and three more rungs have not
    raised its best accuracy by 0.05.
P50, the P* of the tables, is the smallest P from which the accuracy is 0.5 or more on two
rungs in a row, interpolated in log P; P90 is the same for 0.9. Once found, neither is changed
by higher rungs. The tables have the geometric mean over seeds.

It writes to --out the runs as they are finished (runs/*.csv, and runs.csv in order), the table
(samples_vs_depth.csv, .md), pictures and, in settings.json, the defaults of all learners.
Stop it at any time: the same command continues. Any number of sweeps may share a folder.
"""

import difflib
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import uuid
from argparse import ArgumentTypeError
from collections import namedtuple
from concurrent import futures
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import cluster
import data2vec
import predictor
from grammar import (
    Grammar, Parser, Score, check_sizes, pick_device, read_settings, real, run_script, whole,
    write_whole,
)

RECOVERED = 0.95    # accuracy of level L-1 from which a rung counts as recovered
RUNG = 2            # a ladder's sample sizes grow by this factor
PASSES = 8          # a network's ladder ends before it would see each string fewer times
PLATEAU = 3         # it also ends after this many rungs without a rise of the best accuracy
RISE = 0.05         # the smallest rise that counts
BOOTSTRAP = 2000    # resamples of the seeds behind every 95 % interval
MAX_LADDERS = 20000


# ----------------------------------------------------------------------------------------
# the methods: a learner, its target, its settings


class Learner(NamedTuple):
    """What the sweep knows of a learner. Only recover is needed."""

    # (grammars, samples, seeds, target=, device=, **settings) -> [Score]
    recover: Callable
    targets: tuple = ("latent",)
    settings: tuple = ()        # its table of grammar.Setting
    presets: dict = {"default": {}}
    # (v, s, m, L, P, target, **settings): raises ValueError if that can't work
    check_size: Callable = lambda *sizes, **settings: None
    first: Callable = lambda v, s, m: v * m  # the lowest P, before rounding down to 2^k
    sees: Callable = None       # (v, options) -> strings seen in all steps; None: not a network
    seconds: float = 0.1        # a guess at a run on one core, for each token of a string
    side: int = 1               # most runs in one call; networks train them side by side
    seeds: int = 5              # how many, by default


def ours(file, **more):
    """The Learner of one of our own files, which all use the same names."""
    return Learner(file.recover, file.TARGETS, file.SETTINGS, file.PRESETS, file.check_size, **more)


LEARNERS = {
    # a ladder begins where its strings hold at most half of the v m tuples of level L-2
    "cluster": ours(cluster, first=lambda v, s, m: v * m / (2 * s), seconds=0.005),
    # side=9: a network's cell begins with three rungs for each of three seeds
    "predictor": ours(
        predictor, first=lambda v, s, m: v * m**2, seconds=0.45, side=9, seeds=3,
        sees=lambda v, options: options.steps * (options.batch or 8 * v),
    ),
    "data2vec": ours(
        data2vec, first=lambda v, s, m: v * m**3, seconds=2.3, side=9, seeds=3,
        sees=lambda v, options: options.steps * options.batch,
    ),
}
# the methods of `--methods all`, and the depths at which it runs them. At L = 2 data2vec has
# one level to learn, and its untrained encoder knows the root already.
DEFAULT = {
    "cluster": range(2, 25), "cluster-token": range(2, 25),
    "cluster-root": range(2, 25), "cluster-joint": range(2, 25),
    "predictor": range(2, 5), "predictor-token": range(2, 4),
    "data2vec": range(3, 4), "data2vec-token": range(3, 4),
}
# for each target, the factor by which P* grows with every level in the theory
LAW = {"latent": "1", "joint": "1", "stacked": "1", "several": "1", "token": "m", "root": "m"}


# a method, parsed: its one spelling, the Learner's key in LEARNERS, the Learner, the target, the
# settings that were written, {name: text}, and an object with the values of all settings
Method = namedtuple("Method", "name key learner target settings options")


@lru_cache(maxsize=None)
def read_method(text):
    """LEARNER-TARGET:SETTING=VALUE:... -> Method, or a ValueError if that has no meaning."""
    words, *changes = text.split(":")
    key, _, target = words.partition("-")
    target = target or "latent"
    known = [f"{key}-{target}" for key in LEARNERS for target in LEARNERS[key].targets]
    if f"{key}-{target}" not in known:
        near = difflib.get_close_matches(words, [*LEARNERS, *known], 3) or known
        raise ValueError(f"methods: no learner {words[:60]!r}; there is {', '.join(near)}")

    settings = {}
    for change in changes:
        setting, equals, value = change.partition("=")
        setting = setting.replace("-", "_")
        if not equals or setting in settings:
            raise ValueError("methods: settings are written :name=value, each once")
        settings[setting] = value
    learner = LEARNERS[key]
    usual = next(iter(learner.presets))
    preset = settings.get("preset", usual)
    try:
        options = read_settings(learner.settings, learner.presets, settings)
        base = read_settings(learner.settings, learner.presets, {"preset": preset})
    except ValueError as error:
        raise ValueError(f"methods: {words}: {error}") from None

    # a setting stands in the name only where it differs from the preset's
    name = key if target == "latent" else f"{key}-{target}"
    if preset != usual:
        name += f":preset={preset}"
    for setting, value in vars(options).items():
        if value != getattr(base, setting):
            name += f":{setting}={value}"
    return Method(name, key, learner, target, settings, options)


# ----------------------------------------------------------------------------------------
# the ladder: one climb, of one cell and one seed


# a row of samples_vs_depth.csv; cell[1:5] are the sizes v, s, m, L
Cell = namedtuple("Cell", "method v s m L zipf")
# a finished run: its grammar.Score, its share of the batch's seconds, the device's name
Run = namedtuple("Run", "score seconds device")


def learner_of(cell):
    return read_method(cell.method).learner


def first_rung(cell):
    """The P that a ladder starts at, a power of 2."""
    start = learner_of(cell).first(cell.v, cell.s, cell.m)
    return 2 ** max(0, int(math.log2(start)))


@lru_cache(maxsize=None)
def last_rung(cell, cap):
    """(P, reason): the highest rung that a ladder can have, below first_rung if it can have none,
    and why no higher one. cap: --max-samples."""
    method = read_method(cell.method)
    learner = method.learner
    highest, reason = 2**40, "beyond Pmax"
    online = getattr(method.options, "online", False)  # then the steps follow from P
    if learner.sees and not online:
        highest, reason = learner.sees(cell.v, method.options) // PASSES, "limited by steps"
    P = first_rung(cell)
    while P <= highest:
        try:
            learner.check_size(*cell[1:5], P, method.target, **method.settings)
        except ValueError:
            return P // RUNG, "limited by memory"
        if P > cap:
            return P // RUNG, "beyond Pmax"
        P *= RUNG
    return P // RUNG, reason


def climb(cell, rungs, cap):
    """Where one ladder stands. rungs: {P: Run} of its finished runs.

    Returns (climbed, P, end): the rungs that count, in order; the P to run next, or None at its
    end; and why it ended: "" if level L-1 is recovered, "not finished" if it has not ended."""
    is_network = learner_of(cell).sees is not None
    climbed, accuracy = [], []
    P = first_rung(cell)
    while P in rungs:
        climbed.append(P)
        accuracy.append(rungs[P].score.accuracy[cell.L - 2])    # of level L-1
        if len(climbed) > 1 and min(accuracy[-2:]) >= RECOVERED:
            return climbed, None, ""
        # a plateau: the last rungs are hardly better than those before
        best_before = max(accuracy[:-PLATEAU], default=0)
        if is_network and best_before > 0.5 and max(accuracy[-PLATEAU:]) < best_before + RISE:
            return climbed, None, "limited by steps"
        P *= RUNG
    last, reason = last_rung(cell, cap)
    if P > last:
        return climbed, None, reason
    return climbed, P, "not finished"


# ----------------------------------------------------------------------------------------
# the statistics. stars: a list of what crossing returns, (P*, sign), one for every seed


def crossing(P, accuracy, threshold):
    """The smallest P from which the accuracy is at or above the threshold on two rungs in a row,
    interpolated linearly in log P between the rung before and the first of the two.

    P, accuracy: lists, P ascending. Returns (P*, sign): sign 0 if P* lies on the ladder; -1, with
    the lowest rung, if below it; 1, with the last rung below the threshold, if above it."""
    above = [a >= threshold for a in accuracy]
    # both lowest rungs, or the only one, are above the threshold already
    if all(above[:2]):
        return float(P[0]), -1
    # one rung above it may be luck; two in a row count
    for i in range(1, len(P) - 1):
        if above[i] and above[i + 1]:
            share = (threshold - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
            return float(P[i - 1] * (P[i] / P[i - 1]) ** share), 0
    return float(max(p for p, a in zip(P, above) if not a)), 1


def estimate(groups, weights=(1.0,), scale=math.exp, digits=0):
    """scale(sum_i weights[i] * mean log P* of groups[i]): by default the geometric mean of P* over
    seeds. groups: lists of stars; digits: decimals.

    Returns texts (value, low, high): low and high are the 95 % bootstrap interval over seeds, "" if
    no group has two. Censored seeds make the value a bound, "> 412" or "< 16", without an interval,
    or "?" if they pull both ways."""
    logs = [np.log([P for P, _ in stars]) for stars in groups]
    value = scale(sum(weight * log.mean() for weight, log in zip(weights, logs)))
    value = f"{value:.{digits}f}"
    signs = [weight * sign for weight, stars in zip(weights, groups) for _, sign in stars]
    if min(signs) < 0 < max(signs):
        return "?", "", ""
    if any(signs):
        return ("> " if max(signs) > 0 else "< ") + value, "", ""
    if max(map(len, logs)) == 1:
        return value, "", ""
    random = np.random.default_rng(0)
    means = [random.choice(log, size=(BOOTSTRAP, len(log))).mean(1) for log in logs]
    ends = np.percentile(weights @ np.stack(means), [2.5, 97.5])
    return value, *(f"{scale(end):.{digits}f}" for end in ends)


def slope(points, scale):
    """Least-squares slope of mean log P* against x. points: {x: stars}; scale: exp for a factor,
    float for an exponent. A text with its interval, "" if there is no slope."""
    if len(points) < 2:
        return ""
    x = np.array(list(points), float)
    x -= x.mean()
    value, low, high = estimate(list(points.values()), x / (x**2).sum(), scale, 2)
    if value == "?":        # bounds that pull both ways
        return ""
    return f"{value} [{low}, {high}]" if low else value


def measure(cell, ladders, level, cap):
    """One level of a cell over its seeds: {column of TABLE: value}, with "stars", and with "notes",
    a set of keys of MARKS; {} if no run reports the level. ladders: [{P: Run} of every seed]; cap:
    --max-samples, by which a ladder counts as finished."""
    P50, P90, floors, notes = [], [], [], set()
    for rungs in ladders:
        climbed, _, end = climb(cell, rungs, cap)
        scores = [rungs[P].score for P in climbed]
        if not scores or min(len(score.accuracy) for score in scores) < level:
            continue  # not begun, or the learner does not report the root
        accuracy = [score.accuracy[level - 1] for score in scores]
        P50.append(crossing(climbed, accuracy, 0.5))
        P90.append(crossing(climbed, accuracy, 0.9))
        floors += [score.floor[level - 1] for score in scores if score.floor]
        # why P* is only a bound
        _, sign = P50[-1]
        if sign > 0 or end == "not finished":
            notes.add(end or "beyond Pmax")
        if sign < 0:
            notes.add("below Pmin")
        if any(score.diverged for score in scores):
            notes.add("diverged")
    if not P50:
        return {}
    found = {"stars": P50, "seeds": len(P50), "censored": sum(sign != 0 for _, sign in P50)}
    found["status"] = next((note for note in MARKS if note in notes), "")
    found["P50"], found["P50_lo"], found["P50_hi"] = estimate([P50])
    found["P90"], _, _ = estimate([P90])
    if not found["censored"]:
        mean = math.exp(np.mean([math.log(P) for P, _ in P50]))
        found["P50_over_vm3"] = f"{mean / (cell.v * cell.m**3):.4g}"
    if floors:
        found["floor"] = f"{np.mean(floors):.3f}"
    # notes that are no reason for a bound
    if floors and np.mean(floors) > 0.5:
        notes.add("untrained above 0.5")
    if len(P50) == 1:
        notes.add("one seed")
    return found | {"notes": notes}


# ----------------------------------------------------------------------------------------
# the tables


TABLE = (
    "method,v,s,m,L,zipf,P50,P50_lo,P50_hi,P90,P50_over_vm3,"
    "root_P50,root_P50_lo,root_P50_hi,floor,root_floor,seeds,censored,status"
).split(",")
# the notes on a P50, the worst first, and their marks in the printed tables
MARKS = {
    "diverged": "x", "not finished": "..", "limited by memory": "m", "limited by steps": "s",
    "beyond Pmax": "", "below Pmin": "", "not run": "-",
    "untrained above 0.5": "!", "one seed": "~",  # these are never a status
}


def row_order(cell):
    """Sizes, then learners, then methods in the order of DEFAULT, then all others."""
    learner = list(LEARNERS).index(read_method(cell.method).key)
    names = [*DEFAULT, cell.method]
    return cell.v, cell.s, cell.m, cell.zipf, learner, names.index(cell.method), cell


def summarise(runs, caps, unrun=()):
    """Runs, {(Cell, seed): {P: Run}}, and cells not run -> the table's rows, {column: value}.

    caps: {Cell: --max-samples of this sweep}; for all other cells it is their largest P."""
    ladders = {cell: [] for cell in unrun}
    for cell, seed in sorted(runs):
        ladders.setdefault(cell, []).append(runs[cell, seed])
    rows = []
    for cell in sorted(ladders, key=row_order):
        seeds = ladders[cell]
        cap = caps.get(cell) or max((max(rungs) for rungs in seeds), default=0)
        row = {"stars": [], "P50": "", "seeds": 0, "status": "not run", "notes": {"not run"}}
        row |= cell._asdict() | measure(cell, seeds, cell.L - 1, cap)
        root = measure(cell, seeds, cell.L, cap)
        rows.append(row | {f"root_{column}": value for column, value in root.items()})
    return rows


def cell_text(row, part, is_long):
    """One entry of a printed table. part: "" for level L-1, "root_" for the root."""
    text = row[part + "P50"].replace(" ", "")
    text += "".join(mark for note, mark in MARKS.items() if note in row[part + "notes"])
    low, high = row.get(part + "P50_lo"), row.get(part + "P50_hi")
    return f"{text} [{low}, {high}]" if is_long and low else text


def size_table(size, rows, is_long):
    """The Markdown table of one size: level L-1 of all methods, a line each, then all their roots.
    The column growth has the factor of P* per level and the depths that it covers. They begin at
    L = 3: in a tree of depth 2 the only grandparent is the root."""
    depths = sorted({row["L"] for row in rows})
    table = [[size, *(f"L={L}" for L in depths), "growth, L", "law"]]
    names = dict.fromkeys(row["method"] for row in rows)
    for part, name in itertools.product(("", "root_"), names):
        line = {row["L"]: row for row in rows if row["method"] == name and part + "stars" in row}
        if not line:                        # no run reports this root
            continue
        stars = {L: row[part + "stars"] for L, row in line.items() if L > 2 and row[part + "stars"]}
        growth = slope(stars, math.exp)
        if not is_long:                     # 80 columns have no room for its interval
            growth = growth.partition(" [")[0]
        if growth:
            growth += f" {min(stars)}..{max(stars)}"
        cells = [cell_text(line[L], part, is_long) if L in line else "" for L in depths]
        law = LAW.get(read_method(name).target, "")
        if part:                            # the theory has no law for a probe of the root
            name, law = f"{name}, root", ""
        table.append([name, *cells, growth, law])

    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    lines = [[text.ljust(width) for text, width in zip(line, widths)] for line in table]
    return "\n".join(" | ".join(line).rstrip() for line in lines)


def tables(rows, is_long):
    """All tables as one text, to print; is_long, for the file: also intervals and powers of m."""
    sizes, over_m, notes = {}, {}, set()
    for row in rows:
        size = "v={v} s={s} m={m} zipf={zipf:g}".format(**row).removesuffix(" zipf=0")
        sizes.setdefault(size, []).append(row)
        notes |= row["notes"] | row.get("root_notes", set())
        if row["stars"]:
            series = "{method}: v={v} s={s} L={L} zipf={zipf:g}".format(**row)
            over_m.setdefault(series, {})[row["m"]] = row["stars"]
    text = [size_table(size, sizes[size], is_long) for size in sizes]
    for series, stars in over_m.items():
        exponent = slope({math.log(m): stars[m] for m in stars}, float)
        if exponent and is_long:
            text.append(f"{series}, exponent of m in P* {exponent} {min(stars)}..{max(stars)}")
    # only the marks that stand above are explained
    legend = [f"{mark} {note}" for note, mark in MARKS.items() if mark and note in notes]
    not_run = [row for row in rows if row["status"] == "not run"]
    if not_run:
        legend.append("--methods {method} --depth {L} runs the last of these".format(**not_run[-1]))
    return "\n\n".join([*text, ", ".join(legend)]).rstrip()


# ----------------------------------------------------------------------------------------
# climbing all ladders


def run_batch(cell, batch, device):
    """Runs of one cell side by side. batch: [(P, seed)]. Returns {(P, seed): Run}."""
    method = read_method(cell.method)
    samples, seeds = zip(*batch)
    grammars = [Grammar.random(*cell[1:5], seed, cell.zipf) for seed in seeds]
    start = time.perf_counter()
    scores = method.learner.recover(
        grammars, samples, seeds, target=method.target, device=device, **method.settings
    )
    # every run has its share of the batch's time
    seconds = (time.perf_counter() - start) / len(batch)
    return {key: Run(score, seconds, device) for key, score in zip(batch, scores, strict=True)}


def start_worker():
    """Set up a worker process: one thread. It ends silently at Ctrl-C, since the parent has all
    finished runs, and with its parent, for which it would otherwise wait for ever."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class OneProcess(futures.Executor):
    """Stands in for a pool when there is one job: does the work here, at once."""

    def submit(self, work, *arguments):
        future = futures.Future()
        future.set_result(work(*arguments))
        return future


def next_rungs(cell, rungs, cap):
    """The rungs that a ladder needs next. Runs side by side are cheap, so a network climbs a few
    ahead; those that turn out to lie beyond its end do not count."""
    climbed, P, _ = climb(cell, rungs, cap)
    if P is None:
        return []
    ahead = 2 if climbed else 3
    if learner_of(cell).side == 1:
        ahead = 1
    # one recovered rung: the next is likely to be the last
    if climbed and rungs[climbed[-1]].score.accuracy[cell.L - 2] >= RECOVERED:
        ahead = 1
    ladder = [P * RUNG**i for i in range(ahead)]
    return [P for P in ladder if P <= last_rung(cell, cap)[0] and P not in rungs]


def next_batch(units, runs, cap, running, idle):
    """The next batch, (Cell, [(P, seed)]), for one of `idle` free processes, or None. running:
    batches at work; units: [(Cell, seeds)] in order, from which those that are done are removed."""
    for cell, seeds in list(units):
        busy = {key for other, batch in running if other == cell for key in batch}
        ladders = {seed: runs.get((cell, seed), {}) for seed in seeds}
        wanted = {(P, seed) for seed in seeds for P in next_rungs(cell, ladders[seed], cap)}
        batch = sorted(wanted - busy)
        if batch:
            # batches of about one size, the lowest rungs first
            batches = math.ceil(len(batch) / learner_of(cell).side)
            if len(units) == 1:             # the last unit: all processes share it
                batches = max(batches, min(idle, len(batch)))
            return cell, batch[: math.ceil(len(batch) / batches)]
        if not wanted:
            units.remove((cell, seeds))
    return None


def seconds_left(cell, seeds, runs, cap):
    """A guess at the seconds that these ladders still need for the rungs to come."""
    ladders = [runs.get((cell, seed), {}) for seed in seeds]
    climbs = [climb(cell, rungs, cap) for rungs in ladders]
    # they are expected to end where the highest ended, or else at 8 times a rough P*
    ends = [climbed[-1] for climbed, P, _ in climbs if P is None]
    is_steep = LAW.get(read_method(cell.method).target) == "m"
    rough = cell.v * cell.m ** (cell.L + 1 if is_steep else 3)
    end = min(max(ends, default=8 * rough), last_rung(cell, cap)[0])
    to_come = []
    for _, P, _ in climbs:
        if P:
            n_rungs = 1 + max(0, int(math.log2(end / P)))
            to_come += [P * RUNG**i for i in range(n_rungs)]

    finished = [(P, run.seconds) for rungs in ladders for P, run in rungs.items()]
    if not finished:
        return len(to_come) * learner_of(cell).seconds * cell.s**cell.L
    # clustering and online training take longer with more strings: a power law of P through the
    # four highest rungs. It may fall by chance, so no rung is to take less than the mean
    sizes, seconds = np.array(finished).T
    seconds = seconds.clip(min=1e-3)
    mean = seconds.mean()
    high = sizes >= sizes.max() / RUNG**3
    degree = 1 if len(set(sizes[high])) > 1 else 0
    power_law = np.polyfit(np.log(sizes[high]), np.log(seconds[high] / mean), degree)
    times_mean = np.exp(np.polyval(power_law, np.log(to_come)))
    return mean * times_mean.clip(min=1).sum()


def units_of(cells, cap, rank, size):
    """The units that one of torchrun's processes climbs, in order: [(Cell, seeds)]. Each finds its
    share by itself: ranks have no connection that could break, only the folder in common."""
    costs = {}
    for cell, seeds in cells.items():
        # a network trains the seeds of a cell side by side; others are shared out by seeds
        parts = [tuple(seeds)] if learner_of(cell).side > 1 else [(seed,) for seed in seeds]
        for part in parts:
            costs[cell, part] = seconds_left(cell, part, {}, cap)
    # every rank gets some of the costly units and some of the cheap
    share = sorted(costs, key=costs.get, reverse=True)[rank::size]
    # quick learners first, so that they can be read soon
    return sorted(share, key=lambda unit: learner_of(unit[0]).seconds)


@contextmanager
def time_bar(disable):
    """A tqdm bar of seconds; the caller sets bar.left, the seconds left. A thread redraws it, since
    with one job this process does the work itself."""
    layout = "{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=1, bar_format=layout, smoothing=0, disable=disable) as bar:
        bar.left, began, is_over = 0, time.monotonic(), threading.Event()

        def keep_moving():
            over = False
            while not (over or bar.disable):
                over = is_over.wait(1)
                bar.n = time.monotonic() - began
                bar.total = bar.n + bar.left
                try:
                    with bar.get_lock():    # refresh alone would not release it on an error
                        bar.refresh(nolock=True)
                except OSError:             # nobody reads what we print
                    bar.disable = True

        mover = threading.Thread(target=keep_moving, daemon=True)
        mover.start()
        try:
            yield bar
        finally:
            is_over.set()
            mover.join()


def sweep(cells, folder, cap, device, jobs, write_tables, rank=0, size=1):
    """Climb all ladders of {Cell: seeds} in `jobs` processes; every finished run goes to disk.

    Each of torchrun's `size` processes climbs its share, and rank 0 returns when all are done."""
    units = units_of(cells, cap, rank, size)
    running = {}                            # future -> (Cell, batch)
    expect = lambda cell: seconds_left(cell, cells[cell], folder.runs, cap)
    left = {cell: expect(cell) for cell in cells}
    due = time.monotonic()                  # for the next tables
    pool = OneProcess()
    if jobs > 1:
        spawn = multiprocessing.get_context("spawn")
        pool = futures.ProcessPoolExecutor(jobs, spawn, start_worker)
    try:
        with time_bar(disable=rank > 0) as bar:
            # rank 0 waits for the others, who have runs in files of their own
            while units or running or size > 1 and rank == 0 and any(left.values()):
                bar.left = sum(left.values()) / (jobs * size)
                # keep every process at work
                while len(running) < jobs:
                    idle = jobs - len(running)
                    work = next_batch(units, folder.runs, cap, running.values(), idle)
                    if not work:
                        break
                    cell, batch = work
                    bar.set_postfix_str(f"{cell.method[:30]} L={cell.L} P={batch[-1][0]}", False)
                    running[pool.submit(run_batch, cell, batch, device)] = work
                if not running and any(left.values()):
                    bar.set_postfix_str("waiting for other ranks", False)
                    time.sleep(1)
                for future in futures.wait(running, 1, futures.FIRST_COMPLETED).done:
                    cell, _ = running.pop(future)
                    found = future.result()
                    folder.append(cell, found)
                    before, left[cell] = left[cell], expect(cell)
                    # batches that climbed ahead may end later than their cell
                    report(cell, found, folder.runs, is_done=left[cell] == 0 < before)
                # tables are made from all files, others' too: let that be 5 % of the time
                if rank == 0 and time.monotonic() > due:
                    start = time.monotonic()
                    with suppress(OSError):     # held by another program, perhaps
                        write_tables()
                    due = time.monotonic() + max(1, 20 * (time.monotonic() - start))
                    left = {cell: expect(cell) for cell in cells}
            bar.left = 0
    finally:
        # Ctrl-C above all: don't wait for runs that will be done again
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)


def report(cell, found, runs, is_done):
    """Print which runs of a batch diverged, and the P50 of a cell that is done."""
    name = f"{cell.method} L={cell.L} m={cell.m}"
    for (P, seed), run in found.items():
        step = run.score.diverged
        if step:
            tqdm.write(f"{name} P={P} seed {seed}: loss not finite at step {step}")
    if is_done:
        (row,) = summarise({key: runs[key] for key in runs if key[0] == cell}, {})
        tqdm.write(f"{name}: P50 = {cell_text(row, '', is_long=True)}")


# ----------------------------------------------------------------------------------------
# the folder: finished runs on disk


def read_mark(text):
    """Read the last column of runs.csv: "", "collapsed" or "diverged@STEP"."""
    if not re.fullmatch(r"(collapsed|diverged@[1-9][0-9]*)?", text):
        raise ValueError(f"no mark {text[:20]!r}")
    return text


# the columns of runs.csv, how each is read, and how numbers are written
COLUMNS = {
    "method": lambda text: read_method(text).name,
    "v": whole(1), "s": whole(1), "m": whole(1), "L": whole(1), "zipf": real(0, 10),
    "P": whole(1, 2**40), "seed": whole(0), "level": whole(1), "accuracy": real(0, 1),
    "floor": lambda text: real(0, 1)(text) if text else None,
    "seconds": real(0, 1e9), "device": lambda text: str(torch.device(text)),
    "mark": read_mark,
}
DIGITS = {"zipf": "g", "accuracy": ".6f", "floor": ".6f", "seconds": ".3f"}
HEADER = ",".join(COLUMNS) + "\n"
FILES = "settings.json", "runs", "runs.csv", "samples_vs_depth.csv", "samples_vs_depth.md"


class Refused(ValueError):
    """The folder holds something that this sweep must not mix with, or touch."""


class Folder:
    """The results of any number of sweeps. Each appends its runs to a file of its own under
    runs/, which nobody else writes; runs.csv and the tables are made from all these files."""

    def __init__(self, path, keys):
        """Check what is there, then make what is missing. keys: of the learners to be used."""
        self.path = path
        self.file = path / "runs" / f"{uuid.uuid4().hex[:12]}.csv"
        self.runs = {}  # {(Cell, seed): {P: Run}}
        settings = {"sweep": {"format": 2, "recovered": RECOVERED, "rung": RUNG}}
        for key, learner in LEARNERS.items():
            settings[key] = {row.name: row.default for row in learner.settings}
        stored = self.stored_settings()
        self.read()
        # runs of other settings must not stand in one table
        used = {read_method(cell.method).key for cell, _ in self.runs} | set(keys)
        for key in ("sweep", *sorted(used)):
            for name, value in stored.get(key, {}).items():
                here = settings[key].get(name)
                if here != value:
                    raise Refused(f"out: made with {key}'s {name} = {value}, which is now {here}")
        path.mkdir(parents=True, exist_ok=True)
        if stored != settings:
            self.write("settings.json", json.dumps(settings, indent=1) + "\n")
        self.file.parent.mkdir(exist_ok=True)

    def stored_settings(self):
        """What settings.json holds, or {} in a new folder."""
        if not any((self.path / name).exists() for name in FILES):
            return {}
        try:
            stored = json.loads((self.path / "settings.json").read_bytes())
            if stored["sweep"]["format"] == 2 and {type(x) for x in stored.values()} == {dict}:
                return stored
        except (FileNotFoundError, ValueError, TypeError, LookupError, RecursionError):
            pass
        raise Refused(f"out: {self.path} has results, but no settings.json of a sweep")

    def read(self):
        """Read the runs of all files into self.runs; a run that is there already is kept."""
        for file in [self.path / "runs.csv", *sorted((self.path / "runs").glob("*.csv"))]:
            if file.exists():
                for (cell, P, seed), run in read_runs(file).items():
                    self.runs.setdefault((cell, seed), {}).setdefault(P, run)

    def count(self):
        return sum(map(len, self.runs.values()))

    def write(self, name, text):
        write_whole(self.path / name, lambda file: file.write(text.encode()))

    def append(self, cell, found):
        """Put finished runs, {(P, seed): Run}, on disk and into self.runs."""
        lines = [] if self.file.exists() else [HEADER]
        for (P, seed), run in found.items():
            made = lines_of(cell, P, seed, run)
            for line in made:
                read_line(line.strip())     # raises before a wrong value is on disk
            # level 1 comes last: a run with it is whole
            lines += reversed(made)
        with open(self.file, "ab") as file:
            file.write("".join(lines).encode())
        for (P, seed), run in found.items():
            self.runs.setdefault((cell, seed), {})[P] = run

    def write_tables(self, caps, unrun):
        """Make runs.csv and both tables from all files as they are now. Returns the rows."""
        self.read()
        lines = []
        for cell, seed in sorted(self.runs, key=lambda key: (row_order(key[0]), key[1])):
            for P, run in sorted(self.runs[cell, seed].items()):
                lines += lines_of(cell, P, seed, run)
        self.write("runs.csv", HEADER + "".join(lines))
        rows = summarise(self.runs, caps, unrun)
        text = ",".join(TABLE) + "\n"
        for row in rows:
            text += ",".join(str(row.get(column, "")) for column in TABLE) + "\n"
        self.write("samples_vs_depth.csv", text)
        self.write("samples_vs_depth.md", tables(rows, is_long=True) + "\n")
        return rows


def lines_of(cell, P, seed, run):
    """The lines of one run in a file, from level 1 up; no value holds a comma or a quote."""
    lines, score = [], run.score
    for i, accuracy in enumerate(score.accuracy):
        mark = "collapsed" if score.collapsed[i] else ""
        if score.diverged:
            mark = f"diverged@{score.diverged}"
        floor = score.floor[i] if score.floor else None
        values = accuracy, floor, run.seconds, run.device, mark
        lines.append(line_of([*cell, P, seed, i + 1, *values]))
    return lines


def line_of(values):
    texts = []
    for column, value in zip(COLUMNS, values, strict=True):
        texts.append("" if value is None else format(value, DIGITS.get(column, "")))
    return ",".join(texts) + "\n"


def read_line(line):
    """A line -> ((Cell, P, seed), level, other values), if a sweep would have written it."""
    values = [kind(text) for kind, text in zip(COLUMNS.values(), line.split(","), strict=True)]
    cell, (P, seed, level) = Cell(*values[:6]), values[6:9]
    check_sizes(*cell[1:5])
    if P < first_rung(cell) or P & (P - 1):
        raise ValueError(f"P = {P} is no rung of this ladder")
    if level > cell.L:
        raise ValueError(f"level {level} is above the root, {cell.L}")
    if line_of(values) != line + "\n":
        raise ValueError(f"it should be {line_of(values).strip()}")
    return (cell, P, seed), level, values[9:]


def read_runs(file):
    """A file of runs -> {(Cell, P, seed): Run}, without a last one that was cut short."""
    text = file.read_text(encoding="utf-8", errors="replace")
    if HEADER.startswith(text):
        return {}                           # killed before its first row
    if not text.startswith(HEADER):
        raise Refused(f"out: {file} has other columns than {HEADER.strip()}")
    found = {}  # (Cell, P, seed) -> {level: other values}
    # what follows the last end of a line is empty, or torn
    for number, line in enumerate(text.split("\n")[1:-1], 2):
        try:
            key, level, values = read_line(line)
        except (ValueError, RuntimeError, ArgumentTypeError) as error:
            raise Refused(f"out: {file}, line {number} cannot be used: {error}") from None
        found.setdefault(key, {})[level] = values

    runs = {}
    for key, levels in found.items():
        # all below the root have to be there; not every learner reports the root
        if levels.keys() >= set(range(1, key[0].L)):
            rows = [levels[level] for level in sorted(levels)]
            accuracy, floor, seconds, device, marks = zip(*rows)
            collapsed = [mark == "collapsed" for mark in marks]
            diverged = int(marks[0].partition("@")[2] or 0)
            score = Score(accuracy, collapsed, None if None in floor else floor, diverged)
            runs[key] = Run(score, seconds[0], device[0])
        elif key != list(found)[-1]:        # the last one was cut short
            raise Refused(f"out: {file} has only a part of {key}")
    return runs


# ----------------------------------------------------------------------------------------
# the command line


def span(low, high):
    """An argparse type: 4, or 2..6, or 2,4,6; whole numbers from low to high, once each."""

    def read(text):
        numbers = set()
        for part in text.split(","):
            ends = [whole(low, high)(end) for end in part.split("..")]
            if len(ends) > 2 or not 0 <= ends[-1] - ends[0] < 1000:
                raise ArgumentTypeError(f"must be like 4 or 2..6 or 2,4,6, not {text[:20]!r}")
            numbers.update(range(ends[0], ends[-1] + 1))
        return sorted(numbers)

    return read


def zipf(text):
    """An argparse type: the number that runs.csv will have, with six digits."""
    return float(format(real(0, 10)(text), DIGITS["zipf"]))


def cells_from_flags(args):
    """({Cell: seeds} to run, the cells that `all` leaves out). Raises ValueError."""
    words = args.methods.split(",")
    named = [read_method(word).name for word in words if word != "all"]
    names = dict.fromkeys([*DEFAULT, *named] if "all" in words else named)
    cells, left_out = {}, []
    for name, m, L in itertools.product(names, args.m, args.depth):
        cell = Cell(name, args.v, args.s, m, L, args.zipf)
        if name not in named and L not in DEFAULT[name]:
            left_out.append(cell)
            continue
        method = read_method(name)
        check_sizes(*cell[1:5])             # names the flag
        try:
            method.learner.check_size(*cell[1:5], 1, method.target, **method.settings)
        except ValueError as error:         # may name a setting
            raise ValueError(f"methods: {name}: {error}") from None
        # a ladder without a rung would be missing from the table in silence
        lowest, (highest, reason) = first_rung(cell), last_rung(cell, args.max_samples)
        if highest < lowest:
            flag = "max-samples" if reason == "beyond Pmax" else "methods"
            raise ValueError(f"{flag}: {name} at m = {m} starts at {lowest} strings, {reason}")
        cells[cell] = range(args.seeds or method.learner.seeds)
    if sum(map(len, cells.values())) > MAX_LADDERS:
        raise ValueError(f"seeds: at most {MAX_LADDERS} ladders in a sweep")
    return cells, left_out


def draw(out):
    """Draw the pictures; if that fails, the sweep does not. Returns lines to print."""
    try:
        import plot  # here, since nothing else needs matplotlib

        return [f"wrote {picture}" for picture in plot.draw(out)]
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        return [f"no picture: {reason.splitlines()[0]}"]


def end(error, folder):
    """Exit with one line on what ended a sweep from outside; raise any other error again."""
    is_stop = isinstance(error, KeyboardInterrupt)
    line = str(error).partition("\n")[0][:200] or type(error).__name__
    from_pool = isinstance(error, futures.BrokenExecutor)
    if isinstance(error, RuntimeError) and not from_pool and "memory" not in line:
        raise error
    safe = f"{folder.count()} finished runs are safe in {folder.path}, the same command continues"
    if not folder.file.parent.is_dir():
        safe = f"{folder.path} is gone, and its runs with it"
    print(f"\nsweep.py: {'stopped' if is_stop else line}; {safe}", file=sys.stderr)
    # SIGTERM comes with its name, Ctrl-C without
    raise SystemExit(130 if is_stop and not error.args else 1) from None


def main():
    # torchrun says which of its processes this is: rank 0 speaks for all
    rank, size = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
    torch.set_num_threads(1)                # as in a pool: results don't depend on --jobs
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    most_jobs = 61 if os.name == "nt" else 1024  # Windows waits for no more processes at once
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--depth", type=span(2, 24), default=[2, 3, 4, 5, 6],
         help="L: 4 or 2..6 or 2,4,6 (default 2..6)")
    flag("--m", type=span(1, 2**24), default=[3], help="rules per symbol, as --depth (default 3)")
    flag("--v", type=whole(2, 256), default=8, help="symbols per level (default 8)")
    flag("--s", type=whole(2, 62), default=2, help="children per symbol (default 2)")
    flag("--zipf", type=zipf, default=0.0, help="rule j has p ~ (j+1)^-zipf (default 0)")
    flag("--methods", default="all",
         help=f"{', '.join(DEFAULT)} or any LEARNER-TARGET:SETTING=VALUE, separated by commas; "
              "or all, the default, which runs networks only at some depths of 2..4")
    flag("--seeds", type=whole(1, 1000), help="seeds 0..N-1 (default 5, networks 3)")
    flag("--max-samples", type=whole(1, 2**40), default=2**20, help="largest P (default 2^20)")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default auto)")
    flag("--jobs", type=whole(1, most_jobs),
         help="processes (default: one per core; one on a GPU or for torchrun)")
    flag("--out", metavar="DIR", default="out", help="folder of results (default out)")
    args = parser.parse_args()
    device = pick_device(parser, args.device)
    jobs = args.jobs or 1
    if not args.jobs and device == "cpu" and size == 1:
        jobs = min(cores, most_jobs)
    if device == "cuda" and size > 1:       # one GPU a rank, by turns if there are fewer
        local = int(os.environ.get("LOCAL_RANK", rank))
        device = f"cuda:{local % torch.cuda.device_count()}"
    try:
        if not args.out.strip():
            raise ValueError("out: must name a folder")
        cells, unrun = cells_from_flags(args)
        folder = Folder(Path(args.out), {read_method(cell.method).key for cell in cells})
    except ValueError as error:
        parser.error(f"argument --{error}")
    except OSError as error:
        parser.error(f"argument --out: {error}")

    caps = dict.fromkeys(cells, args.max_samples)
    write_tables = partial(folder.write_tables, caps, unrun)
    try:
        sweep(cells, folder, args.max_samples, device, jobs, write_tables, rank, size)
        if rank > 0:
            return
        known = -1
        while known < folder.count():       # another sweep may have finished meanwhile
            rows = write_tables()
            known = folder.count()
            pictures = draw(folder.path)
            folder.read()
    except (KeyboardInterrupt, OSError, MemoryError, RuntimeError, Refused) as error:
        end(error, folder)
    print(tables(rows, is_long=False))
    # timings of several devices are mixed: say so
    devices = {run.device for rungs in folder.runs.values() for run in rungs.values()}
    if devices - {device}:
        print(f"runs of this folder were made on {', '.join(sorted(devices))}")
    for line in pictures:
        print(line)


if __name__ == "__main__":
    run_script(main)
