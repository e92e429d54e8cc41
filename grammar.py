"""
The ground truth: the Random Hierarchy Model (RHM), a random context-free grammar on a
fixed s-ary tree of depth L.

    python grammar.py --depth 3                          the rules, and one derivation
    python grammar.py --samples 1000 --save rhm.npz      strings, levels and rules
    python grammar.py --depth 6 --contrast --seeds 20    why own latents win, in numbers

Level 0 is the visible string of s^L tokens, level L is the root. A symbol of level l+1, one of v,
has m production rules, each an s-tuple of level-l symbols, and no tuple has two parents. Tuples
with the same parent are *synonyms*: to learn the grammar is to find them on every level.
"""

import argparse
import itertools
import math
import operator
import os
import sys
import time
import zlib
from dataclasses import dataclass, field, fields
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

CHUNK_TOKENS = 2**18    # tokens sampled at a time: they stay in the cache
MOST_TOKENS = 2**34     # of one sample
TEST_STRINGS = 4096     # fresh strings on which a learner is scored
RIDGE = 1e-3            # penalty of the linear probe, for features of size about 1
SAVE_EVERY = 60         # seconds, at least, between two writes of a training's state
FILES = {               # that the networks' scripts write
    "trace": "append what is measured during training to this CSV file",
    "resume": "go on from this file, and write the state of training to it: student, teacher, ...",
}


# ---- the rules, and strings from them --------------------------------------------------


