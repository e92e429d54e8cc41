"""
The table: how many samples P* each learner needs, against the depth of the grammar.
Learners x targets x depths.

    python sweep.py --depth 2..6                        the table of the README
    python sweep.py --depth 5 --methods data2vec        a cell that it leaves out
    python sweep.py --depth 4 --m 3..6 --methods cluster,cluster-joint --out out/m
    python sweep.py --methods data2vec-token:mask=0.15:steps=8000

A method is a learner, after a dash its target (own latents if there is none), and after
colons any of the learner's settings. Every method has rows of its own.

For every method, size, depth and seed the sweep climbs a *ladder* of sample sizes P, each twice
the last. One seed is one fresh grammar and one fresh sample. A ladder ends
  - when the highest level of the tree below the root, L-1, is recovered: an accuracy of 0.95 or
    more on fresh strings, on two rungs in a row;
  - at --max-samples ("beyond Pmax");
  - for a network, whose steps are fixed ("limited by steps"): before it would see each string
    fewer than 8 times; or when level L-1 is above 0.5 and three more rungs have not raised its
    best accuracy by 0.05.
P50 is the smallest P from which the accuracy is above 0.5 on two rungs in a row, interpolated in
log P; P90 is the same for 0.9. What higher rungs bring changes neither.

It writes to --out
  runs/*.csv               a row for every run and level, as soon as the run is finished: one file
                           for every command, which only ever grows
  runs.csv                 the rungs of all ladders, put together and in order
  samples_vs_depth.csv     a row for every method, size and depth
  samples_vs_depth.md      the same as a table to read; a shorter one is printed
  samples_vs_depth.png     drawn by plot.py, where matplotlib is installed
  settings.json            what the rows don't say: the settings of the sweep and the learners
Stop it at any time: the same command continues. Any number of sweeps may share a folder.
"""

import csv
import difflib
import io
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
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
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
PLATEAU = 3         # it ends, too, after so many rungs
RISE = 0.05         # that have not raised the best accuracy by so much
BOOTSTRAP = 2000    # resamples of the seeds behind every 95 % interval
MAX_LADDERS = 20000


# -------------------------------------------------------------------------------------------------
# the methods: a learner, its target, its settings


class Learner(NamedTuple):
    """What the sweep knows of a learner. Only recover is needed."""

    recover: Callable             # (grammars, samples, seeds, target=, device=, **settings) -> [Score]
    targets: tuple = ("latent",)
    settings: tuple = ()          # its table of grammar.Setting
    presets: dict = {"default": {}}
    check_size: Callable = None   # (v, s, m, L, P, target, **settings): ValueError if it can't work
    first: Callable = lambda v, s, m: v * m  # P of the lowest rung, rounded down to a power of 2
    sees: Callable = None         # (v, settings) -> strings that all its steps look at, if they end
    seconds: Callable = lambda L, P: 1.0     # a guess at a run on one core, in a binary tree
    side: int = 1                 # runs in one call, at most: networks train them side by side
    growth: dict = {}             # {target: how P* grows with every level in the theory, "1" or "m"}
    seeds: int = 5                # by default


GROWTH = {
    "latent": "1", "joint": "1", "stacked": "1", "several": "1", "token": "m", "root": "m",
}
LEARNERS = {
    "cluster": Learner(
        cluster.recover, cluster.TARGETS, cluster.SETTINGS, cluster.PRESETS, cluster.check_size,
        first=lambda v, s, m: v * m / (2 * s),  # fewer than half of the top tuples can be seen
        seconds=lambda L, P: 0.1 + 1e-8 * P * 2**L,
        growth=GROWTH,
    ),
    "predictor": Learner(
        predictor.recover, predictor.TARGETS, predictor.SETTINGS, predictor.PRESETS,
        predictor.check_size,
        first=lambda v, s, m: v * m**2,
        sees=lambda v, settings: settings.steps * (settings.batch or 8 * v),
        seconds=lambda L, P: 0.4 * 2**L,
        side=8,
        seeds=3,
        growth=GROWTH,
    ),
    "data2vec": Learner(
        data2vec.recover, data2vec.TARGETS, data2vec.SETTINGS, data2vec.PRESETS,
        data2vec.check_size,
        first=lambda v, s, m: v * m**3,
        sees=lambda v, settings: settings.steps * settings.batch,
        seconds=lambda L, P: 1.5 * 2**L,
        side=8,
        seeds=3,
        growth=GROWTH,
    ),
}
DEFAULT = {  # the rows of the first table, and the depth up to which they are run unless asked for
    "cluster": 24, "cluster-token": 24, "cluster-root": 24, "cluster-joint": 24,
    "predictor": 24, "predictor-token": 4, "data2vec": 4, "data2vec-token": 4,
}

class Method(NamedTuple):
    """A method's name, taken apart."""

    name: str        # in its one spelling
    key: str         # the learner's, in LEARNERS
    learner: Learner
    target: str
    given: dict      # {setting: value} of the name
    settings: SimpleNamespace  # the values of all settings


