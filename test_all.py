"""
Everything against an oracle: brute force, a closed form, or the population limit computed from the rules.

    python -m pytest test_all.py
"""

import copy
import csv
import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cluster
import data2vec
import grammar
import plot
import predictor
import sweep
from grammar import Exam, Grammar, accuracy, examine, linear_probe, tuple_codes

HERE = Path(__file__).parent
SIZES = [(8, 2, 4, 3), (5, 3, 7, 3), (3, 2, 3, 4), (256, 4, 5, 2), (256, 2, 256, 2)]  # v s m L, f = 1 among them
torch.set_num_threads(1)


# ----------------------------------------------------------------------------------------------------------------------
# grammar.py


@pytest.mark.parametrize("size", SIZES)
def test_rules_are_distinct_and_complete(size):
    v, s, m, L = size
    g = Grammar.random(*size, seed=1)
    assert len(g.rules) == L
    for rules in g.rules:
        assert rules.shape == (v, m, s) and int(rules.max()) < v
        assert len(set(map(tuple, rules.reshape(-1, s).tolist()))) == v * m  # no tuple has two parents


def test_rules_are_uniform_over_tuples():
    used = torch.zeros(9)
    for seed in range(2000):  # v m = 3 of v^s = 9 tuples, in every order: each is a rule of symbol 0 with chance 1/9
        a, b = Grammar.random(3, 2, 1, 2, seed).rules[0][0, 0].tolist()
        used[3 * a + b] += 1
    assert (used - 2000 / 9).abs().max() < 5 * (2000 / 9) ** 0.5


@pytest.mark.parametrize("size", SIZES)
def test_parse_inverts_sample(size):
    g = Grammar.random(*size, seed=2)
    levels = g.sample(3000, seed=3)
    assert [h.shape for h in levels] == [(3000, g.s ** (g.L - l)) for l in range(g.L + 1)]
    assert all(h.dtype == torch.uint8 for h in levels)
    assert all(map(torch.equal, g.parse(levels[0]), levels))
    assert all(torch.equal(a, b[:10]) for a, b in zip(g.sample(10, seed=3), levels))  # samples are nested
    assert not torch.equal(g.sample(3000, seed=4)[0], levels[0])


def test_parse_names_what_it_cannot_explain():
    g = Grammar.random(4, 2, 2, 3, seed=0)
    x = g.sample(5, 0)[0].clone()
    valid = set(map(tuple, g.rules[0].reshape(-1, 2).tolist()))
    x[3, 4:6] = torch.tensor(next(t for t in itertools.product(range(4), repeat=2) if t not in valid))
    with pytest.raises(ValueError, match="string 3, level 0, position 4"):
        g.parse(x)
    x[2, 1] = 4
    with pytest.raises(ValueError, match="string 2, level 0, position 1"):
        g.parse(x)
    with pytest.raises(ValueError, match="shape"):
        g.parse(x[:, :7])


@pytest.mark.parametrize("size", [(8, 2, 4, 4), (6, 3, 20, 3)])  # two levels and one level per look-up
def test_marginals_match_the_population(size):
    g, P = Grammar.random(*size, seed=5), 40000
    levels = g.sample(P, seed=6)
    for l, h in enumerate(levels):
        for n in range(h.shape[1]):
            p = g.marginal(l, n).numpy()
            seen = np.bincount(h[:, n], minlength=g.v) / P
            assert np.all(np.abs(seen - p) <= 5 * np.sqrt(p * (1 - p) / P) + 1e-12)


def every_string(g):
    """All derivations of a tiny grammar, level by level as in sample, each equally likely."""
    levels = [torch.arange(g.v)[:, None]]
    for rules in reversed(g.rules):
        h = levels[0]
        picks = torch.tensor(list(itertools.product(range(g.m), repeat=h.shape[1])))
        levels = [a.repeat_interleave(len(picks), 0) for a in levels]
        levels.insert(0, rules.long()[levels[0], picks.repeat(len(h), 1)].flatten(1))
    return levels


def test_context_equals_brute_force_and_synonyms_share_it():
    g = Grammar.random(3, 2, 2, 3, seed=1)
    levels = every_string(g)
    for l, t, target_level, n in [(0, 0, 0, 2), (0, 0, 0, 3), (0, 1, 0, 0), (0, 3, 0, 4), (0, 2, 0, 0), (1, 0, 1, 2),
                                  (1, 0, 0, 5), (1, 1, 0, 0), (0, 2, 3, 0), (1, 1, 3, 0), (0, 1, 2, 0), (0, 0, 2, 1)]:
        tuples = levels[l].unflatten(1, (-1, g.s))[:, t]
        for a in range(g.v):
            for rule in g.rules[l][a]:  # every tuple on its own: the m synonyms must agree
                rows = (tuples == rule).all(1)
                seen = torch.bincount(levels[target_level][rows, n], minlength=g.v) / max(1, int(rows.sum()))
                assert torch.allclose(seen.double(), g.context(l, t, target_level, n)[a])
    with pytest.raises(ValueError, match="within"):
        g.context(1, 0, 0, 3)


@pytest.mark.parametrize("target, target_level, n", [("latent", 1, 2), ("token", 0, 4), ("root", 3, 0)])
def test_empirical_contexts_converge_at_the_root_rate(target, target_level, n):
    g = Grammar.random(8, 2, 3, 3, seed=7)
    parent = g.context(1, 0, target_level, n)
    error = []
    for P in (2000, 32000):
        levels = g.sample(P, seed=8)
        h = levels[1]
        support = cluster.Support(h, g.v, g.s)
        root = levels[3][:, 0] if target == "root" else None
        tables = cluster.count(h, support, target, "cousins", g.v, levels[0], root)
        phi = cluster.contexts(tables[:1])
        truth = torch.zeros(len(support.codes), g.v, dtype=torch.float64)
        truth[support.ids(h)[:, 0]] = parent[levels[2][:, 0].long()]
        error.append((phi - truth).square().mean().sqrt().item() * P**0.5)
    assert 0.6 < error[1] / error[0] < 1.6  # sixteen times the samples, a quarter of the error


