"""
The table: how many samples P* each learner needs, against the depth of the grammar.
Learners x targets x depths.

    python sweep.py --depth 2..6                        the table of the README
    python sweep.py --depth 5 --methods data2vec        a cell that it leaves out
    python sweep.py --depth 4 --m 3..6 --methods cluster,cluster-joint --out out/m
    python sweep.py --methods data2vec-token:mask=0.3:steps=8000
    torchrun --nproc-per-node 4 -- sweep.py --depth 2..6    processes share one sweep

A method is a learner, after a dash its target (own latents if there is none), and after
colons any of the learner's settings. Every method has rows of its own.

For every method, size, depth and seed the sweep climbs a *ladder* of sample sizes P, each
twice the last. One seed is one fresh grammar and one fresh sample. A ladder ends
  - when the highest level of the tree below the root, L-1, is recovered: an accuracy of
    0.95 or more on fresh strings, on two rungs in a row;
  - at --max-samples ("beyond Pmax");
  - for a network, whose steps are fixed ("limited by steps"): before it would see each
    string fewer than 8 times; or when level L-1 is above 0.5 and three more rungs have not
    raised its best accuracy by 0.05.
P50 is the smallest P from which the accuracy is above 0.5 on two rungs in a row,
interpolated in log P; P90 is the same for 0.9. What higher rungs bring changes neither.

It writes to --out
  runs/*.csv               a row for every run and level, as soon as the run is finished: one
                           file for every command, which only ever grows
  runs.csv                 the rungs of all ladders, put together and in order
  samples_vs_depth.csv     a row for every method, size and depth
  samples_vs_depth.md      the same as a table to read; a shorter one is printed
  samples_vs_depth.png     drawn by plot.py, where matplotlib is installed
  settings.json            what the rows don't say: the settings of the sweep and the learners
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
from collections import Counter, namedtuple
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
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
PLATEAU = 3         # it ends, too, after so many rungs
RISE = 0.05         # that have not raised the best accuracy by so much
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
    first: Callable = lambda v, s, m: v * m  # P of the lowest rung, to be rounded down
    sees: Callable = None       # (v, settings) -> strings seen in all its steps, if they end
    seconds: Callable = lambda tokens, P: 1.0    # a guess at a run of s^L tokens on one core
    side: int = 1               # runs in one call, at most: networks train them side by side
    seeds: int = 5              # by default


def ours(file, **more):
    """The Learner of one of our own files, which all use the same names."""
    return Learner(file.recover, file.TARGETS, file.SETTINGS, file.PRESETS, file.check_size, **more)


LEARNERS = {
    "cluster": ours(
        cluster,
        first=lambda v, s, m: v * m / (2 * s),  # fewer than half of the top tuples can be seen
        seconds=lambda tokens, P: 0.03 + 1e-8 * P * tokens,
    ),
    "predictor": ours(
        predictor,
        first=lambda v, s, m: v * m**2,
        sees=lambda v, settings: settings.steps * (settings.batch or 8 * v),
        seconds=lambda tokens, P: 0.45 * tokens,
        side=9, seeds=3,  # three rungs of three seeds
    ),
    "data2vec": ours(
        data2vec,
        first=lambda v, s, m: v * m**3,
        sees=lambda v, settings: settings.steps * settings.batch,
        seconds=lambda tokens, P: 2.3 * tokens,
        side=9, seeds=3,  # three rungs of three seeds
    ),
}
# the rows of the first table, and the depth up to which they are run unless asked for
DEFAULT = {
    "cluster": 24, "cluster-token": 24, "cluster-root": 24, "cluster-joint": 24,
    "predictor": 4, "predictor-token": 3, "data2vec": 3, "data2vec-token": 3,
}
# how P* grows with every level in the theory, for each target
GROWTH = {
    "latent": "1", "joint": "1", "stacked": "1", "several": "1", "token": "m", "root": "m",
}


# a method's name, taken apart: in its one spelling, the learner's key in LEARNERS, the Learner,
# the target, {setting: value} as the name gives them, and an object with all settings
Method = namedtuple("Method", "name key learner target given settings")


@lru_cache(maxsize=None)
def read_method(text):
    """LEARNER-TARGET:SETTING=VALUE:... -> Method. Its name leaves out what changes nothing, and
    has the settings in the table's order. Raises ValueError if the text has no meaning."""
    words, *changes = text.split(":")
    key, _, target = words.partition("-")
    target = target or "latent"
    if key not in LEARNERS or target not in LEARNERS[key].targets:
        known = [f"{name}-{target}" for name in LEARNERS for target in LEARNERS[name].targets]
        near = difflib.get_close_matches(words, [*LEARNERS, *known], 3) or known
        raise ValueError(f"{words[:60]!r} is no learner and target; there is {', '.join(near)}")

    given = {}
    for change in changes:
        setting, equals, value = change.partition("=")
        if not equals or setting in given:
            raise ValueError(f"{text[:60]!r}: settings are written :name=value, each once")
        given[setting.replace("-", "_")] = value
    learner = LEARNERS[key]
    usual = next(iter(learner.presets))
    preset = given.get("preset", usual)
    try:
        settings = read_settings(learner.settings, learner.presets, given)
        base = read_settings(learner.settings, learner.presets, {"preset": preset})
    except ValueError as error:
        raise ValueError(f"{text[:60]!r}: {error}") from None

    name = key
    if target != "latent":
        name += f"-{target}"
    if preset != usual:
        name += f":preset={preset}"
    # a setting stands in the name only where it differs from the preset's
    for row in learner.settings:
        value = getattr(settings, row.name)
        if value != getattr(base, row.name):
            name += f":{row.name}={value}"
    return Method(name, key, learner, target, given, settings)


