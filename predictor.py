"""
Learner 2: stacked latent clustering, the paper's predictor-clusterer network (section 4, fig. 8), trained end to end.

    python predictor.py --depth 4 --samples 1024                      the levels are learned one after another (fig. 10)
    python predictor.py --depth 4 --samples 1024 --target token        the control: every module predicts raw tokens
    python predictor.py --depth 4 --detach layers+clusterer --ema 0    purely local learning, no teacher (fig. 9)

L-1 modules of one form stand on top of each other. Module l turns s^(L-l) codes into s^(L-l-1) codes, one per tuple:
  predictor   tuple -> phi, a distribution for every element of every cousin tuple (the other tuples under the same
              grandparent), from every child position the tuple could have. Cross-entropy to the target's codes:
                latent  the level-l codes of a teacher, the moving average of the network: v m^3 strings on every level
                token   the raw tokens under the cousins, l levels further down: v m^(l+3)
                joint   latent, and the teacher's own symbol for the cousin, a level up; ours: as in cluster.py, what is
                        being learned sharpens what is learned from
  clusterer   phi -> a soft code over d_h clusters, the symbol of level l+1. The tuples of a batch are sorted into v
              groups by their phi; codes are pulled together within a group and apart between two.
Labels are used in the scores alone. The exact losses are not public; what we chose is said where it is done.

Measured by `python sweep.py --depth 3..6 --m 3 --methods predictor,predictor-joint` (v=8 s=2, v m^3 = 216, seeds 0-2,
torch 2.13 on a CPU): P* of level L-1 is 162, 190, 260, 235 for L = 3..6 with target latent, 113, 156, 169, 181 with
joint. At v=16 s=3 m=8 L=3 and P = 2 v m^3 the accuracy of level 2 is .998, .988, 1.000.
"""

import copy
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from grammar import (
    TEST_STRINGS, Parser, accuracy, add_grammar_flags, cousins, depth_of, grammar_from_flags, linear_probe, pick_device,
    real, whole,
)

TARGETS = ("latent", "token", "joint")
DETACH = ("none", "layers", "layers+clusterer")
STARTS, TRIALS, ROUNDS = 4, 4, 5  # of the k-means that says which tuples are alike; trials: candidates for a new seed

FLAGS = {  # name: (default, type, help)
    "steps": (800, whole(1), "training steps, at most; the paper: as many as --epochs gives"),
    "epochs": (200, whole(1), "passes over the P strings, at most; the paper: 30"),
    "batch": (0, whole(0), "strings per step; 0 is 8 v, as 1/v of the pairs in it are synonyms; the paper: 32"),
    "lr": (5e-3, real(0, 1), "learning rate of AdamW, falls linearly to 0; the paper: 3e-3, constant"),
    "decay": (1e-3, real(0, 1), "weight decay of AdamW; the paper: 1e-3"),
    "hidden": (64, whole(1), "width of the hidden layers; the paper: 150"),
    "codes": (0, whole(0, 4096), "d_h, clusters of a module, v or more; 0 is 5 v / 4; the paper: 128"),
    "ema": (0.015, real(0, 1), "share of the student in each update of the teacher; 0: no teacher, the targets are "
                               "the student's own codes; the paper: 0.015"),
    "separation": (1.0, real(0, 100), "weight lambda_sep of pushing codes apart; the paper: 0.5"),
    "gate": (0.1, real(0, 1), "share of the target's information that a predictor must have found before its clusterer "
                              "learns at full rate, 0 to 1; ours, 0: no gate"),
}
SETTINGS = {name: default for name, (default, _, _) in FLAGS.items()} | {
    "starts": STARTS, "trials": TRIALS, "rounds": ROUNDS, "test_strings": TEST_STRINGS
}


# ----------------------------------------------------------------------------------------------------------------------
# the network


