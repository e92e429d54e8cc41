"""
Everything against an oracle: brute force, a closed form, or the population limit.

    python -m pytest test_all.py
"""

import csv
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from itertools import permutations, product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cluster
import data2vec
import grammar
import plot
import predictor
import sweep
from grammar import Grammar, accuracy, tuple_codes

HERE = os.path.dirname(os.path.abspath(__file__))
G = Grammar.random(4, 2, 2, 3, seed=0)
STRINGS = G.sample(10)[0]
TARGETS = cluster.TARGETS[:4]                               # without those of a fork
TINY = {"width": 16, "hidden": 24, "steps": 3, "batch": 8, "warmup": 1}
DROPOUT = TINY | {"encoder": "transformer", "dropout": 0.1}
QUICK = {cluster: {}, predictor: {"steps": 3}, data2vec: DROPOUT}
learners = pytest.mark.parametrize("learner", QUICK, ids=lambda learner: learner.__name__)
networks = pytest.mark.parametrize("learner", [predictor, data2vec], ids=["predictor", "data2vec"])
PORT = 20000 + os.getpid() % 10000                          # another for tests that run beside
TORCHRUN = f"-m torch.distributed.run --master-port {PORT} --nproc-per-node"
torch.set_num_threads(1)


def as_likely(counts, p):
    """Are counts within five standard deviations of what the probabilities p give?"""
    n = counts.sum()
    return bool(((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 1e-9).all())


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def learned(run):
    return run.symbols if isinstance(run, cluster.Tree) else [*run.state_dict().values()]


def as_flags(settings):
    return " ".join(f"--{name} {value}" for name, value in settings.items())


@pytest.fixture(autouse=True)
def seeded_and_short(monkeypatch):
    torch.manual_seed(0)
    # the paper's 2000 steps of the MLP probe would be most of the time of these tests
    monkeypatch.setattr(data2vec, "PROBE_STEPS", 5)


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call("grammar --depth 3") runs a script in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(command):
        monkeypatch.setattr(sys, "argv", command.split())
        try:
            code = grammar.run(sys.modules[sys.argv[0]].main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def fork(tmp_path):
    """A copy of the scripts in an empty folder, and fork("sweep.py --depth 3"), which runs one."""
    for path in Path(HERE).glob("*.py"):
        shutil.copy(path, tmp_path)

    def run(command, launch=subprocess.run):
        return launch([sys.executable, *command.split()], cwd=tmp_path, stdout=subprocess.PIPE,
                      stderr=subprocess.STDOUT, env=os.environ | {"USE_LIBUV": "0"})

    return run


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new), encoding="utf-8")


# ---- grammar.py ------------------------------------------------------------------------


def test_samples_are_nested_parsed_and_as_likely_as_the_rules_say(monkeypatch):
    monkeypatch.setattr(grammar, "CHUNK_TOKENS", 256)
    for size in [(8, 2, 4, 3), (5, 3, 7, 3, 1, 1.5), (128, 2, 3, 2, 1, 1.0),
                 (3, 2, 3, 4), (256, 2, 256, 2)]:           # where all tuples are in use
        (v, s, m, L), g = size[:4], Grammar.random(*size)
        levels, p = g.sample(5000, 3), torch.arange(1, m + 1).double() ** -g.zipf
        assert equal(g.parse(levels[0]), levels) and not equal(g.sample(5000, 4), levels)
        assert all(equal(g.sample(P, 3), [h[:P] for h in levels]) for P in (1, 33, 4999))
        for l, h in enumerate(levels):
            for n in range(s ** (L - l)):
                assert as_likely(torch.bincount(h[:, n], minlength=v), g.marginal(l, n))
        for rules, below, h in zip(g.rules, levels, levels[1:]):
            assert len(tuple_codes(rules, v).unique()) == v * m         # no tuple has two parents
            used = (rules[h.long()] == below.unflatten(1, (-1, 1, s))).all(3)   # (P, n, m)
            assert as_likely(used.sum((0, 1)), p / p.sum())
        # without a rule, its symbols use the next one
        for l in range(1, L + 1):
            without, twin = g.sample(500, 5, without=l), Grammar.random(*size)
            twin.rules[l - 1][:, 0] = twin.rules[l - 1][:, 1]
            assert equal(without, twin.sample(500, 5)) and equal(without, g.parse(without[0]))


def every_string(g):
    """All derivations of a tiny grammar, level by level as in sample, and how likely each is."""
    nodes = (g.s**g.L - 1) // (g.s - 1)
    root, rule = torch.tensor([*product(range(g.v), *[range(g.m)] * nodes)]).split([1, nodes], 1)
    chance, levels = g.p[rule].prod(1) / g.v, [root]
    for rules in reversed(g.rules):
        h = levels[0]
        levels.insert(0, rules.long()[h, rule[:, : h.shape[1]]].flatten(1))
        rule = rule[:, h.shape[1] :]
    return levels, chance


@pytest.mark.parametrize("size", [(3, 2, 2, 3), (3, 2, 2, 3, 1, 1.0), (2, 3, 3, 2, 1, 1.0)])
def test_contexts_and_posteriors_equal_enumeration(size):
    g = Grammar.random(*size)
    levels, chance = every_string(g)
    nodes = [(l, n) for l, h in enumerate(levels) for n in range(h.shape[1])]
    for (target_level, n), (above, t) in product(nodes, nodes[g.s**g.L :]):
        l = above - 1
        if target_level < above and n // g.s ** (above - target_level) == t:
            continue                                        # the target lies within the tuple
        tuples = tuple_codes(levels[l].unflatten(1, (-1, g.s))[:, t], g.v)
        joint = torch.zeros(g.v**g.s, g.v, dtype=torch.float64)
        joint.index_put_((tuples, levels[target_level][:, n]), chance, accumulate=True)
        seen = joint[tuple_codes(g.rules[l], g.v)]          # (v, m, v): synonyms must agree
        context = g.context(l, t, target_level, n)[:, None]
        assert torch.allclose(seen, context * seen.sum(2, keepdim=True), atol=1e-12)
    x = g.sample(50)[0].long()
    visible = torch.rand(x.shape) < 0.5
    visible[0], visible[1] = False, True
    weight = chance * ((levels[0] == x[:, None]) | ~visible[:, None]).all(2)    # (50, derivations)
    x[~visible] = 77                                        # never read
    for h, found in zip(levels, g.posterior(x.numpy(), visible)):
        share = torch.einsum("pd,dnv->pnv", weight, F.one_hot(h, g.v).double())
        assert torch.allclose(found, share / weight.sum(1)[:, None, None]) and found.min() >= 0


