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
"""

import copy
import operator
import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from grammar import (
    FILES, TEST_STRINGS, Grammar, Settings, as_strings, check_range, check_word, checksum,
    linear_probe, load_state, open_trace, ranks, read_flags, run, save_state, setting,
    step_generator, tuple_codes,
)

TARGETS = ("latent", "token", "stacked", "several")
SEEDS = 3                   # of a cell of a sweep
PROBE_STRINGS = 2048        # strings on which probes are fitted
PROBE_STEPS = 2000          # of the MLP probe, as in the paper
PIECE = 512                 # strings encoded at a time when measuring
BLOCK = 100                 # steps whose fresh strings are drawn at once


@dataclass
class Config(Settings):
    # the encoder
    encoder: str = setting("tree", "tree or transformer: is the tree known?", "transformer")
    width: int = setting(32, "d, features of a position or node", 2048, (1, 10**5))
    hidden: int = setting(64, "hidden units of the two-layer networks", 8192, (1, 10**5))
    layers: int = setting(3, "blocks of the transformer", 8, (1, 100))
    heads: int = setting(4, "heads of the transformer's attention", 32, (1, 1000))
    dropout: float = setting(0.0, "of the transformer", 0.1, (0, 0.9))
    # the target
    average_top_k: int = setting(3, "K, how many of the last maps are the target", 4, (1, 100))
    # what is seen and what is hidden
    online: bool = setting(False, "always fresh strings instead of P fixed ones", True)
    steps: int = setting(5000, "optimiser steps (online sweep: P / batch)", 262144, (1, 10**9))
    batch: int = setting(64, "strings a step", 512, (1, 2**20))
    mask: float = setting(0.15, "chance of hiding a node; 1 or more per string", 0.15, (0, 1))
    mask_block: str = setting(
        "0", "level of hidden nodes; top: L-2; mixed: each string draws from 0..L-2", "0")
    # how it is trained
    ema_decay: float = setting(0.97, "of the teacher, a step", 0.99, (0, 1))
    lr: float = setting(4e-3, "learning rate of AdamW", 1e-4, (0, 1e38))
    weight_decay: float = setting(0.3, "of AdamW, on matrices and embeddings", 0.01, (0, 1e38))
    warmup: int = setting(100, "steps in which the learning rate rises", 1, (1, 10**9))
    cooldown: float = setting(0.2, "share of steps, at the end, in which it falls", 0.0, (0, 1))

    PRESETS = {"transformer": {
        "encoder": "transformer", "width": 64, "hidden": 128, "layers": 6, "steps": 8000,
        "lr": 3e-3, "weight_decay": 0.2, "mask": 0.3, "mask_block": "mixed"}}

    def sized(self, v, s, m, L):
        """Itself, or a ValueError that names what doesn't fit these sizes."""
        check_range("m", m, 2, v ** (s - 1))                # a single rule has no synonym
        check_word("encoder", self.encoder, ENCODERS)
        check_word("mask_block", self.mask_block, ["top", "mixed", *map(str, range(L))])
        if self.encoder == "transformer" and self.width % self.heads:
            raise ValueError(f"width: must be a multiple of heads = {self.heads}")
        return self


def lowest(v, s, m):
    """Where a sweep begins."""
    return v * m**3


def highest(v, config):
    """Where it ends: a training must see each string 8 times; online it has the steps for any P."""
    return 2**40 if config.online else config.steps * config.batch // 8


# ---- encoders: tokens (B, T), v for a hidden one -> a list of maps (B, n, d), layer-normalised


def layer_norm(h):
    """Layer normalisation without gain and bias."""
    return F.layer_norm(h, h.shape[-1:])


