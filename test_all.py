"""
Everything against an oracle: brute force, a closed form, or the population limit computed from the rules.

    python -m pytest test_all.py
"""

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


def stack_for(s, L, v=4, target="latent", seed=0):
    return predictor.build(s, L, v, 8, target, torch.Generator().manual_seed(seed))


def settings(**changes):
    return predictor.SimpleNamespace(**(predictor.SETTINGS | {"gate": 0.0} | changes))


def parts_for(g, student, teacher=None, target="latent", detach="none", strings=64):
    x = g.sample(strings, 1)[0]
    return predictor.losses(student, teacher, x, g.v, target, detach, torch.Generator().manual_seed(0), settings())


def reached(loss, student):
    """Which weights a loss has a gradient for: {(module, part)}, part predict or cluster."""
    grads = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True, retain_graph=True)
    names = [name.split(".")[:2] for name, _ in student.named_parameters()]
    return {(int(l), part) for (l, part), grad in zip(names, grads) if grad is not None and grad.abs().max() > 0}


@pytest.mark.parametrize("s", [2, 3])
def test_cousins_are_the_other_tuples_under_the_grandparent(s):
    table = predictor.cousins(s).tolist()
    assert table == [[j for j in range(s) if j != i] for i in range(s)]
    # and the loss finds them: a network that is sure of each element of the right cousin has loss 0
    n, d = s**3, s**3
    target = torch.eye(d)[None]  # one string whose elements are all different
    log_phi = torch.full((n // s, s, s - 1, s, d), -50.0)
    for t in range(n // s):
        grandparent, i = divmod(t, s)
        for c, e in itertools.product(range(s - 1), range(s)):
            j = [j for j in range(s) if j != i][c]
            log_phi[t, i, c, e, grandparent * s * s + j * s + e] = 0.0
    assert predictor.prediction_loss(log_phi, target)[0].item() == 0.0


@pytest.mark.parametrize("s, E", [(2, 2), (3, 3), (2, 4), (3, 9)])
def test_prediction_loss_equals_the_double_loop(s, E):
    random = torch.Generator().manual_seed(0)
    B, G, d = 3, 4, 5  # strings, grandparents in each, codes
    log_phi = torch.randn(B * G * s, s, s - 1, E, d, generator=random).log_softmax(-1)
    target = torch.randn(B, G * s * E, d, generator=random).softmax(-1)
    total, terms = 0.0, 0
    for b, g, i in itertools.product(range(B), range(G), range(s)):
        others = [j for j in range(s) if j != i]
        for c, j in enumerate(others):
            for e in range(E):
                total -= float(target[b, (g * s + j) * E + e] @ log_phi[(b * G + g) * s + i, i, c, e])
                terms += 1
    loss, gain = predictor.prediction_loss(log_phi, target)
    assert loss.item() == pytest.approx(total / terms, rel=1e-5) and gain < 1


def test_clustering_loss_equals_the_double_loop():
    random = torch.Generator().manual_seed(0)
    codes, group = torch.randn(2, 7, 4, generator=random).softmax(-1), torch.randint(3, (2, 7), generator=random)
    for module in range(2):
        total = 0.0
        for i, j in itertools.permutations(range(7), 2):
            same = float(codes[module, i] @ codes[module, j])
            alike = group[module, i] == group[module, j]
            total -= math.log((same + 0.01) / 1.01) if alike else 0.3 * math.log(1.0001 - same)
        found = predictor.clustering_loss(codes, group, 0.3)[module].item()
        assert found == pytest.approx(total / 42, rel=1e-5)


@pytest.mark.parametrize("detach", predictor.DETACH)
def test_gradients_stop_where_detach_says(detach):
    g = Grammar.random(4, 2, 2, 4, seed=0)
    student = stack_for(2, 4)
    parts = parts_for(g, student, detach=detach)
    everything = {(l, part) for l in range(3) for part in ("predict", "cluster")}
    for l in range(3):
        below = {pair for pair in everything if pair[0] < l} if detach == "none" else set()
        assert reached(parts[l], student) == below | {(l, "predict")}
        own = {(l, "cluster")} | (set() if "clusterer" in detach else {(l, "predict")})
        assert reached(parts[3 + l], student) == below | own


@pytest.mark.parametrize("with_teacher", [True, False])
def test_targets_carry_no_gradient_and_come_from_the_teacher(with_teacher):
    g = Grammar.random(4, 2, 2, 4, seed=0)
    student, teacher = stack_for(2, 4), stack_for(2, 4, seed=1)
    parts = parts_for(g, student, teacher if with_teacher else None)
    x = predictor.one_hot(g.sample(64, 1)[0], 4)
    source = teacher if with_teacher else student
    wanted = source[1](source[0](x)[1])[1].detach()
    log_phi = student[2](student[1](student[0](x)[1])[1])[0]
    assert parts[2].item() == pytest.approx(predictor.prediction_loss(log_phi, wanted)[0].item(), rel=1e-5)
    assert reached(parts[0], teacher) == set()


def test_token_heads_see_the_tokens_under_the_cousins():
    g = Grammar.random(4, 2, 2, 4, seed=0)
    student = stack_for(2, 4, target="token")
    parts = parts_for(g, student, target="token")
    x = predictor.one_hot(g.sample(64, 1)[0], 4)
    log_phi = student[1](student[0](x)[1])[0]  # (64 * 4, 2, 1, 4, d): the 4 tokens of a cousin on level 1
    total = 0.0
    for b, t in itertools.product(range(64), range(4)):
        cousin = t ^ 1
        total -= float((log_phi.detach()[b * 4 + t, t % 2, 0] * x[b, cousin * 4 : cousin * 4 + 4]).sum())
    assert parts[1].item() == pytest.approx(total / (64 * 4 * 4), rel=1e-5)


def test_joint_heads_see_the_elements_of_the_cousins_and_their_symbols(monkeypatch):
    g = Grammar.random(4, 2, 2, 4, seed=0)
    student, teacher = stack_for(2, 4, target="joint"), stack_for(2, 4, target="joint", seed=1)
    grouping, given = predictor.grouping, []
    monkeypatch.setattr(predictor, "grouping", lambda phi, *rest: given.extend(phi) or grouping(phi, *rest))
    parts = parts_for(g, student, teacher, target="joint")
    x = predictor.one_hot(g.sample(64, 1)[0], 4)
    elements = teacher[0](x)[1].detach()
    symbols = teacher[1](elements)[1].detach()
    log_phi = student[1](student[0](x)[1])[0].detach()  # (64 * 4, 2, 1, 3, d)
    total = 0.0
    for b, t in itertools.product(range(64), range(4)):
        cousin = t ^ 1
        seen = torch.cat([elements[b, 2 * cousin : 2 * cousin + 2], symbols[b, cousin : cousin + 1]])
        total -= float((log_phi[b * 4 + t, t % 2, 0] * seen).sum())
    assert parts[1].item() == pytest.approx(total / (64 * 4 * 3), rel=1e-5)
    for phi in given:  # the two elements weigh as much as the symbol, where tuples are grouped
        assert torch.allclose(phi.view(-1, 3, student[0].d).sum(-1), torch.tensor([0.5, 0.5, 1.0]))


def test_moving_average_is_exact():
    student, teacher = stack_for(2, 3), stack_for(2, 3, seed=1)
    before = [p.clone() for p in teacher.parameters()]
    predictor.average(teacher, student, 0.25)
    for old, new, p in zip(before, teacher.parameters(), student.parameters()):
        assert torch.allclose(new, 0.75 * old + 0.25 * p, atol=1e-7)


def test_exact_contexts_are_grouped_by_parent_and_planted_codes_have_a_lower_loss_than_random_ones():
    g = Grammar.random(8, 2, 3, 3, seed=0)
    rows = torch.cat([g.context(0, i, 0, n) for i, ns in ((0, (2, 3)), (1, (0, 1))) for n in ns], 1).float()  # (v, 4 v)
    symbols = torch.stack([h.flatten().long()[:256] for h in (g.sample(128, 1)[1], g.sample(128, 2)[1])])  # two modules
    random = torch.Generator().manual_seed(0)
    phi = rows[symbols[0]], rows[symbols[1], :16]  # the second knows one position alone
    group = predictor.grouping(phi, g.v, random)
    for found, true in zip(group, symbols):
        assert torch.equal(found[:, None] == found, true[:, None] == true)
    planted = predictor.one_hot(symbols, 8)
    chance = predictor.one_hot(torch.randint(8, (2, 256), generator=random), 8)
    assert (predictor.clustering_loss(planted, group, 1.0) < predictor.clustering_loss(chance, group, 1.0) - 0.1).all()


def test_grouping_finds_the_likeliest_partition():
    random = torch.Generator().manual_seed(0)
    n, v = 7, 3
    phi = torch.rand(n, 2, 4, generator=random).pow(4).add(1e-2)
    phi = (phi / phi.sum(-1, keepdim=True)).flatten(1)

    def cost(group):
        parts = [phi[group == k] + 1e-3 for k in range(v)]
        return sum(float((part * (part / part.mean(0)).log()).sum()) for part in parts if len(part))

    best = min(cost(torch.tensor(group)) for group in itertools.product(range(v), repeat=n))
    found = [cost(predictor.grouping([phi], v, random)[0]) for _ in range(20)]
    assert min(found) == pytest.approx(best, rel=1e-4) and sum(f < best * 1.001 for f in found) >= 10


def test_learns_level_1_and_not_from_scrambled_strings():
    g = Grammar.random(6, 2, 2, 2, seed=2)
    x = g.sample(2048, 0)[0]
    scrambled = x.clone()
    scrambled[:, 2:] = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0)), 2:]  # not its cousin
    truth = g.sample(1024, (0, 1))
    found = [predictor.score(predictor.train(y, 6, 2, steps=250), truth, 6)[0][0] for y in (x, scrambled)]
    assert found[0] > 0.95 and found[1] < 0.8