@pytest.mark.parametrize("v, s, m, L", [(3, 2, 2, 3), (2, 3, 3, 2)])
def test_contrast_is_the_spread_of_the_contexts_that_cluster_counts(v, s, m, L):
    g = Grammar.random(v, s, m, L, 1)
    levels, _ = every_string(g)                             # which are equally likely
    for target, l in product(TARGETS, range(L - 1)):
        tuples = cluster.Tuples(levels[l], v, s)
        tables = cluster.count(levels[l], levels[0], levels[L][:, 0], tuples, target, "all")
        ids = tuples.ids(g.rules[l].flatten(1))             # (v, m)
        if target == "joint":                               # of the parents of cousins
            tables = tables @ F.one_hot(ids.flatten().argsort() // m)
        phi = cluster.contexts(tables)[ids[:, 0]]           # a tuple of every parent
        rms = (torch.pdist(phi).square().mean() / len(tables)).sqrt().item()
        assert g.contrast()[target][l] == pytest.approx(rms, rel=1e-4)


def test_swap_keeps_all_outside_the_node_and_a_synonym_keeps_the_parent():
    g, each = Grammar.random(8, 3, 4, 3, 1), torch.arange(600)
    levels = g.sample(600, 5)
    for l in (1, 2, 3):
        synonym, node = g.swap(levels, l, "synonym", 2)
        generic, twin = g.swap(levels, l, "generic", 2)
        assert equal(g.parse(synonym[0]), synonym) and equal(synonym[l:], levels[l:])
        assert torch.equal(node, twin) and equal(generic[l + 1 :], levels[l + 1 :])
        for swapped, k in product((synonym, generic), range(l)):
            changed = (swapped[k] != levels[k]).view(600, -1, 3 ** (l - k)).any(2)
            assert changed[each, node].float().mean() > 0.9 and (changed.sum(1) <= 1).all()

    # any other tuple has its chance: one string, many times
    g = Grammar.random(3, 2, 3, 2, 1, zipf=1.0)
    one = [h.expand(30000, -1) for h in g.sample(1)]
    # the number, 0 to 8, of the rule that makes each tuple
    rule = tuple_codes(g.rules[0].flatten(0, 1), 3).argsort()
    for kind, n in product(("synonym", "generic"), (0, 1)):
        swapped, node = g.swap(one, 1, kind)
        old, new = (rule[tuple_codes(h[0][:, 2 * n : 2 * n + 2], 3)] for h in (one, swapped))
        other = (torch.arange(9) // 3 == old[0] // 3) | (kind == "generic")
        p = g.p.repeat(3) * other * (torch.arange(9) != old[0])
        assert torch.equal(new // 3, swapped[1][:, n].long())           # its parent
        assert as_likely(torch.bincount(new[node == n], minlength=9), p / p.sum())


def test_matching_equals_brute_force_and_the_linear_probe_is_ridge_regression():
    rng = np.random.default_rng(0)
    for rows, columns in [(1, 1), (3, 3), (5, 5), (6, 4), (3, 6)] * 20:
        for table in rng.integers(0, 9, (rows, columns)), rng.normal(size=(rows, columns)):
            small = table if rows <= columns else table.T
            pairings = permutations(range(max(rows, columns)), min(rows, columns))
            best = max(sum(small[i, j] for i, j in enumerate(p)) for p in pairings)
            assert grammar.best_matching(table) == pytest.approx(best, abs=1e-12)
    truth, some = torch.tensor([[0, 1, 2], [2, 1, 0]]), torch.tensor([[7, 1, -1], [2, 1, 7]])
    assert accuracy(some, truth, 3) == pytest.approx(5 / 6)             # -1, unknown, is wrong
    features, new, labels = torch.randn(30, 40), torch.randn(5, 40), torch.randint(4, (30,))
    mean, share = features.mean(0), F.one_hot(labels, 4).double().mean(0)
    x, y = (features - mean).double(), F.one_hot(labels, 4) - share
    weight = (x.T @ x / 30 + grammar.RIDGE * torch.eye(40)).inverse() @ x.T @ y / 30
    found = grammar.linear_probe(features, labels, 4)(new)
    assert torch.allclose(found.double(), (new - mean).double() @ weight + share, atol=1e-3)


def test_load_reads_what_save_wrote_and_rules_from_elsewhere_and_nothing_else(tmp_path):
    g = Grammar.random(256, 3, 2, 11, seed=4, zipf=0.5)     # rules_10 comes after rules_9
    rules, ours = np.stack(g.rules).astype(int), tmp_path / "ours.npz"
    np.savez(tmp_path / "ordered.npz", *rules)
    np.savez(tmp_path / "named.npz", **{f"rules_{l}": rules[l] for l in reversed(range(11))})
    np.save(tmp_path / "one.npy", rules)
    g.save(ours, levels := g.sample(2))
    assert all(equal(Grammar.load(file).rules, g.rules) for file in tmp_path.iterdir())
    assert Grammar.load(ours).zipf == 0.5 and np.array_equal(np.load(ours)["level2"], levels[2])
    for wrong in (rules / 2, rules.ravel(), rules[:1], rules * 0, rules + 9, {"rules0": rules}):
        np.save(tmp_path / "one.npy", wrong, allow_pickle=True)
        with pytest.raises(ValueError, match="^load: "):
            Grammar.load(tmp_path / "one.npy")


def test_settings_are_defaults_then_preset_then_given_as_flags_or_in_python(monkeypatch):
    paper = predictor.Config.of("paper", lr=np.float64(0.5), steps=np.int64(7))
    assert (paper.lr, paper.steps, paper.hidden, predictor.Config.of().hidden) == (0.5, 7, 150, 64)
    flags = "--preset transformer --mask-block top --lr 0.5 --online --steps 7 --zipf 1"
    monkeypatch.setattr(sys, "argv", ["data2vec.py", *flags.split()])
    _, g, config = grammar.read_flags("", 100, data2vec.TARGETS, data2vec.Config)
    given = {"mask_block": "top", "lr": 0.5, "online": True, "steps": 7}
    assert config == data2vec.Config.of("transformer", **given) and config.width == 64
    assert equal(g.rules, Grammar.random(8, 2, 3, 3).rules) and g.zipf == 1


# ---- cluster.py ------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_count_equals_a_loop(target, monkeypatch):
    monkeypatch.setattr(cluster, "CHUNK_TOKENS", 64)        # several chunks
    x, h, _, root = Grammar.random(3, 3, 4, 3).sample(30)
    tuples = cluster.Tuples(h, 3, 3)
    ids, count = tuples.ids(h), partial(cluster.count, h, x, root[:, 0], tuples, target)
    tables = count("all").unflatten(0, (3, -1))             # (T, E, K, symbols)
    loop = torch.zeros_like(tables)
    below = {"latent": h, "token": x, "joint": ids, "root": root.expand(-1, 3)}[target]
    for p, t in product(range(30), range(3)):
        others = [t] if target == "root" else [j for j in range(3) if j != t]
        for e, symbol in enumerate(below[p].unflatten(0, (3, -1))[others].flatten().tolist()):
            loop[t, e, ids[p, t], symbol] += 1
    assert equal([tables, count("cousins"), count("element")], [loop, loop[0], loop[0, :1]])


def test_every_target_recovers_every_level_and_token_needs_most_strings(monkeypatch):
    monkeypatch.setattr(torch.linalg, "svd", svd := Mock(wraps=torch.linalg.svd))
    for target, (v, s, m) in product(TARGETS, [(8, 2, 3), (8, 2, 4), (4, 3, 4)]):
        assert cluster.recover(Grammar.random(v, s, m, 3, m), 60000, m, target) == [1, 1]
    g = Grammar.random(8, 2, 4, 4, 1)
    latent, token, _, joint = (cluster.recover(g, 4096, 1, t)[-1] for t in TARGETS)
    assert min(latent, joint) > 0.99 and token < 0.75
    # here the svd in float32 did not converge on some machines
    assert cluster.recover(Grammar.random(8, 3, 16, 5, 4), 256, 4, "joint")[:2] == [1, 1]
    assert {call.args[0].dtype for call in svd.call_args_list} == {torch.float64}


def test_unseen_tuples_are_unknown_and_so_is_all_above():
    g = Grammar.random(8, 2, 4, 3)
    x, fresh = g.sample(12)[0], g.sample(500, 1)[0]
    codes, seen = (tuple_codes(strings.unflatten(1, (-1, 2)), 8) for strings in (fresh, x))
    known, levels = torch.isin(codes, seen), cluster.fit(x, 8, 2).label(fresh.tolist())
    assert equal([levels[0], levels[1] >= 0], [fresh, known]) and not known.all()
    assert (levels[2][~known.unflatten(1, (-1, 2)).all(2)] == -1).all()


def test_contexts_are_shares_and_clusterers_find_the_best_partition():
    tables = torch.tensor([[[1, 3], [0, 0], [2, 0]]])       # a position, three tuples, two symbols
    phi = torch.tensor([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]])
    assert torch.allclose(cluster.contexts(tables), phi)    # the mean where a tuple is missing
    # planted clusters, then no structure: against all 3^9 partitions
    rng, truth = torch.Generator().manual_seed(0), torch.arange(6).repeat_interleave(20)
    X = torch.randn(6, 5)[truth] * 3 + 0.3 * torch.randn(120, 5)
    assert accuracy(cluster.kmeans(X, 6, rng, 8), truth, 6) == 1
    X, every = torch.rand(9, 2), torch.cartesian_prod(*[torch.arange(3)] * 9)
    member = F.one_hot(torch.cat([every, cluster.kmeans(X, 3, rng, 8)[None]]), 3).float()
    means = member.mT @ X / member.sum(1)[:, :, None].clamp(min=1)
    inertia = (X - member @ means).square().sum((1, 2))
    assert inertia[-1] < inertia.min() * 1.0001
    assert cluster.kmeans(X[:2], 3, rng, 8).max() == 1      # fewer points than clusters
    # exact tables of cousin pairs
    g, p = Grammar.random(8, 2, 3, 3), torch.full((8,), 1 / 8, dtype=torch.float64)
    parents = torch.stack([g.siblings(2, i, 1 - i, p) for i in range(2)])
    tables = 1e6 * parents.repeat_interleave(3, 1).repeat_interleave(3, 2)  # of their tuples
    assert accuracy(cluster.cluster_pairs(tables, 8, rng), torch.arange(24) // 3, 8) == 1


# ---- predictor.py ----------------------------------------------------------------------


def example(s=2, target="latent", **settings):
    """A student and another teacher, 64 strings, and their losses: prediction, clustering."""
    config = predictor.Config.of(**{"hidden": 8, "gate": 0} | settings).sized(4, s, 2, 3)
    student, teacher = (predictor.Predictor(4, s, 3, target, config) for _ in range(2))
    x, rng = Grammar.random(4, s, 2, 3).sample(64)[0], torch.Generator().manual_seed(0)
    return student, teacher, x, predictor.losses(student, teacher, x, rng)


@pytest.mark.parametrize("target", predictor.TARGETS)
def test_prediction_is_the_loop_over_tuples_and_their_cousins(target):
    """Targets: the cousins' symbols by the teacher, their tokens, or their symbols and theirs."""
    for s, E in product((2, 3), (None, 1)):                 # one element, from the first position
        student, teacher, x, (found, _) = example(s, target, elements="one" if E else "all")
        codes, log_phi = teacher(x)[1], student(x)[0]
        for l in range(2):
            n, terms = s ** (2 - l), []                     # tuples in a string
            below = (codes[0] if target == "token" else codes[l]).unflatten(1, (n, -1))[:, :, :E]
            if target == "joint":
                below = torch.cat([below, codes[l + 1][:, :, None]], 2)
            for b, t in product(range(64), range(0, n, s if E else 1)):
                others = [t - t % s + j for j in range(s) if j != t % s]
                for c, cousin in enumerate(others[:E]):
                    own = log_phi[l][b * n + t, t % s, c]
                    terms += (-own * below[b, cousin]).sum(1).tolist()
            assert found[l].item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_clustering_loss_equals_the_double_loop_and_waits_until_something_is_known():
    config = predictor.Config(negative_weight=0.3, sparsity=0.2)
    codes, positive = torch.randn(7, 4).softmax(-1), torch.rand(7, 7) < 0.5
    total = -6 * 0.2 * float((codes * codes.log()).sum())
    for i, j in permutations(range(7), 2):
        overlap = float(codes[i] @ codes[j])
        pulled, pushed = math.log(overlap + 0.01), 0.3 * math.log(1.0001 - overlap)
        total -= pulled if positive[i, j] else pushed
    found = predictor.clustering_loss(codes, positive, config)
    assert found.item() == pytest.approx(total / 42, rel=1e-3)
    # known: the gain is 0 for the marginal and 1 for the cousins themselves, two in a string
    codes = (3 * torch.randn(40, 2, 1, 5)).softmax(-1)
    exact = codes.flip(1)
    for phi, gain in ((exact, 1), (exact.mean(0, keepdim=True).expand_as(exact), 0)):
        log_phi = phi.log().reshape(80, 1, 1, 1, 5).expand(-1, 2, -1, -1, -1)
        assert abs(predictor.prediction_loss(log_phi, codes, 2)[1] - gain) < 2e-3
    opened, shut = (example(gate=gate)[3][1] for gate in (0, 1))
    assert opened.min() > 0.1 and shut.max() < 1e-3


@pytest.mark.parametrize("detach", ["none", "layers", "layers+clusterer"])
def test_each_loss_reaches_the_weights_it_should(detach):
    student, _, _, losses = example(detach=detach)
    names, weights = zip(*student.named_parameters())

    def reached(loss):
        """{"layers.0.predict", ...} with a gradient."""
        grads = torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)
        return {name.rsplit(".", 2)[0] for name, grad in zip(names, grads) if grad.any()}

    below = set()
    for l, (prediction, clustering) in enumerate(zip(*losses)):
        predict, own = {f"layers.{l}.predict"}, {f"layers.{l}.cluster"}
        assert reached(prediction) == below | predict
        assert reached(clustering) == below | own | (set() if "+" in detach else predict)
        below = below | own | predict if detach == "none" else below


def test_positive_pairs_are_the_papers_or_groups_of_one_parent():
    phi = torch.randn(6, 5)
    for positives, vectors in (("threshold", phi), ("centred", phi - phi.mean(0))):
        config = predictor.Config(positives=positives, threshold=0.7)
        cosine = F.cosine_similarity(vectors[:, None], vectors, dim=2)
        found = predictor.positive_pairs(phi, 4, config, None)
        assert torch.equal(found, (1 + cosine) / 2 > 0.7) and 6 < found.sum() < 36
    g, rng = Grammar.random(8, 2, 3, 3), torch.Generator().manual_seed(0)
    contexts = [g.context(0, t, 0, n) for t, n in ((0, 2), (0, 3), (1, 0), (1, 1))]     # exact
    symbols = g.sample(64)[1].flatten().long()
    phi = torch.cat(contexts, 1).float()[symbols]           # (256, 4 v)
    found = predictor.positive_pairs(phi, 8, predictor.Config(), rng)
    assert torch.equal(found, symbols[:, None] == symbols)


def test_without_a_teacher_targets_are_own_codes_and_the_learning_rate_falls(monkeypatch):
    rates, own, step, true_losses = [], [], torch.optim.AdamW.step, predictor.losses
    monkeypatch.setattr(predictor, "losses", lambda student, teacher, *more: (
        own.append(equal(teacher(STRINGS)[1], student(STRINGS)[1]))
        or true_losses(student, teacher, *more)))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda optimizer: (
        rates.append(optimizer.param_groups[0]["lr"]) or step(optimizer)))
    predictor.fit(STRINGS, 4, 2, steps=4, lr=1, ema_decay=0)
    predictor.fit(STRINGS, 4, 2, steps=4, lr=1, schedule="constant")
    assert rates == [1, 0.75, 0.5, 0.25, 1, 1, 1, 1]
    assert own == [True] * 5 + [False] * 3                  # the first step has no past


def test_batch_norm_is_right_from_the_first_step_on_and_labels_are_the_largest_codes():
    x = Grammar.random(8, 2, 3, 3).sample(512)[0]
    model = predictor.fit(x, 8, 2, lr=0, steps=2)
    norm, codes, levels = model.layers[0].norm, model.codes(x), model.label(x.tolist())
    phi = model(x)[0][0].detach().exp().flatten(1)        # (2048, heads d)
    # two batches know it as well as that
    assert (norm.running_var / phi.var(0) - 1).abs().max() < 0.5
    assert (norm.running_mean - phi.mean(0)).abs().max() < 5 * (phi.var(0).max() / 64) ** 0.5
    assert equal(levels, [x, *(code.argmax(-1) for code in codes)])


# ---- data2vec.py -----------------------------------------------------------------------


def test_masks_hide_whole_aligned_blocks_at_their_rate():
    rng = torch.Generator().manual_seed(0)
    for k in (0, 1, 2):
        hidden = data2vec.draw_mask(4000, 3, 3, 0.3, str(k), rng)       # (4000, 27)
        blocks, n = hidden.view(4000, -1, 3**k), 3 ** (3 - k)
        assert hidden.any(1).all() and torch.equal(blocks.all(2), blocks.any(2))
        # the one for certain adds a block to strings that would have none
        assert abs(blocks.float().mean() - (0.3 + 0.7**n / n)) < 0.02
    # rate 0: one block each, of 1, 2 or 4 tokens; top: of level L-2
    sizes = data2vec.draw_mask(6000, 4, 2, 0, "mixed", rng).sum(1).bincount() / 6000
    assert torch.allclose(sizes, torch.tensor([0, 1, 1, 0, 1]) / 3, atol=0.03)
    assert data2vec.draw_mask(9, 4, 2, 0, "top", rng).view(9, 4, 4).all(2).sum() == 9


@pytest.mark.parametrize("target, encoder", [*product(data2vec.TARGETS, data2vec.ENCODERS)])
def test_loss_is_the_loop_over_hidden_tokens(target, encoder):
    """The student does not see what is hidden, the teacher sees all."""
    settings, callback = TINY | {"encoder": encoder, "average_top_k": 2}, Mock()
    data2vec.fit(STRINGS, 4, 2, target, 5, callback=callback, **settings)
    config = data2vec.Config(**settings)
    student = data2vec.untrained(4, 2, 3, target, config, 5)
    x, hidden = next(data2vec.batches(STRINGS, config, 2, 3, 5, 0, "cpu"))
    # the last two maps of student and teacher, (B, T, d) each
    own, whole = ([data2vec.pool(h, 8) for h in student.encoder(tokens)[-2:]]
                  for tokens in (x.masked_fill(hidden, 4), x))
    total = 0
    for (b, t), (k, head) in product(hidden.nonzero().tolist(), enumerate(student.heads)):
        said = head(own[k if target == "stacked" else 1][b, t])
        wanted = (whole[0] + whole[1]) / 2 if target == "latent" else whole[k]
        total += (F.cross_entropy(said, x[b, t]) if target == "token" else
                  F.smooth_l1_loss(said, wanted[b, t], beta=4.0))
    loss = callback.call_args_list[0].args[2]
    assert loss.item() == pytest.approx(total.item() / hidden.sum().item(), rel=1e-4)


def test_the_learning_rate_rises_and_falls_and_only_matrices_decay():
    config = data2vec.Config(steps=100, warmup=10, cooldown=0.25, lr=1, encoder="transformer")
    rates = [data2vec.learning_rate(step, config) for step in range(1, 101)]
    assert np.allclose(rates, [*np.arange(1, 10) / 10, *[1] * 66, *np.arange(25, 0, -1) / 25])
    model = data2vec.untrained(4, 2, 3, "latent", config, 0)
    groups = torch.optim.AdamW(data2vec.groups(model), weight_decay=0.3).param_groups
    decay = {id(w): group["weight_decay"] for group in groups for w in group["params"]}
    for name, w in model.named_parameters():
        assert decay[id(w)] == (0 if "bias" in name or "norm" in name else 0.3)


class OneMap(nn.Sequential):                                # a fork's encoder
    def forward(self, x):
        return [super().forward(x)]                         # (B, 8, 16)


@pytest.mark.parametrize("encoder", ["tree", "transformer", "conv"])
def test_the_teacher_is_the_closed_form_average_of_its_students(encoder, monkeypatch):
    """ema^k start + (1 - ema) sum_i ema^(k-i) student_i after k steps, without gradient."""
    students, update = [], data2vec.ema_update

    def recorded(teacher, student, ema_decay):
        students.append([w.detach().clone() for w in student.parameters()])
        update(teacher, student, ema_decay)
        assert equal(teacher.buffers(), student.buffers())
        assert not any(w.requires_grad for w in teacher.parameters())

    monkeypatch.setattr(data2vec, "ema_update", recorded)
    monkeypatch.setitem(data2vec.ENCODERS, "conv", lambda *sizes: OneMap(
        nn.Embedding(5, 16), nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8)))
    settings = TINY | {"encoder": encoder, "ema_decay": 0.9, "steps": 5}
    start = data2vec.untrained(4, 2, 3, "latent", data2vec.Config(**settings), 0)
    teacher = data2vec.fit(STRINGS, 4, 2, **settings)
    for first, last, *later in zip(start.parameters(), teacher.parameters(), *students):
        moved = sum(0.1 * 0.9 ** (4 - i) * w for i, w in enumerate(later))
        assert torch.allclose(last, 0.9**5 * first + moved, atol=1e-6)
    assert not equal(students[0], students[4])


