"""
Learner 1: iterative latent clustering, the paper's Algorithm 1 (section 3), and its controls. No network, no gradient.

    python cluster.py --depth 4 --samples 4096                    what it learns, level by level
    python cluster.py --depth 4 --samples 4096 --target token     the same algorithm, predicting raw tokens

h(0) = x; then from the leaves up, for every level l = 0 .. L-2:
  1. form the level-l tuples, and number the ones that were seen;
  2. predict: for every tuple, the empirical distribution of a target, given that tuple: its context vector;
  3. cluster the contexts into v groups with k-means: synonyms have the same parent, hence the same context;
  4. a tuple's group is its symbol of level l+1.
All depends on what is predicted. Every level that lies between a tuple and its target costs a factor of m:
  latent  the symbols of level l in its cousins (tuples under the same grandparent), as just learned: v m^3 strings do
          for every level, since the distance never grows. This is the paper's Algorithm 1;
  token   the raw tokens under the cousins, l levels further down: v m^(l+3), and so v m^(L+1) for the last step;
  root    the root label, L-l levels up: v m^(L-l), and so v m^L for the first step;
  joint   the cousin tuple itself, one of v m: the table of cousin pairs is clustered from both sides, v m^2.

Measured by `python sweep.py --depth 2..6` (v=8 s=2 m=4, 5 seeds, 19 s on 2 x86 cores, torch 2.13): per
level from L = 3 to 6, P* grows by 1.02 [0.95, 1.11] for latent, 4.22 [3.71, 4.83] for token, 4.70 [4.04, 5.52]
for root and 0.94 [0.89, 0.98] for joint. Against the paper's figure 3 see README.md.
"""

from dataclasses import dataclass

import torch

from grammar import (
    TEST_STRINGS, Parser, accuracy, add_grammar_flags, cousins, depth_of, grammar_from_flags, pick_device, tuple_codes,
)

TARGETS = ("latent", "token", "root", "joint")
CONTEXTS = ("element", "cousins", "all")
RESTARTS = 64             # of k-means, the best one counts
TRIALS = 4                # candidates for each new centre of a k-means++ start
STARTS = 16               # of the joint clustering
ROUNDS = 30               # of either at most, if labels still change
CHUNK_TOKENS = 2**18      # tokens counted at a time, so that the index arithmetic stays in the cache
DENSE_TUPLES = 2**22      # up to this v^s a tuple's number is one look-up, above it a binary search
SETTINGS = {"restarts": RESTARTS, "trials": TRIALS, "starts": STARTS, "rounds": ROUNDS, "test_strings": TEST_STRINGS}


# ----------------------------------------------------------------------------------------------------------------------
# step 1: the support, and strings lifted by one level


class Support:
    """The tuples seen in h, numbered 0..K-1.

    h: (P, n) integer tensor of symbols 0..v-1, n a multiple of s. codes: (K,) int64, sorted, the base-v numbers of
    the tuples that occur in it."""

    def __init__(self, h, v, s):
        self.v, self.s = v, s
        if v**s <= DENSE_TUPLES:
            seen = torch.zeros(v**s, dtype=torch.bool, device=h.device)
            for rows in chunks(h):
                seen |= torch.bincount(tuple_codes(h[rows].unflatten(1, (-1, s)), v).flatten(), minlength=v**s) > 0
            self.codes = seen.nonzero()[:, 0]
            self.number = torch.full((v**s,), len(self.codes), device=h.device)
            self.number[self.codes] = torch.arange(len(self.codes), device=h.device)
        else:
            found = [tuple_codes(h[rows].unflatten(1, (-1, s)), v).unique() for rows in chunks(h)]
            self.codes, self.number = torch.cat(found).unique(), None

    def ids(self, h):
        """(n, N s) symbols -> (n, N) int64 tuple numbers; K where the tuple was not seen or a symbol is negative."""
        h = h.unflatten(1, (-1, self.s))
        code = tuple_codes(h, self.v)
        if self.number is not None:
            found = self.number.index_select(0, code.flatten().clamp(0, self.v**self.s - 1)).view_as(code)
        else:
            found = torch.searchsorted(self.codes, code).clamp(max=len(self.codes) - 1)
            found[self.codes[found] != code] = len(self.codes)
        return found if h.dtype == torch.uint8 else found.masked_fill((h < 0).any(-1), len(self.codes))