@lru_cache(maxsize=None)
def read_method(text):
    """LEARNER-TARGET:SETTING=VALUE:... -> Method, its name without what changes nothing and with
    the settings in the order of the learner's table. Raises ValueError if it has no meaning."""
    words, *changes = text.split(":")
    key, _, target = words.partition("-")
    target = target or "latent"
    if key not in LEARNERS or target not in LEARNERS[key].targets:
        known = [f"{name}-{target}" for name in LEARNERS for target in LEARNERS[name].targets]
        near = difflib.get_close_matches(words, [*LEARNERS, *known], 3) or known
        raise ValueError(f"{words[:60]!r} is no learner and target; there is {', '.join(near)}")
    learner, given = LEARNERS[key], {}
    for change in changes:
        setting, equals, value = change.partition("=")
        if not equals or setting in given:
            raise ValueError(f"{text[:60]!r}: settings are written :name=value, each once")
        given[setting.replace("-", "_")] = value
    usual = next(iter(learner.presets))
    preset = given.get("preset", usual)
    try:
        settings = read_settings(learner.settings, learner.presets, given)
        base = read_settings(learner.settings, learner.presets, {"preset": preset})
    except ValueError as error:
        raise ValueError(f"{text[:60]!r}: {error}") from None
    name = key if target == "latent" else f"{key}-{target}"
    name += "" if preset == usual else f":preset={preset}"
    for row in learner.settings:
        value = getattr(settings, row.name)
        name += "" if value == getattr(base, row.name) else f":{row.name}={value}"
    return Method(name, key, learner, target, given, settings)


# -------------------------------------------------------------------------------------------------
# the ladder


class Cell(NamedTuple):
    """A row of samples_vs_depth.csv."""

    method: str
    v: int
    s: int
    m: int
    L: int
    zipf: float


class Ladder(NamedTuple):
    """One climb: a cell and a seed."""

    cell: Cell
    seed: int


class Run(NamedTuple):
    """One rung: the score of what a learner made of P strings."""

    score: Score
    seconds: float
    device: str


def first_rung(cell):
    """The P that a ladder starts at, a power of 2."""
    start = read_method(cell.method).learner.first(cell.v, cell.s, cell.m)
    return 2 ** max(0, int(math.log2(start)))


@lru_cache(maxsize=None)
def last_rung(cell):
    """The P beyond which no rung is worth climbing, or fits into memory, and the reason."""
    method = read_method(cell.method)
    learner = method.learner
    last, reason = 2**40, "beyond Pmax"
    online = getattr(method.settings, "online", False)  # then the steps follow from P
    if learner.sees and not online:
        last, reason = learner.sees(cell.v, method.settings) // PASSES, "limited by steps"
    P = first_rung(cell)
    while learner.check_size and P <= last:
        try:
            learner.check_size(cell.v, cell.s, cell.m, cell.L, P, method.target, **method.given)
        except ValueError:
            return P // RUNG, "limited by memory"
        P *= RUNG
    return last, reason


def climb(cell, runs, max_samples):
    """Where one ladder stands. runs: {P: Run}.

    Returns (climbed, P, end): the rungs that count, in order; the P to try next, or None; and why
    the ladder ends there, "" if level L-1 is recovered."""
    is_network = read_method(cell.method).learner.sees is not None
    last, reason = last_rung(cell)
    climbed, accuracy = [], []
    P = first_rung(cell)
    while P in runs:
        climbed.append(P)
        accuracy.append(runs[P].score.accuracy[cell.L - 2])
        if len(climbed) > 1 and min(accuracy[-2:]) >= RECOVERED:
            return climbed, None, ""
        best_before = max(accuracy[:-PLATEAU], default=0)
        if is_network and best_before > 0.5 and max(accuracy[-PLATEAU:]) < best_before + RISE:
            return climbed, None, "limited by steps"
        P *= RUNG
    if P > last:
        return climbed, None, reason
    if P > max_samples:
        return climbed, None, "beyond Pmax"
    return climbed, P, "not finished"


