"""
The ground truth: the Random Hierarchy Model (RHM), a random context-free grammar on a fixed s-ary tree of depth L.

    python grammar.py --depth 3                                   the rules, and one derivation drawn as a tree
    python grammar.py --depth 4 --samples 1000 --save rhm.npz     strings, levels and rules for use elsewhere
    python grammar.py --depth 6 --bench                           tokens per second

Level 0 is the visible string of s^L symbols, level L is the root; every level has v symbols. A symbol of level l+1
has m production rules, each an s-tuple of level-l symbols, and no tuple has two parents. So v*m of the v^s tuples
are used, a fraction f = m / v^(s-1). Two tuples with the same parent are *synonyms*: to learn the grammar is to
group the v*m tuples of every level into v groups of synonyms.

From top to bottom: the grammar (rules, sampling, parsing), its exact population statistics, the score of recovered
levels against the truth, and the few lines of command line that all scripts share.

Measured by --bench on one core of a 2-core x86 virtual machine (numpy 2.4, v=8 s=2 m=4 L=6): 795 million tokens per
second, 12 times the plain sampler of the same run (66 million), a 36th of a memory copy.
"""

import argparse
import difflib
import errno
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

TABLE_BYTES = 2**20   # two levels share one look-up while its table stays in a core's cache
CHUNK_TOKENS = 2**18  # tokens sampled at a time: small enough for the cache, large enough to hide numpy's overhead
PROBE_STRINGS = 2048  # labelled fresh strings that a probe is trained on
TEST_STRINGS = 4096   # other fresh strings, that every score is taken on
RIDGE = 1e-3          # of the linear probe, on features of size about 1
MEMORY = 2**34        # bytes: what would need more is refused before it starts


# ----------------------------------------------------------------------------------------------------------------------
# the grammar


