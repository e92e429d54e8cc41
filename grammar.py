"""
The ground truth: the Random Hierarchy Model (RHM), a random context-free grammar on a
fixed s-ary tree of depth L.

    python grammar.py --depth 3                          the rules, and one derivation
    python grammar.py --samples 1000 --save rhm.npz      strings, levels and rules
    python grammar.py --depth 6 --contrast --seeds 20    why own latents win, in numbers
    python grammar.py --depth 6 --bench                  tokens per second

Level 0 is the visible string of s^L symbols, level L is the root. A symbol of level l+1,
one of v, has m production rules, each an s-tuple of level-l symbols, and no tuple has two
parents. Tuples with the same parent are *synonyms*: to learn the grammar is to group the
v m tuples of every level into v groups of synonyms.

A wrong argument raises a ValueError of one line, which begins with the name of the argument or
of its flag (depth for L, samples for P).
"""

import argparse
import difflib
import hashlib
import itertools
import math
import numbers
import os
import signal
import sys
import time
import timeit
import uuid
from functools import lru_cache, partial
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

CHUNK_TOKENS = 2**18  # tokens sampled at a time: they stay in the cache
TEST_STRINGS = 4096   # fresh strings on which a score is measured
RIDGE = 1e-3          # penalty of the linear probe, for features of size about 1
MEMORY = 2**34        # bytes; work that would need more is refused before it starts
SAVE_EVERY = 60       # seconds, at least, between two writes of a training's state


# ----------------------------------------------------------------------------------------
# the grammar