def crossing(P, accuracy, threshold):
    """The smallest P from which the accuracy is at or above the threshold on two rungs in a row,
    interpolated linearly in log P between the rung before and the first of the two.

    P, accuracy: equally long lists, P ascending. Returns (P*, sign): sign 0 if there is one; -1
    and the lowest rung if P* is smaller; 1 and the last rung below the threshold if it is larger."""
    above = [a >= threshold for a in accuracy]
    if all(above) or all(above[:2]):
        return float(P[0]), -1
    for i in range(1, len(P) - 1):
        if above[i] and above[i + 1]:
            share = (threshold - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
            return float(P[i - 1] * (P[i] / P[i - 1]) ** share), 0
    return float(max(p for p, a in zip(P, above) if not a)), 1


# -------------------------------------------------------------------------------------------------
# the statistics


def mean_star(stars):
    """[(P*, sign) of every seed] -> (geometric mean, sign). Where seeds lie beyond their ladders it
    is the mean of what is known and of the bounds, and so a bound itself: from below (1) or from
    above (-1), or nothing at all (None) with seeds on both sides."""
    mean = float(np.exp(np.mean([np.log(P) for P, _ in stars])))
    signs = {sign for _, sign in stars if sign}
    return mean, None if len(signs) > 1 else max(signs, default=0, key=abs)


def resample(values, random):
    """(BOOTSTRAP,) means of so many resamples of the values."""
    return random.choice(values, size=(BOOTSTRAP, len(values))).mean(1)


def interval(stars):
    """The 95 % bootstrap interval of the mean P*, (low, high); None for a single seed, or where a
    seed lies beyond its ladder."""
    if len(stars) < 2 or any(sign for _, sign in stars):
        return None
    means = resample(np.log([P for P, _ in stars]), np.random.default_rng(0))
    low, high = np.exp(np.percentile(means, [2.5, 97.5]))
    return float(low), float(high)


def slope(points):
    """How log P* rises with x: least squares over the seeds' means.

    points: {x: [(P*, sign) of every seed]}, two or more. Returns (slope, low, high, sign), with a
    95 % interval from resampling the seeds. A P* known from below at a large x makes the slope a
    lower bound (sign 1); with any other bound it is not known (None). low and high are None for a
    bound, or where no x has two seeds."""
    x = np.array(sorted(points), float)
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    means = [mean_star(points[k]) for k in sorted(points)]
    if any(sign is None or sign * weight < 0 for (_, sign), weight in zip(means, weights)):
        return None
    value = float(weights @ np.log([mean for mean, _ in means]))
    bound = int(any(sign for _, sign in means))
    if bound or max(map(len, points.values())) == 1:
        return value, None, None, bound
    random = np.random.default_rng(0)
    logs = [np.log([P for P, _ in points[k]]) for k in sorted(points)]
    slopes = weights @ np.stack([resample(values, random) for values in logs])
    low, high = np.percentile(slopes, [2.5, 97.5])
    return value, float(low), float(high), 0


# -------------------------------------------------------------------------------------------------
# the tables


TABLE = (
    "method,v,s,m,L,zipf,P50,P50_lo,P50_hi,P90,P50_over_vm3,"
    "root_P50,root_P50_lo,root_P50_hi,floor,root_floor,seeds,censored,status"
).split(",")
MARKS = {  # behind a P* of the printed table
    "limited by steps": "s",
    "limited by memory": "m",
    "not finished": "..",
    "untrained above 0.5": "!",
}


class Measure(NamedTuple):
    """What the seeds of one cell say of level L-1, or of the root."""

    P50: list     # (P*, sign) of every seed, see crossing
    P90: list
    floor: float  # mean accuracy before any training; None if not reported
    status: str   # why P50 is a bound, "" if it is none


def measure(cell, ladders, level, cap):
    """The Measure of one level. ladders: {P: Run} of every seed."""
    P50, P90, floors, ends = [], [], [], set()
    for runs in ladders:
        climbed, _, end = climb(cell, runs, cap)
        scores = [runs[P].score for P in climbed]
        if not scores or min(len(score.accuracy) for score in scores) < level:
            continue  # not begun, or the learner does not report the root
        accuracy = [score.accuracy[level - 1] for score in scores]
        P50.append(crossing(climbed, accuracy, 0.5))
        P90.append(crossing(climbed, accuracy, 0.9))
        floors += [score.floor[level - 1] for score in scores if score.floor]
        if P50[-1][1] > 0 or end == "not finished":
            ends.add(end or "beyond Pmax")
    worst_first = ("not finished", "limited by memory", "limited by steps", "beyond Pmax")
    status = next((end for end in worst_first if end in ends), "")
    if not status and any(sign < 0 for _, sign in P50):
        status = "below Pmin"
    return Measure(P50, P90, sum(floors) / len(floors) if floors else None, status)


def summarise(runs, caps):
    """{Ladder: {P: Run}} -> {(Cell, "tree" or "root"): Measure}, in the order of the rows.

    caps: {Cell: the longest P that this sweep allows}. A cell of another sweep counts as climbed to
    its end where its highest seed stands."""
    cells, found = {}, {}
    for ladder in sorted(runs, key=lambda ladder: (row_order(ladder.cell), ladder.seed)):
        cells.setdefault(ladder.cell, []).append(runs[ladder])
    for cell, ladders in cells.items():
        cap = caps.get(cell) or max(max(rungs) for rungs in ladders)
        for part, level in (("tree", cell.L - 1), ("root", cell.L)):
            measured = measure(cell, ladders, level, cap)
            if measured.P50:
                found[cell, part] = measured
    return found


def row_order(cell):
    """Sizes, then learners, then methods in the order of DEFAULT, then all others."""
    learner = list(LEARNERS).index(read_method(cell.method).key)
    names = list(DEFAULT)
    place = names.index(cell.method) if cell.method in names else len(names)
    return cell.v, cell.s, cell.m, cell.zipf, learner, place, cell


def star_text(stars):
    """[(P*, sign) of every seed] -> "412", "> 1024", "< 16" or "?"."""
    mean, sign = mean_star(stars)
    return "?" if sign is None else {0: "", 1: "> ", -1: "< "}[sign] + f"{mean:.0f}"


def marks_of(found):
    """What a reader has to know beside a P*."""
    floored = found.floor is not None and found.floor > 0.5
    return [found.status] * (found.status in MARKS) + ["untrained above 0.5"] * floored


def short_text(found):
    """A cell of the printed table."""
    return star_text(found.P50).replace(" ", "") + "".join(MARKS[mark] for mark in marks_of(found))


def long_text(found):
    """A cell of samples_vs_depth.md: with the interval over the seeds, and with what limits it."""
    text = star_text(found.P50)
    bounds = interval(found.P50)
    if bounds:
        text += " [{:.0f}, {:.0f}]".format(*bounds)
    beyond = sum(sign != 0 for _, sign in found.P50)
    notes = [f"{beyond} of {len(found.P50)} seeds"] * (beyond > 0)
    notes += ["one seed"] * (len(found.P50) == 1) + [found.status] * (found.status in MARKS)
    notes += [f"untrained {found.floor:.2f}"] if found.floor is not None else []
    return text + (f" ({', '.join(notes)})" if notes else "")


def slope_text(points, scale):
    """The slope over {x: stars} with its interval, or as a bound; "" if there is none."""
    found = slope(points) if len(points) > 1 else None
    if found is None:
        return ""
    value, low, high, bound = found
    text = (">= " if bound else "") + f"{scale(value):.2f}"
    return text if low is None else f"{text} [{scale(low):.2f}, {scale(high):.2f}]"


def table_row(cell, measures):
    """A row of samples_vs_depth.csv as {column: value}."""
    row = dict(zip(TABLE, cell)) | {"seeds": 0, "status": "not run"}
    for part, prefix in (("tree", ""), ("root", "root_")):
        found = measures.get((cell, part))
        if found:
            bounds = interval(found.P50)
            row[f"{prefix}P50"] = star_text(found.P50)
            row[f"{prefix}P50_lo"] = f"{bounds[0]:.0f}" if bounds else ""
            row[f"{prefix}P50_hi"] = f"{bounds[1]:.0f}" if bounds else ""
            row[f"{prefix}floor"] = "" if found.floor is None else f"{found.floor:.3f}"
    found = measures.get((cell, "tree"))
    if found:
        mean, sign = mean_star(found.P50)
        row["P90"] = star_text(found.P90)
        row["P50_over_vm3"] = f"{mean / (cell.v * cell.m**3):.4g}" if sign == 0 else ""
        row["seeds"] = len(found.P50)
        row["censored"] = sum(sign != 0 for _, sign in found.P50)
        row["status"] = found.status
    return row


def depth_tables(measures, unrun, cell_text):
    """A table for every size, as lists of texts: a row for every method, then one for every root.

    Growth is counted from L = 3 on, as a tree of depth 2 has no cousins but under the root; its
    column ends with the depths that it covers."""
    sizes = {}  # (v, s, m, zipf) -> {(part, method): {L: Measure or None}}
    for cell, part in [*measures, *((cell, "tree") for cell in unrun)]:
        methods = sizes.setdefault((cell.v, cell.s, cell.m, cell.zipf), {})
        methods.setdefault((part, cell.method), {})[cell.L] = measures.get((cell, part))
    tables = []
    for (v, s, m, zipf), methods in sorted(sizes.items()):
        depths = sorted({L for cells in methods.values() for L in cells})
        title = f"v={v} s={s} m={m}" + (f" zipf={zipf:g}" if zipf else "")
        table = [[title, *(f"L={L}" for L in depths), "growth a level, L", "law"]]
        for part, method in sorted(methods, key=lambda key: key[0] == "root"):
            cells = methods[part, method]
            texts = {L: cell_text(found) if found else "-" for L, found in cells.items()}
            deep = {L: found.P50 for L, found in cells.items() if found and L > 2}
            growth = slope_text(deep, math.exp)
            growth += f" {min(deep)}..{max(deep)}" if growth else ""
            name = method if part == "tree" else f"{method}, root"
            growth_of = read_method(method).learner.growth
            law = growth_of.get(read_method(method).target, "") if part == "tree" else ""
            table.append([name, *(texts.get(L, "") for L in depths), growth, law])
        tables.append(table)
    return tables


def printed_tables(measures, unrun):
    """The tables for the terminal, five depths side by side, and what their marks mean."""
    text = ""
    for table in depth_tables(measures, unrun, short_text):
        depths = len(table[0]) - 3
        for start in range(1, depths + 1, 5):
            stop = min(start + 5, depths + 1)
            part = [[row[0], *row[start:stop], *row[-2:]] for row in table]
            widths = [max(map(len, column)) for column in zip(*part)]
            for name, *cells in part:
                cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
                text += "  ".join([name.ljust(widths[0]), *cells]).rstrip() + "\n"
    used = {mark for found in measures.values() for mark in marks_of(found)}
    text += "".join(f"{sign}  {mark}\n" for mark, sign in MARKS.items() if mark in used)
    if unrun:
        methods = ",".join(dict.fromkeys(cell.method for cell in unrun))
        depths = ",".join(str(L) for L in sorted({cell.L for cell in unrun}))
        text += f"-  not run: --methods {methods} --depth {depths}\n"
    return text


def markdown_tables(measures, unrun):
    """samples_vs_depth.md: every cell with its interval, then the exponents of m."""
    tables = depth_tables(measures, unrun, long_text)
    exponents = {}
    for (cell, part), found in measures.items():
        if part == "tree":
            exponents.setdefault(cell._replace(m=0), {})[math.log(cell.m)] = found.P50
    rows = []
    for cell, points in exponents.items():
        exponent = slope_text(points, float)
        several = sorted(round(math.exp(x)) for x in points)
        if exponent:
            size = f"v={cell.v} s={cell.s} L={cell.L}"
            rows.append([cell.method, size, f"{several[0]}..{several[-1]}", exponent])
    if rows:
        tables.append([["method", "size", "m", "exponent of m in P*"], *rows])
    text = "P*, the samples at which level L-1, or the root, is recovered (accuracy 0.5): "
    text += "geometric mean over the seeds [95 % interval]; -: not run\n"
    for table in tables:
        lines = [table[0], ["---"] * len(table[0]), *table[1:]]
        text += "\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return text


# -------------------------------------------------------------------------------------------------
# all ladders


def run_batch(cell, rungs, device):
    """Runs of one cell side by side. rungs: [(P, seed)]. Returns {(P, seed): Run}."""
    method = read_method(cell.method)
    samples, seeds = zip(*rungs)
    grammars = [Grammar.random(*cell[1:5], seed, cell.zipf) for seed in seeds]
    start = time.perf_counter()
    scores = method.learner.recover(
        grammars, samples, seeds, target=method.target, device=device, **method.given
    )
    seconds = (time.perf_counter() - start) / len(rungs)
    return {rung: Run(score, seconds, device) for rung, score in zip(rungs, scores, strict=True)}


def start_worker():
    """One thread of work per process. Ctrl-C ends it at once and silently, since finished runs are
    the parent's business, and so does the parent's death, which would leave it waiting for ever."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class OneProcess:
    """Stands in for a pool of processes where one job is asked for; needs no shared memory."""

    def submit(self, work, *arguments):
        future = Future()
        future.set_result(work(*arguments))
        return future

    def shutdown(self, **how):
        pass


def next_batch(cell, seeds, runs, cap, busy):
    """The rungs of a cell to run next, [(P, seed)]: what its ladders need and is not under way.

    Runs side by side are cheap, so a network climbs a few rungs ahead; a rung that turns out to lie
    beyond its ladder's end does not count."""
    side = read_method(cell.method).learner.side
    highest = min(cap, last_rung(cell)[0])
    rungs = []
    for seed in seeds:
        known = runs.get(Ladder(cell, seed), {})
        climbed, P, _ = climb(cell, known, cap)
        if P is None:
            continue
        recovered = climbed and known[climbed[-1]].score.accuracy[cell.L - 2] >= RECOVERED
        ahead = 1 if side == 1 or recovered else 2 if climbed else 3
        ahead = [P * RUNG**i for i in range(ahead)]
        rungs += [(P, seed) for P in ahead if P <= highest and P not in known]
    rungs = sorted(rung for rung in rungs if rung not in busy)
    batches = max(1, math.ceil(len(rungs) / side))
    return rungs[: math.ceil(len(rungs) / batches)]


def guess(cell, P):
    """Core seconds of one run, by the learner's own guess for binary trees."""
    return read_method(cell.method).learner.seconds(cell.L * math.log2(cell.s), P)


def seconds_left(cells, runs, cap):
    """A guess at the core seconds until all ladders are climbed: each has five rungs, and one more
    if it has reached them."""
    left = 0.0
    for cell, seeds in cells.items():
        for seed in seeds:
            climbed, P, _ = climb(cell, runs.get(Ladder(cell, seed), {}), cap)
            if P is not None:
                left += max(1, 5 - len(climbed)) * guess(cell, P)
    return left


def sweep(cells, folder, cap, device, jobs, report):
    """Climb all ladders, in batches, in `jobs` processes of one thread each, and put every finished
    run on disk at once. cells: {Cell: seeds}. report(key) is called whenever all ladders of a
    learner have come to their ends, and report(None) now and then."""
    # one learner after the other, the deepest trees first: long work last leaves cores idle
    order = sorted(cells, key=lambda cell: (row_order(cell)[4], -cell.L))
    climbing = {cell: cells[cell] for cell in order}
    running = {}  # future -> (cell, rungs)
    runs, next_look, next_report = folder.runs, 0.0, time.time() + 10
    layout = "{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}"
    bar = tqdm(total=seconds_left(climbing, runs, cap), bar_format=layout, smoothing=0)
    pool = OneProcess()
    if jobs > 1:
        pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker)
    try:
        while climbing:
            for cell in list(climbing):
                if len(running) >= jobs:
                    break
                busy = {rung for c, rungs in running.values() if c == cell for rung in rungs}
                batch = next_batch(cell, cells[cell], runs, cap, busy)
                while batch and len(running) < jobs:
                    running[pool.submit(run_batch, cell, batch, device)] = cell, batch
                    busy |= set(batch)
                    batch = next_batch(cell, cells[cell], runs, cap, busy)
                if not any(cell == c for c, _ in running.values()):  # all its ladders are climbed
                    del climbing[cell]
                    key = read_method(cell.method).key
                    if all(read_method(c.method).key != key for c in climbing):
                        report(key)
            names = (f"{c.method[:30]} L={c.L} P={b[-1][0]}" for c, b in running.values())
            bar.set_postfix_str(", ".join(names), refresh=False)
            for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                cell, _ = running.pop(future)
                found = future.result()
                folder.append(cell, found)
                for (P, seed), run in found.items():
                    bar.n += guess(cell, P)
                    if run.score.diverged:
                        where = f"{cell.method} L={cell.L} m={cell.m} P={P} seed {seed}"
                        tqdm.write(f"{where}: loss not finite at step {run.score.diverged}; "
                                   "counts as not recovered")
            if time.time() > next_look:
                bar.total = bar.n + seconds_left(climbing, runs, cap)
                next_look = time.time() + 1
            bar.total = max(bar.total, bar.n)
            bar.refresh()
            if time.time() > next_report:
                start = time.time()
                report(None)
                next_report = time.time() + max(5, 20 * (time.time() - start))  # 5 % at most
    except BaseException:  # Ctrl-C above all: don't wait for runs that will be done again
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        bar.close()
        pool.shutdown(wait=False, cancel_futures=True)


