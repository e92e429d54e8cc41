"""
Learner 3: data2vec, prediction of one's own latents without explicit levels (section 5), and its controls.

    python data2vec.py --depth 3 --samples 2048                   trains in half a minute, shows the levels rise
    python data2vec.py --depth 3 --samples 2048 --target token    same encoder, data, masks: predict the raw tokens
    python data2vec.py --preset transformer --attention-bias      the paper's kind of encoder, 4 minutes

A student sees a string with some tokens masked, a teacher, its exponential moving average, sees it whole. At every
masked position a linear head regresses from the student's last map what the teacher has there. The target is
  latent   the mean of the teacher's top K maps, each layer-normalised: data2vec;
  stacked  every one of these K maps, each predicted from the student's own map of that layer: explicit stacking;
  several  every one of these K maps, all predicted from the student's last map;
  token    the masked token itself, by cross-entropy: the control. Its teacher is an average that nothing learns from.
Two encoders: `tree` knows which tokens stand under which node, as the other learners do, but no rule; `transformer`
knows nothing. Level l counts as recovered by the *unseen-synonym accuracy*, see `examine`. It is read from the
teacher, on the same maps for every target, and reported beside the same reading of the untrained encoder.
At CPU size three things differ from the paper (--preset paper): a stronger weight decay, which lets the part of the
weights fade that tells synonyms apart, blocks of tokens masked as well as single ones, and a faster teacher.

Measured with README's commands (v=8 s=2 m=3, v m^3 = 216, seeds 0-2, torch 2.13 on a CPU): P* of level L-1 is 456, 495,
499 for L = 3..5 with target latent and the paper's masks (single tokens, 15 %), and 371, 383, 399 with token: no factor
of m per level for either. With whole subtrees of level L-2 masked neither gets to L = 5: latent 608, 957, > 4096, token
653, > 4096, > 4096. The first command: levels 1 and 2 at 1.000 and 1.000, untrained .183 and .166, in 29 s on one core
(seed 0). The transformer, told nothing of the tree, L = 3: with 16000 steps 1950 with latent and 1932 with token, with
32000 1853 and 2797.
"""

import copy
import csv
import os
from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from grammar import (
    PROBE_STRINGS, TEST_STRINGS, Exam, Parser, add_grammar_flags, examine, grammar_from_flags, linear_probe,
    pick_device, real, whole,
)

TARGETS = ("latent", "token", "stacked", "several")
BETAS, CLIP, BETA = (0.9, 0.98), 1.0, 4.0  # the paper's: of AdamW, of the gradient's norm, of smooth L1
PIECE = 512  # strings encoded at a time when measuring


def blocks(text):
    """An argparse type: a level, or one of two words."""
    return text if text in ("mixed", "top") else whole(0, 24)(text)


TABLE = (  # setting, type, then its value in the presets tree, transformer and paper, then what it is
    ("encoder", str, "tree", "transformer", "transformer", "tree or transformer"),
    ("width", whole(4, 2**14), 32, 64, 2048, "d, features per position; a multiple of heads"),
    ("hidden", whole(1, 2**16), 64, 128, 8192, "hidden units of the two-layer networks"),
    ("layers", whole(1, 100), 3, 6, 8, "transformer blocks; the tree has one up and one down for every level"),
    ("heads", whole(1, 256), 4, 4, 32, "of the transformer's attention"),
    ("attention_bias", bool, False, False, False, "transformer: a learned T x T bias for every head"),
    ("dropout", real(0, 0.9), 0.0, 0.0, 0.1, "probability, transformer alone, on the two branches of a block"),
    ("top", whole(1, 100), 3, 3, 4, "K, how many of the last maps are the target; at most all are"),
    ("regime", str, "offline", "offline", "online", "offline: P strings, many times; online: always fresh ones"),
    ("steps", whole(1), 4000, 8000, 262144, "optimiser steps"),
    ("batch", whole(1, 2**20), 64, 64, 512, "strings per step"),
    ("mask", real(0, 1), 0.3, 0.3, 0.15, "probability that a position is masked; one in every string is"),
    ("mask_block", blocks, "mixed", "mixed", 0, "level k of the nodes that are masked, all s^k tokens beneath at once: "
     "0, single tokens, to L-1; top, which is L-2; or mixed, every string draws one level from 0 to L-2"),
    ("ema", real(0, 1), 0.97, 0.97, 0.99, "share of the teacher that remains after a step"),
    ("lr", real(0, 1), 4e-3, 3e-3, 1e-4, "learning rate of AdamW for targets other than token"),
    ("lr_token", real(0, 1), 4e-3, 3e-3, 1e-4, "learning rate of AdamW for target token"),
    ("decay", real(0, 10), 0.3, 0.2, 0.01, "weight decay of AdamW, on matrices and embeddings, times lr per step"),
    ("warmup", whole(1), 100, 100, 1, "steps over which the learning rate rises to its value"),
)
Settings = namedtuple("Settings", [row[0] for row in TABLE])
PRESETS = {name: Settings(*(row[i] for row in TABLE)) for i, name in enumerate(("tree", "transformer", "paper"), 2)}
SETTINGS = {**PRESETS["tree"]._asdict(), "probe_strings": PROBE_STRINGS, "test_strings": TEST_STRINGS}