@dataclass(frozen=True)
class Grammar:
    """The rules of one RHM: rules[l] is a (v, m, s) uint8 tensor; rules[l][a, j] is the j-th tuple of level-l symbols
    that the level-(l+1) symbol a may turn into. Raises ValueError if v, s, m, L are out of range (see check_sizes)."""

    v: int
    s: int
    m: int
    L: int
    rules: list

    def __post_init__(self):
        check_sizes(self.v, self.s, self.m, self.L)

    @staticmethod
    def random(v, s, m, L, seed=0):
        """Draw v*m distinct s-tuples for every level, uniformly, and deal them out to the v parents, m to each.

        seed: int or tuple of ints. Never lists all v^s tuples when they are many."""
        check_sizes(v, s, m, L)
        rng = generator("rules", seed)
        rules = []
        for _ in range(L):
            codes = rng.choice(v**s, size=v * m, replace=False)  # in random order, so dealing in turn is a fair split
            tuples = codes[:, None] // v ** np.arange(s)[::-1] % v  # (v*m, s), the digits of the codes in base v
            rules.append(torch.from_numpy(tuples.astype(np.uint8).reshape(v, m, s)))
        return Grammar(v, s, m, L, rules)

    @property
    def f(self):
        """Fraction of the v^s tuples that have a parent."""
        return self.m / self.v ** (self.s - 1)

    def sample(self, P, seed=0, device="cpu"):
        """Sample P derivations: the root uniform, every symbol picks one of its m rules uniformly and independently.

        Returns levels, a list of L+1 uint8 tensors on device: levels[l] has shape (P, s^(L-l)); levels[0] are the
        strings, levels[L] the root labels. seed: int or tuple of ints; same seed, same strings on every device, and
        the first P of a larger sample are the smaller sample. Raises ValueError if P < 1."""
        if P < 1:
            raise ValueError(f"P = {P}: at least 1 sample is needed")
        rng = generator("strings", seed)
        levels = [np.empty((P, self.s ** (self.L - l)), np.uint8) for l in range(self.L + 1)]
        tables = self._tables()
        chunk = max(1, CHUNK_TOKENS // self.s**self.L)
        for start in range(0, P, chunk):
            rows = slice(start, min(start + chunk, P))
            n = rows.stop - rows.start
            h = rng.integers(self.v, size=(chunk, 1), dtype=np.uint8)  # whole chunks, so that samples are nested
            levels[self.L][rows] = h[:n]
            for lowest, expansions in tables:
                choices = len(expansions[0]) // self.v
                row = np.promote_types(np.min_scalar_type(self.v * choices), np.uint16)  # the narrowest fast integer
                pick = rng.integers(choices, size=h.shape, dtype=row) + h.astype(row) * row.type(choices)
                for level, table in zip(range(lowest + len(expansions) - 1, lowest - 1, -1), expansions):
                    h = table.take(pick, axis=0).reshape(chunk, -1)
                    levels[level][rows] = h[:n]
        return [torch.from_numpy(h).to(device) for h in levels]

    def _tables(self):
        """What the sampler looks up, from the root down: (lowest level written, tables), each table of v * choices
        rows, one for every way to expand a symbol through one level, or through two: two levels in one look-up
        need fewer random numbers and less traffic."""
        rules = [rule.numpy() for rule in self.rules]
        choices = self.m ** (1 + self.s)
        if self.v * choices * self.s**2 > TABLE_BYTES:
            return [(l, [rules[l].reshape(-1, self.s)]) for l in reversed(range(self.L))]
        tables = [(self.L - 1, [rules[-1].reshape(-1, self.s)])] if self.L % 2 else []
        j = np.indices((self.m,) * (1 + self.s)).reshape(1 + self.s, choices)  # one for the symbol and its children
        for l in reversed(range(0, self.L - 1, 2)):
            middle = rules[l + 1][:, j[0]].reshape(-1, self.s)  # (v * choices, s)
            leaves = rules[l][middle, np.tile(j[1:].T, (self.v, 1))]  # (v * choices, s, s)
            tables.append((l, [middle, leaves.reshape(-1, self.s**2)]))
        return tables

    def parse(self, x):
        """Invert sample: x, an integer tensor (P, s^L) of strings, gives levels as above, on x's device.

        Raises ValueError naming the first string, level and position that no rule of this grammar explains."""
        if x.ndim != 2 or x.shape[1] != self.s**self.L:
            raise ValueError(f"strings must have shape (P, s^L) = (P, {self.s**self.L}), not {tuple(x.shape)}")
        wrong = ((x < 0) | (x > self.v - 1)).nonzero()  # not >= v: 256 wraps to 0 in uint8
        if len(wrong):
            p, t = wrong[0].tolist()
            raise ValueError(f"string {p}, level 0, position {t}: {x[p, t]} is not a symbol (0 to v-1 = {self.v - 1})")
        levels = [x.to(torch.uint8)]
        for l in range(self.L):
            codes, order = tuple_codes(self.rules[l].to(x.device).reshape(-1, self.s), self.v).sort()
            code = tuple_codes(levels[l].reshape(len(x), -1, self.s), self.v)  # (P, s^(L-l-1))
            place = torch.searchsorted(codes, code).clamp(max=len(codes) - 1)
            wrong = (codes[place] != code).nonzero()
            if len(wrong):
                p, t = wrong[0].tolist()
                tuple_ = levels[l][p, t * self.s : (t + 1) * self.s].tolist()
                raise ValueError(f"string {p}, level {l}, position {t * self.s}: no rule gives the tuple {tuple_}")
            levels.append((order[place] // self.m).to(torch.uint8))
        return levels

    def swap(self, levels, l, kind, seed=0):
        """Replace, in every string, the level-(l-1) tuple under one random level-l node by another valid tuple, and
        resample all below it consistently. The two kinds of swap of the paper's synonym score (Figs. 5, 13):

        "synonym": one of the m-1 other rules of the same symbol, so that no latent from level l up changes;
        "generic": any of the v*m-1 other tuples, whose parent then stands at that node: levels above l are left as they
        are, though the string may have no derivation any more.
        levels: as sample returns them; l: 1..L. Returns (swapped, node): swapped like levels, new tensors; node, (P,)
        int64, the level-l node of every string. Same seed, same nodes for both kinds.
        Raises ValueError if l or kind is out of range, or m = 1 leaves no synonym."""
        if not 1 <= l <= self.L or kind not in ("synonym", "generic"):
            raise ValueError(f"l = {l}, kind = {kind!r}: allowed are 1 to L = {self.L}, and 'synonym' or 'generic'")
        if kind == "synonym" and self.m == 1:
            raise ValueError("m = 1: a symbol with a single rule has no synonyms")
        rng, device, s, m = generator("swap", seed), levels[0].device, self.s, self.m
        P, rows = len(levels[0]), torch.arange(len(levels[0]), device=levels[0].device)

        def draw(low, high, shape):
            return torch.from_numpy(rng.integers(low, high, size=shape)).to(device)

        node = draw(0, s ** (self.L - l), P)
        swapped = [h.clone() for h in levels]
        tuples = self.rules[l - 1].to(device).reshape(-1, s)  # (v m, s)
        old = (levels[l - 1].unflatten(1, (-1, s))[rows, node][:, None] == tuples).all(2).int().argmax(1)  # (P,)
        if kind == "synonym":
            new = old // m * m + (old + draw(1, m, P)) % m
        else:
            new = (old + draw(1, len(tuples), P)) % len(tuples)
        swapped[l][rows, node] = (new // m).to(torch.uint8)
        h = tuples[new]  # (P, s)
        for k in reversed(range(l)):
            swapped[k].view(P, -1, s ** (l - k))[rows, node] = h
            if k:
                h = self.rules[k - 1].to(device)[h.long(), draw(0, m, h.shape)].flatten(1)
        return swapped, node

    # ------------------------------------------------------------------------------------------------------------------
    # the population: what an infinite sample would show, from the rules alone

    def transition(self, l):
        """(s, v, v) float64: entry [k, a, b] is the probability that a level-(l+1) symbol a has b as its k-th child."""
        return F.one_hot(self.rules[l].long(), self.v).double().mean(1).permute(1, 0, 2)

    def descend(self, top, l, n):
        """(v, v) float64: P(node n of level l is b | its ancestor on level top is a), one transition per level."""
        W = torch.eye(self.v, dtype=torch.float64)
        for level in reversed(range(l, top)):
            W = W @ self.transition(level)[n // self.s ** (level - l) % self.s]
        return W

    def marginal(self, l, n):
        """(v,) float64: the distribution of node n of level l."""
        return self.descend(self.L, l, n).mean(0)  # the root is uniform

    def context(self, l, t, target_level, n):
        """The population limit of a context vector: P(node n of target_level = b | the t-th level-l tuple).

        Returns (v, v) float64, row a holding the distribution for the tuples whose parent is a: synonyms have the
        same context whatever the target, which is why clustering contexts finds the parents. The rows of a parent
        that never stands at t are 0. The targets of the paper: target_level = l, a latent cousin element;
        target_level = 0, a raw token under a cousin; target_level = L and n = 0, the root label.
        Raises ValueError if the target lies within the tuple itself."""
        c = max(l + 1, target_level)  # climb to the lowest common ancestor of the tuple's parent and the target
        while t // self.s ** (c - l - 1) != n // self.s ** (c - target_level):
            c += 1
        if c == l + 1 > target_level:
            raise ValueError(f"node {n} of level {target_level} lies within tuple {t} of level {l}")
        p = self.marginal(c, t // self.s ** (c - l - 1))
        if c == target_level:
            joint = (p[:, None] * self.descend(c, l + 1, t)).T  # (parent, ancestor)
        else:
            rules = self.rules[c - 1].long()  # (v, m, s): the one rule that the two branches share
            i = t // self.s ** (c - l - 2) % self.s
            j = n // self.s ** (c - 1 - target_level) % self.s
            pair = torch.zeros(self.v, self.v, dtype=torch.float64)  # P(i-th child, j-th child)
            weight = (p / self.m)[:, None].expand(self.v, self.m)
            pair.index_put_((rules[:, :, i], rules[:, :, j]), weight, accumulate=True)
            joint = self.descend(c - 1, l + 1, t).T @ pair @ self.descend(c - 1, target_level, n)
        return joint / joint.sum(1, keepdim=True).clamp(min=1e-300)

    def separation(self, l):
        """How far apart the parents of level-l tuples are, in the theorem's unit sqrt(1-f)/m (in 1/m if f = 1).

        The smallest distance between two parents' contexts: the latent elements of the cousins of the first tuple,
        root mean square over these elements. Near 0, two symbols share their contexts: an unlucky grammar, on which
        no number of samples separates them by this tuple position."""
        contexts = [self.context(l, 0, l, n) for n in range(self.s, self.s**2)]
        distance = torch.pdist(torch.cat(contexts, 1)).min() / len(contexts) ** 0.5
        return distance.item() * self.m / ((1 - self.f) or 1) ** 0.5


def check_sizes(v, s, m, L):
    """Raise ValueError, naming the size and its range, unless these four describe a grammar we can store."""
    if not 2 <= v <= 256:
        raise ValueError(f"v = {v}: allowed is 2 to 256, one byte per symbol")
    if s < 2 or v**s >= 2**63:
        raise ValueError(f"s = {s}: allowed is 2 or more, with v^s below 2^63")
    if not 1 <= m <= v ** (s - 1):
        raise ValueError(f"m = {m}: allowed is 1 to v^(s-1) = {v ** (s - 1)}, so that v*m tuples exist among the v^s")
    if L < 2 or s**L > 2**24:
        raise ValueError(f"depth = {L}: allowed is 2 or more, with at most 2^24 tokens (s^depth) in a string")


def generator(stream, seed):
    """A numpy generator for one named stream of a seed (int or tuple of ints), so that the rules and the strings drawn
    from one seed are independent."""
    seed = seed if isinstance(seed, tuple) else (seed,)
    return np.random.default_rng([int.from_bytes(stream.encode()[:4], "little"), len(seed), *seed])


def depth_of(x, s):
    """L of strings x, (P, s^L). Raises ValueError unless there is a string and L is a whole number, 2 or more."""
    L, length = 0, x.shape[1] if x.ndim == 2 else 0
    while length > 1 and length % s == 0:
        L, length = L + 1, length // s
    if length != 1 or L < 2 or len(x) == 0:
        raise ValueError(f"x must be (P, s^L) with P >= 1 and L >= 2, not {tuple(x.shape)} for s = {s}")
    return L


def cousins(s, device="cpu"):
    """(s, s-1) int64: row i holds the child positions of the cousins of a tuple at child position i."""
    return torch.tensor([[j for j in range(s) if j != i] for i in range(s)], device=device)


def tuple_codes(tuples, v):
    """(..., s) integer tensor of tuples -> (...) int64, the number that the tuple spells in base v."""
    code = tuples[..., 0].to(torch.int64, copy=True)
    for k in range(1, tuples.shape[-1]):
        code.mul_(v).add_(tuples[..., k].long())
    return code


# ----------------------------------------------------------------------------------------------------------------------
# the score


def accuracy(estimate, truth, v):
    """Fraction of labels that are right under the best one-to-one matching of estimated ids with true symbols.

    estimate: integer tensor of ids, any number of them; negative means unknown and counts as wrong. truth: integer
    tensor of the same shape, symbols 0..v-1. Raises ValueError if the shapes differ."""
    if estimate.shape != truth.shape:
        raise ValueError(f"shapes differ: {tuple(estimate.shape)} and {tuple(truth.shape)}")
    ids = max(v, int(estimate.max()) + 1)
    known = estimate >= 0
    cells = estimate[known].long() * v + truth[known]
    table = torch.bincount(cells, minlength=ids * v).reshape(ids, v).cpu().numpy()
    return float(best_matching(table).sum()) / max(1, truth.numel())


def best_matching(table):
    """The Hungarian algorithm, by shortest augmenting paths: table (rows, columns), a score for every pair, gives the
    scores of the one-to-one pairs whose sum is largest, min(rows, columns) of them."""
    table = np.asarray(table, dtype=float)
    if table.shape[0] > table.shape[1]:
        table = table.T
    rows, columns = table.shape
    cost = table.max() - table
    row_price, column_price = np.zeros(rows), np.zeros(columns)
    owner = np.full(columns, -1)  # the row that holds each column
    for new in range(rows):
        distance, via = np.full(columns, np.inf), np.full(columns, -1)  # shortest path to a column, and its last step
        done = np.zeros(columns, bool)
        row, column, length = new, -1, 0.0
        row_length = {new: 0.0}
        while row >= 0:  # grow the tree of cheapest alternating paths until it meets a free column
            step = length + cost[row] - row_price[row] - column_price
            closer = ~done & (step < distance)
            distance[closer], via[closer] = step[closer], column
            column = int(np.where(done, np.inf, distance).argmin())
            length, done[column], row = distance[column], True, owner[column]
            if row >= 0:
                row_length[row] = length
        for r, d in row_length.items():  # new prices keep every reduced cost at or above 0
            row_price[r] += length - d
        column_price[done] -= length - distance[done]
        while column >= 0:  # hand the columns along the path down, one row each
            owner[column] = owner[via[column]] if via[column] >= 0 else new
            column = via[column]
    held = owner >= 0
    return table[owner[held], held.nonzero()[0]]


# ----------------------------------------------------------------------------------------------------------------------
# probes: what can be read off features


def linear_probe(features, labels, v):
    """Least squares of the one-hot labels on the features, with a little ridge: nothing to tune, the same every time.

    features: (n, d) float; labels: (n,) integers below v. Returns a function from (..., d) to (..., v) scores."""
    mean, share = features.mean(0), F.one_hot(labels.long(), v).to(features)
    centred = features - mean
    gram = centred.T @ centred / len(features) + RIDGE * torch.eye(features.shape[1], device=features.device)
    weight = torch.linalg.solve(gram, centred.T @ (share - share.mean(0)) / len(features))  # (d, v)
    return lambda h: (h - mean) @ weight + share.mean(0)


class Exam:
    """The strings on which features are probed, for one grammar and seed: the same for every learner.

    test: levels of fresh strings, the same as every learner is scored on. probe[l], l = 1..L-1: levels of other fresh
    strings in which one rule of every level-l symbol never occurs (another has its place), so that v of the v*m
    level-(l-1) tuples are absent; unseen[l], (P, s^(L-l)) bool: the nodes of the test strings that have such a tuple.
    labelled: levels of fresh strings of the grammar itself, to probe the root. Raises ValueError if m = 1."""

    def __init__(self, grammar, seed, device="cpu", tests=TEST_STRINGS):
        if grammar.m == 1:
            raise ValueError("m = 1: allowed is 2 or more here, since a single rule has no synonym to measure")
        self.grammar = grammar
        self.test = grammar.sample(tests, (seed, 1), device)
        self.labelled = grammar.sample(PROBE_STRINGS, (seed, 3), device)
        self.probe, self.unseen = [None], [None]
        for l in range(1, grammar.L):
            rules = [rule.clone() for rule in grammar.rules]
            rules[l - 1][:, 0] = rules[l - 1][:, 1]
            without = Grammar(grammar.v, grammar.s, grammar.m, grammar.L, rules)
            self.probe.append(without.sample(PROBE_STRINGS, (seed, 4, l), device))
            absent = tuple_codes(grammar.rules[l - 1][:, 0], grammar.v).to(device)
            codes = tuple_codes(self.test[l - 1].unflatten(1, (-1, grammar.s)), grammar.v)
            self.unseen.append(torch.isin(codes, absent))


def examine(features, exam):
    """The unseen-synonym accuracy of every level l = 1..L-1, and what goes with it.

    features: a function from (P, s^L) strings to a list which holds at place l what may know level l: a list of one or
    more (P, s^(L-l), d) float tensors, such as the layers of a network. A linear probe reads h^(l) from the features of
    its node. It is trained on strings from which a part of the level-(l-1) tuples is absent and tested on the nodes
    that have these tuples: it can only be right if the features of synonyms are alike. Of several tensors the best one
    counts, so compare with untrained features read in the same way. On tuples that the probe has seen it is right as
    soon as level l-1 is readable, since it looks the parent up: no proof of anything, given for comparison.
    Returns (unseen, seen, collapsed), lists over the levels: two accuracies, and whether the probe's answers on the
    test strings are fewer than v different symbols."""
    v, test, results = exam.grammar.v, features(exam.test[0]), []
    for l in range(1, exam.grammar.L):
        absent, found = exam.unseen[l], []
        for train, fresh in zip(features(exam.probe[l][0])[l], test[l], strict=True):
            answer = linear_probe(train.flatten(0, 1), exam.probe[l][l].flatten(), v)(fresh).argmax(2)
            right = (answer == exam.test[l]).float()
            found.append((right[absent].mean().item(), right[~absent].mean().item(), len(answer.unique()) < v))
        results.append(max(found))
    return tuple(map(list, zip(*results)))


# ----------------------------------------------------------------------------------------------------------------------
# what the scripts share: one form of settings, scores, strings and command lines


class Setting(NamedTuple):
    """One row of a learner's table of settings. The table makes the command-line flags, checks what Python gives as
    strictly as what the command line gives, and is what a sweep stores in settings.json."""

    name: str
    kind: Callable    # reads the value from text, and says what is allowed: whole, real, choice or switch
    default: object
    paper: object     # what the paper uses; None where the paper has no such thing
    help: str


class Score(NamedTuple):
    """What one run of the sweep has learned, measured on fresh strings."""

    accuracy: list      # a float for every level 1..L-1, and one more if the learner reports the root
    collapsed: list     # of bool, as long: fewer than v symbols are in use
    floor: list = None  # of float, as long: the same measure before any training; None where it would be chance
    diverged: int = 0   # the step whose loss was no longer finite; 0 if all were


def read_settings(table, presets, given):
    """The values of all settings as attributes of one object: the defaults, changed by the preset, changed by given.

    table: the learner's SETTINGS; presets: {name: {setting: value}}, the first is the default; given: {name: value},
    which may name a preset. Raises ValueError, naming the setting and what is allowed."""
    given = dict(given)
    preset = given.pop("preset", next(iter(presets)))
    if preset not in presets:
        raise ValueError(f"preset: must be one of {', '.join(presets)}, not {preset!r}")
    kinds = {row.name: row.kind for row in table}
    values = {row.name: row.default for row in table} | presets[preset]
    for name, value in given.items():
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1) or kinds
            raise ValueError(f"{name}: no such setting; there is {', '.join(near)}")
        try:
            values[name] = kinds[name](str(value))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{name.replace('_', '-')}: {error}") from None
    return SimpleNamespace(**values)


def paper_preset(table):
    """{setting: the paper's value}, for the settings that the paper has."""
    return {row.name: row.paper for row in table if row.paper is not None}


def add_settings(parser, table, presets):
    """A flag for every row of a table of settings, and --preset. A flag that is not given is None."""
    if len(presets) > 1:
        parser.add_argument("--preset", choices=presets, help=f"of the settings below (default {next(iter(presets))})")
    for row in table:
        flag = "--" + row.name.replace("_", "-")
        paper = "" if row.paper is None else f"; the paper: {row.paper}"
        bare = {"nargs": "?", "const": True} if row.kind is switch else {}  # --flag alone switches it on
        parser.add_argument(flag, type=row.kind, help=f"{row.help} (default {row.default}{paper})", **bare)


def given_settings(table, args):
    """{name: value} of the flags of add_settings that were given."""
    names = ["preset", *(row.name for row in table)]
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def as_strings(x, v, s):
    """Anyone's strings -> ((P, s^L) uint8 tensor on x's device, L).

    x: an integer tensor, array or list of lists of symbols 0..v-1. Raises ValueError, naming the argument, unless
    there is a string, its length is a power of s from s^2 on, and every entry is a whole number that is a symbol."""
    if not 2 <= v <= 256:
        raise ValueError(f"v = {v}: allowed is 2 to 256, one byte per symbol")
    if s < 2 or v**s >= 2**63:
        raise ValueError(f"s = {s}: allowed is 2 or more, with v^s below 2^63")
    try:
        x = torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError("x: strings must all have one length, and hold whole numbers") from None
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"x: symbols must be whole numbers, not {x.dtype}")
    length = x.shape[1] if x.ndim == 2 and len(x) else 0
    L = 0
    while length > s**L:
        L += 1
    if L < 2 or length != s**L:
        raise ValueError(f"x: must be (P, s^L) with P >= 1 and L >= 2, not {tuple(x.shape)} for s = {s}")
    low, high = int(x.min()), int(x.max())
    if low < 0 or high >= v:
        raise ValueError(f"x: symbols must lie in 0..v-1 = {v - 1}, not {low}..{high}")
    return x.to(torch.uint8), L


def check_memory(name, need, what):
    """Raise ValueError, naming the argument, if work would need more than MEMORY bytes."""
    if need > MEMORY:
        raise ValueError(f"{name}: {what} would need {need / 2**30:.3g} GiB, at most {MEMORY / 2**30:.3g} are allowed")


def strings_bytes(P, s, L):
    """Bytes of P derivations as sample returns them: one for every node of every level."""
    return P * sum(s**l for l in range(L + 1))


def new_file(text):
    """An argparse type: the name of a file that can be written."""
    folder = os.path.dirname(text) or "."
    if not text or not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"must be a file in a folder that exists, not {text!r}")
    if os.path.exists(text) and not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"must be a file, and {text!r} is none")
    return text


def write_whole(path, write):
    """Write a file in one go: write(file), file open in bytes, fills one beside it, which then
    takes its place. So whatever happens, path holds the old bytes or all the new ones."""
    path = os.path.realpath(path)  # what a link points to is replaced, not the link
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "not a file", path)
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            write(file)
        os.replace(part, path)
    except BaseException:
        if os.path.exists(part):
            os.remove(part)
        raise


class Parser(argparse.ArgumentParser):
    """argparse, except that bad input gives one line that names the flag, and exit code 2."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def whole(low, high=2**31 - 1):
    """An argparse type: a whole number from low to high."""

    def read(text):
        digits = text.lstrip("+-")
        if not (digits.isascii() and digits.isdigit() and len(text) < 20 and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, not {text[:20]!r}")
        return int(text)

    return read


def real(low, high):
    """An argparse type: a number from low to high."""

    def read(text):
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"must be a number from {low:g} to {high:g}, not {text[:20]!r}")
        return number

    return read


def choice(*words):
    """An argparse type: one of some words."""

    def read(text):
        if text not in words:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(words)}, not {text[:20]!r}")
        return text

    return read


def switch(text):
    """An argparse type: true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {text[:20]!r}")
    return text.lower() == "true"


def add_grammar_flags(parser, m=3, samples=None):
    """The flags of one grammar and one sample, the same in every script."""
    parser.add_argument("--v", type=whole(2, 256), default=8, help="symbols per level (default 8)")
    parser.add_argument("--s", type=whole(2, 62), default=2, help="children per symbol (default 2)")
    parser.add_argument("--m", type=whole(1), default=m, help=f"rules per symbol, 1 to v^(s-1) (default {m})")
    parser.add_argument("--depth", type=whole(2, 24), default=3, help="L, levels above the tokens (default 3)")
    parser.add_argument("--seed", type=whole(0), default=0, help="seed of the rules and of the strings (default 0)")
    if samples:
        parser.add_argument("--samples", type=whole(1), default=samples, help=f"P, training strings ({samples})")
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default auto)")