def test_sampler_does_not_depend_on_the_table_size(monkeypatch):
    g, P = Grammar.random(4, 2, 2, 4, seed=9), 50000
    one = g.sample(P, 0)[0]
    monkeypatch.setattr(grammar, "TABLE_BYTES", 0)  # one level per look-up
    two = g.sample(P, 0)[0]
    assert (np.bincount(one[:, 5], minlength=4) - np.bincount(two[:, 5], minlength=4)).__abs__().max() < 5 * P**0.5
    assert all(map(torch.equal, g.parse(two)[:1], [two]))


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 3), (5, 5), (6, 6), (6, 4), (3, 6)])
def test_matching_equals_brute_force(rows, columns):
    random = np.random.default_rng(rows * 10 + columns)
    for _ in range(30):
        table = random.integers(0, 9, (rows, columns))
        small, large = (table, table.T)[:: 1 if rows <= columns else -1][0], max(rows, columns)
        best = max(sum(small[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(large), len(small)))
        assert grammar.best_matching(table).sum() == best


def test_accuracy():
    truth = torch.tensor([[0, 1, 2], [2, 1, 0]])
    assert accuracy((truth + 1) % 3, truth, 3) == 1  # names of clusters don't matter
    assert accuracy(torch.tensor([[7, 1, -1], [2, 1, 7]]), truth, 3) == pytest.approx(5 / 6)  # unknown is wrong
    assert accuracy(torch.full((2, 3), -1), truth, 3) == 0
    with pytest.raises(ValueError, match="shapes"):
        accuracy(truth[:1], truth, 3)


# ----------------------------------------------------------------------------------------------------------------------
# cluster.py


@pytest.mark.parametrize("target", cluster.TARGETS)
@pytest.mark.parametrize("context", cluster.CONTEXTS)
def test_count_equals_a_loop(target, context, monkeypatch):
    monkeypatch.setattr(cluster, "CHUNK_TOKENS", 64)  # several chunks
    g, s, l = Grammar.random(3, 3, 4, 3, seed=0), 3, 1
    levels = g.sample(30, seed=0)
    x, h, root = levels[0], levels[l], levels[-1][:, 0]
    support = cluster.Support(h, g.v, s)
    K, ids = len(support.codes), support.ids(h)
    loop = {}
    for p, t in itertools.product(range(len(h)), range(ids.shape[1])):  # every tuple of every string
        i, cousins = t % s, [t - t % s + j for j in range(s) if j != t % s]
        if target == "root":
            seen = [root[p]]
            i = t
        elif target == "joint":
            seen = [ids[p, j] for j in cousins]
        else:
            below, width = (h, s) if target == "latent" else (x, s ** (l + 1))
            seen = [below[p, j * width + k] for j in cousins for k in range(width)]
        if context != "all" and t > 0:
            continue
        for k, symbol in enumerate(seen[:1] if context == "element" else seen):
            key = (i, k, int(ids[p, t]), int(symbol))
            loop[key] = loop.get(key, 0) + 1
    tables = cluster.count(h, support, target, context, g.v, x, root)
    per_position = len({key[1] for key in loop})
    assert tables.sum() == sum(loop.values()) and tables.shape[1] == K
    assert all(tables[i * per_position + k, a, b] == n for (i, k, a, b), n in loop.items())


@pytest.mark.parametrize("v, s, m, seed", [(8, 2, 3, 0), (8, 2, 4, 1), (4, 3, 4, 2)])
@pytest.mark.parametrize("target", cluster.TARGETS)
def test_every_target_recovers_every_level(v, s, m, seed, target):
    g = Grammar.random(v, s, m, 3, seed)
    score, collapsed = cluster.recover(g, 60000, seed, target)
    assert score == [1, 1] and collapsed == [False, False]


def test_token_fails_where_latent_succeeds():
    g = Grammar.random(8, 2, 4, 4, seed=3)
    assert min(cluster.recover(g, 4096, 3, "latent")[0]) > 0.99
    assert cluster.recover(g, 4096, 3, "token")[0][-1] < 0.75


def test_scrambled_strings_teach_nothing():
    g = Grammar.random(8, 2, 4, 3, seed=0)
    x, truth = g.sample(20000, 0)[0], g.sample(4096, (0, 1))
    mixed = x.flatten()[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))].view_as(x)
    assert accuracy(cluster.fit(x, 8, 2).label(truth[0])[1], truth[1], 8) == 1
    assert accuracy(cluster.fit(mixed, 8, 2).label(truth[0])[1], truth[1], 8) < 0.6  # the best of 8! matchings of noise


def test_unseen_tuples_are_unknown_and_so_is_all_above(monkeypatch):
    g = Grammar.random(8, 2, 4, 3, seed=0)
    x, fresh = g.sample(12, 0)[0], g.sample(500, 1)[0]
    tree = cluster.fit(x, 8, 2)
    seen = set(map(tuple, x.reshape(-1, 2).tolist()))
    known = torch.tensor([[tuple(t) in seen for t in row] for row in fresh.unflatten(1, (-1, 2)).tolist()])
    levels = tree.label(fresh)
    assert torch.equal(levels[1] >= 0, known) and not known.all()
    assert (levels[2][~known.unflatten(1, (-1, 2)).all(2)] == -1).all()
    monkeypatch.setattr(cluster, "DENSE_TUPLES", 0)  # a binary search numbers the tuples in the same way
    assert all(map(torch.equal, cluster.fit(x, 8, 2).label(fresh), levels))
    wide, copy = fresh.long(), fresh.long()
    assert all(map(torch.equal, tree.label(wide)[1:], levels[1:])) and torch.equal(wide, copy)  # unchanged


def test_kmeans_finds_planted_clusters_and_the_best_partition():
    random = torch.Generator().manual_seed(0)
    centers = torch.randn(6, 5, generator=random) * 3
    truth = torch.arange(6).repeat_interleave(20)
    X = centers[truth] + 0.3 * torch.randn(120, 5, generator=random)
    labels, inertia = cluster.kmeans(X, 6, random, 8)
    assert accuracy(labels[0], truth, 6) == 1 and inertia[0] == inertia.min()
    means = torch.stack([X[truth == a].mean(0) for a in range(6)])
    assert inertia[0].item() == pytest.approx((X - means[truth]).square().sum().item(), rel=1e-4)
    X = torch.rand(9, 2, generator=random)  # no structure: against all 3^9 partitions
    member = torch.nn.functional.one_hot(torch.cartesian_prod(*[torch.arange(3)] * 9), 3).float()  # (3^9, 9, 3)
    means = member.mT @ X / member.sum(1)[:, :, None].clamp(min=1)
    best = (X - member @ means).square().sum((1, 2)).min().item()
    assert cluster.kmeans(X, 3, random, 8)[1][0].item() == pytest.approx(best, rel=1e-4)
    assert cluster.kmeans(X[:2], 3, random, 8)[0].max() == 1  # fewer points than clusters


def test_fit_refuses_bad_input():
    x = Grammar.random(4, 2, 2, 3, seed=0).sample(10, 0)[0]
    for arguments in [(x[:, :6], 4, 2), (x[:, :2], 4, 2), (x[:0], 4, 2), (x, 3, 2), (x, 4, 2, "leaf"),
                      (x, 4, 2, "root"), (x, 4, 2, "latent", None, "most"), (x, 4, 3)]:
        with pytest.raises(ValueError):
            cluster.fit(*arguments)


# ----------------------------------------------------------------------------------------------------------------------
# predictor.py


def small_network(s, L, d=4, target="latent", elements="all", R=1, seed=0):
    network = predictor.Network(R, s, d, 8, predictor.heads_of(target, elements, s, L))
    network.draw([torch.Generator().manual_seed(seed + r) for r in range(R)])
    return network


def small_draw(g, strings=64):
    """One step's random numbers for one run on a grammar's strings."""
    x = [g.sample(strings, 1)[0]]
    return next(predictor.draws(x, strings, g.v, g.L, [torch.Generator().manual_seed(0)]))


def small_losses(g, student, teacher, target="latent", **settings):
    """The losses of one run, as a list: of prediction, then of clustering."""
    options = predictor.read_options(g.v, target, {"gate": 0.0} | settings)
    draw = small_draw(g)
    wanted = [h.detach() for h in teacher(draw.strings)[1]]
    parts = predictor.losses(student, wanted, draw, g.v, target, options)
    return [*parts[0][0], *parts[1][0]]


