"""
Learner 3: data2vec, prediction of one's own latents without explicit levels, and its controls.

    python data2vec.py --depth 3 --samples 2048                   a minute, levels rise
    python data2vec.py --depth 3 --samples 2048 --target token    the control: predict raw tokens
    python data2vec.py --preset transformer                       the paper's kind of encoder

A student sees a string with some tokens hidden. A teacher, the moving average of the student,
sees the whole string. An encoder outputs maps of features: `tree` one for every level, from L-1
down to the tokens, `transformer` one for every block. At every hidden position linear heads
predict, from the student's last map:
  latent   the mean of the teacher's last K maps, each layer-normalised: data2vec;
  stacked  each of these K maps, but from the student's own map of the same level or block;
  several  each of these K maps, all from the student's last map;
  token    the hidden token, by cross-entropy: the control, whose target needs no teacher.
The encoder `tree` knows which tokens stand under which node; `transformer` does not.

A step of one small network is mostly overhead, so R runs are trained side by side: every weight
has a leading dimension R. With T = s^L tokens, batch B and width d, a step takes time
~ R B T d (d + hidden) and memory ~ R B T (d + hidden). In a transformer each layer takes as much,
and its attention adds time ~ R B T^2 d and memory ~ R B T^2 heads. P strings are P T bytes.
"""

import os
import sys
from copy import deepcopy
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from grammar import (
    TEST_STRINGS, Checkpoint, Grammar, Parser, Score, Setting, add_grammar_flags, add_settings,
    as_strings, check_files, check_memory, check_runs, choice,
    given_settings, grammar_from_flags, linear_probe, open_trace, option, out_file, paper_preset,
    pick_device, read_settings, real, run_script, switch, tuple_codes, whole, write_whole,
)

TARGETS = ("latent", "token", "stacked", "several")
ADAM_BETAS = (0.9, 0.98)        # the paper's, and so are the next two
CLIP = 1.0                      # largest norm of a gradient
SMOOTH_L1_BETA = 4.0            # errors above it count linearly
PIECE = 512                     # strings encoded at a time when measuring
DRAWN = 100                     # steps whose strings and masks are drawn at once, at most
# settings for check_size where nothing is measured
NO_MEASURE = {"test_strings": 1, "probe_strings": 1}

MASK_WORDS = "top", "mixed"     # in place of a level
mask_block = option(
    lambda text: text if text in MASK_WORDS else int(text),
    lambda block: block in (*MASK_WORDS, *range(25)), "a level, top or mixed",
)
# the last bits of a matrix product depend on how its memory is aligned: with multiples of 8
# every run is aligned alike, whatever R
eights = option(int, lambda n: n in range(8, 2**16 + 1, 8), "a multiple of 8 up to 65536")


