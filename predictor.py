"""
Learner 2: stacked latent clustering, the paper's predictor-clusterer network (section 4, fig. 8).

    python predictor.py --depth 4 --samples 1024                  levels come one by one (fig. 10)
    python predictor.py --depth 4 --samples 1024 --target token   the control: raw tokens
    python predictor.py --depth 4 --detach layers+clusterer --ema 0   local, no teacher (fig. 9)

L-1 modules of one form stand on top of each other, trained together by gradient descent.
Module l turns s^(L-l) codes into s^(L-l-1) codes, one for every tuple of s:

  predictor   tuple -> phi, a distribution for every element of every cousin tuple (the other
              tuples under the same grandparent), one for each child position the tuple may have.
              It is trained by cross-entropy, and the target is what the learners differ in:
                latent  the cousins' level-l codes, from a teacher: v m^3 strings on every level
                token   the raw tokens under the cousins: v m^(l+2) strings for level l
                joint   latent, and the teacher's own symbol for the cousin, one level up (ours)
  clusterer   phi -> a soft code over d_h clusters, the symbol of level l+1. Tuples with like phi
              are pulled to one code, and tuples with unlike phi are pushed apart.

Labels are used in the scores alone. The paper's exact losses are not public: what we chose is
said where it is done. Every weight has a leading dimension R: R runs train side by side, and on
one CPU thread a run's result is the same to the byte whichever runs stand beside it (where the
widths and the batch are multiples of 16, as all defaults of v=8 are).

P* is about v m^3 at every depth: the tables are in README and assets.
"""

import copy
import importlib.util
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from grammar import (
    TEST_STRINGS, Parser, Score, Setting, accuracy, add_grammar_flags, add_settings, as_strings,
    check_memory, choice, cousins, given_settings, grammar_from_flags, linear_probe, paper_preset,
    pick_device, read_settings, real, run_script, whole,
)

TARGETS = ("latent", "token", "joint")

SETTINGS = (
    Setting("steps", whole(1), 800, 10**6, "training steps, at most"),
    Setting("epochs", whole(1), 200, 30, "passes over the P strings, at most"),
    Setting("batch", whole(0), 0, 32, "strings a step; 0 is 8 v, as 1/v of its pairs are synonyms"),
    Setting("lr", real(0, 1), 5e-3, 3e-3, "learning rate of AdamW"),
    Setting("schedule", choice("linear", "constant"), "linear", "constant",
            "linear: the learning rate falls to 0"),
    Setting("decay", real(0, 10), 1e-3, 1e-3, "weight decay of AdamW"),
    Setting("hidden", whole(1), 64, 150, "width of the hidden layers"),
    Setting("codes", whole(0, 4096), 0, 128, "d_h, clusters of a module, v or more; 0 is 5 v / 4"),
    Setting("ema", real(0, 1), 0.985, 0.985,
            "what the teacher keeps of itself in a step; 0: no teacher, the student's own codes"),
    Setting("detach", choice("none", "layers", "layers+clusterer"), "none", "none",
            "stop the gradient between modules, and from each clusterer to its predictor"),
    Setting("combine", choice("sum", "upgrad"), "sum", "upgrad",
            "the losses: their sum, or Jacobian descent, which needs the package torchjd"),
    Setting("elements", choice("all", "one"), "all", "all",
            "one: a single element of a single cousin is predicted, from one position (fig. 8)"),
    Setting("alike", choice("groups", "threshold", "centred"), "groups", "threshold",
            "tuples with one code: of one k-means group, or of like phi (centred: minus its mean)"),
    Setting("threshold", real(0, 1), 0.8, 0.8, "S_m, the similarity of alike tuples"),
    Setting("separation", real(0, 100), 1.0, 0.5, "weight of pushing codes apart"),
    Setting("sparsity", real(0, 100), 0.0, 0.01, "weight of the entropy of a code"),
    Setting("gate", real(0, 1), 0.1, 0.0,
            "share of the target's information that a predictor must have found before its "
            "clusterer learns at full rate; 0: no gate"),
)
# upgrad needs a package that is not among our requirements, so it has to be asked for by name
PRESETS = {"default": {}, "paper": paper_preset(SETTINGS) | {"combine": "sum"}}

STARTS, TRIALS, ROUNDS = 4, 4, 5  # of k-means; trials are the candidates for a new seed
BLOCK = 100                       # steps whose random numbers are drawn at once
MOMENTUM = 0.1                    # share of a batch in the running mean and variance
CHUNK_TOKENS = 2**16              # tokens that are encoded at once


