"""
Learner 1: iterative latent clustering, the paper's Algorithm 1, and its controls.
No network, no gradient.

    python cluster.py --depth 4 --samples 4096                    what it learns
    python cluster.py --depth 4 --samples 4096 --target token     from raw tokens

h(0) = x; then from the leaves up, for every level l = 0 .. L-2:
  1. form the level-l tuples, and number the ones that were seen;
  2. predict: for every tuple, the empirical distribution of a target, given that
     tuple: its context vector;
  3. cluster the contexts into v groups with k-means: synonyms have the same parent,
     hence the same context;
  4. a tuple's group is its symbol of level l+1.

The target decides how many strings are needed: every level between it and the tuple costs a
factor of m:
  latent  the level-l symbols of its cousins (tuples under the same grandparent), as
          just learned: v m^3 strings, the same on every level. This is Algorithm 1;
  token   the raw tokens under the cousins, l levels further down: v m^(l+3);
  root    the root label, L-l levels up: v m^(L-l);
  joint   the cousin tuple itself, one of v m: v m^2. The table of cousin pairs is
          clustered from both sides.
These laws are measured by sweep.py; the table is in README.md.

Time grows as P s^(L+1), for tokens L times that, plus k-means of v m contexts a level. Memory
holds P s^L bytes of strings and, on level l, v m contexts. A context has s^2 (s-1) v numbers,
for tokens s^l times as many, for the root s^(L-l-1) v. Joint has s (s-1) tables of (v m)^2
instead. Each process of a sweep makes one run at a time.
"""

import torch
import torch.nn.functional as F

from grammar import (
    TEST_STRINGS, Parser, Score, Setting, accuracy, add_grammar_flags, add_settings,
    as_strings, check_memory, choice, cousins, digits, generator, given_settings,
    grammar_from_flags, paper_preset, pick_device, read_settings, run_script, strings_bytes,
    tuple_codes, whole, whole_numbers,
)

CHUNK_TOKENS = 2**18    # tokens counted at a time: the arithmetic stays in the cache
DENSE_TUPLES = 2**22    # up to this v^s a table gives a tuple's number, beyond it a search

TARGETS = ("latent", "token", "root", "joint")
SETTINGS = (  # name, type, default, the paper's value, help
    Setting("positions", choice("all", "cousins", "element"), "all", "cousins",
            "all: every tuple position, with all target symbols beside it; cousins: one "
            "position, with all of them; element: one position, with one of them"),
    Setting("restarts", whole(1, 2**12), 64, None, "starts of k-means; the best is kept"),
    Setting("trials", whole(1, 2**8), 4, None, "k-means++ candidates for every further centre"),
    Setting("starts", whole(1, 2**12), 16, None, "as restarts, but for target joint"),
    Setting("rounds", whole(1, 2**16), 30, None, "most rounds of k-means, and of relabelling"),
)
PRESETS = {"default": {}, "paper": paper_preset(SETTINGS)}


# ----------------------------------------------------------------------------------------
# step 1: the tuples seen, and strings lifted by one level


class Support:
    """The tuples seen in h, numbered 0..K-1 in the order of their codes.

    h: (P, n) integer tensor of symbols 0..v-1, n a multiple of s. codes: (K,) int64,
    sorted, the base-v numbers of the tuples that occur in h. number: (v^s,) int64, the
    number of every code, K if it was not seen; None if v^s is too large."""

    def __init__(self, h, v, s):
        self.v, self.s, self.number = v, s, None
        parts = (self.spell(h[rows]).flatten() for rows in chunks(h))
        if v**s > DENSE_TUPLES:
            self.codes = torch.cat([codes.unique() for codes in parts]).unique()
            return
        times = sum(torch.bincount(codes, minlength=v**s) for codes in parts)
        self.codes = times.nonzero()[:, 0]
        K = len(self.codes)
        self.number = torch.full((v**s,), K, device=h.device)
        self.number[self.codes] = torch.arange(K, device=h.device)

    def spell(self, h):
        """(n, N s) symbols -> (n, N) int64 codes."""
        return tuple_codes(h.unflatten(1, (-1, self.s)), self.v)

    def ids(self, h):
        """(n, N s) symbols -> (n, N) int64 tuple numbers; K for a tuple that was not seen,
        and for one that holds a negative symbol."""
        codes, K = self.spell(h), len(self.codes)
        if self.number is not None:
            inside = codes.clamp(0, self.v**self.s - 1)     # a negative symbol may lead out
            found = self.number.index_select(0, inside.flatten()).view_as(codes)
        else:
            found = torch.searchsorted(self.codes, codes).clamp(max=K - 1)
            found[self.codes[found] != codes] = K
        if h.dtype == torch.uint8:  # it has no negative symbols
            return found
        unknown = (h < 0).unflatten(1, (-1, self.s)).any(2)
        return found.masked_fill(unknown, K)