# ----------------------------------------------------------------------------------------
# the ladder: one climb, of one cell and one seed


# a row of samples_vs_depth.csv
Cell = namedtuple("Cell", "method v s m L zipf")
# one rung: the grammar.Score of what a learner made of P strings, seconds, the device's name
Run = namedtuple("Run", "score seconds device")


def learner_of(cell):
    return read_method(cell.method).key


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
    # memory grows with P: the first that does not fit ends the ladder
    P = first_rung(cell)
    while P <= last:
        try:
            learner.check_size(cell.v, cell.s, cell.m, cell.L, P, method.target, **method.given)
        except ValueError:
            return P // RUNG, "limited by memory"
        P *= RUNG
    return last, reason


def climb(cell, rungs, max_samples):
    """Where one ladder stands. rungs: {P: Run}.

    Returns (climbed, P, end): the rungs that count, in order; the P to try next, or None; and
    why the ladder ends there, "" if level L-1 is recovered."""
    is_network = read_method(cell.method).learner.sees is not None
    last, reason = last_rung(cell)
    climbed, accuracy = [], []
    P = first_rung(cell)
    while P in rungs:
        climbed.append(P)
        accuracy.append(rungs[P].score.accuracy[cell.L - 2])
        if len(climbed) > 1 and min(accuracy[-2:]) >= RECOVERED:
            return climbed, None, ""
        # a plateau: the last rungs are hardly better than those before
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

    P, accuracy: lists, P ascending. Returns (P*, sign): sign 0 if there is one; -1 and the lowest
    rung if P* is smaller; 1 and the last rung below the threshold if it is larger."""
    above = [a >= threshold for a in accuracy]
    # the lowest rungs are above it already
    if all(above[:2]):
        return float(P[0]), -1
    # one rung above it may be luck; two in a row count
    for i in range(1, len(P) - 1):
        if above[i] and above[i + 1]:
            share = (threshold - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
            return float(P[i - 1] * (P[i] / P[i - 1]) ** share), 0
    return float(max(p for p, a in zip(P, above) if not a)), 1


# ----------------------------------------------------------------------------------------
# the statistics: "stars" are [(P*, sign) of every seed], see crossing


def mean_star(stars):
    """The geometric mean of P* and its sign. A mean with seeds beyond their ladders is a bound
    itself: from below (1), from above (-1), or none (None) with seeds on both sides."""
    mean = float(np.exp(np.mean([np.log(P) for P, _ in stars])))
    signs = {sign for _, sign in stars}
    if {-1, 1} <= signs:
        return mean, None
    return mean, sum(signs)


def log_interval(groups, weights):
    """The 95 % bootstrap interval of sum_i weights[i] * (mean log P* of groups[i]), (low, high);
    None if a seed lies beyond its ladder, or no group has two. groups: lists of stars."""
    is_bound = any(sign for stars in groups for _, sign in stars)
    if is_bound or max(len(stars) for stars in groups) == 1:
        return None
    random = np.random.default_rng(0)
    means = []
    for stars in groups:
        values = np.log([P for P, _ in stars])
        means.append(random.choice(values, size=(BOOTSTRAP, len(values))).mean(1))
    low, high = np.percentile(weights @ np.stack(means), [2.5, 97.5])
    return float(low), float(high)


def interval(stars):
    """The 95 % interval of the mean P*, (low, high), or None; see log_interval."""
    found = log_interval([stars], np.ones(1))
    return found and (math.exp(found[0]), math.exp(found[1]))


def slope(points):
    """How log P* rises with x: least squares over the seeds' means.

    points: {x: stars}, two or more. Returns (slope, low, high, sign), see log_interval. A P* known
    from below at a large x makes it a lower bound (sign 1, no interval); with any other bound
    it is not known (None)."""
    x = np.array(sorted(points), float)
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    groups = [points[k] for k in sorted(points)]
    means = [mean_star(stars) for stars in groups]
    # bounds help only where the true P* would make the slope larger
    for (_, sign), weight in zip(means, weights):
        if sign is None or sign * weight < 0:
            return None
    value = float(weights @ np.log([mean for mean, _ in means]))
    low, high = log_interval(groups, weights) or (None, None)
    return value, low, high, int(any(sign for _, sign in means))


# ----------------------------------------------------------------------------------------
# the tables


TABLE = (
    "method,v,s,m,L,zipf,P50,P50_lo,P50_hi,P90,P50_over_vm3,"
    "root_P50,root_P50_lo,root_P50_hi,floor,root_floor,seeds,censored,status"
).split(",")
# why a P50 is a bound, the worst first, and its mark behind a printed P50
STATUS = {
    "diverged": "x", "not finished": "..", "limited by memory": "m", "limited by steps": "s",
    "beyond Pmax": "", "below Pmin": "",
}


class Measure(NamedTuple):
    """What the seeds of one cell say of level L-1, or of the root."""

    P50: list        # (P*, sign) of every seed, see crossing
    P90: list
    interval: tuple  # of the mean P50, None if there is none
    censored: int    # seeds with a P50 beyond their ladders
    floor: float     # mean accuracy before any training; None if not reported
    status: str      # of STATUS, "" if P50 is no bound


def measure(cell, ladders, level, cap):
    """The Measure of one level, None if no run reports it. ladders: [{P: Run} of every seed]."""
    P50, P90, floors, bounds = [], [], [], set()
    for rungs in ladders:
        climbed, _, end = climb(cell, rungs, cap)
        scores = [rungs[P].score for P in climbed]
        if not scores or min(len(score.accuracy) for score in scores) < level:
            continue  # not begun, or the learner does not report the root
        accuracy = [score.accuracy[level - 1] for score in scores]
        P50.append(crossing(climbed, accuracy, 0.5))
        P90.append(crossing(climbed, accuracy, 0.9))
        floors += [score.floor[level - 1] for score in scores if score.floor]
        # why P* is a bound
        sign = P50[-1][1]
        if sign > 0 or end == "not finished":
            bounds.add(end or "beyond Pmax")
        if sign < 0:
            bounds.add("below Pmin")
        if any(score.diverged for score in scores):
            bounds.add("diverged")
    if not P50:
        return None
    censored = sum(sign != 0 for _, sign in P50)
    floor = sum(floors) / len(floors) if floors else None
    status = next((status for status in STATUS if status in bounds), "")
    return Measure(P50, P90, interval(P50), censored, floor, status)


def summarise(runs, caps):
    """{(Cell, seed): {P: Run}} -> {(Cell, "tree" or "root"): Measure}, in the order of the rows.

    caps: {Cell: the longest P that this sweep allows}. A cell of another sweep counts as climbed
    to its end where its highest seed stands."""
    ladders, measures = {}, {}
    for cell, seed in sorted(runs, key=lambda ladder: row_order(*ladder)):
        ladders.setdefault(cell, []).append(runs[cell, seed])
    for cell, seeds in ladders.items():
        cap = caps.get(cell) or max(max(rungs) for rungs in seeds)
        for part, level in (("tree", cell.L - 1), ("root", cell.L)):
            found = measure(cell, seeds, level, cap)
            if found:
                measures[cell, part] = found
    return measures


def row_order(cell, seed=0):
    """Sizes, then learners, then methods in the order of DEFAULT, then all others."""
    learner = list(LEARNERS).index(learner_of(cell))
    names = [*DEFAULT, cell.method]
    return cell.v, cell.s, cell.m, cell.zipf, learner, names.index(cell.method), cell, seed


def star_text(stars):
    """[(P*, sign) of every seed] -> "412", "> 1024", "< 16" or "?"."""
    mean, sign = mean_star(stars)
    bounds = {0: "", 1: "> ", -1: "< "}
    return "?" if sign is None else f"{bounds[sign]}{mean:.0f}"


def short_text(found):
    """A cell of the printed table."""
    text = star_text(found.P50).replace(" ", "") + STATUS.get(found.status, "")
    return text + "!" if found.floor and found.floor > 0.5 else text  # says little


def long_text(found):
    """A cell of samples_vs_depth.md: with the interval over the seeds, and what limits it."""
    text = star_text(found.P50)
    if found.interval:
        text += " [{:.0f}, {:.0f}]".format(*found.interval)
    notes = []
    if found.censored:
        notes.append(f"{found.censored} of {len(found.P50)} seeds")
    if len(found.P50) == 1:
        notes.append("one seed")
    if STATUS.get(found.status):            # "> " or "< " says the others
        notes.append(found.status)
    if found.floor is not None:
        notes.append(f"untrained {found.floor:.2f}")
    return f"{text} ({', '.join(notes)})" if notes else text


def slope_text(points, scale):
    """The slope over {x: stars} with its interval, or as a bound; "" if there is none."""
    found = slope(points) if len(points) > 1 else None
    if found is None:
        return ""
    value, low, high, bound = found
    text = f"{scale(value):.2f}"
    if bound:
        return f">= {text}"
    return text if low is None else f"{text} [{scale(low):.2f}, {scale(high):.2f}]"


def table_row(cell, measures):
    """A row of samples_vs_depth.csv as {column: value}."""
    row = {"seeds": 0, "status": "not run"} | cell._asdict()
    for part, prefix in (("tree", ""), ("root", "root_")):
        found = measures.get((cell, part))
        if not found:
            continue
        row[prefix + "P50"] = star_text(found.P50)
        if found.interval:
            row[prefix + "P50_lo"] = f"{found.interval[0]:.0f}"
            row[prefix + "P50_hi"] = f"{found.interval[1]:.0f}"
        if found.floor is not None:
            row[prefix + "floor"] = f"{found.floor:.3f}"
        if part == "tree":
            row |= {"P90": star_text(found.P90), "seeds": len(found.P50)}
            row |= {"censored": found.censored, "status": found.status}
            mean, sign = mean_star(found.P50)
            if sign == 0:
                row["P50_over_vm3"] = f"{mean / (cell.v * cell.m**3):.4g}"
    return row


def depth_tables(measures, unrun, cell_text):
    """A table for every size, as lists of texts: a row for every method, then one for every root.

    Growth is counted from L = 3 on, as a tree of depth 2 has no cousins but under the root; its
    column ends with the depths that it covers."""
    sizes = {}  # (v, s, m, zipf) -> {(part, method): {L: Measure or None}}
    for cell, part in [*measures, *((cell, "tree") for cell in unrun)]:
        rows = sizes.setdefault((cell.v, cell.s, cell.m, cell.zipf), {})
        rows.setdefault((part, cell.method), {})[cell.L] = measures.get((cell, part))

    tables = []
    for (v, s, m, zipf), rows in sorted(sizes.items()):
        depths = sorted({L for row in rows.values() for L in row})
        title = f"v={v} s={s} m={m}" + (f" zipf={zipf:g}" if zipf else "")
        table = [[title, *(f"L={L}" for L in depths), "growth a level, L", "law"]]
        for part, method in sorted(rows, key=lambda row: row[0] == "root"):
            found = rows[part, method]
            texts = dict.fromkeys(depths, "")
            for L in found:
                texts[L] = cell_text(found[L]) if found[L] else "-"
            deep = {L: found[L].P50 for L in found if found[L] and L > 2}
            growth = slope_text(deep, math.exp)
            if growth:
                growth += f" {min(deep)}..{max(deep)}"
            name, law = f"{method}, root", ""
            if part == "tree":
                name = method
                # the theory speaks of the tree, and of the learners of the first table
                if read_method(method).key in DEFAULT:
                    law = GROWTH.get(read_method(method).target, "")
            table.append([name, *texts.values(), growth, law])
        tables.append(table)
    return tables


def printed_tables(measures, unrun):
    """The tables for the terminal, five depths side by side, and what their marks mean."""
    lines = []
    for table in depth_tables(measures, unrun, short_text):
        last = len(table[0]) - 2            # of the depths' columns
        # a wide table wraps, with its name, growth and law in every part
        for start in range(1, last, 5):
            stop = min(start + 5, last)
            part = [[row[0], *row[start:stop], *row[-2:]] for row in table]
            widths = [max(map(len, column)) for column in zip(*part)]
            for name, *cells in part:
                line = name.ljust(widths[0])
                for cell, width in zip(cells, widths[1:]):
                    line += "  " + cell.rjust(width)
                lines.append(line.rstrip())
    # only the marks that stand above are explained
    used = {found.status for found in measures.values()}
    lines += [f"{sign}  {status}" for status, sign in STATUS.items() if sign and status in used]
    if any(found.floor and found.floor > 0.5 for found in measures.values()):
        lines.append("!  untrained above 0.5")
    if unrun:
        last = unrun[-1]
        lines.append(f"-  not run: --methods {last.method} --depth {last.L} runs the last one")
    return "\n".join(lines)


def markdown_tables(measures, unrun):
    """samples_vs_depth.md: every cell with its interval, then the exponents of m."""
    tables = depth_tables(measures, unrun, long_text)
    over_m = {}  # a Cell without its m -> {m: stars}
    for (cell, part), found in measures.items():
        if part == "tree":
            over_m.setdefault(cell._replace(m=0), {})[cell.m] = found.P50
    exponents = [["method", "size", "m", "exponent of m in P*"]]
    for cell, stars in over_m.items():
        exponent = slope_text({math.log(m): stars[m] for m in stars}, float)
        if exponent:
            size = f"v={cell.v} s={cell.s} L={cell.L}"
            exponents.append([cell.method, size, f"{min(stars)}..{max(stars)}", exponent])
    if len(exponents) > 1:
        tables.append(exponents)

    text = "P*, the samples at which level L-1, or the root, is recovered (accuracy 0.5): "
    text += "geometric mean over the seeds [95 % interval]; -: not run\n"
    # each with a line between its header and its rows
    for header, *rows in tables:
        text += "\n"
        for line in (header, ["---"] * len(header), *rows):
            text += "| " + " | ".join(line) + " |\n"
    return text


# ----------------------------------------------------------------------------------------
# climbing all ladders


def run_batch(cell, batch, device):
    """Runs of one cell side by side. batch: [(P, seed)]. Returns {(P, seed): Run}."""
    method = read_method(cell.method)
    samples = [P for P, _ in batch]
    seeds = [seed for _, seed in batch]
    grammars = [Grammar.random(*cell[1:5], seed, cell.zipf) for seed in seeds]
    start = time.perf_counter()
    scores = method.learner.recover(
        grammars, samples, seeds, target=method.target, device=device, **method.given
    )
    # every run has its share of the batch's time
    seconds = (time.perf_counter() - start) / len(batch)
    return {rung: Run(score, seconds, device) for rung, score in zip(batch, scores, strict=True)}


def start_worker():
    """One thread of work per process. Ctrl-C ends it at once and silently, since finished runs
    are the parent's business; and so does the parent's death, or it would wait for ever."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class OneProcess(Executor):
    """Stands in for a pool of processes where one job is asked for; needs no shared memory."""

    def submit(self, work, *arguments):
        future = Future()
        future.set_result(work(*arguments))
        return future