# ----------------------------------------------------------------------------------------------------------------------
# two encoders: (B, T) tokens, the number v standing for a masked one -> a list of maps (B, T, d)


def normal(h):
    """Layer normalisation without gain and bias."""
    return F.layer_norm(h, h.shape[-1:])


def network(inputs, hidden, outputs):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


class Tree(nn.Module):
    """A U-Net on the s-ary tree. Up: children -> parent. Down: children and the context of their parent -> contexts of
    the children, added to what went up. The maps are those of the way down, level L-1 first and the tokens last, each
    node's features repeated at all positions beneath it. One network per level and direction, for all its nodes."""

    def __init__(self, v, s, L, settings):
        super().__init__()
        self.s, d, hidden = s, settings.width, settings.hidden
        self.embed = nn.Embedding(v + 1, d)
        self.up = nn.ModuleList(network(s * d, hidden, d) for _ in range(L))
        self.down = nn.ModuleList(network((s + 1) * d, hidden, s * d) for _ in range(L))

    def forward(self, x, random=None):
        up, maps = [normal(self.embed(x))], []
        for net in self.up:
            up.append(normal(net(up[-1].unflatten(1, (-1, self.s)).flatten(2))))  # (B, s^(L-l), d)
        h = up[-1]  # (B, 1, d), the root
        for l, net in reversed(list(enumerate(self.down))):
            family = torch.cat([up[l].unflatten(1, (-1, self.s)).flatten(2), h], 2)  # (B, s^(L-l-1), (s+1) d)
            h = normal(up[l] + net(family).view_as(up[l]))  # (B, s^(L-l), d)
            maps.append(h[:, :, None].expand(-1, -1, self.s**l, -1).flatten(1, 2))  # (B, T, d)
        return maps


class Block(nn.Module):
    """Pre-LN attention and feed-forward network, each on a residual branch."""

    def __init__(self, T, settings):
        super().__init__()
        d = settings.width
        self.heads, self.dropout = settings.heads, settings.dropout
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out, self.net = nn.Linear(d, 3 * d), nn.Linear(d, d), network(d, settings.hidden, d)
        self.bias = nn.Parameter(torch.zeros(self.heads, T, T)) if settings.attention_bias else None

    def forward(self, h, random):
        q, k, v = self.qkv(self.norm1(h)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, .)
        a = F.scaled_dot_product_attention(q, k, v, self.bias).transpose(1, 2).flatten(2)  # (B, T, d)
        h = h + self.drop(self.out(a), random)
        return h + self.drop(self.net(self.norm2(h)), random)

    def drop(self, h, random):
        """Dropout while training, which is when there is a generator to draw it from."""
        if random is None or self.dropout == 0:
            return h
        return h * (torch.rand(h.shape, generator=random, device=h.device) >= self.dropout) / (1 - self.dropout)