def test_same_seed_same_weights():
    x = Grammar.random(4, 2, 2, 3, seed=0).sample(64, 0)[0]
    a, b = (predictor.train(x, 4, 2, steps=5, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


# ----------------------------------------------------------------------------------------------------------------------
# data2vec.py


TINY = {
    "tree": {"width": 16, "hidden": 24, "steps": 3, "batch": 8},
    "transformer": {"preset": "transformer", "width": 16, "hidden": 24, "layers": 3, "steps": 3, "batch": 8,
                    "attention_bias": True, "dropout": 0.1},
}
both = pytest.mark.parametrize("preset", TINY)
every_target = pytest.mark.parametrize("target", data2vec.TARGETS)


def options(**settings):
    return grammar.read_settings(data2vec.SETTINGS, data2vec.PRESETS, settings)


def drawn(n, v=4, s=2, L=3, m=2):
    """n grammars, and strings of each, no two samples of one size."""
    grammars = [Grammar.random(v, s, m, L, i) for i in range(n)]
    return grammars, [g.sample(20 + 7 * i, i)[0] for i, g in enumerate(grammars)]


def weights(model):
    return [w.clone() for w in model.encoder.parameters()]


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


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


def test_the_student_does_not_see_what_is_hidden_and_the_teacher_sees_all(monkeypatch):
    seen, build = [], data2vec.build

    def watched(*arguments):
        encoder = build(*arguments)
        encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        return encoder

    monkeypatch.setattr(data2vec, "build", watched)
    _, xs = drawn(2)
    data2vec.fit_many(xs, 4, 2, "latent", [0, 1], **TINY["tree"])
    steps = data2vec.batches(xs, 3, 2, [0, 1], options(**TINY["tree"]), "cpu")
    for i, (x, hidden) in enumerate(steps):
        assert torch.equal(seen[2 * i], x) and x.max() < 4
        assert torch.equal(seen[2 * i + 1], torch.where(hidden, 4, x)) and hidden.any(2).all()
    assert len(seen) == 6


@both
@every_target
def test_loss_is_the_loop_over_masked_positions(preset, target):
    """The loss of the first step, of three runs at once, against one position of one run at a time."""
    settings = options(**{**TINY[preset], "dropout": 0.0, "top": 2})
    _, xs = drawn(3)
    losses, teachers, v = [], [], 4
    data2vec.fit_many(xs, v, 2, target, [4, 5, 6], lambda step, loss, teacher: losses.append(loss), **vars(settings))
    x, hidden = next(data2vec.batches(xs, 3, 2, [4, 5, 6], settings, "cpu"))

    def standard(h):
        return (h - h.mean()) / (h.var(correction=0) + 1e-5) ** 0.5

    def huber(a, b):
        gap = (a - b).abs()
        return torch.where(gap < 4, gap**2 / 8, gap - 2).mean()

    for r, seed in enumerate((4, 5, 6)):
        start = [data2vec.stream(seed, 0)]
        encoder = data2vec.initialise(data2vec.build(1, v, 2, 3, settings), start)
        sizes = [8] if target == "token" else [16] * (1 if target == "latent" else 2)  # 4 tokens, in a multiple of 8
        heads = [data2vec.initialise(data2vec.Linear(1, 16, size), start) for size in sizes]
        maps = [[data2vec.pool(h, 8)[0] for h in encoder(tokens[r : r + 1], 2)]
                for tokens in (x.masked_fill(hidden, v), x)]  # of the student and the teacher, each (B, T, d)
        terms = []
        for b, t in hidden[r].nonzero().tolist():
            own, whole = ([standard(h[b, t]) for h in some] for some in maps)
            said = [h @ head.weight[0] + head.bias[0, 0] for h, head in zip(own if target == "stacked"
                                                                            else [own[-1]] * 2, heads)]
            if target == "token":
                terms.append(-F.log_softmax(said[0][:v], 0)[x[r, b, t]])
            elif target == "latent":
                terms.append(huber(said[0], (whole[0] + whole[1]) / 2))
            else:
                terms.append(huber(said[0], whole[0]) + huber(said[1], whole[1]))
        assert torch.allclose(losses[0][r], torch.stack(terms).mean(), rtol=1e-4)


def test_gradients_are_clipped_run_by_run():
    random = torch.Generator().manual_seed(0)
    sizes = [(3, 4, 5), (3, 1, 7)]
    stacked = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    scale = torch.tensor([0.01, 1.0, 100.0]).view(3, 1, 1)
    for w in stacked:
        w.grad = torch.randn(w.shape, generator=random) * scale
    single = [[torch.nn.Parameter(w[r].detach()) for w in stacked] for r in range(3)]
    for r, run in enumerate(single):
        for w, all_runs in zip(run, stacked):
            w.grad = all_runs.grad[r].clone()
    norms = data2vec.clip_each_run(stacked)
    for r, run in enumerate(single):
        assert torch.allclose(norms[r], torch.nn.utils.clip_grad_norm_(run, data2vec.CLIP))
        assert all(torch.allclose(w.grad, every.grad[r], rtol=1e-5) for w, every in zip(run, stacked))


def test_learning_rate_rises_stays_and_falls_to_zero():
    settings = options(steps=100, warmup=10, cooldown=0.25, lr=1.0)
    rates = [data2vec.learning_rate(step, settings) for step in range(1, 101)]
    assert rates[0] == 0.1 and rates[9:75] == [1.0] * 66
    assert np.allclose(rates[75:], np.arange(25, 0, -1) / 25)
    settings = options(steps=100, warmup=10, cooldown=0, lr=1.0)
    assert [data2vec.learning_rate(step, settings) for step in (10, 100)] == [1.0, 1.0]


@both
def test_teacher_is_the_closed_form_average_without_gradient(preset, monkeypatch):
    """After k steps: ema^k start + (1 - ema) sum_i ema^(k-i) student_i, with the students recorded while training."""
    students, follow = [], data2vec.follow

    def recorded(teacher, student, ema):
        students.append([w.detach().clone() for w in student.parameters()])
        follow(teacher, student, ema)

    def watch(step, loss, teacher):
        assert all(not w.requires_grad and w.grad is None for w in teacher.parameters())

    monkeypatch.setattr(data2vec, "follow", recorded)
    settings = {**TINY[preset], "steps": 5, "ema": 0.9}
    model = data2vec.fit_many(drawn(1)[1], 4, 2, "latent", [0], watch, **settings)[0]
    for j, (start, last) in enumerate(zip(model.untrained.parameters(), model.encoder.parameters())):
        expected = 0.9**5 * start + sum(0.1 * 0.9 ** (4 - i) * students[i][j] for i in range(5))
        assert torch.allclose(last, expected, atol=1e-6)
    assert not equal(students[0], students[-1])


@both
@every_target
def test_a_run_does_not_depend_on_its_neighbours(preset, target):
    """The same bytes alone, as one of 3 and as one of 8, at a vocabulary that is no multiple of 8."""
    grammars, xs = drawn(8, v=5)
    xs[3] = grammars[3]  # always fresh strings beside fixed ones
    runs = [data2vec.fit_many([xs[i] for i in some], 5, 2, target, some, **TINY[preset]) for some in
            (range(8), range(2, 5), [2], [3])]
    alone, online = (weights(run[0]) for run in runs[2:])
    assert equal(alone, weights(runs[0][2])) and equal(alone, weights(runs[1][0]))
    assert equal(online, weights(runs[0][3])) and equal(online, weights(runs[1][1]))
    assert not equal(alone, weights(runs[0][1]))


def test_a_diverged_run_stops_and_its_neighbours_go_on(monkeypatch):
    """The loss of run 1 is NaN in step 3: it keeps the weights of step 2, and the others are as without it."""
    _, xs = drawn(3)
    settings = {**TINY["tree"], "steps": 6, "cooldown": 0}
    alone = [data2vec.fit(xs[i], 4, 2, "latent", i, **{**settings, "steps": n}) for i, n in ((0, 6), (1, 2), (2, 6))]
    calls, smooth_l1 = [], data2vec.smooth_l1

    def poisoned(prediction, goal):
        calls.append(0)
        poison = torch.tensor([1, np.nan if len(calls) == 3 else 1, 1]).view(-1, 1, 1)
        return smooth_l1(prediction, goal) * poison

    monkeypatch.setattr(data2vec, "smooth_l1", poisoned)
    models = data2vec.fit_many(xs, 4, 2, "latent", range(3), **settings)
    assert [model.diverged for model in models] == [0, 3, 0]
    assert all(equal(weights(a), weights(b)) for a, b in zip(alone, models))


def test_divergence_is_reported(tmp_path, monkeypatch, capsys):
    g = Grammar.random(4, 2, 2, 3, 0)
    wild = {**TINY["tree"], "steps": 300, "lr": 1.0, "decay": 10.0, "warmup": 1}
    with pytest.raises(FloatingPointError, match="^the loss is not finite at step [0-9]+; .*lr .*decay"):
        data2vec.fit(g.sample(50)[0], 4, 2, **wild)
    score = data2vec.recover([g], [50], [0], **wild, probe_strings=50, test_strings=50, probe_steps=5)[0]
    assert score.accuracy == [0.0, 0.0, 0.0] and score.diverged > 1 and len(score.floor) == 3
    flags = "--depth 3 --v 4 --m 2 --samples 50 --steps 300 --batch 8 --width 16 --hidden 24 --lr 1 --decay 10"
    flags += f" --warmup 1 --probes 100 --probe-strings 50 --probe-steps 5 --test-strings 50 --trace {tmp_path / 'trace.csv'}"
    monkeypatch.setattr(sys, "argv", ["data2vec.py", *flags.split()])
    with pytest.raises(SystemExit) as end:
        data2vec.main()
    assert end.value.code == 1 and capsys.readouterr().err.strip().splitlines()[-1].startswith("data2vec.py: the loss")
    assert len((tmp_path / "trace.csv").read_text().splitlines()) > 2  # what came before is on disk


@both
def test_features_know_the_tree_and_a_checkpoint_gives_them_again(preset, tmp_path):
    model = data2vec.fit(drawn(1)[1][0].tolist(), 4, 2, "several", **TINY[preset])
    x = drawn(2)[1][1]
    maps = model.features(x)
    nodes = [2, 4, 8] if preset == "tree" else [8, 8, 8]
    assert [tuple(h.shape) for h in maps] == [(27, n, 16) for n in nodes]
    changed = x.clone()
    changed[:, 7] = (x[:, 7] + 1) % 4
    assert not torch.allclose(model.features(changed)[-1][:, 0], maps[-1][:, 0])  # the first token has seen the last
    model.save(tmp_path / "encoder.pt")
    loaded = data2vec.load(tmp_path / "encoder.pt")
    assert equal(loaded.features(x), maps) and repr(loaded) == repr(model) and "\n" not in repr(model)
    for name, content in (("text", b"hello"), ("empty", b""), ("other", None)):
        file = tmp_path / name
        torch.save({"v": 8}, file) if content is None else file.write_bytes(content)
        with pytest.raises(ValueError, match="^file: .* was not written by data2vec.py"):
            data2vec.load(file)


@pytest.mark.parametrize("x, settings, message", [
    ([[0, 1, 2, 4]], {}, "x: symbols must lie in"),  # 4 is the number of a hidden token
    ([[0.0, 1.0, 2.0, 3.0]], {}, "x: symbols must be whole"),
    ([[0, 1, 2]], {}, "x: must be"),
    ([[0, 1, 2, 3]], {"width": 12}, "width: must be a multiple of 8"),
    ([[0, 1, 2, 3]], {"mask_block": 2}, "mask-block: must be from 0 to depth-1"),
    ([[0, 1, 2, 3]], {"mask_block": "Top"}, "mask-block: must be"),
    ([[0, 1, 2, 3]], {"online": True}, "online: needs a Grammar"),
    ([[0, 1, 2, 3]], {"target": "labels"}, "target: must be one of"),
    ([[0, 1, 2, 3]], {"preset": "transformer", "heads": 7}, "width: must be a multiple of heads"),
    ([[0, 1, 2, 3]], {"batch": 2**20, "width": 2**14}, "batch: a step of"),
    ([[0, 1, 2, 3]], {"width": 2**14, "hidden": 2**16}, "width: .* weights would need"),
])
def test_fit_of_data2vec_refuses_bad_input(x, settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        data2vec.fit(x, 4, 2, **settings)


@both
def test_same_seed_same_weights_and_the_global_generator_is_left_alone(preset):
    before, x = torch.random.get_rng_state(), drawn(1)[1][0]
    copy = x.clone()
    runs = [weights(data2vec.fit(x, 4, 2, "stacked", seed, **TINY[preset])) for seed in (5, 5, 6)]
    assert torch.equal(before, torch.random.get_rng_state()) and torch.equal(x, copy)
    assert equal(runs[0], runs[1]) and not equal(runs[0], runs[2])


def test_offline_repeats_p_strings_and_online_never():
    g, settings = Grammar.random(8, 2, 4, 4, 0), options(steps=150, batch=16)
    offline, online = g.sample(20, 3)[0], g
    steps = list(data2vec.batches([offline, online], 4, 2, [3, 3], settings, "cpu"))
    x = torch.stack([x for x, _ in steps], 1).flatten(1, 2)  # (2, 2400, T)
    assert x.shape == (2, 2400, 16) and x.dtype == torch.int64
    assert {tuple(row) for row in x[0].tolist()} == {tuple(row) for row in offline.tolist()}
    assert len(x[1].unique(dim=0)) > 2390


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
    stacked = []
    for signal, low, high in ((1.0, 0.99, 1.0), (0.0, 0.08, 0.17)):
        train, fresh = (signal * planted[y] + 0.1 * torch.randn(len(y), 32, generator=random) for y in (labels, test))
        right = (linear_probe(train, labels, 8)(fresh).argmax(1) == test).float().mean()
        assert low <= right <= high
        answer = data2vec.mlp_probe(train[None], labels[None], 8, steps=150, lr=2e-2)(fresh[None])
        assert low <= (answer[0] == test).float().mean() <= high
        stacked.append((train, fresh, answer[0]))
    train, fresh, answer = (torch.stack(parts) for parts in zip(*stacked))
    both_at_once = data2vec.mlp_probe(train, labels.expand(2, -1), 8, steps=150, lr=2e-2)(fresh)
    assert torch.equal(both_at_once, answer)


def oracle(g, level, raw):
    """Features that parse: the only map shows, at every position, a random vector per symbol of level `level`, or per
    level-(level-1) tuple if `raw`, which knows the tuple but not that it has synonyms."""
    size = g.v**g.s if raw else g.v
    vectors = torch.randn(size, 64, generator=torch.Generator().manual_seed(1))

    def features(x):
        levels = plain_parse(g, x, level)
        ids = levels[level].long()
        if raw:
            ids = tuple_codes(levels[level - 1].unflatten(1, (-1, g.s)), g.v)
        return [vectors[ids].repeat_interleave(g.s**level, 1)]

    return features


def plain_parse(g, x, level):
    """Levels of strings that may have no derivation above `level`, which is all that a swap on it needs."""
    levels = [x]
    for rules in g.rules[:level]:
        tuples = levels[-1].unflatten(1, (-1, g.s))
        found = (tuples[:, :, None] == rules.reshape(-1, g.s).to(x)).all(3)
        levels.append((found.int().argmax(2) // g.m).to(x.dtype))
    return levels


@pytest.mark.parametrize("level", [1, 2])
def test_unseen_synonym_accuracy_tells_knowing_a_level_from_looking_it_up(level):
    g, settings = Grammar.random(8, 2, 3, 3, 0), options(test_strings=1024)
    unseen, seen, collapsed = data2vec.unseen_synonyms(oracle(g, level, raw=False), g, 0, settings)
    assert unseen[level - 1] == 1 and seen[level - 1] == 1 and not collapsed[level - 1]
    unseen, seen, _ = data2vec.unseen_synonyms(oracle(g, level, raw=True), g, 0, settings)
    assert seen[level - 1] > 0.99 and unseen[level - 1] < 0.4
    levels = data2vec.sample_without(g, level, 0, 2048, 0, "cpu")
    codes = tuple_codes(levels[level - 1].unflatten(1, (-1, 2)), 8).unique().tolist()
    allowed = tuple_codes(g.rules[level - 1][:, 1:].flatten(0, 1), 8).tolist()
    assert sorted(codes) == sorted(allowed) and equal(g.parse(levels[0]), levels)
    with pytest.raises(ValueError, match="^m: must be 2 or more"):
        data2vec.unseen_synonyms(None, Grammar.random(8, 2, 1, 3, 0), 0, settings)


def test_best_of_several_maps_counts():
    """Two maps, one that knows level 1 and one of noise, are as good as the one."""
    g, settings = Grammar.random(8, 2, 3, 3, 0), options(test_strings=512)
    known, noise = oracle(g, 1, raw=False), torch.Generator().manual_seed(0)

    def features(x):
        maps = known(x)
        return [torch.randn(maps[0].shape, generator=noise), *maps]

    assert data2vec.unseen_synonyms(features, g, 0, settings)[0][0] == 1


def test_synonym_score_is_one_for_latents_and_about_zero_for_tuples(monkeypatch):
    g, settings = Grammar.random(8, 2, 3, 3, 0), options(test_strings=1024)
    monkeypatch.setattr(data2vec, "encode", lambda features, x: features(x))
    assert data2vec.synonym_scores(oracle(g, 1, raw=False), g, 0, settings)[0] == 1
    assert abs(data2vec.synonym_scores(oracle(g, 1, raw=True), g, 0, settings)[0]) < 0.1


def test_collapse_is_seen(monkeypatch):
    g = Grammar.random(8, 2, 3, 3, 0)
    x = g.sample(512, 1)[0]
    monkeypatch.setattr(data2vec, "encode", lambda features, x: features(x))
    constant = lambda x: [torch.ones(*x.shape, 16)]  # noqa: E731
    assert data2vec.unseen_synonyms(constant, g, 0, options(test_strings=512))[2] == [True, True]
    assert data2vec.spread(constant, x, 3)[0] < 1e-6
    vectors = torch.eye(8).repeat_interleave(8, 1) * 2 - 1  # eight patterns: rank at most 7
    std, rank = data2vec.spread(lambda x: [vectors[x.long()]], x, 3)
    assert std > 0.5 and 4 < rank <= 7.001


@both
def test_it_runs_alone(preset, tmp_path, monkeypatch, capsys):
    """The command line on a tiny run: a table, a trace, and weights that can be loaded."""
    flags = "--depth 3 --v 4 --m 2 --samples 50 --steps 2 --batch 8 --width 16 --hidden 16 --target several".split()
    flags += ["--preset", preset, "--trace", str(tmp_path / "trace.csv"), "--save", str(tmp_path / "encoder.pt")]
    monkeypatch.setattr(sys, "argv", ["data2vec.py", *flags, "--probe-strings", "100", "--test-strings", "100", "--probe-steps", "5"])
    data2vec.main()
    out = capsys.readouterr().out
    assert all(text in out for text in ("level 1", "level 2", "unseen synonyms", "MLP probe", "untrained"))
    header, *rows = (tmp_path / "trace.csv").read_text().splitlines()
    assert header == "step,loss,target std,rank,unseen 1,unseen 2,synonyms 1,synonyms 2" and len(rows) == 2
    x = Grammar.random(4, 2, 2, 3, 0).sample(50, 0)[0]
    model = data2vec.fit(x, 4, 2, "several", 0, preset=preset, steps=2, batch=8, width=16, hidden=16)
    assert equal(data2vec.load(tmp_path / "encoder.pt").features(x), model.features(x))


def test_trace_and_save_are_two_files_and_nothing_is_left_by_a_refusal(tmp_path, monkeypatch, capsys):
    for flags in (["--trace", "both", "--save", "./both"], ["--trace", "trace.csv", "--save", "NOWHERE/x.pt"]):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["data2vec.py", *flags])
        with pytest.raises(SystemExit) as end:
            data2vec.main()
        assert end.value.code == 2 and capsys.readouterr().err.startswith("data2vec.py: argument --save: ")
    assert not list(tmp_path.iterdir())


@every_target
def test_recover_keeps_the_sweeps_contract(target):
    """Two runs at once score as each alone, with the root and the floor of an untrained encoder."""
    grammars = drawn(2)[0]
    small = {**TINY["tree"], "probe_strings": 100, "test_strings": 100, "probe_steps": 5}
    scores = data2vec.recover(grammars, [32, 48], [0, 1], target, **small)
    assert scores[1] == data2vec.recover(grammars[1:], [48], [1], target, **small)[0]
    for score in scores:
        assert [len(part) for part in (score.accuracy, score.collapsed, score.floor)] == [3, 3, 3]
        assert all(isinstance(a, float) and 0 <= a <= 1 for a in score.accuracy + score.floor)
        assert all(isinstance(c, bool) for c in score.collapsed) and score.diverged == 0


def test_it_learns():
    """Level 1 of a small grammar, where an untrained encoder is near chance, in a few hundred steps."""
    g, small = Grammar.random(8, 2, 3, 3, 100), {"probe_steps": 5, "test_strings": 512}
    for target in ("latent", "token"):
        score = data2vec.recover([g], [1024], [100], target, steps=400, cooldown=0.25, **small)[0]
        assert score.floor[0] < 0.4 and score.accuracy[0] > 0.6



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