def next_batch(cell, seeds, runs, cap, busy):
    """The rungs of a cell to run next, [(P, seed)]: what its ladders need and is not under way.

    Runs side by side are cheap, so a network climbs a few rungs ahead; a rung that turns out to
    lie beyond its ladder's end does not count."""
    side = read_method(cell.method).learner.side
    highest = min(cap, last_rung(cell)[0])
    batch = []
    for seed in seeds:
        rungs = runs.get((cell, seed), {})
        climbed, P, _ = climb(cell, rungs, cap)
        if P is None:
            continue
        ahead = 2 if climbed else 3
        # one recovered rung: the next is likely to be the last
        if side == 1 or climbed and rungs[climbed[-1]].score.accuracy[cell.L - 2] >= RECOVERED:
            ahead = 1
        for rung in [P * RUNG**i for i in range(ahead)]:
            if rung <= highest and rung not in rungs and (rung, seed) not in busy:
                batch.append((rung, seed))
    # batches of about one size, the lowest rungs first
    batches = max(1, math.ceil(len(batch) / side))
    return sorted(batch)[: math.ceil(len(batch) / batches)]


def guess(cell, P):
    """Seconds that a run may take on one core, before any is timed."""
    method = read_method(cell.method)
    seconds = method.learner.seconds(cell.s**cell.L, P)
    sees = method.learner.sees
    if sees:                                # a network with more steps takes longer
        usual = read_method(method.key).settings
        seconds *= sees(cell.v, method.settings) / sees(cell.v, usual)
    return seconds