@pytest.mark.parametrize("encoder, nodes", [("tree", [2, 4, 8]), ("transformer", [8, 8, 8])])
def test_features_know_the_tree_and_see_all_of_it(encoder, nodes):
    model, changed = data2vec.fit(STRINGS, 4, 2, encoder=encoder, **TINY), STRINGS.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 4
    maps, moved = model.features(STRINGS), model.features(changed)
    assert [h.shape[1] for h in maps] == nodes
    assert all(torch.allclose(h, F.layer_norm(h, (16,)), atol=1e-3) for h in maps)
    # the first token has seen the last, and knows where it stands among equal ones
    assert (moved[-1][:, 0] - maps[-1][:, 0]).norm(dim=1).min() > 1e-3
    assert torch.pdist(model.features(torch.zeros(1, 8).int())[-1][0]).min() > 0.01


def test_offline_strings_come_again_and_online_never(monkeypatch):
    g, config = Grammar.random(8, 2, 4, 4), data2vec.Config(steps=150, batch=16)
    few = g.sample(20, 3)[0]
    offline, online = (torch.cat([x for x, _ in data2vec.batches(x, config, 2, 4, 3, 0, "cpu")])
                       for x in (few, g))
    assert torch.equal(offline.unique(dim=0), few.unique(dim=0).long())
    assert online.shape == (2400, 16) and len(online.unique(dim=0)) > 2390
    pairs = product(range(30), range(30))                   # of seed and step
    assert len({grammar.step_generator(*pair).initial_seed() for pair in pairs}) == 900
    # a run of a sweep sees P strings, once
    monkeypatch.setattr(data2vec, "fit", fit := Mock())
    for P, sizes in (64, {"batch": 8, "steps": 8}), (5, {"batch": 5, "steps": 1}):
        data2vec.recover(g, P, 7, online=True, batch=8)
        assert fit.call_args.args[0] is g and sizes.items() <= fit.call_args.kwargs.items()