def reached(loss, network):
    """Which weights a loss has a gradient for: {(module, part)}, part predict or cluster."""
    weights = dict(network.named_parameters())
    grads = torch.autograd.grad(loss, [*weights.values()], allow_unused=True, retain_graph=True)
    names = [name.split(".")[1:3] for name in weights]
    return {(int(l), part) for (l, part), grad in zip(names, grads)
            if grad is not None and grad.abs().max() > 0}


def same_weights(a, b):
    a, b = a.network.state_dict(), b.network.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("s", [2, 3])
def test_cousins_are_the_other_tuples_under_the_grandparent(s):
    # a network that is sure of each element of the right cousin has loss 0
    n = d = s**3
    log_phi = torch.full((1, n // s, s, s - 1, s, d), -50.0)
    for t in range(n // s):
        grandparent, i = divmod(t, s)
        others = [j for j in range(s) if j != i]
        for c, e in itertools.product(range(s - 1), range(s)):
            log_phi[0, t, i, c, e, grandparent * s * s + others[c] * s + e] = 0.0
    string = torch.eye(d)[None, None]  # all elements are different
    goal = predictor.goal("latent", [string], 0, s, "all")
    assert predictor.prediction_loss(log_phi, goal, s)[0].item() == 0.0


@pytest.mark.parametrize("s, E, heads", [(2, 2, (2, 1)), (3, 3, (3, 2)), (3, 9, (3, 2)), (3, 1, (1, 1))])
def test_prediction_loss_equals_the_double_loop(s, E, heads):
    random = torch.Generator().manual_seed(0)
    R, B, G, d = 2, 3, 4, 5  # G: grandparents in a string
    log_phi = torch.randn(R, B * G * s, *heads, E, d, generator=random).log_softmax(-1)
    goal = torch.randn(R, B, G * s, E, d, generator=random).softmax(-1)
    loss, gain = predictor.prediction_loss(log_phi, goal, s)
    for r in range(R):
        total, terms = 0.0, 0
        for b, g, i in itertools.product(range(B), range(G), range(heads[0])):
            others = [j for j in range(s) if j != i][: heads[1]]
            for (c, j), e in itertools.product(enumerate(others), range(E)):
                total -= float(goal[r, b, g * s + j, e] @ log_phi[r, (b * G + g) * s + i, i, c, e])
                terms += 1
        assert loss[r].item() == pytest.approx(total / terms, rel=1e-5) and gain[r] < 1


def test_clustering_loss_equals_the_double_loop():
    random = torch.Generator().manual_seed(0)
    codes = torch.randn(2, 7, 4, generator=random).softmax(-1)
    alike = torch.rand(2, 7, 7, generator=random) < 0.5
    found = predictor.clustering_loss(codes, alike, 0.3, 0.2)
    for k in range(2):
        total = 0.0
        for i, j in itertools.permutations(range(7), 2):
            overlap = float(codes[k, i] @ codes[k, j])
            total -= math.log(overlap + 0.01) if alike[k, i, j] else 0.3 * math.log(1.0001 - overlap)
        entropy = -float((codes[k] * codes[k].log()).sum()) / 7
        assert found[k].item() == pytest.approx(total / 42 + 0.2 * entropy, rel=1e-3)


def test_similar_is_the_papers_rule():
    phi = torch.rand(1, 6, 5, generator=torch.Generator().manual_seed(0))
    for centred in (False, True):
        vectors = (phi[0] - phi[0].mean(0) if centred else phi[0]).numpy()
        found = predictor.similar(phi, 0.8, centred)[0]
        for i, j in itertools.product(range(6), repeat=2):
            a, b = vectors[i], vectors[j]
            cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            assert bool(found[i, j]) == ((1 + cosine) / 2 > 0.8)


@pytest.mark.parametrize("detach", ["none", "layers", "layers+clusterer"])
def test_each_loss_reaches_the_weights_it_should(detach):
    g, student = Grammar.random(4, 2, 2, 4, seed=0), small_network(2, 4)
    parts = small_losses(g, student, small_network(2, 4, seed=1), detach=detach)
    for l in range(3):
        both = {(k, part) for k in range(l) for part in ("predict", "cluster")}
        below = both if detach == "none" else set()
        own = {(l, "cluster")} if detach == "layers+clusterer" else {(l, "cluster"), (l, "predict")}
        assert reached(parts[l], student) == below | {(l, "predict")}
        assert reached(parts[3 + l], student) == below | own


@pytest.mark.parametrize("target, elements", [("latent", "all"), ("token", "all"), ("joint", "all"),
                                              ("latent", "one"), ("token", "one"), ("joint", "one")])
def test_targets_are_what_they_say(target, elements):
    """Module 1 of 3: the cousin's symbols by the teacher, its tokens, or both it and its symbols."""
    g = Grammar.random(4, 2, 2, 4, seed=0)
    student, teacher = small_network(2, 4, 4, target, elements), small_network(2, 4, 4, target, elements, seed=1)
    x = small_draw(g).strings
    codes, log_phi = [h.detach() for h in teacher(x)[1]], student(x)[0][1].detach()
    total, terms = 0.0, 0
    for b, t in itertools.product(range(64), range(4)):
        cousin = t ^ 1
        known = {"token": codes[0][0, b, 4 * cousin : 4 * cousin + 4]}.get(
            target, codes[1][0, b, 2 * cousin : 2 * cousin + 2])
        if elements == "one":
            known = known[:1]
            if t % 2:
                continue  # predicted from the first position alone
        if target == "joint":
            known = torch.cat([known, codes[2][0, b, cousin : cousin + 1]])
        total -= float((log_phi[0, b * 4 + t, t % 2, 0] * known).sum())
        terms += len(known)
    found = small_losses(g, student, teacher, target, elements=elements)[1]
    assert found.item() == pytest.approx(total / terms, rel=1e-5)


def test_without_a_teacher_the_targets_are_the_students_own_codes(monkeypatch):
    """ema = 0: after every step the teacher's codes are the student's, to the byte."""
    x = Grammar.random(4, 2, 2, 3, seed=0).sample(64, 0)[0]
    losses, equal = predictor.losses, []

    def watched(student, wanted, draw, *rest):
        own = student(draw.strings)[1]
        equal.append(all(map(torch.equal, wanted, own)))
        return losses(student, wanted, draw, *rest)

    monkeypatch.setattr(predictor, "losses", watched)
    predictor.fit(x, 4, 2, ema=0.0, steps=4)
    predictor.fit(x, 4, 2, ema=0.5, steps=4)
    assert equal == [True] * 5 + [False] * 3  # the first step has no past


def test_exact_contexts_are_grouped_by_parent_and_planted_codes_have_a_lower_loss():
    g, random = Grammar.random(8, 2, 3, 3, seed=0), torch.Generator().manual_seed(0)
    contexts = [g.context(0, i, 0, n) for i, ns in ((0, (2, 3)), (1, (0, 1))) for n in ns]
    symbols = g.sample(64, 1)[1].flatten().long()
    phi = torch.cat(contexts, 1).float()[symbols][None]  # (1, 256, 4 v)
    noise = torch.rand(1, 8, predictor.STARTS, predictor.TRIALS, generator=random)
    group = predictor.grouping(phi, 8, noise)[0]
    alike = group[:, None] == group
    assert torch.equal(alike, symbols[:, None] == symbols)
    planted = F.one_hot(symbols, 8).float()
    chance = planted[torch.randperm(256, generator=random)]
    losses = [predictor.clustering_loss(codes, alike, 1.0) for codes in (planted, chance)]
    assert losses[0] < losses[1] - 0.1


def test_grouping_finds_the_likeliest_partition():
    random = torch.Generator().manual_seed(0)
    n, v = 7, 3
    phi = torch.rand(n, 2, 4, generator=random).pow(4).add(1e-2)
    phi = (phi / phi.sum(-1, keepdim=True)).flatten(1)

    def cost(group):
        parts = [phi[group == k] + 1e-3 for k in range(v)]
        return sum(float((part * (part / part.mean(0)).log()).sum()) for part in parts if len(part))

    best = min(cost(torch.tensor(group)) for group in itertools.product(range(v), repeat=n))
    noise = torch.rand(20, v, predictor.STARTS, predictor.TRIALS, generator=random)
    found = [cost(group) for group in predictor.grouping(phi.expand(20, -1, -1), v, noise)]
    assert min(found) == pytest.approx(best, rel=1e-4)
    assert sum(f < best * 1.001 for f in found) >= 10


def test_choose_takes_two_different_tuples_of_every_string():
    uniform = torch.rand(3, 500, 2, generator=torch.Generator().manual_seed(0))
    first, second = predictor.choose(uniform, 4).view(3, 2, 500).unbind(1)
    assert (first != second).all()
    assert torch.equal(first // 4, torch.arange(500).expand(3, -1))
    assert torch.equal(second // 4, torch.arange(500).expand(3, -1))
    pairs = torch.bincount((first % 4 * 4 + second % 4).flatten(), minlength=16)
    assert (pairs[pairs > 0] - 125).abs().max() < 5 * 125**0.5 and (pairs > 0).sum() == 12


def eight_runs():
    """Strings of eight grammars; those of the last few make more steps."""
    grammars = [Grammar.random(8, 2, 3, 3, seed) for seed in range(8)]
    return [g.sample(60 + 20 * (r > 4), r)[0] for r, g in enumerate(grammars)]


@pytest.mark.parametrize("target, settings", [
    ("latent", {}), ("token", {}), ("joint", {"detach": "layers"}),
    ("latent", {"alike": "threshold", "sparsity": 0.01, "elements": "one", "schedule": "constant"}),
])
def test_a_run_is_the_same_to_the_byte_whichever_stand_beside_it(target, settings):
    xs, settings = eight_runs(), settings | {"epochs": 4}
    together = predictor.fit_many(xs, 8, 2, target, range(8), **settings)
    for runs in ([0], [7], [3, 4, 5]):
        some = predictor.fit_many([xs[r] for r in runs], 8, 2, target, runs, **settings)
        assert all(same_weights(a, together[r]) for a, r in zip(some, runs))
    assert not same_weights(together[0], together[1])


def test_a_run_that_diverges_stops_and_leaves_its_neighbours_alone():
    xs = eight_runs()[:3]

    def poison(step, steps, network, prediction):
        if step == 2:
            network.layers[0].predict[0].weight.data[1, 0, 0] = math.nan

    found = predictor.fit_many(xs, 8, 2, "latent", range(3), poison, steps=6)
    assert [run.diverged for run in found] == [0, 3, 0]
    alone = predictor.fit_many(xs[::2], 8, 2, "latent", [0, 2], steps=6)
    assert same_weights(found[0], alone[0]) and same_weights(found[2], alone[1])
    with pytest.raises(FloatingPointError, match="step .* lr .* decay"):
        predictor.fit(xs[0], 8, 2, lr=1.0, decay=10.0, batch=16)


def test_nothing_outside_is_used_or_changed():
    x, before = eight_runs()[0].long(), torch.random.get_rng_state()
    copy = x.clone()
    a = predictor.fit(x, 8, 2, seed=3, steps=2)
    torch.manual_seed(99)
    b = predictor.fit(x.tolist(), 8, 2, seed=3, steps=2)
    assert same_weights(a, b) and torch.equal(x, copy)
    torch.random.set_rng_state(before)


def test_batch_norm_is_right_from_the_first_step_on():
    g = Grammar.random(8, 2, 3, 3, seed=0)
    x = g.sample(512, 0)[0]
    learned = predictor.fit(x, 8, 2, lr=0.0, steps=2)
    norm = copy.deepcopy(learned.network.layers[0].norm)
    phi = learned.network(x[None])[0][0].detach().exp().flatten(2)[0]  # (2048, heads d)
    assert (norm.var[0, 0] / phi.var(0) - 1).abs().max() < 0.5  # two batches know it as well as that
    assert (norm.mean[0, 0] - phi.mean(0)).abs().max() < 5 * (phi.var(0).max() / 64) ** 0.5


def test_learns_level_1_and_not_from_scrambled_strings():
    g = Grammar.random(6, 2, 2, 2, seed=2)
    x = g.sample(2048, 0)[0]
    scrambled = x.clone()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    scrambled[:, 2:] = x[order, 2:]  # not its cousin any more
    runs = predictor.fit_many([x, scrambled], 6, 2, seeds=[0, 0], steps=250)
    found = [predictor.score(run, g.sample(1024, (0, 1)))[0][0] for run in runs]
    assert found[0] > 0.95 and found[1] < 0.8


def test_recover_keeps_the_sweeps_contract():
    grammars = [Grammar.random(4, 2, 2, 3, seed) for seed in range(2)]
    for score in predictor.recover(grammars, [32, 64], [0, 1], steps=3):
        assert len(score.accuracy) == len(score.collapsed) == len(score.floor) == 3
        assert all(isinstance(a, float) and 0 <= a <= 1 for a in score.accuracy + score.floor)
        assert all(isinstance(c, bool) for c in score.collapsed) and score.diverged == 0
    score = predictor.recover(grammars[:1], [64], [0], lr=1.0, decay=10.0)[0]
    assert score.accuracy == [0.0] * 3 and score.diverged > 0


def test_what_is_learned_labels_new_strings_and_can_be_saved(tmp_path):
    g = Grammar.random(4, 2, 2, 3, 0)
    learned = predictor.fit(g.sample(64, 0)[0], 4, 2, steps=3)
    x = g.sample(20, 1)[0]
    levels = learned.label(x.tolist())
    assert [h.shape for h in levels] == [(20, 8), (20, 4), (20, 2)] and torch.equal(levels[0], x)
    assert torch.equal(levels[2], learned.codes(x)[1].argmax(-1))
    assert "\n" not in repr(learned) and "latent" in repr(learned)
    learned.save(tmp_path / "a.pt")
    again = predictor.load(tmp_path / "a.pt")
    assert same_weights(learned, again) and repr(learned) == repr(again)
    assert all(map(torch.equal, again.label(x), levels))
    for bad in (x[:, :4], x + 4, x.float()):
        with pytest.raises(ValueError, match="^x: "):
            learned.label(bad)
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    saved["predictor"]["L"] = 5
    for wrong in (saved, [1], {"weights": {}}):
        torch.save(wrong, tmp_path / "b.pt")
        with pytest.raises(ValueError, match="^file: "):
            predictor.load(tmp_path / "b.pt")


def test_predictor_refuses_bad_input():
    x = Grammar.random(4, 2, 2, 3, 0).sample(10, 0)[0]
    for name, settings in [("codes", {"codes": 3}), ("ema", {"ema": 2}), ("gate", {"gate": math.nan}),
                           ("batch", {"batch": -1}), ("alike", {"alike": "near"}), ("target", {"target": "root"}),
                           ("width", {"width": 3}), ("preset", {"preset": "mine"})]:
        with pytest.raises(ValueError, match=f"^{name}: "):
            predictor.fit(x, 4, 2, **settings)
    with pytest.raises(ValueError, match="^seeds: "):
        predictor.fit_many([x, x], 4, 2, seeds=[0])
    for name, sizes in [("samples", (8, 2, 3, 4, 2**31)), ("depth", (8, 2, 3, 24, 10))]:
        with pytest.raises(ValueError, match=f"^{name}: "):
            predictor.check_size(*sizes)
    for name, settings in [("hidden", {"hidden": 2**20}), ("batch", {"batch": 2**20})]:
        with pytest.raises(ValueError, match=f"^{name}: "):
            predictor.check_size(8, 2, 3, 4, 10, **settings)


def test_predictor_runs_alone(tmp_path, monkeypatch, capsys):
    """The command line on a tiny run of the paper's settings: a table, a trace, and weights."""
    monkeypatch.chdir(tmp_path)
    flags = "predictor.py --depth 3 --v 4 --m 2 --samples 50 --preset paper --steps 2 --device cpu"
    monkeypatch.setattr(sys, "argv", [*flags.split(), "--trace", "trace.csv", "--save", "a.pt"])
    predictor.main()
    out = capsys.readouterr().out
    assert all(text in out for text in ("codes in use", "entropy", "linear probes", "codes=128"))
    header, *rows = (tmp_path / "trace.csv").read_text().splitlines()
    assert header == "step,accuracy 1,prediction 1,accuracy 2,prediction 2" and len(rows) == 2
    assert predictor.load("a.pt").target == "latent"


@pytest.mark.parametrize("flags", [
    "--save x --trace x", "--save no/x --trace x", "--trace no/x", "--codes 3 --trace x", "--hidden 999999999",
    "--samples 2147483647", "--alike near",
])
def test_a_refused_predictor_leaves_nothing_behind(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["predictor.py", *flags.split()])
    with pytest.raises(SystemExit) as end:
        predictor.main()
    said = capsys.readouterr()
    assert end.value.code == 2 and said.err.count("\n") == 1 and flags.split()[0] in said.err
    assert not list(tmp_path.iterdir()) and not said.out


# ----------------------------------------------------------------------------------------------------------------------
# data2vec.py


TINY = {
    "tree": data2vec.PRESETS["tree"]._replace(width=16, hidden=24, steps=3, batch=8),
    "transformer": data2vec.PRESETS["transformer"]._replace(
        width=16, hidden=24, layers=3, steps=3, batch=8, attention_bias=True, dropout=0.1
    ),
}
both = pytest.mark.parametrize("preset", TINY)


def encoder(preset, seed=0, v=4, s=2, L=3):
    return data2vec.build(v, s, L, TINY[preset], torch.Generator().manual_seed(seed))


def strings(n=8, v=4, T=8, seed=0):
    return torch.randint(v, (n, T), generator=torch.Generator().manual_seed(seed))


def linear_heads(target, top, v=4, d=16):
    count = top if target in ("stacked", "several") else 1
    return torch.nn.ModuleList(torch.nn.Linear(d, v if target == "token" else d) for _ in range(count))


@pytest.mark.parametrize("k", [0, 1, 2])
def test_mask_hides_whole_aligned_blocks_at_its_rate(k):
    random = torch.Generator().manual_seed(0)
    hidden = data2vec.draw_mask(4000, 3, 3, 0.3, k, random)
    assert hidden.shape == (4000, 27) and hidden.any(1).all()
    blocks = hidden.view(4000, -1, 3**k)
    assert (blocks.all(2) == blocks.any(2)).all()
    n = 3 ** (3 - k)
    expected = 0.3 + 0.7**n / n  # the one for certain adds a block to strings that have none
    assert abs(blocks[..., 0].float().mean() - expected) < 0.02


def test_mask_of_several_levels_gives_every_string_one_of_them():
    hidden = data2vec.draw_mask(6000, 4, 2, 0.0, "mixed", torch.Generator().manual_seed(0))  # rate 0: one block each
    sizes = hidden.sum(1)
    for size in (1, 2, 4):
        assert abs((sizes == size).float().mean() - 1 / 3) < 0.03
    top = data2vec.draw_mask(6, 4, 2, 0.0, "top", torch.Generator().manual_seed(0))
    assert (top.view(6, 4, 4).all(2).sum(1) == 1).all() and (top.sum(1) == 4).all()
    full = data2vec.draw_mask(5, 3, 2, 1.0, 0, torch.Generator().manual_seed(0))
    assert full.all()


@both
@pytest.mark.parametrize("target", data2vec.TARGETS)
def test_masked_tokens_do_not_reach_the_student(preset, target):
    """Changing what is hidden leaves the student's maps bit for bit as they were; changing what is visible does not."""
    student, teacher, top = encoder(preset), encoder(preset, 1), 2
    x, random = strings(), torch.Generator().manual_seed(3)
    hidden = data2vec.draw_mask(8, 3, 2, 0.3, 0, random)
    seen = []
    student.register_forward_hook(lambda module, inputs, maps: seen.append(maps))
    heads = linear_heads(target, top)
    for other in (x, torch.where(hidden, (x + 1) % 4, x), torch.where(hidden, x, (x + 1) % 4)):
        data2vec.objective(student, teacher, heads, other, hidden, target, top)
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1]))
    assert not torch.equal(seen[0][-1], seen[2][-1])


@both
@pytest.mark.parametrize("target", data2vec.TARGETS)
def test_loss_is_the_loop_over_masked_positions(preset, target):
    """objective against one position at a time: only masked ones enter, the target's average over layers included."""
    student, teacher, top, v = encoder(preset), encoder(preset, 1), 2, 4
    x = strings()
    hidden = data2vec.draw_mask(8, 3, 2, 0.3, 0, torch.Generator().manual_seed(3))
    heads = linear_heads(target, top)
    loss = data2vec.objective(student, teacher, heads, x, hidden, target, top)
    own, whole = student(x.masked_fill(hidden, v)), teacher(x)

    def standard(h):
        return (h - h.mean()) / (h.var(correction=0) + 1e-5) ** 0.5

    def huber(a, b):
        gap = (a - b).abs()
        return torch.where(gap < 4, gap**2 / 8, gap - 2).mean()

    terms = []
    for b, t in hidden.nonzero().tolist():
        layers = [standard(h[b, t]) for h in whole[-top:]]
        if target == "token":
            terms.append(-F.log_softmax(heads[0](standard(own[-1][b, t])), 0)[x[b, t]])
        elif target == "latent":
            terms.append(huber(heads[0](standard(own[-1][b, t])), (layers[0] + layers[1]) / 2))
        else:
            source = own[-2:] if target == "stacked" else [own[-1]] * 2
            terms.append(sum(huber(head(standard(h[b, t])), g) for head, h, g in zip(heads, source, layers)))
    assert torch.allclose(loss, torch.stack(terms).mean(), rtol=1e-4)


@both
def test_teacher_is_the_closed_form_average_without_gradient(preset):
    """After k steps: ema^k start + (1 - ema) sum_i ema^(k-i) student_i, with the students recorded while training."""
    settings, g, ema, k = TINY[preset]._replace(steps=5, ema=0.9), Grammar.random(4, 2, 2, 3, 0), 0.9, 5
    teachers, students = [], []
    follow = data2vec.follow

    def recorded(teacher, student, rate):
        students.append([p.detach().clone() for p in student.parameters()])
        follow(teacher, student, rate)

    def watch(step, loss, teacher):
        assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
        teachers.append([p.clone() for p in teacher.parameters()])

    data2vec.follow = recorded
    try:
        batches = data2vec.batches(g, 32, 0, settings, "cpu")
        teacher, untrained = data2vec.fit(batches, 4, 2, 3, "latent", settings, 0, "cpu", watch)
    finally:
        data2vec.follow = follow
    for j, (start, last) in enumerate(zip(untrained.parameters(), teacher.parameters())):
        expected = ema**k * start + sum((1 - ema) * ema ** (k - i) * students[i - 1][j] for i in range(1, k + 1))
        assert torch.allclose(last, expected, atol=1e-6)
        assert torch.equal(last, teachers[-1][j])
    assert any(not torch.equal(a, b) for a, b in zip(students[0], students[-1]))


@both
def test_maps_have_one_shape_and_the_tree_shares_what_its_nodes_share(preset):
    net, x = encoder(preset), strings()
    maps = net(x)
    assert len(maps) == 3 and all(h.shape == (8, 8, 16) for h in maps)
    if preset == "tree":
        assert torch.equal(maps[0][:, 0], maps[0][:, 3]) and not torch.equal(maps[0][:, 3], maps[0][:, 4])
        assert torch.equal(maps[1][:, 0], maps[1][:, 1]) and not torch.equal(maps[1][:, 1], maps[1][:, 2])
    changed = x.clone()
    changed[:, 7] = (x[:, 7] + 1) % 4
    assert not torch.allclose(net(changed)[-1][:, 0], maps[-1][:, 0])  # the first token has seen the last


@pytest.mark.parametrize("l", [1, 2, 3])
def test_synonym_swap_keeps_what_is_above_and_generic_swap_changes_the_parent(l):
    g = Grammar.random(8, 3, 4, 3, 1)
    levels = g.sample(600, 5)
    synonym, node = g.swap(levels, l, "synonym", 2)
    generic, same = g.swap(levels, l, "generic", 2)
    rows = torch.arange(600)
    assert torch.equal(node, same)
    assert all(torch.equal(a, b) for a, b in zip(g.parse(synonym[0]), synonym))  # still a derivation
    assert all(torch.equal(synonym[k], levels[k]) for k in range(l, 4))
    for swapped in (synonym, generic):
        for k in range(l + 1):  # nothing outside the node changes
            new, old = (h[k].view(600, -1, 3 ** (l - k)).clone() for h in (swapped, levels))
            if k < l:
                assert (new[rows, node] != old[rows, node]).any(1).float().mean() > 0.9
            new[rows, node] = old[rows, node]
            assert torch.equal(new, old)
        assert (swapped[l - 1].view(600, -1, 3)[rows, node] != levels[l - 1].view(600, -1, 3)[rows, node]).any(1).all()
    share = (generic[l][rows, node] != levels[l][rows, node]).float().mean()
    assert abs(share - 28 / 31) < 0.06  # of the 31 other tuples, 28 have another parent
    assert all(torch.equal(generic[k], levels[k]) for k in range(l + 1, 4))
    single = Grammar.random(8, 3, 1, 3, 1)
    with pytest.raises(ValueError, match="m = 1"):
        single.swap(single.sample(5, 0), 1, "synonym")
    with pytest.raises(ValueError, match="1 to L = 3"):
        g.swap(levels, 4, "generic")


def test_probes_read_planted_features_and_nothing_else():
    random = torch.Generator().manual_seed(0)
    labels, test = (torch.randint(8, (n,), generator=random) for n in (2048, 4096))
    planted = torch.randn(8, 32, generator=random)
    for fit in (linear_probe, lambda *data: data2vec.mlp_probe(*data, steps=300, lr=1e-2)):
        for signal, low, high in ((1.0, 0.99, 1.0), (0.0, 0.08, 0.17)):
            train, fresh = (
                signal * planted[y] + 0.1 * torch.randn(len(y), 32, generator=random) for y in (labels, test)
            )
            right = (fit(train, labels, 8)(fresh).argmax(1) == test).float().mean()
            assert low <= right <= high, (signal, right)


class Oracle(torch.nn.Module):
    """An encoder that parses: its only map shows, at every position, a random vector per symbol of level `level`, or
    per level-(level-1) tuple if `raw`, which knows the tuple but not that it has synonyms."""

    def __init__(self, g, level, raw):
        super().__init__()
        self.g, self.level, self.raw = g, level, raw
        size = g.v**g.s if raw else g.v
        self.vectors = torch.randn(size, 64, generator=torch.Generator().manual_seed(1))

    def forward(self, x, random=None):
        levels = self.g.parse(x)
        ids = levels[self.level].long()
        if self.raw:
            ids = tuple_codes(levels[self.level - 1].unflatten(1, (-1, self.g.s)), self.g.v)
        return [self.vectors[ids].repeat_interleave(self.g.s**self.level, 1)]


@pytest.mark.parametrize("level", [1, 2])
def test_unseen_synonym_accuracy_tells_knowing_a_level_from_looking_it_up(level):
    g = Grammar.random(8, 2, 3, 3, 0)
    exam = Exam(g, 0, tests=1024)
    unseen, seen, collapsed = examine(data2vec.readout(Oracle(g, level, raw=False), 2, 3), exam)
    assert unseen[level - 1] == 1 and seen[level - 1] == 1 and not collapsed[level - 1]
    unseen, seen, _ = examine(data2vec.readout(Oracle(g, level, raw=True), 2, 3), exam)
    assert seen[level - 1] > 0.99 and unseen[level - 1] < 0.4
    for l in range(1, 3):  # the absent tuples are absent from the probe's strings, and are those that are scored
        codes = tuple_codes(exam.probe[l][l - 1].unflatten(1, (-1, 2)), 8).unique()
        absent = tuple_codes(exam.test[l - 1].unflatten(1, (-1, 2)), 8)[exam.unseen[l]].unique()
        assert len(codes) == 16 and len(absent) == 8 and not set(codes.tolist()) & set(absent.tolist())
        assert all(torch.equal(a, b) for a, b in zip(g.parse(exam.probe[l][0]), exam.probe[l]))
    with pytest.raises(ValueError, match="m = 1"):
        Exam(Grammar.random(8, 2, 1, 3, 0), 0)


def test_synonym_score_is_one_for_latents_and_about_zero_for_tuples(monkeypatch):
    g = Grammar.random(8, 2, 3, 3, 0)
    exam = Exam(g, 0, tests=1024)
    monkeypatch.setattr(Grammar, "parse", lambda self, x: plain_parse(self, x))
    assert data2vec.synonym_scores(Oracle(g, 1, raw=False), exam)[0, 0] == 1
    assert abs(data2vec.synonym_scores(Oracle(g, 1, raw=True), exam)[0, 0]) < 0.1


def plain_parse(g, x):
    """Level 1 of strings that may have no derivation: all that a swap on level 1 needs."""
    tuples = x.unflatten(1, (-1, g.s))
    found = (tuples[:, :, None] == g.rules[0].reshape(-1, g.s).to(x)).all(3)
    return [x, found.int().argmax(2) // g.m]


class Constant(torch.nn.Module):
    def forward(self, x, random=None):
        return [torch.ones(*x.shape, 16)]


def test_collapse_is_seen():
    exam = Exam(Grammar.random(8, 2, 3, 3, 0), 0, tests=512)
    assert examine(data2vec.readout(Constant(), 2, 3), exam)[2] == [True, True]
    std, rank = data2vec.spread(Constant(), exam, 3)
    assert std < 1e-6
    vectors = torch.eye(8).repeat_interleave(8, 1) * 2 - 1  # eight patterns: rank at most 7

    class Patterns(torch.nn.Module):
        def forward(self, x, random=None):
            return [vectors[x]]

    std, rank = data2vec.spread(Patterns(), exam, 3)
    assert std > 0.5 and 4 < rank <= 7.001


@both
def test_it_runs_alone_and_its_checkpoint_loads(preset, tmp_path, monkeypatch, capsys):
    """The command line on a tiny run: a table, a trace, and weights that give the same maps again."""
    kept = []
    fit = data2vec.fit
    monkeypatch.setattr(data2vec, "fit", lambda *arguments: kept.append(fit(*arguments)) or kept[-1])
    flags = "--depth 3 --v 4 --m 2 --samples 50 --steps 2 --batch 8 --width 16 --hidden 16 --target several".split()
    flags += ["--preset", preset, "--trace", str(tmp_path / "trace.csv"), "--save", str(tmp_path / "encoder.pt")]
    monkeypatch.setattr(sys, "argv", ["data2vec.py", *flags])
    data2vec.main()
    out = capsys.readouterr().out
    assert all(text in out for text in ("level 1", "level 2", "unseen synonyms", "MLP probe", "untrained"))
    header, *rows = (tmp_path / "trace.csv").read_text().splitlines()
    assert header == "step,loss,target std,rank,unseen 1,unseen 2,synonyms 1,synonyms 2" and len(rows) == 2
    x = strings()
    assert all(torch.equal(a, b) for a, b in zip(data2vec.load(tmp_path / "encoder.pt")(x), kept[0][0](x)))


@both
def test_same_seed_same_weights_and_the_global_generator_is_left_alone(preset):
    g, before = Grammar.random(4, 2, 2, 3, 0), torch.random.get_rng_state()
    settings = TINY[preset]
    runs = [data2vec.fit(data2vec.batches(g, 64, seed, settings, "cpu"), 4, 2, 3, "stacked", settings, seed)[0]
            for seed in (5, 5, 6)]
    same = [torch.equal(a, b) for a, b in zip(runs[0].parameters(), runs[1].parameters())]
    assert all(same)
    assert any(not torch.equal(a, b) for a, b in zip(runs[0].parameters(), runs[2].parameters()))
    torch.nn.Linear(2, 2)  # what the modules' own constructors draw is overwritten, so nothing depends on it
    torch.manual_seed(99)
    again = data2vec.fit(data2vec.batches(g, 64, 5, settings, "cpu"), 4, 2, 3, "stacked", settings, 5)[0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0].parameters(), again.parameters()))
    torch.random.set_rng_state(before)


def test_offline_repeats_p_strings_and_online_never():
    g, settings = Grammar.random(8, 2, 4, 4, 0), TINY["tree"]._replace(steps=150, batch=16)
    x = torch.cat(list(data2vec.batches(g, 20, 3, settings, "cpu")))
    train = {tuple(row) for row in g.sample(20, 3)[0].tolist()}
    assert x.shape == (2400, 16) and x.dtype == torch.int64 and {tuple(row) for row in x.tolist()} == train
    x = torch.cat(list(data2vec.batches(g, 20, 3, settings._replace(regime="online"), "cpu")))
    assert x.shape == (2400, 16) and len(x.unique(dim=0)) > 2390


@pytest.mark.parametrize("target", data2vec.TARGETS)
def test_recover_keeps_the_sweeps_contract(target):
    g = Grammar.random(4, 2, 2, 3, 0)
    accuracy, collapsed = data2vec.recover(g, 32, 0, target, steps=3, batch=8, width=16, hidden=16)
    assert len(accuracy) == len(collapsed) == 2
    assert all(isinstance(a, float) and 0 <= a <= 1 for a in accuracy) and all(isinstance(c, bool) for c in collapsed)


@pytest.mark.parametrize("target", ["latent", "token"])
def test_it_learns(target):
    """Level 1 of a small grammar, where an untrained encoder is near chance, in a few hundred steps."""
    g = Grammar.random(8, 2, 3, 3, 100)
    floor, _ = data2vec.recover(g, 1024, 100, target, steps=1)
    accuracy, _ = data2vec.recover(g, 1024, 100, target, steps=500)
    assert floor[0] < 0.4 and accuracy[0] > 0.6


def test_best_of_several_maps_counts():
    """examine on two tensors, one that knows level 1 and one of noise, is as good as the one."""
    g = Grammar.random(8, 2, 3, 3, 0)
    exam = Exam(g, 0, tests=512)
    oracle, noise = data2vec.readout(Oracle(g, 1, raw=False), 2, 3), torch.Generator().manual_seed(0)

    def features(x):
        return [[torch.randn(h[0].shape, generator=noise), *h] for h in oracle(x)]

    assert examine(features, exam)[0][0] == examine(oracle, exam)[0][0] == 1


# ----------------------------------------------------------------------------------------------------------------------
# sweep.py and plot.py


def test_crossing_on_a_known_curve():
    P = [2.0**k for k in range(4, 16)]
    curve = [1 / (1 + math.exp(-3 * math.log2(p / 300))) for p in P]  # a logistic curve in log P: 0.5 at P = 300
    star, sign = sweep.crossing(P, curve, 0.5)
    assert sign == 0 and star == pytest.approx(300, rel=0.05)
    assert sweep.crossing([8, 16, 32], [0.1, 0.4, 0.6], 0.5)[0] == pytest.approx(16 * 2**0.5)
    assert sweep.crossing([8, 16, 32, 64], [0.1, 0.9, 0.1, 0.9], 0.5)[0] == pytest.approx(32 * 2**0.5)  # the last time
    assert sweep.crossing([8, 16], [0.1, 0.4], 0.5) == (16, 1) and sweep.crossing([8, 16], [0.6, 0.4], 0.5) == (16, 1)
    assert sweep.crossing([8, 16], [0.6, 0.7], 0.5) == (8, -1)


def test_summary_of_known_ladders():
    runs = {}
    for L, seed in itertools.product((3, 4, 5), range(4)):  # P* exactly 100 * 3^L, and one method that never gets there
        star = 100 * 3.0**L
        runs[sweep.Ladder("cluster-token", 8, 2, 3, L, seed)] = {star / 2: [0.0] * L, star * 2: [1.0] * L}
        runs[sweep.Ladder("cluster", 8, 2, 3, L, seed)] = {64: [0.2], 128: [0.3] if seed else [0.9]}
    rows, text = sweep.summarise(runs)
    assert [row[5] for row in rows] == ["> 128"] * 3 + ["2700", "8100", "24300"]
    assert [row[11] for row in rows] == [3, 3, 3, 0, 0, 0]
    assert "3.00 [3.00, 3.00], L = 3..5 | m = 3" in text and "> 128 (3 of 4 seeds)" in text
    slope = sweep.fit({np.log(m): [5.0 * m**2, 5.0 * m**2] for m in (2, 4, 8)})
    assert slope == pytest.approx((2, 2, 2))


def test_ladder_ends_after_two_recovered_rungs():
    ladder = sweep.Ladder("cluster", 8, 2, 4, 3, 0)
    assert sweep.next_rung(ladder, {}, 1000) == 8
    runs = {8: [0.2, 0.1], 16: [0.9, 0.95], 32: [0.9, 0.9], 64: [1, 0.96]}
    assert sweep.next_rung(ladder, runs, 1000) == 128 and sweep.next_rung(ladder, runs, 127) is None
    assert sweep.next_rung(ladder, runs | {128: [1, 1]}, 1000) is None


SMALL = "--depth 2,3 --seeds 2 --methods cluster,cluster-root --max-samples 4096 --device cpu".split()


def run_sweep(out, **arguments):
    command = [sys.executable, "sweep.py", *SMALL, "--out", str(out)]
    return subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **arguments)