def chunks(h):
    """Slices of the rows of h that hold about CHUNK_TOKENS entries each."""
    step = max(1, CHUNK_TOKENS // h.shape[1])
    return [slice(start, start + step) for start in range(0, len(h), step)]


def lift(h, support, symbols):
    """(P, n) level-l symbols -> (P, n/s) level-(l+1) symbols: symbols[number of a tuple], of symbols' type."""
    lifted = symbols.new_empty(len(h), h.shape[1] // support.s)
    for rows in chunks(h):
        ids = support.ids(h[rows])
        lifted[rows] = symbols.index_select(0, ids.flatten()).view_as(ids)
    return lifted


# ----------------------------------------------------------------------------------------------------------------------
# step 2: the predictor


def count(h, support, target, context, v, x, root):
    """How often tuple a stood beside target symbol b: the co-occurrence tables that all four targets are made from.

    h: (P, n) uint8 level-l symbols, x: (P, s^L) tokens, root: (P,) labels or None. Returns (blocks, K, symbols) int64,
    a table for every pair of a tuple position under its grandparent and a target seen from it. Pooled over all
    grandparents and strings; but a root label is not the same distance away in the same direction from everywhere,
    so there every tuple position of the string has a table of its own."""
    K, s = len(support.codes), support.s
    if context != "all":
        h, x = h[:, : s * s], x[:, : s * s * x.shape[1] // h.shape[1]]  # the first grandparent alone
    others = cousins(s, h.device)
    symbols = K if target == "joint" else v
    total = 0
    for rows in chunks(x):
        tuples = support.ids(h[rows])  # (p, n/s)
        if target == "root":
            seen = root[rows].expand(tuples.shape[1], 1, -1)  # (n/s, 1, p)
        else:
            beneath = {"latent": h[rows], "token": x[rows], "joint": tuples}[target]  # the prediction target
            tuples = tuples.reshape(-1, s)  # (p n/s^2, s), a row for every grandparent
            beneath = beneath.reshape(len(tuples), s, -1).permute(1, 2, 0)  # (s, E, p n/s^2), E under each tuple
            seen = beneath.contiguous()[others].flatten(1, 2)  # (s, (s-1) E, p n/s^2)
        tuples = tuples.T[:, None]
        if context != "all":
            tuples, seen = tuples[:1], seen[:1]  # the first tuple alone
        if context == "element":
            seen = seen[:, :1]
        positions, targets, _ = seen.shape
        block = torch.arange(positions * targets, device=h.device).view(positions, targets, 1)
        cell = seen.long()  # the hot loop: work in place, with the longest dimension last
        cell += tuples * symbols + block * (K * symbols)
        total = total + torch.bincount(cell.flatten(), minlength=positions * targets * K * symbols)
    return total.view(-1, K, symbols)


def contexts(tables):
    """Context vectors phi: (blocks, K, v) counts -> (K, blocks v), for every tuple its target distributions side by
    side, each on the simplex. A tuple not seen at a position gets that position's mean."""
    tables = tables.float()
    seen = tables.sum(2, keepdim=True)
    mean = tables.sum(1, keepdim=True) / seen.sum(1, keepdim=True)
    return torch.where(seen > 0, tables / seen.clamp(min=1), mean).permute(1, 0, 2).flatten(1)


# ----------------------------------------------------------------------------------------------------------------------
# step 3: the clusterer


def kmeans(X, k, random, restarts):
    """Lloyd's algorithm from greedy k-means++ starts, all restarts at once.

    X: (n, d) float tensor; random: a CPU torch.Generator. Returns (labels, inertia), best restart first: (restarts, n)
    int64 in 0..k-1, and (restarts,) the summed squared distances to the centres. At most n clusters are made."""
    n, k = len(X), min(k, len(X))
    X = X - X.mean(0)  # |x|^2 - 2 x.c + |c|^2 loses no digits around 0
    size = (X**2).sum(1)

    def distances(centers):  # (restarts, c, d) -> (restarts, n, c)
        return ((centers**2).sum(2)[:, None] - 2 * X @ centers.mT + size[:, None]).clamp(min=0)

    rows = torch.arange(restarts, device=X.device)
    centers = X[torch.randint(n, (restarts, 1), generator=random).to(X.device)]
    nearest = distances(centers)[:, :, 0]
    for _ in range(k - 1):  # the next centre: of a few points drawn in proportion to their squared distance, the best
        reach = nearest.cumsum(1)
        draw = torch.rand(restarts, TRIALS, generator=random).to(X) * reach[:, -1:]
        new = X[torch.searchsorted(reach, draw).clamp(max=n - 1)]  # (restarts, trials, d)
        left = torch.minimum(nearest[:, :, None], distances(new))  # (restarts, n, trials)
        best = left.sum(1).argmin(1)
        centers = torch.cat([centers, new[rows, best][:, None]], 1)
        nearest = left[rows, :, best]
    labels = None
    for _ in range(ROUNDS):
        distance, new_labels = distances(centers).min(2)
        if labels is not None and torch.equal(labels, new_labels):
            break
        labels = new_labels
        member = torch.nn.functional.one_hot(labels, k).to(X)  # (restarts, n, k)
        members = member.sum(1)[:, :, None]
        centers = torch.where(members > 0, member.mT @ X / members.clamp(min=1), centers)
    inertia, order = distance.sum(1).sort()
    return labels[order], inertia


def cluster_pairs(tables, v, random):
    """The joint target: group the tuples by their (blocks, K, K) tables of cousin pairs, from both sides.

    The parents of cousins fill v m of v^2 cells, so the tables, in blocks of synonyms, have a contrast of order one.
    Start from k-means in the v-1 leading directions of the normalised residuals; then relabel each tuple by the
    likelihood of its cousins' own current labels until nothing changes. Of several starts the one counts whose labels
    tell most about a cousin's label, and so have the largest likelihood. Returns (K,) int64 labels."""
    tables = tables.float()
    expected = tables.sum(2, keepdim=True) * tables.sum(1, keepdim=True) / tables.sum((1, 2), keepdim=True)
    residual = (tables - expected) / expected.clamp(min=1e-12).sqrt()
    U, S, _ = torch.linalg.svd(residual.permute(1, 0, 2).flatten(1), full_matrices=False)  # (K, K), (K,)
    X = torch.nn.functional.normalize(U[:, : v - 1] * S[: v - 1])  # the length says how often a tuple came, no more
    labels, _ = kmeans(X, v, random, STARTS)  # (starts, K)
    for _ in range(ROUNDS):
        member = torch.nn.functional.one_hot(labels, v).to(tables)  # (starts, K, v)
        cousins = torch.einsum("bij,rjv->rbiv", tables, member)  # how often a tuple's cousin had each label
        pairs = member.mT[:, None] @ cousins + 0.1  # (starts, blocks, v, v)
        by_chance = pairs.sum(2, keepdim=True) * pairs.sum(3, keepdim=True) / pairs.sum((2, 3), keepdim=True)
        log_odds = (pairs / by_chance).log()
        information = (pairs * log_odds).sum((1, 2, 3))  # (starts,) in nats, over all pairs seen
        relabelled = (cousins @ log_odds.mT).sum(1).argmax(2)
        if torch.equal(labels, relabelled):
            break
        labels = relabelled
    return labels[information.argmax()]


# ----------------------------------------------------------------------------------------------------------------------
# the algorithm


@dataclass
class Tree:
    """What fit returns: for every level l the tuples seen and the symbol of level l+1 that each was given."""

    supports: list
    symbols: list  # (K,) int16 each

    def label(self, x):
        """(P, s^L) strings -> levels: x, then the estimated levels 1..L-1, levels[l] of shape (P, s^(L-l)), int16.

        A tuple that was not seen in training is -1, and so is all above it."""
        levels = [x]
        for support, symbol in zip(self.supports, self.symbols):
            levels.append(lift(levels[-1], support, torch.cat([symbol, symbol.new_tensor([-1])])))  # entry K: unseen
        return levels


def fit(x, v, s, target="latent", root=None, context="all", seed=0):
    """Learn the levels 1..L-1 of strings x, bottom-up (Algorithm 1 for target "latent").

    x: (P, s^L) integer tensor of symbols 0..v-1; root: (P,) labels, for target "root" alone. context: "all" counts
    every tuple position and all that is under its cousins, "cousins" a single tuple position, "element" a single
    position and a single target: the algorithm as printed. Works on x's device. Returns a Tree.
    Raises ValueError if x is empty, its length is no power of s from s^2 on, a symbol is out of range, the target or
    the context is unknown, or root is missing."""
    L = depth_of(x, s)
    if int(x.min()) < 0 or int(x.max()) >= v:
        raise ValueError(f"symbols must lie in 0..v-1 = {v - 1}, not {int(x.min())}..{int(x.max())}")
    if target not in TARGETS or context not in CONTEXTS:
        raise ValueError(f"target must be one of {TARGETS} and context one of {CONTEXTS}, not {target!r}, {context!r}")
    if target == "root" and (root is None or root.shape != (len(x),)):
        raise ValueError(f"target 'root' needs root, the ({len(x)},) labels of the strings")
    random = torch.Generator().manual_seed(seed)
    x = x.to(torch.uint8)
    h, tree = x, Tree([], [])
    for l in range(L - 1):
        support = Support(h, v, s)
        tables = count(h, support, target, context, v, x, root)
        if target == "joint":
            labels = cluster_pairs(tables, v, random)
        else:
            labels = kmeans(contexts(tables), v, random, RESTARTS)[0][0]
        tree.supports.append(support)
        tree.symbols.append(labels.to(torch.int16))
        h = lift(h, support, labels.to(torch.uint8))
    return tree


def recover(grammar, P, seed, target="latent", context="all", device="cpu"):
    """One run of the sweep: learn from P strings, score on fresh ones.

    Returns (accuracy, collapsed), lists over the levels 1..L-1: the fraction of right labels under the best matching,
    and whether fewer than v symbols are in use."""
    levels = grammar.sample(P, seed, device)
    x, root = levels[0], levels[-1][:, 0] if target == "root" else None
    del levels  # the truth; at P = 10^7 it is also a third of the memory
    tree = fit(x, grammar.v, grammar.s, target, root, context, seed)
    truth = grammar.sample(TEST_STRINGS, (seed, 1), device)
    estimate = tree.label(truth[0])
    score = [accuracy(estimate[l], truth[l], grammar.v) for l in range(1, grammar.L)]
    collapsed = [len(symbol.unique()) < grammar.v for symbol in tree.symbols]
    return score, collapsed


def main():
    parser = Parser(__doc__)
    add_grammar_flags(parser, samples=4096)
    parser.add_argument("--target", choices=TARGETS, default="latent", help="what is predicted (default latent)")
    parser.add_argument("--context", choices=CONTEXTS, default="all", help="how much of it is used (default all)")
    args = parser.parse_args()
    grammar = grammar_from_flags(parser, args)
    device = pick_device(parser, args.device)
    levels = grammar.sample(args.samples, args.seed, device)
    root = levels[-1][:, 0] if args.target == "root" else None
    tree = fit(levels[0], args.v, args.s, args.target, root, args.context, args.seed)
    truth = grammar.sample(TEST_STRINGS, (args.seed, 1), device)
    estimate = tree.label(truth[0])
    print(f"{args.samples} strings of {args.s**args.depth} tokens, v={args.v} s={args.s} m={args.m} L={args.depth}")
    print(f"target {args.target}, context {args.context}; v m^3 = {args.v * args.m**3}")
    print(f"\nlevel   tuples seen   accuracy on {TEST_STRINGS} fresh strings")
    for l in range(1, args.depth):
        seen = f"{len(tree.symbols[l - 1])} of {args.v * args.m}"
        print(f"{l:5}   {seen:>11}   {accuracy(estimate[l], truth[l], args.v):8.3f}")
    print("\nlevel 1 as learned: the pieces of string in a line are one symbol")
    for a in range(min(args.v, 8)):
        codes = tree.supports[0].codes[tree.symbols[0] == a].tolist()
        tuples = [[str(code // args.v**k % args.v) for k in reversed(range(args.s))] for code in codes]
        print(f"  {a}: " + " | ".join(map(" ".join, tuples)))


if __name__ == "__main__":
    main()
