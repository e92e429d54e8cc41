"""
The ground truth: the Random Hierarchy Model (RHM), a random context-free grammar on a
fixed s-ary tree of depth L.

    python grammar.py --depth 3                          the rules, and one derivation
    python grammar.py --samples 1000 --save rhm.npz      strings, levels and rules
    python grammar.py --depth 6 --contrast --seeds 20    why own latents win, in numbers
    python grammar.py --depth 6 --bench                  tokens per second

Level 0 is the visible string of s^L symbols, level L is the root; every level has v
symbols. A symbol of level l+1 has m production rules, each an s-tuple of level-l symbols,
and no tuple has two parents. So v*m of the v^s tuples are used, a fraction
f = m / v^(s-1). Two tuples with the same parent are *synonyms*: to learn the grammar is
to group the v*m tuples of every level into v groups of synonyms.
"""

import argparse
import difflib
import errno
import hashlib
import math
import numbers
import os
import signal
import sys
import time
import timeit
from functools import partial
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

CHUNK_TOKENS = 2**18  # tokens sampled at a time: they stay in the cache
TEST_STRINGS = 4096   # fresh strings, that every score is taken on
RIDGE = 1e-3          # of the linear probe, on features of size about 1
MEMORY = 2**34        # bytes: what would need more is refused before it starts
SAVE_EVERY = 60       # seconds after which a training's state is written again


# ----------------------------------------------------------------------------------------
# the grammar