class Grammar:
    """The rules of one RHM. rules[l] is a (v, m, s) uint8 tensor: rules[l][a, j] is the
    j-th tuple of level-l symbols that the level-(l+1) symbol a may turn into, taken with
    probability p[j] ~ (j+1)^-zipf."""

    def __init__(self, v, s, m, L, rules, zipf=0.0):
        check_sizes(v, s, m, L)
        self.v, self.s, self.m, self.L = int(v), int(s), int(m), int(L)
        if not isinstance(zipf, numbers.Real) or not 0 <= zipf <= 10:
            raise ValueError("zipf: must be a number from 0 to 10")
        self.zipf = float(zipf)
        weight = torch.arange(1, self.m + 1).double() ** -self.zipf
        self.p = weight / weight.sum()                      # (m,) float64

        if not hasattr(rules, "__len__") or len(rules) != L:
            raise ValueError(f"rules: there must be {L} levels of them")
        self.rules = []
        for l, rule in enumerate(rules):
            rule = whole_numbers(f"rules: level {l}", rule, v)
            if rule.shape != (v, m, s) or len(tuple_codes(rule, v).unique()) < v * m:
                raise ValueError(f"rules: level {l} must be (v, m, s), all tuples different")
            # a copy: nobody else can change it
            self.rules.append(rule.to("cpu", torch.uint8, copy=True))

    def __repr__(self):
        sizes = f"v={self.v}, s={self.s}, m={self.m}, L={self.L}"
        return f"Grammar({sizes}, zipf={self.zipf:g})"

    @staticmethod
    def random(v, s, m, L, seed=0, zipf=0.0):
        """Draw v m distinct s-tuples for every level, uniformly, and deal them out to the
        v parents, m to each. seed: a whole number or a tuple of them."""
        check_sizes(v, s, m, L)
        rng = generator("rules", seed)
        rules = []
        for _ in range(L):
            # in random order, so that any m in a row are a random set
            codes = rng.choice(v**s, size=v * m, replace=False)
            rules.append(digits(codes, v, s).reshape(v, m, s))
        return Grammar(v, s, m, L, rules, zipf)

    @staticmethod
    def load(file):
        """Read the grammar from a file of `--save`, an .npz of arrays (v, m, s), rules[0]
        first, or an .npy of shape (L, v, m, s). Raises ValueError, naming load."""
        try:
            with open(file, "rb") as opened:
                found = np.load(opened, allow_pickle=False)
                if isinstance(found, np.ndarray):   # an .npy is one array of all levels
                    found = {f"rules{l}": rule for l, rule in enumerate(found)}
                arrays = dict(found)                # an .npz has its arrays by name
            zipf = float(arrays.pop("zipf", 0))
            # named rules0, rules1, ... or all arrays in their order
            n = sum(name.startswith("rules") for name in arrays)
            rules = [arrays[f"rules{l}"] for l in range(n)] or list(arrays.values())
            v, m, s = rules[0].shape
            return Grammar(v, s, m, len(rules), rules, zipf)
        except Exception as error:  # a foreign file can raise anything
            reason = str(error).partition("\n")[0]
            raise ValueError(f"load: {file} holds no grammar: {reason}") from None

    def sample(self, P, seed=0, device="cpu", without=None):
        """Sample P derivations: the root is uniform, and every symbol picks one of its
        rules, independently. Returns levels, L+1 uint8 tensors, levels[l] of shape
        (P, s^(L-l)): levels[0] are the strings, levels[L] the root labels.

        A seed gives the same strings on every device; a smaller P gives the first of them.
        without: a level 1..L, whose symbols use rule 1 in place of rule 0: a probe fitted on
        such strings can be tested on synonyms that it has not seen."""
        v, s, m, L = self.v, self.s, self.m, self.L
        check_whole("samples", P, 1)
        check_memory("samples", strings_bytes(P, s, L), "the strings")
        check_device(device)
        rules = [rule.numpy().reshape(-1, s).copy() for rule in self.rules]    # (v m, s)
        if without is not None:
            check_whole("without", without, 1, L)
            if m == 1:
                raise ValueError("m: must be 2 or more to do without a rule")
            rules[without - 1][0::m] = rules[without - 1][1::m]
        rng = generator("strings", seed)
        narrow = np.min_scalar_type(v * m - 1)

        levels = [np.empty((P, s ** (L - l)), np.uint8) for l in range(L + 1)]
        # whole chunks are drawn, so that a smaller sample is the start of a larger one
        chunk = max(1, CHUNK_TOKENS // s**L)
        for start in range(0, P, chunk):
            part = [rng.integers(v, size=(chunk, 1), dtype=np.uint8)]
            # from the root down, every symbol picks one of its rules
            for rule in reversed(rules):
                parent = part[0].astype(narrow)             # (chunk, n)
                picked = parent * m + self._pick(rng, parent.shape)
                part.insert(0, rule.take(picked, axis=0).reshape(chunk, -1))
            for level, h in zip(levels, part):
                level[start : start + chunk] = h[: P - start]
        return [torch.from_numpy(level).to(device) for level in levels]

    def _pick(self, rng, shape):
        """Draw the rules 0..m-1 of symbols: an array of this shape."""
        if self.zipf:
            ends = self.p.cumsum(0)[:-1].numpy()
            return np.searchsorted(ends, rng.random(shape), side="right")
        # drawing is the slow part: one number below m^k gives k picks, its digits in base m
        picks = several_picks(self.m)
        size, (n, k) = math.prod(shape), picks.shape
        drawn = rng.integers(n, size=math.ceil(size / k), dtype=np.min_scalar_type(n - 1))
        # a few too many, if k does not divide size
        return picks.take(drawn, axis=0).reshape(-1)[:size].reshape(shape)

    def parse(self, x):
        """Invert sample: integer strings (P, s^L) -> levels, on x's device. Raises
        ValueError naming the first tuple that no rule gives."""
        levels = [self._strings(x).to(torch.uint8, copy=True)]
        for l in range(self.L):
            tuples = levels[l].unflatten(1, (-1, self.s))   # (P, n, s)
            code = tuple_codes(tuples, self.v)
            # find each tuple among the sorted rules
            rules = self.rules[l].flatten(0, 1).to(code.device)        # (v m, s)
            rules, order = tuple_codes(rules, self.v).sort()
            place = torch.searchsorted(rules, code).clamp(max=len(rules) - 1)
            wrong = (rules[place] != code).nonzero()        # rows of (string, tuple)
            if len(wrong):
                p, t = wrong[0].tolist()
                where = f"string {p}, level {l}, position {t * self.s}"
                raise ValueError(f"x: {where}: no rule gives {tuples[p, t].tolist()}")
            # rules stand in the order of their parents, m to each
            levels.append((order[place] // self.m).to(torch.uint8))
        return levels

    def _strings(self, x):
        x = whole_numbers("x", x, self.v)
        if x.ndim != 2 or x.shape[1] != self.s**self.L:
            raise ValueError(f"x: the shape must be (P, s^L) = (P, {self.s**self.L})")
        return x

    def swap(self, levels, l, kind, seed=0):
        """Replace, in every string, the tuple under one random level-l node by another
        valid one, and resample all below it (figures 5 and 13).

        kind "synonym": another rule of the same symbol; nothing from level l up changes.
        "generic": any other tuple, whose parent then stands at the node; nothing above it
        changes, so that no rule may give the new string. levels: what sample or parse returns.
        Returns new levels and the nodes, (P,) int64. A seed picks the same nodes for both kinds."""
        check_whole("l", l, 1, self.L)
        if kind not in ("synonym", "generic"):
            raise ValueError(f"kind: must be synonym or generic, not {kind!r:.20}")
        if kind == "synonym" and self.m == 1:
            raise ValueError("m: must be 2 or more, a single rule has no synonyms")
        rng, s, m, P = generator("swap", seed), self.s, self.m, len(levels[0])
        rules = [rule.numpy().reshape(-1, s) for rule in self.rules]   # (v m, s)
        swapped = [level.cpu().numpy().copy() for level in levels]

        # the tuple that stands there now, as a number below v m
        node = rng.integers(s ** (self.L - l), size=P)      # (P,)
        each = np.arange(P)
        there = swapped[l - 1].reshape(P, -1, s)[each, node]
        old = (there[:, None] == rules[l - 1]).all(2).argmax(1)

        # another one in its place: of the m with the same parent, or of all v m
        p = self.p.numpy()
        if kind == "synonym":
            new = old // m * m + draw_other(rng, p, old % m)
        else:
            new = draw_other(rng, np.tile(p / self.v, self.v), old)
        swapped[l][each, node] = new // m                   # its parent

        # and all below it, drawn afresh
        rule = new                                          # of the nodes on level k+1
        for k in reversed(range(l)):
            h = rules[k][rule].reshape(P, -1)               # (P, s^(l-k))
            swapped[k].reshape(P, -1, s ** (l - k))[each, node] = h
            rule = h.astype(int) * m + self._pick(rng, h.shape)
        device = levels[0].device
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
        """What a context vector tends to: (v, v) float64, entry [a, b] = P(node n of
        target_level is b | the t-th tuple of level l has the parent a); row a is 0 if a
        never stands there. Synonyms share it whatever the target, which is why clustering
        contexts finds the parents. The paper's targets are an element of a cousin
        (target_level = l), a token under a cousin (0), and the root label (L, n = 0).
        Raises ValueError, naming n, if the target lies within the tuple."""
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

    def contrast(self):
        """How far apart parents' contexts are: {target: list}, entry l the root mean
        square distance for level-l tuples, over all pairs of parents, all positions and
        all targets that cluster.py counts (for joint: the parent of a cousin tuple)."""
        v, s, L = self.v, self.s, self.L
        check_memory("depth", 24 * s ** (L - 1) * v**2, "contexts of the root")
        W = [self.transition(l) for l in range(L)]          # (s, v, v) each
        I = torch.eye(v, dtype=torch.float64)
        found = {"latent": [], "token": [], "root": [], "joint": []}

        # from the root down: the distribution of symbols, averaged over the nodes of a level,
        # and for target root P(root, symbol) of each node, since it differs between nodes
        mean = {L: I.mean(0)}                               # (v,) each
        with_root = I[None] / v                             # (n, v, v)
        for l in reversed(range(1, L)):
            mean[l] = mean[l + 1] @ W[l].mean(0)
            with_root = (with_root[:, None] @ W[l]).flatten(0, 1)
            found["root"].insert(0, distance_of_contexts(with_root.mT, I))

        # from the leaves up: a context is q D, q the distribution of the cousin's parent and D
        # the transition from it to one target; distances only need the mean of D D^T
        tokens = I
        for l in range(L - 1):
            latent = (W[l] @ W[l].mT).mean(0)
            tokens = (W[l] @ tokens @ W[l].mT).mean(0)
            places = itertools.permutations(range(s), 2)
            pairs = [self.siblings(l + 2, i, j, mean[l + 2]) for i, j in places]
            for target, inner in ("latent", latent), ("token", tokens), ("joint", I):
                found[target].append(distance_of_contexts(torch.stack(pairs), inner))
        return found

    # ------------------------------------------------------------------------------------
    # exact inference

    @torch.enable_grad()
    def posterior(self, x, visible):
        """P(symbol | the visible tokens) of every node, exactly, by sum-product up and down the
        tree: a list of float64 tensors (P, s^(L-l), v) on the CPU, one for every level l = 0..L.

        x: (P, s^L) integers, not read where hidden; visible: bool, (P, s^L) or (s^L,).
        Raises ValueError, naming a string, if no derivation gives its visible tokens."""
        v, s, m, L = self.v, self.s, self.m, self.L
        x, visible = whole_numbers("x", x).cpu(), torch.as_tensor(visible).cpu()
        if visible.dtype != torch.bool or visible.shape not in (x.shape, x.shape[1:]):
            raise ValueError(f"visible: must be bool, (P, {s**L}) or ({s**L},)")
        x = self._strings(x * visible)
        check_memory("x", self.posterior_bytes(len(x)), "exact inference")

        # up: how likely the tokens beneath a node are, given its symbol, up to a factor
        token = F.one_hot(x.long(), v).double()
        token = torch.where(visible.expand(x.shape)[:, :, None], token, 1.0)
        messages, log_evidence = [token.requires_grad_()], 0.0  # (P, s^L, v)
        for l in range(L):
            children = messages[l].unflatten(1, (-1, s))    # (P, n, s, v)
            rule = 1.0                                      # (P, n, v m)
            for k in range(s):
                symbol = self.rules[l][:, :, k].flatten().long()
                rule = rule * children[:, :, k].index_select(2, symbol)
            likely = rule.unflatten(2, (v, m)) @ self.p     # (P, n, v)
            total = likely.sum(2, keepdim=True)             # taken out, against underflow
            wrong = (total == 0).nonzero().tolist()         # [string, node, 0] each
            if wrong:
                raise ValueError(f"x: string {wrong[0][0]} has no derivation with its tokens")
            messages.append(likely / total)
            log_evidence = log_evidence + total.log().sum()
        log_evidence = log_evidence + messages[L].mean(2).log().sum()  # a uniform root

        # down: the evidence is linear in the likelihoods of any one node, so that the posterior
        # of its symbols is likely * d log(evidence) / d likely
        slopes = torch.autograd.grad(log_evidence, messages)
        return [(likely * slope).detach() for likely, slope in zip(messages, slopes)]

    def posterior_bytes(self, P):
        """What exact inference on P strings needs: the products over each rule's children."""
        return 16 * P * self.s ** (self.L - 1) * self.v * self.m * (2 * self.s + 1)


def distance_of_contexts(joint, inner):
    """Root mean square distance of contexts: joint (n, v, v) holds P(parent, symbol) at n
    places, inner (v, v) the scalar product of two rows. A parent that is never seen at a
    place gets the mean context there, as in cluster.py."""
    v, share = joint.shape[1], joint.sum(2, keepdim=True)   # (n, v, 1)
    mean = joint.sum(1, keepdim=True) / share.sum(1, keepdim=True)
    q = torch.where(share > 0, joint / share.clamp(min=1e-300), mean)
    # over all pairs, |q_a - q_b|^2 is on average 2 v/(v-1) times |q_a - their mean|^2
    away = q - q.mean(1, keepdim=True)
    squares = (away @ inner * away).sum(2).mean().clamp(min=0)
    return math.sqrt(2 * v / (v - 1) * squares.item())


def draw_other(rng, weight, old):
    """For every entry of old draw an index with probabilities weight, again and again while it is
    that entry: slow if one weight is nearly 1."""
    new = old.copy()
    while (same := np.flatnonzero(new == old)).size:
        new[same] = rng.choice(len(weight), len(same), p=weight)
    return new


def generator(stream, seed):
    """A numpy generator. seed: a whole number or a tuple of them. Streams of one seed, such as
    the rules and the strings, are independent if their names differ in the first 4 letters."""
    seed = seed if isinstance(seed, tuple) else (seed,)
    for part in seed:
        check_whole("seed", part, 0)
    # its length too, or (1,) and (1, 0) would be one seed
    name = int.from_bytes(stream.encode()[:4], "little")
    return np.random.default_rng([name, len(seed), *map(int, seed)])


@lru_cache
def several_picks(m):
    """(m^k, k): all ways in which k symbols pick one of m rules each, k = 8 at most."""
    k = max((k for k in (2, 4, 8) if m**k <= 2**14), default=1)
    return digits(np.arange(m**k), m, k).astype(np.min_scalar_type(m - 1))


def digits(codes, base, n):
    """(..., n): the n digits of every code in this base, the highest first."""
    powers = base ** np.arange(n, dtype=np.int64)[::-1]
    return codes[..., None] // powers % base


def tuple_codes(tuples, v):
    """(..., s) integer tuples -> (...) int64, the number that each spells in base v."""
    code = tuples[..., 0].to(torch.int64, copy=True)
    for k in range(1, tuples.shape[-1]):
        code.mul_(v).add_(tuples[..., k].long())            # in place: cluster's hot loop
    return code


def cousins(s, device="cpu"):
    """(s, s-1) int64: row i holds the child positions of the cousins of a tuple at i."""
    return torch.tensor([[j for j in range(s) if j != i] for i in range(s)], device=device)


# ----------------------------------------------------------------------------------------
# the score


def accuracy(estimate, truth, v):
    """Fraction of labels that are right under the best one-to-one matching of estimated
    ids with true symbols, 0..v-1; 0 if there are none. Both are integer tensors of one
    shape; a negative id means unknown and counts as wrong."""
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
    return best_matching(table.cpu().numpy()) / truth.numel()


def best_matching(table):
    """The largest sum of scores that one-to-one pairs of rows and columns can have.

    The Hungarian algorithm: rows join one by one, each by the cheapest augmenting path to a
    free column. On the path each row gives its column to the row before and takes the next.
    Then the costs are reduced by the distances found: no joined row has one below 0."""
    score = np.asarray(table, dtype=float)
    if score.ndim != 2 or not np.isfinite(score).all():
        raise ValueError("table: must be (rows, columns) of finite numbers")
    if score.shape[0] > score.shape[1]:
        score = score.T
    # one column more, the last, where a row waits until its path is found
    cost = np.pad(-score, ((0, 0), (0, 1)), constant_values=np.inf)
    rows, columns = cost.shape
    owner = np.full(columns, -1)                            # the row of each column
    for new in range(rows):
        # Dijkstra's search: the nearest column is done, then those next to its row
        column, owner[-1] = -1, new
        distance = np.full(columns, np.inf)
        distance[-1] = 0
        before = np.full(columns, -1)                       # the column before on the path
        done = np.zeros(columns, bool)
        while owner[column] >= 0:
            done[column] = True
            through = distance[column] + cost[owner[column]]
            nearer = ~done & (through < distance)
            distance[nearer], before[nearer] = through[nearer], column
            column = np.where(done, np.inf, distance).argmin()
        saved = distance[column] - distance[done]
        cost[owner[done]] -= saved[:, None]
        cost[:, done] += saved
        # along the path, each column takes the row of the one before it
        while column >= 0:
            owner[column] = owner[before[column]]
            column = before[column]
    held = np.flatnonzero(owner[:-1] >= 0)
    return float(score[owner[held], held].sum())


def linear_probe(features, labels, v):
    """Least squares of the one-hot labels on the features, with a little ridge: nothing to
    tune. features: (n, d) float; labels: (n,) integers below v. Returns a function from
    (..., d) features to (..., v) scores."""
    one_hot = F.one_hot(labels.long(), v).to(features)      # (n, v)
    mean, centre = features.mean(0), one_hot.mean(0)
    centred, n, d = features - mean, *features.shape
    if n < d:  # the dual form: the same weights from n equations instead of d
        gram, moment = centred @ centred.T / n, (one_hot - centre) / n
    else:
        gram, moment = centred.T @ centred / n, centred.T @ (one_hot - centre) / n
    # without the ridge, features that are copies of each other have no solution
    ridge = RIDGE * torch.eye(len(gram), dtype=torch.float64)
    weight = torch.linalg.solve(gram.cpu().double() + ridge, moment.cpu().double())
    weight = weight.to(features)
    weight = centred.T @ weight if n < d else weight        # (d, v)
    return lambda h: (h - mean) @ weight + centre


# ----------------------------------------------------------------------------------------
# what the scripts share: checks, settings, files and command lines


def check_whole(name, value, low, high=2**31 - 1):
    """Raise ValueError, naming the argument, unless value is a whole number in range."""
    # numpy's whole numbers are Integral too, and unfortunately True is
    integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not integral or not low <= value <= high:
        raise ValueError(f"{name}: must be a whole number from {low} to {high}")


def whole_numbers(name, x, v=None):
    """x (tensor, array or lists) as a tensor of integers, from 0 to v-1 if v is given. Raises
    ValueError, naming the argument, if it holds anything else."""
    try:
        x = torch.as_tensor(x)
        torch.iinfo(x.dtype)                # a TypeError unless x holds integers
        if x.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32):
            x = x.long()                    # torch has no min of uint16, uint32 and uint64
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{name}: must hold whole numbers, in rows of one length") from None
    if v is not None and x.numel() > 0:
        low, high = int(x.min()), int(x.max())
        if low < 0 or high >= v:
            wrong = low if low < 0 else high
            raise ValueError(f"{name}: must hold symbols 0..{v - 1}, not {wrong}")
    return x


def check_sizes(v, s, m=1, L=2):
    """Raise ValueError, naming the size, unless a grammar of these can be stored: a symbol
    in a byte, a tuple in 63 bits, a string of at most 2^24 tokens."""
    check_whole("v", v, 2, 256)
    check_whole("s", s, 2, math.ceil(63 / math.log2(v)) - 1)
    check_whole("m", m, 1, v ** (s - 1))
    check_whole("depth", L, 2, int(24 / math.log2(s) + 1e-9))
    # numpy lists all v^s tuples to draw v m of them, unless v^s is over 50 v m
    drawn = 8 * min(v**s, 50 * v * m)
    check_memory("m", drawn + 16 * v * m * s * (L + 3), "the rules")


def check_memory(name, need, what):
    """Raise ValueError, naming the argument, if work would need more than MEMORY bytes."""
    if need > MEMORY:
        needed, there = need / 2**30, MEMORY / 2**30
        raise ValueError(f"{name}: {what} would need {needed:.3g} GiB, {there:.3g} at most")


def strings_bytes(P, s, L):
    """Bytes of P derivations, one for every node of every level."""
    return P * sum(s**l for l in range(L + 1))


def as_strings(x, v, s, L=None):
    """Anyone's strings, of symbols 0..v-1 -> ((P, s^L) uint8 tensor on x's device, L).
    L: the depth that they must have, if given. Raises ValueError, naming x."""
    check_sizes(v, s)
    x = whole_numbers("x", x, v)
    length = x.shape[1] if x.ndim == 2 and len(x) else 0    # 0: refused below
    depth = round(math.log(max(length, 1), s))
    if depth < 2 or length != s**depth or L not in (None, depth):
        wanted = f"{s}^L), P >= 1, L >= 2" if L is None else f"{s**L}), P >= 1"
        raise ValueError(f"x: must be (P, {wanted}, not {tuple(x.shape)}")
    return x.to(torch.uint8), depth


def check_runs(xs, v, s, seeds, device=None):
    """Check the data of several runs. xs: for each run its strings (P, s^L), or a Grammar.

    Returns (runs, L, P, device): runs, xs with the strings as uint8 tensors on the device; P, the
    most strings of a run, 0 if all are grammars. device None: that of the first strings, else
    the CPU. Raises ValueError, naming the argument, unless all have the given v, s and one L."""
    runs, sizes = [], set()
    for x, seed in zip(xs, seeds):
        check_whole("seed", seed, 0)
        if isinstance(x, Grammar):
            sizes.add((x.v, x.s, x.L))
        else:
            x, L = as_strings(x, v, s)
            sizes.add((v, s, L))
        runs.append(x)
    if len(seeds) != len(xs) or not runs:
        counts = f"{len(seeds)} for {len(xs)}"
        raise ValueError(f"seeds: must be as many as xs, and 1 or more, not {counts}")
    L = max(L for _, _, L in sizes)
    if sizes != {(v, s, L)}:
        raise ValueError(f"x: all runs must have v = {v}, s = {s} and one length")
    strings = [x for x in runs if not isinstance(x, Grammar)]
    if device is None:
        device = strings[0].device if strings else "cpu"
    check_device(device)
    runs = [x if isinstance(x, Grammar) else x.to(device) for x in runs]
    return runs, L, max(map(len, strings), default=0), torch.device(device)


def check_device(device):
    """Raise ValueError, naming device, unless this machine has it."""
    there = ["cpu"]
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there += ["mps", "mps:0"]
    if str(device) not in there:
        raise ValueError(f"device: must be {' or '.join(there)} on this machine")


class Score(NamedTuple):
    """What one run of the sweep has learned, measured on fresh strings."""

    accuracy: list      # a float for every level 1..L-1, one more if the root is reported
    collapsed: list     # a bool for each of these: fewer than v symbols are in use
    floor: list = None  # the accuracy before training, for each; None: not measured
    diverged: int = 0   # the first step whose loss or gradient was not finite, or 0


class Setting(NamedTuple):
    """One row of a learner's table of settings, read alike in Python and as a flag."""

    name: str
    kind: Callable    # reads the value from text: whole, real, choice or switch
    default: object
    paper: object     # what the paper uses; None where it has no such thing
    help: str


def read_settings(table, presets, given):
    """All settings as attributes of one object: the defaults, changed by a preset (the
    first if none is given), changed by what is given, {name: value}."""
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
    return argparse.Namespace(**defaults | presets[read.pop("preset")] | read)


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
        words = getattr(row.kind, "words", None)
        metavar = "{" + ",".join(words) + "}" if words else None
        # a switch without a value is true
        bare = {"nargs": "?", "const": True} if row.kind is switch else {}
        parser.add_argument(flag, type=row.kind, metavar=metavar, help=text, **bare)


def given_settings(table, args):
    """{name: value} of the flags of add_settings that were given."""
    names = ["preset", *(row.name for row in table)]
    given = {name: getattr(args, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def option(read, fits, allowed):
    """An argparse type: what read makes of a text, if it is a value that fits."""

    def value_of(text):
        try:
            value = read(text)
            if fits(value):
                return value
        except (ValueError, KeyError):
            pass
        raise argparse.ArgumentTypeError(f"must be {allowed}, not {text[:20]!r}")

    return value_of


def real(low, high, read=float, name="a number"):
    fits = lambda number: low <= number <= high
    return option(read, fits, f"{name} from {low} to {high}")


def whole(low, high=2**31 - 1):
    return real(low, high, int, "a whole number")


def choice(*words):
    kind = option(str, lambda word: word in words, f"one of {', '.join(words)}")
    kind.words = words                      # for --help
    return kind


def can_be_written(path):
    if os.path.exists(path):
        return not os.path.isdir(path) and os.access(path, os.W_OK)
    folder = os.path.dirname(os.path.realpath(path))
    return path and os.path.isdir(folder) and os.access(folder, os.W_OK)


out_file = option(str, can_be_written, "a file in a folder that exists and can be written to")
TRUTH = {"true": True, "false": False}
switch = option(lambda text: TRUTH[text.lower()], lambda value: True, "true or false")


class Parser(argparse.ArgumentParser):
    """argparse, but bad input gives one line that names the flag, and exit code 2."""

    def __init__(self, doc):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=form, allow_abbrev=False)

    def error(self, message):
        if message.startswith("unrecognized arguments: "):
            near = difflib.get_close_matches(message.split()[2], self._option_string_actions, 1)
            message += f"; there is {near[0]}" if near else ""
        self.exit(2, f"{self.prog}: {message}\n")


def add_grammar_flags(parser, samples=None):
    """The flags of one grammar and one sample, in grammar.py and the learners. samples: the
    default of --samples; if None, there is neither --samples nor --device."""
    add = parser.add_argument
    add("--v", type=whole(2, 256), default=8, help="symbols per level (default 8)")
    add("--s", type=whole(2, 62), default=2, help="children per symbol (default 2)")
    add("--m", type=whole(1), default=3, help="rules per symbol, at most v^(s-1) (default 3)")
    add("--depth", type=whole(2, 24), default=3, help="L, levels above the tokens (default 3)")
    add("--zipf", type=real(0, 10), default=0.0,
        help="rule j has a probability ~ (j+1)^-zipf (default 0: uniform)")
    add("--seed", type=whole(0), default=0, help="of all that is random (default 0)")
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
    """auto, cpu, cuda, cuda:N or mps -> a device's name; a missing one ends the script."""
    if name == "auto":  # never mps, which we have not tried
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        check_device(name)
    except ValueError as error:
        parser.error(f"argument --{error}, or auto")
    return name


def check_files(args):
    """Raise ValueError, naming the flag, if two of --trace, --save and --resume are the same
    file, or if --save or --resume exists and is no regular file."""
    given = [name for name in ("trace", "save", "resume") if getattr(args, name)]
    for name in given:
        path = getattr(args, name)
        if name != "trace" and os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{name}: must be a file, not {path}")
    for one, other in itertools.combinations(given, 2):
        if os.path.realpath(getattr(args, one)) == os.path.realpath(getattr(args, other)):
            raise ValueError(f"{other}: must be another file than that of --{one}")


def write_whole(path, write):
    """Write a file atomically: write(file) fills a binary file beside it, under a unique name,
    which then replaces it. Raises OSError if that fails."""
    path = os.path.realpath(path)  # what a link points to is replaced, not the link
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"{path} is not a file")
    part = f"{path}.{uuid.uuid4().hex}.part"
    try:
        with open(part, "wb") as file:
            write(file)
        os.replace(part, path)
    except RuntimeError:                    # torch.save raises it on a full disk
        raise OSError(f"{path} cannot be written") from None
    finally:
        if os.path.exists(part):
            os.remove(part)


def open_trace(path, columns, step):
    """Open a CSV file for the rows of a run from this step on; path None drops them. At step 1,
    or if it has other columns, the file is emptied; else the rows of earlier steps stay."""
    header = ",".join(columns)
    if path is None or step == 1 or not os.path.exists(path):
        file = open(path or os.devnull, "w")
        print(header, file=file, flush=True)
        return file
    with open(path, errors="replace") as file:
        lines = file.read().split("\n")[:-1]    # a last line without an end was cut by a kill
    earlier = {str(n) for n in range(step)} if lines[:1] == [header] else ()
    rows = [row for row in lines if row.partition(",")[0] in earlier]
    text = "\n".join([header, *rows]) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))
    return open(path, "a")


