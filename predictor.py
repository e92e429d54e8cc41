"""
Learner 2: stacked latent clustering, the paper's predictor-clusterer network.

    python predictor.py --depth 4 --samples 1024                  levels come one by one (fig. 10)
    python predictor.py --depth 4 --samples 1024 --target token   the control: raw tokens
    python predictor.py --depth 4 --detach layers+clusterer --ema-decay 0   local, no teacher

L-1 modules of one form stand on top of each other, trained together by gradient descent.
Module l turns s^(L-l) codes into s^(L-l-1) codes, one for every tuple of s:
  predictor   tuple -> phi: a distribution for every element of its cousins, the other tuples
              under the same grandparent. It is trained by cross-entropy, with the target
                latent  the cousins' level-l codes, from a teacher
                token   the raw tokens under the cousins
                joint   latent, and the teacher's code of the cousin, one level up (ours)
  clusterer   phi -> a soft code over d_h clusters, the symbol of level l+1. Tuples with similar
              phi are pulled to one code, and others are pushed apart.
The paper's exact losses are not public; ours stand at the functions that compute them.
"""

import copy
import math
import operator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

from grammar import (
    FILES, TEST_STRINGS, Settings, accuracy, as_strings, check_range, check_word, checksum, cousins,
    linear_probe, load_state, open_trace, read_flags, run, save_state, setting, step_generator,
)

TARGETS = ("latent", "token", "joint")
SEEDS = 3                           # of a cell of a sweep
STARTS, TRIALS, ROUNDS = 4, 4, 5    # of k-means; trials are the candidates for a new seed
PIECE = 256                         # strings encoded at a time


@dataclass
class Config(Settings):
    # how it is trained
    steps: int = setting(800, "training steps, at most (the paper has epochs)", 10**6, (1, 10**9))
    epochs: int = setting(200, "passes over the P strings, at most", 30, (1, 10**9))
    batch: int = setting(0, "strings a step; 0: 8 v, as 1 in v pairs are synonyms", 32, (0, 10**6))
    lr: float = setting(5e-3, "learning rate of AdamW", 3e-3, (0, 1e38))
    schedule: str = setting(
        "linear", "of lr: linear falls to 0, or constant", "constant", ("linear", "constant"))
    weight_decay: float = setting(1e-3, "of AdamW", 1e-3, (0, 1e38))
    # the modules
    hidden: int = setting(64, "width of the hidden layers", 150, (1, 10**5))
    codes: int = setting(0, "d_h, clusters of a module, v or more; 0: 5 v / 4", 128, (0, 4096))
    ema_decay: float = setting(0.985, "of the teacher; 0: no teacher", 0.985, (0, 1))
    detach: str = setting(
        "none", "layers: no gradient between modules; layers+clusterer: nor from clusterer to "
        "predictor", "none", ("none", "layers", "layers+clusterer"))
    # the losses
    elements: str = setting(
        "all", "of which cousins, and from which positions: all, or one", "all", ("all", "one"))
    positives: str = setting(
        "groups", "pairs pulled to one code: groups of k-means; threshold: (1 + cos)/2 of phi is "
        "above it; centred: of phi minus its mean", "threshold", ("groups", "threshold", "centred"))
    threshold: float = setting(0.8, "S_m, above which pairs are positive", 0.8, (0, 1))
    negative_weight: float = setting(1.0, "of pushing the other pairs apart", 0.5, (0, 100))
    sparsity: float = setting(0.0, "weight of the entropy of a code", 0.01, (0, 100))
    gate: float = setting(
        0.1, "share of the targets' entropy from which on clustering counts fully", 0.0, (0, 1))

    def sized(self, v, s, m, L):
        """With batch and codes for these sizes. Raises ValueError, naming codes."""
        codes = self.codes or 5 * v // 4
        check_range("codes", codes, v, 4096)                # as tokens are codes, too
        return replace(self, batch=self.batch or 8 * v, codes=codes)


def lowest(v, s, m):
    """Where a sweep begins."""
    return v * m**2


def highest(v, config):
    """Where it ends: a training must see each string 8 times."""
    return config.steps * (config.batch or 8 * v) // 8


# ---- the network -----------------------------------------------------------------------