def seconds_left(cell, seeds, runs, cap):
    """A guess at the core seconds until a cell's ladders are climbed. They are expected to end
    where the first of them has ended, and before that, at 8 times the P* of theory."""
    ladders = [climb(cell, runs.get((cell, seed), {}), cap) for seed in seeds]
    ends = [climbed[-1] for climbed, P, _ in ladders if P is None]
    grows = GROWTH.get(read_method(cell.method).target) == "m"
    theory = cell.v * cell.m ** (cell.L + 1 if grows else 3)
    end = min(max(ends, default=8 * theory), cap, last_rung(cell)[0])
    left = 0.0
    for _, P, _ in ladders:
        if P is None:
            continue
        left += guess(cell, P)
        while P * RUNG <= end:
            P *= RUNG
            left += guess(cell, P)
    return left


def units_of(cells, cap, rank, size):
    """What a process climbs, in order: [(Cell, seeds)]. Learners that don't train side by side
    have a unit for every seed. rank, size: of torchrun's processes."""
    units = []
    for cell, seeds in cells.items():
        side = read_method(cell.method).learner.side
        units += [(cell, tuple(seeds))] if side > 1 else [(cell, (seed,)) for seed in seeds]
    if size == 1:
        # one learner after the other, so that the quick ones can be read soon
        learners = list(LEARNERS)
        return sorted(units, key=lambda unit: (learners.index(learner_of(unit[0])), -unit[0].L))

    # Each rank finds all shares by itself, from what the cells cost before any run: there is no
    # connection to break or time out, and the folder is all that ranks have in common.
    costs = {unit: seconds_left(*unit, {}, cap) for unit in units}
    loads, mine = [0.0] * size, []
    # the dearest first, each to the rank that has least to do
    for unit in sorted(units, key=lambda unit: -costs[unit]):
        least = loads.index(min(loads))
        loads[least] += costs[unit]
        if least == rank:
            mine.append(unit)
    return mine