def test_measures_tell_knowing_a_level_from_looking_it_up(monkeypatch):
    g = Grammar.random(8, 2, 3, 3)
    tree, vectors = cluster.fit(g.sample(20000)[0], 8, 2), torch.randn(64, 64)
    for l in (1, 2):
        # a vector for every symbol of level l, beside a map of noise; or for every tuple below
        latent = lambda x: [torch.randn(len(x), 8, 64), vectors[tree.label(x)[l].long()]]
        raw = lambda x: [vectors[tree.tuples[l - 1].ids(tree.label(x)[l - 1])]]
        assert data2vec.unseen_synonyms(latent, g, 0)[l - 1] == 1
        assert data2vec.unseen_synonyms(raw, g, 0)[l - 1] < 0.4
        assert data2vec.synonym_scores(latent, g, 0)[l - 1] == 1
        assert abs(data2vec.synonym_scores(raw, g, 0)[l - 1]) < 0.1
    # the MLP probe reads what is there, and nothing else
    monkeypatch.setattr(data2vec, "PROBE_STEPS", 200)
    labels, fresh = torch.randint(8, (2048,)), torch.randint(8, (4096,))
    for size, low, high in ((1, 0.99, 1), (0, 0.08, 0.17)):
        h, new = (size * vectors[y] + 0.1 * torch.randn(len(y), 64) for y in (labels, fresh))
        assert low <= (data2vec.mlp_probe(h, labels, 8)(new) == fresh).float().mean() <= high