def pool(h, nodes):
    """Bring a map (B, n, d) to another number of nodes, (B, nodes, d): each gets the mean of the
    nodes beneath it, or a copy of the node above it."""
    n = h.shape[1]
    if n > nodes:
        return h.unflatten(1, (nodes, n // nodes)).mean(2)
    return h.repeat_interleave(nodes // n, 1)


class TreeEncoder(nn.Module):
    """A U-Net on the s-ary tree; nodes of a level share one network up and one down.
    The maps are those of the way down: (B, s^(L-l), d) for level l, from L-1 to 0."""

    def __init__(self, v, s, L, config):
        super().__init__()
        d, hidden, self.siblings = config.width, config.hidden, s * config.width
        self.embed = nn.Embedding(v + 1, d)                     # v stands for a hidden token

        def two_layers(inputs, outputs):
            return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))

        self.up = nn.ModuleList(two_layers(s * d, d) for _ in range(L))
        self.down = nn.ModuleList(two_layers((s + 1) * d, s * d) for _ in range(L))

    def forward(self, x):
        # up: what stands under a node, from its children, one after the other
        up = [layer_norm(self.embed(x))]                        # (B, T, d)
        for net in self.up:
            children = up[-1].view(len(x), -1, self.siblings)   # (B, parents, s d)
            up.append(layer_norm(net(children)))                # (B, s^(L-l), d)

        # down: also what stands around a node, from its siblings and its parent's map
        maps = [up.pop()]                                       # (B, 1, d), the root
        for h, net in zip(reversed(up), reversed(self.down)):
            children = h.view(len(x), -1, self.siblings)
            change = net(torch.cat([children, maps[-1]], -1))   # (B, parents, s d)
            maps.append(layer_norm(h + change.view_as(h)))
        return maps[1:]


class Transformer(nn.Module):
    """The paper's kind of encoder, pre-LN; its maps are the residual stream after every block."""

    def __init__(self, v, s, L, config):
        super().__init__()
        d = config.width
        self.embed, self.position = nn.Embedding(v + 1, d), nn.Embedding(s**L, d)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(d, config.heads, config.hidden, config.dropout, "gelu",
                                       batch_first=True, norm_first=True)
            for _ in range(config.layers))

    def forward(self, x):
        h, maps = self.embed(x) + self.position.weight, []      # (B, T, d)
        for block in self.blocks:
            h = block(h)
            maps.append(layer_norm(h))
        return maps


ENCODERS = {"tree": TreeEncoder, "transformer": Transformer}


# ---- student or teacher, and the loss --------------------------------------------------


class Data2vec(nn.Module):
    """An encoder, and the linear heads that predict from its maps; what fit returns."""

    def __init__(self, v, s, L, target, config):
        super().__init__()
        check_word("target", target, TARGETS)
        self.v, self.s, self.L, self.target, self.config = v, s, L, target, config
        self.encoder = ENCODERS[config.encoder](v, s, L, config)
        with torch.no_grad():                                   # one string, to count the maps
            n_maps = len(self.encoder(torch.zeros(1, s**L, dtype=torch.long)))
        self.K = min(config.average_top_k, n_maps)
        n_heads = self.K if target in ("stacked", "several") else 1
        outputs = v if target == "token" else config.width
        self.heads = nn.ModuleList(nn.Linear(config.width, outputs) for _ in range(n_heads))

    def predict(self, x, hidden):
        """(B, T) tokens, and bool where hidden -> of each head (B, T, d), or scores (B, T, v)."""
        maps = self.encoder(x.masked_fill(hidden, self.v))
        sources = maps[-1:] * len(self.heads)                   # all heads read the last map
        if self.target == "stacked":                            # each head has a map of its own
            sources = [pool(h, x.shape[1]) for h in maps[-self.K :]]
        return [head(h) for head, h in zip(self.heads, sources)]

    def forward(self, x, hidden, targets, count):
        """The loss: the sum over hidden tokens and heads of smooth_l1(prediction, target), the mean
        over d features, or of cross_entropy(scores, token); divided by count, of hidden tokens."""
        loss = 0
        for prediction, target in zip(self.predict(x, hidden), targets):
            if self.target == "token":
                error = F.cross_entropy(prediction.mT, target, reduction="none")        # (B, T)
            else:
                error = F.smooth_l1_loss(prediction, target, reduction="none", beta=4.0).mean(2)
            loss = loss + (error * hidden).sum() / count
        return loss

    @torch.no_grad()
    def targets(self, x):
        """What is the target? One for each head, made by the teacher from whole strings (B, T):
        features (B, T, d), or the tokens."""
        if self.target == "token":
            return [x]
        maps = [pool(h, x.shape[1]) for h in self.encoder(x)[-self.K :]]    # each (B, T, d)
        return [sum(maps) / len(maps)] if self.target == "latent" else maps

    @torch.no_grad()
    def features(self, x):
        """Strings (P, s^L) -> [map (P, n, d) float32, layer-normalised], n = s, s^2, ..., s^L
        nodes of the tree, or s^L positions after every block. Raises ValueError, naming x."""
        x = as_strings(x, self.v, self.s, self.L)[0].to(self.heads[0].weight.device)
        pieces = [self.encoder(part.long()) for part in x.split(PIECE)]
        return [torch.cat(maps) for maps in zip(*pieces)]

    def score(self, grammar, seed):
        """Accuracies on fresh strings of a grammar: of levels 1..L-1 on synonyms that the probe
        has not seen, from the best map; then of the root, by the paper's MLP probe of the last
        map's mean. Raises ValueError if m = 1, as there are no synonyms then."""
        right = unseen_synonyms(self.features, grammar, seed)
        # strings that no training saw
        train = grammar.sample(PROBE_STRINGS, (seed, 3))
        test = grammar.sample(TEST_STRINGS, (seed, 1))
        known, fresh = (self.features(h[0])[-1].mean(1) for h in (train, test))     # (P, d)
        root = mlp_probe(known, train[-1][:, 0], self.v)(fresh).cpu()
        return [*right, (root == test[-1][:, 0]).float().mean().item()]