def sweep(cells, folder, cap, device, jobs, report, rank=0, size=1):
    """Climb all ladders, in batches, in `jobs` processes of one thread each, and put every
    finished run on disk at once. cells: {Cell: seeds}. report(key) is called when all ladders of
    a learner have come to their ends, and report(None) now and then. Of torchrun's `size`
    processes each climbs its share, and rank 0 returns when all are done."""
    units = units_of(cells, cap, rank, size)
    to_climb = Counter(learner_of(cell) for cell, _ in units)
    todo = iter(units)
    climbing = {}                           # unit in hand -> its rungs under way
    running = {}                            # future -> (unit, batch)
    left = {cell: seconds_left(cell, cells[cell], folder.runs, cap) for cell in cells}
    layout = "{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}"
    bar = tqdm(total=1, bar_format=layout, smoothing=0, disable=rank > 0)
    measured = {}                           # method -> [seconds, guessed seconds] of its runs
    began = time.time()
    reported, took = began, 0.0             # the last report, and the seconds that it took
    pool = OneProcess()
    if jobs > 1:
        pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker)
    try:
        while True:
            # keep every process at work, first with units in hand
            for unit in itertools.chain(list(climbing), todo):
                cell, seeds = unit
                busy = climbing.setdefault(unit, set())
                batch = next_batch(cell, seeds, folder.runs, cap, busy)
                while batch and len(running) < jobs:
                    running[pool.submit(run_batch, cell, batch, device)] = unit, batch
                    busy.update(batch)
                    bar.set_postfix_str(f"{cell.method[:30]} L={cell.L} P={batch[-1][0]}", False)
                    batch = next_batch(cell, seeds, folder.runs, cap, busy)
                if not batch and not busy:  # all its ladders are climbed
                    del climbing[unit]
                    to_climb[learner_of(cell)] -= 1
                    if size == 1 and to_climb[learner_of(cell)] == 0:
                        report(learner_of(cell))
                if len(running) >= jobs:
                    break
            if not running:
                # rank 0 waits for the others, who have runs in files of their own
                if size == 1 or rank > 0 or not any(left.values()):
                    break
                bar.set_postfix_str("waiting for other ranks", False)
                time.sleep(1)
            for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                unit, batch = running.pop(future)
                cell, seeds = unit
                found = future.result()
                folder.append(cell, found)
                climbing[unit].difference_update(batch)
                left[cell] = seconds_left(cell, cells[cell], folder.runs, cap)
                times = measured.setdefault(cell.method, [0.0, 0.0])
                for (P, seed), run in found.items():
                    times[0] += run.seconds
                    times[1] += guess(cell, P)
                    if run.score.diverged:
                        where = f"{cell.method} L={cell.L} m={cell.m} P={P} seed {seed}"
                        tqdm.write(f"{where}: loss not finite at step {run.score.diverged}; "
                                   "counts as not recovered")
            # what is left, as fast as runs of the same method were; the bar's unit is a second
            seconds = 0.0
            for cell in cells:
                spent, guessed = measured.get(cell.method, (1, 1))
                seconds += left[cell] * spent / guessed
            bar.n = time.time() - began
            bar.total = bar.n + seconds / (jobs * size)
            bar.refresh()
            # a report reads all files afresh: let that be 5 % of the time at most
            if time.time() > reported + max(30 if running else 1, 20 * took):
                start = time.time()
                report(None)
                reported = time.time()
                took = reported - start
                # it has read what others did, too
                left = {cell: seconds_left(cell, cells[cell], folder.runs, cap) for cell in cells}
    except BaseException:  # Ctrl-C above all: don't wait for runs that will be done again
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        bar.close()
        pool.shutdown(wait=False, cancel_futures=True)


