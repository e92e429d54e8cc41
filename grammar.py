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

From top to bottom: the grammar (rules, sampling, parsing, swaps), what an infinite sample
would show, exact inference, the score, and what all scripts share.
"""

import argparse
import difflib
import errno
import math
import numbers
import os
import re
import signal
import sys
import threading
import timeit
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

CHUNK_TOKENS = 2**18  # tokens sampled at a time: they stay in the cache
TEST_STRINGS = 4096   # fresh strings, that every score is taken on
RIDGE = 1e-3          # of the linear probe, on features of size about 1
MEMORY = 2**34        # bytes: what would need more is refused before it starts


# ----------------------------------------------------------------------------------------
# the grammar


class Grammar:
    """The rules of one RHM.

    rules: L arrays or tensors of whole numbers, rules[l] of shape (v, m, s): rules[l][a, j]
    is the j-th tuple of level-l symbols that the level-(l+1) symbol a may turn into. Kept
    as uint8 tensors. zipf: a symbol takes its rule j with a probability in proportion to
    (j+1)^-zipf, so 0 makes all rules equally likely; p, (m,) float64, holds these.
    Raises ValueError, naming the argument, unless all that fits together and no tuple
    occurs twice in a level."""

    def __init__(self, v, s, m, L, rules, zipf=0.0):
        check_sizes(v, s, m, L)
        self.v, self.s, self.m, self.L = int(v), int(s), int(m), int(L)
        if not isinstance(zipf, numbers.Real) or not 0 <= zipf <= 10:
            raise ValueError(f"zipf: must be a number from 0 to 10, not {zipf!r:.20}")
        self.zipf = float(zipf)
        weight = torch.arange(1, self.m + 1).double() ** -self.zipf
        self.p = weight / weight.sum()
        try:
            rules = list(rules)
        except TypeError:
            rules = []
        if len(rules) != L:
            raise ValueError(f"rules: there must be {L} levels of them, not {len(rules)}")
        self.rules = [self._check_rules(l, rule) for l, rule in enumerate(rules)]

    def _check_rules(self, l, rule):
        """The rules of one level as our own uint8 tensor, or a ValueError."""
        v, s, m = self.v, self.s, self.m
        rule = whole_numbers("rules", rule)
        if rule.shape != (v, m, s):
            wanted = f"(v, m, s) = {(v, m, s)}"
            raise ValueError(f"rules: level {l} must be {wanted}, not {tuple(rule.shape)}")
        low, high = int(rule.min()), int(rule.max())
        if low < 0 or high >= v:
            raise ValueError(f"rules: level {l} must hold 0..{v - 1}, not {low}..{high}")
        if len(tuple_codes(rule, v).unique()) < v * m:
            raise ValueError(f"rules: level {l} has a tuple twice, so it is ambiguous")
        return rule.to("cpu", torch.uint8, copy=True)

    def __repr__(self):
        sizes = f"v={self.v}, s={self.s}, m={self.m}, L={self.L}"
        return f"Grammar({sizes}, zipf={self.zipf:g})"

    @staticmethod
    def random(v, s, m, L, seed=0, zipf=0.0):
        """Draw v*m distinct s-tuples for every level, uniformly, and deal them out to the
        v parents, m to each. seed: a whole number or a tuple of them."""
        check_sizes(v, s, m, L)
        rng = generator("rules", seed)
        place = v ** np.arange(s)[::-1]
        rules = []
        for _ in range(L):
            # in random order, so that dealing in turn is a fair split
            codes = rng.choice(v**s, size=v * m, replace=False)
            tuples = codes[:, None] // place % v            # (v*m, s), the digits in base v
            rules.append(tuples.astype(np.uint8).reshape(v, m, s))
        return Grammar(v, s, m, L, rules, zipf)

    @staticmethod
    def load(file):
        """The grammar in a file: what `--save` wrote, or an .npz of (v, m, s) arrays, the
        rules that make the tokens first, or an .npy of shape (L, v, m, s).

        Raises ValueError, naming load, unless that is a grammar; OSError if unreadable."""
        try:
            with open(file, "rb") as opened:
                found = np.load(opened, allow_pickle=False)
                arrays = dict(found) if hasattr(found, "files") else dict(enumerate(found))
            zipf = arrays.pop("zipf", np.zeros(())).item()
            # named rules0, rules1, ... or all arrays in their order
            named = [name for name in arrays if str(name).startswith("rules")]
            rules = [arrays[f"rules{l}"] for l in range(len(named))] or [*arrays.values()]
            v, m, s = rules[0].shape
        except OSError:
            raise
        except Exception:  # whatever foreign bytes lead to
            raise ValueError(f"load: {file} holds no (v, m, s) arrays of rules") from None
        try:
            return Grammar(v, s, m, len(rules), rules, zipf)
        except ValueError as error:
            raise ValueError(f"load: {file}: {error}") from None

    @property
    def f(self):
        """Fraction of the v^s tuples that have a parent."""
        return self.m / self.v ** (self.s - 1)

    def sample(self, P, seed=0, device="cpu", without=None):
        """Sample P derivations: the root is uniform, and every symbol picks one of its
        rules, independently.

        without: a pair (l, j): no level-l symbol uses its rule j; the next rule has its
        place. Returns levels, L+1 uint8 tensors on device, levels[l] of shape
        (P, s^(L-l)): levels[0] are the strings, levels[L] the root labels. Same seed, same
        strings on every device, and the first P of a larger sample are the smaller one.
        Raises ValueError if P < 1, P is too large, or without names no rule or the only."""
        check_whole("samples", P, 1)
        check_memory("samples", strings_bytes(P, self.s, self.L), "the strings")
        v, s, m, L = self.v, self.s, self.m, self.L
        rules = [rule.numpy().copy() for rule in self.rules]
        if without is not None:
            l, j = without
            check_whole("without: l", l, 1, L)
            check_whole("without: j", j, 0, m - 1)
            if m == 1:
                raise ValueError("m: must be 2 or more to do without a rule")
            rules[l - 1][:, j] = rules[l - 1][:, (j + 1) % m]
        rng = generator("strings", seed)
        pick = self._picker(rng)
        byte = np.min_scalar_type(v * m - 1).type  # the narrowest that numbers all rules

        # whole chunks are drawn, so that a smaller sample is the start of a larger one
        chunk = max(1, CHUNK_TOKENS // s**L)
        rows = math.ceil(P / chunk) * chunk
        levels = [np.empty((rows, s ** (L - l)), np.uint8) for l in range(L + 1)]
        for start in range(0, rows, chunk):
            part = [level[start : start + chunk] for level in levels]
            # from the root down, every symbol picks one of its rules
            part[L][:] = rng.integers(v, size=(chunk, 1), dtype=np.uint8)
            for l in reversed(range(L)):
                rule = part[l + 1] * byte(m) + pick(part[l + 1].shape)
                children = part[l].reshape(*rule.shape, s)
                # take writes straight into children if it need not check (clip)
                rules[l].reshape(v * m, s).take(rule, axis=0, out=children, mode="clip")
        return [torch.from_numpy(level[:P]).to(device) for level in levels]

    def _picker(self, rng):
        """A function from a shape to the rules 0..m-1 that so many symbols pick."""
        m, k = self.m, 1
        byte = np.min_scalar_type(self.v * m - 1)
        if self.zipf:  # where a number from 0 to 1 falls among the summed chances
            steps = self.p.cumsum(0)[:-1].numpy()
            return lambda shape: np.searchsorted(steps, rng.random(shape), "right").astype(byte)
        # random numbers are the slow part: one below m^k holds k picks, its digits
        while m ** (2 * k) <= 2**14 and k < 8:
            k *= 2
        digits = np.stack(np.unravel_index(np.arange(m**k), (m,) * k), 1).astype(byte)
        several = np.min_scalar_type(m**k - 1)

        def pick(shape):
            size = math.prod(shape)
            drawn = rng.integers(m**k, size=math.ceil(size / k), dtype=several)
            return digits.take(drawn, axis=0).reshape(-1)[:size].reshape(shape)

        return pick

    def parse(self, x):
        """Invert sample: integer strings (P, s^L) give levels as above, on x's device.

        Raises ValueError naming the first string, level and position that no rule of this
        grammar explains."""
        x = whole_numbers("x", x)
        if x.ndim != 2 or x.shape[1] != self.s**self.L:
            wanted = f"(P, s^L) = (P, {self.s**self.L})"
            raise ValueError(f"x: the shape must be {wanted}, not {tuple(x.shape)}")
        wrong = ((x < 0) | (x > self.v - 1)).nonzero()  # 256 would wrap to 0 in uint8
        if len(wrong):
            p, t = wrong[0].tolist()
            where = f"string {p}, level 0, position {t}"
            raise ValueError(f"x: {where}: {x[p, t]} is not a symbol, 0 to {self.v - 1}")
        levels = [x.to(torch.uint8, copy=True)]
        for l in range(self.L):
            # find each tuple among the sorted rules; its place tells the parent
            rules = self.rules[l].to(x.device).flatten(0, 1)            # (v m, s)
            codes, order = tuple_codes(rules, self.v).sort()
            code = tuple_codes(levels[l].unflatten(1, (-1, self.s)), self.v)
            place = torch.searchsorted(codes, code).clamp(max=len(codes) - 1)
            wrong = (codes[place] != code).nonzero()
            if len(wrong):
                p, t = wrong[0].tolist()
                tuple_ = levels[l][p, t * self.s : (t + 1) * self.s].tolist()
                where = f"string {p}, level {l}, position {t * self.s}"
                raise ValueError(f"x: {where}: no rule gives the tuple {tuple_}")
            levels.append((order[place] // self.m).to(torch.uint8))
        return levels

    def swap(self, levels, l, kind, seed=0):
        """Replace, in every string, the level-(l-1) tuple under one random level-l node by
        another valid one, and resample all below it. The paper's figures 5 and 13 use:

        "synonym": another rule of the same symbol: no latent from level l up changes;
        "generic": any other tuple, whose parent then stands at that node; levels above l
        stay as they are, though the string may have no derivation any more.
        levels: as sample returns them; l: 1..L. Returns (swapped, node): swapped like
        levels, new tensors; node, (P,) int64, the level-l node of every string. Same seed,
        same nodes for both kinds. Raises ValueError if l or kind is out of range, or m = 1
        leaves no synonym."""
        check_whole("l", l, 1, self.L)
        if kind not in ("synonym", "generic"):
            raise ValueError(f"kind: must be synonym or generic, not {kind!r:.20}")
        if kind == "synonym" and self.m == 1:
            raise ValueError("m: must be 2 or more, a single rule has no synonyms")
        rng, s, m, P = generator("swap", seed), self.s, self.m, len(levels[0])
        pick = self._picker(rng)
        device, each = levels[0].device, np.arange(P)
        rules = [rule.numpy() for rule in self.rules]
        swapped = [level.cpu().numpy().copy() for level in levels]

        # the tuple that stands there now, as a number below v m
        node = rng.integers(s ** (self.L - l), size=P)
        tuples = rules[l - 1].reshape(-1, s)                # (v m, s)
        there = swapped[l - 1].reshape(P, -1, s)[each, node]
        old = (there[:, None] == tuples).all(2).argmax(1)   # (P,)

        # another one in its place
        p = self.p.numpy()
        if kind == "synonym":
            new = old // m * m + draw_other(rng, p, old % m)
        else:
            new = draw_other(rng, np.tile(p / self.v, self.v), old)
        swapped[l][each, node] = new // m

        # and all below it, drawn afresh
        h = tuples[new]                                     # (P, s)
        for k in reversed(range(l)):
            swapped[k].reshape(P, -1, s ** (l - k))[each, node] = h
            if k:
                h = rules[k - 1][h, pick(h.shape)].reshape(P, -1)
        swapped = [torch.from_numpy(level).to(device) for level in swapped]
        return swapped, torch.from_numpy(node).to(device)

    # ------------------------------------------------------------------------------------
    # the population: what an infinite sample would show, from the rules alone

    def transition(self, l):
        """(s, v, v) float64: entry [k, a, b] is the probability that a level-(l+1) symbol
        a has b as its k-th child."""
        W = torch.zeros(self.s, self.v, self.v, dtype=torch.float64)
        parent = torch.arange(self.v)[:, None].expand(self.v, self.m)
        p = self.p.expand(self.v, self.m)
        for k in range(self.s):
            W[k].index_put_((parent, self.rules[l][:, :, k].long()), p, accumulate=True)
        return W

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
        pair = torch.zeros(self.v, self.v, dtype=torch.float64)
        weight = p[:, None] * self.p                        # (v, m)
        pair.index_put_((rules[:, :, i], rules[:, :, j]), weight, accumulate=True)
        return pair

    def context(self, l, t, target_level, n):
        """The population limit of a context vector.

        Returns (v, v) float64, entry [a, b] = P(node n of target_level is b | a tuple with
        the parent a is the t-th of level l). Synonyms have the same context whatever the
        target, which is why clustering contexts finds the parents. The rows of a parent
        that never stands at t are 0. The targets of the paper: target_level = l, an element
        of a cousin; 0, a token under a cousin; L with n = 0, the root label.
        Raises ValueError if the target lies within the tuple itself."""
        s = self.s
        c = max(l + 1, target_level)  # climb to the lowest common ancestor
        while t // s ** (c - l - 1) != n // s ** (c - target_level):
            c += 1
        if c == l + 1 > target_level:
            where = f"node {n} of level {target_level}"
            raise ValueError(f"n: {where} lies within tuple {t} of level {l}")
        p = self.marginal(c, t // s ** (c - l - 1))
        if c == target_level:  # the target is an ancestor
            joint = (p[:, None] * self.descend(c, l + 1, t)).T
        else:                  # the two branches share one rule
            i = t // s ** (c - l - 2) % s
            j = n // s ** (c - 1 - target_level) % s
            pair = self.siblings(c, i, j, p)
            up, down = self.descend(c - 1, l + 1, t), self.descend(c - 1, target_level, n)
            joint = up.T @ pair @ down
        return joint / joint.sum(1, keepdim=True).clamp(min=1e-300)

    def separation(self, l):
        """How far apart the parents of level-l tuples are, in the theorem's unit
        sqrt(1-f)/m (in 1/m if f = 1).

        The smallest distance between two parents' contexts: the elements of the cousins of
        the first tuple, root mean square over these. Near 0, two symbols share their
        contexts, and no number of samples separates them by this tuple position."""
        contexts = [self.context(l, 0, l, n) for n in range(self.s, self.s**2)]
        distance = torch.pdist(torch.cat(contexts, 1)).min() / len(contexts) ** 0.5
        return distance.item() * self.m / ((1 - self.f) or 1) ** 0.5

    def contrast(self):
        """How far apart parents' contexts are, for each target and level: {target: list}.

        Entry l is about the level-l tuples: the root mean square distance of two parents'
        contexts, over all pairs of parents, all tuple positions and all targets that
        cluster.py counts. For joint the target is the cousin's symbol, which its tuples
        are relabelled to. Noise of sqrt(v m / P), from P strings, is as large at
        P = v m / contrast^2. Raises ValueError if root needs too much memory."""
        v, s, L = self.v, self.s, self.L
        check_memory("depth", 24 * s ** (L - 1) * v * v, "contexts of the root")
        W = [self.transition(l) for l in range(L)]          # (s, v, v) each
        I = torch.eye(v, dtype=torch.float64)

        # what a symbol is, over all nodes of a level: the root is uniform
        mean = [I.mean(0)]
        for l in reversed(range(L)):
            mean.insert(0, mean[0] @ W[l].mean(0))

        # a target is some way below the cousin, so that contexts are q W with q the
        # cousin's symbol; for the mean of |q W|^2 over many W, that of W W^T will do
        tokens = I
        found = {"latent": [], "token": [], "root": [], "joint": []}
        for l in range(L - 1):
            tokens = (W[l] @ tokens @ W[l].mT).mean(0)
            latent = (W[l] @ W[l].mT).mean(0)
            places = [(i, j) for i in range(s) for j in range(s) if i != j]
            pairs = [self.siblings(l + 2, i, j, mean[l + 2]) for i, j in places]
            pairs = torch.stack(pairs)                      # (s (s-1), v, v)
            for target, inner in ("latent", latent), ("token", tokens), ("joint", I):
                found[target].append(spread(pairs, inner))

        # a root label is not equally far from all tuples: each position by itself
        down = I[None]                                      # (n, v, v) from the root
        for l in reversed(range(1, L)):
            down = (down[:, None] @ W[l]).flatten(0, 1)
            found["root"].insert(0, spread(down.mT / v, I))
        return found

    # ------------------------------------------------------------------------------------
    # exact inference

    def posterior(self, x, visible):
        """Sum-product up and down the tree: P(symbol | the visible tokens), exactly.

        x: (P, s^L) integer strings; visible: bool, (P, s^L) or (s^L,). What x holds at
        hidden places is not read. Returns a list over the levels l = 0..L of
        (P, s^(L-l), v) float64 tensors on the CPU, the distribution of every node: the
        Bayes limit of masked-token prediction on level 0, of classification on level L.
        Raises ValueError, naming the first string, if no derivation has these tokens."""
        v, s, m, L = self.v, self.s, self.m, self.L
        x, visible = whole_numbers("x", x).cpu(), torch.as_tensor(visible).cpu()
        if x.ndim != 2 or x.shape[1] != s**L:
            raise ValueError(f"x: must be (P, {s**L}), not {tuple(x.shape)}")
        if visible.dtype != torch.bool or visible.shape not in (x.shape, x.shape[1:]):
            raise ValueError(f"visible: must be bool, (P, {s**L}) or ({s**L},)")
        P = len(x)
        check_memory("x", 8 * P * s ** (L - 1) * v * m * (s + 3), "exact inference")
        visible = visible.expand(P, -1)
        wrong = (visible & ((x < 0) | (x > v - 1))).nonzero()
        if len(wrong):
            p, t = wrong[0].tolist()
            raise ValueError(f"x: string {p}, position {t}: {x[p, t]} is not a symbol")

        # up: P(visible tokens beneath a node | its symbol), up to a factor
        token = F.one_hot(torch.where(visible, x.long(), 0), v).double()
        up = [torch.where(visible[:, :, None], token, 1.0)]    # (P, s^L, v)
        given = []                                          # [l][k]: (P, n, v m)
        for l in range(L):
            rules = self.rules[l].flatten(0, 1).long()      # (v m, s)
            children = up[l].unflatten(1, (-1, s))          # (P, n, s, v)
            given.append([children[:, :, k, rules[:, k]] for k in range(s)])
            likely = math.prod(given[l]).unflatten(2, (v, m)) @ self.p  # (P, n, v)
            total = likely.sum(2, keepdim=True)
            if (total == 0).any():
                p = int((total == 0).nonzero()[0, 0])
                raise ValueError(f"x: string {p} has no derivation with its visible tokens")
            up.append(likely / total)

        # down: P(a node's symbol | visible tokens that are not beneath it)
        down = [torch.full((P, 1, v), 1 / v, dtype=torch.float64)]
        for l in reversed(range(L)):
            rules = self.rules[l].flatten(0, 1).long()
            rule = (down[0][:, :, :, None] * self.p).flatten(2)        # (P, n, v m)
            below = torch.zeros(P, rule.shape[1], s, v, dtype=torch.float64)
            for k in range(s):
                others = math.prod((given[l][j] for j in range(s) if j != k), start=rule)
                below[:, :, k].index_add_(2, rules[:, k], others)
            below = below.flatten(1, 2)                     # (P, s n, v)
            down.insert(0, below / below.sum(2, keepdim=True))
        both = [a * b for a, b in zip(up, down)]
        return [joint / joint.sum(2, keepdim=True) for joint in both]


def spread(joint, inner):
    """Root mean square distance of contexts: joint (n, v, v) holds P(parent, symbol) at n
    places, inner (v, v) the scalar product of two rows. A parent that is never seen at a
    place gets the mean context there, as in cluster.py."""
    share = joint.sum(2, keepdim=True)                      # (n, v, 1)
    mean = joint.sum(1, keepdim=True) / share.sum(1, keepdim=True)
    q = torch.where(share > 0, joint / share.clamp(min=1e-300), mean)
    # |q_a - q_b|^2 = |q_a|^2 + |q_b|^2 - 2 q_a.q_b
    gram = q @ inner @ q.mT                                 # (n, v, v)
    size = gram.diagonal(dim1=1, dim2=2)
    squares = size[:, :, None] + size[:, None] - 2 * gram
    v = joint.shape[1]
    return (squares.sum((1, 2)).mean() / (v * (v - 1))).clamp(min=0).sqrt().item()


def draw_other(rng, weight, old):
    """Draw one index for every entry of old, in proportion to weight, but never that one."""
    ends = weight.cumsum()
    starts = ends - weight
    u = rng.random(len(old)) * (ends[-1] - weight[old])     # leaves no room for old
    u = np.where(u < starts[old], u, np.maximum(u + weight[old], ends[old]))
    drawn = np.searchsorted(ends, u, side="right")
    return np.minimum(drawn, np.where(old == len(weight) - 1, old - 1, len(weight) - 1))


def generator(stream, seed):
    """A numpy generator for one named stream of a seed (a whole number or a tuple of them),
    so that the rules and the strings drawn from one seed are independent."""
    seed = seed if isinstance(seed, tuple) else (seed,)
    for part in seed:
        check_whole("seed", part, 0)
    name = int.from_bytes(stream.encode()[:4], "little")
    return np.random.default_rng([name, len(seed), *map(int, seed)])


def cousins(s, device="cpu"):
    """(s, s-1) int64: row i holds the child positions of the cousins of a tuple at i."""
    return torch.tensor([[j for j in range(s) if j != i] for i in range(s)], device=device)


def tuple_codes(tuples, v):
    """(..., s) integer tuples -> (...) int64, the number that each spells in base v."""
    code = tuples[..., 0].to(torch.int64, copy=True)
    for k in range(1, tuples.shape[-1]):
        code.mul_(v).add_(tuples[..., k].long())
    return code


# ----------------------------------------------------------------------------------------
# the score


def accuracy(estimate, truth, v):
    """Fraction of labels that are right under the best one-to-one matching of estimated ids
    with true symbols; 0 if there are none.

    estimate: integer tensor of ids, any number of them; negative means unknown and counts
    as wrong. truth: integer tensor of the same shape, symbols 0..v-1. Raises ValueError
    if the shapes differ, or these are no such numbers."""
    estimate, truth = whole_numbers("estimate", estimate), whole_numbers("truth", truth)
    if estimate.shape != truth.shape:
        shapes = f"{tuple(truth.shape)}, not {tuple(estimate.shape)}"
        raise ValueError(f"estimate: must have the shape of truth, {shapes}")
    if truth.numel() == 0:
        return 0.0
    if int(truth.min()) < 0 or int(truth.max()) >= v:
        raise ValueError(f"truth: symbols must lie in 0..v-1 = {v - 1}")
    ids = max(v, int(estimate.max()) + 1)
    check_memory("estimate", 8 * ids * v, f"ids up to {ids - 1}")
    known = estimate >= 0
    cells = estimate[known].long() * v + truth[known]
    table = torch.bincount(cells, minlength=ids * v).reshape(ids, v)
    return float(best_matching(table.cpu().numpy()).sum()) / truth.numel()


def best_matching(table):
    """The one-to-one pairs of rows and columns whose scores have the largest sum.

    table: (rows, columns) finite scores. Returns the scores of min(rows, columns) pairs.
    The Hungarian algorithm: rows join one by one, each along the cheapest path that
    alternates between pairs not made and made; prices keep every cost at or above 0.
    Raises ValueError unless all scores are finite."""
    table = np.asarray(table, dtype=float)
    if table.ndim != 2 or not np.isfinite(table).all():
        raise ValueError("table: must be (rows, columns) of finite numbers")
    if table.shape[0] > table.shape[1]:
        table = table.T
    rows, columns = table.shape
    cost = table.max(initial=0) - table
    row_price, column_price = np.zeros(rows), np.zeros(columns)
    owner = np.full(columns, -1)                            # the row of each column
    for new in range(rows):
        distance = np.full(columns, np.inf)                 # of the cheapest path to a column
        before = np.full(columns, -1)                       # the column before it on the path
        done = np.zeros(columns, bool)
        reached = [(new, 0.0)]                              # rows on the tree of paths
        row, column, length = new, -1, 0.0
        while row >= 0:                                     # until a column is free
            path = length + cost[row] - row_price[row] - column_price
            closer = ~done & (path < distance)
            distance[closer], before[closer] = path[closer], column
            column = int(np.where(done, np.inf, distance).argmin())
            length, row = distance[column], owner[column]
            done[column] = True
            reached.append((row, length))
        for row, at in reached[:-1]:
            row_price[row] += length - at
        column_price[done] -= length - distance[done]
        while column >= 0:                                  # each column takes the row of
            previous = before[column]                       # the one before it
            owner[column] = owner[previous] if previous >= 0 else new
            column = previous
    held = owner >= 0
    return table[owner[held], held.nonzero()[0]]


def linear_probe(features, labels, v):
    """Least squares of the one-hot labels on the features, with a little ridge: nothing to
    tune, the same every time.

    features: (n, d) float; labels: (n,) integers below v. Returns a function from (..., d)
    features to (..., v) scores. Solved in float64 on the CPU, whatever the device."""
    share = F.one_hot(labels.long(), v).to(features)        # (n, v)
    mean, centre = features.mean(0), share.mean(0)
    centred = features - mean
    gram = (centred.T @ centred / len(features)).cpu().double()
    moment = (centred.T @ (share - centre) / len(features)).cpu().double()
    ridge = RIDGE * torch.eye(len(gram), dtype=torch.float64)
    weight = torch.linalg.solve(gram + ridge, moment)          # (d, v)
    weight = weight.to(features.dtype).to(features.device)
    return lambda h: (h - mean) @ weight + centre


# ----------------------------------------------------------------------------------------
# what the scripts share: checks, settings, scores and command lines


def check_whole(name, value, low, high=2**31 - 1):
    """Raise ValueError, naming the argument, unless value is a whole number in range."""
    whole_number = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole_number:
        raise ValueError(f"{name}: must be a whole number, not {value!r:.20}")
    if not low <= value <= high:
        seen = f", not {value}" if abs(value) < 2**63 else ""
        raise ValueError(f"{name}: must be a whole number from {low} to {high}{seen}")


def whole_numbers(name, x):
    """A tensor of the whole numbers in x (tensor, array, lists), or a ValueError."""
    try:
        x = torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{name}: must hold whole numbers, in rows of one length") from None
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"{name}: must hold whole numbers, not {x.dtype}")
    return x


def check_tuples(v, s):
    """Raise ValueError unless a symbol fits in a byte, and a tuple in 63 bits."""
    check_whole("v", v, 2, 256)
    check_whole("s", s, 2, 62)
    if v**s >= 2**63:
        raise ValueError(f"s: must be 2 or more with v^s below 2^63, not {s} for v = {v}")


def check_sizes(v, s, m, L):
    """Raise ValueError, naming the size, unless these four describe a grammar that can be
    stored. A string has at most 2^24 tokens."""
    check_tuples(v, s)
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
    check_tuples(v, s)
    x = whole_numbers("x", x)
    length = x.shape[1] if x.ndim == 2 and len(x) else 0
    L = 0
    while length > s**L:
        L += 1
    if L < 2 or length != s**L:
        shape = tuple(x.shape)
        raise ValueError(f"x: must be (P, s^L), P >= 1 and L >= 2, not {shape} for s = {s}")
    low, high = int(x.min()), int(x.max())
    if low < 0 or high >= v:
        raise ValueError(f"x: symbols must lie in 0..v-1 = {v - 1}, not {low}..{high}")
    return x.to(torch.uint8), L


def strings_bytes(P, s, L):
    """Bytes of P derivations as sample returns them: one for every node of every level."""
    return P * sum(s**l for l in range(L + 1))


def check_memory(name, need, what):
    """Raise ValueError, naming the argument, if work would need more than MEMORY bytes."""
    if need > MEMORY:
        gib = f"{need / 2**30:.3g} GiB, at most {MEMORY / 2**30:.3g} are allowed"
        raise ValueError(f"{name}: {what} would need {gib}")


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
    given = dict(given)
    preset = given.pop("preset", next(iter(presets)))
    if preset not in presets:
        raise ValueError(f"preset: must be one of {', '.join(presets)}, not {preset!r:.20}")
    kinds = {row.name: row.kind for row in table}
    values = {row.name: row.default for row in table} | presets[preset]
    for name, value in given.items():
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1) or kinds
            raise ValueError(f"{name}: no such setting; there is {', '.join(near)}")
        try:
            values[name] = kinds[name](str(value))
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise ValueError(f"{name.replace('_', '-')}: {error}") from None
    return SimpleNamespace(**values)


def paper_preset(table):
    """{setting: the paper's value}, for the settings that the paper has."""
    return {row.name: row.paper for row in table if row.paper is not None}


def add_settings(parser, table, presets):
    """A flag for every row of a table, and --preset. A flag that is not given is None."""
    if len(presets) > 1:
        first = next(iter(presets))
        text = f"values of the settings below (default {first})"
        parser.add_argument("--preset", choices=presets, help=text)
    for row in table:
        flag = "--" + row.name.replace("_", "-")
        paper = "" if row.paper is None else f"; the paper: {row.paper}"
        text = f"{row.help} (default {row.default}{paper})"
        bare = {"nargs": "?", "const": True} if row.kind is switch else {}  # --flag is true
        parser.add_argument(flag, type=row.kind, help=text, **bare)


def given_settings(table, args):
    """{name: value} of the flags of add_settings that were given."""
    values = {name: getattr(args, name, None) for name in ["preset", *(row.name for row in table)]}
    return {name: value for name, value in values.items() if value is not None}


class Parser(argparse.ArgumentParser):
    """argparse, but bad input gives one line that names the flag, and exit code 2."""

    def __init__(self, doc):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=form, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def whole(low, high=2**31 - 1):
    """An argparse type: a whole number from low to high."""

    def read(text):
        written = re.fullmatch("[+-]?[0-9]{1,18}", text)
        if not written or not low <= int(text) <= high:
            allowed = f"a whole number from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be {allowed}, not {text[:20]!r}")
        return int(text)

    return read