class Transformer(nn.Module):
    """The paper's kind of encoder; its maps are the residual stream after every block."""

    def __init__(self, v, s, L, settings):
        super().__init__()
        self.embed = nn.Embedding(v + 1, settings.width)
        self.position = nn.Embedding(s**L, settings.width)
        self.blocks = nn.ModuleList(Block(s**L, settings) for _ in range(settings.layers))

    def forward(self, x, random=None):
        h, maps = self.embed(x) + self.position.weight, []
        for block in self.blocks:
            h = block(h, random)
            maps.append(h)
        return maps


def initialise(module, random):
    """Xavier for the linear maps, no biases, and standard deviation 1 for the embeddings: 0.02, as is usual in language
    models, does not learn at this size. random: a CPU torch.Generator, so that every device starts alike."""
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, generator=random)
        if isinstance(part, nn.Linear):
            nn.init.xavier_normal_(part.weight, generator=random)
            nn.init.zeros_(part.bias)
    return module


def build(v, s, L, settings, random):
    """The encoder that settings name, with its initial weights, on the CPU."""
    return initialise({"tree": Tree, "transformer": Transformer}[settings.encoder](v, s, L, settings), random)


# ----------------------------------------------------------------------------------------------------------------------
# what is hidden, and what is predicted


def check_block(block, L):
    """Raises ValueError unless the masked blocks are words that draw_mask knows, or smaller than the string."""
    if block not in ("mixed", "top", *range(L)):
        raise ValueError(f"mask-block: must be from 0 to depth-1 = {L - 1}, top or mixed, not {block}")


def draw_mask(B, L, s, rate, block, random):
    """(B, s^L) bool on the generator's device, True where the token is hidden.

    Every node of level block is hidden, that is, all s^block tokens beneath it, with probability rate, and one in every
    string for certain. Level 0 hides single tokens, whose siblings are mostly visible; level L-2, "top", leaves nothing
    but cousins of the highest level to predict from. "mixed": every string draws its level from 0..L-2, so that some
    siblings are hidden at every level that can be learned from them."""
    masks = []
    for k in {"mixed": range(L - 1), "top": [L - 2]}.get(block, [block]):
        draw = torch.rand(B, s ** (L - k), generator=random, device=random.device)
        hidden = (draw < rate) | (draw == draw.min(1, keepdim=True).values)  # the smallest draw: one for certain
        masks.append(hidden.repeat_interleave(s**k, 1))
    pick = torch.randint(len(masks), (B,), generator=random, device=random.device)
    return torch.stack(masks)[pick, torch.arange(B, device=random.device)]


def goals(teacher, x, where, target, top):
    """What the whole string x, (B, T) int64, gives the teacher at the flat positions where, (n,) int64: a list of
    (n, d) tensors without gradient; the mean of the layer-normalised top K maps, or these maps one by one."""
    with torch.no_grad():
        maps = [normal(h.flatten(0, 1)[where]) for h in teacher(x)[-top:]]
        return [sum(maps) / len(maps)] if target == "latent" else maps


def objective(student, teacher, heads, x, hidden, target, top, random=None):
    """The loss, a scalar: only masked positions enter it, and the student never sees what they hold.

    x: (B, T) int64; hidden: (B, T) bool; heads: linear, as many as goals. random: for dropout."""
    v = student.embed.num_embeddings - 1
    where = hidden.flatten().nonzero()[:, 0]  # (n,)
    maps = student(x.masked_fill(hidden, v), random)
    maps = maps[-top:] if target == "stacked" else maps[-1:] * len(heads)
    predictions = [head(normal(h.flatten(0, 1)[where])) for head, h in zip(heads, maps)]
    if target == "token":
        return F.cross_entropy(predictions[0], x.flatten()[where])
    pairs = zip(predictions, goals(teacher, x, where, target, top), strict=True)
    return sum(F.smooth_l1_loss(p, g, beta=BETA) for p, g in pairs)


@torch.no_grad()
def follow(teacher, student, ema):
    """One step of the moving average: teacher <- ema * teacher + (1 - ema) * student."""
    for old, new in zip(teacher.parameters(), student.parameters()):
        old.lerp_(new, 1 - ema)


# ----------------------------------------------------------------------------------------------------------------------
# training