# ----------------------------------------------------------------------------------------
# the folder: finished runs on disk


# the columns of runs.csv, and how each is read
COLUMNS = {
    "method": str, "v": whole(1), "s": whole(1), "m": whole(1), "L": whole(1),
    "zipf": real(0, 10), "P": whole(1, 2**40), "seed": whole(0), "level": whole(1),
    "accuracy": real(0, 1), "floor": lambda text: real(0, 1)(text) if text else None,
    "seconds": real(0, 1e9), "device": str, "mark": str,
}
# an older form, which is read but no longer written
OLD_COLUMNS = "method,v,s,m,L,P,seed,level,accuracy,seconds,device,collapsed".split(",")
OLD_NAMES = {
    "cluster-cousins": "cluster:positions=cousins", "cluster-element": "cluster:positions=element",
}
FILES = ("runs.csv", "runs", "samples_vs_depth.csv", "samples_vs_depth.md")


class Refused(Exception):
    """The folder holds something that this sweep must not mix with, or touch."""


class Folder:
    """The results of any number of sweeps. Each appends its runs to a file of its own under
    runs/, which nobody else writes; runs.csv and the tables are made from all these files."""

    def __init__(self, path, keys):
        """Check the folder against this program, and read its runs. keys: of the learners that
        the sweep will use. Changes nothing. Raises Refused and OSError."""
        self.path = path
        self.file = path / "runs" / f"{uuid.uuid4().hex[:12]}.csv"
        self.runs = {}  # {(Cell, seed): {P: Run}}
        self.settings = {"sweep": {"format": 2, "recovered": RECOVERED, "rung": RUNG}}
        for key, learner in LEARNERS.items():
            self.settings[key] = {row.name: row.default for row in learner.settings}
        stored = self.read_settings()
        self.read()
        # runs of other settings must not stand in one table
        used = {learner_of(cell) for cell, _ in self.runs} | set(keys)
        for key in ("sweep", *sorted(used)):
            for name, value in stored.get(key, {}).items():
                here = self.settings[key].get(name)
                if name != "format" and here != value:
                    raise Refused(f"was made with {key}'s {name} = {value}, which is now {here}")

    def read_settings(self):
        """What settings.json holds, {} if there is none. Raises Refused if it is not ours."""
        file = self.path / "settings.json"
        results = [name for name in FILES if (self.path / name).exists()]
        if not file.exists():               # looked for last, as create makes it first
            if results:
                raise Refused(f"has a {results[0]} but no settings.json that belongs to it")
            return {}
        try:
            stored = json.loads(file.read_bytes())
            tables = all(isinstance(x, dict) for x in stored.values())
            if tables and stored["sweep"]["format"] in (1, 2):
                return stored
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
        raise Refused("has a settings.json that is not a sweep's")

    def read(self):
        """Take in the runs of all files; one that stands twice is read once."""
        for file in [self.path / "runs.csv", *sorted((self.path / "runs").glob("*.csv"))]:
            if file.exists():
                for ladder, rungs in read_runs(file).items():
                    self.runs[ladder] = rungs | self.runs.get(ladder, {})

    def create(self):
        """Make the folder and its settings.json. Raises OSError."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.write("settings.json", json.dumps(self.settings, indent=1) + "\n")
        (self.path / "runs").mkdir(exist_ok=True)

    def write(self, name, text):
        write_whole(self.path / name, lambda file: file.write(text.encode()))

    def append(self, cell, found):
        """Put finished runs, {(P, seed): Run}, on disk and into self.runs."""
        rows = [] if self.file.exists() else [COLUMNS]
        for (P, seed), run in found.items():
            rows += reversed(rows_of(cell, P, seed, run))  # level 1 last: a run with it is whole
        with open(self.file, "ab") as file:
            file.write(csv_text(rows).encode())
        for (P, seed), run in found.items():
            self.runs.setdefault((cell, seed), {})[P] = run

    def write_tables(self, caps, unrun):
        """Make runs.csv and both tables from all files as they are now. Returns the Measures."""
        self.read()
        runs = [COLUMNS]
        for cell, seed in sorted(self.runs, key=lambda ladder: row_order(*ladder)):
            for P, run in sorted(self.runs[cell, seed].items()):
                runs += rows_of(cell, P, seed, run)
        measures = summarise(self.runs, caps)
        table = [TABLE]
        for cell in sorted({*(cell for cell, _ in measures), *unrun}, key=row_order):
            row = table_row(cell, measures)
            table.append([row.get(column, "") for column in TABLE])
        self.write("runs.csv", csv_text(runs))
        self.write("samples_vs_depth.csv", csv_text(table))
        self.write("samples_vs_depth.md", markdown_tables(measures, unrun))
        return measures


def csv_text(rows):
    """Rows as a file's text; nothing in ours holds a comma, a quote or a line's end."""
    return "".join(",".join(map(str, row)) + "\n" for row in rows)


def rows_of(cell, P, seed, run):
    """The rows of one run, from level 1 up."""
    rows, score = [], run.score
    for i, accuracy in enumerate(score.accuracy):
        mark = f"diverged@{score.diverged}" if score.diverged else "collapsed" * score.collapsed[i]
        floor = f"{score.floor[i]:.6f}" if score.floor else ""
        values = [f"{accuracy:.6f}", floor, f"{run.seconds:.3f}", run.device, mark]
        rows.append([*cell[:5], f"{cell.zipf:g}", P, seed, i + 1, *values])
    return rows


def read_runs(file):
    """A file of runs -> {(Cell, seed): {P: Run}}, without a last run that was cut short. Rows are
    checked as strictly as flags. Raises Refused, naming the line, and OSError."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise Refused(f"has a {file.name} whose line {line} is not text") from None
    if ",".join(COLUMNS).startswith(text):
        return {}                           # killed before its first row
    header, *lines = text.split("\n")
    columns = header.split(",")
    if columns not in (list(COLUMNS), OLD_COLUMNS):
        raise Refused(f"has a {file.name} with other columns than {','.join(COLUMNS)}")

    rows = []                               # (number of the line, (Cell, seed, P), row)
    for number, line in enumerate(lines[:-1], 2):  # the last is empty, or torn
        try:
            rows.append((number, *read_row(columns, line)))
        except ValueError as error:
            reason = f"line {number} cannot be used: {error}"
            raise Refused(f"has a {file.name} whose {reason}") from None

    runs = {}
    for (cell, seed, P), group in itertools.groupby(rows, key=lambda row: row[1]):
        group = list(group)
        levels = {row["level"]: row for _, _, row in group}
        # all below the root have to be there; not every learner reports the root
        if not levels.keys() >= set(range(1, cell.L)):
            if group[-1] is rows[-1]:
                break                       # cut short; it will be done again
            reason = f"run that ends in line {group[-1][0]} is not whole"
            raise Refused(f"has a {file.name} whose {reason}")
        group = [levels[level] for level in sorted(levels)]
        accuracy = [row["accuracy"] for row in group]
        collapsed = [row["mark"] == "collapsed" for row in group]
        floor = [row["floor"] for row in group]
        diverged = int(group[0]["mark"].partition("@")[2] or 0)
        score = Score(accuracy, collapsed, None if None in floor else floor, diverged)
        run = Run(score, group[0]["seconds"], group[0]["device"])
        runs.setdefault((cell, seed), {}).setdefault(P, run)
    return runs