def chunks(h):
    """Slices of the rows of h that hold about CHUNK_TOKENS entries each."""
    step = max(1, CHUNK_TOKENS // h.shape[1])
    return [slice(start, start + step) for start in range(0, len(h), step)]


def lift(h, support, symbols):
    """(P, n) level-l symbols -> (P, n/s) level-(l+1) symbols, one for each tuple.

    symbols: (K,) or (K+1,), the symbol of every tuple; entry K is for unseen ones."""
    lifted = symbols.new_empty(len(h), h.shape[1] // support.s)
    for rows in chunks(h):
        ids = support.ids(h[rows])
        lifted[rows] = symbols.index_select(0, ids.flatten()).view_as(ids)
    return lifted


# ----------------------------------------------------------------------------------------
# step 2: the predictor


def beside(h, x, root, support, target):
    """The tuples at every position of a family, and the targets beside each.

    h: (p, n) uint8 level-l symbols; x: (p, s^L) tokens; root: (p,) labels.
    Returns (tuples, targets): tuples (T, 1, q), the numbers of the tuples at T positions in q
    families; targets (T, E, q), the E targets of each. A family is the T = s tuples under one
    grandparent. For target root it is the whole string, T = n/s, q = p, since P(root | tuple)
    depends on where the tuple stands."""
    s, tuples = support.s, support.ids(h)                   # (p, n/s)
    if target == "root":
        return tuples.T[:, None], root.expand(tuples.shape[1], 1, -1)
    below = {"latent": h, "token": x, "joint": tuples}[target]
    tuples = tuples.reshape(-1, s)                          # (q, s)
    below = below.reshape(len(tuples), s, -1)               # (q, s, e)
    below = below.permute(1, 2, 0).contiguous()             # (s, e, q)
    targets = below[cousins(s, h.device)].flatten(1, 2)     # (s, (s-1) e, q)
    return tuples.T[:, None], targets


def count(h, x, root, support, target, positions):
    """How often each tuple stood beside each target symbol: (T E, K, symbols) int64, a
    table for each of T positions and E targets of beside (one position unless positions is
    "all", one target if it is "element"). symbols is v, for joint K."""
    K, s, v = len(support.codes), support.s, support.v
    symbols = K if target == "joint" else v
    if positions != "all":                                  # only the first grandparent
        h, x = h[:, : s * s], x[:, : s * s * (x.shape[1] // h.shape[1])]
    tables = 0
    for rows in chunks(x):
        label = None if root is None else root[rows]
        tuples, targets = beside(h[rows], x[rows], label, support, target)
        if positions != "all":
            tuples, targets = tuples[:1], targets[:1]       # only its first tuple
        if positions == "element":
            targets = targets[:, :1]
        T, E, _ = targets.shape
        table = torch.arange(T * E, device=h.device).view(T, E, 1)
        # (table * K + tuple) * symbols + target. This is the hot loop: adding in place to a
        # copy saves a quarter of its time
        cell = targets.to(torch.int64, copy=True, memory_format=torch.contiguous_format)
        cell += tuples * symbols + table * (K * symbols)    # (T, E, q)
        tables = tables + torch.bincount(cell.flatten(), minlength=T * E * K * symbols)
    return tables.view(-1, K, symbols)


def contexts(tables):
    """Context vectors phi: (T E, K, v) counts -> (K, T E v), for every tuple its target
    distributions side by side, each on the simplex.

    A tuple that was never seen at a position gets that position's mean."""
    tables = tables.float()
    times = tables.sum(2, keepdim=True)                     # (T E, K, 1)
    mean = tables.sum(1, keepdim=True) / times.sum(1, keepdim=True)
    phi = torch.where(times > 0, tables / times.clamp(min=1), mean)
    return phi.permute(1, 0, 2).flatten(1)


# ----------------------------------------------------------------------------------------
# step 3: the clusterer


def distances(X, centers):
    """Squared distances (restarts, n, c) of points X (n, d) to centres (restarts, c, d)."""
    # |x|^2 - 2 x.c + |c|^2, which loses few digits if X is centred
    squares = X.square().sum(1)[:, None] + centers.square().sum(2)[:, None]
    return (squares - 2 * X @ centers.mT).clamp(min=0)


def spread_centers(X, k, rng, restarts, trials):
    """k-means++, greedy: the next centre is the best of a few points, each drawn in
    proportion to its squared distance from the centres so far. -> (restarts, k, d)"""
    each = torch.arange(restarts, device=X.device)
    first = torch.randint(len(X), (restarts, 1), generator=rng)
    centers = X[first.to(X.device)]                         # (restarts, 1, d)
    nearest = distances(X, centers)[:, :, 0]                # (restarts, n)
    for _ in range(k - 1):
        reach = nearest.cumsum(1)
        draw = torch.rand(restarts, trials, generator=rng).to(X) * reach[:, -1:]
        drawn = torch.searchsorted(reach, draw).clamp(max=len(X) - 1)
        candidates = X[drawn]                               # (restarts, trials, d)
        left = torch.minimum(nearest[:, :, None], distances(X, candidates))
        best = left.sum(1).argmin(1)                        # (restarts,)
        centers = torch.cat([centers, candidates[each, best][:, None]], 1)
        nearest = left[each, :, best]
    return centers


def kmeans(X, k, rng, restarts=64, trials=4, rounds=30):
    """Lloyd's algorithm from k-means++ centres, all restarts side by side.

    X: (n, d) float tensor; rng: a CPU torch.Generator. Returns (labels, inertia), the
    best restart first: (restarts, n) int64 in 0..k-1, and (restarts,) the summed squared
    distances to the centres. At most n clusters are made."""
    k = min(k, len(X))
    X = X - X.mean(0)
    centers = spread_centers(X, k, rng, restarts, trials)
    labels = None
    for _ in range(rounds):
        distance, nearest = distances(X, centers).min(2)    # (restarts, n)
        if labels is not None and torch.equal(labels, nearest):
            break
        labels = nearest
        member = F.one_hot(labels, k).to(X)                 # (restarts, n, k)
        size = member.sum(1)[:, :, None]                    # (restarts, k, 1)
        # an empty cluster stays where it is
        centers = torch.where(size > 0, member.mT @ X / size.clamp(min=1), centers)
    inertia, order = distance.sum(1).sort()
    return labels[order], inertia


def cluster_pairs(tables, v, rng, starts=16, trials=4, rounds=30):
    """The joint target: group the tuples by their (T, K, K) tables of cousin pairs, one
    for each position and cousin.

    Of the v^2 pairs of parents at most v m occur, so that in blocks of synonyms the tables
    have a contrast of order one. First, k-means groups the tuples in the v-1 leading
    directions of the normalised residuals. Then each tuple takes the label that makes the
    labels of its cousins likeliest, until nothing changes. The start is kept whose labels
    have most mutual information with those of cousins. Returns (K,) int64 labels."""
    tables = tables.float()
    total = tables.sum((1, 2), keepdim=True)
    expected = tables.sum(2, keepdim=True) * tables.sum(1, keepdim=True) / total
    residual = (tables - expected) / expected.clamp(min=1e-12).sqrt()
    wide = residual.permute(1, 0, 2).flatten(1)             # (K, T K)
    U, S, _ = torch.linalg.svd(wide, full_matrices=False)
    # only the direction counts: the length says how often a tuple came
    X = F.normalize(U[:, : v - 1] * S[: v - 1])
    labels, _ = kmeans(X, v, rng, starts, trials, rounds)   # (starts, K)
    for _ in range(rounds):
        member = F.one_hot(labels, v).to(tables)            # (starts, K, v)
        # counts of (tuple, its cousin's label) and (label, its cousin's label); 0.1: no log 0
        cousin = torch.einsum("tij,rjv->rtiv", tables, member)  # (starts, T, K, v)
        pairs = member.mT[:, None] @ cousin + 0.1           # (starts, T, v, v)
        total = pairs.sum((2, 3), keepdim=True)
        by_chance = pairs.sum(2, keepdim=True) * pairs.sum(3, keepdim=True) / total
        log_odds = (pairs / by_chance).log()
        information = (pairs * log_odds).sum((1, 2, 3))     # (starts,) in nats
        relabelled = (cousin @ log_odds.mT).sum(1).argmax(2)
        if torch.equal(labels, relabelled):
            break
        labels = relabelled
    return labels[information.argmax()]


# ----------------------------------------------------------------------------------------
# the algorithm


class Tree:
    """What fit returns: for every level l the tuples seen (supports[l], a Support), and
    the symbol of level l+1 that each was given (symbols[l], (K,) int16)."""

    def __init__(self, v, s, L, target):
        self.v, self.s, self.L, self.target = v, s, L, target
        self.supports, self.symbols = [], []

    def __repr__(self):
        tuples = ", ".join(str(len(symbol)) for symbol in self.symbols)
        sizes = f"v={self.v}, s={self.s}, L={self.L}, target={self.target!r}"
        return f"Tree({sizes}, tuples=[{tuples}])"

    def label(self, x):
        """Strings (P, s^L) -> levels: x itself in uint8, then the estimates of the levels
        1..L-1, levels[l] of shape (P, s^(L-l)) in int16, on the device of the training.

        A tuple that was not seen in training gets the symbol -1, and so do its ancestors.
        Raises ValueError, naming x, unless x holds strings like those of fit."""
        x, _ = as_strings(x, self.v, self.s, self.L)
        levels = [x.to(self.symbols[0].device)]
        for support, symbol in zip(self.supports, self.symbols):
            symbol = torch.cat([symbol, symbol.new_tensor([-1])])
            levels.append(lift(levels[-1], support, symbol))
        return levels


def fit(x, v, s, target="latent", seed=0, root=None, **settings):
    """Learn the levels 1..L-1 of strings x, bottom-up: Algorithm 1 for target "latent".

    x: (P, s^L) symbols 0..v-1, an integer tensor, array or list. root: (P,) labels
    0..v-1, only read for target "root". settings: see SETTINGS. Works on x's device and
    returns a Tree. Raises ValueError, naming the argument."""
    options = read_settings(SETTINGS, PRESETS, settings)
    trials, rounds = options.trials, options.rounds
    x, L = as_strings(x, v, s)
    check_target(target)
    root = check_root(root, x, v) if target == "root" else None
    rng = torch.Generator().manual_seed(int(generator("cluster", seed).integers(2**62)))
    tree, h = Tree(v, s, L, target), x
    for l in range(L - 1):
        support = Support(h, v, s)
        tables = count(h, x, root, support, target, options.positions)
        if target == "joint":
            labels = cluster_pairs(tables, v, rng, options.starts, trials, rounds)
        else:
            phi = contexts(tables)
            found, _ = kmeans(phi, v, rng, options.restarts, trials, rounds)
            labels = found[0]
        tree.supports.append(support)
        tree.symbols.append(labels.to(torch.int16))
        h = lift(h, support, labels.to(torch.uint8))
    return tree


def check_target(target):
    if target not in TARGETS:
        raise ValueError(f"target: must be one of {', '.join(TARGETS)}, not {target!r}")


def check_root(root, x, v):
    """The root labels as (P,) uint8 on x's device, or a ValueError that names root."""
    if root is None:
        raise ValueError("root: the labels of the strings are needed for target root")
    root = whole_numbers("root", root, v)
    if root.shape != (len(x),):
        raise ValueError(f"root: must be ({len(x)},) whole numbers, one for each string")
    return root.to(x.device, torch.uint8)


def check_size(v, s, m, L, P, target="latent", **settings):
    """Raise ValueError, naming the flag, unless one run works and fits into memory."""
    options = read_settings(SETTINGS, PRESETS, settings)
    check_target(target)
    check_memory("depth", 3 * strings_bytes(TEST_STRINGS, s, L), "the test strings")
    check_memory("samples", strings_bytes(P, s, L), "the strings")
    K = min(v * m, P * s ** (L - 1))                        # tuples seen, at most
    # T positions and E targets of each as in beside, on the level that has most of them
    below = {"latent": s, "joint": 1}.get(target, s ** (L - 1))
    T, E = (s ** (L - 1), 1) if target == "root" else (s, (s - 1) * below)
    T = T if options.positions == "all" else 1
    E = E if options.positions != "element" else 1
    tables = T * E
    if target == "joint":
        check_memory("m", 40 * tables * K * K, "the tables of cousin tuples")
        check_memory("starts", 20 * options.starts * tables * K * v, "k-means")
    else:
        check_memory("depth", 32 * tables * K * v, "the contexts")
        held = K * max(16 * v, 8 * options.trials) + 8 * v * tables * v
        check_memory("restarts", options.restarts * held, "k-means")


# ----------------------------------------------------------------------------------------
# runs


def run(grammar, P, seed, target, device, settings):
    """Learn from P strings of a grammar, label fresh ones: (Tree, Score)."""
    v, s, m, L = grammar.v, grammar.s, grammar.m, grammar.L
    check_size(v, s, m, L, P, target, **settings)
    levels = grammar.sample(P, seed, device)
    x, root = levels[0], levels[L][:, 0]
    del levels                                              # frees the hidden levels
    tree = fit(x, v, s, target, seed, root, **settings)
    truth = grammar.sample(TEST_STRINGS, (seed, 1), device)
    estimate = tree.label(truth[0])
    right = [accuracy(estimate[l], truth[l], v) for l in range(1, L)]
    collapsed = [len(symbol.unique()) < v for symbol in tree.symbols]
    return tree, Score(right, collapsed)


def recover(grammars, samples, seeds, target="latent", device="cpu", **settings):
    """The runs of a sweep: learn grammars[r] from samples[r] strings with seeds[r].

    Returns a Score for each: the fraction of right labels of the levels 1..L-1 of
    TEST_STRINGS fresh strings, under the best matching of labels with symbols."""
    runs = zip(grammars, samples, seeds, strict=True)
    return [run(g, P, seed, target, device, settings)[1] for g, P, seed in runs]


def main():
    parser = Parser(__doc__)
    add_grammar_flags(parser, samples=4096)
    parser.add_argument("--target", choices=TARGETS, default="latent",
                        help="what is predicted (default latent)")
    add_settings(parser, SETTINGS, PRESETS)
    args = parser.parse_args()
    settings = given_settings(SETTINGS, args)
    device = pick_device(parser, args.device)
    v, s, m, L, P = args.v, args.s, args.m, args.depth, args.samples
    try:
        grammar = grammar_from_flags(parser, args)
        tree, score = run(grammar, P, args.seed, args.target, device, settings)
    except ValueError as error:
        parser.error(f"argument --{error}")

    print(f"{P} strings of {s**L} tokens, v={v} s={s} m={m} L={L}; v m^3 = {v * m**3}")
    print(f"target {args.target}\n")
    print(f"level   tuples seen   accuracy on {TEST_STRINGS} fresh strings")
    for l, right in enumerate(score.accuracy, 1):
        seen = f"{len(tree.symbols[l - 1])} of {v * m}"
        print(f"{l:5}   {seen:>11}   {right:8.3f}")
    print("\nlevel 1 as learned: the tuples in one line are one symbol")
    for a in range(min(v, 8)):
        codes = tree.supports[0].codes[tree.symbols[0] == a]
        pieces = digits(codes.cpu().numpy(), v, s)          # (tuples, s)
        print(f"  {a}: " + " | ".join(" ".join(map(str, piece)) for piece in pieces))


if __name__ == "__main__":
    run_script(main)