# --------------------------------------------------------------------------------------------------
# one module


class Linear(nn.Module):
    """R linear maps side by side, one for every run: (R, n, inputs) -> (R, n, outputs)."""

    def __init__(self, R, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(R, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(R, 1, outputs))

    def forward(self, h):
        return torch.baddbmm(self.bias, h, self.weight)


class BatchNorm(nn.Module):
    """Every run normalises its own batch, (R, n, width). There is no scale or shift to learn."""

    def __init__(self, R, width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(R, 1, width))
        self.register_buffer("var", torch.ones(R, 1, width))
        self.batches = 0

    def forward(self, h):
        if not self.training:
            return (h - self.mean) / (self.var + 1e-5).sqrt()
        mean = h.mean(1, keepdim=True)
        centred = h - mean
        var = centred.square().mean(1, keepdim=True)

        # a plain mean of the first batches, so that it is right from the first step on
        self.batches += 1
        share = max(MOMENTUM, 1 / self.batches)
        self.mean += share * (mean.detach() - self.mean)
        self.var += share * (var.detach() - self.var)
        return centred / (var + 1e-5).sqrt()


class Module(nn.Module):
    """A predictor and a clusterer. heads: (own positions, cousins, elements) that are predicted.

    The paper's convolutions of kernel and stride s, and then of kernel 1, are linear per tuple."""

    def __init__(self, R, s, d, hidden, heads):
        super().__init__()
        self.s, self.d, self.heads = s, d, heads
        width = math.prod(heads) * d
        self.predict = nn.Sequential(
            Linear(R, s * d, hidden), nn.GELU(),
            Linear(R, hidden, hidden), nn.GELU(),
            Linear(R, hidden, width),
        )
        # phi differs little from one tuple to another
        self.norm = BatchNorm(R, width)
        self.cluster = nn.Sequential(
            Linear(R, width, hidden), nn.GELU(),
            Linear(R, hidden, d),
        )

    def forward(self, codes, local=False):
        """codes: (R, B, n, d) -> log phi (R, N, *heads, d) of all N = B n/s tuples in order, and
        the codes of the level above, (R, B, n/s, d). local: the clusterer does not teach phi."""
        R, B, n, d = codes.shape
        tuples = codes.reshape(R, -1, self.s * d)              # (R, N, s d)
        logits = self.predict(tuples)                          # (R, N, heads d)
        log_phi = logits.unflatten(-1, (*self.heads, d)).log_softmax(-1)
        phi = log_phi.exp().flatten(2)                         # (R, N, heads d)
        # the paper's "stop-gradient from clusterer to predictor"
        if local:
            phi = phi.detach()
        above = self.cluster(self.norm(phi)).softmax(-1)       # (R, N, d)
        return log_phi, above.view(R, B, -1, d)


# --------------------------------------------------------------------------------------------------
# the network


class Network(nn.Module):
    """The L-1 modules of R runs. heads: the heads of each module, as in Module."""

    def __init__(self, R, s, d, hidden, heads):
        super().__init__()
        self.sizes = {"s": s, "d": d, "hidden": hidden, "heads": heads}
        self.layers = nn.ModuleList(Module(R, s, d, hidden, shape) for shape in heads)

    def forward(self, x, detach="none", top=None):
        """x: (R, B, s^L) strings -> ([log phi of module l], [codes of level l]), l from 0 on.

        The codes of a level are (R, B, s^(L-l), d), those of level 0 the tokens. top: the last
        level wanted, L-1 if None."""
        codes = [F.one_hot(x.long(), self.sizes["d"]).float()]
        log_phi = []
        for module in self.layers[:top]:
            below = codes[-1] if detach == "none" else codes[-1].detach()
            prediction, above = module(below, detach == "layers+clusterer")
            log_phi.append(prediction)
            codes.append(above)
        return log_phi, codes

    @torch.no_grad()
    def draw(self, generators):
        """Draw the weights of every run from its own CPU generator."""
        for r, generator in enumerate(generators):
            for layer in self.modules():
                if isinstance(layer, Linear):
                    bound = layer.weight.shape[1] ** -0.5
                    layer.weight[r].uniform_(-bound, bound, generator=generator)
            # a tuple is s ones among s d inputs: the first layer must have unit variance there,
            # or it is nearly linear, and takes long to tell a tuple from its symbols
            for module in self.layers:
                module.predict[0].weight[r].normal_(std=module.s**-0.5, generator=generator)

    def run(self, r):
        """A copy of run r alone."""
        alone = Network(1, **self.sizes)
        alone.load_state_dict({name: w[r : r + 1] for name, w in self.state_dict().items()})
        return alone.to(next(self.parameters()).device)


def heads_of(target, elements, s, L):
    """For every module: (own positions, cousins, symbols known of a cousin) that it predicts."""
    heads = []
    for l in range(L - 1):
        symbols = s ** (l + 1) if target == "token" else s
        own, others = s, s - 1
        if elements == "one":
            own, others, symbols = 1, 1, 1
        if target == "joint":
            symbols += 1                                # the cousin's own
        heads.append((own, others, symbols))
    return heads


# --------------------------------------------------------------------------------------------------
# the losses; each is (R,) or (R, L-1), one number for every run


def goal(target, codes, l, s, elements):
    """What the tuples of level l are known by: (R, B, s^(L-l-1), E, d), for E symbols.

    codes: the teacher's, of the levels from 0 on."""
    n = codes[0].shape[2] // s ** (l + 1)

    def below(h):
        symbols = h.unflatten(2, (n, -1))               # (R, B, n, symbols under a tuple, d)
        return symbols if elements == "all" else symbols[..., :1, :]

    if target == "latent":
        return below(codes[l])
    if target == "token":
        return below(codes[0])
    if target == "joint":
        return torch.cat([below(codes[l]), codes[l + 1].unsqueeze(3)], 3)


def prediction_loss(log_phi, aim, s):
    """Cross-entropy to what the cousins are known by. A tuple uses the heads for its own child
    position alone.

    log_phi: (R, N, I, C, E, d); aim: (R, B, n, E, d), a goal, with B n = N.
    Returns (loss, gain), (R,) both: the mean over tuples, cousins and elements in nats; and,
    without gradient, the share of what can be known about the aim that is known already."""
    R, N, I, C, E, d = log_phi.shape
    # what a tuple's cousins are known by
    families = aim.reshape(R, N // s, s, E, d)            # the s tuples under one grandparent
    others = cousins(s, aim.device)[:I, :C]               # (I, C)
    seen = families[:, :, others]                          # (R, N/s, I, C, E, d)

    # of the heads for all positions, those for the tuple's own
    log_phi = log_phi.view(R, N // s, s, I, C, E, d)
    own = log_phi[:, :, :I].diagonal(dim1=2, dim2=3).movedim(-1, 2)     # as seen
    terms = seen.shape[1:-1].numel()
    loss = -(seen * own).flatten(1).sum(1) / terms         # (R,)

    # the loss falls from the marginal entropy, if phi knows nothing, to the conditional one
    with torch.no_grad():
        marginal = entropy(seen.mean(1)).flatten(1).mean(1)
        conditional = entropy(seen).flatten(1).mean(1)
        gain = (marginal - loss) / (marginal - conditional + 1e-3)
    return loss, gain


def entropy(p):
    """Of distributions along the last dimension, in nats."""
    return torch.xlogy(p, p).sum(-1).neg().clamp(min=0)


def grouping(phi, v, noise):
    """Which tuples should have one code: the likeliest way found to share them among v parents.

    phi: (K, n, D), every tuple's distributions in a row, for K modules and runs side by side;
    noise: (K, v, STARTS, TRIALS) uniform numbers. Returns (K, n) int64, groups 0..v-1.
    It is k-means, where a tuple is as far from a parent as KL(phi | mean phi of the parent's
    tuples); of several starts the best. How far parents are apart depends on v, m, s and on how
    well phi is known, so no threshold fits all, and a partition needs none."""
    n = phi.shape[1]
    x = phi + 1e-3                                         # no symbol is impossible
    log = x.log()
    own = (x * log).sum(-1)                                # (K, n)
    distance = (own[:, None] - log @ x.mT).clamp(min=0)    # (K, n, n): of column from row

    # greedy k-means++: of a few tuples, drawn in proportion to their distance from the nearest
    # seed, the one that leaves the least distance is the next seed
    near = torch.full((len(x), STARTS, n), 1e9, device=x.device)
    run = torch.arange(len(x), device=x.device)[:, None, None]
    start = torch.arange(STARTS, device=x.device)[:, None]
    seeds = []
    for draw in noise.unbind(1):
        upto = near.cumsum(-1)                             # (K, STARTS, n)
        trials = torch.searchsorted(upto, draw * upto[..., -1:]).clamp(max=n - 1)
        left = torch.minimum(near[:, :, None], distance[run, trials])   # (K, STARTS, TRIALS, n)
        best = left.sum(-1).argmin(-1, keepdim=True)       # (K, STARTS, 1)
        seeds.append(trials.gather(-1, best))
        near = left[run, start, best].squeeze(2)           # (K, STARTS, n)
    seeds = torch.cat(seeds, -1).flatten(1)                # (K, STARTS v)
    parents = x[run[..., 0], seeds]                        # (K, STARTS v, D)

    # then k-means: the likeliest parent of each tuple, the mean tuple of each parent
    for _ in range(ROUNDS):
        likelihood = (parents.log() @ x.mT).unflatten(1, (STARTS, v))       # (K, STARTS, v, n)
        member = likelihood == likelihood.amax(2, keepdim=True)
        member = member.flatten(1, 2).float()              # (K, STARTS v, n)
        parents = member @ x / member.sum(-1, keepdim=True).clamp(min=1)
    likelihood = (parents.log() @ x.mT).unflatten(1, (STARTS, v))
    best = likelihood.amax(2).sum(-1).argmax(-1)           # (K,) the best start
    return likelihood[run[:, 0, 0], best].argmax(1)        # (K, n)


def similar(phi, threshold, centred):
    """The paper's rule: (..., n, D) -> (..., n, n) bool, S_ij = (1 + cos(phi_i, phi_j))/2 is above
    the threshold. centred: of phi minus its mean over the batch.

    As the rule stands, every phi is near the mean, all pairs are alike and the codes collapse to
    one, at the paper's sizes too; centred it works there."""
    if centred:
        phi = phi - phi.mean(-2, keepdim=True)
    unit = F.normalize(phi, dim=-1)
    return (1 + unit @ unit.mT) / 2 > threshold


def clustering_loss(codes, alike, separation, sparsity=0.0):
    """Mean over all pairs of -log c_i.c_j where they are alike, and of separation times
    -log(1 - c_i.c_j) where they are not; and sparsity times the mean entropy of a code.

    codes: (..., n, d) soft codes; alike: (..., n, n) bool. Returns (...), one for each module.
    c_i.c_j is the chance that symbols drawn from the two codes are the same.
    Our choice of form: unlike a squared distance the logarithm keeps a gradient between two codes
    that are both nearly one-hot, so that codes that split one symbol can still merge."""
    n = codes.shape[-2]
    overlap = codes @ codes.mT                             # (..., n, n)
    alike = alike.float()                                  # torch.where would be slow

    # the chance that the two symbols are the same, or different, as they should be; never 0
    chance = torch.addcmul(1.0001 - 0.9901 * alike, 2 * alike - 1, overlap)
    weight = separation + (1 - separation) * alike
    weight.diagonal(dim1=-2, dim2=-1).zero_()              # a tuple and itself are no pair
    loss = -(weight * chance.log()).flatten(-2).sum(-1) / (n * (n - 1))
    if sparsity:
        loss = loss + sparsity * entropy(codes).mean(-1)
    return loss


def losses(student, wanted, draw, v, target, options):
    """(prediction, clustering), (R, L-1) each: the losses of every run and module on a Draw.

    wanted: the teacher's codes of the same strings."""
    # what the student predicts of the cousins, and how it names the tuples
    log_phi, codes = student(draw.strings, options.detach)
    s = student.sizes["s"]
    run = torch.arange(len(draw.strings), device=draw.strings.device)[:, None]
    predictions, gains, phi, items = [], [], [], []
    for l, guess in enumerate(log_phi):
        aim = goal(target, wanted, l, s, options.elements)
        loss, gain = prediction_loss(guess, aim, s)
        predictions.append(loss)
        gains.append(gain)

        # a few tuples of each string are enough for the clustering loss
        chosen = choose(draw.tuples[:, l], aim.shape[2])               # (R, n)
        some = guess.detach().flatten(2)[run, chosen].exp()
        if target == "joint":
            # a cousin's parent tells more than its elements: they weigh as much together
            some = some.unflatten(-1, guess.shape[2:])
            some[..., :-1, :] /= some.shape[-2] - 1
            some = some.flatten(2)
        phi.append(some)                                               # (R, n, heads d)
        above = codes[l + 1].flatten(1, 2)                             # (R, N, d)
        items.append(above[run, chosen])                               # (R, n, d)

    # raw tokens are more the higher the module: zeros fill up what the lower ones lack
    widest = max(some.shape[-1] for some in phi)
    phi = torch.stack([F.pad(some, (0, widest - some.shape[-1])) for some in phi], 1)
    if options.alike == "groups":
        group = grouping(phi.flatten(0, 1), v, draw.noise.flatten(0, 1))
        group = group.view(phi.shape[:3])                              # (R, L-1, n)
        alike = group[..., None] == group[..., None, :]
    else:
        alike = similar(phi, options.threshold, options.alike == "centred")
    items = torch.stack(items, 1)                                      # (R, L-1, n, d)
    clustering = clustering_loss(items, alike, options.separation, options.sparsity)

    # first predict, then cluster
    if options.gate:
        clustering = clustering * (torch.stack(gains, 1) / options.gate).clamp(0, 1)
    return torch.stack(predictions, 1), clustering


# --------------------------------------------------------------------------------------------------
# training


class Draw(NamedTuple):
    """The random numbers of one step."""

    strings: torch.Tensor    # (R, B, s^L): the batch of every run
    tuples: torch.Tensor     # (R, L-1, B, 2) uniform: which tuples of a string are compared
    noise: torch.Tensor      # (R, L-1, v, STARTS, TRIALS) uniform: for k-means


def draws(xs, batch, v, L, generators):
    """Endless random numbers, every run's from its own CPU generator, many steps at once."""
    device = xs[0].device
    while True:
        strings, tuples, noise = [], [], []
        for x, generator in zip(xs, generators):
            rows = torch.randint(len(x), (BLOCK, batch), generator=generator)
            strings.append(x[rows.to(device)])
            tuples.append(torch.rand(BLOCK, L - 1, batch, 2, generator=generator))
            noise.append(torch.rand(BLOCK, L - 1, v, STARTS, TRIALS, generator=generator))
        block = [torch.stack(part, 1).to(device) for part in (strings, tuples, noise)]
        for step in range(BLOCK):
            yield Draw(*(part[step] for part in block))


def choose(uniform, n):
    """Two different tuples out of the n of every string, as places in the batch.

    uniform: (R, B, 2) in [0, 1). Returns (R, 2 B) int64."""
    first = (uniform[..., 0] * n).long()
    second = (first + 1 + (uniform[..., 1] * (n - 1)).long()) % n
    start = n * torch.arange(uniform.shape[1], device=uniform.device)
    return torch.cat([start + first, start + second], 1)


def train(xs, v, s, L, target, seeds, steps, options, watch=None):
    """The training loop, for R runs of equally many steps. Returns R Predictors."""
    # every run has its own generator, for its weights and then for its batches
    R, device = len(xs), xs[0].device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    heads = heads_of(target, options.elements, s, L)
    student = Network(R, s, options.codes, options.hidden, heads)
    student.draw(generators)
    student.to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    weights = list(student.parameters())
    # not fused: that one rounds the last few weights of a tensor in another way
    optimizer = torch.optim.AdamW(weights, options.lr, weight_decay=options.decay, foreach=True)
    random = draws(xs, options.batch, v, L, generators)
    top = {"token": 0, "latent": L - 2, "joint": L - 1}[target]    # the last level it teaches
    ended = {}

    for step in range(steps):
        draw = next(random)
        if options.schedule == "linear":
            optimizer.param_groups[0]["lr"] = options.lr * (1 - step / steps)

        # the teacher reads the same strings, and nothing flows back into it
        with torch.no_grad():
            wanted = teacher(draw.strings, top=top)[1]
        prediction, clustering = losses(student, wanted, draw, v, target, options)
        parts = torch.cat([prediction, clustering], 1)     # (R, 2 (L-1))
        loss = parts.sum(1)                                # (R,) one loss for every run

        # a run whose loss is not finite ends here, and its neighbours go on
        for r, finite in enumerate(loss.isfinite().tolist()):
            if not finite and r not in ended:
                ended[r] = Predictor(student.run(r), v, L, target, step + 1)
        if len(ended) == R:
            break

        # runs share no weight: the gradient of the sum is each run's own
        optimizer.zero_grad()
        if options.combine == "sum":
            loss.sum().backward()
        else:
            jacobian_descent(parts[0], weights)
        optimizer.step()

        # with ema = 0 the teacher is the student, so that its codes are the student's own
        with torch.no_grad():
            for old, new in zip(teacher.parameters(), weights):
                old.mul_(options.ema).add_(new, alpha=1 - options.ema)
        if watch:
            watch(step + 1, steps, student, prediction.detach())

    return [ended.get(r) or Predictor(student.run(r), v, L, target) for r in range(R)]


def jacobian_descent(parts, weights):
    """The gradient of the paper's Jacobian descent: no loss may grow to first order."""
    from torchjd.aggregation import UPGrad
    from torchjd.autojac import backward, jac_to_grad

    backward(list(parts))
    jac_to_grad(weights, UPGrad())


def fit_many(xs, v, s, target="latent", seeds=(0,), watch=None, **settings):
    """R runs side by side: run r learns from the strings xs[r], (P, s^L), with seeds[r].

    xs: anyone's strings, each a tensor, array or list of symbols 0..v-1; P may differ.
    settings: see SETTINGS. watch(step, steps, network, prediction) is called after every step,
    with the Network of the runs that train together and their prediction losses, (R, L-1).
    Returns R Predictors. One whose loss stopped being finite has the weights of that step, and
    its number as diverged. Raises ValueError, naming the argument or setting."""
    options = read_options(v, target, settings)
    if len(xs) != len(seeds) or len(xs) == 0:
        raise ValueError(f"seeds: must be one for each of the xs, not {len(seeds)} for {len(xs)}")
    xs, depths = zip(*(as_strings(x, v, s) for x in xs))
    if len(set(depths)) > 1:
        raise ValueError("x: the strings of all runs must have one length")

    # runs of equally many steps share one loop; Jacobian descent takes one run at a time
    together = {}
    for r, x in enumerate(xs):
        steps = min(options.steps, math.ceil(options.epochs * len(x) / options.batch))
        alone = r if options.combine == "upgrad" else 0
        together.setdefault((steps, alone), []).append(r)
    learned = {}
    for (steps, _), runs in together.items():
        x, seed = [xs[r] for r in runs], [seeds[r] for r in runs]
        trained = train(x, v, s, depths[0], target, seed, steps, options, watch)
        learned.update(zip(runs, trained))
    return [learned[r] for r in range(len(xs))]


def fit(x, v, s, target="latent", seed=0, watch=None, **settings):
    """Learn from strings x, (P, s^L): one Predictor. It is fit_many of one run.

    Raises FloatingPointError if the loss stops being finite."""
    learned = fit_many([x], v, s, target, [seed], watch, **settings)[0]
    if learned.diverged:
        options = read_options(v, target, settings)
        raise FloatingPointError(
            f"step {learned.diverged}: the loss is no longer finite; "
            f"lower lr (now {options.lr:g}) or decay (now {options.decay:g})"
        )
    return learned


def read_options(v, target, settings):
    """All settings as attributes of one object. Raises ValueError, naming the setting."""
    options = read_settings(SETTINGS, PRESETS, settings)
    options.batch = options.batch or 8 * v
    options.codes = options.codes or 5 * v // 4
    if target not in TARGETS:
        raise ValueError(f"target: must be one of {', '.join(TARGETS)}, not {target!r}")
    if options.codes < v:
        raise ValueError(f"codes: must be v = {v} or more (0 for 5 v / 4), as tokens are codes too")
    if options.combine == "upgrad" and not importlib.util.find_spec("torchjd"):
        raise ValueError("combine: upgrad needs pip install 'torchjd[quadprog-projector]'")
    return options


def check_size(v, s, m, L, P, target="latent", **settings):
    """Raise ValueError, naming the flag, if a run of these sizes would need too much memory."""
    options = read_options(v, target, settings)
    hidden, d, batch = options.hidden, options.codes, options.batch
    check_memory("depth", 2 * TEST_STRINGS * s**L, f"{TEST_STRINGS} strings of {s**L} tokens")
    check_memory("samples", 2 * P * s**L, f"{P} strings of {s**L} tokens")
    weights, numbers = 0, 6 * (L - 1) * (2 * batch) ** 2     # the table of pairs, to begin with
    for l, heads in enumerate(heads_of(target, options.elements, s, L)):
        width = math.prod(heads) * d
        weights += hidden * (s * d + hidden + 2 * width + d)
        numbers += batch * s ** (L - l - 1) * (s * d + 6 * hidden + 8 * width)
    # the weights stand with their gradient, two moments and the teacher
    check_memory("hidden", 4 * 5 * weights, "the weights")
    check_memory("batch", 4 * numbers + BLOCK * batch * s**L, "a step")


# --------------------------------------------------------------------------------------------------
# what is learned, and its scores


class Predictor:
    """What one run has learned. diverged: the step whose loss was not finite, 0 if all were."""

    def __init__(self, network, v, L, target, diverged=0):
        self.network, self.v, self.s, self.L = network, v, network.sizes["s"], L
        self.target, self.diverged = target, diverged

    def __repr__(self):
        d, hidden = self.network.sizes["d"], self.network.sizes["hidden"]
        sizes = f"v={self.v}, s={self.s}, L={self.L}, codes={d}, hidden={hidden}"
        return f"Predictor(target={self.target}, {sizes}, diverged={self.diverged})"

    @torch.no_grad()
    def codes(self, x, hard=False):
        """(P, s^L) strings -> the codes of levels 1..L-1: (P, s^(L-l), d) float distributions.

        hard: their arg-max, (P, s^(L-l)) int64. Raises ValueError, naming x."""
        x, L = as_strings(x, self.v, self.s)
        if L != self.L:
            raise ValueError(f"x: must have s^L = {self.s**self.L} tokens, not {x.shape[1]}")
        x = x.to(next(self.network.parameters()).device)
        training = self.network.training
        self.network.eval()
        parts = []
        for some in x.split(max(1, CHUNK_TOKENS // x.shape[1])):
            codes = [h[0] for h in self.network(some[None])[1][1:]]
            parts.append([h.argmax(-1) for h in codes] if hard else codes)
        self.network.train(training)
        return [torch.cat(level) for level in zip(*parts)]

    def label(self, x):
        """(P, s^L) strings -> levels: levels[0] the strings, levels[l] (P, s^(L-l)) int64 ids,
        l = 1..L-1. Raises ValueError, naming x."""
        return [as_strings(x, self.v, self.s)[0], *self.codes(x, hard=True)]

    def save(self, file):
        """Write sizes and weights to a file, for load."""
        about = {"v": self.v, "L": self.L, "target": self.target, "diverged": self.diverged}
        weights = self.network.state_dict()
        torch.save({"predictor": about, "sizes": self.network.sizes, "weights": weights}, file)


def load(file):
    """The Predictor that save wrote, on the CPU. Raises ValueError if it wrote no such file."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        about, sizes = saved["predictor"], saved["sizes"]
        network = Network(1, **sizes)
        network.load_state_dict(saved["weights"])
        learned = Predictor(network, **about)
        right = learned.L == len(sizes["heads"]) + 1 and learned.v in range(2, sizes["d"] + 1)
    except OSError:
        raise
    except Exception:
        right = False
    if not right:
        raise ValueError(f"file: {file} is not what Predictor.save wrote")
    return learned


def score(learned, truth):
    """How well the levels 1..L-1 of fresh strings are labelled; truth: their levels.

    A row for each: accuracy under the best matching of codes and symbols; codes in use, by 1 in
    1000 tuples or more; entropy of their use in nats, log v if all is well."""
    rows = []
    for labels, symbols in zip(learned.label(truth[0])[1:], truth[1:]):
        use = labels.flatten().bincount() / labels.numel()
        in_use = int((use >= 1e-3).sum())
        rows.append((accuracy(labels, symbols, learned.v), in_use, float(entropy(use))))
    return rows


def probe(learned, levels, truth):
    """Linear probes of the frozen final code, trained on the labels of the training strings.

    levels, truth: of training and of fresh strings. Returns (accuracy for level L-1 at every
    position, accuracy for the root from all positions, different answers for the root). Where
    d_h >= v m, a probe could read level L-1 from tuples that were never merged."""
    v, L = learned.v, learned.L
    known, fresh = learned.codes(levels[0])[-1], learned.codes(truth[0])[-1]     # (P, s, d)
    read = linear_probe(known.flatten(0, 1), levels[L - 1].flatten(), v)
    below = read(fresh).argmax(-1) == truth[L - 1]                               # (P, s)
    read = linear_probe(known.flatten(1), levels[L][:, 0], v)
    answers = read(fresh.flatten(1)).argmax(-1)                                  # (P,)
    root = answers == truth[L][:, 0]
    return below.float().mean().item(), root.float().mean().item(), len(answers.unique())


def recover(grammars, samples, seeds, target="latent", device="cpu", **settings):
    """What the sweep asks: run r learns from samples[r] strings of grammars[r], with seeds[r].

    All grammars have the same v, s, m, L. Returns a Score for each run: levels 1..L-1 by the best
    matching, and the root by a linear probe of the final code. floor: the same, untrained."""
    v, s, L = grammars[0].v, grammars[0].s, grammars[0].L
    known = [g.sample(P, seed, device) for g, P, seed in zip(grammars, samples, seeds)]
    xs = [levels[0] for levels in known]
    learned = fit_many(xs, v, s, target, seeds, **settings)
    # untrained: steps of no length, that show the batch norms the size of phi
    still = settings | {"lr": 0.0, "steps": 10}
    untrained = fit_many(xs, v, s, target, seeds, **still)

    scores = []
    for grammar, levels, seed, run, before in zip(grammars, known, seeds, learned, untrained):
        if run.diverged:
            scores.append(Score([0.0] * L, [True] * L, None, run.diverged))
            continue
        truth = grammar.sample(TEST_STRINGS, (seed, 1), device)
        rows = score(run, truth)
        _, root, answers = probe(run, levels, truth)
        found = [row[0] for row in rows] + [root]
        collapsed = [in_use < v for _, in_use, _ in rows] + [answers < v]
        floor = [row[0] for row in score(before, truth)] + [probe(before, levels, truth)[1]]
        scores.append(Score(found, collapsed, floor))
    return scores


def main():
    parser = Parser(__doc__)
    add_grammar_flags(parser, m=3, samples=4096)
    parser.add_argument("--target", choices=TARGETS, default="latent",
                        help="what is predicted (default latent)")
    add_settings(parser, SETTINGS, PRESETS)
    parser.add_argument("--trace", metavar="FILE.csv", help="write accuracy and loss by the step")
    parser.add_argument("--save", metavar="FILE", help="write the weights, for predictor.load")
    args = parser.parse_args()
    device = pick_device(parser, args.device)
    grammar = grammar_from_flags(parser, args)
    settings = given_settings(SETTINGS, args)
    v, s, m, L, P = args.v, args.s, args.m, args.depth, args.samples
    try:
        check_size(v, s, m, L, P, args.target, **settings)
        check_files(trace=args.trace, save=args.save)
    except ValueError as error:
        parser.error(f"argument --{error}")

    levels = grammar.sample(P, args.seed, device)
    truth = grammar.sample(TEST_STRINGS, (args.seed, 1), device)
    glance = [h[:256] for h in truth]
    trace = open(args.trace or os.devnull, "w", encoding="utf-8")
    columns = [f"accuracy {l},prediction {l}" for l in range(1, L)]
    print("step", *columns, sep=",", file=trace, flush=True)
    bar = tqdm(bar_format="{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}")

    def watch(step, steps, network, prediction):
        bar.total = steps
        bar.update()
        if step % max(1, steps // 80) and step != steps:
            return
        found = [row[0] for row in score(Predictor(network, v, L, args.target), glance)]
        pairs = [f"{a:.6f},{loss:.6f}" for a, loss in zip(found, prediction[0].tolist())]
        print(step, *pairs, sep=",", file=trace, flush=True)
        bar.set_postfix_str("accuracy by level " + " ".join(f"{a:.2f}" for a in found))

    with trace, bar:
        try:
            learned = fit(levels[0], v, s, args.target, args.seed, watch, **settings)
        except FloatingPointError as error:
            bar.close()
            parser.exit(1, f"{parser.prog}: {error}\n")
    if args.save:
        learned.save(args.save)

    print(f"{P} strings of {s**L} tokens, v={v} s={s} m={m} L={L}, v m^3 = {v * m**3}")
    print(learned)
    print(f"\nlevel   accuracy   codes in use   entropy (of {math.log(v):.2f})")
    for l, (found, in_use, spread) in enumerate(score(learned, truth), 1):
        mark = "   collapsed" if in_use < v else ""
        print(f"{l:5}   {found:8.3f}   {in_use:12}   {spread:7.2f}{mark}")
    below, root, _ = probe(learned, levels, truth)
    print(f"\nlinear probes of the final code: level {L - 1} {below:.3f}, root {root:.3f}")
    if learned.network.sizes["d"] >= v * m:
        print(f"(d_h >= v m = {v * m}: such a probe could read tuples that were never merged)")


def check_files(**files):
    """Raise ValueError, naming the flag, unless each file that is given can be written."""
    paths = {flag: Path(file).resolve() for flag, file in files.items() if file}
    for flag, path in paths.items():
        there = path if path.exists() else path.parent
        if path.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(f"{flag}: must be a file that can be written, not {path}")
    if len(set(paths.values())) < len(paths):
        raise ValueError(f"{flag}: must be another file than the other flags', not {path}")


if __name__ == "__main__":
    run_script(main)