# -------------------------------------------------------------------------------------------------
# the folder: finished runs on disk


COLUMNS = "method,v,s,m,L,zipf,P,seed,level,accuracy,floor,seconds,device,mark".split(",")
OLD_COLUMNS = "method,v,s,m,L,P,seed,level,accuracy,seconds,device,collapsed".split(",")
OLD_NAMES = {
    "cluster-cousins": "cluster:positions=cousins", "cluster-element": "cluster:positions=element",
}
FILES = ("runs.csv", "runs", "samples_vs_depth.csv", "samples_vs_depth.md")


class Refused(Exception):
    """The folder holds something that this sweep must not mix with, or touch."""


class Folder:
    """The results of any number of sweeps. Each appends its runs to a file of its own under runs/,
    which nobody else writes; runs.csv and the tables are made from all of these files."""

    def __init__(self, path, keys):
        """Check the folder against this program, and read its runs. keys: of the learners that the
        sweep will use. Changes nothing. Raises Refused."""
        self.path = path
        self.file = path / "runs" / f"{uuid.uuid4().hex[:12]}.csv"
        self.settings = {"sweep": {"format": 2, "recovered": RECOVERED, "rung": RUNG}}
        for key, learner in LEARNERS.items():
            self.settings[key] = {row.name: row.default for row in learner.settings}
        try:
            stored = self.read_settings()
            self.runs = self.read()
        except (OSError, UnicodeDecodeError) as error:
            raise Refused(f"cannot be read ({error})") from None
        used = {read_method(ladder.cell.method).key for ladder in self.runs} | set(keys)
        for key in ("sweep", *sorted(used)):
            for name, value in stored.get(key, {}).items():
                here = self.settings[key].get(name)
                if name != "format" and here != value:
                    raise Refused(f"was made with {key}'s {name} = {value}, which is now {here}")

    def read_settings(self):
        """What settings.json holds, {} if there is none. Raises Refused if we did not write it."""
        file = self.path / "settings.json"
        if not file.exists():
            foreign = [name for name in FILES if (self.path / name).exists()]
            if foreign:
                raise Refused(f"has a {foreign[0]} but no settings.json that belongs to it")
            return {}
        try:
            stored = json.loads(file.read_bytes())
            mine = "rung" in stored["sweep"] and all(isinstance(x, dict) for x in stored.values())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            mine = False
        if not mine:
            raise Refused("has a settings.json that is not a sweep's")
        return stored

    def read(self):
        """The runs of all files, {Ladder: {P: Run}}; one that stands twice is read once."""
        runs = {}
        for file in [self.path / "runs.csv", *sorted((self.path / "runs").glob("*.csv"))]:
            if file.exists():
                for ladder, rungs in read_runs(file).items():
                    runs[ladder] = rungs | runs.get(ladder, {})
        return runs

    def create(self):
        """Make the folder and its settings.json. Raises OSError."""
        (self.path / "runs").mkdir(parents=True, exist_ok=True)
        write_text(self.path / "settings.json", json.dumps(self.settings, indent=1) + "\n")

    def append(self, cell, found):
        """Put finished runs, {(P, seed): Run}, on disk and into self.runs."""
        rows = [] if self.file.exists() else [COLUMNS]
        for (P, seed), run in found.items():
            rows += reversed(rows_of(cell, P, seed, run))  # level 1 last: a run with it is whole
        with open(self.file, "a", newline="") as file:
            file.write(csv_text(rows))
        for (P, seed), run in found.items():
            self.runs.setdefault(Ladder(cell, seed), {})[P] = run

    def write_tables(self, caps, unrun):
        """Make runs.csv and both tables from all files as they are now. Returns the Measures."""
        for ladder, rungs in self.read().items():
            self.runs[ladder] = rungs | self.runs.get(ladder, {})
        rows = [COLUMNS]
        for ladder in sorted(self.runs, key=lambda x: (row_order(x.cell), x.seed)):
            for P in sorted(self.runs[ladder]):
                rows += rows_of(ladder.cell, P, ladder.seed, self.runs[ladder][P])
        write_text(self.path / "runs.csv", csv_text(rows))
        measures = summarise(self.runs, caps)
        cells = sorted({*(cell for cell, _ in measures), *unrun}, key=row_order)
        rows = [table_row(cell, measures) for cell in cells]
        rows = [TABLE, *([row.get(column, "") for column in TABLE] for row in rows)]
        write_text(self.path / "samples_vs_depth.csv", csv_text(rows))
        write_text(self.path / "samples_vs_depth.md", markdown_tables(measures, unrun))
        return measures