class Module(nn.Module):
    """A predictor and a clusterer. heads: (I own positions, C cousins, E symbols of a cousin), what
    is predicted, for every position, as a tuple does not know which child it is. The paper's
    convolutions, of kernel and stride s, then of kernel 1, are linear maps of a tuple."""

    def __init__(self, s, d, hidden, heads):
        super().__init__()
        self.s, self.heads = s, heads
        width = math.prod(heads) * d
        self.predict = nn.Sequential(
            nn.Linear(s * d, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, width))
        # phi differs little between tuples, so the clusterer gets it normalised
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.cluster = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, d))
        # a tuple is s ones among s d inputs, which must give unit variance: a first layer
        # that is nearly linear takes long to tell a tuple from its symbols
        nn.init.normal_(self.predict[0].weight, std=s**-0.5)

    def forward(self, codes, local=False):
        """codes: (B, n, d) -> log phi of all N = B n/s tuples, (N, *heads, d), and the codes of
        the level above, (B, n/s, d). local: no gradient from clusterer to phi."""
        B, n, d = codes.shape
        tuples = codes.reshape(-1, self.s * d)                 # (N, s d)
        logits = self.predict(tuples)                          # (N, heads d)
        log_phi = logits.unflatten(1, (*self.heads, d)).log_softmax(-1)
        phi = log_phi.exp().flatten(1)                         # (N, heads d)
        if local:
            phi = phi.detach()
        above = self.cluster(self.norm(phi)).softmax(-1)       # (N, d)
        return log_phi, above.view(B, -1, d)


class Predictor(nn.Module):
    """The L-1 modules. P: on how many strings they are trained."""

    def __init__(self, v, s, L, target, config, P=0):
        super().__init__()
        check_word("target", target, TARGETS)
        self.v, self.s, self.L, self.target, self.config = v, s, L, target, config
        self.register_buffer("P", torch.tensor(P))
        # one string's codes of width 1, as only the number of targets counts
        codes = [torch.empty(1, s ** (L - l), 1) for l in range(L)]
        I, C = (s, s - 1) if config.elements == "all" else (1, 1)
        self.layers = nn.ModuleList()
        for l in range(L - 1):
            E = targets_of(target, codes, l, s, config.elements).shape[2]
            self.layers.append(Module(s, config.codes, config.hidden, (I, C, E)))

    def forward(self, x):
        """Strings (B, s^L) -> [log phi of every module], [codes (B, s^(L-l), d) of every level]."""
        detach, weight = self.config.detach, next(self.parameters())
        codes, log_phi = [F.one_hot(x.long(), self.config.codes).to(weight.dtype)], []
        for module in self.layers:
            below = codes[-1] if detach == "none" else codes[-1].detach()
            prediction, above = module(below, local=detach == "layers+clusterer")
            log_phi.append(prediction)
            codes.append(above)
        return log_phi, codes

    @torch.no_grad()
    def codes(self, x):
        """Strings (P, s^L) -> soft codes of levels 1..L-1, (P, s^(L-l), d). Raises ValueError."""
        x = as_strings(x, self.v, self.s, self.L)[0].to(next(self.parameters()).device)
        self.eval()
        parts = [self(some)[1][1:] for some in x.split(PIECE)]
        return [torch.cat(level) for level in zip(*parts)]

    def label(self, x):
        """Strings (P, s^L) -> levels 0 to L-1, the strings and then int64 ids, (P, s^(L-l))."""
        ids = [codes.argmax(-1) for codes in self.codes(x)]
        x, _ = as_strings(x, self.v, self.s)
        return [x.to(ids[0].device), *ids]

    def score(self, grammar, seed):
        """Accuracies on fresh strings of a grammar: of levels 1..L-1 by the best matching with the
        codes, then of the root, by the paper's linear probe."""
        truth = grammar.sample(TEST_STRINGS, (seed, 1))
        levels = [level.cpu() for level in self.label(truth[0])]
        right = [accuracy(levels[l], truth[l], self.v) for l in range(1, self.L)]
        return [*right, self.probe(grammar, seed, self.L)]

    def probe(self, grammar, seed, level):
        """The accuracy with which a linear probe reads level L, or L-1 node by node (fig. 3 right),
        from the final code; fitted on the grammar's P strings of this seed. With v m codes or more
        it can be 1 although synonyms share none, as it learns each tuple's parent."""
        train, test = grammar.sample(int(self.P), seed), grammar.sample(TEST_STRINGS, (seed, 1))
        nodes, final = self.s ** (self.L - level), []
        for strings in train[0], test[0]:
            code = self.codes(strings)[-1].cpu()               # (P, s, d)
            final.append(code.reshape(len(code), nodes, -1))
        read = linear_probe(final[0].flatten(0, 1), train[level].flatten(), self.v)
        return (read(final[1]).argmax(-1) == test[level]).float().mean().item()