def untrained(v, s, L, target, config, seed):
    """A Data2vec as fit begins with it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Data2vec(v, s, L, target, config)
        for name, w in model.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(w)
            # embeddings keep their unit variance: 0.02, as in language models, does not learn
            elif w.ndim == 2 and not name.endswith(("embed.weight", "position.weight")):
                nn.init.xavier_normal_(w)
    return model


def draw_mask(B, L, s, rate, block, rng):
    """(B, s^L) bool, True where a token is hidden. Every node of level block is hidden with
    probability rate, with all tokens beneath it, and one in every string for certain."""
    levels = {"mixed": range(L - 1), "top": [L - 2]}.get(block) or [int(block)]
    masks = []
    for level in levels:
        draw = torch.rand(B, s ** (L - level), generator=rng)
        nodes = (draw < rate) | (draw == draw.amin(1, keepdim=True))    # (B, s^(L-level))
        masks.append(nodes.repeat_interleave(s**level, 1))      # (B, s^L)
    # every string picks one of the levels that it may have
    pick = torch.randint(len(masks), (B,), generator=rng)
    return torch.stack(masks)[pick, torch.arange(B)]


# ---- training --------------------------------------------------------------------------


def batches(x, config, s, L, seed, done, device):
    """Yields (B, T) int64 tokens and where they are hidden, bool, for every step after `done`.
    x: (P, T) strings, or a Grammar, which gives always fresh ones."""
    B, fresh = config.batch, None
    for step in range(done + 1, config.steps + 1):
        # all that a step draws depends on seed and step alone
        rng = step_generator(seed, step)
        block, i = divmod(step - 1, BLOCK)
        if not isinstance(x, Grammar):
            rows = x[torch.randint(len(x), (B,), generator=rng).to(device)]
        else:
            # many steps' strings at once, or drawing would take as long as training
            if fresh is None or i == 0:
                fresh = x.sample(BLOCK * B, (seed, 2, block), device)[0]
            rows = fresh[i * B : (i + 1) * B]
        hidden = draw_mask(B, L, s, config.mask, config.mask_block, rng)
        yield rows.long(), hidden.to(device)


def groups(student):
    """Of AdamW: biases and layer norms, which have one dimension, don't decay."""
    weights = list(student.parameters())
    return [{"params": [w for w in weights if w.ndim > 1]},
            {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0}]


def learning_rate(step, config):
    """Rises linearly in the first steps, and falls linearly to 0 in the last ones."""
    rise = step / config.warmup                                 # 1 at the end of the warm-up
    fall = (config.steps + 1 - step) / max(1, config.cooldown * config.steps)
    return config.lr * min(1, rise, fall)