def batches(grammar, P, seed, settings, device):
    """The strings of every step, (batch, T) int64: drawn with replacement from P strings, or never seen before."""
    if settings.regime == "offline":
        x = grammar.sample(P, seed, device)[0].long()
        random = torch.Generator(device).manual_seed(seed)
        for _ in range(settings.steps):
            yield x[torch.randint(P, (settings.batch,), generator=random, device=device)]
    else:
        for step in range(settings.steps):
            if step % 100 == 0:  # sampling is cheapest in bulk
                fresh = grammar.sample(100 * settings.batch, (seed, 2, step), device)[0].long().split(settings.batch)
            yield fresh[step % 100]


def fit(batches, v, s, L, target="latent", settings=PRESETS["tree"], seed=0, device="cpu", watch=None):
    """Train on the strings that batches yields. Returns (teacher, untrained): the encoder that is measured, and what it
    was before. watch(step, loss, teacher), if given, is called after every step.

    Raises ValueError if the target is unknown or a masked block is the whole string."""
    if target not in TARGETS:
        raise ValueError(f"target must be one of {TARGETS}, not {target!r}")
    check_block(settings.mask_block, L)
    start = torch.Generator().manual_seed(seed)
    random = torch.Generator(device).manual_seed(seed + 1)
    student = build(v, s, L, settings, start).to(device)
    teacher, untrained = (copy.deepcopy(student).requires_grad_(False) for _ in range(2))
    maps = min(settings.top, L if settings.encoder == "tree" else settings.layers)
    sizes = [v] if target == "token" else [settings.width] * (1 if target == "latent" else maps)
    heads = initialise(nn.ModuleList(nn.Linear(settings.width, size) for size in sizes), start).to(device)
    parameters = [*student.parameters(), *heads.parameters()]
    lr = settings.lr_token if target == "token" else settings.lr
    groups = [{"params": [p for p in parameters if p.ndim == 2], "weight_decay": settings.decay},
              {"params": [p for p in parameters if p.ndim != 2], "weight_decay": 0.0}]  # biases and layer norms
    optimizer = torch.optim.AdamW(groups, lr, BETAS, fused=device != "mps")
    for step, x in enumerate(batches, 1):
        hidden = draw_mask(len(x), L, s, settings.mask, settings.mask_block, random)
        loss = objective(student, teacher, heads, x, hidden, target, settings.top, random)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, step / settings.warmup)
        optimizer.step()
        follow(teacher, student, settings.ema)
        if watch:
            watch(step, loss, teacher)
    return teacher, untrained


# ----------------------------------------------------------------------------------------------------------------------
# measures, all on fresh strings


@torch.no_grad()
def encode(encoder, x):
    """(P, T) strings -> the encoder's maps, each layer-normalised: a list of (P, T, d)."""
    pieces = [[normal(h) for h in encoder(rows.long())] for rows in x.split(PIECE)]
    return [torch.cat(h) for h in zip(*pieces)]


def under(h, nodes):
    """(P, T, d) -> (P, nodes, d), the mean over the positions beneath each of so many equal nodes."""
    return h.unflatten(1, (nodes, -1)).mean(2)


def readout(encoder, s, L):
    """What the probes see of the nodes, as grammar.examine wants it: for every level the maps one by one, each averaged
    under each node. The best map of a level counts; so it is for every target, whatever its K, and for no training."""

    def features(x):
        maps = encode(encoder, x)
        return [[under(h, s ** (L - l)) for h in maps] for l in range(L)]  # each (P, s^(L-l), d)

    return features