def targets_of(target, codes, l, s, elements):
    """What is the target? The codes of the E symbols of a level-l tuple: its cousins predict them.
    codes: the teacher's, of all levels from 0. Returns (B, n, E, d) for n tuples a string."""
    symbols, n = codes[0] if target == "token" else codes[l], codes[l].shape[1] // s
    symbols = symbols.unflatten(1, (n, -1))                    # (B, n, symbols of a tuple, d)
    if elements == "one":
        symbols = symbols[:, :, :1]
    if target == "joint":                                      # and the tuple's own symbol
        symbols = torch.cat([symbols, codes[l + 1][:, :, None]], 2)
    return symbols


# ---- the losses ------------------------------------------------------------------------


def losses(student, teacher, x, rng):
    """The network's loss is the sum over modules l of
        prediction_l + gate_l * clustering_l,   gate_l = min(1, gain_l / config.gate).
    x: (B, s^L) strings. Returns two (L-1,) tensors, prediction and gate * clustering."""
    with torch.no_grad():                                      # nothing flows back into the teacher
        _, taught = teacher(x)
    log_phi, codes = student(x)
    config, target, predictions, clusterings = student.config, student.target, [], []
    for l, module in enumerate(student.layers):
        targets = targets_of(target, taught, l, module.s, config.elements)
        prediction, gain = prediction_loss(log_phi[l], targets, module.s)
        predictions.append(prediction)

        # two tuples of each string are enough for the clustering loss
        B, n = targets.shape[:2]
        pairs = torch.rand(B, n, generator=rng).topk(2).indices            # (B, 2)
        some = (pairs + n * torch.arange(B)[:, None]).flatten().to(x.device)
        phi = log_phi[l][some].detach().exp()                  # (2 B, I, C, E, d)
        if target == "joint":
            # a cousin's elements together weigh as much as its parent, which tells more
            elements, parent = phi[..., :-1, :], phi[..., -1:, :]
            phi = torch.cat([elements / elements.shape[3], parent], 3)
        positive = positive_pairs(phi.flatten(1), student.v, config, rng)
        clustering = clustering_loss(codes[l + 1].flatten(0, 1)[some], positive, config)
        # the gate: as long as phi predicts nothing, its groups are noise
        if config.gate:
            clustering = clustering * (gain / config.gate).clamp(0, 1)
        clusterings.append(clustering)
    return torch.stack(predictions), torch.stack(clusterings)


def prediction_loss(log_phi, targets, s):
    """The mean cross-entropy to the cousins' targets, in nats, and the gain, detached: 0 if phi
    predicts the mean target everywhere, 1 if it predicts every single target exactly.
    log_phi: (N, I, C, E, d); targets: (B, n, E, d), with B n = N."""
    families = targets.flatten(0, 1).unflatten(0, (-1, s))     # (N/s, s, E, d), grandparents'
    log_phi = log_phi.unflatten(0, (-1, s))                    # (N/s, s, I, C, E, d)
    I, C = log_phi.shape[2:4]
    spread = entropy(families)                                 # (N/s, s, E)
    loss = marginal = least = 0
    for i in range(I):
        # the tuple at position i has the heads for this position, and these cousins
        others = cousins(s, targets.device)[i, :C]
        seen = families[:, others]                             # (N/s, C, E, d)
        loss = loss - (seen * log_phi[:, i, i]).sum() / (I * seen[..., 0].numel())
        # the loss if phi knew nothing, and if it knew every single target
        marginal = marginal + entropy(seen.mean(0)).mean() / I
        least = least + spread[:, others].mean() / I
    return loss, (marginal - loss.detach()) / (marginal - least + 1e-3)