def without_seconds(out):
    with open(out / "runs.csv", newline="") as file:
        return [{k: x for k, x in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_killed_and_resumed_sweep_gives_the_same_bytes(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    straight, broken = run_sweep(whole), run_sweep(killed)
    while broken.poll() is None and not (killed / "runs.csv").exists() or (killed / "runs.csv").stat().st_size < 500:
        time.sleep(0.02)
    broken.kill()
    broken.communicate()
    assert straight.communicate() and straight.returncode == 0
    with open(killed / "runs.csv", "a") as file:
        file.write("cluster,8,2,4,3,64,1,1,0.5")  # as if killed while writing
    before = (killed / "runs.csv").read_text().splitlines()
    resumed = run_sweep(killed)
    out, _ = resumed.communicate()
    assert resumed.returncode == 0 and "growth per level" in out
    assert set(before[:-1]) <= set((killed / "runs.csv").read_text().splitlines())  # finished runs were not done again
    assert without_seconds(whole) == without_seconds(killed)
    for name in ("samples_vs_depth.csv", "samples_vs_depth.md", "settings.json", "samples_vs_depth.png"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    for folder in (whole, killed):
        assert not list(folder.glob("*.part"))


def test_another_sweep_may_end_in_the_same_folder_meanwhile(tmp_path, monkeypatch):
    ladders = [sweep.Ladder("cluster", 8, 2, 4, 2, seed) for seed in range(2)]
    runs, theirs = sweep.open_folder(tmp_path, ["cluster"]), "cluster,8,2,4,2,8,9,1,0.500000,0.001,cpu,0\n"

    def their_end(out, runs):  # it sorts the file, and puts the sorted one in its place
        sweep.replace(out / "runs.csv", (out / "runs.csv").read_text() + theirs)

    monkeypatch.setattr(sweep, "write_summary", their_end)
    sweep.sweep(ladders, runs, tmp_path, 64, "cpu", 1)
    found, text = sweep.read_runs((tmp_path / "runs.csv").read_text())
    assert theirs in text and {a: found[a] for a in ladders} == runs


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


BAD = """
    sweep --m 9 | --m 0 | --m 4..x | --depth 1..3 | --depth 6..2 | --depth 2..4..6 | --depth 40 | --v 1 | --v 300
    sweep --m 1 --methods data2vec
    sweep --s 1 | --s 62 | --seeds 0 | --max-samples 0 | --max-samples 4 | --device tpu | --device cuda | --jobs 0
    sweep --seed 3 | --methods cluster,magic | --out FILE
    cluster --samples 0 | --depth 1 | --m 9 | --target leaf | --device tpu | --v two
    predictor --samples 0 | --codes 3 | --target root | --lr x | --ema 2 | --steps 0 | --m 9
    data2vec --target labels | --mask 1.5 | --mask-block 3 | --mask-block x | --m 1 | --save NOWHERE/x.pt | --steps 0
    data2vec --preset gpu | --lr nan | --width 30 --preset transformer
    grammar --m 9 | --samples -1 | --save NOWHERE/x.npz
    plot NOWHERE | NOWHERE/trace.csv
"""
BAD = [(line.split()[0], flag) for line in BAD.strip().splitlines() for flag in line.split(None, 1)[1].split(" | ")]


@pytest.mark.parametrize("script, arguments", BAD)
def test_bad_input_gets_one_line(script, arguments, tmp_path, monkeypatch, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("the device is there")
    (tmp_path / "file").write_text("mine")
    flag = arguments.split()[0] if arguments[0] == "-" else "out"
    arguments = arguments.replace("FILE", str(tmp_path / "file")).replace("NOWHERE", str(tmp_path / "nowhere"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments.split()])
    with pytest.raises(SystemExit) as end:
        sys.modules[script].main()
    said = capsys.readouterr()
    assert end.value.code == 2 and said.err.count("\n") == 1 and flag in said.err and not said.out
    assert files(tmp_path) == {tmp_path / "file": b"mine"}


GOOD = ",".join(sweep.COLUMNS) + "\ncluster,8,2,4,2,8,0,1,0.5,0.001,cpu,0\n"
MINE = json.dumps({name: sweep.SETTINGS[name] for name in ("sweep", "cluster")})


@pytest.mark.parametrize("runs, settings", [
    ("a,b\n1,2\n", MINE), (GOOD.replace(",collapsed", ""), MINE), (GOOD + GOOD.splitlines()[1][:-4] + "\n", MINE),
    (GOOD + GOOD.splitlines()[1].replace(",0,1,", ",0,2,") + "\n", MINE), (GOOD + "nonsense\n", MINE),
    ("\x00\xff", MINE), (GOOD, None), (GOOD, "{"), (GOOD, "7"), (GOOD, '{"sweep": {"rung": 3}}'),
])
def test_foreign_results_are_refused_and_left_alone(runs, settings, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs.csv").write_bytes(runs.encode("latin-1"))
    if settings is not None:
        (tmp_path / "settings.json").write_text(settings)
    before = files(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sweep.py", *SMALL, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        sweep.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "--out" in said
    assert files(tmp_path) == before


def test_plot_refuses_foreign_files(tmp_path):
    (tmp_path / "samples_vs_depth.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns"):
        plot.draw(tmp_path)


def test_traces_become_one_picture(tmp_path, monkeypatch):
    for seed in range(2):
        text = "step,loss,unseen 1,unseen 2,synonyms 1,synonyms 2\n1,.5,.1,.1,0,0\n9,.4,.9,.2,.8,.1\n"
        (tmp_path / f"{seed}.csv").write_text(text)
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "0.csv"), str(tmp_path / "1.csv")])
    plot.main()
    assert (tmp_path / "phases.png").read_bytes()[:4] == b"\x89PNG"