class Module(nn.Module):
    """One predictor and one clusterer. elements: targets to predict under a cousin; d: codes, d_h."""

    def __init__(self, s, d, hidden, elements):
        super().__init__()
        self.s, self.d = s, d
        heads = s * (s - 1) * elements  # (own child position, cousin, element)
        self.predict = nn.Sequential(  # 1x1 convolutions after the first of kernel s and stride s: linear per tuple
            nn.Linear(s * d, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, heads * d)
        )
        self.norm = nn.BatchNorm1d(heads * d, affine=False)  # phi differs little from one tuple to another
        self.cluster = nn.Sequential(nn.Linear(heads * d, hidden), nn.GELU(), nn.Linear(hidden, d))

    def reset(self, random):
        """Draw the weights from a torch.Generator. A tuple is s ones among s d inputs: the first layer has to start
        with unit variance *there*, or it is nearly linear and takes long to tell a tuple from its symbols."""
        for layer in (*self.predict, *self.cluster):
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5
                nn.init.uniform_(layer.weight, -bound, bound, generator=random)
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.predict[0].weight, std=self.s**-0.5, generator=random)

    def forward(self, codes, local=False):
        """codes: (B, n, d) -> log phi (B n/s, s, s-1, elements, d) and the codes of the level above, (B, n/s, d).

        local: stop the clusterer's gradient before the predictor."""
        tuples = codes.reshape(-1, self.s * self.d)
        log_phi = self.predict(tuples).view(len(tuples), self.s, self.s - 1, -1, self.d).log_softmax(-1)
        phi = log_phi.exp().flatten(1)
        above = self.cluster(self.norm(phi.detach() if local else phi)).softmax(-1)
        return log_phi, above.view(len(codes), -1, self.d)


def build(s, L, d, hidden, target, random):
    """The L-1 modules, weights drawn from the CPU generator random. Under a cousin on level l there are s symbols of
    level l or s^(l+1) tokens to predict, and for joint its own symbol besides."""
    elements = {"latent": [s] * L, "token": [s ** (l + 1) for l in range(L)], "joint": [s + 1] * L}[target]
    stack = nn.ModuleList(Module(s, d, hidden, elements[l]) for l in range(L - 1))
    for module in stack:
        module.reset(random)
    return stack


def encode(stack, x, batch=1024):
    """(P, s^L) uint8 strings -> list of the soft codes of levels 1..L-1, (P, s^(L-l), d) each; no gradient."""
    stack.eval()
    parts = []
    with torch.no_grad():
        for rows in x.split(batch):
            codes, levels = one_hot(rows, stack[0].d), []
            for module in stack:
                codes = module(codes)[1]
                levels.append(codes)
            parts.append(levels)
    stack.train()
    return [torch.cat(level) for level in zip(*parts)]


def one_hot(x, d):
    return F.one_hot(x.long(), d).float()


# ----------------------------------------------------------------------------------------------------------------------
# the losses