def read_row(columns, line):
    """A line of a file of runs -> ((Cell, seed, P), {column: value}). Raises ValueError."""
    texts = line.split(",")
    if len(texts) != len(columns):
        raise ValueError(f"{len(texts)} values in {len(columns)} columns")
    row = dict(zip(columns, texts))
    if "collapsed" in row:                  # of the old form
        row["mark"] = {"0": "", "1": "collapsed"}.get(row["collapsed"], "?")
        row |= {"zipf": "0", "floor": "", "method": OLD_NAMES.get(row["method"], row["method"])}
    # read every value as a flag's type would
    for column, kind in COLUMNS.items():
        try:
            row[column] = kind(row[column])
        except ArgumentTypeError as error:
            raise ValueError(f"{column} {error}") from None

    cell = Cell(*(row[field] for field in Cell._fields))
    name = read_method(cell.method).name
    if cell.method != name:
        raise ValueError(f"the method is written {name!r}")
    check_sizes(cell.v, cell.s, cell.m, cell.L)
    P, lowest = row["P"], first_rung(cell)
    if P < lowest or P & (P - 1):
        raise ValueError(f"P = {P} is no rung: a power of 2 from {lowest} on")
    device, mark = row["device"], row["mark"]
    is_device = re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", device)
    is_mark = re.fullmatch(r"|collapsed|diverged@\d{1,12}", mark)
    if row["level"] > cell.L or not is_device or not is_mark:
        raise ValueError(f"level {row['level']}, device {device[:20]!r}, mark {mark[:20]!r}")
    return (cell, row["seed"], P), row


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


def methods(text):
    """An argparse type: methods, separated by commas; all stands for the rows of DEFAULT."""
    names = {}  # in order, once each
    for word in text.split(","):
        try:
            found = DEFAULT if word == "all" else [read_method(word).name]
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from None
        names |= dict.fromkeys(found)
    return list(names)


