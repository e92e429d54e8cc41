"""
Learner 3: data2vec, prediction of one's own latents without explicit levels, and its controls.

    python data2vec.py --depth 3 --samples 2048                   trains in seconds, levels rise
    python data2vec.py --depth 3 --samples 2048 --target token    the control: predict raw tokens
    python data2vec.py --preset transformer --attention-bias      the paper's kind of encoder

A student sees a string with some tokens hidden. A teacher, the moving average of the student, sees
the whole string. At every hidden position a linear head predicts, from the student's last map:
  latent   the mean of the teacher's top K maps, each layer-normalised: data2vec;
  stacked  each of these K maps, from the student's own map of the same layer;
  several  each of these K maps, all from the student's last map;
  token    the hidden token itself, by cross-entropy: the control, which needs no teacher.
The encoder `tree` knows which tokens stand under which node, but no rule; `transformer` knows
nothing. Levels are read from the teacher, see `unseen_synonyms` and `root_probe`.

Own latents and tokens find the tree from about equally many strings; only own latents carry it
into the last map. The table is in README, more in assets.

Every weight has a leading dimension R: R runs of the same sizes are trained side by side in one
loop, each with its own strings and seed, because a step of one small network is mostly overhead.
Time and memory of a step grow like R * batch * s^L * width * hidden; memory also like P * s^L.
"""

import csv
import os
from argparse import ArgumentTypeError
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from grammar import (
    TEST_STRINGS, Grammar, Parser, Score, Setting, add_grammar_flags, add_settings,
    as_strings, check_memory, choice, given_settings, grammar_from_flags, linear_probe,
    paper_preset, pick_device, read_settings, real, run_script, switch, tuple_codes, whole,
)

TARGETS = ("latent", "token", "stacked", "several")
BETAS, CLIP, BETA = (0.9, 0.98), 1.0, 4.0  # AdamW, gradient norm, smooth L1: the paper's
PROBE_STRINGS = 2048                       # labelled fresh strings that a probe is fitted on
PIECE = 512                                # strings encoded at a time when measuring
DRAWN = 100                                # steps whose strings and masks are drawn at once


def mask_block(text):
    """An argparse type: a level, or one of two words."""
    return text if text in ("mixed", "top") else whole(0, 24)(text)


def eights(high):
    """An argparse type: a multiple of 8. On a CPU the last bits of a matrix product depend on how
    its memory is aligned; with such sizes every run is aligned alike, whatever R."""

    def read(text):
        number = whole(8, high)(text)
        if number % 8:
            raise ArgumentTypeError(f"must be a multiple of 8 from 8 to {high}, not {text}")
        return number

    return read


SETTINGS = (  # name, type, default (the tree preset), the paper's value, help
    Setting("encoder", choice("tree", "transformer"), "tree", "transformer", "tree or transformer"),
    Setting("width", eights(2**14), 32, 2048, "d, features of a position or node"),
    Setting("hidden", eights(2**16), 64, 8192, "hidden units of the two-layer networks"),
    Setting("layers", whole(1, 100), 3, 8, "blocks of the transformer"),
    Setting("heads", whole(1, 256), 4, 32, "heads of the transformer's attention"),
    Setting("attention_bias", switch, False, False, "transformer: a learned T x T bias a head"),
    Setting("dropout", real(0, 0.9), 0.0, 0.1, "transformer: probability, on both branches"),
    Setting("top", whole(1, 100), 3, 4, "K, how many of the last maps are the target"),
    Setting("target_from", choice("residual", "ffn"), "residual", "residual",
            "transformer: the target is the stream after a block, or its feed-forward output"),
    Setting("online", switch, False, True, "always fresh strings instead of P fixed ones"),
    Setting("steps", whole(1), 5000, 262144, "optimiser steps; online, a sweep takes P / batch"),
    Setting("batch", whole(1, 2**20), 64, 512, "strings a step"),
    Setting("mask", real(0, 1), 0.3, 0.15, "probability that a node is hidden; one always is"),
    Setting("mask_block", mask_block, "mixed", 0, "level of the nodes that are hidden, with all "
            "tokens beneath: 0 to depth-1; top = depth-2; mixed: each string draws 0 to depth-2"),
    Setting("ema", real(0, 1), 0.97, 0.99, "decay of the moving average: what the teacher keeps"),
    Setting("lr", real(0, 1), 4e-3, 1e-4, "learning rate of AdamW"),
    Setting("decay", real(0, 10), 0.3, 0.01, "weight decay of AdamW, on matrices and embeddings"),
    Setting("warmup", whole(1), 100, 1, "steps over which the learning rate rises"),
    Setting("cooldown", real(0, 1), 0.2, 0.0, "last share of the steps, in which it falls to 0"),
    Setting("probes", whole(1), 25, None, "how often the script measures while it trains"),
    Setting("probe_steps", whole(1), 2000, 2000, "steps of the MLP probe of the root"),
    Setting("probe_strings", whole(1, 2**20), PROBE_STRINGS, None, "strings a probe is fitted on"),
    Setting("test_strings", whole(1, 2**20), TEST_STRINGS, None, "strings a score is taken on"),
)
PRESETS = {
    "tree": {},
    "transformer": {
        "encoder": "transformer", "width": 64, "hidden": 128, "layers": 6,
        "steps": 8000, "lr": 3e-3, "decay": 0.2,
    },
    "paper": paper_preset(SETTINGS),
}