@torch.no_grad()
def ema_update(teacher, student, ema_decay):
    """One step of the moving average: teacher <- ema_decay teacher + (1 - ema_decay) student."""
    torch._foreach_lerp_([*teacher.parameters()], [*student.parameters()], 1 - ema_decay)
    for old, new in zip(teacher.buffers(), student.buffers()):
        old.copy_(new)                                          # a batch norm's, of a fork


@torch.enable_grad()
def train(student, x, seed, callback=None, resume=None, progress=False):
    """The loop. x: (P, T) uint8 strings on the student's device, or a Grammar. Returns the
    teacher, the moving average of the student, heads and all."""
    config, device = student.config, next(student.parameters()).device
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(
        groups(student), betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True)

    # processes of torchrun share every batch, and average their gradients
    together = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    loss_of = DistributedDataParallel(student) if world > 1 else student
    parts = {"student": student, "teacher": teacher, "optimizer": optimizer}
    sizes = {"v": student.v, "s": student.s, "target": student.target}
    about = {**vars(config), **sizes, "seed": seed, "strings": checksum(x)}
    done = load_state(resume, about, parts)
    drawn = batches(x, config, student.s, student.L, seed, done, device)
    bar = tqdm(drawn, initial=done, total=config.steps, disable=not progress or rank > 0)
    for step, (batch, hidden) in enumerate(bar, done + 1):
        # divided by this, the mean loss of all processes is that of the whole batch
        count = hidden.sum() / world
        batch, hidden = batch[rank::world], hidden[rank::world]
        if config.dropout:                                      # it takes no generator
            torch.manual_seed(step_generator(seed, step).initial_seed() + rank)

        # the teacher sees whole strings; the student predicts what is hidden from it
        loss = loss_of(batch, hidden, teacher.targets(batch), count)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        loss = loss.detach()
        if world > 1:
            dist.all_reduce(loss)
            loss = loss / world
        if not (loss + norm).isfinite():
            raise FloatingPointError(f"step {step}: loss or gradient is not finite; lower the lr")

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        ema_update(teacher, student, config.ema_decay)
        if callback:
            callback(step, teacher, loss)
        if rank == 0:
            save_state(resume, about, parts, step, step == config.steps)
    return teacher


def fit(x, v, s, target="latent", seed=0, device=None, callback=None, resume=None,
        progress=False, **settings):
    """Train on strings x, (P, s^L) symbols 0..v-1 (a tensor, array or list), or on always fresh
    ones of a Grammar. Returns a Data2vec.

    settings: see Config. device: by default that of x. callback(step, teacher, loss) is called
    after every step. resume: a file, written once a minute and at the end; if it exists, the
    training goes on from it. Raises ValueError, naming the argument, or FloatingPointError,
    naming the step, if a loss is not finite."""
    v, s, seed = operator.index(v), operator.index(s), operator.index(seed)
    if isinstance(x, Grammar):
        L, device = x.L, device or "cpu"
        if (x.v, x.s) != (v, s):
            raise ValueError(f"x: must have v={v} and s={s}, not {x}")
    else:
        x, L = as_strings(x, v, s)
        x = x.to(device or x.device)
        device = x.device
    config = Config.of(**settings).sized(v, s, 2, L)            # m of given strings is unknown
    if config.online and not isinstance(x, Grammar):
        raise ValueError("online: needs a Grammar in place of x")
    student = untrained(v, s, L, target, config, seed).to(device)   # in every process the same
    with torch.random.fork_rng():                               # dropout seeds it
        return train(student, x, seed, callback, resume, progress)


# ---- measures, all on fresh strings; features: strings (P, T) -> a list of maps (P, n, d)