class Checkpoint:
    """The state of a training in a file, from which a killed one continues; on a CPU the result
    is the same to the byte. If file is None, load and save do nothing.

    parts: {name: what has a state_dict}; generators: the torch.Generators that steps draw
    from; xs: the strings or grammars of all runs; about: {name: number or text}, what else
    must be the same when the training continues."""

    def __init__(self, file, parts, generators, xs, about):
        self.file, self.parts, self.generators = file, parts, generators
        self.written = time.monotonic()
        self.about = dict(about)
        if file is not None:
            self.about["strings"] = digest(xs)

    def load(self):
        """Set all parts and generators to the state in the file. Returns (step, rest) as save
        got them, or (0, {}) if there is no file yet. Raises ValueError, naming resume, if the
        file is of another training."""
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
            name = changed[0]
            both = f"{old.get(name)!r:.20} there, {self.about[name]!r:.20} here"
            reason = f"is of another run: {name} is {both}"
        except Exception as error:  # whatever foreign bytes lead to
            reason = "holds no training: " + str(error).partition("\n")[0]
        raise ValueError(f"resume: {self.file} {reason}")

    def save(self, step, rest, last=False):
        """Write the state after a step if SAVE_EVERY seconds have passed since the last time, or
        if it is the last step. rest: a dict of what else the loop needs to continue."""
        if self.file is None:
            return
        if last or time.monotonic() - self.written >= SAVE_EVERY:
            states = {name: part.state_dict() for name, part in self.parts.items()}
            generators = [generator.get_state() for generator in self.generators]
            saved = {"about": self.about, "step": step, "rest": rest}
            saved |= {"states": states, "generators": generators}
            write_whole(self.file, partial(torch.save, saved))
            self.written = time.monotonic()