class Grammar:
    """The rules of one RHM. rules[l] is a (v, m, s) uint8 tensor: rules[l][a, j] is the j-th
    tuple of level-l symbols that the level-(l+1) symbol a may turn into, taken with probability
    p[j] ~ (j+1)^-zipf. Raises ValueError that begins with the wrong size's name, depth for L."""

    def __init__(self, v, s, m, L, rules, zipf=0.0):
        v, s, m, L = check_sizes(v, s, m, L)
        check_range("zipf", zipf, 0, 10)
        self.v, self.s, self.m, self.L, self.zipf = v, s, m, L, float(zipf)
        weight = torch.arange(1, m + 1).double() ** -self.zipf
        self.p = weight / weight.sum()                      # (m,) float64
        rules = torch.stack([torch.as_tensor(rule) for rule in rules])
        if rules.shape != (L, v, m, s) or rules.is_floating_point():
            raise ValueError(f"rules: must be {L} levels of integers ({v}, {m}, {s})")
        for symbol in int(rules.min()), int(rules.max()):
            check_range("rules", symbol, 0, v - 1)
        if any(len(tuple_codes(rule, v).unique()) < v * m for rule in rules):
            raise ValueError("rules: all tuples of a level must be different")
        # a copy: nobody else can change it
        self.rules = list(rules.to("cpu", torch.uint8, copy=True))

    def __repr__(self):
        return "Grammar(v={v}, s={s}, m={m}, L={L}, zipf={zipf:g})".format(**vars(self))

    @staticmethod
    def random(v, s, m, L, seed=0, zipf=0.0):
        """Draw v m distinct s-tuples for every level, uniformly, and deal m to each of the v
        parents. seed: a whole number or a tuple of them."""
        v, s, m, L = check_sizes(v, s, m, L)
        rng, rules = generator("rules", seed), []
        for _ in range(L):
            # in random order, so that any m in a row are a random set
            codes = rng.choice(v**s, size=v * m, replace=False)
            symbols = np.unravel_index(codes, [v] * s)      # the digits of each code in base v
            rules.append(np.stack(symbols, -1).reshape(v, m, s))
        return Grammar(v, s, m, L, rules, zipf)

    @staticmethod
    def load(file):
        """From a file of `--save`; or an .npz of arrays (v, m, s), named rules0 or rules_0 and so
        on, or else in this order; or an .npy (L, v, m, s). rules[0] makes the tokens: turn around
        what is numbered from the root. Raises ValueError, naming load."""
        try:
            found = np.load(file, allow_pickle=False)
            names = getattr(found, "files", range(len(found)))
            zipf = float(found["zipf"]) if "zipf" in names else 0.0
            named = [name for name in names if str(name).startswith("rules")]
            named.sort(key=lambda name: int(name.lstrip("rules_")))
            rules = [found[name] for name in named or names]
            v, m, s = rules[0].shape
            return Grammar(v, s, m, len(rules), rules, zipf)
        except Exception as error:  # a foreign file can raise anything
            what = "rules (v, m, s) by level, those that make the tokens first"
            raise ValueError(f"load: {file} holds no {what}: {error!r:.150}") from None

    def save(self, file, levels):
        """Write strings, their hidden levels and the rules as an .npz, for load."""
        arrays = {f"level{l}": level.cpu().numpy() for l, level in enumerate(levels)}
        arrays |= {f"rules{l}": rule.numpy() for l, rule in enumerate(self.rules)}
        with open(file, "wb") as opened:                    # numpy would add .npz to a name
            np.savez_compressed(opened, **arrays, zipf=self.zipf)

    def sample(self, P, seed=0, device="cpu", without=None):
        """Sample P derivations: the root is uniform, and every symbol picks one of its rules,
        independently. Returns levels, L+1 uint8 tensors, levels[l] of shape (P, s^(L-l)):
        levels[0] are the strings, levels[L] the root labels. Raises ValueError.

        A seed gives the same strings on every device; a smaller P gives the first of them.
        without: a level 1..L, whose symbols use rule 1 in place of rule 0: a probe fitted on
        such strings can be tested on synonyms that it has not seen."""
        s, m, L = self.s, self.m, self.L
        check_range("samples", P, 1, MOST_TOKENS // s**L)
        rules = [rule.numpy().reshape(-1, s).copy() for rule in self.rules]    # (v m, s)
        if without is not None:
            check_range("without", without, 1, L)
            rules[without - 1][0::m] = rules[without - 1][1::m]

        rng = generator("strings", seed)
        levels = [np.empty((P, s ** (L - l)), np.uint8) for l in range(L + 1)]
        # whole chunks are drawn, so that a smaller sample is the start of a larger one
        chunk = max(1, CHUNK_TOKENS // s**L)
        for start in range(0, P, chunk):
            h = rng.integers(self.v, size=(chunk, 1), dtype=np.uint8)
            levels[L][start : start + chunk] = h[: P - start]
            # from the root down, every symbol picks one of its rules
            for l in reversed(range(L)):
                rule = h.astype(np.int64) * m + self.pick(rng, h.shape)
                h = rules[l].take(rule, axis=0).reshape(chunk, -1)
                levels[l][start : start + chunk] = h[: P - start]
        return [torch.from_numpy(level).to(device) for level in levels]

    def pick(self, rng, shape):
        """Draw which of the rules 0..m-1 each symbol uses: an integer array of this shape."""
        if self.zipf:
            ends = self.p.cumsum(0)[:-1].numpy()
            return np.searchsorted(ends, rng.random(shape), side="right")
        return rng.integers(self.m, size=shape, dtype=np.min_scalar_type(self.m - 1))

    def parse(self, x):
        """Invert sample: integer strings (P, s^L) -> levels, on x's device. Raises ValueError,
        naming the first tuple that no rule gives."""
        levels = [as_strings(x, self.v, self.s, self.L)[0]]
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

    def swap(self, levels, l, kind, seed=0):
        """Replace, in every string, the tuple under one random level-l node by another valid one,
        and resample all below it (figures 5 and 13). Returns new levels and the nodes, (P,) int64;
        a seed picks the same for both kinds.

        kind "synonym": another rule of the same symbol. "generic": any other tuple, whose parent
        then stands at the node; nothing above changes, so that no rule may give the new string."""
        check_range("l", l, 1, self.L)
        check_range("m", self.m, 2 if kind == "synonym" else 1, self.v ** (self.s - 1))
        check_word("kind", kind, ("synonym", "generic"))
        rng, s, m, P = generator("swap", seed), self.s, self.m, len(levels[0])
        rules = [rule.numpy().reshape(-1, s) for rule in self.rules]   # (v m, s)
        swapped = [level.cpu().numpy().copy() for level in levels]
        each, node = np.arange(P), rng.integers(s ** (self.L - l), size=P)
        there = swapped[l - 1].reshape(P, -1, s)[each, node]           # (P, s)

        # draw a tuple, by its number below v m, until it is another one
        parent, rule, same = swapped[l][each, node].astype(np.int64), each.copy(), each
        while same.size:
            if kind == "generic":
                parent[same] = rng.integers(self.v, size=same.size)
            rule[same] = parent[same] * m + self.pick(rng, same.size)
            same = same[(rules[l - 1][rule[same]] == there[same]).all(1)]
        swapped[l][each, node] = parent

        # and all below it, drawn afresh; rule: of the nodes on level k+1
        for k in reversed(range(l)):
            h = rules[k][rule].reshape(P, -1)               # (P, s^(l-k))
            swapped[k].reshape(P, -1, s ** (l - k))[each, node] = h
            rule = h.astype(np.int64) * m + self.pick(rng, h.shape)
        *swapped, node = (torch.from_numpy(h).to(levels[0].device) for h in (*swapped, node))
        return swapped, node

    # ---- the population: what an infinite sample would show, from the rules alone ------

    def transition(self, l):
        """(s, v, v) float64: [k, a, b] is P(the k-th child is b | a level-(l+1) symbol is a)."""
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
        """(v, v) float64: P(i-th child is a, j-th is b) under a level-c symbol drawn from p."""
        rules = self.rules[c - 1].long()                    # (v, m, s)
        weight = p[:, None] * self.p                        # (v, m)
        pair = torch.zeros(self.v, self.v, dtype=torch.float64)
        return pair.index_put_((rules[:, :, i], rules[:, :, j]), weight, accumulate=True)

    def context(self, l, t, target_level, n):
        """What a context vector tends to: (v, v) float64, entry [a, b] = P(node n of target_level
        is b | the t-th tuple of level l has the parent a); row a is 0 if a never stands there.
        The paper's targets are an element of a cousin (target_level = l), a token under a cousin
        (0), and the root label (L, n = 0). Raises ValueError, naming what is out of range."""
        joint = self.joint(l, t, target_level, n)
        return joint / joint.sum(1, keepdim=True).clamp(min=1e-300)

    def joint(self, l, t, target_level, n):
        """(v, v) float64: as context, but P(the parent is a, the target is b)."""
        s, L = self.s, self.L
        check_range("l", l, 0, L - 1)
        check_range("t", t, 0, s ** (L - l - 1) - 1)
        check_range("target_level", target_level, 0, L)
        check_range("n", n, 0, s ** (L - target_level) - 1)
        # climb to the lowest common ancestor, on level c, and see what it is
        c = max(l + 1, target_level)
        while t // s ** (c - l - 1) != n // s ** (c - target_level):
            c += 1
        if c == l + 1 > target_level:
            raise ValueError(f"n: node {n} lies within tuple {t} of level {l}")

        p = self.marginal(c, t // s ** (c - l - 1))
        if c == target_level:                               # the target is an ancestor
            return (p[:, None] * self.descend(c, l + 1, t)).T
        # the two branches share one rule
        i, j = t // s ** (c - l - 2) % s, n // s ** (c - 1 - target_level) % s
        up, down = self.descend(c - 1, l + 1, t), self.descend(c - 1, target_level, n)
        return up.T @ self.siblings(c, i, j, p) @ down

    def contrast(self):
        """How far apart parents' contexts are: {target: list}, entry l the root mean square
        distance for level-l tuples, over all pairs of parents, all positions and all targets that
        cluster.py counts (for joint: the parent of a cousin tuple)."""
        s, L = self.s, self.L
        found = {"latent": [], "token": [], "root": [], "joint": []}
        for l, (target, distances) in itertools.product(range(L - 1), found.items()):
            level = {"latent": l, "token": 0, "root": L, "joint": l + 1}[target]
            size = s ** max(0, l + 1 - level)               # how many targets a cousin has
            tables = {}                                     # P(parent, target), place by place
            for t in range(s ** (L - l - 1)):
                family = t // s * s * size                  # its first target
                nodes = [n for n in range(family, family + s * size) if n // size != t]
                if target == "root":
                    nodes = [0]
                for e, n in enumerate(nodes):
                    # all families count in one table, but the root has one for each t
                    place = (t if target == "root" else t % s, e)
                    tables[place] = tables.get(place, 0) + self.joint(l, t, level, n)
            tables = torch.stack([*tables.values()])        # (places, v, v)
            times, mean = tables.sum(2, keepdim=True), tables.mean(1, keepdim=True)
            # a parent that never stands there gets the mean
            phi = torch.where(times > 0, tables / times, mean / mean.sum(2, keepdim=True))
            pairs = torch.pdist(phi.permute(1, 0, 2).flatten(1))
            distances.append((pairs.square().mean() / len(phi)).sqrt().item())
        return found

    # ---- exact inference ---------------------------------------------------------------

    @torch.enable_grad()
    def posterior(self, x, visible):
        """P(symbol | the visible tokens) of every node, exactly, by sum-product up and down the
        tree: a list of float64 tensors (P, s^(L-l), v) on the CPU, one for every level l = 0..L.

        x: (P, s^L) integers, not read where hidden; visible: bool, (P, s^L) or (s^L,).
        Raises ValueError, naming a string, if no derivation gives its visible tokens."""
        v, s, m, L = self.v, self.s, self.m, self.L
        x, visible = torch.as_tensor(x).cpu(), torch.as_tensor(visible).cpu()
        x, _ = as_strings(x * visible, v, s, L)

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
        # what should be 0 may come out as -1e-17, of which there is no logarithm
        return [(likely * slope).detach().clamp(min=0) for likely, slope in zip(messages, slopes)]


def check_sizes(v, s, m, L):
    """The four as Python's integers. Raises ValueError, naming the size, unless a grammar of these
    can be stored: a symbol in a byte, a tuple in 63 bits, a string of at most 2^24 tokens."""
    v, s, m, L = map(operator.index, (v, s, m, L))          # numpy's integers overflow
    check_range("v", v, 2, 256)
    check_range("s", s, 2, min(32, math.ceil(63 / math.log2(v)) - 1))
    check_range("m", m, 1, v ** (s - 1))
    check_range("depth", L, 2, int(24 / math.log2(s) + 1e-9))
    return v, s, m, L


def check_range(name, number, low, high):
    if not low <= number <= high:
        raise ValueError(f"{name}: must be from {low} to {high}, not {number}")


def check_word(name, word, allowed):
    if word not in allowed:
        raise ValueError(f"{name}: must be {' or '.join(allowed)}, not {word}")


def generator(stream, seed):
    """A numpy generator. seed: a whole number or a tuple of them. Streams of one seed, such as the
    rules and the strings, are independent if their names differ in the first 4 letters."""
    seed = seed if isinstance(seed, tuple) else (seed,)
    for part in seed:
        check_range("seed", part, 0, 2**64 - 1)
    # its length too, or (1,) and (1, 0) would be one seed
    name = int.from_bytes(stream.encode()[:4], "little")
    return np.random.default_rng([name, len(seed), *map(operator.index, seed)])


def tuple_codes(tuples, v):
    """(..., s) integer tuples -> (...) int64, the number that each spells in base v."""
    code = tuples[..., 0].long()
    for k in range(1, tuples.shape[-1]):
        code = code * v + tuples[..., k]
    return code


def cousins(s, device="cpu"):
    """(s, s-1) int64: row i holds the child positions of the cousins of a tuple at i."""
    return torch.tensor([[j for j in range(s) if j != i] for i in range(s)], device=device)


# ---- the score -------------------------------------------------------------------------


def accuracy(estimate, truth, v):
    """Fraction of labels that are right under the best one-to-one matching of estimated ids with
    true symbols, 0..v-1. Both are integer tensors of one shape; a negative id counts as wrong."""
    ids = max(v, int(estimate.max()) + 1)
    # how often each id stands for each symbol
    known = estimate >= 0
    cells = estimate[known].long() * v + truth[known]
    table = torch.bincount(cells, minlength=ids * v).reshape(ids, v)
    return best_matching(table.cpu().numpy()) / truth.numel()


def best_matching(table):
    """The largest sum of scores that one-to-one pairs of rows and columns can have: the Hungarian
    algorithm, in which every row joins by the cheapest augmenting path to a free column."""
    score = np.asarray(table, dtype=float)
    if score.shape[0] > score.shape[1]:
        score = score.T
    # one column more, the last, where a row waits until its path is found
    cost = np.pad(-score, ((0, 0), (0, 1)), constant_values=np.inf)
    rows, columns = cost.shape
    owner = np.full(columns, -1)                            # the row of each column
    for new in range(rows):
        column, owner[-1] = -1, new
        # Dijkstra's search: the nearest column is done, then those next to its row
        distance, before = np.full(columns, np.inf), np.full(columns, -1)
        done, distance[-1] = np.zeros(columns, bool), 0
        while owner[column] >= 0:
            done[column] = True
            through = distance[column] + cost[owner[column]]
            nearer = ~done & (through < distance)
            distance[nearer], before[nearer] = through[nearer], column
            column = np.where(done, np.inf, distance).argmin()
        # the potentials: reduced by the distances, no cost of a joined row is below 0
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
    """Least squares of the one-hot labels on the features, with a little ridge. features: (n, d)
    float; labels: (n,) integers below v. Returns a function from (..., d) to (..., v) scores."""
    one_hot = F.one_hot(labels.long(), v).to(features)      # (n, v)
    mean, centre = features.mean(0), one_hot.mean(0)
    centred, (n, d) = features - mean, features.shape
    # without the ridge, features that are copies of each other have no solution
    gram = (centred.T @ centred / n).cpu().double() + RIDGE * torch.eye(d, dtype=torch.float64)
    moment = (centred.T @ (one_hot - centre) / n).cpu().double()
    weight = torch.linalg.solve(gram, moment).to(features)  # (d, v)
    return lambda h: (h - mean) @ weight + centre


# ---- what the learners and their scripts share: strings, settings, flags, files --------


def as_strings(x, v, s, L=None):
    """Anyone's strings, of symbols 0..v-1: an integer tensor, an array, or a list of either ->
    ((P, s^L) uint8 tensor on x's device, L). L: the depth they must have. Raises ValueError."""
    check_range("v", v, 2, 256)
    check_range("s", s, 2, 32)
    if not torch.is_tensor(x):
        x = np.asarray(x)
        # torch takes no foreign byte orders, and no reversed views
        x = torch.from_numpy(x.astype(np.int64 if x.dtype.kind in "iu" else float, order="C"))
    # int, as 256 would be 0 in bytes
    if x.is_floating_point() or x.numel() and not 0 <= int(x.min()) <= int(x.max()) < v:
        raise ValueError(f"x: must hold whole numbers, symbols 0..{v - 1}")
    length = x.shape[1] if x.ndim == 2 and len(x) else 0    # 0: refused below
    depth = round(math.log(max(length, 1), s))
    if depth < 2 or length != s**depth or L not in (None, depth):
        raise ValueError(f"x: must be (P, {s}^{L or 'L'}), not {tuple(x.shape)}")
    return x.to(torch.uint8), depth


def setting(default, help, paper=None, allowed=None):
    """A field of a learner's Config: its default, help for its flag, the paper's value, and what
    is allowed: words, or the lowest and the highest number."""
    return field(default=default, metadata={"help": help, "paper": paper, "allowed": allowed})


@dataclass
class Settings:
    """What the learners' Configs share. PRESETS: {name: {setting: value}}, beside "paper"."""

    PRESETS = {}

    @classmethod
    def of(cls, preset=None, **given):
        """Defaults, changed by a preset, changed by what is given. Raises ValueError, naming it."""
        paper = {f.name: f.metadata["paper"] for f in fields(cls)}
        presets = {**cls.PRESETS, "paper": {k: p for k, p in paper.items() if p is not None}}
        if preset is not None:
            check_word("preset", preset, presets)
        for name in given.keys() - paper.keys():
            raise ValueError(f"{name}: no such setting; there is preset, {', '.join(paper)}")
        return cls(**presets.get(preset, {}) | given)

    def __post_init__(self):
        for f in fields(self):
            given, allowed = getattr(self, f.name), f.metadata["allowed"]
            try:
                value = f.type(given)                       # numpy's numbers become Python's
            except (TypeError, ValueError, OverflowError):
                value = None
            if f.type is not str and value != given:        # 2.5 steps, nan, or a text
                raise ValueError(f"{f.name}: must be a {f.type.__name__}, not {given!r}")
            setattr(self, f.name, value)
            if allowed and f.type is str:
                check_word(f.name, value, allowed)
            elif allowed:
                check_range(f.name, value, *allowed)

    def sized(self, v, s, m, L):
        """The Config for a grammar of these sizes, or a ValueError that names a setting."""
        return self


def make_parser(doc, samples):
    """argparse, with the flags of one grammar and of P strings. samples: the default of P."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--v", type=int, default=8, help="symbols per level (default 8)")
    add("--s", type=int, default=2, help="children per symbol (default 2)")
    add("--m", type=int, default=3, help="rules per symbol, at most v^(s-1) (default 3)")
    add("--depth", type=int, default=3, help="L, levels above the tokens (default 3)")
    add("--zipf", type=float, default=0.0, help="rule j has p ~ (j+1)^-zipf (default 0)")
    add("--seed", type=int, default=0, help="of all that is random (default 0)")
    add("--samples", type=int, default=samples, help=f"P, strings (default {samples})")
    add("--device", type=to_device, default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    return parser


def to_device(name):
    """An argparse type: auto, cpu, cuda, cuda:1, mps -> the name of a device that is there."""
    if name == "auto":                                      # never mps, which we have not tried
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError):                  # the latter if torch has no CUDA
        raise argparse.ArgumentTypeError(f"there is no {name} here") from None
    return name


def read_flags(doc, samples, targets, Config, files=()):
    """A learner's command line -> (args, its Grammar, its Config). A wrong flag ends the script
    before the work, with one line that names it. files: which of FILES it writes."""
    parser = make_parser(doc, samples)
    parser.add_argument("--target", choices=targets, default="latent", help="what is predicted")
    # a setting that is not given leaves no trace
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    add("--preset", help=f"values of many settings: {', '.join(['paper', *Config.PRESETS])}")
    for f in fields(Config):
        text = f"{f.metadata['help']} (default {f.default}; the paper: {f.metadata['paper']})"
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        add("--" + f.name.replace("_", "-"), help=text, **kind)
    for flag in files:
        parser.add_argument(f"--{flag}", metavar="FILE", help=FILES[flag])
    args = parser.parse_args()
    names = ["preset", *(f.name for f in fields(Config))]
    settings = {name: getattr(args, name) for name in names if name in args}
    try:
        grammar = Grammar.random(args.v, args.s, args.m, args.depth, args.seed, args.zipf)
        config = Config.of(**settings).sized(args.v, args.s, args.m, args.depth)
        check_range("samples", args.samples, 1, MOST_TOKENS // args.s**args.depth)
        given = [getattr(args, flag) for flag in files if getattr(args, flag)]
        if len(set(map(os.path.realpath, given))) < len(given):
            raise ValueError("resume: must be a file of its own")
        for file in given:                                  # fails now, not after the work
            open(file, "ab").close()
    except ValueError as error:
        name, _, reason = str(error).partition(":")
        parser.error(f"argument --{name.replace('_', '-')}:{reason}")
    except OSError as error:
        parser.error(str(error))
    return args, grammar, config


def step_generator(seed, step):
    """The generator of one training step, so that a training can be resumed after any step."""
    # torch reads 32 bits of a seed, into which numpy mixes both numbers
    mixed = np.random.SeedSequence([seed, step]).generate_state(1)[0]
    return torch.Generator().manual_seed(int(mixed))


class WrongFile(ValueError):
    """A file from which a training can't go on."""


def load_state(file, about, parts):
    """Set parts, {name: what has a state_dict}, to the state of a training in a file. Returns the
    step it was written after, 0 if the file is None or new. about: a dict that must be the same in
    both runs. Raises WrongFile, naming resume, or OSError if the file can't be written."""
    # opened, so that it fails now and not after a minute
    if file is None or open(file, "ab").tell() == 0:
        return 0
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        differ = [name for name in about if saved["about"].get(name) != about[name]]
    except Exception:  # whatever foreign bytes lead to
        raise WrongFile(f"resume: {file} holds no training") from None
    if differ:
        raise WrongFile(f"resume: {file} is of a run with another {', '.join(differ)}")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["step"]


def save_state(file, about, parts, step, is_last):
    """Write what load_state reads, if the file is a minute old or the step is the last."""
    if file and (is_last or time.time() - os.path.getmtime(file) > SAVE_EVERY):
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save({"about": about, "step": step, **state}, f"{file}.part")
        os.replace(f"{file}.part", file)


def checksum(x):
    """A number that tells strings (P, T), or a Grammar, from others."""
    data = torch.stack(x.rules) if isinstance(x, Grammar) else x
    return zlib.crc32(data.cpu().contiguous().numpy())


def open_trace(path, columns):
    """A CSV file to append rows to; path None drops them. After a resume some rows come twice.
    Raises WrongFile, naming trace, if the file has other columns."""
    file, header = open(path or os.devnull, "a+", errors="replace"), ",".join(columns) + "\n"
    file.seek(0)
    there = file.readline()
    if there not in ("", header):
        raise WrongFile(f"trace: {path} has other columns than this run")
    if not there:
        print(header, end="", file=file, flush=True)
    return file


def ranks():
    """(rank, world size, local rank) as torchrun sets them, [0, 1, 0] without it."""
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    given = [name in os.environ for name in (*alone, "MASTER_ADDR")]
    if any(given[:3]) and not all(given):
        sys.exit("RANK, WORLD_SIZE, LOCAL_RANK: all are set, as by torchrun, or none")
    return [int(os.environ.get(name, number)) for name, number in alone.items()]


def run(main):
    """Call a script's main; Ctrl-C and a reader that has gone (`| head`) end it quietly."""
    try:
        main()
        sys.stdout.flush()
    except WrongFile as error:
        print(f"{os.path.basename(sys.argv[0])}: error: argument --{error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Python flushes stdout once more at exit, and that must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def show(grammar, levels):
    """Print the rules, and a derivation, each symbol above the first of its children."""
    for l in reversed(range(grammar.L)):
        for a, rules in enumerate(grammar.rules[l].tolist()):
            tuples = " | ".join(" ".join(map(str, rule)) for rule in rules)
            print(f"level {l + 1}: {a:3} -> {tuples}")
        print()
    cell = 1 + len(str(grammar.v - 1))                      # columns for a token
    for l, h in reversed(list(enumerate(levels))):
        width = cell * grammar.s**l                         # columns for a node
        symbols = h[0, : 1 + 160 // width].tolist()         # as many as a screen shows
        print(f"level {l}  " + "".join(f"{a:<{width}}" for a in symbols).rstrip())


def show_contrast(grammars):
    """Print Grammar.contrast as CSV: its root mean square over grammars, and at which P sampling
    noise is as large."""
    g, found = grammars[0], [grammar.contrast() for grammar in grammars]
    print("v,s,m,L,zipf,seeds,target,level,contrast,P_noise")
    for level, target in itertools.product(range(1, g.L), found[0]):
        # parents on this level are the parents of tuples one level below
        squares = [one[target][level - 1] ** 2 for one in found]
        contrast = math.sqrt(sum(squares) / len(squares))
        # a tuple is seen P / (v m) times, so its context is known to sqrt(v m / P)
        P = g.v * g.m / contrast**2 if contrast else math.inf
        sizes = f"{g.v},{g.s},{g.m},{g.L},{g.zipf:g},{len(grammars)}"
        print(f"{sizes},{target},{level},{contrast:.6g},{P:.6g}")


def main():
    parser = make_parser(__doc__, samples=1)
    add = parser.add_argument
    add("--load", metavar="FILE", help="rules from an .npz or .npy; rules[0] makes the tokens")
    add("--save", metavar="FILE.npz", help="write strings, levels and rules")
    add("--contrast", action="store_true", help="how far apart parents' contexts are, as CSV")
    add("--seeds", type=int, default=1, help="with --contrast: average so many grammars")
    args = parser.parse_args()
    try:
        check_range("seeds", args.seeds, 1, 10**6)
        if args.load:
            sizes = [f"--{name}" for name in ("v", "s", "m", "depth", "zipf")
                     if getattr(args, name) != parser.get_default(name)]
            if sizes:
                print(f"--load decides, {' '.join(sizes)} ignored", file=sys.stderr)
            grammars = [Grammar.load(args.load)]
        else:
            sizes, seeds = (args.v, args.s, args.m, args.depth), range(args.seeds)
            grammars = [Grammar.random(*sizes, args.seed + k, args.zipf) for k in seeds]
        levels = grammars[0].sample(args.samples, args.seed, args.device)
        if args.save:
            grammars[0].save(args.save, levels)
            print(f"wrote {args.samples} strings, their levels and the rules to {args.save}")
    except (ValueError, OSError) as error:
        parser.error(f"argument --{error}" if isinstance(error, ValueError) else str(error))
    if args.contrast:
        show_contrast(grammars)
    else:
        show(grammars[0], levels)


if __name__ == "__main__":
    run(main)