def grammar_from_flags(parser, args):
    """The grammar that the flags ask for; an impossible one ends the script with one line and exit code 2."""
    try:
        return Grammar.random(args.v, args.s, args.m, args.depth, args.seed)
    except ValueError as error:
        parser.error(f"argument --{error}")


def pick_device(parser, name):
    """auto, cpu, cuda, cuda:N or mps -> the device's name; one that is not there ends the script with exit code 2.

    auto is cuda where there is one, otherwise cpu; mps, never tried by us, has to be asked for by name."""
    there = ["cpu"]
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    if name == "auto":
        return "cuda" if "cuda" in there else "cpu"
    if name not in there:
        parser.error(f"argument --device: {name!r} is not available here; choose from auto, {', '.join(there)}")
    return name


def run_script(main):
    """Call a script's main. What ends it from outside gives one line and no traceback: Ctrl-C or SIGTERM, a reader of
    the output that has gone (`| head`), a full disk, too little memory."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    program = os.path.basename(sys.argv[0])
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\n{program}: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        raise SystemExit(1) from None
    except OSError as error:
        print(f"{program}: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
        raise SystemExit(1) from None
    except (MemoryError, torch.OutOfMemoryError):
        print(f"{program}: out of memory; fewer or shorter strings need less", file=sys.stderr)
        raise SystemExit(1) from None


# ----------------------------------------------------------------------------------------------------------------------
# alone


def draw_rules(grammar):
    """The rules as text, one line per symbol."""
    lines = []
    for l in reversed(range(grammar.L)):
        for a in range(grammar.v):
            tuples = " | ".join(" ".join(map(str, rule)) for rule in grammar.rules[l][a].tolist())
            lines.append(f"level {l + 1} -> {l}   {a:3} -> {tuples}")
        lines.append("")
    return "\n".join(lines)


def draw_tree(levels, s):
    """The first derivation in levels as text, the root on top, each symbol centred over its children."""
    L = len(levels) - 1
    cell = len(str(max(int(h.max()) for h in levels))) + 1
    center = [[(n + 0.5) * s**l * cell for n in range(s ** (L - l))] for l in range(L + 1)]  # column of each node
    lines = []
    for l in reversed(range(L + 1)):
        row = [" "] * (cell * s**L + cell)
        for n, symbol in enumerate(levels[l][0].tolist()):
            for k, character in enumerate(str(symbol)):
                row[int(center[l][n]) + k] = character
        lines.append(f"level {l}  " + "".join(row).rstrip())
        if l:
            row = [" "] * (cell * s**L + cell)
            for n in range(s ** (L - l)):
                first, last = int(center[l - 1][n * s]), int(center[l - 1][n * s + s - 1])
                row[first : last + 1] = "-" * (last - first + 1)
                for k in range(s):
                    row[int(center[l - 1][n * s + k])] = "+"
            lines.append("         " + "".join(row).rstrip())
    return "\n".join(lines)


def sample_plainly(grammar, P, seed):
    """The sampler that one would write first, one level at a time in int64: the yardstick of --bench."""
    random = torch.Generator().manual_seed(seed)
    levels = [torch.randint(grammar.v, (P, 1), generator=random)]
    for l in reversed(range(grammar.L)):
        pick = torch.randint(grammar.m, levels[0].shape, generator=random)
        levels.insert(0, grammar.rules[l].long()[levels[0], pick].reshape(P, -1))
    return levels


def bench(grammar):
    """Tokens per second of the sampler, of the plain one and of a memory copy, on one core: the best of five."""
    torch.set_num_threads(1)
    P = max(1, 2**24 // grammar.s**grammar.L)
    source = np.ones(P * grammar.s**grammar.L, np.uint8)
    for name, work in (
        ("this sampler", lambda: grammar.sample(P, 0)),
        ("plain int64 sampler", lambda: sample_plainly(grammar, P, 0)),
        ("memory copy", lambda: source.copy()),
    ):
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        print(f"{name:20} {source.size / min(seconds) / 1e6:8.0f} million tokens per second")


def main():
    parser = Parser(__doc__)
    add_grammar_flags(parser)
    parser.add_argument("--samples", type=whole(1), default=1, help="P, derivations to draw (default 1)")
    parser.add_argument("--save", metavar="FILE.npz", help="write level0..levelL and rules0.. as arrays to this file")
    parser.add_argument("--bench", action="store_true", help="time the sampler instead")
    args = parser.parse_args()
    grammar = grammar_from_flags(parser, args)
    if args.bench:
        return bench(grammar)
    levels = grammar.sample(args.samples, args.seed)
    if args.save:
        arrays = {f"level{l}": h.numpy() for l, h in enumerate(levels)}
        arrays |= {f"rules{l}": rule.numpy() for l, rule in enumerate(grammar.rules)}
        try:
            with open(args.save, "wb") as file:
                np.savez_compressed(file, **arrays)
        except OSError as error:
            parser.error(f"argument --save: cannot write {args.save}: {error.strerror}")
        return print(f"wrote {args.samples} strings of {grammar.s**grammar.L} tokens, their levels and the rules")
    print(draw_rules(grammar))
    if grammar.s**grammar.L <= 81:
        print(draw_tree(levels, grammar.s))
    else:
        print("one string:", *levels[0][0].tolist())
    print(f"\nf = {grammar.f:.3g} of all tuples are used; how far apart the parents' contexts are, in sqrt(1-f)/m:")
    for l in range(grammar.L - 1):
        print(f"  parents on level {l + 1}: {grammar.separation(l):.2f}")


if __name__ == "__main__":
    run_script(main)