def real(low, high):
    """An argparse type: a number from low to high."""

    def read(text):
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            allowed = f"a number from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"must be {allowed}, not {text[:20]!r}")
        return number

    return read


def choice(*words):
    """An argparse type: one of some words."""

    def read(text):
        if text not in words:
            allowed = f"one of {', '.join(words)}"
            raise argparse.ArgumentTypeError(f"must be {allowed}, not {text[:20]!r}")
        return text

    return read


def switch(text):
    """An argparse type: true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {text[:20]!r}")
    return text.lower() == "true"


def new_file(text):
    """An argparse type: the name of a file that can be written."""
    folder = os.path.dirname(text) or "."
    if not text or not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"must be a file in a folder that exists, not {text!r}")
    if os.path.exists(text) and not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"must be a file, which {text!r} is not")
    return text


def write_whole(path, write):
    """Write a file in one go: write(file), file open in bytes, fills one beside it, which
    then takes its place. Whatever happens, path holds all the old bytes or all the new."""
    path = os.path.realpath(path)  # what a link points to is replaced, not the link
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "not a file", path)
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            write(file)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


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


def pick_device(parser, name):
    """auto, cpu, cuda, cuda:N or mps -> a device's name; a missing one ends the script.

    auto is cuda where there is one, otherwise cpu; mps, which we never tried, has to be
    asked for by name."""
    there = ["cpu"]
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    if name == "auto":
        return "cuda" if "cuda" in there else "cpu"
    if name not in there:
        choices = f"choose from auto, {', '.join(there)}"
        parser.error(f"argument --device: {name[:20]!r} is not available here; {choices}")
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
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)
    program = os.path.basename(sys.argv[0])
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        code, line = 1 if stop.args else 130, f"\n{program}: stopped"
    except BrokenPipeError:
        # Python flushes once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        code = 1
        line = f"{program}: {error.filename or 'output'}: {error.strerror or error}"
    except (MemoryError, torch.OutOfMemoryError):
        code, line = 1, f"{program}: out of memory; fewer or shorter strings need less"
    else:
        return
    print(line, file=sys.stderr)
    raise SystemExit(code)


# ----------------------------------------------------------------------------------------
# alone


def draw_rules(grammar):
    """The rules as text, one line per symbol."""
    lines = []
    for l in reversed(range(grammar.L)):
        for a, rules in enumerate(grammar.rules[l].tolist()):
            tuples = " | ".join(" ".join(map(str, rule)) for rule in rules)
            lines.append(f"level {l + 1} -> {l}   {a:3} -> {tuples}")
        lines.append("")
    return "\n".join(lines)


def draw_tree(levels, s):
    """The first derivation in levels as text, the root on top, each symbol centred over
    its children."""
    L = len(levels) - 1
    cell = 1 + max(len(str(int(h.max()))) for h in levels)  # columns for a token
    lines = []
    for l in reversed(range(L + 1)):
        center = [int((n + 0.5) * s**l * cell) for n in range(s ** (L - l))]
        row = [" "] * (cell * s**L + cell)
        for column, symbol in zip(center, levels[l][0].tolist()):
            text = str(symbol)
            row[column : column + len(text)] = text
        lines.append(f"level {l}  " + "".join(row).rstrip())
        if l == 0:
            break
        row = [" "] * (cell * s**L + cell)
        below = [int((n + 0.5) * s ** (l - 1) * cell) for n in range(s ** (L - l + 1))]
        for n in range(0, len(below), s):                   # a line over each tuple
            first, last = below[n], below[n + s - 1]
            row[first : last + 1] = "-" * (last - first + 1)
            for column in below[n : n + s]:
                row[column] = "+"
        lines.append("         " + "".join(row).rstrip())
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
    """Tokens per second on one core, the best of five: the sampler, a plain one, a copy."""
    torch.set_num_threads(1)
    P = max(1, 2**24 // grammar.s**grammar.L)
    source = np.ones(P * grammar.s**grammar.L, np.uint8)
    works = {
        "this sampler": lambda: grammar.sample(P, 0),
        "plain int64 sampler": lambda: sample_plainly(grammar, P, 0),
        "memory copy": lambda: source.copy(),
    }
    for name, work in works.items():
        seconds = min(timeit.repeat(work, number=1, repeat=5))
        speed = source.size / seconds / 1e6
        print(f"{name:20} {speed:8.0f} million tokens per second")


def show_contrast(grammars, path):
    """Print Grammar.contrast, root mean square over grammars of one size, and the number of
    strings P at which sampling noise is as large. path: of a CSV file, or None."""
    g, found = grammars[0], [grammar.contrast() for grammar in grammars]
    print(f"{g}, {len(grammars)} of them")
    print("how far apart parents' contexts are, and P where sqrt(v m / P) is as large\n")
    print("level" + "".join(f"{target:>18}" for target in found[0]))
    lines = ["v,s,m,L,zipf,seeds,target,level,contrast,P"]
    for level in range(1, g.L):
        cells = ""
        for target in found[0]:
            squares = [one[target][level - 1] ** 2 for one in found]
            contrast = math.sqrt(sum(squares) / len(squares))
            P = g.v * g.m / contrast**2 if contrast else math.inf
            cells += f"{contrast:9.3f} {P:8.3g}"
            sizes = f"{g.v},{g.s},{g.m},{g.L},{g.zipf:g},{len(grammars)}"
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
    for flag in ("seeds", "csv"):
        if getattr(args, flag) is not None and not args.contrast:
            parser.error(f"argument --{flag}: only goes with --contrast")
    if args.load and args.seeds:
        parser.error("argument --seeds: a loaded grammar is a single one")
    try:
        grammar = Grammar.load(args.load) if args.load else grammar_from_flags(parser, args)
        if args.contrast:
            grammars = [grammar]
            for args.seed in range(args.seed + 1, args.seed + (args.seeds or 1)):
                grammars.append(grammar_from_flags(parser, args))
            return show_contrast(grammars, args.csv)
        if args.bench:
            return bench(grammar)
        levels = grammar.sample(args.samples, args.seed)
        if args.save:
            save_strings(args.save, grammar, levels)
            tokens = grammar.s**grammar.L
            return print(f"wrote {args.samples} strings of {tokens} tokens, levels and rules")
        spreads = [grammar.separation(l) for l in range(grammar.L - 1)]
    except ValueError as error:
        parser.error(f"argument --{error}")

    print(draw_rules(grammar))
    if grammar.s**grammar.L <= 81:
        print(draw_tree(levels, grammar.s))
    else:
        some = levels[0][0, :81].tolist()
        print("one string:", *some, "..." if len(some) < levels[0].shape[1] else "")
    print(f"\nf = {grammar.f:.3g} of all tuples are used; how far apart the parents' contexts "
          "are, in sqrt(1-f)/m:")
    for l, spread_ in enumerate(spreads):
        print(f"  parents on level {l + 1}: {spread_:.2f}")


if __name__ == "__main__":
    run_script(main)