def prediction_loss(log_phi, target):
    """Cross-entropy to the codes under the cousins, a tuple at child position i using its heads for i alone.

    log_phi: (N, s, s-1, E, d) for the N tuples of a batch, in order; target: (B, n, d) codes or one-hot tokens, n E
    to B strings of N/B tuples. Returns (loss, gain): the mean over tuples, cousins and elements in nats; and the share
    of what can be known about the targets that it already knows, without gradient, at most 1."""
    N, s, _, E, d = log_phi.shape
    own = log_phi.view(N // s, s, s, s - 1, E, d).diagonal(dim1=1, dim2=2).movedim(-1, 1)  # (N/s, s, s-1, E, d)
    seen = target.reshape(N // s, s, E, d)[:, cousins(s, target.device)]  # the same
    loss = -(seen * own).sum(-1).mean()
    with torch.no_grad():
        mean = seen.mean(0)
        marginal, conditional = entropy(mean).mean(), entropy(seen).mean()
        gain = (marginal - loss) / (marginal - conditional + 1e-3)
    return loss, gain


def entropy(p):
    """Of distributions along the last dimension, in nats."""
    return torch.xlogy(p, p).sum(-1).neg().clamp(min=0)


def grouping(phi, v, random):
    """Which tuples should have the same code: the likeliest way found to share n tuples out among v parents.

    phi: M tensors (n, D) of predictions, D of each its own, every distribution times its weight; random: a CPU
    generator. Returns (M, n) int64, groups 0..v-1. It is k-means where a tuple is as far from a parent as KL(phi of the
    tuple | mean phi of the parent's tuples); M modules and several random starts side by side, and of these the best.
    The paper calls two tuples like where cos(phi_i, phi_j) is above a fixed threshold. Ours to change: how far parents
    are apart depends on v, m, s and on how well phi is known, and a partition needs no threshold."""
    x = nn.utils.rnn.pad_sequence([p.T for p in phi], batch_first=True, padding_value=1.0).mT
    x = x + 1e-3  # no symbol is impossible
    log = x.log()
    distance = ((x * log).sum(-1)[:, None] - log @ x.mT).clamp(min=0)  # (M, n, n): of column from row
    noise = torch.empty(v, len(x), STARTS, x.shape[1]).exponential_(generator=random).to(x.device)
    near, seeds = torch.full_like(noise[0], 1e9), []  # near: the distance to the nearest seed; there is none yet
    for draw in noise:  # greedy k-means++: of a few tuples drawn in proportion to that distance, the best
        trials = (near / draw).topk(min(TRIALS, x.shape[1])).indices  # (M, starts, trials)
        far = distance.take_along_dim(trials.flatten(1)[:, :, None], 1).unflatten(1, (STARTS, -1))
        left = torch.minimum(near[:, :, None], far)  # (M, starts, trials, n)
        best = left.sum(-1).argmin(-1, keepdim=True)
        seeds.append(trials.take_along_dim(best, -1))
        near = left.take_along_dim(best[..., None], 2)[:, :, 0]
    seeds = torch.cat(seeds, -1).flatten(1)[:, :, None]
    parents = x.take_along_dim(seeds, 1).unflatten(1, (STARTS, v))  # (M, starts, v, D)
    x = x[:, None]
    for _ in range(ROUNDS):
        member = F.one_hot((x @ parents.log().mT).argmax(-1), v).float()  # (M, starts, n, v)
        parents = member.mT @ x / member.sum(-2)[..., None].clamp(min=1)
    likelihood, group = (x @ parents.log().mT).max(-1)
    best = likelihood.sum(-1).argmax(-1)
    return group[torch.arange(len(group), device=best.device), best]


def clustering_loss(codes, group, separation):
    """Mean over all pairs of -log c_i.c_j within a group, and of separation . -log(1 - c_i.c_j) between two groups.

    codes: (M, n, d) soft codes; group: (M, n). Returns (M,), one for each module. Our choice of form; unlike a squared
    distance the logarithm keeps a gradient between two codes that are both nearly one-hot, so that codes that split one
    symbol can still merge."""
    n = codes.shape[1]
    same = codes @ codes.mT
    alike = group[:, :, None] == group[:, None]
    loss = -torch.where(alike, (same + 0.01) / 1.01, 1.0001 - same).log()
    weight = torch.where(alike, 1.0, separation) * (1 - torch.eye(n, device=codes.device))
    return (weight * loss).sum((1, 2)) / (n * (n - 1))


# ----------------------------------------------------------------------------------------------------------------------
# training


def losses(student, teacher, x, v, target, detach, random, settings):
    """The losses of a batch of strings x, (B, s^L): 2 (L-1) scalars, the prediction losses of the modules and then
    their clustering losses. teacher None: the student's own codes are the targets."""
    tokens = one_hot(x, student[0].d)
    codes = wanted = tokens
    predictions, gains, phi, items = [], [], [], []
    for l, module in enumerate(student):
        log_phi, above = module(codes, local="clusterer" in detach)
        if target == "joint" or target == "latent" and l < len(student) - 1:
            with torch.no_grad():
                lifted = above.detach() if teacher is None else teacher[l](wanted)[1]
        seen = tokens if target == "token" else wanted  # the prediction target
        if target == "joint":
            families = wanted.unflatten(1, (-1, module.s)), lifted[:, :, None]  # a tuple's symbols, and its parent
            seen = torch.cat(families, 2).flatten(1, 2)
        prediction, gain = prediction_loss(log_phi, seen)
        predictions.append(prediction)
        gains.append(gain)
        some = torch.randperm(len(log_phi), generator=random)[: 2 * len(x)].to(x.device)  # enough; the paper takes 300
        guess = log_phi.detach()[some].exp()
        if target == "joint":  # what a cousin's elements tell, its parent tells better: all s weigh as much as it alone
            guess[..., : module.s, :] /= module.s
        phi.append(guess.flatten(1))
        items.append(above.reshape(-1, module.d)[some])
        if target != "token" and l < len(student) - 1:
            wanted = lifted
        codes = above if detach == "none" else above.detach()
    clustering = clustering_loss(torch.stack(items), grouping(phi, v, random), settings.separation)
    if settings.gate:  # first predict, then cluster
        clustering = clustering * (torch.stack(gains) / settings.gate).clamp(0, 1)
    return predictions + list(clustering)


@torch.no_grad()
def average(teacher, student, ema):
    """teacher += ema (student - teacher), every parameter; in place."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), ema)


def train(x, v, s, target="latent", detach="none", combine="sum", seed=0, report=None, **settings):
    """Learn from strings x, a (P, s^L) uint8 tensor of symbols 0..v-1, on x's device. Returns the trained modules.

    report(done, steps, stack) is called after every step. settings: those of FLAGS, by name. Raises ValueError if a
    target or a setting is unknown or out of range, ImportError if combine is upgrad and torchjd is not installed."""
    unknown = [name for name in settings if name not in FLAGS]
    if unknown or target not in TARGETS or detach not in DETACH or combine not in ("sum", "upgrad"):
        raise ValueError(f"one of {unknown}, target {target!r}, detach {detach!r}, combine {combine!r} is unknown")
    settings = SimpleNamespace(**(SETTINGS | settings))
    batch = settings.batch or 8 * v
    d = settings.codes or 5 * v // 4
    if d < v:
        raise ValueError(f"codes = {d}: allowed is v = {v} or more (0 for 5 v / 4), as tokens are codes too")
    L = depth_of(x, s)
    if combine == "upgrad":
        from torchjd.aggregation import UPGrad
        from torchjd.autojac import backward, jac_to_grad

        aggregator = UPGrad()  # needs the solvers quadprog and qpsolvers, and says so here
    random = torch.Generator().manual_seed(seed)
    student = build(s, L, d, settings.hidden, target, random).to(x.device)
    teacher = copy.deepcopy(student).requires_grad_(False) if settings.ema else None
    weights = list(student.parameters())
    optimizer = torch.optim.AdamW(weights, settings.lr, weight_decay=settings.decay, fused=x.device.type != "mps")
    steps = min(settings.steps, math.ceil(settings.epochs * len(x) / batch))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = settings.lr * (1 - step / steps)
        strings = x[torch.randint(len(x), (batch,), generator=random).to(x.device)]
        parts = losses(student, teacher, strings, v, target, detach, random, settings)
        optimizer.zero_grad()
        if combine == "sum":
            sum(parts).backward()
        else:  # Jacobian descent, as the paper: no loss may grow to first order
            backward(parts)
            jac_to_grad(weights, aggregator)
        optimizer.step()
        if teacher is not None:
            average(teacher, student, settings.ema)
        if report:
            report(step + 1, steps, student)
    return student


# ----------------------------------------------------------------------------------------------------------------------
# the scores


def score(stack, truth, v):
    """truth: levels of fresh strings. Returns, for the levels 1..L-1: accuracy of the arg-max code under the best
    matching; codes in use (by at least 1 in 1000 tuples); entropy of their use in nats, log v if all is well."""
    rows = []
    for l, codes in enumerate(encode(stack, truth[0]), 1):
        best = codes.argmax(-1)
        use = best.flatten().bincount(minlength=codes.shape[-1]) / best.numel()
        rows.append((accuracy(best, truth[l], v), int((use >= 1e-3).sum()), float(entropy(use))))
    return rows


def probes(stack, train, test, v):
    """Accuracies of linear probes of the frozen final code, trained on the labels of the training strings: h^(L-1) at
    every position, and the root from all of them. A probe can read symbols that were never merged, wherever
    d_h >= v m; the matching accuracy can't be deceived so."""
    a, b = encode(stack, train[0])[-1], encode(stack, test[0])[-1]  # (P, s, d)
    below = linear_probe(a.flatten(0, 1), train[-2].flatten(), v)(b.flatten(0, 1)).argmax(1) == test[-2].flatten()
    root = linear_probe(a.flatten(1), train[-1][:, 0], v)(b.flatten(1)).argmax(1) == test[-1][:, 0]
    return below.float().mean().item(), root.float().mean().item()


def recover(grammar, P, seed, target="latent", device="cpu", detach="none", combine="sum", **settings):
    """One run of the sweep: learn from P strings, score on fresh ones.

    Returns (accuracy, collapsed), lists over the levels 1..L-1: the fraction of right labels under the best matching,
    and whether fewer than v codes are in use."""
    x = grammar.sample(P, seed, device)[0]
    stack = train(x, grammar.v, grammar.s, target, detach, combine, seed, **settings)
    rows = score(stack, grammar.sample(TEST_STRINGS, (seed, 1), device), grammar.v)
    return [a for a, _, _ in rows], [used < grammar.v for _, used, _ in rows]


def main():
    parser = Parser(__doc__)
    add_grammar_flags(parser, m=3, samples=4096)
    parser.add_argument("--target", choices=TARGETS, default="latent", help="what is predicted (default latent)")
    parser.add_argument("--detach", choices=DETACH, default="none", help="stop the gradient between modules, and from "
                        "each clusterer to its predictor (default none)")
    parser.add_argument("--combine", choices=("sum", "upgrad"), default="sum", help="the losses: their sum, or "
                        "Jacobian descent as in the paper, which needs the package torchjd (default sum)")
    for name, (default, kind, text) in FLAGS.items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default {default})")
    args = parser.parse_args()
    grammar = grammar_from_flags(parser, args)
    device = pick_device(parser, args.device)
    levels = grammar.sample(args.samples, args.seed, device)
    truth = grammar.sample(TEST_STRINGS, (args.seed, 1), device)
    glance = [h[:256] for h in truth]
    layout = "{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}"
    bar = tqdm(total=args.steps, bar_format=layout, delay=1e-3)  # nothing to see if a flag turns out to be wrong

    def report(done, steps, stack):
        bar.total = steps
        bar.update()
        if done % max(1, steps // 40) == 0:
            found = " ".join(f"{a:.2f}" for a, _, _ in score(stack, glance, args.v))
            bar.set_postfix_str(f"accuracy of levels 1..{args.depth - 1}: {found}")

    settings = {name: getattr(args, name) for name in FLAGS}
    try:
        stack = train(levels[0], args.v, args.s, args.target, args.detach, args.combine, args.seed, report, **settings)
    except ValueError as error:
        bar.close()
        parser.error(f"argument --{error}")
    except ImportError:
        bar.close()
        parser.error("argument --combine: upgrad needs a package: pip install 'torchjd[quadprog-projector]'")
    bar.close()
    print(f"{args.samples} strings of {args.s**args.depth} tokens, v={args.v} s={args.s} m={args.m} L={args.depth}")
    print(f"target {args.target}, detach {args.detach}, d_h = {stack[0].d}; v m^3 = {args.v * args.m**3}")
    print(f"\nlevel   accuracy on {TEST_STRINGS} fresh strings   codes in use   entropy (of {math.log(args.v):.2f})")
    for l, (a, used, H) in enumerate(score(stack, truth, args.v), 1):
        print(f"{l:5}   {a:8.3f}{'':25}{used:12}   {H:7.2f}{'   collapsed' if used < args.v else ''}")
    below, root = probes(stack, levels, truth, args.v)
    print(f"\nlinear probes of the final code: level {args.depth - 1} {below:.3f}, root {root:.3f}")
    if stack[0].d >= args.v * args.m:
        print(f"(d_h >= v m = {args.v * args.m}: such a probe could read tuples that were never merged)")


if __name__ == "__main__":
    main()
