"""
Learner 1: iterative latent clustering, the paper's Algorithm 1, and its controls.
No network, no gradient.

    python cluster.py --depth 4 --samples 4096                    what it learns
    python cluster.py --depth 4 --samples 4096 --target token     from raw tokens

h(0) = x; then from the leaves up, for every level l = 0 .. L-2:
  1. form the level-l tuples, and number the ones that were seen;
  2. predict: for every tuple its context, the empirical distribution of a target beside it;
  3. cluster the contexts into v groups with k-means: synonyms have the same one;
  4. a tuple's group is its symbol of level l+1.

The target decides how many strings are needed:
  latent  the level-l symbols of its cousins (tuples under the same grandparent), as just
          learned: v m^3 strings, the same on every level. This is Algorithm 1;
  token   the raw tokens under the cousins, l levels further down: v m^(l+3);
  root    the root label, L-l levels up: v m^(L-l);
  joint   the cousin tuple itself, one of v m: v m^2.
"""

import operator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from grammar import (
    TEST_STRINGS, Settings, accuracy, as_strings, check_word, cousins, generator, read_flags, run,
    setting, tuple_codes,
)

TARGETS = ("latent", "token", "root", "joint")
CHUNK_TOKENS = 2**18        # tokens counted at a time: the arithmetic stays in the cache
TRIALS, ROUNDS = 4, 30      # of k-means: candidates for a further centre, and most rounds
STARTS = 16                 # of k-means for target joint


@dataclass
class Config(Settings):
    positions: str = setting(
        "all", "which tuples count: all, at every position, with all elements of their cousins; "
        "cousins: at one position, with all; element: at one position, with one element",
        "cousins", ("all", "cousins", "element"))
    restarts: int = setting(64, "starts of k-means; the best is kept", None, (1, 4096))


def lowest(v, s, m):
    """Where a sweep begins: strings that hold at most half of the v m tuples of level L-2."""
    return v * m / (2 * s)


# ---- step 1: the tuples seen, and strings relabelled one level up ----------------------


class Tuples:
    """The tuples seen in h, (P, n) symbols, numbered 0..K-1. codes: (K,) int64, sorted, what they
    spell in base v. number: (v^s,) int64, the number of every code, K if it was not seen."""

    def __init__(self, h, v, s):
        self.v, self.s = v, s
        parts = [h[rows].unflatten(1, (-1, s)) for rows in chunks(h)]
        self.codes = torch.cat([tuple_codes(part, v).unique() for part in parts]).unique()
        self.K = len(self.codes)
        self.number = torch.full((v**s,), self.K, device=h.device)
        self.number[self.codes] = torch.arange(self.K, device=h.device)

    def ids(self, h):
        """(n, N s) symbols -> (n, N) int64 tuple numbers; K for a tuple that was not seen, and for
        one that holds a negative symbol."""
        tuples = h.unflatten(1, (-1, self.s))               # (n, N, s)
        unknown = (tuples < 0).any(2)
        found = self.number.take(tuple_codes(tuples, self.v).masked_fill(unknown, 0))
        return found.masked_fill(unknown, self.K)


