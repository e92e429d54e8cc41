"""
Learner 2: stacked latent clustering, the paper's predictor-clusterer network.

    python predictor.py --depth 4 --samples 1024                  levels come one by one (fig. 10)
    python predictor.py --depth 4 --samples 1024 --target token   the control: raw tokens
    python predictor.py --depth 4 --detach layers+clusterer --ema 0   local, no teacher (fig. 9)

L-1 modules of one form stand on top of each other, trained together by gradient descent.
Module l turns s^(L-l) codes into s^(L-l-1) codes, one for every tuple of s:

  predictor   tuple -> phi: a distribution for every element of its cousins, the other tuples
              under the same grandparent. It is trained by cross-entropy, with the target
                latent  the cousins' level-l codes, from a teacher
                token   the raw tokens under the cousins
                joint   latent, and the teacher's code of the cousin, one level up (ours)
  clusterer   phi -> a soft code over d_h clusters, the symbol of level l+1. Tuples with like
              phi are pulled to one code, and tuples with unlike phi are pushed apart.

The paper's exact losses are not public; we state ours at the functions that compute them. R runs
train side by side, and each gives the same bytes as alone (on one CPU thread, with hidden and
batch multiples of 16).

With batch B, a step takes memory ~ R B s^(L+2) d_h, L times that for tokens, and time ~ hidden
times its memory. k-means adds memory ~ R L B^2 and time ~ R L B^2 s^3 d_h (s^(L+1) for tokens).
B and d_h are of order v. P strings are P s^L bytes.
"""

import copy
import importlib.util
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from grammar import (
    TEST_STRINGS, Checkpoint, Grammar, Parser, Score, Setting, accuracy, add_grammar_flags,
    add_settings, as_strings, check_files, check_memory, check_runs, check_whole, choice, cousins,
    given_settings, grammar_from_flags, linear_probe, open_trace, out_file, paper_preset,
    pick_device, read_settings, real, run_script, strings_bytes, whole, write_whole,
)

TARGETS = ("latent", "token", "joint")

SETTINGS = (  # name, type, default, the paper's value, help
    Setting("steps", whole(1), 800, 10**6, "training steps, at most (the paper limits epochs)"),
    Setting("epochs", whole(1), 200, 30, "passes over the P strings, at most"),
    Setting("batch", whole(0), 0, 32, "strings a step; 0: 8 v, as 1 in v pairs are synonyms"),
    Setting("lr", real(0, 1), 5e-3, 3e-3, "learning rate of AdamW"),
    Setting("schedule", choice("linear", "constant"), "linear", "constant",
            "linear: lr falls to 0; constant: it stays"),
    Setting("decay", real(0, 10), 1e-3, 1e-3, "weight decay of AdamW"),
    Setting("hidden", whole(1), 64, 150, "width of the hidden layers"),
    Setting("codes", whole(0, 4096), 0, 128, "d_h, clusters of a module, v or more; 0 is 5 v / 4"),
    Setting("ema", real(0, 1), 0.985, 0.985, "EMA decay of the teacher; 0: no teacher"),
    Setting("detach", choice("none", "layers", "layers+clusterer"), "none", "none",
            "layers: no gradient between modules; +clusterer: nor from clusterer to predictor"),
    Setting("combine", choice("sum", "upgrad"), "sum", "upgrad",
            "sum of the losses, or upgrad: Jacobian descent by the package torchjd"),
    Setting("elements", choice("all", "one"), "all", "all",
            "all: every element of every cousin is predicted, from every position; one: one "
            "element of one cousin, from one position"),
    Setting("alike", choice("groups", "threshold", "centred"), "groups", "threshold",
            "pairs pulled to one code: groups: of one k-means group; threshold: with "
            "(1 + cos)/2 of phi above --threshold; centred: the same, of phi minus its mean"),
    Setting("threshold", real(0, 1), 0.8, 0.8, "S_m: pairs above it are alike; not for groups"),
    Setting("separation", real(0, 100), 1.0, 0.5, "weight of pushing unlike tuples' codes apart"),
    Setting("sparsity", real(0, 100), 0.0, 0.01, "weight of the entropy of a code"),
    Setting("gate", real(0, 1), 0.1, 0.0,
            "clustering counts in full once phi explains this share of goal entropy; 0: always"),
    Setting("probes", whole(1), 80, None, "number of measurements while the script trains"),
    Setting("test_strings", whole(1, 2**20), TEST_STRINGS, None, "strings a score is taken on"),
)
# the paper's upgrad needs a package that we don't require, so preset paper takes the sum
PRESETS = {"default": {}, "paper": paper_preset(SETTINGS) | {"combine": "sum"}}