def cells_from_flags(args):
    """({Cell: its seeds}, the cells that are left out unless asked for by name). Raises
    ValueError, naming the flag, if one can't work."""
    cells, left_out = {}, []
    v, s = args.v, args.s
    for name, m, L in itertools.product(args.methods or DEFAULT, args.m, args.depth):
        cell = Cell(name, v, s, m, L, args.zipf)
        if args.methods in (None, list(DEFAULT)) and L > DEFAULT[name]:
            left_out.append(cell)
            continue
        method = read_method(name)
        # sizes first: their errors name the flag
        check_sizes(v, s, m, L)
        try:
            method.learner.check_size(v, s, m, L, 1, method.target, **method.given)
        except ValueError as error:         # it may name a setting, which is no flag of ours
            raise ValueError(f"methods: {name}: {error}") from None
        # a ladder without a rung would be missing from the table in silence
        lowest, (highest, reason) = first_rung(cell), last_rung(cell)
        if highest < lowest:
            raise ValueError(f"methods: {name} cannot begin at m = {m}: its first rung is "
                             f"{lowest} strings, and it is {reason} to {highest}")
        if args.max_samples < lowest:
            raise ValueError(f"max-samples: the ladder of {name} starts at {lowest}")
        cells[cell] = range(args.seeds or method.learner.seeds)
    if sum(map(len, cells.values())) > MAX_LADDERS:
        raise ValueError(f"seeds: at most {MAX_LADDERS} ladders in a sweep")
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


def what_ended(error):
    """What ended a sweep from outside, and the exit code. A fault of ours is raised again."""
    line = str(error) or type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return "stopped", 1 if error.args else 130  # SIGTERM comes with its name
    if isinstance(error, BrokenProcessPool):
        return "a worker was killed, perhaps for want of memory (try --jobs 1)", 1
    if isinstance(error, RuntimeError):     # of torch, for a lack of memory
        if "memory" not in line:
            raise error
        return f"out of memory (try --jobs 1): {line.splitlines()[0][:80]}", 1
    return line, 1


def main():
    most_jobs = 61 if os.name == "nt" else 1024  # Windows waits for no more processes at once
    rows = f"{', '.join(DEFAULT)} or all of them (the default, networks up to depth 3 or 4); "
    rows += "or any LEARNER-TARGET:SETTING=VALUE; separated by commas"
    # torchrun says which of its processes this is: rank 0 speaks for all
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        torch.set_num_threads(1)            # as in a pool
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--depth", type=span(2, 24), default=[2, 3, 4, 5, 6],
         help="L: 4 or 2..6 or 2,4,6 (default 2..6)")
    flag("--m", type=span(1, 2**24), default=[3], help="rules per symbol, as --depth (default 3)")
    flag("--v", type=whole(2, 256), default=8, help="symbols per level (default 8)")
    flag("--s", type=whole(2, 62), default=2, help="children per symbol (default 2)")
    flag("--zipf", type=real(0, 10), default=0.0, help="rule j has p ~ (j+1)^-zipf (default 0)")
    flag("--methods", type=methods, help=rows)
    flag("--seeds", type=whole(1, 1000), help="seeds 0..N-1 (default 5, networks 3)")
    flag("--max-samples", type=whole(1, 2**40), default=2**20, help="longest P (default 2^20)")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default auto)")
    flag("--jobs", type=whole(1, most_jobs),
         help="processes (default: one per core; one on a GPU or for torchrun)")
    flag("--out", metavar="DIR", default="out", help="folder of results (default out)")
    args = parser.parse_args()
    try:
        if not args.out.strip():
            raise ValueError("out: must name a folder")
        cells, unrun = cells_from_flags(args)
    except ValueError as error:
        parser.error(f"argument --{error}")
    device = pick_device(parser, args.device)
    if device == "cuda" and size > 1:       # one GPU a rank, by turns if there are fewer
        local = int(os.environ.get("LOCAL_RANK", rank))
        device = f"cuda:{local % torch.cuda.device_count()}"
    jobs = args.jobs or 1
    if not args.jobs and device == "cpu" and size == 1:
        has_affinity = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
        jobs = min(cores, most_jobs)
    out = Path(args.out)
    keys = {learner_of(cell) for cell in cells}
    try:
        folder = Folder(out, keys)
        folder.create()
    except Refused as error:
        parser.error(f"argument --out: {out} {error}; it is left as it was, choose another folder")
    except OSError as error:
        parser.error(f"argument --out: {out} cannot be used ({error})")
    caps = dict.fromkeys(cells, args.max_samples)
    # an earlier command may have run what this one leaves out
    there = {cell for cell, _ in folder.runs}
    unrun = [cell for cell in unrun if cell not in there]

    def report(key):
        """Write the tables, and print the rows of a learner that has finished."""
        if rank > 0:
            return
        try:
            measures = folder.write_tables(caps, unrun)
        except OSError:
            return  # held by another program, perhaps; the tables are made again at the end
        rows = {row: measures[row] for row in measures if learner_of(row[0]) == key}
        if rows and len(keys) > 1:
            tqdm.write(printed_tables(rows, []))

    try:
        sweep(cells, folder, args.max_samples, device, jobs, report, rank, size)
        if rank > 0:
            return
        measures = folder.write_tables(caps, unrun)
    except (KeyboardInterrupt, OSError, MemoryError, RuntimeError, Refused) as error:
        failure, code = what_ended(error)
        safe = f"{out} is gone, and its runs with it"
        if folder.file.parent.is_dir():
            count = sum(map(len, folder.runs.values()))
            safe = f"{count} finished runs are safe in {out}, the same command continues"
        # all ranks are stopped at once
        if rank == 0 or failure != "stopped":
            print(f"\nsweep.py: {failure}; {safe}", file=sys.stderr)
        raise SystemExit(code) from None
    print(printed_tables(measures, unrun))
    # timings of several devices are mixed: say so
    devices = {run.device for rungs in folder.runs.values() for run in rungs.values()}
    if devices - {device}:
        print(f"runs of this folder were made on {', '.join(sorted(devices))}")
    draw(out)


if __name__ == "__main__":
    run_script(main)