def unseen_synonyms(features, grammar, seed, n_train=PROBE_STRINGS, n_test=TEST_STRINGS):
    """How well features know each level: a list of accuracies of levels l = 1..L-1.

    A linear probe reads h^(l) at its node, from the map that serves it best. It is fitted on
    strings in which every level-l symbol lacks one rule, and asked about tuples of this rule: it
    is right only if synonyms look alike, as it can't look up the parent of a tuple it never saw."""
    v, s, L = grammar.v, grammar.s, grammar.L
    test = grammar.sample(n_test, (seed, 1))
    tested, best = features(test[0]), []                        # [(P, n, d)], [accuracy]
    for l in range(1, L):
        # rule 0 of every level-l symbol makes the tuples that the probe does not get to see
        train = grammar.sample(n_train, (seed, 4, l), without=l)
        rule = tuple_codes(grammar.rules[l - 1][:, 0], v)
        tuples = tuple_codes(test[l - 1].unflatten(1, (-1, s)), v)
        unseen, nodes = torch.isin(tuples, rule), s ** (L - l)  # (P, nodes)
        found = []
        for known, fresh in zip(features(train[0]), tested):    # map by map
            known = pool(known, nodes).flatten(0, 1)            # (P nodes, d)
            read = linear_probe(known, train[l].flatten().to(known.device), v)
            right = (read(pool(fresh, nodes)).argmax(2).cpu() == test[l]).float()
            # nan_to_num: few strings may have no such tuple
            found.append(right[unseen].mean().nan_to_num().item())
        best.append(max(found))
    return best