class Grammar:
    """The rules of one RHM: L integer arrays, kept as uint8 tensors. rules[l] has shape
    (v, m, s), and rules[l][a, j] is the j-th tuple of level-l symbols that the level-(l+1)
    symbol a may turn into, taken with a probability p[j] ~ (j+1)^-zipf.
    Raises ValueError, naming the argument, unless all fits and no level has a tuple twice."""

    def __init__(self, v, s, m, L, rules, zipf=0.0):
        check_sizes(v, s, m, L)
        self.v, self.s, self.m, self.L = int(v), int(s), int(m), int(L)
        if not isinstance(zipf, numbers.Real) or not 0 <= zipf <= 10:
            raise ValueError(f"zipf: must be a number from 0 to 10, not {zipf!r:.20}")
        self.zipf = float(zipf)
        weight = torch.arange(1, self.m + 1).double() ** -self.zipf
        self.p = weight / weight.sum()                      # (m,) float64

        try:
            rules = list(rules)
        except TypeError:
            rules = []
        if len(rules) != L:
            raise ValueError(f"rules: there must be {L} levels of them, not {len(rules)}")
        self.rules = []
        for l, rule in enumerate(rules):
            rule = whole_numbers(f"rules: level {l}", rule, v)
            if rule.shape != (v, m, s):
                raise ValueError(f"rules: level {l} must be (v, m, s) = {(v, m, s)}")
            if len(tuple_codes(rule, v).unique()) < v * m:
                raise ValueError(f"rules: level {l} has a tuple twice, so it is ambiguous")
            # a copy: nobody else can change it
            self.rules.append(rule.to("cpu", torch.uint8, copy=True))

    def __repr__(self):
        sizes = f"v={self.v}, s={self.s}, m={self.m}, L={self.L}"
        return f"Grammar({sizes}, zipf={self.zipf:g})"

    @staticmethod
    def random(v, s, m, L, seed=0, zipf=0.0):
        """Draw v*m distinct s-tuples for every level, uniformly, and deal them out to the
        v parents, m to each. seed: a whole number or a tuple of them."""
        check_sizes(v, s, m, L)
        rng = generator("rules", seed)
        place = v ** np.arange(s)[::-1]                     # of the digits in base v
        rules = []
        for _ in range(L):
            # in random order, so that dealing in turn is a fair split
            codes = rng.choice(v**s, size=v * m, replace=False)
            tuples = codes[:, None] // place % v            # (v m, s)
            rules.append(tuples.reshape(v, m, s))
        return Grammar(v, s, m, L, rules, zipf)

    @staticmethod
    def load(file):
        """The grammar in a file: what `--save` wrote, or an .npz of (v, m, s) arrays, the
        rules that make the tokens first, or an .npy of shape (L, v, m, s).

        Raises ValueError, naming load, unless that is a grammar; OSError if unreadable."""
        try:
            with open(file, "rb") as opened:
                found = np.load(opened, allow_pickle=False)
                # an .npz has its arrays by name, an .npy is one array of all levels
                arrays = dict(found) if hasattr(found, "files") else dict(enumerate(found))
            zipf = arrays.pop("zipf", np.zeros(())).item()
            # named rules0, rules1, ... or all arrays in their order
            named = [name for name in arrays if str(name).startswith("rules")]
            rules = [arrays[f"rules{l}"] for l in range(len(named))] or [*arrays.values()]
            v, m, s = rules[0].shape
            return Grammar(v, s, m, len(rules), rules, zipf)
        except OSError:
            raise
        except Exception as error:  # whatever foreign bytes lead to
            reason = str(error).partition("\n")[0]
            raise ValueError(f"load: {file} holds no grammar: {reason}") from None

    @property
    def f(self):
        """Fraction of the v^s tuples that have a parent."""
        return self.m / self.v ** (self.s - 1)

    def sample(self, P, seed=0, device="cpu", without=None):
        """Sample P derivations: the root is uniform, and every symbol picks one of its
        rules, independently.

        without: a pair (l, j): level-l symbols use rule j+1 (mod m) in the place of rule j.
        Returns levels, L+1 uint8 tensors on device, levels[l] of shape (P, s^(L-l)):
        levels[0] are the strings, levels[L] the root labels. Same seed, same strings on
        every device, and the first P of a larger sample are the smaller one.
        Raises ValueError if P < 1 or too large, or without names no rule, or the only, or
        if this machine has no such device."""
        check_whole("samples", P, 1)
        check_device(device)
        v, s, m, L = self.v, self.s, self.m, self.L
        check_memory("samples", strings_bytes(P, s, L), "the strings")
        rules = [rule.flatten(0, 1).numpy().copy() for rule in self.rules]  # (v m, s) each
        if without is not None:
            l, j = without
            check_whole("without: l", l, 1, L)
            check_whole("without: j", j, 0, m - 1)
            if m == 1:
                raise ValueError("m: must be 2 or more to do without a rule")
            rules[l - 1][j::m] = rules[l - 1][(j + 1) % m :: m]
        rng = generator("strings", seed)
        pick = self._picker(rng)
        byte = np.min_scalar_type(v * m - 1).type           # the narrowest for v m rules

        # whole chunks are drawn, so that a smaller sample is the start of a larger one
        chunk = max(1, CHUNK_TOKENS // s**L)
        rows = math.ceil(P / chunk) * chunk
        levels = [np.empty((rows, s ** (L - l)), np.uint8) for l in range(L + 1)]
        for start in range(0, rows, chunk):
            part = [level[start : start + chunk] for level in levels]
            # from the root down, every symbol picks one of its rules
            part[L][:] = rng.integers(v, size=(chunk, 1), dtype=np.uint8)
            for l in reversed(range(L)):
                rule = part[l + 1] * byte(m) + pick(part[l + 1].shape)  # 0..v m - 1
                children = part[l].reshape(*rule.shape, s)              # (chunk, n, s)
                # clip: take writes straight into children if it need not check
                rules[l].take(rule, axis=0, out=children, mode="clip")
        return [torch.from_numpy(level[:P]).to(device) for level in levels]

    def _picker(self, rng):
        """A function from a shape to the rules 0..m-1 that so many symbols pick."""
        m, k = self.m, 1
        byte = np.min_scalar_type(self.v * m - 1)
        # unequal chances: see where a number from 0 to 1 falls among their sums
        if self.zipf:
            steps = self.p.cumsum(0)[:-1].numpy()
            return lambda shape: np.searchsorted(steps, rng.random(shape), "right").astype(byte)
        # random numbers are the slow part: one below m^k holds k picks, its digits
        while m ** (2 * k) <= 2**14 and k < 8:
            k *= 2
        digits = np.stack(np.unravel_index(np.arange(m**k), (m,) * k), 1).astype(byte)

        def pick(shape):
            size, narrow = math.prod(shape), np.min_scalar_type(m**k - 1)
            drawn = rng.integers(m**k, size=math.ceil(size / k), dtype=narrow)
            # more than are needed, if k does not divide their number
            return digits.take(drawn, axis=0).reshape(-1)[:size].reshape(shape)

        return pick

    def parse(self, x):
        """Invert sample: integer strings (P, s^L) give levels as above, on x's device.

        Raises ValueError naming the first string, level and position that no rule of this
        grammar explains."""
        levels = [self._tokens(x).to(torch.uint8, copy=True)]
        for l in range(self.L):
            # find each tuple among the sorted rules; its place tells the parent
            rules = self.rules[l].to(levels[l].device).flatten(0, 1)    # (v m, s)
            codes, order = tuple_codes(rules, self.v).sort()
            tuples = levels[l].unflatten(1, (-1, self.s))               # (P, n, s)
            code = tuple_codes(tuples, self.v)
            place = torch.searchsorted(codes, code).clamp(max=len(codes) - 1)
            wrong = (codes[place] != code).nonzero()        # rows of (string, tuple)
            if len(wrong):
                p, t = wrong[0].tolist()
                where = f"string {p}, level {l}, position {t * self.s}"
                raise ValueError(f"x: {where}: no rule gives {tuples[p, t].tolist()}")
            # rules stand in the order of their parents, m to each
            levels.append((order[place] // self.m).to(torch.uint8))
        return levels

    def _tokens(self, x):
        """Integer strings (P, s^L) as a tensor, or a ValueError that names x."""
        x = whole_numbers("x", x)
        if x.ndim != 2 or x.shape[1] != self.s**self.L:
            raise ValueError(f"x: the shape must be (P, s^L) = (P, {self.s**self.L})")
        # compared with v - 1, since v = 256 would be 0 in uint8
        wrong = ((x < 0) | (x > self.v - 1)).nonzero()
        if len(wrong):
            p, t = wrong[0].tolist()
            where = f"string {p}, level 0, position {t}"
            raise ValueError(f"x: {where}: {x[p, t]} is not a symbol, 0 to {self.v - 1}")
        return x

    def swap(self, levels, l, kind, seed=0):
        """Replace, in every string, the tuple under one random level-l node by another valid
        one, and resample all below it, as the paper's figures 5 and 13 do.

        kind "synonym": another rule of the same symbol; no latent from level l up changes.
        "generic": any other tuple, whose parent then stands at the node; levels above l stay,
        also where no rule explains them. levels: as sample returns them; l: 1..L. Returns
        new levels and the nodes, (P,) int64, which depend on the seed and not on kind.
        Raises ValueError if l or kind is out of range, or m = 1 leaves no synonym."""
        check_whole("l", l, 1, self.L)
        if kind not in ("synonym", "generic"):
            raise ValueError(f"kind: must be synonym or generic, not {kind!r:.20}")
        if kind == "synonym" and self.m == 1:
            raise ValueError("m: must be 2 or more, a single rule has no synonyms")
        rng, s, m, P = generator("swap", seed), self.s, self.m, len(levels[0])
        device, each = levels[0].device, np.arange(P)
        rules = [rule.numpy() for rule in self.rules]
        swapped = [level.cpu().numpy().copy() for level in levels]

        # the tuple that stands there now, as a number below v m
        node = rng.integers(s ** (self.L - l), size=P)      # (P,)
        tuples = rules[l - 1].reshape(-1, s)                # (v m, s)
        there = swapped[l - 1].reshape(P, -1, s)[each, node]
        old = (there[:, None] == tuples).all(2).argmax(1)   # (P,)

        # another one in its place: of the m with the same parent, or of all v m
        p = self.p.numpy()
        if kind == "synonym":
            new = old // m * m + draw_other(rng, p, old % m)
        else:
            new = draw_other(rng, np.tile(p / self.v, self.v), old)
        swapped[l][each, node] = new // m                   # its parent

        # and all below it, drawn afresh
        pick = self._picker(rng)
        h = tuples[new]                                     # (P, s^(l-k)) on level k
        for k in reversed(range(l)):
            swapped[k].reshape(P, -1, s ** (l - k))[each, node] = h
            if k > 0:
                h = rules[k - 1][h, pick(h.shape)].reshape(P, -1)
        swapped = [torch.from_numpy(level).to(device) for level in swapped]
        return swapped, torch.from_numpy(node).to(device)

    # ------------------------------------------------------------------------------------
    # the population: what an infinite sample would show, from the rules alone

    def transition(self, l):
        """(s, v, v) float64: entry [k, a, b] is the probability that a level-(l+1) symbol
        a has b as its k-th child."""
        child = self.rules[l].long().permute(2, 0, 1)       # (s, v, m)
        W = torch.zeros(self.s, self.v, self.v, dtype=torch.float64)
        return W.scatter_add_(2, child, self.p.expand_as(child))

    def descend(self, top, l, n):
        """(v, v) float64: P(node n of level l is b | its ancestor on level top is a)."""
        W = torch.eye(self.v, dtype=torch.float64)
        for level in reversed(range(l, top)):
            k = n // self.s ** (level - l) % self.s         # the child on the way to n
            W = W @ self.transition(level)[k]
        return W

    def marginal(self, l, n):
        """(v,) float64: the distribution of node n of level l."""
        return self.descend(self.L, l, n).mean(0)           # the root is uniform

    def siblings(self, c, i, j, p):
        """(v, v) float64: P(i-th child is a, j-th child is b) under one level-c symbol
        whose distribution is p, (v,)."""
        rules = self.rules[c - 1].long()                    # (v, m, s)
        weight = p[:, None] * self.p                        # (v, m)
        pair = torch.zeros(self.v, self.v, dtype=torch.float64)
        return pair.index_put_((rules[:, :, i], rules[:, :, j]), weight, accumulate=True)

    def context(self, l, t, target_level, n):
        """The population limit of a context vector: (v, v) float64, entry [a, b] = P(node n
        of target_level is b | the t-th tuple of level l has the parent a); 0 if a never
        stands there. Synonyms have the same context whatever the target, which is why
        clustering contexts finds the parents. The paper's targets: target_level = l, an
        element of a cousin; 0, a token under a cousin; L with n = 0, the root label.
        Raises ValueError if the target lies within the tuple itself."""
        s = self.s
        # climb to the lowest common ancestor, on level c, and see what it is
        c = max(l + 1, target_level)
        while t // s ** (c - l - 1) != n // s ** (c - target_level):
            c += 1
        if c == l + 1 > target_level:
            raise ValueError(f"n: node {n} lies within tuple {t} of level {l}")
        p = self.marginal(c, t // s ** (c - l - 1))
        if c == target_level:  # the target is an ancestor
            joint = (p[:, None] * self.descend(c, l + 1, t)).T
        else:                  # the two branches share one rule
            i = t // s ** (c - l - 2) % s
            j = n // s ** (c - 1 - target_level) % s
            up, down = self.descend(c - 1, l + 1, t), self.descend(c - 1, target_level, n)
            joint = up.T @ self.siblings(c, i, j, p) @ down
        # the clamp keeps the rows of impossible parents at 0
        return joint / joint.sum(1, keepdim=True).clamp(min=1e-300)

    def separation(self, l):
        """The smallest distance between two parents' contexts, in the theorem's unit
        sqrt(1-f)/m (1/m if f = 1): of the first level-l tuple, the targets the elements of
        its cousins, root mean square over these. Near 0, two symbols share their contexts,
        and no number of samples separates them by this tuple position."""
        contexts = [self.context(l, 0, l, n) for n in range(self.s, self.s**2)]
        distance = torch.pdist(torch.cat(contexts, 1)).min() / len(contexts) ** 0.5
        # f = 1 would leave a unit of 0
        return distance.item() * self.m / ((1 - self.f) or 1) ** 0.5

    def contrast(self):
        """How far apart parents' contexts are: {target: list}, entry l the root mean square
        distance for level-l tuples, over all pairs of parents, all tuple positions and all
        targets that cluster.py counts. For joint the target is the cousin's symbol, which
        its tuples are relabelled to. Noise of sqrt(v m / P), from P strings, is as large at
        P = v m / contrast^2. Raises ValueError if root needs too much memory."""
        v, s, L = self.v, self.s, self.L
        check_memory("depth", 24 * s ** (L - 1) * v * v, "contexts of the root")
        W = [self.transition(l) for l in range(L)]          # (s, v, v) each
        I = torch.eye(v, dtype=torch.float64)
        found = {"latent": [], "token": [], "root": [], "joint": []}

        # from the root down: what a symbol is, over all nodes of a level; and for target
        # root node by node, since nodes are not equally far from it
        mean, below = {L: I.mean(0)}, I[None] / v           # (n, v, v), root and symbol
        for l in reversed(range(1, L)):
            mean[l] = mean[l + 1] @ W[l].mean(0)
            below = (below[:, None] @ W[l]).flatten(0, 1)
            found["root"].insert(0, spread(below.mT, I))

        # from the leaves up: contexts are q D, q the cousin's symbol and D the descent to
        # one target; distances over many D only need the mean of D D^T
        tokens = I
        for l in range(L - 1):
            latent = (W[l] @ W[l].mT).mean(0)
            tokens = (W[l] @ tokens @ W[l].mT).mean(0)
            places = [(i, j) for i in range(s) for j in range(s) if i != j]
            pairs = [self.siblings(l + 2, i, j, mean[l + 2]) for i, j in places]
            for target, inner in ("latent", latent), ("token", tokens), ("joint", I):
                found[target].append(spread(torch.stack(pairs), inner))
        return found

    # ------------------------------------------------------------------------------------
    # exact inference

    @torch.enable_grad()
    def posterior(self, x, visible):
        """Sum-product up and down the tree: P(symbol | the visible tokens), exactly.

        x: (P, s^L) integer strings; visible: bool, (P, s^L) or (s^L,). What x holds at
        hidden places is not read. Returns a list over the levels l = 0..L of
        (P, s^(L-l), v) float64 tensors on the CPU, the distribution of every node: the
        Bayes limit of masked-token prediction on level 0, of classification on level L.
        Raises ValueError, naming the first string, if no derivation has these tokens."""
        v, s, m, L = self.v, self.s, self.m, self.L
        x, visible = whole_numbers("x", x).cpu(), torch.as_tensor(visible).cpu()
        if visible.dtype != torch.bool or visible.shape not in (x.shape, x.shape[1:]):
            raise ValueError(f"visible: must be bool, (P, {s**L}) or ({s**L},)")
        x = self._tokens(x * visible)
        need = 16 * len(x) * s ** (L - 1) * v * m * (2 * s + 1)
        check_memory("x", need, "exact inference")

        # up: how likely the tokens beneath a node are, given its symbol, up to a factor
        token = F.one_hot(x.long(), v).double()
        token = torch.where(visible.expand(x.shape)[:, :, None], token, 1.0)
        levels, log_evidence = [token.requires_grad_()], 0.0    # (P, s^L, v)
        for l in range(L):
            children = levels[l].unflatten(1, (-1, s))      # (P, n, s, v)
            rule = 1.0                                      # (P, n, v m)
            for k in range(s):
                symbol = self.rules[l][:, :, k].flatten().long()
                rule = rule * children[:, :, k].index_select(2, symbol)
            likely = rule.unflatten(2, (v, m)) @ self.p     # (P, n, v)
            total = likely.sum(2, keepdim=True)             # taken out, against underflow
            if (total == 0).any():
                p = int((total == 0).nonzero()[0, 0])
                raise ValueError(f"x: string {p} has no derivation with its visible tokens")
            levels.append(likely / total)
            log_evidence = log_evidence + total.log().sum()
        # the root is uniform
        log_evidence = log_evidence + levels[L].mean(2).log().sum()

        # down: the evidence is linear in what each node says of its symbols, so a symbol's
        # share of it, its posterior, is likely * d log(evidence) / d likely
        slopes = torch.autograd.grad(log_evidence, levels)
        return [(likely * slope).detach() for likely, slope in zip(levels, slopes)]


def spread(joint, inner):
    """Root mean square distance of contexts: joint (n, v, v) holds P(parent, symbol) at n
    places, inner (v, v) the scalar product of two rows. A parent that is never seen at a
    place gets the mean context there, as in cluster.py."""
    share = joint.sum(2, keepdim=True)                      # (n, v, 1)
    mean = joint.sum(1, keepdim=True) / share.sum(1, keepdim=True)
    q = torch.where(share > 0, joint / share.clamp(min=1e-300), mean)
    # over all pairs, |q_a - q_b|^2 is on average 2 v/(v-1) times |q_a - their mean|^2
    away = q - q.mean(1, keepdim=True)
    squares = (away @ inner * away).sum(2).mean().clamp(min=0)
    return math.sqrt(2 * q.shape[1] / (q.shape[1] - 1) * squares.item())


def draw_other(rng, weight, old):
    """Draw one index for every entry of old, in proportion to weight, but never that one."""
    ends = weight.cumsum()
    # a place on the line of all weights, which jumps over the piece of old
    u = rng.random(len(old)) * (ends[-1] - weight[old])
    u = np.where(u < (ends - weight)[old], u, np.maximum(u + weight[old], ends[old]))
    # rounding may lead past the last piece that is allowed
    last = len(weight) - 1
    last = np.where(old == last, last - 1, last)
    return np.minimum(np.searchsorted(ends, u, side="right"), last)


def generator(stream, seed):
    """A numpy generator for one named stream of a seed (a whole number or a tuple of them),
    so that the rules and the strings drawn from one seed are independent."""
    seed = seed if isinstance(seed, tuple) else (seed,)
    for part in seed:
        check_whole("seed", part, 0)
    # its length too, or (1,) and (1, 0) would be one seed
    name = int.from_bytes(stream.encode()[:4], "little")
    return np.random.default_rng([name, len(seed), *map(int, seed)])


def cousins(s, device="cpu"):
    """(s, s-1) int64: row i holds the child positions of the cousins of a tuple at i."""
    return torch.tensor([[j for j in range(s) if j != i] for i in range(s)], device=device)


def tuple_codes(tuples, v):
    """(..., s) integer tuples -> (...) int64, the number that each spells in base v."""
    code = tuples[..., 0].to(torch.int64, copy=True)
    for k in range(1, tuples.shape[-1]):
        code.mul_(v).add_(tuples[..., k].long())            # in place: cluster's hot loop
    return code


# ----------------------------------------------------------------------------------------
# the score


def accuracy(estimate, truth, v):
    """Fraction of labels that are right under the best one-to-one matching of estimated ids
    with true symbols; 0 if there are none.

    estimate: integer tensor of ids, any number of them; negative means unknown and counts
    as wrong. truth: integer tensor of the same shape, symbols 0..v-1. Raises ValueError
    if the shapes differ, or these are no such numbers."""
    estimate, truth = whole_numbers("estimate", estimate), whole_numbers("truth", truth, v)
    if estimate.shape != truth.shape:
        raise ValueError(f"estimate: must have the shape of truth, {tuple(truth.shape)}")
    if truth.numel() == 0:
        return 0.0
    ids = max(v, int(estimate.max()) + 1)
    check_memory("estimate", 8 * ids * v, f"ids up to {ids - 1}")
    # how often each id stands for each symbol
    known = estimate >= 0
    cells = estimate[known].long() * v + truth[known]
    table = torch.bincount(cells, minlength=ids * v).reshape(ids, v)
    return float(best_matching(table.cpu().numpy()).sum()) / truth.numel()


def best_matching(table):
    """The one-to-one pairs of rows and columns whose scores have the largest sum.

    table: (rows, columns) finite scores. Returns the scores of min(rows, columns) pairs.
    Rows join one by one, each by the path of the largest gain: it takes a column, whose
    row takes another column, and so on to a free one. That keeps the sum the largest.
    Raises ValueError unless all scores are finite."""
    table = np.asarray(table, dtype=float)
    if table.ndim != 2 or not np.isfinite(table).all():
        raise ValueError("table: must be (rows, columns) of finite numbers")
    if table.shape[0] > table.shape[1]:
        table = table.T
    tiny = 1e-12 * np.abs(table).max(initial=0)             # gains below are rounding
    owner = np.full(table.shape[1], -1)                     # the row of each column
    for new, scores in enumerate(table):
        held = (owner >= 0).nonzero()[0]
        gain = scores.copy()                                # of the best path to each column
        before = np.full(len(owner), -1)                    # the column before it on the path
        while len(held):
            # lengthen the paths: the row of a held column gives it up for another one
            left = gain[held] - table[owner[held], held]
            longer = left[:, None] + table[owner[held]]     # (held, columns)
            best = longer.argmax(0)
            better = longer.max(0) > gain + tiny
            if not better.any():
                break
            gain[better], before[better] = longer.max(0)[better], held[best[better]]
        # along the best path to a free column, each takes the row of the one before it
        column = np.where(owner < 0, gain, -np.inf).argmax()
        while before[column] >= 0:
            owner[column] = owner[before[column]]
            column = before[column]
        owner[column] = new
    held = (owner >= 0).nonzero()[0]
    return table[owner[held], held]


def linear_probe(features, labels, v):
    """Least squares of the one-hot labels on the features, with a little ridge: nothing to
    tune, the same every time.

    features: (n, d) float; labels: (n,) integers below v. Returns a function from (..., d)
    features to (..., v) scores. Solved in float64 on the CPU, whatever the device."""
    share = F.one_hot(labels.long(), v).to(features)        # (n, v)
    mean, centre = features.mean(0), share.mean(0)
    centred, n, d = features - mean, *features.shape
    if n < d:  # the same weights, from the products of rows: fewer equations
        gram, moment = centred @ centred.T / n, (share - centre) / n
    else:
        gram, moment = centred.T @ centred / n, centred.T @ (share - centre) / n
    # without the ridge, features that are copies of each other have no solution
    ridge = RIDGE * torch.eye(len(gram), dtype=torch.float64)
    weight = torch.linalg.solve(gram.cpu().double() + ridge, moment.cpu().double())
    weight = weight.to(features)
    weight = centred.T @ weight if n < d else weight                # (d, v)
    return lambda h: (h - mean) @ weight + centre


# ----------------------------------------------------------------------------------------
# what the scripts share: checks, settings, scores and command lines


def check_whole(name, value, low, high=2**31 - 1):
    """Raise ValueError, naming the argument, unless value is a whole number in range."""
    # numpy's whole numbers are Integral too, and unfortunately True is
    integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not integral or not low <= value <= high:
        raise ValueError(f"{name}: must be a whole number from {low} to {high}")


def whole_numbers(name, x, v=None):
    """A tensor of the whole numbers in x (tensor, array, lists), or a ValueError. With v,
    they have to be symbols 0..v-1."""
    try:
        x = torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{name}: must hold whole numbers, in rows of one length") from None
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"{name}: must hold whole numbers, not {x.dtype}")
    if v is not None and x.numel() > 0:
        low, high = int(x.min()), int(x.max())
        if low < 0 or high >= v:
            raise ValueError(f"{name}: must hold symbols 0..{v - 1}, not {low}..{high}")
    return x


def check_sizes(v, s, m=1, L=2):
    """Raise ValueError, naming the size, unless these four describe a grammar that can be
    stored: a symbol in a byte, a tuple in 63 bits, a string of at most 2^24 tokens."""
    check_whole("v", v, 2, 256)
    check_whole("s", s, 2, 62)
    if v**s >= 2**63:                       # a tuple's code is an int64
        raise ValueError(f"s: must be 2 or more with v^s below 2^63, not {s} for v = {v}")
    check_whole("m", m, 1, v ** (s - 1))
    check_whole("depth", L, 2, int(24 / math.log2(s) + 1e-9))
    # drawing them without repetition may list all v^s, if these are not many more
    drawn = 8 * min(v**s, 50 * v * m)
    check_memory("m", drawn + 16 * v * m * s * (L + 3), "the rules")


def as_strings(x, v, s):
    """Anyone's strings -> ((P, s^L) uint8 tensor on x's device, L).

    x: an integer tensor, array or list of lists of symbols 0..v-1; never written to.
    Raises ValueError, naming the argument, unless there is a string, its length is a power
    of s from s^2 on, and every entry is a symbol."""
    check_sizes(v, s)
    x = whole_numbers("x", x, v)
    length = x.shape[1] if x.ndim == 2 and len(x) else 0    # 0: refused below
    L = round(math.log(max(length, 1), s))
    if L < 2 or length != s**L:
        raise ValueError(f"x: must be (P, {s}^L), P >= 1, L >= 2, not {tuple(x.shape)}")
    return x.to(torch.uint8), L


def strings_bytes(P, s, L):
    """Bytes of P derivations as sample returns them: one for every node of every level."""
    return P * sum(s**l for l in range(L + 1))


def check_memory(name, need, what):
    """Raise ValueError, naming the argument, if work would need more than MEMORY bytes."""
    if need > MEMORY:
        GiB = 2**30
        raise ValueError(f"{name}: {what} would need {need / GiB:.3g} GiB of {MEMORY / GiB:.3g}")


class Setting(NamedTuple):
    """One row of a learner's table of settings. The table makes the command-line flags, and
    checks what Python gives as strictly as what the command line gives."""

    name: str
    kind: Callable    # reads the value from text: whole, real, choice or switch
    default: object
    paper: object     # what the paper uses; None where it has no such thing
    help: str


class Score(NamedTuple):
    """What one run of the sweep has learned, measured on fresh strings."""

    accuracy: list      # a float for every level 1..L-1, one more if the root is reported
    collapsed: list     # of bool, as long: fewer than v symbols are in use
    floor: list = None  # of float, as long: the same before training; None for chance
    diverged: int = 0   # the step whose loss was no longer finite; 0 if all were


def read_settings(table, presets, given):
    """All settings as attributes of one object: the defaults, changed by the preset,
    changed by given, {name: value}, which may name a preset.

    table: the learner's SETTINGS; presets: {name: {setting: value}}, the first is the
    default. Raises ValueError, naming the setting and what is allowed."""
    kinds = {"preset": choice(*presets)} | {row.name: row.kind for row in table}
    read = {"preset": next(iter(presets))}
    for name, value in given.items():
        if name not in kinds:
            raise ValueError(f"{name}: no such setting; there is {', '.join(kinds)}")
        try:
            # as text, so that Python and the command line are read alike
            read[name] = kinds[name](str(value))
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise ValueError(f"{name.replace('_', '-')}: {error}") from None
    defaults = {row.name: row.default for row in table}
    return SimpleNamespace(**defaults | presets[read.pop("preset")] | read)


def paper_preset(table):
    """{setting: the paper's value}, for the settings that the paper has."""
    return {row.name: row.paper for row in table if row.paper is not None}


def add_settings(parser, table, presets):
    """A flag for every row of a table, and --preset. A flag that is not given is None."""
    text = f"values of the settings below (default {next(iter(presets))})"
    parser.add_argument("--preset", choices=presets, help=text)
    for row in table:
        flag = "--" + row.name.replace("_", "-")
        paper = "" if row.paper is None else f"; the paper: {row.paper}"
        text = f"{row.help} (default {row.default}{paper})"
        # a switch without a value is true
        bare = {"nargs": "?", "const": True} if row.kind is switch else {}
        parser.add_argument(flag, type=row.kind, help=text, **bare)


def given_settings(table, args):
    """{name: value} of the flags of add_settings that were given."""
    names = ["preset", *(row.name for row in table)]
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


class Parser(argparse.ArgumentParser):
    """argparse, but bad input gives one line that names the flag, and exit code 2."""

    def __init__(self, doc):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=form, allow_abbrev=False)

    def error(self, message):
        if message.startswith("unrecognized arguments: "):
            near = difflib.get_close_matches(message.split()[2], self._option_string_actions, 1)
            if near:
                message += f"; there is {near[0]}"
        self.exit(2, f"{self.prog}: {message}\n")


def must_be(allowed, text):
    """The error of an argparse type, which shows no more than the start of a long text."""
    return argparse.ArgumentTypeError(f"must be {allowed}, not {text[:20]!r}")


def real(low, high, number=float, name="a number"):
    """An argparse type: a number from low to high."""

    def read(text):
        try:
            value = number(text)
        except ValueError:
            value = math.nan                                # no range holds it
        if not low <= value <= high:
            raise must_be(f"{name} from {low} to {high}", text)
        return value

    return read


def whole(low, high=2**31 - 1):
    """An argparse type: a whole number from low to high."""
    return real(low, high, int, "a whole number")


def choice(*words):
    """An argparse type: one of some words."""

    def read(text):
        if text not in words:
            raise must_be(f"one of {', '.join(words)}", text)
        return text

    return read


def switch(text):
    """An argparse type: true or false."""
    if text.lower() not in ("true", "false"):
        raise must_be("true or false", text)
    return text.lower() == "true"


def new_file(text):
    """An argparse type: the name of a file that can be written."""
    if not text or os.path.isdir(text) or not os.path.isdir(os.path.dirname(text) or "."):
        raise must_be("a file in a folder that exists", text)
    return text


def write_whole(path, write):
    """Write a file in one go: write(file), file open in bytes, fills one beside it, which
    then takes its place. Whatever happens, path holds all the old bytes or all the new."""
    path = os.path.realpath(path)  # what a link points to is replaced, not the link
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "not a file", path)
    part = f"{path}.{os.getpid()}.part"     # of this process alone
    try:
        with open(part, "wb") as file:
            write(file)
        os.replace(part, path)              # at once, or not at all
    finally:
        if os.path.exists(part):
            os.remove(part)


def check_apart(args, *names):
    """Raise ValueError, naming the flag, if two of these flags name one file."""
    flags = {}
    for name in names:
        path = getattr(args, name)
        if path and os.path.realpath(path) in flags:
            other = flags[os.path.realpath(path)]
            raise ValueError(f"{name}: must be another file than that of --{other}")
        if path:
            flags[os.path.realpath(path)] = name


def open_trace(path, columns, step):
    """Open a CSV file for the rows of a run from this step on; nowhere if path is None.

    From step 1 on the file is new. A run that goes on keeps the rows of the steps before."""
    if path is None:
        return open(os.devnull, "w")
    lines = [",".join(columns)]
    if step > 1 and os.path.exists(path):
        with open(path, errors="replace") as file:
            # what has no end was cut by a kill
            header, *rows = file.read().rpartition("\n")[0].split("\n")
        steps = [row.partition(",")[0] for row in rows]
        if header == lines[0]:
            lines += [row for row, at in zip(rows, steps) if at.isdecimal() and int(at) < step]
        text = "\n".join(lines) + "\n"
        write_whole(path, lambda file: file.write(text.encode()))
        return open(path, "a")
    file = open(path, "w")
    print(*lines, file=file, flush=True)
    return file


class Checkpoint:
    """A file with the state of a training, from which the same training goes on if it was
    killed, to the same bytes on a CPU. Without a file, nothing happens.

    parts: {name: what has a state_dict}; generators: torch.Generators, that the draws of the
    next step start from whenever save is called; xs: the strings or grammars of all runs;
    about: {name: number or text}, all else that the result depends on.
    Raises ValueError, naming resume, if the file is something else, or of another training."""

    def __init__(self, file, parts, generators, xs, about):
        self.file, self.parts, self.generators = file, parts, generators
        self.written, self.cost = time.monotonic(), 0.0
        self.about = dict(about)
        if file is not None:
            self.about["strings"] = digest(xs)

    def load(self):
        """Set all parts and generators to the state in the file. Returns (step, rest) as save
        was given them, or (0, {}) if there is no file yet."""
        if self.file is None or not os.path.exists(self.file):
            return 0, {}
        try:
            saved = torch.load(self.file, map_location="cpu", weights_only=True)
            old = saved["about"]
            changed = [name for name in self.about if old.get(name) != self.about[name]]
            if not changed:
                for name, part in self.parts.items():
                    part.load_state_dict(saved["states"][name])
                for generator, state in zip(self.generators, saved["generators"]):
                    generator.set_state(state)
                return saved["step"], saved["rest"]
        except OSError:
            raise
        except Exception as error:  # whatever foreign bytes lead to
            reason = str(error).partition("\n")[0]
            raise ValueError(f"resume: {self.file} holds no training: {reason}") from None
        name = changed[0]
        both = f"{old.get(name)!r:.20} there, {self.about[name]!r:.20} here"
        raise ValueError(f"resume: {self.file} is of another run: {name} is {both}")

    def save(self, step, rest, last=False):
        """Write the state after a step, if it is time to, or the last one. rest: {} or what
        else the loop must know."""
        began = time.monotonic()
        # what takes longer than a second to write is written more rarely
        due = began - self.written >= SAVE_EVERY * max(1, self.cost)
        if self.file is None or not (due or last):
            return
        saved = {"about": self.about, "step": step, "rest": rest}
        saved["states"] = {name: part.state_dict() for name, part in self.parts.items()}
        saved["generators"] = [generator.get_state() for generator in self.generators]
        write_whole(self.file, partial(torch.save, saved))
        self.written = time.monotonic()
        self.cost = self.written - began


def digest(xs):
    """One word for a list of strings (P, T) and grammars: other ones have another word."""
    sha = hashlib.sha256()
    for x in xs:
        for part in [*x.rules, x.p] if isinstance(x, Grammar) else [x]:
            sha.update(str(part.shape).encode())
            sha.update(part.cpu().contiguous().numpy())
    return sha.hexdigest()


def add_grammar_flags(parser, m=3, samples=None):
    """The flags of one grammar and one sample, the same in every script."""
    add = parser.add_argument
    add("--v", type=whole(2, 256), default=8, help="symbols per level (default 8)")
    add("--s", type=whole(2, 62), default=2, help="children per symbol (default 2)")
    add("--m", type=whole(1), default=m, help=f"rules per symbol, to v^(s-1) (default {m})")
    add("--depth", type=whole(2, 24), default=3, help="L, levels above the tokens (default 3)")
    add("--zipf", type=real(0, 10), default=0.0,
        help="rule j has a probability ~ (j+1)^-zipf (default 0: uniform)")
    add("--seed", type=whole(0), default=0, help="of the rules and the strings (default 0)")
    if samples:
        add("--samples", type=whole(1), default=samples,
            help=f"P, training strings (default {samples})")
        add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default auto)")