def test_token_losses_are_those_of_a_loop_and_of_enumeration(monkeypatch):
    monkeypatch.setattr(data2vec, "TEST_STRINGS", 20)
    g = Grammar.random(3, 2, 2, 2, 1, zipf=1.0)
    model = data2vec.fit(g, 3, 2, "token", 5, **TINY, mask=0.4)
    x, (levels, chance), terms = g.sample(20, (5, 1))[0].long(), every_string(g), []
    hidden = data2vec.draw_mask(20, 2, 2, 0.4, "0", grammar.step_generator(5, 0))
    scores = model.predict(x, hidden)[0].log_softmax(2)
    for b, t in hidden.nonzero().tolist():
        agree, token = (levels[0] == x[b])[:, ~hidden[b]].all(1), levels[0][:, t] == x[b, t]
        exact = chance[agree & token].sum() / chance[agree].sum()
        terms.append([-scores[b, t, x[b, t]].item(), -exact.log(), -chance[token].sum().log()])
    assert np.allclose(data2vec.token_losses(model, g, 5), np.mean(terms, 0), rtol=1e-5)


def test_two_processes_train_as_one(fork, tmp_path):
    settings = TINY | {"batch": 9, "steps": 20}             # a batch is split 5 to 4
    flags = f"{as_flags(settings)} --v 4 --m 2 --samples 50 --device cpu --resume two"
    edit(tmp_path / "data2vec.py", "PROBE_STEPS = 2000 ", "PROBE_STEPS = 5 ")
    ended = fork(f"{TORCHRUN} 2 -- data2vec.py {flags}")
    assert ended.returncode == 0, ended.stdout.decode()
    one, two = data2vec.fit(G.sample(50)[0], 4, 2, **settings), torch.load(tmp_path / "two")
    for pair in zip(learned(one), two["teacher"].values(), strict=True):
        assert torch.allclose(*pair, atol=1e-5)


# ---- all learners and their scripts ----------------------------------------------------


@pytest.mark.parametrize("learner, target, settings", [
    (cluster, "latent", {}), (predictor, "latent", {"steps": 100}),
    (data2vec, "latent", {"lr": 0.01, "warmup": 10, "steps": 200}),
    (data2vec, "token", {"lr": 0.01, "warmup": 10, "steps": 200})])
def test_level_1_is_learned_and_not_from_scrambled_strings(learner, target, settings):
    g = Grammar.random(6, 2, 2, 2, seed=1)
    x = g.sample(2048)[0]
    mixed = torch.cat([x[:, :2], x[torch.randperm(2048), 2:]], 1)       # not its cousin any more
    right, wrong = (learner.fit(x, 6, 2, target, **settings).score(g, 0)[0] for x in (x, mixed))
    assert right > 0.9 and wrong < 0.75


@learners
def test_a_result_depends_on_strings_and_seed_alone_whatever_holds_them(learner):
    array, fit = STRINGS.numpy(), partial(learner.fit, **QUICK[learner])
    wanted = fit(STRINGS, 4, 2, seed=3)
    for form in (STRINGS.long(), array, array.astype(np.int64), array.astype(">i4"),
                 array[:, ::-1].copy()[:, ::-1], array.tolist(), list(STRINGS)):
        state = torch.manual_seed(7).get_state()
        again = fit(form, np.uint8(4), np.int64(2), seed=np.int64(3))
        assert equal(learned(again), learned(wanted))
        assert torch.equal(state, torch.get_rng_state())    # the global generator is left alone
    assert not equal(learned(fit(STRINGS, 4, 2, seed=4)), learned(wanted))
    for x in (STRINGS.float(), STRINGS + 4, STRINGS[0], STRINGS[:, :7], STRINGS[:0]):
        for read in (partial(fit, v=4, s=2), getattr(wanted, "features", None) or wanted.label):
            with pytest.raises(ValueError, match="^x: "):
                read(x)