def entropy(p):
    """Of distributions along the last dimension, in nats."""
    return torch.special.entr(p).sum(-1)


def positive_pairs(phi, v, config, rng):
    """Which tuples should have one code: (n, D), the distributions of each in a row -> (n, n) bool.
    No threshold of similarity would fit all v, m and s, so by default k-means decides."""
    if config.positives == "groups":
        group = grouping(phi, v, rng)
        return group[:, None] == group
    # the paper's rule. Every phi is near the mean of the batch, which `centred` subtracts first
    if config.positives == "centred":
        phi = phi - phi.mean(0)
    unit = F.normalize(phi, dim=-1)
    return (1 + unit @ unit.T) / 2 > config.threshold


def grouping(phi, v, rng):
    """k-means of (n, D) distributions with v means and the distance KL(phi | mean), the best of
    some starts: (n,) int64, groups 0..v-1."""
    n, each = len(phi), torch.arange(STARTS, device=phi.device)
    x = phi + 1e-3                                             # no symbol is impossible
    log = x.log()
    distance = ((x * log).sum(1) - log @ x.T).clamp(min=0)     # (n, n): [i, j] is KL(x_j | x_i)

    # greedy k-means++: the next seed is the best of a few tuples, each drawn in proportion to its
    # distance from the nearest seed
    near, seeds = distance.new_full((STARTS, n), 1e9), []
    for draw in torch.rand(v, STARTS, TRIALS, generator=rng).to(x):
        upto = near.cumsum(1)                                  # (STARTS, n)
        trials = torch.searchsorted(upto, draw * upto[:, -1:]).clamp(max=n - 1)
        left = torch.minimum(near[:, None], distance[trials])  # (STARTS, TRIALS, n)
        best = left.sum(2).argmin(1)                           # (STARTS,)
        seeds.append(trials[each, best])
        near = left[each, best]
    means = x[torch.stack(seeds, 1)]                           # (STARTS, v, D)

    # then k-means: each tuple joins its likeliest mean, each mean becomes that of its tuples
    for _ in range(ROUNDS):
        likelihood = (means.flatten(0, 1).log() @ x.T).view(STARTS, v, n)
        member = (likelihood == likelihood.amax(1, keepdim=True)).to(x)
        means = member @ x / member.sum(2, keepdim=True).clamp(min=1)
    likelihood = (means.flatten(0, 1).log() @ x.T).view(STARTS, v, n)
    likeliest, group = likelihood.max(1)                       # (STARTS, n)
    return group[likeliest.sum(1).argmax()]


def clustering_loss(codes, positive, config):
    """Mean over all pairs of -log c_i.c_j where they are positive, and of negative_weight times
    -log(1 - c_i.c_j) where they are not; and sparsity times the mean entropy of a code.

    codes: (n, d) soft codes; positive: (n, n) bool. The form is ours: the logarithm keeps a
    gradient between nearly one-hot codes, so that two codes that split one symbol can merge."""
    n, overlap = len(codes), codes @ codes.T                   # the chance of one symbol, (n, n)
    chance = torch.where(positive, overlap + 0.01, 1.0001 - overlap)       # never 0
    weight = torch.where(positive, 1.0, config.negative_weight).fill_diagonal_(0)
    loss = -(weight * chance.log()).sum() / (n * (n - 1))
    if config.sparsity:
        # at exactly 0, which a softmax can reach, the gradient would be nan
        loss = loss + config.sparsity * entropy(codes.clamp(min=1e-30)).mean()
    return loss


# ---- training --------------------------------------------------------------------------