def chunks(h):
    """Slices of the rows of h that hold about CHUNK_TOKENS entries each."""
    step = max(1, CHUNK_TOKENS // h.shape[1])
    return [slice(start, start + step) for start in range(0, len(h), step)]


def relabel(h, tuples, symbols):
    """(P, n) level-l symbols -> (P, n/s) level-(l+1) symbols, one for each tuple. symbols: (K+1,),
    the symbol of every tuple; the last is for unseen ones."""
    return torch.cat([symbols.take(tuples.ids(h[rows])) for rows in chunks(h)])


# ---- step 2: the predictor -------------------------------------------------------------


def cooccurrences(h, x, root, tuples, target):
    """The tuples at every position of a family, and the targets beside each.

    h: (p, n) level-l symbols; x: (p, s^L) tokens; root: (p,) labels, or None. Returns ids
    (T, 1, q), the numbers of the tuples at T positions in q families, and targets (T, E, q), E of
    each. A family is the T = s tuples under one grandparent; for target root the whole string,
    T = n/s, q = p, since P(root | tuple) depends on where the tuple stands."""
    s, ids = tuples.s, tuples.ids(h)                        # (p, n/s)
    if target == "root":
        return ids.T[:, None], root.expand(ids.shape[1], 1, -1)
    below = {"latent": h, "token": x, "joint": ids}[target]
    ids = ids.reshape(-1, s)                                # (q, s)
    # e targets under each tuple, E = (s-1) e beside it
    below = below.reshape(len(ids), s, -1).permute(1, 2, 0).contiguous()    # (s, e, q)
    targets = below[cousins(s, h.device)].flatten(1, 2)     # (s, (s-1) e, q)
    return ids.T[:, None], targets


def count(h, x, root, tuples, target, positions):
    """How often each tuple stood beside each target symbol: (T E, K, symbols) int64, a table for
    each of T positions and E targets of cooccurrences. symbols is v, for joint K."""
    K, s = tuples.K, tuples.s
    symbols = K if target == "joint" else tuples.v
    if positions != "all":                                  # only the first grandparent
        h, x = h[:, : s * s], x[:, : s * s * (x.shape[1] // h.shape[1])]
    tables = 0
    for rows in chunks(x):
        label = None if root is None else root[rows]
        ids, targets = cooccurrences(h[rows], x[rows], label, tuples, target)
        if positions != "all":                              # only its first tuple
            ids, targets = ids[:1], targets[:1]
        if positions == "element":
            targets = targets[:, :1]
        T, E, _ = targets.shape
        # a number for every (table, tuple, target), to be counted
        table = torch.arange(T * E, device=h.device).view(T, E, 1)
        cell = targets + (ids * symbols + table * (K * symbols))           # (T, E, q)
        tables = tables + torch.bincount(cell.flatten(), minlength=T * E * K * symbols)
    return tables.view(-1, K, symbols)


def contexts(tables):
    """Context vectors phi: (T E, K, v) counts -> (K, T E v), for every tuple its target
    distributions side by side. A tuple never seen at a position gets that position's mean."""
    tables = tables.float()
    times = tables.sum(2, keepdim=True)                     # (T E, K, 1)
    mean = tables.sum(1, keepdim=True) / times.sum(1, keepdim=True)
    phi = torch.where(times > 0, tables / times.clamp(min=1), mean)
    return phi.permute(1, 0, 2).flatten(1)


# ---- step 3: the clusterer -------------------------------------------------------------


def kmeans(X, k, rng, restarts=64):
    """Group points X, (n, d) float, into k clusters or n, the best of some restarts. rng: a CPU
    torch.Generator. Returns (n,) int64 labels 0..k-1."""
    labels, inertia = lloyd(X, min(k, len(X)), rng, restarts)
    return labels[inertia.argmin()]


def lloyd(X, k, rng, restarts):
    """Lloyd's algorithm from k-means++ centres, all restarts side by side. Returns labels,
    (restarts, n) int64 in 0..k-1, and the summed squared distances to the centres, (restarts,)."""
    X = X - X.mean(0)                                       # as distances needs it
    centers, labels = spread_centers(X, k, rng, restarts), None
    for _ in range(ROUNDS):
        before = labels
        distance, labels = distances(X, centers).min(2)     # (restarts, n)
        if before is not None and torch.equal(before, labels):
            break
        member = F.one_hot(labels, k).to(X)                 # (restarts, n, k)
        size = member.sum(1)[:, :, None]                    # (restarts, k, 1)
        # an empty cluster stays where it is
        centers = torch.where(size > 0, member.mT @ X / size.clamp(min=1), centers)
    return labels, distance.sum(1)


def spread_centers(X, k, rng, restarts):
    """k-means++, greedy: the next centre is the best of a few points, each drawn in proportion to
    its squared distance from the centres so far. -> (restarts, k, d)"""
    each = torch.arange(restarts, device=X.device)
    first = torch.randint(len(X), (restarts, 1), generator=rng)
    centers = X[first.to(X.device)]                         # (restarts, 1, d)
    nearest = distances(X, centers)[:, :, 0]                # (restarts, n)
    for _ in range(k - 1):
        reach = nearest.cumsum(1)
        draw = torch.rand(restarts, TRIALS, generator=rng).to(X) * reach[:, -1:]
        drawn = torch.searchsorted(reach, draw).clamp(max=len(X) - 1)
        candidates = X[drawn]                               # (restarts, TRIALS, d)
        left = torch.minimum(nearest[:, :, None], distances(X, candidates))
        best = left.sum(1).argmin(1)                        # (restarts,)
        centers = torch.cat([centers, candidates[each, best][:, None]], 1)
        nearest = left[each, :, best]
    return centers


def distances(X, centers):
    """Squared distances (restarts, n, c) of points X (n, d) to centres (restarts, c, d)."""
    # |x|^2 - 2 x.c + |c|^2, which loses few digits if X is centred
    squares = X.square().sum(1)[:, None] + centers.square().sum(2)[:, None]
    return (squares - 2 * X @ centers.mT).clamp(min=0)


def cluster_pairs(tables, v, rng):
    """The joint target: group the tuples by their (T, K, K) tables of cousin pairs, one for each
    position and cousin. Returns (K,) int64 labels.

    First comes correspondence analysis of the tables: k-means groups the tuples in the v-1 leading
    directions of their normalised residuals. Then a block model's likelihood: each tuple takes the
    label that makes the labels of its cousins likeliest, until nothing changes. The start is kept
    whose labels have most mutual information with those of cousins."""
    tables = tables.double()                                # in float32 the svd may fail
    total = tables.sum((1, 2), keepdim=True)
    expected = tables.sum(2, keepdim=True) * tables.sum(1, keepdim=True) / total
    residual = (tables - expected) / expected.clamp(min=1e-12).sqrt()
    U, S, _ = torch.linalg.svd(residual.permute(1, 0, 2).flatten(1), full_matrices=False)
    # only the direction counts: the length says how often a tuple came
    X = F.normalize(U[:, : v - 1] * S[: v - 1])
    tables = tables.float()
    labels, _ = lloyd(X.float(), min(v, len(X)), rng, STARTS)   # (STARTS, K)

    for _ in range(ROUNDS):
        member = F.one_hot(labels, v).to(tables)            # (STARTS, K, v)
        # counts of (tuple, its cousin's label) and (label, its cousin's label); 0.1: no log 0
        cousin = torch.einsum("tij,rjv->rtiv", tables, member)  # (STARTS, T, K, v)
        pairs = member.mT[:, None] @ cousin + 0.1           # (STARTS, T, v, v)
        total = pairs.sum((2, 3), keepdim=True)
        by_chance = pairs.sum(2, keepdim=True) * pairs.sum(3, keepdim=True) / total
        log_odds = (pairs / by_chance).log()
        information = (pairs * log_odds).sum((1, 2, 3))     # (STARTS,) in nats
        likeliest = (cousin @ log_odds.mT).sum(1).argmax(2)
        if torch.equal(labels, likeliest):
            break
        labels = likeliest
    return labels[information.argmax()]


# ---- the algorithm ---------------------------------------------------------------------


class Tree:
    """What fit returns: for every level l the tuples seen (tuples[l], a Tuples), and the symbol of
    level l+1 that each was given (symbols[l], (K,) int16)."""

    def __init__(self, v, s, L):
        self.v, self.s, self.L = v, s, L
        self.tuples, self.symbols = [], []

    def label(self, x):
        """Strings (P, s^L) -> levels: x itself in uint8, then the estimates of the levels 1..L-1,
        (P, s^(L-l)) in int16, on the device of the training. A tuple that was not seen there gets
        the symbol -1, and so do its ancestors. Raises ValueError, naming x."""
        levels = [as_strings(x, self.v, self.s, self.L)[0].to(self.symbols[0].device)]
        for tuples, symbols in zip(self.tuples, self.symbols):
            symbols = F.pad(symbols, (0, 1), value=-1)      # of unseen tuples
            levels.append(relabel(levels[-1], tuples, symbols))
        return levels

    def score(self, grammar, seed):
        """Accuracies of levels 1..L-1 on fresh strings of a grammar, by the best matching."""
        truth = grammar.sample(TEST_STRINGS, (seed, 1))
        levels = [level.cpu() for level in self.label(truth[0])]
        return [accuracy(levels[l], truth[l], self.v) for l in range(1, self.L)]


def fit(x, v, s, target="latent", seed=0, root=None, **settings):
    """Learn the levels 1..L-1 of strings x, bottom-up: Algorithm 1 for target "latent".

    x: (P, s^L) symbols 0..v-1, an integer tensor, array or list. root: (P,) labels 0..v-1, only
    read for target "root". settings: see Config. Works on x's device and returns a Tree. Raises
    ValueError, naming the argument."""
    v, s = operator.index(v), operator.index(s)             # numpy's integers overflow
    config, (x, L) = Config.of(**settings), as_strings(x, v, s)
    check_word("target", target, TARGETS)
    if target == "root":
        root = torch.as_tensor([] if root is None else root).to(x.device)
        if root.shape != x.shape[:1] or not 0 <= int(root.min()) <= int(root.max()) < v:
            raise ValueError(f"root: must be (P,) labels 0..{v - 1}, one for each string")
    rng = torch.Generator().manual_seed(int(generator("cluster", seed).integers(2**62)))
    tree, h = Tree(v, s, L), x
    for l in range(L - 1):
        tuples = Tuples(h, v, s)
        tables = count(h, x, root, tuples, target, config.positions)
        if target == "joint":                   # here rows and columns are the same tuples
            labels = cluster_pairs(tables, v, rng)
        else:
            labels = kmeans(contexts(tables), v, rng, config.restarts)
        tree.tuples.append(tuples)
        tree.symbols.append(labels.to(torch.int16))
        h = relabel(h, tuples, labels.to(torch.uint8))
    return tree


def recover(grammar, P, seed, target="latent", device="cpu", **settings):
    """One run of a sweep: the accuracies of levels 1..L-1, learned from P strings."""
    x, *_, root = grammar.sample(P, seed, device)
    tree = fit(x, grammar.v, grammar.s, target, seed, root[:, 0], **settings)
    return tree.score(grammar, seed)


def main():
    args, grammar, config = read_flags(__doc__, 4096, TARGETS, Config)
    v, s, m, L, P = args.v, args.s, args.m, args.depth, args.samples
    x, *_, root = grammar.sample(P, args.seed, args.device)
    tree = fit(x, v, s, args.target, args.seed, root[:, 0], **vars(config))

    print(f"{P} strings of {s**L} tokens, v={v} s={s} m={m} L={L}; v m^3 = {v * m**3}")
    print(f"target {args.target}\n")
    print(f"level   tuples seen   rules   accuracy on {TEST_STRINGS} fresh strings")
    for l, right in enumerate(tree.score(grammar, args.seed), 1):
        print(f"{l:5}   {tree.tuples[l - 1].K:11}   {v * m:5}   {right:8.3f}")
    print("\nlevel 1 as learned: the tuples in one line are one symbol")
    for a in range(min(v, 8)):
        codes = tree.tuples[0].codes[tree.symbols[0] == a].cpu().numpy()
        pieces = zip(*np.unravel_index(codes, [v] * s))     # the digits of each code in base v
        print(f"  {a}: " + " | ".join(" ".join(map(str, piece)) for piece in pieces))


if __name__ == "__main__":
    run(main)