def digest(xs):
    """The SHA-256 of a list of strings (P, T) and grammars, as hex digits."""
    sha = hashlib.sha256()
    for x in xs:
        parts = [*x.rules, x.p] if isinstance(x, Grammar) else [x]
        for part in parts:
            sha.update(str(part.shape).encode())
            sha.update(part.cpu().contiguous().numpy())
    return sha.hexdigest()


def terminate(number, frame):
    """What SIGTERM does: the same as Ctrl-C, with a name that tells them apart."""
    raise KeyboardInterrupt("SIGTERM")


def run_script(main):
    """Call a script's main. If Ctrl-C, SIGTERM, a full disk or too little memory ends it, print
    one line and no traceback; if the reader has gone (`| head`), print nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")    # None if the caller closed it
        setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):  # a terminal may lack letters of a path
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
        sys.stdout.flush()
        return
    except KeyboardInterrupt as stop:
        code, line = 1 if stop.args else 130, "stopped"
        print(file=sys.stderr)  # the line that ^C or a progress bar stands on ends here
    except BrokenPipeError:
        # Python flushes stdout once more at exit, and that must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:  # a full disk among them
        code, line = 1, f"{error.filename or 'output'}: {error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        # torch has a class for lack of memory on a GPU; on a CPU only the message tells
        known = MemoryError, torch.OutOfMemoryError
        if not isinstance(error, known) and "not enough memory" not in str(error):
            raise
        code, line = 1, "out of memory; fewer or shorter strings need less"
    print(f"{os.path.basename(sys.argv[0])}: {line}", file=sys.stderr)
    raise SystemExit(code)


# ----------------------------------------------------------------------------------------
# alone


def show(grammar, levels):
    """Print the rules, and a derivation, each symbol above the first of its children."""
    for l in reversed(range(grammar.L)):
        for a, rules in enumerate(grammar.rules[l].tolist()):
            tuples = " | ".join(" ".join(map(str, rule)) for rule in rules)
            print(f"level {l + 1} -> {l}   {a:3} -> {tuples}")
        print()
    cell = 1 + len(str(grammar.v - 1))                      # columns for a token
    for l, h in reversed(list(enumerate(levels))):
        width = cell * grammar.s**l                         # columns for a node
        symbols = h[0, : 1 + 160 // width].tolist()         # as many as a screen shows
        print(f"level {l}  " + "".join(f"{a:<{width}}" for a in symbols).rstrip())


def save_strings(path, grammar, levels):
    """Write levels, rules and zipf as an .npz, which Grammar.load reads the rules from."""
    arrays = {f"level{l}": level.numpy() for l, level in enumerate(levels)}
    arrays |= {f"rules{l}": rule.numpy() for l, rule in enumerate(grammar.rules)}
    arrays["zipf"] = np.array(grammar.zipf)
    write_whole(path, lambda file: np.savez_compressed(file, **arrays))


def show_contrast(grammars, path):
    """Print Grammar.contrast, root mean square over grammars of one size, and the number of
    strings P at which sampling noise is as large. path: of a CSV file, or None."""
    g, found = grammars[0], [grammar.contrast() for grammar in grammars]
    print(f"{g}, {len(grammars)} of them: how far apart parents' contexts are,")
    print("and P where the noise sqrt(v m / P) is as large\n")
    print("level  target  distance         P")
    lines = ["v,s,m,L,zipf,seeds,target,level,contrast,P_noise"]  # of the CSV file
    sizes = f"{g.v},{g.s},{g.m},{g.L},{g.zipf:g},{len(grammars)}"
    for level, target in itertools.product(range(1, g.L), found[0]):
        # parents on this level are the parents of tuples one level below
        squares = [one[target][level - 1] ** 2 for one in found]
        contrast = math.sqrt(sum(squares) / len(squares))
        P = g.v * g.m / contrast**2 if contrast else math.inf
        print(f"{level:5}  {target:6}  {contrast:8.3f}  {P:8.3g}")
        lines.append(f"{sizes},{target},{level},{contrast:.6g},{P:.6g}")
    if path:
        text = "\n".join(lines) + "\n"
        write_whole(path, lambda file: file.write(text.encode()))


def sample_plainly(grammar, P):
    """The sampler in int64, in one piece: the yardstick of --bench. Uniform rules only."""
    levels = [torch.randint(grammar.v, (P, 1))]
    for rules in reversed(grammar.rules):
        pick = torch.randint(grammar.m, levels[0].shape)
        levels.insert(0, rules.long()[levels[0], pick].reshape(P, -1))
    return levels


def bench(grammar):
    """Print tokens per second on one core, the best of five, of both samplers."""
    torch.set_num_threads(1)
    P = max(1, 2**24 // grammar.s**grammar.L)
    samplers = {"this": grammar.sample, "plain int64": partial(sample_plainly, grammar)}
    for name, sampler in samplers.items():
        seconds = min(timeit.repeat(partial(sampler, P), number=1, repeat=5))
        speed = P * grammar.s**grammar.L / seconds / 1e6
        print(f"{name:11} sampler {speed:8.0f} million tokens per second")


def main():
    parser = Parser(__doc__)
    add_grammar_flags(parser)
    add = parser.add_argument
    add("--samples", type=whole(1), default=1, help="P, derivations to draw (default 1)")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--save", metavar="FILE.npz", type=out_file, help="write strings, levels and rules")
    one("--bench", action="store_true", help="time the sampler instead")
    one("--contrast", action="store_true", help="how far apart parents' contexts are instead")
    add("--csv", metavar="FILE", type=out_file, help="with --contrast: write it to a file")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--seeds", type=whole(1, 1000), help="with --contrast: average so many grammars")
    one("--load", metavar="FILE", help="take the rules from an .npz or .npy instead")
    args = parser.parse_args()
    # the other tasks have no use for these two
    for flag in ("seeds", "csv"):
        if getattr(args, flag) is not None and not args.contrast:
            parser.error(f"argument --{flag}: only goes with --contrast")

    try:
        if args.load is not None:
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
    except ValueError as error:
        parser.error(f"argument --{error}")
    if args.save:
        save_strings(args.save, grammars[0], levels)
        print(f"wrote {args.samples} strings, their levels and the rules")
    else:
        show(grammars[0], levels)


if __name__ == "__main__":
    run_script(main)