@torch.enable_grad()
def train(student, x, seed, callback=None, resume=None, progress=False):
    """The loop. x: (P, s^L) uint8 strings on the student's device."""
    config, teacher = student.config, copy.deepcopy(student).requires_grad_(False)
    weights, averages = list(student.parameters()), list(teacher.parameters())
    optimizer = torch.optim.AdamW(weights, config.lr, weight_decay=config.weight_decay, fused=True)
    steps = min(config.steps, math.ceil(config.epochs * len(x) / config.batch))

    parts = {"student": student, "teacher": teacher, "optimizer": optimizer}
    sizes = {"v": student.v, "s": student.s, "target": student.target}
    about = {**vars(config), **sizes, "seed": seed, "strings": checksum(x)}
    done = load_state(resume, about, parts)
    for step in trange(done + 1, steps + 1, initial=done, total=steps, disable=not progress):
        # all that a step draws depends on seed and step alone
        rng = step_generator(seed, step)
        batch = x[torch.randint(len(x), (config.batch,), generator=rng).to(x.device)]
        for module in student.layers:
            # running statistics begin as a plain mean, or a short training would end too early
            module.norm.momentum = max(0.1, 1 / step)
        prediction, clustering = losses(student, teacher, batch, rng)
        loss = prediction.sum() + clustering.sum()
        if not loss.isfinite():
            raise FloatingPointError(f"step {step}: the loss is not finite; lower the lr")

        if config.schedule == "linear":
            optimizer.param_groups[0]["lr"] = config.lr * (1 - (step - 1) / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # with ema_decay = 0 the teacher is the student, so that its codes are the student's own
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - config.ema_decay)
        if callback:
            callback(step, student, prediction.detach())
            student.train()
        save_state(resume, about, parts, step, step == steps)


def fit(x, v, s, target="latent", seed=0, device=None, callback=None, resume=None,
        progress=False, **settings):
    """Train on strings x, (P, s^L) symbols 0..v-1: a tensor, array or list. Returns a Predictor.

    settings: see Config. device: by default that of x. callback(step, network, prediction losses)
    is called after every step. resume: a file, written once a minute and at the end; if it exists,
    the training goes on from it. Raises ValueError, naming the argument, or FloatingPointError,
    naming the step, if the loss is not finite."""
    v, s, seed = operator.index(v), operator.index(s), operator.index(seed)
    x, L = as_strings(x, v, s)
    config = Config.of(**settings).sized(v, s, 2, L)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Predictor(v, s, L, target, config, len(x))
    x = x.to(device or x.device)
    train(model.to(x.device), x, seed, callback, resume, progress)
    return model


def recover(grammar, P, seed, target="latent", device="cpu", **settings):
    """One run of a sweep: the accuracies of levels 1..L, learned from P strings."""
    x = grammar.sample(P, seed, device)[0]
    return fit(x, grammar.v, grammar.s, target, seed, **settings).score(grammar, seed)


def main():
    args, grammar, config = read_flags(__doc__, 4096, TARGETS, Config, FILES)
    v, s, m, L, P = args.v, args.s, args.m, args.depth, args.samples
    if config.hidden <= 64:             # on matrices this small more threads gain nothing
        torch.set_num_threads(1)
    truth = grammar.sample(256, (args.seed, 1))
    columns = [f"{kind} {l}" for l in range(1, L) for kind in ("accuracy", "prediction")]
    trace = open_trace(args.trace, ["step", *columns, "v", "m", "P"])
    every = max(1, min(config.steps, config.epochs * P // config.batch) // 80)

    def callback(step, network, prediction):
        if args.trace and step % every == 0:
            row, labels = [], network.label(truth[0])
            for l in range(1, L):
                row += [accuracy(labels[l].cpu(), truth[l], v), prediction[l - 1].item()]
            print(step, *row, v, m, P, sep=",", file=trace, flush=True)

    x = grammar.sample(P, args.seed, args.device)[0]
    model = fit(x, v, s, args.target, args.seed, None, callback, args.resume, True, **vars(config))
    print(f"{P} strings of {s**L} tokens, v={v} s={s} m={m} L={L}, v m^3 = {v * m**3}")
    print(f"target {args.target}\n\nlevel   accuracy   symbols in use (of {v})")
    labels, (*scores, root) = model.label(truth[0]), model.score(grammar, args.seed)
    for l, right in enumerate(scores, 1):
        print(f"{l:5}   {right:8.3f}{len(labels[l].unique()):19}")
    for l, right in (L, root), (L - 1, model.probe(grammar, args.seed, L - 1)):
        print(f"{l:5}   {right:8.3f}   by a linear probe of the code")


if __name__ == "__main__":
    run(main)