def mlp_probe(features, labels, v, steps=2000, lr=1e-3, batch=256):
    """The paper's other probe: d -> 2d -> v with GELU and dropout 0.1, by Adam. Arguments and result are those of
    grammar.linear_probe."""
    random = torch.Generator().manual_seed(0)
    d = features.shape[1]
    net = initialise(network(d, 2 * d, v), random).to(features)
    optimizer = torch.optim.Adam(net.parameters(), lr)
    for _ in range(steps):
        rows = torch.randint(len(features), (batch,), generator=random).to(features.device)
        keep = (torch.rand(batch, 2 * d, generator=random) >= 0.1).to(features) / 0.9
        loss = F.cross_entropy(net[2](net[1](net[0](features[rows])) * keep), labels[rows].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def examine_root(encoder, exam):
    """The paper's probes of the root label: (linear, MLP) accuracy on the mean-pooled last map."""
    train, test = (encode(encoder, levels[0])[-1].mean(1) for levels in (exam.labelled, exam.test))
    label, truth, v = exam.labelled[-1][:, 0], exam.test[-1][:, 0], exam.grammar.v
    probes = [fit_probe(train, label, v) for fit_probe in (linear_probe, mlp_probe)]
    return [(probe(test).argmax(1) == truth).float().mean().item() for probe in probes]


@torch.no_grad()
def synonym_scores(encoder, exam, strings=1024):
    """The paper's synonym score C_l (Figs. 5, 13), for the levels l = 1..L-1 and every map: (L-1, maps) float.

    A node's level-(l-1) tuple is replaced by a synonym, or by any valid tuple, always another one, and all below is
    resampled; the state that may move is the layer-normalised map averaged under the node. C_l = 1 - (mean distance
    moved by synonyms) / (mean distance moved by any tuple): 1 if synonyms are the same, about 0 if they are nothing
    special, as in an untrained encoder."""
    levels = [h[:strings] for h in exam.test]
    grammar, rows = exam.grammar, torch.arange(len(levels[0]), device=levels[0].device)
    before = encode(encoder, levels[0])
    scores = []
    for l in range(1, grammar.L):
        moved = {}
        for kind in ("synonym", "generic"):
            swapped, node = grammar.swap(levels, l, kind, seed=l)
            change = [under(b - a, grammar.s ** (grammar.L - l))[rows, node]  # (strings, d)
                      for a, b in zip(before, encode(encoder, swapped[0]))]
            moved[kind] = torch.stack([c.norm(dim=1).mean() for c in change])  # (maps,)
        scores.append(1 - moved["synonym"] / moved["generic"].clamp(min=1e-12))
    return torch.stack(scores)


def spread(encoder, exam, top):
    """Does the target collapse? (standard deviation, effective rank) of the latent target over positions and strings:
    the root mean square over its d features, and exp(entropy of the covariance's normalised eigenvalues), 1 to d."""
    maps = encode(encoder, exam.test[0][:PIECE])[-top:]
    h = (sum(maps) / len(maps)).flatten(0, 1).double()
    eigenvalues = torch.linalg.eigvalsh(torch.cov(h.T).cpu()).clamp(min=1e-30)
    return eigenvalues.mean().sqrt().item(), torch.special.entr(eigenvalues / eigenvalues.sum()).sum().exp().item()


# ----------------------------------------------------------------------------------------------------------------------
# the sweep's function, and alone


def load(file):
    """The encoder that --save wrote."""
    saved = torch.load(file, weights_only=True)
    sizes = saved["v"], saved["s"], saved["L"]
    encoder = build(*sizes, Settings(**saved["settings"]), torch.Generator())
    encoder.load_state_dict(saved["encoder"])
    return encoder


def recover(grammar, P, seed, target="latent", preset="tree", device="cpu", **changes):
    """One run of the sweep: learn from P strings, score on fresh ones. changes: other values of settings; in the
    online regime the steps follow from P.

    Returns (accuracy, collapsed), lists over the levels 1..L-1: unseen-synonym accuracy and the mark of `examine`."""
    settings = PRESETS[preset]._replace(**changes)
    if settings.regime == "online":
        settings = settings._replace(steps=max(1, P // settings.batch))
    strings = batches(grammar, P, seed, settings, device)
    teacher, _ = fit(strings, grammar.v, grammar.s, grammar.L, target, settings, seed, device)
    unseen, _, collapsed = examine(readout(teacher, grammar.s, grammar.L), Exam(grammar, seed, device))
    return unseen, collapsed


def main():
    parser = Parser(__doc__)
    add_grammar_flags(parser, m=3, samples=2048)
    parser.add_argument("--target", choices=TARGETS, default="latent", help="what is predicted (default latent)")
    parser.add_argument("--preset", choices=PRESETS, default="tree", help="of the settings below (default tree)")
    for name, kind, *values, text in TABLE[1:]:
        how = {"action": "store_true"} if kind is bool else {"type": kind}
        how = {"choices": ("offline", "online")} if name == "regime" else how
        text = f"{text} (tree {values[0]}, transformer {values[1]}, paper {values[2]})"
        parser.add_argument("--" + name.replace("_", "-"), default=None, help=text, **how)
    parser.add_argument("--trace", metavar="FILE.csv", help="write what is printed while training to this file")
    parser.add_argument("--save", metavar="FILE.pt", help="write the encoder's weights and settings to this file")
    args = parser.parse_args()
    grammar = grammar_from_flags(parser, args)
    device = pick_device(parser, args.device)
    changes = {name: getattr(args, name) for name in Settings._fields[1:] if getattr(args, name) is not None}
    settings = PRESETS[args.preset]._replace(**changes)
    v, s, L = args.v, args.s, args.depth
    if args.m == 1:
        parser.error("argument --m: must be 2 or more here, since a single rule has no synonym to measure")
    if settings.encoder == "transformer" and settings.width % settings.heads:
        parser.error(f"argument --width: must be a multiple of --heads, {settings.heads}, not {settings.width}")
    try:
        check_block(settings.mask_block, L)
    except ValueError as error:
        parser.error(f"argument --{error}")
    for flag in ("trace", "save"):  # find out before the training, not after it
        try:
            open(getattr(args, flag) or os.devnull, "ab").close()
        except OSError as error:
            parser.error(f"argument --{flag}: cannot write {getattr(args, flag)}: {error.strerror}")
    P = args.samples if settings.regime == "offline" else settings.steps * settings.batch
    print(f"{P} strings of {s**L} tokens, v={v} s={s} m={args.m} L={L}; target {args.target}, ", end="")
    print(f"{settings.encoder} encoder, {settings.regime}; v m^3 = {v * args.m**3}")
    print("\nunseen l: level l as read by a probe that never saw the tuples in question; synonyms l: their score")
    columns = [f"{kind} {l}" for kind in ("unseen", "synonyms") for l in range(1, L)]
    print("    step     loss  target std   rank" + "".join(f"{column:>12}" for column in columns))
    exam, quick, trace = Exam(grammar, args.seed, device), Exam(grammar, args.seed, device, tests=PIECE), []

    def watch(step, loss, teacher):
        if step == 1 or step % max(1, settings.steps // 25) == 0:
            unseen = examine(readout(teacher, s, L), quick)[0]
            trace.append([step, loss.item(), *spread(teacher, exam, settings.top), *unseen,
                          *synonym_scores(teacher, quick).amax(1).tolist()])
            text = "{:8} {:8.4f}{:12.3f}{:7.1f}".format(*trace[-1])
            tqdm.write(text + "".join(f"{a:12.2f}" for a in trace[-1][4:]))

    strings = tqdm(batches(grammar, P, args.seed, settings, device), total=settings.steps, unit="step", leave=False)
    encoders = fit(strings, v, s, L, args.target, settings, args.seed, device, watch)
    print(f"\non {TEST_STRINGS} fresh strings (chance {1 / v:.3f})     trained   untrained")
    results = [examine(readout(encoder, s, L), exam) for encoder in encoders]
    scores = [synonym_scores(encoder, exam) for encoder in encoders]  # each (L-1, maps)
    for l in range(1, L):
        unseen, seen, marks = ([result[i][l - 1] for result in results] for i in range(3))
        print(f"level {l}  unseen synonyms           {unseen[0]:12.3f}{unseen[1]:12.3f}" + "   collapsed" * marks[0])
        print(f"         seen tuples, a look-up    {seen[0]:12.3f}{seen[1]:12.3f}")
        print("         synonym score, best map   {:12.3f}{:12.3f}".format(*(c[l - 1].max().item() for c in scores)))
    for name, *right in zip(("linear probe", "MLP probe"), *(examine_root(encoder, exam) for encoder in encoders)):
        print(f"root     {name:26}{right[0]:12.3f}{right[1]:12.3f}")
    if args.trace:
        with open(args.trace, "w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerows([["step", "loss", "target std", "rank", *columns], *trace])
    if args.save:
        sizes = {"v": v, "s": s, "L": L}
        torch.save({**sizes, "settings": settings._asdict(), "encoder": encoders[0].state_dict()}, args.save)


if __name__ == "__main__":
    main()