@learners
def test_recover_and_the_script_score_fit_on_strings_it_did_not_see(learner, call, monkeypatch):
    settings, target = QUICK[learner], learner.TARGETS[1]
    drawn, sample, g = [], Grammar.sample, Grammar.random(4, 2, 2, 3, seed=7)
    monkeypatch.setattr(Grammar, "sample", lambda g, P, seed=0, *more, **settings: (
        drawn.append(seed) or sample(g, P, seed, *more, **settings)))
    found = learner.recover(g, 50, 7, target, **settings)
    assert drawn[0] == 7 and drawn.count((7, 1)) == len(found) - 1      # for levels, and the root
    assert found == learner.fit(sample(g, 50, 7)[0], 4, 2, target, 7, **settings).score(g, 7)
    assert len(found) == (2 if learner is cluster else 3)   # the networks' root is read, too
    flags = f"--v 4 --m 2 --samples 50 --seed 7 --device cpu --target {target}"
    files = "" if learner is cluster else "--trace trace"
    _, out, _ = call(f"{learner.__name__} {flags} {as_flags(settings)} {files}")
    for level, right in enumerate(found, 1):
        assert re.search(rf"^ *(level )?{level} .* {right:.3f}", out, re.M)
    if files:
        assert ",4,2,50\n" in open("trace").read()


@networks
def test_a_training_that_was_stopped_goes_on_to_the_same_bytes(learner, tmp_path, monkeypatch):
    monkeypatch.setattr(grammar, "SAVE_EVERY", -1)
    file = tmp_path / "run"
    fit = partial(learner.fit, **QUICK[learner] | {"x": STRINGS, "v": 4, "s": 2, "steps": 9})
    with pytest.raises(KeyboardInterrupt):
        fit(resume=file, callback=Mock(side_effect=[None] * 5 + [KeyboardInterrupt]))
    assert torch.load(file)["step"] == 5
    for steps in ([6, 7, 8, 9], []):                        # the second time it is at its end
        # evaluation in a callback changes nothing
        callback = Mock(side_effect=lambda step, network, loss: network.eval())
        again = fit(resume=file, callback=callback)
        assert [call.args[0] for call in callback.call_args_list] == steps
        assert equal(learned(again), learned(fit()))
    for change in ({"target": "token"}, {"seed": 1}, {"steps": 10}, {"x": STRINGS.flip(0)}):
        with pytest.raises(ValueError, match="^resume: .* of a run with another "):
            fit(resume=file, **change)
    with pytest.raises(OSError):                            # and before the first step
        fit(resume=tmp_path / "nowhere" / "run", callback=Mock(side_effect=AssertionError))
    with pytest.raises(FloatingPointError, match="^step [1-9]: .* not finite"):
        fit(lr=1e30)


def test_a_killed_script_goes_on_to_the_same_table(fork, call, tmp_path):
    flags = f"--v 4 --m 2 --depth 2 --samples 50 --device cpu {as_flags(DROPOUT | {'steps': 9})}"
    edit(tmp_path / "data2vec.py", ", step == config.steps)\n",
         ", step == 6)\n            os._exit(9) if step == 8 else None\n")
    assert fork(f"data2vec.py {flags} --resume run").returncode == 9
    assert torch.load(tmp_path / "run")["step"] == 6
    tables = [call(f"data2vec {flags} {more}")[1].rpartition("\n\n")[2]
              for more in ("", "--resume run")]
    assert tables[0] == tables[1] and "level 2" in tables[0]
    assert call(f"data2vec {flags} --resume run --seed 1")[0] == 2      # another run


def test_the_script_of_the_grammar_shows_a_derivation_and_the_contrast(call):
    _, out, _ = call("grammar --v 4 --m 2")
    drawn = [line.split()[2:] for line in out.splitlines() if re.match("level [0-9]  ", line)]
    assert drawn == [list(map(str, h[0].tolist())) for h in reversed(G.sample(1))]
    square = np.mean([Grammar.random(8, 2, 3, 4, k).contrast()["token"][2] ** 2 for k in range(3)])
    _, out, _ = call("grammar --depth 4 --contrast --seeds 3")
    assert f"\n8,2,3,4,0,3,token,3,{square**0.5:.6g},{24 / square:.6g}\n" in out


def test_a_forkers_own_error_keeps_its_traceback_and_ctrl_c_is_quiet(call, monkeypatch):
    monkeypatch.setattr(cluster, "kmeans", Mock(side_effect=[ValueError, KeyboardInterrupt]))
    with pytest.raises(ValueError):
        call("cluster")
    assert call("cluster") == (130, "", "")


# the last flag of each is refused by name
BAD_COMMANDS = """
    grammar --depth 40 | grammar --m 9 | grammar --zipf nan | grammar --samples 0 | grammar --v 300
    grammar --load missing | cluster --target leaf | cluster --positions most | cluster --device tpu
    cluster --restarts 0 | cluster --m two | predictor --trace x --codes 3 | predictor --colour 3
    predictor --ema-decay 2 | data2vec --m 1 | data2vec --preset gpu | data2vec --mask-block 3
    data2vec --preset transformer --width 30 | sweep --methods foo | sweep --depth x | sweep --m 9
    sweep --methods cluster:positions=here | sweep --seeds 0 | predictor --trace x --resume x
    sweep --device cuda:99 | sweep --methods predictor:steps=1 | sweep --until leaf
    sweep --methods cluster --max-samples 2
"""


@pytest.mark.parametrize("command", re.split(r" \| |\n +", BAD_COMMANDS.strip()))
def test_a_bad_flag_gets_one_line_and_leaves_nothing_behind(command, call):
    code, out, said = call(command)
    script, *_, flag, _ = command.split()
    said, _, line = said.strip().rpartition("\n")
    assert code == 2 and out == "" and said.startswith("usage: ") and not os.listdir()
    reason = rf"{script}: error: (argument|unrecognized arguments:) {flag}\b"
    assert re.match(reason, line.replace("_", "-"))