# --------------------------------------------------------------------------------------------------
# modules: R of each side by side, one for every run


def layer_norm(h):
    """Layer normalisation without gain and bias."""
    return F.layer_norm(h, h.shape[-1:])


def pool(h, nodes):
    """(..., n, d) -> (..., nodes, d): means over what stands under a node, or copies beneath it."""
    n, d = h.shape[-2:]
    if n > nodes:
        return h.unflatten(-2, (nodes, n // nodes)).mean(-2)
    return h.unsqueeze(-2).expand(*h.shape[:-1], nodes // n, d).flatten(-3, -2)


class Linear(nn.Module):
    """R linear maps: (R, ..., inputs) -> (R, ..., outputs). Inputs may come in several parts."""

    def __init__(self, R, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(R, inputs, outputs))
        self.bias = nn.Parameter(torch.empty(R, 1, outputs))

    def forward(self, *parts):
        weights = self.weight.split([h.shape[-1] for h in parts], 1)
        out = self.bias
        for h, weight in zip(parts, weights):
            out = torch.baddbmm(out, h.flatten(1, -2), weight)  # (R, n, outputs)
        return out.view(*h.shape[:-1], -1)


class Embedding(nn.Module):
    """R tables of vectors: ids (R, B, T) -> (R, B, T, d)."""

    def __init__(self, R, ids, d):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(R, ids, d))

    def forward(self, x, table=None):
        table = self.weight if table is None else table
        R, ids, _ = table.shape
        # all tables in one, that of run r from row r * ids on
        first = torch.arange(R, device=x.device).view(R, 1, 1) * ids
        return F.embedding(x + first, table.flatten(0, 1))


class LayerNorm(nn.Module):
    """R layer normalisations with gain and bias: (R, B, T, d) -> (R, B, T, d)."""

    def __init__(self, R, d):
        super().__init__()
        self.gain = nn.Parameter(torch.empty(R, 1, 1, d))
        self.bias = nn.Parameter(torch.empty(R, 1, 1, d))

    def forward(self, h):
        return torch.addcmul(self.bias, layer_norm(h), self.gain)


class TwoLayers(nn.Module):
    """R networks with one hidden layer."""

    def __init__(self, R, inputs, hidden, outputs):
        super().__init__()
        self.first, self.second = Linear(R, inputs, hidden), Linear(R, hidden, outputs)

    def forward(self, *parts):
        return self.second(F.gelu(self.first(*parts)))


def initialise(module, randoms):
    """Draw the weights of every run from its own generator, so that they don't depend on R.

    Xavier for linear maps, no biases, and standard deviation 1 for embeddings: 0.02, usual in
    language models, does not learn at this size. randoms: R CPU generators."""
    for r, random in enumerate(randoms):
        for part in module.modules():
            if isinstance(part, Linear):
                nn.init.xavier_normal_(part.weight.data[r], generator=random)
                nn.init.zeros_(part.bias.data[r])
            if isinstance(part, Embedding):
                nn.init.normal_(part.weight.data[r], generator=random)
            if isinstance(part, LayerNorm):
                nn.init.ones_(part.gain.data[r])
                nn.init.zeros_(part.bias.data[r])
    return module


# --------------------------------------------------------------------------------------------------
# two encoders: tokens (R, B, T), the number v for a hidden one -> their last maps, layer-normalised


class Tree(nn.Module):
    """A U-Net on the s-ary tree, one network a level and direction, the same for all its nodes.

    Up: children -> parent. Down: children and the context of their parent -> contexts of the
    children, added to what went up. The maps are those of the way down, level L-1 first and the
    tokens last: (R, B, s^(L-l), d) for level l."""

    def __init__(self, R, v, s, L, settings):
        super().__init__()
        d, hidden = settings.width, settings.hidden
        self.s = s
        self.embed = Embedding(R, v + 1, d)
        self.up = nn.ModuleList(TwoLayers(R, s * d, hidden, d) for _ in range(L))
        self.down = nn.ModuleList(TwoLayers(R, (s + 1) * d, hidden, s * d) for _ in range(L))

    def families(self, h):
        """(R, B, n, d) -> (R, B, n/s, s d): the children of a node one after the other."""
        return h.unflatten(2, (-1, self.s)).flatten(3)

    def forward(self, x, top, randoms=None, ffn=False):
        """The last top maps; randoms and ffn are the transformer's."""
        # the few rows of the table are normalised instead of every token
        up = [self.embed(x, layer_norm(self.embed.weight))]     # (R, B, T, d)

        # up: what stands under a node
        for net in self.up:
            up.append(layer_norm(net(self.families(up[-1]))))   # (R, B, s^(L-l), d)
        context = up.pop()                                      # (R, B, 1, d), the root

        # down: what stands around it, too
        maps = []
        for h, net in zip(reversed(up), reversed(self.down)):
            change = net(self.families(h), context)             # (R, B, s^(L-l-1), s d)
            context = layer_norm(h + change.view_as(h))
            maps.append(context)
        return maps[-top:]


class Block(nn.Module):
    """Pre-LN attention and feed-forward network, each on a residual branch."""

    def __init__(self, R, T, settings):
        super().__init__()
        d, heads = settings.width, settings.heads
        self.heads, self.dropout = heads, settings.dropout
        self.norm1, self.norm2 = LayerNorm(R, d), LayerNorm(R, d)
        self.qkv, self.out = Linear(R, d, 3 * d), Linear(R, d, d)
        self.ffn = TwoLayers(R, d, settings.hidden, d)
        self.bias = None
        if settings.attention_bias:
            self.bias = nn.Parameter(torch.zeros(R, 1, heads, T, T))

    def attend(self, h):
        """(R, B, T, d) -> (R, B, T, d): every position mixes what all positions hold."""
        R, B, T, d = h.shape
        # one batch of small matrices, for all runs, strings and heads
        qkv = self.qkv(h).view(R, B, T, 3, self.heads, -1).permute(3, 0, 1, 4, 2, 5)
        q, k, v = qkv.reshape(3, R * B * self.heads, T, -1)
        scores = torch.bmm(q * q.shape[-1] ** -0.5, k.mT)                   # (R B heads, T, T)
        if self.bias is not None:
            scores = (scores.view(R, B, self.heads, T, T) + self.bias).view(-1, T, T)
        mixed = torch.bmm(scores.softmax(-1), v)                            # (R B heads, T, .)
        return self.out(mixed.view(R, B, self.heads, T, -1).transpose(2, 3).flatten(3))

    def forward(self, h, randoms):
        """Returns the stream after the block, and the feed-forward output that was added to it."""
        h = h + self.drop(self.attend(self.norm1(h)), randoms)
        out = self.ffn(self.norm2(h))
        return h + self.drop(out, randoms), out

    def drop(self, h, randoms):
        """Dropout while training, which is when there are generators to draw it from."""
        if randoms is None or self.dropout == 0:
            return h
        draws = [torch.rand(h.shape[1:], generator=random, device=h.device) for random in randoms]
        return h * (torch.stack(draws) >= self.dropout) / (1 - self.dropout)


class Transformer(nn.Module):
    """The paper's kind of encoder; its maps are the residual stream after every block."""

    def __init__(self, R, v, s, L, settings):
        super().__init__()
        T = s**L
        self.embed = Embedding(R, v + 1, settings.width)
        self.position = Embedding(R, T, settings.width)
        self.blocks = nn.ModuleList(Block(R, T, settings) for _ in range(settings.layers))

    def forward(self, x, top, randoms=None, ffn=False):
        """The last top maps; randoms: for dropout; ffn: feed-forward outputs as maps instead."""
        h = self.embed(x) + self.position.weight[:, None]   # (R, B, T, d)
        maps = []
        for block in self.blocks:
            h, out = block(h, randoms)
            maps.append(out if ffn else h)
        return [layer_norm(h) for h in maps[-top:]]


def build(R, v, s, L, settings):
    """R encoders of the kind that settings name, with weights still to be drawn."""
    encoder = Tree if settings.encoder == "tree" else Transformer
    return encoder(R, v, s, L, settings)


# --------------------------------------------------------------------------------------------------
# what is hidden, and how far a prediction is off


def check_mask_block(block, L):
    """Raises ValueError unless draw_mask knows the word, or the nodes are smaller than a string."""
    if block not in ("mixed", "top", *range(L)):
        allowed = f"from 0 to depth-1 = {L - 1}, top or mixed"
        raise ValueError(f"mask-block: must be {allowed}, not {block}")


def draw_mask(B, L, s, rate, block, random):
    """(B, s^L) bool on the generator's device, True where a token is hidden.

    Every node of level block is hidden with probability rate, that is all s^block tokens beneath
    it, and one node in every string for certain. Level 0 hides single tokens, whose siblings are
    mostly visible; level L-2, "top", leaves only cousins of the highest level to predict from.
    "mixed": every string draws its level from 0..L-2, so siblings are hidden on every level."""
    # one mask of each level that may be drawn
    words = {"mixed": range(L - 1), "top": [L - 2]}
    masks = []
    for level in words.get(block, [block]):
        draw = torch.rand(B, s ** (L - level), generator=random, device=random.device)
        certain = draw == draw.min(1, keepdim=True).values
        hidden = certain | (draw < rate)
        masks.append(hidden.repeat_interleave(s**level, 1))
    # every string picks one of them
    pick = torch.randint(len(masks), (B,), generator=random, device=random.device)
    return torch.stack(masks)[pick, torch.arange(B, device=random.device)]


def smooth_l1(prediction, goal):
    """Two (R, B, n, d) -> (R, B, n)."""
    return F.smooth_l1_loss(prediction, goal, reduction="none", beta=BETA).mean(-1)


def cross_entropy(scores, tokens):
    """(R, B, T, v) and (R, B, T) -> (R, B, T)."""
    error = F.cross_entropy(scores.flatten(0, 2), tokens.flatten(), reduction="none")
    return error.view(tokens.shape)


def mean_where(hidden, error):
    """(R, B, T) bool, and errors of nodes (R, B, n) -> (R,), the mean over hidden positions."""
    error = pool(error[..., None], hidden.shape[2])[..., 0]  # (R, B, T)
    return (error * hidden).sum((1, 2)) / hidden.sum((1, 2))


# --------------------------------------------------------------------------------------------------
# training


def stream(seed, number, device="cpu"):
    """One of four independent generators of a seed."""
    return torch.Generator(device).manual_seed(4 * seed + number)


def batches(xs, L, s, seeds, settings, device):
    """Yields for every step x, (R, B, T) int64, and hidden, (R, B, T) bool.

    A run draws with replacement from its own strings, or fresh ones from its own grammar, many
    steps at a time and from its own generators, so that its draws don't depend on the others."""
    T, B = s**L, settings.batch
    n = max(1, min(DRAWN, 2**22 // (B * T)))  # steps drawn at once
    picks = [stream(seed, 1, device) for seed in seeds]
    masks = [stream(seed, 2, device) for seed in seeds]
    for start in range(0, settings.steps, n):
        x, hidden = [], []
        for run, pick, mask, seed in zip(xs, picks, masks, seeds):
            if isinstance(run, Grammar):
                drawn = run.sample(n * B, (seed, 2, start), device)[0]
            else:
                drawn = run[torch.randint(len(run), (n * B,), generator=pick, device=device)]
            x.append(drawn.view(n, B, T))
            drawn = draw_mask(n * B, L, s, settings.mask, settings.mask_block, mask)
            hidden.append(drawn.view(n, B, T))
        x, hidden = torch.stack(x, 1), torch.stack(hidden, 1)  # (n, R, B, T)
        for i in range(min(n, settings.steps - start)):
            yield x[i].long(), hidden[i]


def learning_rate(step, settings):
    """Rises linearly in the first steps, and falls linearly to 0 in the last ones."""
    rise = step / settings.warmup
    fall = (settings.steps + 1 - step) / max(1, settings.cooldown * settings.steps)
    return settings.lr * min(1, rise, fall)


def aligned(size):
    """The next multiple of 8, see eights."""
    return -(-size // 8) * 8


def clip_each_run(weights):
    """Scale the gradients of every run to norm CLIP at most. Returns the norms before, (R,)."""
    norms = [w.grad.flatten(1).norm(dim=1) for w in weights]  # each (R,)
    norm = torch.stack(norms, 1).norm(dim=1)
    scale = (CLIP / (norm + 1e-6)).clamp(max=1)
    for w in weights:
        w.grad *= scale.view(-1, *[1] * (w.ndim - 1))
    return norm


@torch.no_grad()
def follow(teacher, student, ema):
    """One step of the moving average: teacher <- ema * teacher + (1 - ema) * student."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - ema)


def train(xs, v, s, L, target, seeds, settings, device, watch):
    """The loop, for R runs side by side. xs: a list of (P, T) uint8 strings or grammars.

    Returns (teacher, untrained, diverged): R encoders, the same before training, and for every
    run the step at which it stopped because its loss or gradient was not finite, or 0."""
    # student, heads and teacher
    R, T = len(xs), s**L
    K = min(settings.top, L if settings.encoder == "tree" else settings.layers)
    starts = [stream(seed, 0) for seed in seeds]
    student = initialise(build(R, v, s, L, settings), starts).to(device)
    outputs = v if target == "token" else settings.width
    count = K if target in ("stacked", "several") else 1
    heads = nn.ModuleList(Linear(R, settings.width, aligned(outputs)) for _ in range(count))
    heads = initialise(heads, starts).to(device)
    teacher, untrained = (deepcopy(student).requires_grad_(False) for _ in range(2))
    ffn = settings.target_from == "ffn"
    distance = cross_entropy if target == "token" else smooth_l1

    # AdamW; biases and layer norms don't decay
    named = [*student.named_parameters(), *heads.named_parameters()]
    weights = [w for _, w in named]
    decaying = [w for name, w in named if name.endswith("weight")]
    constant = [w for name, w in named if not name.endswith("weight")]
    groups = [{"params": decaying}, {"params": constant, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, settings.lr, BETAS, weight_decay=settings.decay,
                                  fused=device != "mps")
    randoms = [stream(seed, 3, device) for seed in seeds]
    diverged, stopped = [0] * R, {}

    for step, (x, hidden) in enumerate(batches(xs, L, s, seeds, settings, device), 1):
        # the teacher sees whole strings, and nothing flows back into it
        with torch.no_grad():
            if target == "token":
                goals = [x]
            elif target == "latent":
                maps = teacher(x, K, ffn=ffn)
                goals = [sum(pool(h, T) for h in maps) / K]             # (R, B, T, d)
            elif target == "several":
                goals = [pool(h, T) for h in teacher(x, K, ffn=ffn)]
            elif target == "stacked":
                goals = teacher(x, K, ffn=ffn)                          # each (R, B, n, d)

        # the student sees the rest, and predicts what is hidden from it
        maps = student(x.masked_fill(hidden, v), K, randoms)
        sources = maps if target == "stacked" else maps[-1:] * count
        loss = 0
        for h, head, goal in zip(sources, heads, goals):
            prediction = head(h)[..., :outputs]
            error = distance(prediction, goal)                          # (R, B, n)
            loss = loss + mean_where(hidden, error)                     # (R,), one for every run

        # runs share no weight, so that the gradient of each is its own
        optimizer.zero_grad()
        loss.sum().backward()
        norm = clip_each_run(weights)

        # a run that has diverged keeps the weights it had before this step
        for r in (~(loss + norm).isfinite()).nonzero().flatten().tolist():
            if not diverged[r]:
                diverged[r] = step
                stopped[r] = [w[r].clone() for w in teacher.parameters()]

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.step()
        # the teacher keeps ema of itself
        follow(teacher, student, settings.ema)
        if watch:
            watch(step, loss.detach(), teacher)
        if all(diverged):
            break

    # what diverged goes back to where it stopped
    for r, kept in stopped.items():
        for w, before in zip(teacher.parameters(), kept):
            w[r] = before
    return teacher, untrained, diverged


# --------------------------------------------------------------------------------------------------
# one face with the other learners


class Data2vec:
    """What fit returns: a trained encoder, the same one before training, and their settings."""

    def __init__(self, v, s, L, target, settings, encoder, untrained=None, diverged=0):
        self.v, self.s, self.L, self.target, self.settings = v, s, L, target, settings
        self.encoder, self.untrained, self.diverged = encoder, untrained, diverged

    def __repr__(self):
        sizes = f"v={self.v} s={self.s} L={self.L}"
        end = f", diverged at step {self.diverged}" if self.diverged else ""
        return f"Data2vec({sizes}, target {self.target}, {self.settings.encoder}{end})"

    def features(self, x):
        """Strings (P, s^L) -> the teacher's maps, coarsest or first layer first.

        A list of (P, n, d) float32 tensors, each layer-normalised: n = s, s^2, ..., s^L nodes for
        the tree, always s^L positions for the transformer. Raises ValueError as as_strings does,
        or if the strings have another length than those of training."""
        x, L = as_strings(x, self.v, self.s)
        if L != self.L:
            raise ValueError(f"x: strings must have {self.s**self.L} symbols, not {x.shape[1]}")
        return encode(self.encoder, x)

    def save(self, file):
        """Write sizes, settings and the teacher's weights; the file is complete or not there."""
        sizes = {"v": self.v, "s": self.s, "L": self.L, "target": self.target}
        weights = {name: w.cpu() for name, w in self.encoder.state_dict().items()}
        torch.save({**sizes, "settings": vars(self.settings), "weights": weights}, f"{file}.part")
        os.replace(f"{file}.part", file)


def load(file):
    """The Data2vec that save wrote, on the CPU. Raises ValueError if the file is anything else."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        settings = read_settings(SETTINGS, PRESETS, saved["settings"])
        sizes = [int(saved[name]) for name in ("v", "s", "L")]
        check_size(*sizes[:2], 2, sizes[2], 1, saved["target"], **saved["settings"])
        encoder = build(1, *sizes, settings).requires_grad_(False)
        encoder.load_state_dict(saved["weights"])
    except OSError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"file: {file} was not written by data2vec.py: {reason}") from None
    return Data2vec(*sizes, saved["target"], settings, encoder)


def check_size(v, s, m, L, P, target="latent", **settings):
    """Raises ValueError, naming the flag, unless one run fits into grammar.MEMORY.

    Counted are strings with their levels, weights with their copies (student, teacher, untrained,
    gradient, two of AdamW), and what a training step keeps for its gradient."""
    settings = read_settings(SETTINGS, PRESETS, settings)
    if target not in TARGETS:
        raise ValueError(f"target: must be one of {', '.join(TARGETS)}, not {target!r}")
    check_mask_block(settings.mask_block, L)
    if m == 1:
        raise ValueError("m: must be 2 or more here, since a single rule has no synonym to measure")
    if settings.encoder == "transformer" and settings.width % settings.heads:
        heads, width = settings.heads, settings.width
        raise ValueError(f"width: must be a multiple of heads = {heads}, not {width}")
    T, d, hidden = s**L, settings.width, settings.hidden
    strings = 0 if settings.online else P
    check_memory("samples", 2 * strings * T, f"{strings} strings of {T} tokens")
    maps = 2 if settings.encoder == "tree" else settings.layers
    tests = settings.test_strings + settings.probe_strings
    check_memory("test-strings", 4 * tests * T * d * maps, f"features of {tests} strings")
    if settings.encoder == "tree":
        weights = 2 * L * ((s + 1) * d * hidden + hidden * s * d)
        position = 4 * (8 * d + 3 * hidden)
    else:
        weights = settings.layers * (4 * d * d + 2 * d * hidden + 13 * d) + T * d
        position = settings.layers * (14 * d + 3 * hidden + 4 * settings.heads * T)
    # student, teacher, untrained, gradient and the two averages of AdamW, 4 bytes each
    check_memory("width", 6 * 4 * weights, f"{weights} weights")
    check_memory("batch", 4 * settings.batch * T * position, f"a step of {settings.batch} strings")


def fit_many(xs, v, s, target="latent", seeds=(0,), watch=None, device="cpu", **settings):
    """Train R runs of one size side by side. Returns a list of Data2vec, one for each.

    xs: for each run its strings, (P, s^L) integers of any kind, or a Grammar, for always fresh
    strings. seeds: one for each. watch(step, loss, teacher), if given, is called after every step
    with the R losses and the R teachers in one encoder. settings: rows of SETTINGS, or preset.
    A run depends on its own x and seed alone; one that diverges has .diverged = step.
    Raises ValueError for strings, sizes or settings that can't be."""
    options = read_settings(SETTINGS, PRESETS, settings)
    runs, depths = [], []
    for x in xs:
        x, L = (x, x.L) if isinstance(x, Grammar) else as_strings(x, v, s)
        runs.append(x if isinstance(x, Grammar) else x.to(device))
        depths.append(L)
    grammars = [x for x in runs if isinstance(x, Grammar)]
    if len(set(depths)) != 1 or any((g.v, g.s) != (v, s) for g in grammars):
        raise ValueError("x: all runs must have the same v, s and length of strings")
    if len(seeds) != len(runs):
        raise ValueError(f"seeds: must be one for each of {len(runs)} runs, not {len(seeds)}")
    if options.online and len(grammars) < len(runs):
        raise ValueError("online: needs a Grammar in place of x")
    P = max(1 if isinstance(x, Grammar) else len(x) for x in runs)
    check_size(v, s, 2, L, P, target, **settings)  # of anyone's strings m is not known
    trained = train(runs, v, s, L, target, seeds, options, device, watch)
    # each run gets encoders of its own, R = 1
    models = []
    for r, step in enumerate(trained[2]):
        own = [build(1, v, s, L, options).to(device).requires_grad_(False) for _ in range(2)]
        for encoder, stacked in zip(own, trained):
            for w, every in zip(encoder.parameters(), stacked.parameters()):
                w.copy_(every[r : r + 1])
        models.append(Data2vec(v, s, L, target, options, *own, step))
    return models


def fit(x, v, s, target="latent", seed=0, watch=None, device="cpu", **settings):
    """fit_many of one run. Raises FloatingPointError, of one line, if it diverges."""
    model = fit_many([x], v, s, target, [seed], watch, device, **settings)[0]
    if model.diverged:
        lr, decay = model.settings.lr, model.settings.decay
        raise FloatingPointError(f"the loss is not finite at step {model.diverged}; "
                                 f"try a smaller lr ({lr}) or decay ({decay})")
    return model


# --------------------------------------------------------------------------------------------------
# measures, all on fresh strings


@torch.no_grad()
def encode(encoder, x):
    """One encoder, strings (P, T) -> all its maps, each (P, n, d) and layer-normalised."""
    pieces = [encoder(part.long()[None], 100) for part in x.split(PIECE)]
    return [torch.cat(maps, 1)[0] for maps in zip(*pieces)]


def unseen_synonyms(features, grammar, seed, settings, device="cpu"):
    """Which levels do features know? Three lists over l = 1..L-1: (unseen, seen, collapsed).

    features: strings (P, T) -> a list of (P, n, d). A linear probe reads h^(l) from the features of
    its node. It is fitted on strings in which one rule of every level-l symbol never occurs. unseen
    is its accuracy on the tuples that this rule makes: it can only be right if synonyms look
    alike. seen is its accuracy on the other tuples, whose parent it can look up: no proof of
    anything. Of several maps the best counts, for every target and for no training alike.
    collapsed: whether the probe answers with fewer than v symbols. Raises ValueError if m = 1."""
    if grammar.m == 1:
        raise ValueError("m: must be 2 or more here, since a single rule has no synonym to measure")
    test = grammar.sample(settings.test_strings, (seed, 1), device)
    tested = features(test[0])
    results = []
    for l in range(1, grammar.L):
        # fit on strings without rule 0 of every symbol
        probe = grammar.sample(settings.probe_strings, (seed, 4, l), device, without=(l, 0))
        tuples = tuple_codes(test[l - 1].unflatten(1, (-1, grammar.s)), grammar.v)
        absent = torch.isin(tuples, tuple_codes(grammar.rules[l - 1][:, 0].to(device), grammar.v))
        nodes = grammar.s ** (grammar.L - l)

        # and ask about the tuples that only this rule makes
        found = []
        for fitted, fresh in zip(features(probe[0]), tested):
            predict = linear_probe(pool(fitted, nodes).flatten(0, 1), probe[l].flatten(), grammar.v)
            answer = predict(pool(fresh, nodes)).argmax(2)
            right = (answer == test[l]).float()
            few = len(answer.unique()) < grammar.v
            found.append((right[absent].mean().item(), right[~absent].mean().item(), few))
        results.append(max(found))
    return [list(column) for column in zip(*results)]


def mlp_probe(features, labels, v, steps, lr=1e-3, batch=256):
    """The paper's MLP probe, d -> 2d -> v with GELU and dropout 0.1, by Adam; R side by side.

    features: (R, n, d) float; labels: (R, n). Returns a function from (R, n, d) to (R, n) int64.
    All probes start alike and see the same rows and dropout, whatever R."""
    R, n, d = features.shape
    net = TwoLayers(R, d, 2 * d, aligned(v))
    net = initialise(net, [torch.Generator().manual_seed(0) for _ in range(R)]).to(features)
    random = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(net.parameters(), lr)
    for _ in range(steps):
        rows = torch.randint(n, (batch,), generator=random).to(features.device)
        keep = (torch.rand(batch, 2 * d, generator=random) >= 0.1).to(features) / 0.9
        hidden = F.gelu(net.first(features.index_select(1, rows))) * keep
        scores = net.second(hidden)[..., :v]                      # (R, batch, v)
        truth = labels.index_select(1, rows).long()               # (R, batch)
        error = cross_entropy(scores[:, None], truth[:, None])    # (R, 1, batch)
        optimizer.zero_grad()
        error.mean(2).sum().backward()  # every probe by its own mean, as if it were alone
        optimizer.step()
    return lambda h: net(h)[..., :v].argmax(2)


def root_probe(encoders, grammars, seeds, settings, device="cpu"):
    """The paper's measure: the root by an MLP probe of the last map, averaged over positions.

    Returns (accuracy, collapsed), two lists with an entry for each of the R encoders."""
    train, test, label, truth = [], [], [], []
    for encoder, grammar, seed in zip(encoders, grammars, seeds):
        labelled = grammar.sample(settings.probe_strings, (seed, 3), device)
        fresh = grammar.sample(settings.test_strings, (seed, 1), device)
        train.append(encode(encoder, labelled[0])[-1].mean(1))  # (n, d)
        test.append(encode(encoder, fresh[0])[-1].mean(1))
        label.append(labelled[-1][:, 0])
        truth.append(fresh[-1][:, 0])
    v = grammars[0].v
    predict = mlp_probe(torch.stack(train), torch.stack(label), v, settings.probe_steps)
    answer = predict(torch.stack(test))  # (R, n)
    accuracy = (answer == torch.stack(truth)).float().mean(1).tolist()
    return accuracy, [len(a.unique()) < v for a in answer]


def measure(models, grammars, seeds, device="cpu"):
    """[Score] of what fit_many returned: the levels 1..L-1 by unseen synonyms, and level L, the
    root, by the paper's probe; floor is the same of the untrained encoders."""
    settings, L = models[0].settings, models[0].L
    encoders = [model.encoder for model in models] + [model.untrained for model in models]
    roots, poor = root_probe(encoders, grammars * 2, seeds * 2, settings, device)
    scores = []
    for encoder, grammar, seed, root, few in zip(encoders, grammars * 2, seeds * 2, roots, poor):
        unseen, _, collapsed = unseen_synonyms(
            lambda x: encode(encoder, x), grammar, seed, settings, device)
        scores.append((unseen + [root], collapsed + [few]))
    R, results = len(models), []
    for model, (accuracy, collapsed), (floor, _) in zip(models, scores[:R], scores[R:]):
        if model.diverged:
            accuracy, collapsed = [0.0] * L, [False] * L
        results.append(Score(accuracy, collapsed, floor, model.diverged))
    return results


def recover(grammars, samples, seeds, target="latent", device="cpu", **settings):
    """Runs of the sweep, side by side: [Score], one for each grammar, P and seed; see measure.

    Online runs see P strings in all, each once, so that P / batch is their number of steps."""
    grammars, seeds = list(grammars), list(seeds)
    first = grammars[0]
    options = read_settings(SETTINGS, PRESETS, settings)
    if options.online:
        models = []
        for grammar, P, seed in zip(grammars, samples, seeds):
            own = {**settings, "steps": max(1, P // options.batch)}
            models += fit_many([grammar], first.v, first.s, target, [seed], None, device, **own)
    else:
        xs = [g.sample(P, seed, device)[0] for g, P, seed in zip(grammars, samples, seeds)]
        models = fit_many(xs, first.v, first.s, target, seeds, None, device, **settings)
    return measure(models, grammars, seeds, device)


@torch.no_grad()
def synonym_scores(encoder, grammar, seed, settings, device="cpu", strings=1024):
    """The paper's synonym score C_l (Figs. 5, 13) of the best map, for l = 1..L-1: a list of float.

    A node's level-(l-1) tuple is replaced by a synonym, or by any valid tuple, always another one,
    and all below is resampled. The state that may move is the map averaged under the node. C_l is
    1 - (mean distance moved by synonyms) / (mean distance moved by any tuple): 1 if synonyms are
    the same, about 0 if they are nothing special, as in an untrained encoder."""
    levels = grammar.sample(min(strings, settings.test_strings), (seed, 1), device)
    before = encode(encoder, levels[0])
    rows = torch.arange(len(levels[0]), device=device)
    scores = []
    for l in range(1, grammar.L):
        nodes = grammar.s ** (grammar.L - l)
        moved = []
        for kind in ("synonym", "generic"):
            swapped, node = grammar.swap(levels, l, kind, seed=l)
            after = encode(encoder, swapped[0])
            change = [pool(b - a, nodes)[rows, node] for a, b in zip(before, after)]
            moved.append(torch.stack([c.norm(dim=1).mean() for c in change]))  # (maps,)
        scores.append((1 - moved[0] / moved[1].clamp(min=1e-12)).max().item())
    return scores


def spread(encoder, x, top):
    """Does the target collapse? (standard deviation, effective rank) of the latent target of
    strings x, over positions and strings: the root mean square over its d features, and
    exp(entropy of the covariance's normalised eigenvalues), from 1 to d. In float64 on the CPU."""
    maps = encode(encoder, x)[-top:]
    target = sum(pool(h, x.shape[1]) for h in maps) / len(maps)  # (P, T, d)
    covariance = torch.cov(target.flatten(0, 1).cpu().double().T)
    if not covariance.isfinite().all():
        return float("nan"), float("nan")
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=1e-30)
    share = eigenvalues / eigenvalues.sum()
    return eigenvalues.mean().sqrt().item(), torch.special.entr(share).sum().exp().item()


# --------------------------------------------------------------------------------------------------
# alone


def check_files(parser, args):
    """--trace and --save must be two files that can be written; found out before the training."""
    if args.trace and args.save and os.path.realpath(args.trace) == os.path.realpath(args.save):
        parser.error("argument --save: must not be the file of --trace")
    for flag in ("trace", "save"):
        file = getattr(args, flag)
        if file is None:
            continue
        place = file if os.path.exists(file) else os.path.dirname(os.path.abspath(file))
        if os.path.isdir(file) or not os.access(place, os.W_OK):
            parser.error(f"argument --{flag}: cannot write {file!r}")


def main():
    parser = Parser(__doc__)
    add_grammar_flags(parser, m=3, samples=2048)
    parser.add_argument("--target", choices=TARGETS, default="latent", help="what is predicted")
    add_settings(parser, SETTINGS, PRESETS)
    parser.add_argument("--trace", metavar="FILE.csv", help="write what is printed to this file")
    parser.add_argument("--save", metavar="FILE.pt", help="write the trained encoder to this file")
    args = parser.parse_args()
    grammar = grammar_from_flags(parser, args)
    device = pick_device(parser, args.device)
    given = given_settings(SETTINGS, args)
    v, s, m, L, P = args.v, args.s, args.m, args.depth, args.samples
    try:
        settings = read_settings(SETTINGS, PRESETS, given)
        check_size(v, s, m, L, P, args.target, **given)
    except ValueError as error:
        parser.error(f"argument --{error}")
    check_files(parser, args)

    strings = f"{P} strings"
    if settings.online:
        strings = "always fresh strings"
    print(f"{strings} of {s**L} tokens, v={v} s={s} m={m} L={L}, v m^3 = {v * m**3};", end=" ")
    print(f"target {args.target}, {settings.encoder} encoder")
    print("unseen l: level l read from tuples that the probe never saw; synonyms l: their score\n")
    columns = [f"{kind} {l}" for kind in ("unseen", "synonyms") for l in range(1, L)]
    print("    step     loss  target std   rank" + "".join(f"{name:>12}" for name in columns))
    trace = open(args.trace or os.devnull, "w", newline="")
    table = csv.writer(trace, lineterminator="\n")
    table.writerow(["step", "loss", "target std", "rank", *columns])

    few = {**given, "test_strings": min(PIECE, settings.test_strings)}
    quick = read_settings(SETTINGS, PRESETS, few)
    shown = grammar.sample(quick.test_strings, (args.seed, 1), device)[0]
    bar = tqdm(total=settings.steps, unit="step", leave=False)

    def watch(step, loss, teacher):
        bar.update()
        if step > 1 and step % max(1, settings.steps // settings.probes):
            return
        unseen = unseen_synonyms(lambda x: encode(teacher, x), grammar, args.seed, quick, device)[0]
        synonyms = synonym_scores(teacher, grammar, args.seed, quick, device)
        row = [step, loss.item(), *spread(teacher, shown, settings.top), *unseen, *synonyms]
        table.writerow(row)
        trace.flush()  # whatever ends the run, what it has shown is on disk
        text = "{:8} {:8.4f}{:12.3f}{:7.1f}".format(*row)
        tqdm.write(text + "".join(f"{number:12.2f}" for number in row[4:]))

    x = grammar if settings.online else grammar.sample(P, args.seed, device)[0]
    try:
        model = fit(x, v, s, args.target, args.seed, watch, device, **given)
    except FloatingPointError as error:
        bar.close()
        parser.exit(1, f"{parser.prog}: {error}\n")
    bar.close()
    trace.close()
    score = measure([model], [grammar], [args.seed], device)[0]
    where = f"on {settings.test_strings} fresh strings (chance {1 / v:.3f})"
    print(f"\n{where:36}   trained   untrained")
    names = [f"level {l}  unseen synonyms, best map" for l in range(1, L)]
    names.append("root     MLP probe of the last map")
    for l, name in enumerate(names):
        mark = "   collapsed" if score.collapsed[l] else ""
        print(f"{name:36}{score.accuracy[l]:10.3f}{score.floor[l]:12.3f}{mark}")
    if args.save:
        model.save(args.save)


if __name__ == "__main__":
    run_script(main)