def aligned(size):
    """size, rounded up to a multiple of 8."""
    return -(-size // 8) * 8


SETTINGS = (  # name, type, default (the tree preset), the paper's value, help
    Setting("encoder", choice("tree", "transformer"), "tree", "transformer", "is the tree known?"),
    Setting("width", eights, 32, 2048, "d, features of a position or node"),
    Setting("hidden", eights, 64, 8192, "hidden units of the two-layer networks"),
    Setting("layers", whole(1, 100), 3, 8, "blocks of the transformer"),
    Setting("heads", whole(1, 256), 4, 32, "heads of the transformer's attention"),
    Setting("attention_bias", switch, False, False, "transformer: learned T x T bias per head"),
    Setting("dropout", real(0, 0.9), 0.0, 0.1, "transformer: rate on both residual branches"),
    Setting("top", whole(1, 100), 3, 4, "K, how many of the last maps are the target"),
    Setting("online", switch, False, True, "always fresh strings instead of P fixed ones"),
    Setting("steps", whole(1), 5000, 262144, "optimiser steps; an online sweep: P / batch"),
    Setting("batch", whole(1, 2**20), 64, 512, "strings a step"),
    Setting("mask", real(0, 1), 0.15, 0.15, "probability of hiding a node; 1 or more per string"),
    Setting("mask_block", mask_block, 0, 0,
            "level of hidden nodes; top: depth-2; mixed: each string draws from 0..depth-2"),
    Setting("ema", real(0, 1), 0.97, 0.99, "EMA decay of the teacher, a step"),
    Setting("lr", real(0, 1), 4e-3, 1e-4, "learning rate of AdamW"),
    Setting("decay", real(0, 10), 0.3, 0.01, "weight decay of AdamW, on matrices and embeddings"),
    Setting("warmup", whole(1), 100, 1, "steps over which the learning rate rises"),
    Setting("cooldown", real(0, 1), 0.2, 0.0, "share of steps, at the end, in which lr falls to 0"),
    Setting("bfloat16", switch, False, None, "products in bfloat16, by autocast"),
    Setting("compile", switch, False, None, "torch.compile, which needs a compiler"),
    Setting("probes", whole(0), 20, None, "number of measurements while the script trains"),
    Setting("probe_steps", whole(1), 2000, 2000, "steps of the MLP probe of the root"),
    Setting("probe_strings", whole(1, 2**20), 2048, None, "strings a probe is fitted on"),
    Setting("test_strings", whole(1, 2**20), TEST_STRINGS, None, "strings a score is taken on"),
)
PRESETS = {
    "tree": {},
    "transformer": {"encoder": "transformer", "width": 64, "hidden": 128, "layers": 6,
                    "steps": 8000, "lr": 3e-3, "decay": 0.2, "mask": 0.3, "mask_block": "mixed"},
    "paper": paper_preset(SETTINGS),
}


# ----------------------------------------------------------------------------------------
# modules: R of each side by side, one for every run


def layer_norm(h):
    """Layer normalisation without gain and bias."""
    return F.layer_norm(h, h.shape[-1:])


def pool(h, nodes):
    """Bring a map (..., n, d) to another number of nodes, (..., nodes, d): each gets the mean
    of the nodes beneath it, or a copy of the node above it."""
    n = h.shape[-2]
    if n > nodes:
        return h.unflatten(-2, (nodes, n // nodes)).mean(-2)
    return h.repeat_interleave(nodes // n, -2)


def look_up(table, x):
    """Rows of R tables: (R, ids, d) and x, (R, B, T) -> (R, B, T, d)."""
    R, ids, _ = table.shape
    # all tables in one, that of run r from row r * ids on
    first = torch.arange(R, device=x.device).view(R, 1, 1) * ids
    return F.embedding(x + first, table.flatten(0, 1))


class Linear(nn.Module):
    """R linear maps, (R, ..., inputs) -> (R, ..., outputs)."""

    def __init__(self, R, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(R, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(R, 1, outputs))

    def forward(self, h):
        flat = h.flatten(1, -2)                                 # (R, n, inputs)
        out = torch.baddbmm(self.bias, flat, self.weight)       # (R, n, outputs)
        return out.view(*h.shape[:-1], -1)


class LayerNorm(nn.Module):
    """R layer normalisations with gain and bias: (R, B, T, d) -> (R, B, T, d)."""

    def __init__(self, R, d):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(R, 1, 1, d))
        self.bias = nn.Parameter(torch.zeros(R, 1, 1, d))

    def forward(self, h):
        return torch.addcmul(self.bias, layer_norm(h), self.gain)


class TwoLayers(nn.Module):
    """R networks with one hidden layer."""

    def __init__(self, R, inputs, hidden, outputs):
        super().__init__()
        self.first = Linear(R, inputs, hidden)
        self.second = Linear(R, hidden, outputs)

    def forward(self, h):
        return self.second(F.gelu(self.first(h)))


def initialise(module, randoms):
    """Draw the weights of every run from its own CPU generator: they don't depend on R."""
    for r, random in enumerate(randoms):
        for name, w in module.named_parameters():
            if name.endswith("weight"):
                nn.init.xavier_normal_(w.data[r], generator=random)
            elif name.endswith(("embed", "position")):
                # 0.02, usual in language models, does not learn at this size
                nn.init.normal_(w.data[r], std=1.0, generator=random)
    return module


# ----------------------------------------------------------------------------------------
# two encoders: tokens (R, B, T), v for a hidden one -> a list of maps, layer-normalised
#
# A third one needs a name in SETTINGS and ENCODERS, and n_maps, how many maps it makes. Every
# parameter has R first; initialise draws those named weight, embed or position.


class TreeEncoder(nn.Module):
    """A U-Net on the s-ary tree; nodes of a level share one network up and one down.
    The maps are those of the way down: (R, B, s^(L-l), d) for level l, from L-1 to 0."""

    def __init__(self, R, v, s, L, options):
        super().__init__()
        d, hidden = options.width, options.hidden
        self.n_maps = L
        self.inputs = s * d  # features of siblings, one after the other
        self.embed = nn.Parameter(torch.empty(R, v + 1, d))
        self.up = nn.ModuleList(TwoLayers(R, s * d, hidden, d) for _ in range(L))
        self.down = nn.ModuleList(TwoLayers(R, (s + 1) * d, hidden, s * d) for _ in range(L))

    def forward(self, x):
        family = *x.shape[:2], -1, self.inputs                  # (R, B, parents, s d)
        # the few rows of the table are normalised instead of every token
        up = [look_up(layer_norm(self.embed), x)]               # (R, B, T, d)

        # up: what stands under a node, from its children
        for net in self.up:
            up.append(layer_norm(net(up[-1].view(family))))     # (R, B, s^(L-l), d)
        context = up.pop()                                      # (R, B, 1, d), the root

        # down: also what stands around a node, from its siblings and its parent's context
        maps = []
        for h, net in zip(reversed(up), reversed(self.down)):
            around = torch.cat([h.view(family), context], -1)   # (R, B, s^(L-l-1), (s+1) d)
            change = net(around)                                # (R, B, s^(L-l-1), s d)
            context = layer_norm(h + change.view_as(h))
            maps.append(context)
        return maps


class Dropout(nn.Module):
    """Every run draws from its own generator, for its whole batch. own: the slice of the batch
    that this process has."""

    def __init__(self, rate, batch, randoms, own):
        super().__init__()
        self.rate, self.batch, self.randoms, self.own = rate, batch, randoms, own

    def forward(self, h):
        size = self.batch, *h.shape[2:]
        draws = [torch.rand(size, generator=random, device=h.device) for random in self.randoms]
        return h * (torch.stack(draws)[:, self.own] >= self.rate) / (1 - self.rate)


class Block(nn.Module):
    """Pre-LN attention and feed-forward network, each on a residual branch."""

    def __init__(self, R, T, options):
        super().__init__()
        d, self.heads = options.width, options.heads
        self.norm1, self.norm2 = LayerNorm(R, d), LayerNorm(R, d)
        self.qkv, self.out = Linear(R, d, 3 * d), Linear(R, d, d)
        self.ffn = TwoLayers(R, d, options.hidden, d)
        self.drop = nn.Identity()       # train gives a student Dropout
        self.bias = None
        if options.attention_bias:
            self.bias = nn.Parameter(torch.zeros(R, 1, self.heads, T, T))

    def attend(self, h):
        """(R, B, T, d) -> (R, B, T, d): every position mixes what all positions hold."""
        R, B, T, d = h.shape
        # one batch of small matrices, for all runs, strings and heads
        qkv = self.qkv(h).view(R, B, T, 3, self.heads, -1).permute(3, 0, 1, 4, 2, 5)
        q, k, v = qkv.reshape(3, R * B * self.heads, T, -1)
        scores = torch.bmm(q * q.shape[-1] ** -0.5, k.mT)       # (R B heads, T, T)
        if self.bias is not None:
            scores = scores.view(R, B, self.heads, T, T) + self.bias
            scores = scores.view(-1, T, T)
        mixed = torch.bmm(scores.softmax(-1), v)                # (R B heads, T, .)
        mixed = mixed.view(R, B, self.heads, T, -1).transpose(2, 3)
        return self.out(mixed.flatten(3))

    def forward(self, h):
        h = h + self.drop(self.attend(self.norm1(h)))
        return h + self.drop(self.ffn(self.norm2(h)))


class Transformer(nn.Module):
    """The paper's kind of encoder; its maps are the residual stream after every block."""

    def __init__(self, R, v, s, L, options):
        super().__init__()
        T, d, self.n_maps = s**L, options.width, options.layers
        self.embed = nn.Parameter(torch.empty(R, v + 1, d))
        self.position = nn.Parameter(torch.empty(R, T, d))
        self.blocks = nn.ModuleList(Block(R, T, options) for _ in range(options.layers))

    def forward(self, x):
        h = look_up(self.embed, x) + self.position[:, None]     # (R, B, T, d)
        maps = []
        for block in self.blocks:
            h = block(h)
            maps.append(layer_norm(h))
        return maps


ENCODERS = {"tree": TreeEncoder, "transformer": Transformer}


# ----------------------------------------------------------------------------------------
# what is hidden, how far a prediction is off, and the student


def draw_mask(B, L, s, rate, block, random):
    """(B, s^L) bool on the generator's device, True where a token is hidden.

    Every node of level block is hidden with probability rate, with all tokens beneath it, and
    one in every string for certain. top: level L-2; mixed: strings draw theirs from 0..L-2."""
    levels = {"mixed": range(L - 1), "top": [L - 2]}.get(block, [block])
    masks = []
    for level in levels:
        draw = torch.rand(B, s ** (L - level), generator=random, device=random.device)
        certain = draw == draw.min(1, keepdim=True).values
        masks.append((certain | (draw < rate)).repeat_interleave(s**level, 1))
    # every string picks one of the levels that it may have
    pick = torch.randint(len(masks), (B,), generator=random, device=random.device)
    return torch.stack(masks)[pick, torch.arange(B, device=random.device)]


def smooth_l1(prediction, goal):
    """Two (R, B, T, d) -> (R, B, T), the mean over features."""
    return F.smooth_l1_loss(prediction, goal, reduction="none", beta=SMOOTH_L1_BETA).mean(-1)


def cross_entropy(scores, tokens):
    """Scores (..., v) and tokens (...) -> (...)."""
    error = F.cross_entropy(scores.flatten(0, -2), tokens.flatten(), reduction="none")
    return error.view(tokens.shape)


def goal(target, x, maps):
    """What is the target? One goal for each head: tokens (R, B, T), or features (R, B, T, d).

    x: whole strings, (R, B, T); maps: the teacher's last K maps of them, [] for target token."""
    if target == "token":
        return [x]
    maps = [pool(h, x.shape[2]) for h in maps]                  # each (R, B, T, d)
    if target == "latent":
        return [sum(maps) / len(maps)]
    return maps                                                 # stacked, several


class Network(nn.Module):
    """R students: an encoder, and the linear heads that predict from its maps."""

    def __init__(self, R, v, s, L, target, options):
        super().__init__()
        self.v, self.s, self.L, self.target, self.options = v, s, L, target, options
        d = options.width
        self.encoder = ENCODERS[options.encoder](R, v, s, L, options)
        self.K = min(options.top, self.encoder.n_maps)
        heads = self.K if target in ("stacked", "several") else 1
        outputs = aligned(v) if target == "token" else d
        self.heads = nn.ModuleList(Linear(R, d, outputs) for _ in range(heads))

    def predict(self, x, hidden):
        """Predictions [(R, B, T, d)] of the heads, from x, (R, B, T), with its hidden tokens
        masked. Target token: one (R, B, T, aligned(v)), of which the first v scores count."""
        maps = self.encoder(x.masked_fill(hidden, self.v))
        sources = maps[-1:] * len(self.heads)                   # each (R, B, T, d)
        if self.target == "stacked":
            # each head has a map of its own
            sources = [pool(h, x.shape[2]) for h in maps[-self.K :]]
        return [head(h) for head, h in zip(self.heads, sources)]

    def forward(self, x, hidden, goals, count):
        """Losses (R,): errors against each head's goal, summed over heads and hidden
        positions, divided by count, (R,)."""
        loss = 0
        for prediction, aim in zip(self.predict(x, hidden), goals, strict=True):
            if self.target == "token":
                error = cross_entropy(prediction[..., : self.v], aim)   # (R, B, T)
            else:
                error = smooth_l1(prediction, aim)                      # (R, B, T)
            loss = loss + (error * hidden).sum((1, 2)) / count
        return loss


# ----------------------------------------------------------------------------------------
# training


def stream(seed, number, device="cpu"):
    """One of four independent generators of a seed: 0 draws weights, 1 picks strings, 2 hides
    tokens, 3 drops out. Grammar.sample has its own: it gets seed for training strings, (seed, 1)
    for the test, (seed, 2, step) online, (seed, 3) and (seed, 4, level) for fitting probes."""
    return torch.Generator(device).manual_seed(4 * seed + number)


def drawn_at_once(options, T):
    """The number of steps whose strings and masks are drawn at once."""
    return max(1, min(DRAWN, 2**22 // (options.batch * T)))


def batches(xs, L, s, seeds, randoms, options, done=0):
    """Yields x, (R, B, T) int64, and hidden, (R, B, T) bool, for every step after `done`.

    randoms: two generators for each run, one that picks strings and one that draws masks."""
    T, B = s**L, options.batch
    n, device = drawn_at_once(options, T), randoms[0][0].device
    for start in range(done, options.steps, n):
        x, hidden = [], []
        for run, seed, (pick, mask) in zip(xs, seeds, randoms):
            if isinstance(run, Grammar):
                x.append(run.sample(n * B, (seed, 2, start), device)[0])
            else:
                rows = torch.randint(len(run), (n * B,), generator=pick, device=device)
                x.append(run[rows])
            hidden.append(draw_mask(n * B, L, s, options.mask, options.mask_block, mask))
        x, hidden = (torch.stack(part).unflatten(1, (n, B)) for part in (x, hidden))
        for i in range(min(n, options.steps - start)):
            yield x[:, i].long(), hidden[:, i]


def adamw(student, decay):
    """The optimiser, under which biases and layer norms don't decay."""
    constant, decaying = [], []
    for name, w in student.named_parameters():
        group = constant if name.endswith(("gain", "bias")) else decaying
        group.append(w)
    groups = [{"params": decaying}, {"params": constant, "weight_decay": 0.0}]
    fused = decaying[0].device.type != "mps"
    return torch.optim.AdamW(groups, betas=ADAM_BETAS, weight_decay=decay, fused=fused)


def learning_rate(step, options):
    """Rises linearly in the first steps, and falls linearly to 0 in the last ones."""
    rise = step / options.warmup
    fall = (options.steps + 1 - step) / max(1, options.cooldown * options.steps)
    return options.lr * min(1, rise, fall)


def clip_each_run(weights):
    """Scale the gradients of every run to norm CLIP at most. Returns the norms before, (R,)."""
    norms = [w.grad.flatten(1).norm(dim=1) for w in weights]    # each (R,)
    norm = torch.stack(norms, 1).norm(dim=1)
    scale = (CLIP / (norm + 1e-6)).clamp(max=1)
    for w in weights:
        w.grad *= scale.view(-1, *[1] * (w.ndim - 1))
    return norm


@torch.no_grad()
def follow(teacher, student, ema):
    """One step of the moving average: teacher <- ema * teacher + (1 - ema) * student."""
    for old, new in zip(teacher.parameters(), student.parameters()):
        old.lerp_(new, 1 - ema)


def rank_and_world():
    """This process's number, and how many share every batch."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def train(student, xs, seeds, watch=None, resume=None):
    """The loop, for R runs side by side. xs: for each its (P, T) uint8 strings, or a Grammar.

    Returns (teacher, diverged): the moving average of the student, heads and all; and for
    each run the step whose loss or gradient was not finite, where it stops, or 0."""
    s, L, K, target, options = student.s, student.L, student.K, student.target, student.options
    R, T, device = len(xs), s**L, next(student.parameters()).device
    teacher = deepcopy(student).requires_grad_(False)
    optimizer = adamw(student, options.decay)
    pick, mask, noise = ([stream(seed, i, device) for seed in seeds] for i in (1, 2, 3))

    # resume if there is a file; stopped: {diverged run: (step, weights before it)}
    parts = {"student": student, "teacher": teacher, "optimizer": optimizer}
    about = {"v": student.v, "s": s, "depth": L, "target": target, "seed": list(seeds)}
    about |= {**vars(options), "device": device.type}
    checkpoint = Checkpoint(resume, parts, [*pick, *mask, *noise], xs, about)
    done, stopped = checkpoint.load()

    # of several processes each has its own part of every batch; gradients are averaged
    rank, world = rank_and_world()
    own = slice(rank, None, world)
    for block in student.modules():
        if isinstance(block, Block) and options.dropout:
            block.drop = Dropout(options.dropout, options.batch, noise, own)
    student_loss, teacher_maps = student, teacher.encoder
    if world > 1:
        student_loss = DistributedDataParallel(student_loss)
    if options.compile:
        student_loss, teacher_maps = torch.compile(student_loss), torch.compile(teacher_maps)
    precision = partial(torch.autocast, device.type, torch.bfloat16, options.bfloat16)

    drawn = batches(xs, L, s, seeds, list(zip(pick, mask)), options, done)
    for step, (x, hidden) in enumerate(drawn, done + 1):
        # (R,) hidden tokens / world: sum / count, averaged over processes, is the mean error
        count = hidden.sum((1, 2)) / world
        x, hidden = x[:, own], hidden[:, own]

        # the teacher sees whole strings, and nothing flows back into it
        with torch.no_grad(), precision():
            maps = [] if target == "token" else teacher_maps(x)[-K:]    # each (R, B, n, d)
            goals = goal(target, x, maps)

        # the student sees the rest, and predicts what is hidden from it
        with precision():
            loss = student_loss(x, hidden, goals, count)                # (R,)

        # runs share no weight, so that the gradient of each is its own
        optimizer.zero_grad()
        loss.sum().backward()
        norm = clip_each_run(list(student.parameters()))
        loss = loss.detach()
        if world > 1:
            dist.all_reduce(loss)
            loss /= world

        # a run that has diverged keeps the weights it had before this step
        for r, finite in enumerate((loss + norm).isfinite().tolist()):
            if not finite and r not in stopped:
                stopped[r] = step, [w[r].clone() for w in teacher.parameters()]

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        follow(teacher, student, options.ema)
        if watch:
            watch(step, options.steps, teacher, loss)
        if len(stopped) == R:
            break
        # only where a block ends do the generators' states determine all later steps
        last = step == options.steps
        if rank == 0 and (last or step % drawn_at_once(options, T) == 0):
            checkpoint.save(step, stopped, last)

    # runs that diverged get back the weights from before that step
    for r, (_, kept) in stopped.items():
        for w, before in zip(teacher.parameters(), kept):
            w[r] = before
    return teacher, [stopped[r][0] if r in stopped else 0 for r in range(R)]


# ----------------------------------------------------------------------------------------
# what fit returns


class Data2vec:
    """What fit returns: the teacher, a Network of one run, and its encoder before training.
    diverged: the first step whose loss or gradient was not finite, or 0."""

    def __init__(self, network, untrained=None, diverged=0):
        self.v, self.s, self.L = network.v, network.s, network.L
        self.target, self.options = network.target, network.options
        self.network, self.encoder = network, network.encoder
        self.untrained, self.diverged = untrained, diverged

    def __repr__(self):
        sizes = f"v={self.v}, s={self.s}, L={self.L}, encoder={self.options.encoder}"
        return f"Data2vec(target={self.target}, {sizes}, diverged={self.diverged})"

    def features(self, x):
        """Strings (P, s^L) -> [map (P, n, d) float32, layer-normalised], n = s, s^2, ..., s^L
        nodes of the tree, or s^L positions after every block. Raises ValueError, naming x."""
        x, _ = as_strings(x, self.v, self.s, self.L)
        return encode(self.encoder, x.to(next(self.encoder.parameters()).device))

    def save(self, file):
        """Write sizes, settings and weights; the file is complete or not there."""
        saved = {"v": self.v, "s": self.s, "L": self.L, "target": self.target}
        saved["settings"] = vars(self.options)
        saved["weights"] = {name: w.cpu() for name, w in self.network.state_dict().items()}
        write_whole(file, partial(torch.save, saved))


def load(file):
    """The Data2vec that save wrote, on the CPU. Raises ValueError for any other file."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        options = read_settings(SETTINGS, PRESETS, saved["settings"])
        v, s, L, target = saved["v"], saved["s"], saved["L"], saved["target"]
        check_size(v, s, 2, L, 1, target, **saved["settings"] | NO_MEASURE)
        network = Network(1, v, s, L, target, options).requires_grad_(False)
        network.load_state_dict(saved["weights"])
    except OSError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"file: {file} was not written by data2vec.py: {reason}") from None
    return Data2vec(network)


def check_size(v, s, m, L, P, target="latent", **settings):
    """Raises ValueError, naming the flag, unless one run works and fits into memory."""
    options = read_settings(SETTINGS, PRESETS, settings)
    T, d, hidden, heads = s**L, options.width, options.hidden, options.heads
    if target not in TARGETS:
        raise ValueError(f"target: must be one of {', '.join(TARGETS)}, not {target!r}")
    if m == 1:
        raise ValueError("m: must be 2 or more: a single rule has no synonym to measure")
    if options.mask_block not in (*MASK_WORDS, *range(L)):
        raise ValueError(f"mask-block: must be from 0 to depth-1 = {L - 1}, top or mixed")

    # numbers that a token leaves in the maps, and in a step for its gradient
    kept, numbers = 2 * d, 4 * (8 * d + 3 * hidden)
    if options.encoder == "transformer":
        kept = options.layers * d
        numbers = options.layers * (14 * d + 3 * hidden + 4 * heads * T)
        if d % heads:
            raise ValueError(f"width: must be a multiple of heads = {heads}, not {d}")
    with torch.device("meta"):  # shapes without memory
        encoder = ENCODERS[options.encoder](1, v, s, L, options)
    weights = sum(w.numel() for w in encoder.parameters())
    measured = options.test_strings + options.probe_strings
    check_memory("samples", 0 if options.online else 2 * P * T, f"{P} strings of {T} tokens")
    check_memory("test-strings", 4 * measured * T * kept, f"features of {measured} strings")
    # weights stand with teacher, untrained, gradient and the two averages of AdamW
    check_memory("width", 6 * 4 * weights, f"{weights} weights")
    check_memory("batch", 4 * options.batch * T * numbers, f"a step of {options.batch} strings")


def check_speedups(options, device):
    """Raises ValueError, naming the setting, unless bfloat16 and compile work on the device."""
    name, one = "bfloat16", torch.ones(8, device=device)
    try:
        if options.bfloat16:
            torch.autocast(one.device.type, torch.bfloat16)
        if options.compile:
            name = "compile"
            torch.compile(torch.exp)(one)
    except Exception as error:  # each compiler has its own
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{name}: does not work on {device} here: {reason:.80}") from None


def one_run(module, r):
    """A copy of run r of R."""
    alone = deepcopy(module)
    for w in alone.parameters():
        w.data = w.data[r : r + 1].clone()
    return alone


def fit_many(xs, v, s, target="latent", seeds=(0,), watch=None, device=None, resume=None,
             **settings):
    """Train R runs of one size side by side. Returns a list of Data2vec, one for each.

    xs: for each run its strings, (P, s^L) integers of any dtype, or a Grammar that gives
    always fresh ones. A run depends on its own strings, seed and settings, not on R.
    settings: values by their names in SETTINGS, or preset. device: by default the strings', or cpu.
    watch(step, steps, network, loss) is called after every step, with the Network of the
    teachers and the students' losses, (R,). resume: a file, written at most once a minute
    and at the end; if it exists, the runs go on from it. Processes of torch.distributed
    share every batch. Raises ValueError that begins with the wrong argument's name."""
    xs, L, P, device = check_runs(xs, v, s, seeds, device)
    options = read_settings(SETTINGS, PRESETS, settings)
    check_speedups(options, device)
    if options.online and P:
        raise ValueError("online: needs a Grammar in place of x")
    world = rank_and_world()[1]
    if options.batch < world:
        raise ValueError(f"batch: must be {world} or more, a string a process")
    # m of given strings is unknown, so 2 stands in
    check_size(v, s, 2, L, P, target, **settings | NO_MEASURE)

    student = Network(len(xs), v, s, L, target, options)
    initialise(student, [stream(seed, 0) for seed in seeds]).to(device)
    untrained = deepcopy(student.encoder).requires_grad_(False)
    teacher, diverged = train(student, xs, seeds, watch, resume)
    models = []
    for r, step in enumerate(diverged):
        models.append(Data2vec(one_run(teacher, r), one_run(untrained, r), step))
    return models


def fit(x, v, s, target="latent", seed=0, watch=None, device=None, resume=None, **settings):
    """fit_many of one run: a Data2vec, or a FloatingPointError if it diverged."""
    model = fit_many([x], v, s, target, [seed], watch, device, resume, **settings)[0]
    if model.diverged:
        step = model.diverged
        what = "the loss or its gradient is not finite"
        raise FloatingPointError(f"step {step}: {what}; lower lr or decay")
    return model


# ----------------------------------------------------------------------------------------
# measures, all on fresh strings; features: strings (P, T) -> a list of maps (P, n, d)


@torch.no_grad()
def encode(encoder, x):
    """One encoder, strings (P, T) -> all its maps, each (P, n, d) and layer-normalised."""
    pieces = [encoder(part.long()[None]) for part in x.split(PIECE)]
    return [torch.cat(maps, 1)[0] for maps in zip(*pieces)]


def unseen_synonyms(features, grammar, seed, options, device="cpu"):
    """How well features know each level: (unseen, seen, collapsed), lists over l = 1..L-1.

    A linear probe reads h^(l) at its node, from the map with the highest unseen. It is fitted on
    strings in which every level-l symbol lacks one rule. unseen: its accuracy on tuples of this
    rule, high only if synonyms look alike. seen: on other tuples, whose parents the probe can
    look up. collapsed: it answers with fewer than v symbols. Raises ValueError if m = 1."""
    v, s, L = grammar.v, grammar.s, grammar.L
    test = grammar.sample(options.test_strings, (seed, 1), device)
    tested = features(test[0])
    results = []
    for l in range(1, L):
        # fit on strings without rule 0 of every symbol
        known = grammar.sample(options.probe_strings, (seed, 4, l), device, without=l)
        rule = tuple_codes(grammar.rules[l - 1][:, 0].to(device), v)
        tuples = tuple_codes(test[l - 1].unflatten(1, (-1, s)), v)
        absent = torch.isin(tuples, rule)           # (P, nodes)
        nodes = s ** (L - l)

        # and ask about the tuples that only this rule makes
        found = []
        for fitted, fresh in zip(features(known[0]), tested):
            fitted = pool(fitted, nodes).flatten(0, 1)
            predict = linear_probe(fitted, known[l].flatten(), v)
            answer = predict(pool(fresh, nodes)).argmax(2)
            right = (answer == test[l]).float()     # (P, nodes)
            # nan_to_num: few strings may have no such tuple
            unseen = right[absent].mean().nan_to_num().item()
            seen = right[~absent].mean().nan_to_num().item()
            collapsed = len(answer.unique()) < v
            found.append((unseen, seen, collapsed))
        results.append(max(found))
    return [list(column) for column in zip(*results)]


def mlp_probe(features, labels, v, steps, lr=1e-3):
    """The paper's MLP probe, d -> 2d -> v with GELU and dropout 0.1, by Adam; R side by side.

    features: (R, n, d); labels: (R, n). Returns a function from (R, n, d) to (R, n) int64.
    All probes start alike and see the same rows and dropout, whatever R."""
    batch, (R, n, d) = 256, features.shape
    net = TwoLayers(R, d, 2 * d, aligned(v))
    net = initialise(net, [torch.Generator().manual_seed(0) for _ in range(R)]).to(features)
    random = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(net.parameters(), lr)
    for _ in range(steps):
        rows = torch.randint(n, (batch,), generator=random).to(features.device)
        keep = (torch.rand(batch, 2 * d, generator=random) >= 0.1).to(features) / 0.9
        hidden = F.gelu(net.first(features.index_select(1, rows))) * keep
        scores = net.second(hidden)[..., :v]                            # (R, batch, v)
        error = cross_entropy(scores, labels.index_select(1, rows).long())
        optimizer.zero_grad()
        error.mean(1).sum().backward()  # every probe by its own mean
        optimizer.step()
    return lambda h: net(h)[..., :v].argmax(2)


def measure_encoders(encoders, grammars, seeds, options, device="cpu"):
    """[(accuracy, collapsed)], one pair for every encoder, each a list over levels 1..L: below the
    root on unseen synonyms; at the root by the paper's MLP probe of the last map's mean."""
    found, pooled = [], []
    for encoder, grammar, seed in zip(encoders, grammars, seeds):
        features = partial(encode, encoder)     # strings -> maps
        accuracy, _, collapsed = unseen_synonyms(features, grammar, seed, options, device)
        found.append((accuracy, collapsed))
        known = grammar.sample(options.probe_strings, (seed, 3), device)
        fresh = grammar.sample(options.test_strings, (seed, 1), device)
        means = [features(levels[0])[-1].mean(1) for levels in (known, fresh)]  # (n, d)
        pooled.append((*means, known[-1][:, 0], fresh[-1][:, 0]))

    # the probes of all roots side by side
    v = grammars[0].v
    known, fresh, labels, truth = (torch.stack(part) for part in zip(*pooled))
    answers = mlp_probe(known, labels, v, options.probe_steps)(fresh)
    roots = (answers == truth).float().mean(1).tolist()
    for (accuracy, collapsed), root, answer in zip(found, roots, answers):
        accuracy.append(root)
        collapsed.append(len(answer.unique()) < v)
    return found


def measure(models, grammars, seeds, device="cpu"):
    """[Score] of models of one size, by measure_encoders. The floor is what the encoders get
    untrained; it is None for a loaded model, which has no untrained encoder."""
    about = grammars, seeds, models[0].options, device
    found = measure_encoders([model.encoder for model in models], *about)
    floors = [None] * len(models)
    untrained = [model.untrained for model in models]
    if None not in untrained:
        floors = [floor for floor, _ in measure_encoders(untrained, *about)]

    scores = []
    for model, (accuracy, collapsed), floor in zip(models, found, floors):
        if model.diverged:
            accuracy, collapsed = [0.0] * model.L, [False] * model.L
        scores.append(Score(accuracy, collapsed, floor, model.diverged))
    return scores


def recover(grammars, samples, seeds, target="latent", device="cpu", **settings):
    """Runs of the sweep, side by side: [Score], one for each grammar, P and seed, by measure.
    Online, every one of P strings is seen once: there are P / batch steps."""
    v, s = grammars[0].v, grammars[0].s
    options = read_settings(SETTINGS, PRESETS, settings)
    if options.online:
        learned = {}
        # P sets the number of steps, so that only runs of one P can train side by side
        for P in set(samples):
            runs = [r for r, size in enumerate(samples) if size == P]
            xs = [grammars[r] for r in runs]
            own_seeds = [seeds[r] for r in runs]
            settings["steps"] = max(1, P // options.batch)
            learned |= zip(runs, fit_many(xs, v, s, target, own_seeds, device=device, **settings))
        models = [learned[r] for r in range(len(seeds))]
    else:
        xs = [g.sample(P, seed, device)[0] for g, P, seed in zip(grammars, samples, seeds)]
        models = fit_many(xs, v, s, target, seeds, device=device, **settings)
    return measure(models, grammars, seeds, device)


@torch.no_grad()
def token_losses(model, grammar, seed):
    """Cross-entropies on fresh strings, masked as in training, in nats per hidden token: (the
    model's, the exact Bayes limit, that of each position's marginal distribution)."""
    if model.target != "token":
        raise ValueError(f"model: must be trained with target token, not {model.target}")
    v, s, L, options = grammar.v, grammar.s, grammar.L, model.options
    fresh = grammar.sample(options.test_strings, (seed, 1))[0]
    # masks (P, T) from stream 1, which drew none in training
    hidden = draw_mask(len(fresh), L, s, options.mask, options.mask_block, stream(seed, 1))
    nothing = torch.zeros(s**L, dtype=torch.bool)
    unigram = grammar.posterior(fresh[:1], nothing)[0].log()                # (1, T, v)

    # exact inference in pieces of no more than 256 MiB, if one string needs less
    piece = max(1, 2**28 // grammar.posterior_bytes(1))
    device = next(model.network.parameters()).device
    losses = torch.zeros(3, dtype=torch.float64)
    for x, part in zip(fresh.long().split(piece), hidden.split(piece)):
        scores = model.network.predict(x[None].to(device), part[None].to(device))[0]
        learned = scores[0, :, :, :v].log_softmax(-1).cpu().double()        # (p, T, v)
        bayes = grammar.posterior(x, ~part)[0].log()                        # (p, T, v)
        for i, log in enumerate((learned, bayes, unigram.expand_as(learned))):
            of_token = log.gather(2, x[..., None])[..., 0]                  # (p, T)
            losses[i] -= of_token[part].sum()
    return tuple((losses / hidden.sum()).tolist())


@torch.no_grad()
def synonym_scores(features, grammar, seed, options, device="cpu"):
    """The paper's synonym score C_l (Figs. 5, 13), the largest over maps: floats, l = 1..L-1.

    The tuple under one level-l node is replaced, once by a synonym and once by any other tuple,
    and all levels below are resampled. The node's mean features move by a mean distance d_syn or
    d_any: C_l = 1 - d_syn / d_any, 1 if synonyms look the same, 0 if like any other tuple."""
    levels = grammar.sample(min(1024, options.test_strings), (seed, 1), device)
    before = features(levels[0])
    each = torch.arange(len(levels[0]), device=device)
    scores = []
    for l in range(1, grammar.L):
        nodes = grammar.s ** (grammar.L - l)
        distance = {}
        for kind in ("synonym", "generic"):
            swapped, node = grammar.swap(levels, l, kind, seed=l)
            change = [b - a for a, b in zip(before, features(swapped[0]))]
            change = [pool(h, nodes)[each, node] for h in change]       # (P, d) for each map
            distance[kind] = torch.stack([h.norm(dim=1).mean() for h in change])
        ratio = distance["synonym"] / distance["generic"].clamp(min=1e-12)
        scores.append((1 - ratio).max().item())
    return scores


def spread(features, x, top):
    """Does the target collapse? (standard deviation, effective rank) of the latent target of
    strings x: the root mean square over its d features, and exp(entropy of the covariance's
    normalised eigenvalues), from 1 to d. In float64 on the CPU."""
    maps = features(x)[-top:]
    target = sum(pool(h, x.shape[1]) for h in maps) / len(maps)         # (P, T, d)
    if not target.isfinite().all():
        return float("nan"), float("nan")
    covariance = torch.cov(target.flatten(0, 1).cpu().double().T)
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=1e-30)
    entropy = torch.special.entr(eigenvalues / eigenvalues.sum()).sum()
    return eigenvalues.mean().sqrt().item(), entropy.exp().item()


# ----------------------------------------------------------------------------------------
# alone


def join_processes(parser, device):
    """Join the other processes of torchrun, if there are; rank 0 alone prints. Returns device."""
    if "LOCAL_RANK" in os.environ:
        if device.startswith("mps"):
            parser.error("argument --device: must be cpu or cuda under torchrun")
        if device != "cpu":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        # however long rank 0 measures, the others wait
        forever = timedelta(days=365)
        has_nccl = device != "cpu" and dist.is_nccl_available()     # on Windows never
        dist.init_process_group("nccl" if has_nccl else "gloo", timeout=forever)
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")
    return device


def quick_measures(encoder, grammar, seed, options, device):
    """What main shows while it trains, on few strings: spread, unseen, synonyms, in a row."""
    few = deepcopy(options)
    few.test_strings = min(PIECE, few.test_strings)
    few.probe_strings = min(PIECE, few.probe_strings)
    features = partial(encode, encoder)
    x = grammar.sample(few.test_strings, (seed, 1), device)[0]
    unseen = unseen_synonyms(features, grammar, seed, few, device)[0]
    synonyms = synonym_scores(features, grammar, seed, few, device)
    return [*spread(features, x, few.top), *unseen, *synonyms]


def print_scores(model, grammar, seed, device):
    """The table at the end: what recover gives, beside an untrained encoder."""
    score = measure([model], [grammar], [seed], device)[0]
    where = f"on {model.options.test_strings} fresh strings (chance {1 / model.v:.3f})"
    print(f"\n{where:38}   trained   untrained")
    rows = zip(score.accuracy, score.floor, score.collapsed)
    for l, (right, floor, collapsed) in enumerate(rows, 1):
        what = "unseen synonyms, best map" if l < model.L else "MLP probe of the last map"
        mark = "   collapsed" if collapsed else ""
        print(f"level {l}  {what:29}{right:10.3f}{floor:12.3f}{mark}")
    if model.target == "token":
        loss, bayes, unigram = token_losses(model, grammar, seed)
        print(f"\nloss per hidden token {loss:.3f}, exact Bayes limit {bayes:.3f}, "
              f"unigram {unigram:.3f}")


def main():
    parser = Parser(__doc__)
    add_grammar_flags(parser, samples=2048)
    add = parser.add_argument
    add("--target", choices=TARGETS, default="latent", help="what is predicted (default latent)")
    add_settings(parser, SETTINGS, PRESETS)
    add("--trace", metavar="FILE.csv", type=out_file, help="write what is printed to this file")
    add("--save", metavar="FILE.pt", type=out_file, help="write the trained encoder to this file")
    add("--resume", metavar="FILE.pt", type=out_file,
        help="go on from this file if it exists, and write the state of training to it")
    args = parser.parse_args()
    grammar = grammar_from_flags(parser, args)
    device = pick_device(parser, args.device)
    settings = given_settings(SETTINGS, args)
    v, s, m, L, P, seed = args.v, args.s, args.m, args.depth, args.samples, args.seed
    try:
        check_size(v, s, m, L, P, args.target, **settings)
        check_files(args)
        if args.target == "token":      # print_scores needs it, for one string at a time
            check_memory("m", grammar.posterior_bytes(1), "the exact limit")
    except ValueError as error:
        parser.error(f"argument --{error}")
    device = join_processes(parser, device)
    rank, world = rank_and_world()

    # a short trial is measured on few strings, or measuring would take longer than training
    options = read_settings(SETTINGS, PRESETS, settings)
    few = max(8, options.steps * options.batch // 32)
    for name in ("test_strings", "probe_strings", "probe_steps"):
        settings.setdefault(name, min(few, getattr(options, name)))
    settings.setdefault("probes", min(options.steps // 20, options.probes))
    options = read_settings(SETTINGS, PRESETS, settings)
    # on matrices this small more threads gain nothing and take cores from other processes
    if device == "cpu" and options.width <= 64:
        torch.set_num_threads(1)

    x = grammar if options.online else grammar.sample(P, seed, device)[0]
    strings = "always fresh" if options.online else P
    print(f"{strings} strings of {s**L} tokens, v={v} s={s} m={m} L={L}, v m^3 = {v * m**3}")
    print(f"target {args.target}, {options.encoder} encoder; by level, the best of its maps:")
    print("unseen: accuracy on tuples the probe never saw; synonyms: the synonym score\n")
    columns = [f"{kind} {l}" for kind in ("unseen", "synonyms") for l in range(1, L)]
    columns = ["step", "loss", "target std", "rank", *columns]
    print("".join(f"{name:>12}" for name in columns))

    # step 1 shows what a nearly untrained encoder gets
    every = max(1, options.steps // max(1, options.probes))
    looked_at = {1, *range(every, options.steps + 1, every)} if options.probes else {}
    bar = tqdm(total=options.steps, unit="step", leave=False, disable=rank > 0)
    trace = None

    def watch(step, steps, network, loss):
        nonlocal trace
        trace = trace or open_trace(args.trace, [*columns, "v", "m", "P"], step)
        bar.update(step - bar.n)
        if step in looked_at:
            measured = quick_measures(network.encoder, grammar, seed, options, device)
            numbers = [loss.item(), *measured]
            seen = step * options.batch if options.online else P
            print(step, *numbers, v, m, seen, sep=",", file=trace, flush=True)
            tqdm.write(f"{step:12}" + "".join(f"{number:12.3f}" for number in numbers))

    try:
        with bar:
            model = fit(
                x, v, s, args.target, seed, watch=watch if rank == 0 else None, device=device,
                resume=args.resume, **settings,
            )
    except ValueError as error:  # of --resume; all else is checked
        parser.error(f"argument --{error}")
    except FloatingPointError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:
        if args.save:
            model.save(args.save)
        print_scores(model, grammar, seed, device)


if __name__ == "__main__":
    run_script(main)