def grammar_from_flags(parser, args):
    """The grammar of the flags; an impossible one ends the script with one line, code 2."""
    try:
        return Grammar.random(args.v, args.s, args.m, args.depth, args.seed, args.zipf)
    except ValueError as error:
        parser.error(f"argument --{error}")


def check_device(device):
    """Raise ValueError, naming device, unless this machine has it."""
    there = ["cpu"]
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there += ["mps", "mps:0"]
    if str(device) not in there:
        raise ValueError(f"device: must be {' or '.join(there)} on this machine")


def pick_device(parser, name):
    """auto, cpu, cuda, cuda:N or mps -> a device's name; a missing one ends the script."""
    if name == "auto":  # never mps, which we have not tried
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        check_device(name)
    except ValueError as error:
        parser.error(f"argument --{error}, or auto")
    return name


def terminate(number, frame):
    """What SIGTERM does: the same as Ctrl-C, with a name that tells them apart."""
    raise KeyboardInterrupt("SIGTERM")


def run_script(main):
    """Call a script's main. What ends it from outside gives one line and no traceback:
    Ctrl-C or SIGTERM, a reader of the output that has gone (`| head`), a full disk, too
    little memory."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))
    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
        sys.stdout.flush()
        return
    except KeyboardInterrupt as stop:
        code, line = 1 if stop.args else 130, "stopped"
        print(file=sys.stderr)  # the line that ^C or a progress bar stands on ends here
    except BrokenPipeError:
        # Python flushes once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:  # a full disk among them
        code, line = 1, f"{error.filename or 'output'}: {error.strerror or error}"
    except (MemoryError, torch.OutOfMemoryError):
        code, line = 1, "out of memory; fewer or shorter strings need less"
    print(f"{os.path.basename(sys.argv[0])}: {line}", file=sys.stderr)
    raise SystemExit(code)


# ----------------------------------------------------------------------------------------
# alone


def show(grammar, levels):
    """Print the rules, the first derivation, and how far apart the parents are."""
    for l in reversed(range(grammar.L)):
        for a, rules in enumerate(grammar.rules[l].tolist()):
            tuples = " | ".join(" ".join(map(str, rule)) for rule in rules)
            print(f"level {l + 1} -> {l}   {a:3} -> {tuples}")
        print()
    if levels[0].shape[1] <= 81:  # a tree that fits a wide screen
        print(draw_tree(levels, grammar.s))
    else:
        print("one string:", *levels[0][0, :81].tolist(), "...")
    print(f"\nf = {grammar.f:.3g} of all tuples are used. How far apart the two closest "
          "parents are, as seen\nfrom the first tuple of the string alone, in sqrt(1-f)/m "
          "(--contrast has the mean over all):")
    for l in range(grammar.L - 1):
        print(f"  parents on level {l + 1}: {grammar.separation(l):.2f}")


def draw_tree(levels, s):
    """The first derivation as text, the root on top, each symbol above its children."""
    cell = 1 + max(len(str(int(h.max()))) for h in levels)  # columns for a token
    lines = []
    for l, h in reversed(list(enumerate(levels))):
        width = cell * s**l                                 # columns for a node
        symbols = [f"{a:{width // 2 + 1}}".ljust(width) for a in h[0].tolist()]
        lines.append(f"level {l}  " + "".join(symbols).rstrip())
        if l > 0:
            # a line from the first child to the last
            child = width // s
            line = ("+" + "-" * (child - 1)) * (s - 1) + "+"
            line = (" " * (child // 2) + line).ljust(width)
            lines.append("         " + (line * len(symbols)).rstrip())
    return "\n".join(lines)


def sample_plainly(grammar, P, seed):
    """The sampler in int64, in one piece: the yardstick of --bench. Uniform rules only."""
    random = torch.Generator().manual_seed(seed)
    levels = [torch.randint(grammar.v, (P, 1), generator=random)]
    for l in reversed(range(grammar.L)):
        pick = torch.randint(grammar.m, levels[0].shape, generator=random)
        levels.insert(0, grammar.rules[l].long()[levels[0], pick].reshape(P, -1))
    return levels


def bench(grammar):
    """Print tokens per second on one core, the best of five, of the sampler and a plain one."""
    torch.set_num_threads(1)
    P = max(1, 2**24 // grammar.s**grammar.L)
    works = {
        "this sampler": lambda: grammar.sample(P, 0),
        "plain int64 sampler": lambda: sample_plainly(grammar, P, 0),
    }
    seconds = dict.fromkeys(works, math.inf)
    # by turns, so that whatever else the machine does slows both
    for _ in range(5):
        for name, work in works.items():
            seconds[name] = min(seconds[name], timeit.timeit(work, number=1))
    for name, best in seconds.items():
        speed = P * grammar.s**grammar.L / best / 1e6
        print(f"{name:20} {speed:8.0f} million tokens per second")


def show_contrast(grammars, path):
    """Print Grammar.contrast, root mean square over grammars of one size, and the number of
    strings P at which sampling noise is as large. path: of a CSV file, or None."""
    g, found = grammars[0], [grammar.contrast() for grammar in grammars]
    print(f"{g}, {len(grammars)} of them")
    print("how far apart parents' contexts are, and P where sqrt(v m / P) is as large\n")
    print("level" + "".join(f"{target:>18}" for target in found[0]))
    lines = ["v,s,m,L,zipf,seeds,target,level,contrast,P_noise"]  # of the CSV file
    sizes = f"{g.v},{g.s},{g.m},{g.L},{g.zipf:g},{len(grammars)}"
    for level in range(1, g.L):
        cells = ""
        for target in found[0]:
            # parents on this level are the parents of tuples one level below
            squares = [one[target][level - 1] ** 2 for one in found]
            contrast = math.sqrt(sum(squares) / len(squares))
            P = g.v * g.m / contrast**2 if contrast else math.inf
            cells += f"{contrast:9.3f} {P:8.3g}"
            lines.append(f"{sizes},{target},{level},{contrast:.6g},{P:.6g}")
        print(f"{level:5}{cells}")
    if path:
        text = "\n".join(lines) + "\n"
        write_whole(path, lambda file: file.write(text.encode()))


def save_strings(path, grammar, levels):
    """Write levels, rules and zipf as an .npz, which Grammar.load reads the rules from."""
    arrays = {f"level{l}": level.numpy() for l, level in enumerate(levels)}
    arrays |= {f"rules{l}": rule.numpy() for l, rule in enumerate(grammar.rules)}
    arrays["zipf"] = np.array(grammar.zipf)
    write_whole(path, lambda file: np.savez_compressed(file, **arrays))


def main():
    parser = Parser(__doc__)
    add_grammar_flags(parser)
    add = parser.add_argument
    add("--samples", type=whole(1), default=1, help="P, derivations to draw (default 1)")
    add("--load", metavar="FILE", help="take the rules from an .npz or .npy instead")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--save", metavar="FILE.npz", type=new_file, help="write strings, levels and rules")
    one("--bench", action="store_true", help="time the sampler instead")
    one("--contrast", action="store_true", help="how far apart parents' contexts are instead")
    add("--seeds", type=whole(1, 1000), help="with --contrast: average so many grammars")
    add("--csv", metavar="FILE", type=new_file, help="with --contrast: write it to a file")
    args = parser.parse_args()
    # a flag that would change nothing is refused
    for flag in ("seeds", "csv"):
        if getattr(args, flag) is not None and not args.contrast:
            parser.error(f"argument --{flag}: only goes with --contrast")
    if args.load and args.seeds:
        parser.error("argument --seeds: a loaded grammar is a single one")

    try:
        if args.load:
            grammars = [Grammar.load(args.load)]
        else:
            seeds = range(args.seed, args.seed + (args.seeds or 1))
            sizes = args.v, args.s, args.m, args.depth
            grammars = [Grammar.random(*sizes, seed, args.zipf) for seed in seeds]
        if args.contrast:
            return show_contrast(grammars, args.csv)
        if args.bench:
            return bench(grammars[0])
        levels = grammars[0].sample(args.samples, args.seed)
    except FileNotFoundError as error:
        parser.error(f"argument --load: cannot read {args.load}: {error.strerror}")
    except ValueError as error:
        parser.error(f"argument --{error}")
    if args.save:
        save_strings(args.save, grammars[0], levels)
        print(f"wrote {args.samples} strings, their levels and the rules")
    else:
        show(grammars[0], levels)


if __name__ == "__main__":
    run_script(main)