def csv_text(rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_text(path, text):
    write_whole(path, lambda file: file.write(text.encode()))


def rows_of(cell, P, seed, run):
    """The rows of one run, from level 1 up."""
    rows, score = [], run.score
    for i, accuracy in enumerate(score.accuracy):
        mark = "collapsed" if score.collapsed[i] else ""
        mark = f"diverged@{score.diverged}" if score.diverged else mark
        floor = f"{score.floor[i]:.6f}" if score.floor else ""
        values = [f"{accuracy:.6f}", floor, f"{run.seconds:.3f}", run.device, mark]
        rows.append([*cell[:5], f"{cell.zipf:g}", P, seed, i + 1, *values])
    return rows


def read_runs(file):
    """A file of runs -> {Ladder: {P: Run}}, without a last run that was cut short. Rows are checked
    as strictly as flags. Raises Refused, naming the line, and OSError."""
    text = file.read_bytes().decode()
    header, *lines = text[: text.rfind("\n") + 1].splitlines() or [",".join(COLUMNS)]
    columns = header.split(",")
    if columns not in (COLUMNS, OLD_COLUMNS) or not text.startswith(header[: len(text)]):
        raise Refused(f"has a {file.name} with other columns than {','.join(COLUMNS)}")
    found, last = {}, None  # found: (Ladder, P) -> {level: what its row says}
    for number, line in enumerate(lines, 2):
        try:
            row = dict(zip(columns, next(csv.reader([line])), strict=True))
            key, level, values = read_row(row)
            if last not in (None, key) and not set(range(1, last[0].cell.L)) <= set(found[last]):
                raise ValueError("the run before it is not whole")
        except (ValueError, StopIteration, csv.Error) as error:
            reason = f"line {number} cannot be used: {error}"
            raise Refused(f"has a {file.name} whose {reason}") from None
        found.setdefault(key, {}).setdefault(level, values)
        last = key
    runs = {}
    for (ladder, P), levels in found.items():
        if set(range(1, ladder.cell.L)) <= set(levels):
            accuracy, collapsed, floor, rest = zip(*(levels[level] for level in sorted(levels)))
            diverged, seconds, device = rest[0]
            score = Score(accuracy, collapsed, None if None in floor else floor, diverged)
            runs.setdefault(ladder, {})[P] = Run(score, seconds, device)
    return runs


def read_row(row):
    """{column: text} -> ((Ladder, P), level, values). Raises ValueError."""

    def value(column, kind):
        try:
            return kind(row[column])
        except ArgumentTypeError as error:
            raise ValueError(f"{column} {error}") from None

    name = OLD_NAMES.get(row["method"], row["method"])
    if read_method(name).name != name:
        raise ValueError(f"the method is written {read_method(name).name!r}")
    v, s, m, L = (value(column, whole(1)) for column in "vsmL")
    check_sizes(v, s, m, L)
    cell = Cell(name, v, s, m, L, value("zipf", real(0, 10)) if "zipf" in row else 0.0)
    ladder = Ladder(cell, value("seed", whole(0)))
    P, level = value("P", whole(1, 2**40)), value("level", whole(1, L))
    if P < first_rung(cell) or P & (P - 1):
        raise ValueError(f"P = {P} is no rung: a power of 2 from {first_rung(cell)} on")
    accuracy, seconds = value("accuracy", real(0, 1)), value("seconds", real(0, 1e9))
    floor = value("floor", real(0, 1)) if row.get("floor") else None
    mark = row["mark"] if "mark" in row else {"0": "", "1": "collapsed"}.get(row["collapsed"], "?")
    known = re.fullmatch(r"|collapsed|diverged@(\d{1,12})", mark)
    if not known or not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", row["device"]):
        raise ValueError(f"device {row['device'][:20]!r}, mark {mark[:20]!r}")
    run = int(known[1] or 0), seconds, row["device"]
    return (ladder, P), level, (accuracy, mark == "collapsed", floor, run)


# -------------------------------------------------------------------------------------------------
# the command line


def span(low, high):
    """An argparse type: 4, or 2..6, or 2,4,6; whole numbers from low to high, once each."""

    def read(text):
        numbers = set()
        for part in text.split(","):
            ends = [whole(low, high)(end) for end in part.split("..")]
            if len(ends) > 2 or not 0 <= ends[-1] - ends[0] < 1000:
                raise ArgumentTypeError(f"must be like 4 or 2..6 or 2,4,6, not {text[:20]!r}")
            numbers |= set(range(ends[0], ends[-1] + 1))
        return sorted(numbers)

    return read


def methods(text):
    """An argparse type: methods, separated by commas; all stands for the rows of DEFAULT."""
    try:
        names = [DEFAULT if name == "all" else [read_method(name).name] for name in text.split(",")]
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None
    return list(dict.fromkeys(name for several in names for name in several))


def cells_from_flags(parser, args):
    """({Cell: its seeds}, the cells that are left out unless asked for by name). What can't work
    ends the script with one line, before any work."""
    cells, left_out = {}, []
    for name in args.methods or DEFAULT:
        method = read_method(name)
        for m in args.m:
            for L in args.depth:
                cell = Cell(name, args.v, args.s, m, L, args.zipf)
                if args.methods in (None, list(DEFAULT)) and L > DEFAULT[name]:
                    left_out.append(cell)
                    continue
                try:
                    check_sizes(args.v, args.s, m, L)
                    if method.learner.check_size:
                        method.learner.check_size(args.v, args.s, m, L, 1, method.target, **method.given)
                except ValueError as error:
                    parser.error(f"argument --{error}")
                lowest, (highest, reason) = first_rung(cell), last_rung(cell)
                if highest < lowest:
                    parser.error(f"argument --methods: {name} cannot begin at m = {m}: its first rung is "
                                 f"{lowest} strings, and it is {reason} to {highest}")
                if args.max_samples < lowest:
                    parser.error(f"argument --max-samples: the ladder of {name} starts at {lowest}")
                cells[cell] = range(args.seeds or method.learner.seeds)
    if sum(map(len, cells.values())) > MAX_LADDERS:
        parser.error(f"argument --seeds: at most {MAX_LADDERS} ladders in a sweep")
    return cells, left_out


def draw(out):
    """The pictures, if they can be drawn; nothing that goes wrong there is a reason to fail."""
    try:
        import plot  # matplotlib is its business alone

        for picture in plot.draw(out):
            print(f"wrote {picture}")
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        print(f"no picture: {reason.splitlines()[0]}")


def main():
    most_jobs = 61 if os.name == "nt" else 1024  # Windows waits for no more processes at once
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--depth", type=span(2, 24), default=[2, 3, 4, 5, 6], help="L: 4 or 2..6 or 2,4,6 (default 2..6)")
    flag("--m", type=span(1, 2**24), default=[3], help="rules per symbol, in the same forms (default 3)")
    flag("--v", type=whole(2, 256), default=8, help="symbols per level (default 8)")
    flag("--s", type=whole(2, 62), default=2, help="children per symbol (default 2)")
    flag("--zipf", type=real(0, 10), default=0.0, help="rule j has probability ~ (j+1)^-zipf (default 0)")
    flag("--methods", type=methods, help=f"{', '.join(DEFAULT)} or all of them (the default, networks up to "
         "depth 4); or any LEARNER-TARGET:SETTING=VALUE; separated by commas")
    flag("--seeds", type=whole(1, 1000), help="seeds 0..N-1, a grammar each (default 5, networks 3)")
    flag("--max-samples", type=whole(1, 2**40), default=2**20, help="longest P of a ladder (default 2^20)")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default auto)")
    flag("--jobs", type=whole(1, most_jobs), help="processes (default: one per core, one on a GPU)")
    flag("--out", metavar="DIR", default="out", help="folder of results (default out)")
    args = parser.parse_args()
    if not args.out.strip():
        parser.error("argument --out: must name a folder")
    cells, unrun = cells_from_flags(parser, args)
    device = pick_device(parser, args.device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = args.jobs or (min(cores, most_jobs) if device == "cpu" else 1)
    out = Path(args.out)
    learners = {read_method(cell.method).key for cell in cells}
    try:
        folder = Folder(out, learners)
        folder.create()
    except Refused as error:
        parser.error(f"argument --out: {out} {error}; it is left as it was, choose another folder")
    except OSError as error:
        parser.error(f"argument --out: {out} cannot be written to ({error.strerror})")
    caps = dict.fromkeys(cells, args.max_samples)
    unrun = [cell for cell in unrun if all(ladder.cell != cell for ladder in folder.runs)]

    def report(key):
        try:
            measures = folder.write_tables(caps, unrun)
        except OSError:
            return  # held by another program, perhaps; the tables are made again at the end
        mine = {k: found for k, found in measures.items() if read_method(k[0].method).key == key}
        if mine and len(learners) > 1:
            tqdm.write(printed_tables(mine, []))

    try:
        sweep(cells, folder, args.max_samples, device, jobs, report)
        measures = folder.write_tables(caps, unrun)
    except KeyboardInterrupt as stop:
        failure, code = "stopped", 1 if stop.args else 130  # SIGTERM comes with its name
    except BrokenProcessPool:
        failure, code = "a worker was killed, perhaps for want of memory (try --jobs 1)", 1
    except (OSError, ImportError, MemoryError, Refused) as error:  # ImportError: no shared memory
        failure, code = f"{str(error) or type(error).__name__}", 1
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        failure, code = f"out of memory (try --jobs 1): {str(error).splitlines()[0][:80]}", 1
    else:
        print(printed_tables(measures, unrun), end="")
        devices = {run.device for rungs in folder.runs.values() for run in rungs.values()}
        if devices - {device}:
            print(f"runs of this folder were made on {', '.join(sorted(devices))}")
        return draw(out)
    count = sum(map(len, folder.runs.values()))
    safe = f"{count} finished runs are safe in {out}, the same command continues"
    safe = safe if folder.file.parent.exists() else f"{out} is gone, and its runs with it"
    print(f"\nsweep.py: {failure}; {safe}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    run_script(main)