STARTS, TRIALS, ROUNDS = 4, 4, 5  # of k-means; trials are the candidates for a new seed
BLOCK = 100                       # steps whose random numbers are drawn at once
MOMENTUM = 0.1                    # share of a batch in the running mean and variance
CHUNK_TOKENS = 2**16              # encode about so many tokens at once,
CHUNK_NUMBERS = 2**24             # or so many numbers of phi, if these are fewer strings


# ----------------------------------------------------------------------------------------
# one module


class Linear(nn.Module):
    """R linear maps, one for every run: (R, n, inputs) -> (R, n, outputs)."""

    def __init__(self, R, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(R, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(R, 1, outputs))

    def forward(self, h):
        return torch.baddbmm(self.bias, h, self.weight)


class BatchNorm(nn.Module):
    """Every run normalises its own batch, (R, n, width), without scale or shift."""

    def __init__(self, R, width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(R, 1, width))
        self.register_buffer("var", torch.ones(R, 1, width))
        self.register_buffer("batches", torch.zeros(R, 1, 1))

    def forward(self, h):
        if not self.training:
            return (h - self.mean) / (self.var + 1e-5).sqrt()
        mean = h.mean(1, keepdim=True)
        centred = h - mean
        var = centred.square().mean(1, keepdim=True)

        # a plain mean of the first batches, so that it is right from the first step on
        self.batches += 1
        share = (1 / self.batches).clamp(min=MOMENTUM)      # (R, 1, 1)
        self.mean += share * (mean.detach() - self.mean)
        self.var += share * (var.detach() - self.var)
        return centred / (var + 1e-5).sqrt()


class Module(nn.Module):
    """A predictor and a clusterer; heads: see heads_of. The paper's convolutions, of kernel and
    stride s, then of kernel 1, are linear maps of a tuple."""

    def __init__(self, R, s, d, hidden, heads):
        super().__init__()
        self.s, self.heads = s, heads
        width = math.prod(heads) * d
        self.predict = nn.Sequential(
            Linear(R, s * d, hidden), nn.GELU(),
            Linear(R, hidden, hidden), nn.GELU(),
            Linear(R, hidden, width),
        )
        # phi differs little between tuples, so the clusterer gets it normalised
        self.norm = BatchNorm(R, width)
        self.cluster = nn.Sequential(Linear(R, width, hidden), nn.GELU(), Linear(R, hidden, d))

    def forward(self, codes, local=False):
        """codes: (R, B, n, d) -> log phi of all N = B n/s tuples, (R, N, *heads, d), and the
        codes of the level above, (R, B, n/s, d). local: no gradient from clusterer to phi."""
        R, B, n, d = codes.shape
        tuples = codes.reshape(R, -1, self.s * d)              # (R, N, s d)
        logits = self.predict(tuples)                          # (R, N, heads d)
        log_phi = logits.unflatten(-1, (*self.heads, d)).log_softmax(-1)
        phi = log_phi.exp().flatten(2)                         # (R, N, heads d)
        if local:
            phi = phi.detach()
        above = self.cluster(self.norm(phi)).softmax(-1)       # (R, N, d)
        return log_phi, above.view(R, B, -1, d)


# ----------------------------------------------------------------------------------------
# the network


class Network(nn.Module):
    """The L-1 modules of R runs. heads: one shape for each, see heads_of."""

    def __init__(self, R, s, d, hidden, heads):
        super().__init__()
        self.sizes = {"s": s, "d": d, "hidden": hidden, "heads": heads}
        self.layers = nn.ModuleList(Module(R, s, d, hidden, shape) for shape in heads)

    def forward(self, x, detach="none"):
        """Strings (R, B, s^L) -> [log phi of every module], and the codes of every level from
        the tokens on, each (R, B, s^(L-l), d)."""
        codes, log_phi = [F.one_hot(x.long(), self.sizes["d"]).float()], []
        for module in self.layers:
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
            # a tuple is s ones among s d inputs, which must give unit variance: a first layer
            # that is nearly linear takes long to tell a tuple from its symbols
            for module in self.layers:
                module.predict[0].weight[r].normal_(std=module.s**-0.5, generator=generator)

    def run(self, r):
        """A copy of run r, alone."""
        alone = Network(1, **self.sizes)
        alone.load_state_dict({name: w[r : r + 1] for name, w in self.state_dict().items()})
        return alone.to(next(self.parameters()).device)


# ----------------------------------------------------------------------------------------
# the losses; each is (R,) or (R, L-1), one number for every run, or every module of it


def goal(target, codes, l, s, elements):
    """What is the target? The codes of the E symbols of a level-l tuple: its cousins predict them.

    codes: the teacher's, of all levels from 0. Returns (R, B, n, E, d) for n tuples a string."""
    known = codes[0] if target == "token" else codes[l]
    n = codes[0].shape[2] // s ** (l + 1)
    known = known.unflatten(2, (n, -1))                    # (R, B, n, symbols of a tuple, d)
    if elements == "one":
        known = known[..., :1, :]
    if target == "joint":                                  # and the tuple's own symbol
        known = torch.cat([known, codes[l + 1].unsqueeze(3)], 3)
    return known


def heads_of(target, elements, s, L):
    """For each module the shape (I own positions, C cousins, E symbols of a cousin) of what it
    predicts: it does not know which child its tuple is, so it predicts for every position."""
    # one string's codes of width 1: only the shape of the goal counts
    codes = [torch.empty(1, 1, s ** (L - l), 1) for l in range(L)]
    heads = []
    for l in range(L - 1):
        symbols = goal(target, codes, l, s, elements).shape[3]
        heads.append((s, s - 1, symbols) if elements == "all" else (1, 1, symbols))
    return heads


def prediction_loss(log_phi, aim, s):
    """(R,) each: the mean cross-entropy to the cousins' goal, in nats, and the gain, detached:
    0 if phi predicts the mean goal everywhere, 1 if it predicts every single goal exactly.

    log_phi: (R, N, I, C, E, d); aim: (R, B, n, E, d), a goal, with B n = N."""
    R, N, I, C, E, d = log_phi.shape
    families = aim.reshape(R, N // s, s, E, d)             # the s tuples under one grandparent
    others = cousins(s, aim.device)[:I, :C]                # (I, C)
    seen = families[:, :, others]                          # (R, N/s, I, C, E, d)

    # the i-th tuple of a family uses the heads for position i; if I = 1, only the first counts
    log_phi = log_phi.view(R, N // s, s, I, C, E, d)
    own = log_phi[:, :, :I].diagonal(dim1=2, dim2=3).movedim(-1, 2)     # (R, N/s, I, C, E, d)
    loss = -(seen * own).flatten(1).sum(1) / seen.shape[1:-1].numel()

    # marginal: the loss if phi knows nothing; least: the loss if it knew every single goal
    with torch.no_grad():
        marginal = entropy(seen.mean(1)).flatten(1).mean(1)
        least = entropy(seen).flatten(1).mean(1)
        gain = (marginal - loss) / (marginal - least + 1e-3)
    return loss, gain


def entropy(p):
    """Of distributions along the last dimension, in nats."""
    return torch.xlogy(p, p).sum(-1).neg().clamp(min=0)


def grouping(phi, v, noise):
    """Which tuples should have one code: (K, n) int64, groups 0..v-1, by k-means with v means
    and the distance KL(phi | mean). No threshold of distances would fit all v, m and s.

    phi: (K, n, D), every tuple's distributions in a row, for K modules and runs side by side;
    noise: (K, v, STARTS, TRIALS) uniform numbers."""
    K, n, _ = phi.shape
    x = phi + 1e-3                                         # no symbol is impossible
    log = x.log()
    own = (x * log).sum(-1)                                # (K, n)
    distance = (own[:, None] - log @ x.mT).clamp(min=0)    # (K, n, n): [i, j] is KL(x_j | x_i)

    # greedy k-means++: a few tuples are drawn in proportion to their distance from the nearest
    # seed, and the one that leaves the least distance is the next seed
    near = torch.full((K, STARTS, n), 1e9, device=x.device)
    k = torch.arange(K, device=x.device)[:, None]
    picked = []
    for draw in noise.unbind(1):
        upto = near.cumsum(-1)                             # (K, STARTS, n)
        trials = torch.searchsorted(upto, draw * upto[..., -1:]).clamp(max=n - 1)
        left = torch.minimum(near[:, :, None], distance[k[..., None], trials]).sum(-1)
        best = left.argmin(-1, keepdim=True)               # (K, STARTS, 1)
        picked.append(trials.gather(-1, best)[..., 0])
        near = torch.minimum(near, distance[k, picked[-1]])
    means = x[k, torch.stack(picked, -1).flatten(1)]        # (K, STARTS v, D)

    # then k-means: each tuple joins its likeliest mean, each mean becomes that of its tuples
    for _ in range(ROUNDS):
        likelihood = (means.log() @ x.mT).view(K, STARTS, v, n)
        member = likelihood == likelihood.amax(2, keepdim=True)
        member = member.flatten(1, 2).float()              # (K, STARTS v, n)
        means = member @ x / member.sum(-1, keepdim=True).clamp(min=1)
    likelihood = (means.log() @ x.mT).view(K, STARTS, v, n)
    best = likelihood.amax(2).sum(-1).argmax(-1)           # (K,) the best start
    return likelihood[k[:, 0], best].argmax(1)             # (K, n)


def similar(phi, threshold, centred):
    """The paper's rule: (..., n, D) -> (..., n, n) bool, S_ij = (1 + cos(phi_i, phi_j))/2 is
    above the threshold. Every phi is near the mean of the batch, so that all pairs may be
    alike; centred: that mean is subtracted first."""
    if centred:
        phi = phi - phi.mean(-2, keepdim=True)
    unit = F.normalize(phi, dim=-1)
    return (1 + unit @ unit.mT) / 2 > threshold


def clustering_loss(codes, alike, separation, sparsity=0.0):
    """Mean over all pairs of -log c_i.c_j where they are alike, and of separation times
    -log(1 - c_i.c_j) where they are not; and sparsity times the mean entropy of a code.

    codes: (..., n, d) soft codes; alike: (..., n, n) bool. Returns (...), one for each module.
    The form is ours: the logarithm keeps a gradient between nearly one-hot codes, so that
    two codes that split one symbol can still merge."""
    n = codes.shape[-2]
    overlap = codes @ codes.mT                             # (..., n, n)
    alike = alike.float()

    # overlap: the chance that two symbols drawn from the codes are the same.
    # chance = torch.where(alike, overlap + 0.01, 1.0001 - overlap), never 0, in a form that is
    # a quarter faster with its gradient
    chance = torch.addcmul(1.0001 - 0.9901 * alike, 2 * alike - 1, overlap)
    weight = separation + (1 - separation) * alike
    weight.diagonal(dim1=-2, dim2=-1).zero_()              # a tuple and itself are no pair
    loss = -(weight * chance.log()).flatten(-2).sum(-1) / (n * (n - 1))
    if sparsity:
        # at exactly 0, which a softmax can reach, the gradient would be nan
        loss = loss + sparsity * entropy(codes.clamp(min=1e-30)).mean(-1)
    return loss


def losses(student, taught, draw, options):
    """(prediction, clustering), (R, L-1) each: the losses of every run and module.
    taught: the teacher's codes of the same strings; draw: what draws gives for a step."""
    strings, chosen, noise = draw
    run = torch.arange(len(strings), device=strings.device)[:, None]
    outputs, codes = student(strings, options.detach)
    prediction, gain, phi, chosen_codes = [], [], [], []
    for l, log_phi in enumerate(outputs):
        aim = goal(options.target, taught, l, student.sizes["s"], options.elements)
        loss, gained = prediction_loss(log_phi, aim, student.sizes["s"])
        prediction.append(loss)
        gain.append(gained)

        # two tuples of each string are enough for the clustering loss
        some = log_phi.detach().flatten(2)[run, chosen[:, l]].exp()    # (R, n, heads d)
        if options.target == "joint":
            # a cousin's elements together weigh as much as its parent, which tells more
            elements = some.unflatten(-1, log_phi.shape[2:])[..., :-1, :]
            elements /= elements.shape[-2]                 # in place, a view of some
        phi.append(some)
        chosen_codes.append(codes[l + 1].flatten(1, 2)[run, chosen[:, l]])     # (R, n, d)

    # higher modules predict more raw tokens: all phi are padded with zeros to one width
    widest = phi[-1].shape[-1]
    phi = torch.stack([F.pad(some, (0, widest - some.shape[-1])) for some in phi], 1)
    chosen_codes = torch.stack(chosen_codes, 1)                        # (R, L-1, n, d)
    if options.alike == "groups":
        group = grouping(phi.flatten(0, 1), options.v, noise.flatten(0, 1))
        group = group.view(phi.shape[:3])                              # (R, L-1, n)
        alike = group[..., None] == group[..., None, :]
    else:
        alike = similar(phi, options.threshold, options.alike == "centred")
    clustering = clustering_loss(chosen_codes, alike, options.separation, options.sparsity)
    # the gate: as long as phi predicts nothing, its groups are noise
    if options.gate:
        clustering = clustering * (torch.stack(gain, 1) / options.gate).clamp(0, 1)
    return torch.stack(prediction, 1), clustering


# ----------------------------------------------------------------------------------------
# training


def draws(xs, s, L, options, generators, device):
    """Yields what every step draws, each run from its own CPU generator: strings (R, B, s^L);
    chosen (R, L-1, 2 B) int64, for each module two different tuples of every string, as indices
    of the batch's N tuples; noise (R, L-1, v, STARTS, TRIALS), uniform numbers for k-means."""
    B = options.batch
    n = torch.tensor([[s ** (L - 1 - l)] for l in range(L - 1)])       # (L-1, 1) tuples a string
    start = n * torch.arange(B)                            # (L-1, B), the first of each string
    while True:
        block = []
        for x, generator in zip(xs, generators):
            if isinstance(x, Grammar):
                seed = int(torch.randint(2**31, (1,), generator=generator))
                strings = x.sample(BLOCK * B, seed)[0].view(BLOCK, B, -1)
            else:
                rows = torch.randint(len(x), (BLOCK, B), generator=generator)
                strings = x[rows.to(x.device)]
            one, two = torch.rand(BLOCK, L - 1, B, 2, generator=generator).unbind(-1)
            first = (one * n).long()                       # (BLOCK, L-1, B)
            second = (first + 1 + (two * (n - 1)).long()) % n
            chosen = torch.cat([start + first, start + second], -1)
            noise = torch.rand(BLOCK, L - 1, options.v, STARTS, TRIALS, generator=generator)
            block.append([part.to(device) for part in (strings, chosen, noise)])
        yield from zip(*(torch.stack(part, 1) for part in zip(*block)))


def train(xs, s, L, seeds, steps, options, device, watch=None, resume=None):
    """The loop, for R runs of equally many steps. Returns R Predictors."""
    # every run has its own generator, for its weights and then for its batches
    R, target = len(xs), options.target
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    heads = heads_of(target, options.elements, s, L)
    student = Network(R, s, options.codes, options.hidden, heads)
    student.draw(generators)
    student.to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    weights = list(student.parameters())
    # not fused: fused AdamW rounds the last few weights of a tensor differently
    optimizer = torch.optim.AdamW(weights, options.lr, weight_decay=options.decay, foreach=True)

    # resume if there is a file; ended: {diverged run: (step, weights before it)}
    parts = {"student": student, "teacher": teacher, "optimizer": optimizer}
    about = {"s": s, "depth": L, "seed": list(seeds), "device": device.type}
    checkpoint = Checkpoint(resume, parts, generators, xs, about | vars(options))
    done, ended = checkpoint.load()

    drawn = draws(xs, s, L, options, generators, device)
    for step, draw in zip(range(done + 1, steps + 1), drawn):
        if options.schedule == "linear":
            optimizer.param_groups[0]["lr"] = options.lr * (1 - (step - 1) / steps)

        # the teacher reads the same strings, and nothing flows back into it
        with torch.no_grad():
            _, taught = teacher(draw[0])
        prediction, clustering = losses(student, taught, draw, options)
        terms = torch.cat([prediction, clustering], 1)     # (R, 2 (L-1))
        loss = terms.sum(1)                                # (R,) one loss for every run

        # a run whose loss is not finite ends here, and its neighbours go on
        for r, finite in enumerate(loss.isfinite().tolist()):
            if not finite and r not in ended:
                ended[r] = step, student.run(r).state_dict()
        if len(ended) == R:
            break

        # runs share no weight: the gradient of the sum is each run's own
        optimizer.zero_grad()
        if options.combine == "sum":
            loss.sum().backward()
        else:
            jacobian_descent(terms[0], weights)
        optimizer.step()

        # with ema = 0 the teacher is the student, so that its codes are the student's own
        with torch.no_grad():
            for old, new in zip(teacher.parameters(), weights):
                old.mul_(options.ema).add_(new, alpha=1 - options.ema)
        if watch:
            watch(step, steps, student, prediction.detach())
        # only where a block ends do the generators' states determine all later steps
        if step == steps or step % BLOCK == 0:
            checkpoint.save(step, ended, step == steps)

    learned = []
    for r in range(R):
        network = student.run(r)
        diverged, kept = ended.get(r, (0, network.state_dict()))
        network.load_state_dict(kept)
        learned.append(Predictor(network, options.v, target, diverged))
    return learned


def jacobian_descent(terms, weights):
    """The gradient of the paper's Jacobian descent: no loss may grow to first order."""
    from torchjd.aggregation import UPGrad
    from torchjd.autojac import backward, jac_to_grad

    backward(list(terms))
    jac_to_grad(weights, UPGrad())


def fit_many(xs, v, s, target="latent", seeds=(0,), watch=None, device=None, resume=None,
             **settings):
    """Train R runs of one size side by side. Returns a list of Predictor, one for each.

    xs: for each run its strings, (P, s^L) integers of any dtype, or a Grammar that gives
    always fresh ones; P may differ. settings: values by their names in SETTINGS, or preset.
    device: by default the strings', or cpu.
    watch(step, steps, network, loss) is called after every step, with the Network of the runs
    that train together and their prediction losses, (R, L-1). resume: a file, written at most
    once a minute and at the end; if it exists, the runs go on from it. A run that diverges
    keeps the weights it had before that step. Raises ValueError that begins with the wrong
    argument's name."""
    xs, L, P, device = check_runs(xs, v, s, seeds, device)
    options = read_options(v, target, settings)
    # m of given strings is unknown, so 2 stands in; nothing is tested here
    check_size(v, s, 2, L, P, target, **settings | {"test_strings": 1})

    # runs of equally many steps share one loop; Jacobian descent takes one run at a time
    together = {}
    for r, x in enumerate(xs):
        steps = options.steps
        if not isinstance(x, Grammar):
            steps = min(steps, math.ceil(options.epochs * len(x) / options.batch))
        alone = r if options.combine == "upgrad" else 0
        together.setdefault((steps, alone), []).append(r)
    if resume is not None and len(together) > 1:
        raise ValueError("resume: is for runs that train in one loop, with equally many steps")
    learned = {}
    for (steps, _), runs in together.items():
        x, seed = [xs[r] for r in runs], [seeds[r] for r in runs]
        learned |= zip(runs, train(x, s, L, seed, steps, options, device, watch, resume))
    return [learned[r] for r in range(len(xs))]


def fit(x, v, s, target="latent", seed=0, watch=None, device=None, resume=None, **settings):
    """fit_many of one run: a Predictor, or a FloatingPointError if it diverged."""
    learned = fit_many([x], v, s, target, [seed], watch, device, resume, **settings)[0]
    if learned.diverged:
        step = learned.diverged
        raise FloatingPointError(f"step {step}: the loss is not finite; lower lr or decay")
    return learned


def read_options(v, target, settings):
    """v, target and all settings in one object. Raises ValueError, naming the setting."""
    options = read_settings(SETTINGS, PRESETS, settings)
    options.v, options.target = v, target
    options.batch = options.batch or 8 * v
    options.codes = options.codes or 5 * v // 4
    if target not in TARGETS:
        raise ValueError(f"target: must be one of {', '.join(TARGETS)}, not {target!r}")
    if options.codes < v:
        raise ValueError(f"codes: must be v = {v} or more (0 for 5 v / 4), as tokens are codes too")
    if options.combine == "upgrad" and not importlib.util.find_spec("torchjd"):
        raise ValueError("combine: upgrad needs pip install torchjd[quadprog-projector]")
    return options


def check_size(v, s, m, L, P, target="latent", **settings):
    """Raises ValueError, naming the flag, unless one run works and fits into memory."""
    options = read_options(v, target, settings)
    hidden, d, batch = options.hidden, options.codes, options.batch
    check_memory("depth", strings_bytes(options.test_strings, s, L), "the test strings")
    check_memory("samples", strings_bytes(P, s, L), "the strings")
    weights, numbers = 0, 6 * (L - 1) * (2 * batch) ** 2     # the table of pairs, to begin with
    for l, heads in enumerate(heads_of(target, options.elements, s, L)):
        width = math.prod(heads) * d
        weights += hidden * (s * d + hidden + 2 * width + d)
        numbers += batch * s ** (L - l - 1) * (s * d + 6 * hidden + 8 * width)
    # the weights stand with their gradient, two moments and the teacher
    check_memory("hidden", 4 * 5 * weights, "the weights")
    check_memory("batch", 4 * numbers + BLOCK * batch * s**L, "a step")


# ----------------------------------------------------------------------------------------
# what is learned, and its scores


class Predictor:
    """What fit returns: a Network of one run, which learns no more.
    diverged: the first step whose loss was not finite, or 0."""

    def __init__(self, network, v, target, diverged=0):
        self.network, self.v, self.target, self.diverged = network.eval(), v, target, diverged
        self.s, self.L = network.sizes["s"], len(network.layers) + 1

    def __repr__(self):
        d, hidden = self.network.sizes["d"], self.network.sizes["hidden"]
        sizes = f"v={self.v}, s={self.s}, L={self.L}, codes={d}, hidden={hidden}"
        return f"Predictor(target={self.target}, {sizes}, diverged={self.diverged})"

    @torch.no_grad()
    def codes(self, x, lowest=1):
        """Strings (P, s^L) -> the soft codes of levels lowest..L-1, (P, s^(L-l), d)."""
        x, L = as_strings(x, self.v, self.s, self.L)
        x = x.to(next(self.network.parameters()).device)
        # phi is largest on level 0, where a string has s^(L-1) tuples
        sizes, T = self.network.sizes, self.s**L
        largest = T // self.s * math.prod(sizes["heads"][0]) * sizes["d"]
        chunk = min(CHUNK_TOKENS // T, CHUNK_NUMBERS // largest) + 1
        parts = [self.network(some[None])[1][lowest:] for some in x.split(chunk)]
        return [torch.cat(level, 1)[0] for level in zip(*parts)]

    def label(self, x):
        """Strings (P, s^L) -> levels 0 to L-1, the strings and then int64 ids, (P, s^(L-l)),
        on the network's device. Raises ValueError, naming x."""
        ids = [codes.argmax(-1) for codes in self.codes(x)]
        return [as_strings(x, self.v, self.s)[0].to(ids[0].device), *ids]

    def save(self, file):
        """Write sizes and weights to a file, for load."""
        about = {"v": self.v, "target": self.target, "diverged": self.diverged}
        weights = self.network.state_dict()
        saved = {"predictor": about, "sizes": self.network.sizes, "weights": weights}
        write_whole(file, partial(torch.save, saved))


def load(file):
    """The Predictor that save wrote, on the CPU. Raises ValueError for any other file."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        network = Network(1, **saved["sizes"])
        network.load_state_dict(saved["weights"])
        check_whole("v", saved["predictor"]["v"], 2, saved["sizes"]["d"])
        return Predictor(network, **saved["predictor"])
    except OSError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"file: {file} was not written by predictor.py: {reason}") from None


def score(learned, levels, truth):
    """([accuracy], [symbols in use], below) on fresh strings: two lists over levels 1..L, a number.

    levels: of the training strings; truth: of the fresh ones. Levels 1..L-1 are matched with the
    codes; a symbol is in use if at least 1 in 1000 tuples has it. The root is read from the final
    code by the paper's linear probe, fitted on levels. below: the accuracy of such a probe on
    level L-1, node by node (fig. 3 right). With v m codes or more, below can be 1 although no
    synonyms share a code, as the probe itself learns each tuple's parent."""
    right, in_use, v = [], [], learned.v
    (known,) = learned.codes(levels[0], lowest=learned.L - 1)
    codes = learned.codes(truth[0])
    for code, symbols in zip(codes, truth[1:]):
        labels = code.argmax(-1)
        right.append(accuracy(labels, symbols, v))
        share = labels.flatten().bincount() / labels.numel()
        in_use.append(int((share >= 1e-3).sum()))

    fresh = codes[-1]                                      # (P, s, d)
    read = linear_probe(known.flatten(1), levels[-1][:, 0], v)
    root = read(fresh.flatten(1)).argmax(-1)               # (P,)
    right.append((root == truth[-1][:, 0]).float().mean().item())
    in_use.append(len(root.unique()))
    read = linear_probe(known.flatten(0, 1), levels[-2].flatten(), v)
    below = (read(fresh).argmax(-1) == truth[-2]).float().mean().item()
    return right, in_use, below


def recover(grammars, samples, seeds, target="latent", device="cpu", **settings):
    """Train runs of the sweep side by side. Returns [Score] of levels 1..L, one for each grammar,
    P and seed, measured by score(); the floor is what the untrained network gets."""
    v, s = grammars[0].v, grammars[0].s
    tested = read_options(v, target, settings).test_strings
    known = [g.sample(P, seed, device) for g, P, seed in zip(grammars, samples, seeds)]
    xs = [levels[0] for levels in known]
    learned = fit_many(xs, v, s, target, seeds, **settings)
    # untrained: 10 steps at lr 0, in which the batch norms learn phi's mean and variance
    still = settings | {"lr": 0.0, "steps": 10}
    untrained = fit_many(xs, v, s, target, seeds, **still)

    scores = []
    for grammar, levels, seed, run, before in zip(grammars, known, seeds, learned, untrained):
        truth = grammar.sample(tested, (seed, 1), device)
        right, in_use, _ = score(run, levels, truth)
        floor, _, _ = score(before, levels, truth)
        collapsed = [n < v for n in in_use]
        if run.diverged:
            right, collapsed = [0.0] * run.L, [False] * run.L
        scores.append(Score(right, collapsed, floor, run.diverged))
    return scores


def main():
    parser = Parser(__doc__)
    add_grammar_flags(parser, samples=4096)
    add = parser.add_argument
    add("--target", choices=TARGETS, default="latent", help="what is predicted (default latent)")
    add_settings(parser, SETTINGS, PRESETS)
    add("--trace", metavar="FILE.csv", type=out_file, help="write every measurement to this file")
    add("--save", metavar="FILE", type=out_file, help="write the weights, for predictor.load")
    add("--resume", metavar="FILE", type=out_file,
        help="go on from this file if it exists, and write the state of training to it")
    args = parser.parse_args()
    device = pick_device(parser, args.device)
    grammar = grammar_from_flags(parser, args)
    settings = given_settings(SETTINGS, args)
    v, s, m, L, P = args.v, args.s, args.m, args.depth, args.samples
    try:
        check_size(v, s, m, L, P, args.target, **settings)
        check_files(args)
    except ValueError as error:
        parser.error(f"argument --{error}")

    options = read_options(v, args.target, settings)
    if device == "cpu" and options.hidden <= 64:
        # on matrices this small more threads gain nothing and take cores from other processes
        torch.set_num_threads(1)
    levels = grammar.sample(P, args.seed, device)
    truth = grammar.sample(options.test_strings, (args.seed, 1), device)
    columns = [f"{kind} {l}" for l in range(1, L) for kind in ("accuracy", "prediction")]
    bar, trace = tqdm(unit="step"), None

    def watch(step, steps, network, loss):
        nonlocal trace
        trace = trace or open_trace(args.trace, ["step", *columns, "v", "m", "P"], step)
        bar.total = steps
        bar.update(step - bar.n)
        if step % max(1, steps // options.probes) == 0 or step == steps:
            labels = Predictor(network.run(0), v, args.target).label(truth[0][:256])
            right = [accuracy(labels[l], truth[l][:256], v) for l in range(1, L)]
            pairs = [f"{a:.6f},{b:.6f}" for a, b in zip(right, loss[0].tolist())]
            print(step, *pairs, v, m, P, sep=",", file=trace, flush=True)
            bar.set_postfix_str("accuracy by level " + " ".join(f"{a:.2f}" for a in right))

    try:
        with bar:
            learned = fit(
                levels[0], v, s, args.target, args.seed, watch=watch, resume=args.resume,
                **settings,
            )
    except ValueError as error:  # of --resume; all else is checked
        parser.error(f"argument --{error}")
    except FloatingPointError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    if args.save:
        learned.save(args.save)

    print(f"{P} strings of {s**L} tokens, v={v} s={s} m={m} L={L}, v m^3 = {v * m**3}")
    print(f"{learned}\n\nlevel   accuracy   symbols in use (of {v})")
    *scores, below = score(learned, levels, truth)
    for l, (right, in_use) in enumerate(zip(*scores), 1):
        mark = "   by a linear probe of the code" if l == L else ""
        print(f"{l:5}   {right:8.3f}   {in_use:22}{mark}")
    print(f"{L - 1:5}   {below:8.3f}{'':25}   by a linear probe of the code")


if __name__ == "__main__":
    run_script(main)