def mlp_probe(features, labels, v):
    """The paper's MLP probe, d -> 2d -> v with GELU and dropout 0.1, by Adam. features: (n, d);
    labels: (n,). Returns a function from (n, d) to (n,) int64."""
    d, device = features.shape[1], features.device
    labels = labels.long().to(device)
    with torch.enable_grad(), torch.random.fork_rng():          # always the same
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * d, v))
        net.to(device)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        for _ in range(PROBE_STEPS):
            rows = torch.randint(len(labels), (256,)).to(device)    # a batch
            loss = F.cross_entropy(net(features[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    net.eval()
    return lambda h: net(h).argmax(1)


@torch.no_grad()
def token_losses(model, grammar, seed):
    """Cross-entropies on fresh strings, masked as in training, of a model with target token, in
    nats per hidden token: (its own, the exact Bayes limit, each position's marginal)."""
    s, L, config = grammar.s, grammar.L, model.config
    fresh = grammar.sample(TEST_STRINGS, (seed, 1))[0].long()
    device = model.heads[0].weight.device
    # step 0, of which no training drew
    hidden = draw_mask(len(fresh), L, s, config.mask, config.mask_block, step_generator(seed, 0))
    unigram = torch.stack([grammar.marginal(0, n) for n in range(s**L)]).log()  # (T, v)

    losses = torch.zeros(3, dtype=torch.float64)
    for x, part in zip(fresh.split(64), hidden.split(64)):      # exact inference needs memory
        (scores,) = model.predict(x.to(device), part.to(device))
        learned = scores.log_softmax(2).cpu().double()          # (p, T, v)
        bayes = grammar.posterior(x, ~part)[0].log()            # (p, T, v)
        for i, log in enumerate((learned, bayes, unigram.expand_as(learned))):
            of_token = log.gather(2, x[..., None])[..., 0]      # (p, T)
            losses[i] -= of_token[part].sum()
    return tuple((losses / hidden.sum()).tolist())


def synonym_scores(features, grammar, seed, n=1024):
    """The paper's synonym score C_l (Figs. 5, 13), the largest over maps: floats, l = 1..L-1.

    The tuple under one level-l node is replaced, once by a synonym and once by any other tuple,
    and all levels below are resampled. The node's mean features move by a mean distance d_syn or
    d_any: C_l = 1 - d_syn / d_any, 1 if synonyms look the same, 0 if like any other tuple."""
    levels = grammar.sample(n, (seed, 1))
    before, scores = features(levels[0]), []                    # maps of what was there
    for l in range(1, grammar.L):
        nodes, moved = grammar.s ** (grammar.L - l), {}
        for kind in ("synonym", "generic"):
            swapped, node = grammar.swap(levels, l, kind, seed=l)
            change = [b - a for a, b in zip(before, features(swapped[0]))]
            change = [pool(h, nodes)[torch.arange(n), node] for h in change]        # (n, d)
            moved[kind] = torch.stack([h.norm(dim=1).mean() for h in change])
        # a map that never moves knows nothing
        ratio = torch.where(moved["generic"] > 0, moved["synonym"] / moved["generic"], 1.0)
        scores.append((1 - ratio).max().item())
    return scores


def recover(grammar, P, seed, target="latent", device="cpu", **settings):
    """One run of a sweep: the accuracies of levels 1..L, learned from P strings. Online each of
    them is seen once: there are P / batch steps."""
    x, config = grammar, Config.of(**settings)
    if config.online:
        batch = min(config.batch, P)
        settings |= {"batch": batch, "steps": P // batch}
    else:
        x = grammar.sample(P, seed, device)[0]
    return fit(x, grammar.v, grammar.s, target, seed, device, **settings).score(grammar, seed)


def join_processes(device, local_rank):
    """Join the other processes of torchrun; rank 0 alone prints. Returns this one's device."""
    if device != "cpu":
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    # on Windows there is no nccl; however long rank 0 measures, the others wait
    has_nccl = device != "cpu" and dist.is_nccl_available()
    dist.init_process_group("nccl" if has_nccl else "gloo", timeout=timedelta(days=365))
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device


def main():
    args, grammar, config = read_flags(__doc__, 2048, TARGETS, Config, FILES)
    v, s, m, L, P, seed = args.v, args.s, args.m, args.depth, args.samples, args.seed
    rank, world, local_rank = ranks()
    device = join_processes(args.device, local_rank) if world > 1 else args.device
    if device == "cpu" and config.width <= 64:      # on matrices this small threads gain nothing
        torch.set_num_threads(1)

    x = grammar if config.online else grammar.sample(P, seed)[0]    # (P, T)
    strings = "always fresh" if config.online else P
    print(f"{strings} strings of {s**L} tokens, v={v} s={s} m={m} L={L}, v m^3 = {v * m**3}")
    print(f"target {args.target}, {config.encoder} encoder; by level, the best of its maps:")
    print("unseen: accuracy on tuples the probe never saw; synonyms: the synonym score\n")
    measures = [f"{kind} {l}" for kind in ("unseen", "synonyms") for l in range(1, L)]
    columns = ["step", "loss", *measures]
    print("".join(f"{name:>12}" for name in columns))
    trace = open_trace(args.trace, [*columns, "v", "m", "P"])
    # step 1 shows what a nearly untrained encoder gets
    measured = {1, *range(config.steps, 0, -max(20, config.steps // 20))}

    def callback(step, teacher, loss):
        if step in measured and rank == 0:
            unseen = unseen_synonyms(teacher.features, grammar, seed, PIECE, PIECE)
            synonyms = synonym_scores(teacher.features, grammar, seed, PIECE)
            row = [loss.item(), *unseen, *synonyms]
            seen = step * config.batch if config.online else P
            print(step, *row, v, m, seen, sep=",", file=trace, flush=True)
            tqdm.write(f"{step:12}" + "".join(f"{number:12.3f}" for number in row))

    model = fit(x, v, s, args.target, seed, device, callback, args.resume, True, **vars(config))
    if world > 1:
        dist.barrier()                                          # nobody leaves in the middle
        dist.destroy_process_group()
    if rank > 0:
        os._exit(0)             # gloo's threads may abort an orderly exit
    before = untrained(v, s, L, args.target, config, seed).to(device).eval()
    print(f"\non {TEST_STRINGS} fresh strings (chance {1 / v:.3f})      trained   untrained")
    for l, pair in enumerate(zip(model.score(grammar, seed), before.score(grammar, seed)), 1):
        what = "unseen synonyms, best map" if l < L else "MLP probe of the last map"
        print(f"level {l}  {what:29}" + "{:10.3f}{:12.3f}".format(*pair))
    if args.target == "token":
        text = "\nloss per hidden token {:.3f}, exact Bayes limit {:.3f}, unigram {:.3f}"
        print(text.format(*token_losses(model, grammar, seed)))


if __name__ == "__main__":
    run(main)