@pytest.mark.parametrize("ask, name", [
    (lambda: Grammar.random(9, 9, 1, 25), "depth"), (lambda: G.sample(0), "samples"),
    (lambda: Grammar(2, 2, 1, 2, [[[[0, 0]], [[0, 0]]]] * 2), "rules"),
    (lambda: G.sample(5, without=4), "without"), (lambda: G.swap(G.sample(5), 0, "generic"), "l"),
    (lambda: G.context(0, 0, 0, 8), "n"), (lambda: G.context(0, 0, 0, 1), "n: node 1 lies"),
    (lambda: G.context(3, 0, 0, 0), "l"), (lambda: G.context(0, 4, 0, 0), "t"),
    (lambda: G.context(0, 0, 4, 0), "target_level"), (lambda: G.context(0, 0, 0, -1), "n"),
    (lambda: G.parse(STRINGS // 2), "x: string 0, level 0, position 0: no rule"),
    (lambda: G.posterior(STRINGS // 2, torch.ones(8) > 0), "x: string 0 has no derivation"),
    (lambda: cluster.fit(STRINGS, 4, 2, "leaf"), "target"),
    (lambda: predictor.fit(STRINGS, 4, 2, "root"), "target"),
    (lambda: predictor.fit(STRINGS, 4, 2, colour=3), "colour"),
    (lambda: data2vec.fit(STRINGS, 4, 2, encoder="leaf"), "encoder"),
    (lambda: data2vec.fit(STRINGS, 4, 2, online=True), "online")])
def test_a_bad_argument_is_named(ask, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        ask()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@learners
def test_cuda_samples_learns_and_scores_as_the_cpu(learner):
    """What a step draws is drawn on the CPU: the same steps, but for rounding."""
    g, settings = Grammar.random(8, 2, 3, 3), {} if learner is cluster else {"steps": 3}
    here, there = g.sample(4096), g.sample(4096, device="cuda")
    assert there[0].is_cuda and equal(here, [h.cpu() for h in g.parse(there[0])])
    for target in learner.TARGETS:
        scores = [learner.recover(g, 4096, 0, target, device, **settings)
                  for device in ("cpu", "cuda")]
        assert np.allclose(*scores, atol=0.05)
        if learner is not cluster:
            callback = Mock()
            for x in (here[0], there[0]):
                learner.fit(x, 8, 2, target, callback=callback, **settings)
            losses = torch.stack([call.args[2].cpu() for call in callback.call_args_list])
            assert torch.allclose(losses[:3], losses[3:], rtol=1e-2)


# ---- sweep.py, README, RESULTS and the pictures ----------------------------------------


def table(out, column="P50"):
    """{(method, L): P*} of a folder."""
    with open(out / "samples_vs_depth.csv", newline="") as file:
        return {(row["method"], int(row["L"])): row[column] for row in csv.DictReader(file)}


def runs_of(out):
    """runs.csv without what differs from run to run."""
    with open(out / "runs.csv", newline="") as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file)]


def flags(**given):
    """What sweep.read_flags returns, for tables made by hand."""
    usual = {"threshold": 0.5, "until": "level", "max_samples": 2**20, "device": "cpu"}
    return SimpleNamespace(methods="all", **usual | given)


def test_p_star_means_and_growth_are_those_by_hand():
    cross = lambda *right: sweep.crossing(dict(zip([4, 8, 16, 32], right)), 0.5)
    assert cross(0.2, 0.4, 0.8, 0.9) == (pytest.approx(8 * 2**0.25), 0)
    assert cross(0.2, 0.6, 0.3, 0.9) == (16, 1)             # one rung may be luck
    assert cross(0.6, 0.2, 0.8, 0.9) == (pytest.approx(8 * 2**0.5), 0)
    assert sweep.crossing({8: 0.9, 16: 0.8, 4: 0.1}, 0.5) == (pytest.approx(4 * 2**0.5), 0)
    assert cross(0.6, 0.7, 0.1, 0.1) == (4, -1) and cross(0.9) == (4, -1) and cross(0.4) == (4, 1)
    assert cross(0.1, math.nan, 0.5, 0.9) == (16, 0)        # nan: it learned nothing
    assert sweep.estimate([(100, 0), (400, 0)]) == ("200", "100", "400")
    assert sweep.estimate([(100, 0), (400, 1)]) == ("> 200", "", "")
    assert sweep.estimate([(100, -1), (400, 0)]) == ("< 200", "", "")
    assert sweep.estimate([(100, -1), (400, 1)]) == ("?", "", "")
    # P* doubles with every level; of each pair of seeds one is twice, the other half of it
    points = [(L, 100 * 2.0**L * f, 0) for L in (3, 4, 5) for f in (2, 0.5)]
    # six residuals of log 2, four degrees of freedom, sum of squares of L - 4: 4
    error = 2 * math.sqrt(6 / 4 / 4) * math.log(2)
    assert sweep.slope(points, is_factor=True) == f"2.00 ± {error:.2f}"
    cubes = [(math.log(m), m**3.0, 0) for m in (2, 3, 4)] * 2
    assert sweep.slope(cubes, is_factor=False) == "3.00 ± 0.00"
    points[4:] = [(5, 400, 1)]
    assert sweep.slope(points, is_factor=True).startswith(">")
    points[:2] = [(3, 400, 1)]
    assert sweep.slope(points, is_factor=True) == sweep.slope([(3, 9, 0)] * 2, True) == ""


def test_a_climb_ends_when_p_star_is_known_or_cannot_be():
    cell, low, high = sweep.Cell("predictor", 8, 2, 3, 3, 0.0), [0.9, 0.4, 0.2], [0.9, 0.5, 0.2]
    assert sweep.next_P(cell, {}, flags()) == 64                    # v m^2 = 72, rounded down
    assert sweep.next_P(cell, {64: low, 128: high}, flags()) == 256
    known = {64: low, 128: high, 256: high}
    assert sweep.next_P(cell, known, flags()) is None
    assert sweep.next_P(cell, known, flags(until="root")) == 512
    assert sweep.next_P(cell, known, flags(threshold=0.7)) == 512
    assert sweep.next_P(cell, {64: low}, flags(max_samples=128)) == 128
    assert sweep.next_P(cell, {64: low, 128: low}, flags(max_samples=128)) is None
    # 800 steps of 64 strings see 6400 strings eight times
    assert sweep.next_P(cell, {64 * 2**i: low for i in range(7)}, flags()) is None


def test_the_table_says_why_p_star_is_a_bound_and_torn_files_do_no_harm(tmp_path):
    (tmp_path / "runs").mkdir()
    args = flags(out=str(tmp_path))
    made = {  # method, L: accuracies of all levels from the first rung on
        ("cluster", 2): [[a] for a in (0.1, 0.1, 0.1, 0.7, 0.9)],
        ("cluster", 3): [[0.5, a] for a in (0.1, 0.3, 0.7, 0.9)],
        ("cluster", 4): [[0.5, 0.5, a] for a in (0.1, 0.3, 0.7, 0.9)],
        ("predictor", 3): [[0.5, 0.1, 0.6]] * 7, ("predictor", 4): [[math.nan] * 3] * 7,
        # its Config takes true as a truth value and 1 as a word
        ("data2vec-token:mask=0.3:mask-block=1:online=true", 3): [[0.5, 0.2, 0.1]]}
    for (method, L), ladder in made.items():
        cell = sweep.Cell(method, 8, 2, 3, L, 0.0)
        for i, accuracy in enumerate(ladder):
            P = sweep.limits(cell, 2**20)[0] * 2**i
            sweep.append(args, cell, P, 0, accuracy, 1.0)
    text = sweep.write_tables(args)
    assert list(table(tmp_path, "status").values()) == [
        "", "", "", "limited by steps", "diverged", "not finished"]
    assert table(tmp_path)["cluster", 3] == "11"                    # 8 * 2^(1/2)
    assert table(tmp_path, "root_P50")["predictor", 3] == "< 64"
    lines = {line.split(" |")[0].strip(): line for line in text.splitlines()}
    assert ">4096 s" in lines["predictor"] and ">4096 x" in lines["predictor"]
    assert "1.00, 3..4" in lines["cluster"] and lines["cluster-joint"].count("| - ") == 3
    # killed while it wrote the last run; and a spreadsheet put a mark before the first column
    file, (_, rows, _) = tmp_path / "runs" / sweep.OWN_FILE, sweep.read_runs(args.out)
    whole = file.read_bytes()
    del rows[cell, 0, P]
    for cut in range(2, len(whole.splitlines()[-1])):
        file.write_bytes(b"\xef\xbb\xbf" + whole[:-cut])
        assert sweep.read_runs(args.out)[1] == rows
    file.write_bytes((tmp_path / "runs.csv").read_bytes())          # in another order
    assert sweep.write_tables(args) == text


def test_a_climb_has_the_cells_own_grammar_and_tells_what_failed(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    args, cell = flags(out=tmp_path), sweep.Cell("cluster", 8, 2, 3, 3, 1.5)
    recover = Mock(side_effect=[[0.0, 0.75], FloatingPointError, [1.0, 0.5], [1.0, 0.5], [1.0]])
    monkeypatch.setattr(cluster, "recover", recover)
    *_, rungs, lines, failed = sweep.climb(args, cell, 7, {})
    assert recover.call_args.args[0].zipf == 1.5 and not failed and lines == ["P=8: "]
    (again,) = sweep.read_runs(tmp_path)[0].items()
    assert again[0] == (cell, 7) and str(again[1]) == str(rungs) and len(rungs) == 4
    *_, rungs, lines, failed = sweep.climb(args, cell, 8, {})           # one accuracy is too few
    assert failed and not rungs and "must return 2 or 3 accuracies" in lines[0]
    assert sweep.cell_text(sweep.table_row(cell, {(cell, 8): rungs}, args)) == ""


SMALL = "sweep.py --depth 2,3 --methods cluster,cluster-root --seeds 2 --max-samples 512"


def test_edited_code_is_never_answered_by_old_runs(fork, tmp_path):
    out, learner = tmp_path / "out", tmp_path / "cluster.py"
    assert fork(f"{SMALL} --jobs 1").returncode == 0
    before, files = table(out), len(list((out / "runs").iterdir()))
    (out / "runs" / "mine.csv").write_text("a,b\n1,2\n")
    (out / "runs" / "empty.csv").touch()
    edit(learner, "        tree.tuples.append(tuples)\n",
         "        labels = labels * 0\n        tree.tuples.append(tuples)\n")
    said = fork(f"{SMALL} --jobs 1").stdout
    assert b"mine.csv is no file of runs" in said and b"are of other code, and are not used" in said
    assert all(P.startswith("> ") for P in table(out).values())
    # changed back, but for a comment: the old numbers, without a run
    edit(learner, "labels = labels * 0", "# done")
    assert fork(f"{SMALL} --jobs 1").returncode == 0
    assert table(out) == before and len(list((out / "runs").iterdir())) == files + 3


def test_a_killed_sweep_two_at_once_and_torchrun_give_the_same_table(fork, tmp_path):
    fork(f"{SMALL} --out straight")
    expected = runs_of(tmp_path / "straight")
    assert len({row["P"] for row in expected}) > 4
    # the only rank, or the last of two, is killed after its first climb
    killed = "left[cell] -= 1\n        os._exit(9) if rank == world - 1 else None\n"
    edit(tmp_path / "sweep.py", "left[cell] -= 1\n", killed)
    for command in f"{SMALL} --out killed", f"{TORCHRUN} 2 -- {SMALL} --out ranks":
        assert fork(command).returncode != 0
        assert list((tmp_path / command.split()[-1] / "runs").glob("*.csv"))
    edit(tmp_path / "sweep.py", killed, "left[cell] -= 1\n")
    # two at once go on, or another number of ranks
    together = [fork(f"{SMALL} --out killed --jobs 1", subprocess.Popen) for _ in range(2)]
    assert [process.communicate() and process.returncode for process in together] == [0, 0]
    assert runs_of(tmp_path / "killed") == expected
    for ranks, out in (1, "ranks"), (2, "two"):
        ended = fork(f"{TORCHRUN} {ranks} -- {SMALL} --out {out}")
        assert ended.returncode == 0, ended.stdout
        assert runs_of(tmp_path / out) == expected


def blocks(kind):
    """The code blocks of this kind in README."""
    text = Path(HERE, "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)


def test_the_target_and_the_learner_of_the_readme(fork, tmp_path):
    for old, new in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", blocks("diff")[0], re.M):
        strip = partial(re.sub, "^.", "", flags=re.M)
        edit(tmp_path / "cluster.py", strip(old), strip(new))
    ended = fork("sweep.py --methods cluster-first --depth 3 --jobs 1 --out first")
    assert ended.returncode == 0 and table(tmp_path / "first")["cluster-first", 3].isdigit()

    # a learner of one's own gets its settings typed; one that fails keeps its traceback
    (mine,) = [block for block in blocks("python") if "def recover" in block]
    (tmp_path / "mine.py").write_text(mine, encoding="utf-8")
    edit(tmp_path / "mine.py", "    x = ", """    assert type(smooth) is float
    if seed == 1:
        raise ValueError("a bug of mine")
    x = """)
    edit(tmp_path / "sweep.py", "import grammar\n", "import grammar, mine\n")
    edit(tmp_path / "sweep.py", "LEARNERS = {", 'LEARNERS = {"mine": mine, ')
    ended = fork("sweep.py --methods mine:smooth=0.01 --depth 3 --max-samples 256 --seeds 3")
    # the line is in a traceback only
    assert ended.returncode == 1 and b'raise ValueError("a bug of mine")' in ended.stdout
    assert {row["seed"] for row in runs_of(tmp_path / "out")} == {"0", "2"}
    assert table(tmp_path / "out")["mine:smooth=0.01", 3].startswith(">")


def test_the_notebook_cells_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data2vec, "ENCODERS", dict(data2vec.ENCODERS))
    G.save("rules.npz", G.sample(1))
    monkeypatch.setattr(data2vec, "fit", partial(data2vec.fit, steps=9))
    for block in blocks("python"):
        exec(block, {})


def test_commands_of_readme_and_results_are_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documents = [Path(HERE, name).read_text(encoding="utf-8")
                 for name in ("README.md", "assets/RESULTS.md")]
    pattern = r"(?:^    |`|-- )(?:python )?(cluster|predictor|data2vec|sweep)\.py( --[^`|\n#]*)"
    found = re.findall(pattern, "\n".join(documents), re.M)
    assert len(found) > 40
    for script, words in found:
        if "cluster-first" not in words and "mine:" not in words:
            monkeypatch.setattr(sys, "argv", [script, *words.split()])
            module = sys.modules[script]
            if script == "sweep":
                sweep.read_flags()
            else:
                grammar.read_flags("", 1, module.TARGETS, module.Config, grammar.FILES)


def test_every_picture_is_drawn_the_same_twice(tmp_path, call):
    assets = Path(HERE, "assets")
    pictures = [(plot.samples_vs_depth, "samples_vs_depth.csv"), (plot.contrast, "contrast.csv"),
                (plot.collapse, "fig3/samples_vs_depth.csv"), (plot.phases, "phases/*.csv"),
                (plot.prediction, "law/[cs]*.csv")]
    for draw, pattern in pictures:
        files = sorted(assets.glob(pattern))
        once, again = (draw(*files, out=tmp_path / "a.png").read_bytes() for _ in range(2))
        assert once == again and len(once) > 10000
    for wrong in "missing.csv", str(assets / "runs.csv"):
        code, _, said = call(f"plot {wrong}")
        assert code == 2 and wrong in said.splitlines()[-1]
