"""
Everything against an oracle: brute force, a closed form, or the population limit computed from the rules.

    python -m pytest test_all.py
"""

import copy
import csv
import itertools
import json
import math
import os
import re
import shlex
import signal
import socket
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
from grammar import Grammar, accuracy, linear_probe, tuple_codes

HERE = Path(__file__).parent
SIZES = [(8, 2, 4, 3), (5, 3, 7, 3), (3, 2, 3, 4), (256, 4, 5, 2), (256, 2, 256, 2)]  # v s m L, f = 1 among them
torch.set_num_threads(1)


# ----------------------------------------------------------------------------------------
# grammar.py


@pytest.mark.parametrize("size", SIZES)
def test_rules_are_distinct_and_complete(size):
    v, s, m, L = size
    g = Grammar.random(*size, seed=1)
    assert len(g.rules) == L
    for rules in g.rules:
        assert rules.shape == (v, m, s) and int(rules.max()) < v
        tuples = set(map(tuple, rules.reshape(-1, s).tolist()))
        assert len(tuples) == v * m  # no tuple has two parents


def test_rules_are_uniform_over_tuples():
    # v m = 3 of v^s = 9 tuples, in every order: each is a rule of symbol 0 with chance 1/9
    used = torch.zeros(9)
    for seed in range(2000):
        a, b = Grammar.random(3, 2, 1, 2, seed).rules[0][0, 0].tolist()
        used[3 * a + b] += 1
    assert (used - 2000 / 9).abs().max() < 5 * (2000 / 9) ** 0.5


GOOD_RULES = [[[[0, 0], [0, 1]], [[1, 0], [1, 1]]]] * 2  # v = s = m = L = 2


@pytest.mark.parametrize("change, named", [
    ({"v": 1}, "v: "), ({"v": 257}, "v: "), ({"v": 2.0}, "v: "), ({"v": "2"}, "v: "),
    ({"s": 1}, "s: "), ({"s": 2**31}, "s: "), ({"v": 256, "s": 8}, "s: "),
    ({"m": 3}, "m: "), ({"m": 0}, "m: "), ({"m": True}, "m: "), ({"m": 10**5000}, "m: "),
    ({"L": 1}, "depth: "), ({"L": 25}, "depth: "), ({"L": 2**31}, "depth: "),
    ({"v": 256, "s": 7, "m": 2**31}, "m: "), ({"L": 3}, "rules: "),
    ({"rules": GOOD_RULES[:1]}, "rules: "), ({"rules": None}, "rules: "),
    ({"rules": {0: 1, 1: 2}}, "rules: level 0"), ({"rules": [[[[0]]]] * 2}, "rules: level 0"),
    ({"rules": torch.tensor(GOOD_RULES).double()}, "rules: "),
    ({"rules": np.array(GOOD_RULES) + 1}, "rules: level 0"),
    ({"rules": np.array(GOOD_RULES) - 1}, "rules: level 0"),
    ({"rules": [GOOD_RULES[0], [[[0, 0], [0, 1]], [[1, 0], [0, 0]]]]}, "rules: level 1"),
    ({"zipf": -1}, "zipf: "), ({"zipf": math.nan}, "zipf: "), ({"zipf": "1"}, "zipf: "),
])
def test_a_grammar_that_fits_nothing_is_refused(change, named):
    good = dict(v=2, s=2, m=2, L=2, rules=GOOD_RULES)
    assert Grammar(**good).rules[1].tolist() == GOOD_RULES[1]
    with pytest.raises(ValueError, match="^" + named) as error:
        Grammar(**(good | change))
    assert "\n" not in str(error.value)


def test_a_grammar_owns_its_rules():
    rules = torch.tensor(GOOD_RULES, dtype=torch.uint8)
    g = Grammar(2, 2, 2, 2, rules)
    rules[:] = 0
    assert g.rules[0].tolist() == GOOD_RULES[0]


@pytest.mark.parametrize("zipf", [0.0, 1.5])
@pytest.mark.parametrize("size", SIZES)
def test_parse_inverts_sample(size, zipf):
    g = Grammar.random(*size, seed=2, zipf=zipf)
    levels = g.sample(3000, seed=3)
    shapes = [(3000, g.s ** (g.L - l)) for l in range(g.L + 1)]
    assert [h.shape for h in levels] == shapes
    assert all(h.dtype == torch.uint8 for h in levels)
    assert all(map(torch.equal, g.parse(levels[0]), levels))
    assert not torch.equal(g.sample(3000, seed=4)[0], levels[0])
    assert [h.shape[0] for h in g.parse(levels[0][:0])] == [0] * (g.L + 1)


def test_samples_are_nested(monkeypatch):
    monkeypatch.setattr(grammar, "CHUNK_TOKENS", 256)
    g = Grammar.random(8, 2, 3, 3, seed=2)
    large = g.sample(1000, seed=3)
    for P in (1, 31, 32, 33, 999):
        assert all(torch.equal(a, b[:P]) for a, b in zip(g.sample(P, seed=3), large))


@pytest.mark.parametrize("m, zipf", [(1, 0), (2, 0), (3, 0), (4, 0), (11, 0), (128, 0), (3, 1.0)])
def test_every_rule_has_its_share(m, zipf):
    v, P = 128, 60000
    g = Grammar.random(v, 2, m, 2, seed=0, zipf=zipf)
    levels = g.sample(P, seed=1)
    code = tuple_codes(levels[1], v)  # of the one level-1 tuple
    used = (tuple_codes(g.rules[1], v).flatten()[None] == code[:2000, None]).sum(0)
    assert used.sum() == 2000
    # which rule each symbol picked, over both levels
    for l in (1, 2):
        tuples = levels[l - 1].unflatten(1, (-1, 2))[:, :, None]    # (P, n, 1, 2)
        small = slice(0, 4000)
        rules = g.rules[l - 1][levels[l][small].long()]             # (P, n, m, 2)
        picked = (rules == tuples[small]).all(3).flatten(0, 1).double().sum(0)
        n = picked.sum()
        p = (torch.arange(m).double() + 1) ** -zipf
        p = p / p.sum()
        assert torch.allclose(p, g.p)
        assert ((picked - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 1e-9).all()


def test_without_a_rule():
    g = Grammar.random(4, 2, 3, 3, seed=0)
    levels, other = g.sample(2000, 5), g.sample(2000, 5, without=2)
    assert all(map(torch.equal, levels[2:], other[2:]))  # the same draws above
    left_out, instead = g.rules[1][:, 0], g.rules[1][:, 1]
    tuples, theirs = (h[1].unflatten(1, (-1, 2)) for h in (levels, other))
    absent = (tuples == left_out[levels[2].long()]).all(2)
    assert absent.any() and torch.equal(theirs[~absent], tuples[~absent])
    assert torch.equal(theirs[absent], instead[levels[2].long()][absent])
    assert all(map(torch.equal, g.parse(other[0]), other))
    for wrong in [0, 4, 0.5, (1, 0)]:
        with pytest.raises(ValueError, match="^without"):
            g.sample(5, without=wrong)
    with pytest.raises(ValueError, match="^m: "):
        Grammar.random(4, 2, 1, 2).sample(5, without=1)


def strings_with_a_wrong_tuple():
    """A grammar and five of its strings, of which no rule explains tokens 4 and 5 of string 3."""
    g = Grammar.random(4, 2, 2, 3, seed=0)
    x = g.sample(5, 0)[0].clone()
    valid = set(map(tuple, g.rules[0].reshape(-1, 2).tolist()))
    wrong = next(t for t in itertools.product(range(4), repeat=2) if t not in valid)
    x[3, 4:6] = torch.tensor(wrong)
    return g, x


def test_parse_names_what_it_cannot_explain():
    g, x = strings_with_a_wrong_tuple()
    with pytest.raises(ValueError, match="string 3, level 0, position 4"):
        g.parse(x)
    x[2, 1] = 4
    with pytest.raises(ValueError, match="^x: must hold symbols 0..3"):
        g.parse(x)
    with pytest.raises(ValueError, match="shape"):
        g.parse(x[:2, :7])
    with pytest.raises(ValueError, match="whole"):
        g.parse(x.float())


def test_requests_that_cannot_be_met():
    g = Grammar.random(4, 2, 2, 3, seed=0)
    levels = g.sample(5)
    for named, call in [
        ("samples", lambda: g.sample(0)), ("samples", lambda: g.sample(2.5)),
        ("samples", lambda: g.sample(2**31 - 1)), ("seed", lambda: g.sample(1, -1)),
        ("seed", lambda: g.sample(1, 0.5)), ("seed", lambda: Grammar.random(4, 2, 2, 3, "a")),
        ("l", lambda: g.swap(levels, 0, "generic")), ("kind", lambda: g.swap(levels, 1, "x")),
        ("table", lambda: grammar.best_matching([[1.0, math.nan]])),
        ("table", lambda: grammar.best_matching([[1.0, math.inf]])),
        ("estimate", lambda: accuracy(levels[0].float(), levels[0], 4)),
        ("estimate", lambda: accuracy(levels[0].long() + 2**40, levels[0], 4)),
        ("truth", lambda: accuracy(levels[0], levels[0], 2)),
        ("x", lambda: grammar.as_strings([[0, 1, 2], [0]], 4, 2)),
        ("x", lambda: grammar.as_strings([[0, 1, 2, 300]], 256, 2)),
        ("x", lambda: grammar.as_strings(levels[0].double(), 4, 2)),
        ("s", lambda: grammar.as_strings(levels[0], 4, 1)),
        ("s", lambda: grammar.as_strings(levels[0], 256, 8)),
    ]:
        with pytest.raises(ValueError, match=f"^{named}: "):
            call()


@pytest.mark.parametrize("size", [(8, 2, 4, 4), (6, 3, 20, 3)])
@pytest.mark.parametrize("zipf", [0, 1.0])
def test_marginals_match_the_population(size, zipf):
    g, P = Grammar.random(*size, seed=5, zipf=zipf), 40000
    levels = g.sample(P, seed=6)
    for l, h in enumerate(levels):
        for n in range(h.shape[1]):
            p = g.marginal(l, n).numpy()
            seen = np.bincount(h[:, n], minlength=g.v) / P
            assert np.all(np.abs(seen - p) <= 5 * np.sqrt(p * (1 - p) / P) + 1e-12)


def every_string(g):
    """All derivations of a tiny grammar, level by level as in sample, and how likely each
    is."""
    levels = [torch.arange(g.v)[:, None]]
    chance = torch.full((g.v,), 1 / g.v, dtype=torch.float64)
    for rules in reversed(g.rules):
        h = levels[0]
        picks = list(itertools.product(range(g.m), repeat=h.shape[1]))
        picks = torch.tensor(picks)
        levels = [a.repeat_interleave(len(picks), 0) for a in levels]
        chance = chance.repeat_interleave(len(picks)) * g.p[picks].prod(1).repeat(len(h))
        levels.insert(0, rules.long()[levels[0], picks.repeat(len(h), 1)].flatten(1))
    return levels, chance


PAIRS = [(0, 0, 0, 2), (0, 0, 0, 3), (0, 1, 0, 0), (0, 3, 0, 4), (0, 2, 0, 0), (1, 0, 1, 2),
         (1, 0, 0, 5), (1, 1, 0, 0), (0, 2, 3, 0), (1, 1, 3, 0), (0, 1, 2, 0), (0, 0, 2, 1)]


@pytest.mark.parametrize("zipf", [0, 1.0])
def test_context_equals_brute_force_and_synonyms_share_it(zipf):
    g = Grammar.random(3, 2, 2, 3, seed=1, zipf=zipf)
    levels, chance = every_string(g)
    for l, t, target_level, n in PAIRS:
        tuples = levels[l].unflatten(1, (-1, g.s))[:, t]
        target = F.one_hot(levels[target_level][:, n], g.v).double() * chance[:, None]
        for a in range(g.v):
            for rule in g.rules[l][a]:  # every tuple on its own: the m synonyms must agree
                seen = target[(tuples == rule).all(1)].sum(0)
                seen = seen / seen.sum().clamp(min=1e-300)
                assert torch.allclose(seen, g.context(l, t, target_level, n)[a])
    with pytest.raises(ValueError, match="within"):
        g.context(1, 0, 0, 3)


@pytest.mark.parametrize("target", ["latent", "token", "root"])
def test_empirical_contexts_converge_at_the_root_rate(target):
    g = Grammar.random(8, 2, 3, 3, seed=7)
    target_level, n = {"latent": (1, 2), "token": (0, 4), "root": (3, 0)}[target]
    parent = g.context(1, 0, target_level, n)
    error = []
    for P in (2000, 32000):
        levels = g.sample(P, seed=8)
        h, root = levels[1], levels[3][:, 0]
        support = cluster.Support(h, g.v, g.s)
        tables = cluster.count(h, levels[0], root, support, target, "cousins")
        phi = cluster.contexts(tables[:1])
        truth = torch.zeros(len(support.codes), g.v, dtype=torch.float64)
        truth[support.ids(h)[:, 0]] = parent[levels[2][:, 0].long()]
        error.append((phi - truth).square().mean().sqrt().item() * P**0.5)
    assert 0.6 < error[1] / error[0] < 1.6  # sixteen times the samples, a quarter of it


@pytest.mark.parametrize("zipf", [0, 1.0])
def test_contrast_is_the_spread_of_contexts(zipf):
    # m = v, so that every symbol stands everywhere and no context is missing
    g = Grammar.random(4, 2, 4, 3, seed=3, zipf=zipf)
    found = g.contrast()
    a, b = torch.triu_indices(4, 4, 1)
    for l in range(2):
        grandparents = range(2 ** (g.L - l - 2))
        squares = {"latent": [], "token": [], "root": [], "joint": []}
        for i in range(2):
            cousin = 1 - i
            targets = {"latent": (l, range(2)), "token": (0, range(2 ** (l + 1))),
                       "joint": (l + 1, range(1))}
            for name, (level, inside) in targets.items():
                for e in inside:
                    joint = 0
                    for G in grandparents:  # pooled, each weighed by how likely it is
                        t, n = 2 * G + i, (2 * G + cousin) * len(inside) + e
                        p = g.marginal(l + 1, t)[:, None]
                        joint = joint + p * g.context(l, t, level, n)
                    phi = joint / joint.sum(1, keepdim=True)
                    squares[name].append((phi[a] - phi[b]).square().sum(1))
        for t in range(2 ** (g.L - l - 1)):
            phi = g.context(l, t, g.L, 0)
            squares["root"].append((phi[a] - phi[b]).square().sum(1))
        for name, values in squares.items():
            rms = torch.stack(values).mean().sqrt().item()
            assert found[name][l] == pytest.approx(rms, rel=1e-6), (name, l)


@pytest.mark.parametrize("size", [(3, 2, 2, 3), (3, 2, 3, 2), (2, 3, 3, 2)])
@pytest.mark.parametrize("zipf", [0, 1.5])
def test_posterior_equals_enumeration(size, zipf):
    g = Grammar.random(*size, seed=1, zipf=zipf)
    levels, chance = every_string(g)
    rng = np.random.default_rng(0)
    x = g.sample(12, 1)[0].long()
    visible = torch.from_numpy(rng.random(x.shape) < 0.5)
    visible[0], visible[1] = False, True
    x[~visible] = 77  # never read
    before = x.clone()
    found = g.posterior(x, visible)
    assert torch.equal(x, before)
    for p in range(len(x)):
        fits = (levels[0] == x[p])[:, visible[p]].all(1)
        weight = chance * fits
        for l in range(g.L + 1):
            one_hot = F.one_hot(levels[l], g.v).double()
            share = torch.einsum("d,dnv->nv", weight, one_hot) / weight.sum()
            assert torch.allclose(found[l][p], share)


@pytest.mark.parametrize("zipf", [0, 1.0])
def test_posterior_agrees_with_parse_context_and_marginal(zipf):
    g = Grammar.random(6, 3, 5, 3, seed=4, zipf=zipf)
    levels = g.sample(50, seed=2)
    everything = g.posterior(levels[0], torch.ones(27, dtype=torch.bool))
    for l, h in enumerate(levels):
        assert torch.allclose(everything[l], F.one_hot(h.long(), 6).double())
    nothing = g.posterior(levels[0], torch.zeros(50, 27, dtype=torch.bool))
    t = 4  # one level-0 tuple
    visible = torch.zeros(27, dtype=torch.bool)
    visible[3 * t : 3 * t + 3] = True
    one = g.posterior(levels[0].numpy(), visible)
    parent = levels[1][:, t].long()
    for l, n in [(0, 0), (0, 11), (0, 26), (1, 3), (1, 8), (2, 0), (2, 1), (3, 0)]:
        assert torch.allclose(nothing[l][:, n], g.marginal(l, n))
        assert torch.allclose(one[l][:, n], g.context(0, t, l, n)[parent])


def test_posterior_refuses_what_no_derivation_explains():
    g, x = strings_with_a_wrong_tuple()
    visible = torch.ones(8, dtype=torch.bool)
    with pytest.raises(ValueError, match="^x: string 3 has no derivation"):
        g.posterior(x, visible)
    for bad_x, bad_visible in [(x[:, :4], visible), (x, visible[:4]), (x, visible.int()),
                               (x.float(), visible), (x + 4, visible)]:
        with pytest.raises(ValueError, match="^(x|visible): "):
            g.posterior(bad_x, bad_visible)


@pytest.mark.parametrize("zipf", [0, 1.0])
@pytest.mark.parametrize("kind", ["synonym", "generic"])
def test_swap_draws_any_other_tuple_with_its_chance(kind, zipf):
    g, P = Grammar.random(3, 2, 3, 2, seed=1, zipf=zipf), 30000
    one = [h[:1].expand(P, -1) for h in g.sample(1, 0)]  # one string, many times
    swapped, node = g.swap(one, 1, kind, seed=2)
    codes = tuple_codes(g.rules[0].flatten(0, 1), 3)
    for n in range(2):
        tuples = swapped[0].unflatten(1, (-1, 2))[node == n, n]
        number = (tuple_codes(tuples, 3)[:, None] == codes).int().argmax(1)
        seen = torch.bincount(number, minlength=9).double()
        old = int((tuple_codes(one[0][0, 2 * n : 2 * n + 2], 3) == codes).int().argmax())
        p = (g.p / 3).repeat(3)
        if kind == "synonym":
            p[torch.arange(9) // 3 != old // 3] = 0
        p[old] = 0
        p = p / p.sum()
        wrong = (seen - seen.sum() * p).abs() - 5 * (seen.sum() * p * (1 - p)).sqrt()
        assert (wrong <= 1e-9).all()


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 3), (5, 5), (6, 6), (6, 4), (3, 6)])
def test_matching_equals_brute_force(rows, columns):
    random = np.random.default_rng(rows * 10 + columns)
    for turn in range(40):
        table = random.integers(0, 9, (rows, columns))
        table = table if turn < 30 else random.normal(size=(rows, columns))
        small = table if rows <= columns else table.T
        best = max(
            sum(small[i, j] for i, j in enumerate(p))
            for p in itertools.permutations(range(small.shape[1]), small.shape[0])
        )
        assert grammar.best_matching(table) == pytest.approx(best, abs=1e-12)


def test_accuracy():
    truth = torch.tensor([[0, 1, 2], [2, 1, 0]])
    assert accuracy((truth + 1) % 3, truth, 3) == 1  # names of clusters don't matter
    some = torch.tensor([[7, 1, -1], [2, 1, 7]])
    assert accuracy(some, truth, 3) == pytest.approx(5 / 6)  # unknown is wrong
    assert accuracy(torch.full((2, 3), -1), truth, 3) == 0
    assert accuracy(truth[:0], truth[:0], 3) == 0
    with pytest.raises(ValueError, match="shape"):
        accuracy(truth[:1], truth, 3)


def test_the_probe_reads_what_is_linear():
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (500,), generator=random)
    features = F.one_hot(labels, 4).float() @ torch.randn(4, 6, generator=random) + 3
    assert torch.equal(linear_probe(features, labels, 4)(features).argmax(1), labels)


@pytest.mark.parametrize("n, d", [(10, 40), (40, 10)])
def test_the_probe_is_ridge_regression(n, d):
    random = torch.Generator().manual_seed(0)
    features, new = torch.randn(n, d, generator=random), torch.randn(5, d, generator=random)
    labels = torch.randint(4, (n,), generator=random)
    x, y = features.double(), F.one_hot(labels, 4).double()
    x, y = x - x.mean(0), y - y.mean(0)
    weight = (x.T @ x / n + grammar.RIDGE * torch.eye(d)).inverse() @ x.T @ y / n
    expected = (new - features.mean(0)).double() @ weight + F.one_hot(labels, 4).double().mean(0)
    assert torch.allclose(linear_probe(features, labels, 4)(new).double(), expected, atol=1e-4)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:1", "", 7])
def test_a_device_that_is_not_there_is_one_line(device):
    g = Grammar.random(4, 2, 2, 2, 0)
    small = {"samples": [10], "seeds": [0], "device": device}
    for work in (lambda: g.sample(10, 0, device), lambda: data2vec.fit(g, 4, 2, device=device),
                 lambda: predictor.fit(g, 4, 2, device=device),
                 *(lambda learner=learner: learner.recover([g], **small) for learner in (cluster, predictor, data2vec))):
        with pytest.raises(ValueError, match="^device: must be cpu.* on this machine$"):
            work()


def test_load_reads_what_save_wrote_and_arrays_from_elsewhere(tmp_path):
    g = Grammar.random(6, 3, 5, 3, seed=4, zipf=0.5)
    path = tmp_path / "one.npz"
    grammar.save_strings(path, g, g.sample(7))
    for other, arrays in [("two.npz", [rule.long().numpy() for rule in g.rules]),
                          ("three.npy", np.stack([rule.numpy() for rule in g.rules]))]:
        save = np.save if other.endswith("npy") else lambda file, a: np.savez(file, *a)
        save(tmp_path / other, arrays)
        loaded = Grammar.load(tmp_path / other)
        assert all(map(torch.equal, loaded.rules, g.rules))
    again = Grammar.load(path)
    assert repr(again) == repr(g) and all(map(torch.equal, again.rules, g.rules))
    with np.load(path) as file:
        assert torch.equal(torch.from_numpy(file["level0"]), g.sample(7)[0])


def test_load_refuses_what_is_no_grammar(tmp_path):
    good = np.array(GOOD_RULES)
    bad = {"text": "hello", "dict": {"rules0": good[0]}, "one": good[0][:1], "float": good / 2,
           "flat": good.reshape(-1), "short": good[:1],
           "twice": good * 0, "gap": None}
    for name, value in bad.items():
        path = tmp_path / name
        with open(path, "wb") as file:
            if name == "text":
                file.write(b"hello")
            elif name == "gap":
                np.savez(file, rules0=good[0], rules2=good[1])
            else:
                np.save(file, value, allow_pickle=True)
        with pytest.raises(ValueError, match="^load: ") as error:
            Grammar.load(path)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="^load: .*No such file"):
        Grammar.load(tmp_path / "missing")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path, link = tmp_path / "kept", tmp_path / "link"
    grammar.write_whole(path, lambda file: file.write(b"old"))

    def half(file):
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grammar.write_whole(path, half)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    link.symlink_to(path)
    grammar.write_whole(link, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and link.is_symlink()
    with pytest.raises(OSError, match="not a file"):
        grammar.write_whole(tmp_path, half)

    def slowly(file):  # another one writes the file meanwhile
        grammar.write_whole(path, lambda other: other.write(b"theirs"))
        file.write(b"mine")

    grammar.write_whole(path, slowly)
    assert path.read_bytes() == b"mine" and set(tmp_path.iterdir()) == {path, link}


TABLE = (
    grammar.Setting("rate", grammar.real(0, 1), 0.5, 0.1, "a rate"),
    grammar.Setting("steps", grammar.whole(1, 9), 3, None, "how many"),
    grammar.Setting("how_much", grammar.choice("some", "all"), "all", None, "which"),
    grammar.Setting("ema", grammar.switch, True, False, "on or off"),
)
CHOICES = {"ours": {"steps": 4}, "paper": grammar.paper_preset(TABLE)}


def test_settings_are_defaults_then_preset_then_given():
    read = lambda **given: vars(grammar.read_settings(TABLE, CHOICES, given))
    assert read() == {"rate": 0.5, "steps": 4, "how_much": "all", "ema": True}
    paper = {"rate": 0.1, "steps": 3, "how_much": "some", "ema": False}
    assert read(preset="paper", how_much="some") == paper
    assert read(rate=np.float64(0.25), steps=np.int64(2))["rate"] == 0.25
    for given in [{"rate": 2}, {"rate": math.nan}, {"steps": 2.0}, {"steps": True}, {"ema": 1},
                  {"steps": "²"}, {"steps": 10**5000}, {"how_much": "Some"}, {"rates": 0.5},
                  {"preset": "theirs"}]:
        name = next(iter(given)).replace("_", "-")
        with pytest.raises(ValueError, match=f"^{name}: ") as error:
            read(**given)
        assert "\n" not in str(error.value)


def test_flags_and_python_read_a_setting_alike():
    parser = grammar.Parser("")
    grammar.add_settings(parser, TABLE, CHOICES)
    args = parser.parse_args("--rate 0.25 --ema --how-much some --preset paper".split())
    given = grammar.given_settings(TABLE, args)
    assert given == {"preset": "paper", "rate": 0.25, "how_much": "some", "ema": True}
    assert grammar.given_settings(TABLE, parser.parse_args([])) == {}


@pytest.mark.parametrize("command, named", [
    ("--depth 2147483647", "--depth"), ("--depth 24 --samples 2147483647", "--samples"),
    ("--v 256 --s 7 --m 2147483647", "--m"), ("--m ²", "--m"), ("--m " + "1" * 5000, "--m"),
    ("--m +-5", "--m"), ("--save=", "--save"), ("--save .", "--save"), ("--zipf nan", "--zipf"),
    ("--save no/such/folder.npz", "--save"), ("--seeds 3", "--seeds"),
    ("--save a.npz --bench", "--bench"), ("--load README.md", "--load"),
    ("--contrast --depth 24 --v 256", "--depth"), ("--samples 0", "--samples"),
])
def test_grammar_refuses_in_one_line(command, named, capsys, monkeypatch):
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(sys, "argv", ["grammar.py", *command.split()])
    start = time.time()
    with pytest.raises(SystemExit) as error:
        grammar.main()
    told = capsys.readouterr()
    assert error.value.code == 2 and told.out == "" and time.time() - start < 1
    assert told.err.startswith(f"grammar.py: argument {named}: ") and told.err.count("\n") == 1


def test_the_script_draws_a_derivation(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", "grammar.py --v 2 --m 1 --depth 2 --seed 1".split())
    grammar.main()
    lines = capsys.readouterr().out.splitlines()
    g = Grammar.random(2, 2, 1, 2, seed=1)
    levels = g.sample(1, 1)
    for rule in g.rules[1][:, 0].tolist():
        assert any(line.endswith("-> {} {}".format(*rule)) for line in lines)
    drawn = [line.split()[2:] for line in lines if re.match("level [0-9]  ", line)]
    assert drawn == [list(map(str, h[0].tolist())) for h in reversed(levels)]


def test_a_reader_that_has_gone_is_no_error():
    command = f"{sys.executable} grammar.py --depth 3 | head -1"
    words = ["bash", "-c", command]
    broken = subprocess.run(words, cwd=HERE, capture_output=True, text=True, timeout=120)
    assert broken.stdout.startswith("level 3 -> 2") and broken.stderr == ""


def test_a_script_runs_with_its_outputs_closed(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    grammar.run_script(lambda: print("nobody reads it", file=sys.stderr))


@pytest.mark.parametrize("ending, code, line", [
    (KeyboardInterrupt(), 130, "stopped"), (MemoryError(), 1, "out of memory"),
    (OSError(28, "No space left on device", "a.npz"), 1, "a.npz: No space left on device"),
])
def test_what_ends_a_script_from_outside_is_one_line(ending, code, line, capsys):
    def main():
        raise ending

    with pytest.raises(SystemExit) as error:
        grammar.run_script(main)
    told = capsys.readouterr().err
    assert error.value.code == code and line in told and told.strip().count("\n") == 0


def test_contrast_as_a_script(tmp_path, capsys, monkeypatch):
    path = tmp_path / "contrast.csv"
    words = f"grammar.py --depth 4 --m 3 --contrast --seeds 3 --csv {path}"
    monkeypatch.setattr(sys, "argv", words.split())
    grammar.main()
    assert "latent" in capsys.readouterr().out
    rows = list(csv.DictReader(open(path)))
    assert list(rows[0]) == "v s m L zipf seeds target level contrast P_noise".split()
    assert len(rows) == 4 * 3 and {row["seeds"] for row in rows} == {"3"}
    squares = [Grammar.random(8, 2, 3, 4, seed).contrast()["token"][2] ** 2 for seed in range(3)]
    row = next(row for row in rows if row["target"] == "token" and row["level"] == "3")
    assert float(row["contrast"]) == pytest.approx(np.mean(squares) ** 0.5, rel=1e-4)
    assert float(row["P_noise"]) == pytest.approx(24 / np.mean(squares), rel=1e-4)


# ----------------------------------------------------------------------------------------
# cluster.py

POSITIONS = ("all", "cousins", "element")


@pytest.mark.parametrize("target", cluster.TARGETS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_count_equals_a_loop(target, positions, monkeypatch):
    monkeypatch.setattr(cluster, "CHUNK_TOKENS", 64)  # several chunks
    g, s, l = Grammar.random(3, 3, 4, 3, seed=0), 3, 1
    levels = g.sample(30, seed=0)
    x, h, root = levels[0], levels[l], levels[-1][:, 0]
    support = cluster.Support(h, g.v, s)
    K, ids = len(support.codes), support.ids(h)
    loop = {}
    for p, t in itertools.product(range(len(h)), range(ids.shape[1])):  # every tuple
        i, cousins = t % s, [t - t % s + j for j in range(s) if j != t % s]
        if target == "root":
            seen = [root[p]]
            i = t
        elif target == "joint":
            seen = [ids[p, j] for j in cousins]
        else:
            below, width = (h, s) if target == "latent" else (x, s ** (l + 1))
            seen = [below[p, j * width + k] for j in cousins for k in range(width)]
        if positions != "all" and t > 0:
            continue
        for k, symbol in enumerate(seen[:1] if positions == "element" else seen):
            key = (i, k, int(ids[p, t]), int(symbol))
            loop[key] = loop.get(key, 0) + 1
    tables = cluster.count(h, x, root, support, target, positions)
    per_position = len({key[1] for key in loop})
    assert tables.sum() == sum(loop.values()) and tables.shape[1] == K
    assert all(tables[i * per_position + k, a, b] == n for (i, k, a, b), n in loop.items())


@pytest.mark.parametrize("v, s, m, seed", [(8, 2, 3, 0), (8, 2, 4, 1), (4, 3, 4, 2)])
@pytest.mark.parametrize("target", cluster.TARGETS)
def test_every_target_recovers_every_level(v, s, m, seed, target):
    g = Grammar.random(v, s, m, 3, seed)
    (score,) = cluster.recover([g], [60000], [seed], target)
    assert score.accuracy == [1, 1] and score.collapsed == [False, False]
    assert score.floor is None and score.diverged == 0


def test_token_fails_where_latent_succeeds():
    g = Grammar.random(8, 2, 4, 4, seed=1)
    latent, token = (cluster.recover([g], [4096], [1], t)[0] for t in ("latent", "token"))
    assert min(latent.accuracy) > 0.99 and token.accuracy[-1] < 0.75


def test_recover_is_one_score_for_each_run():
    grammars = [Grammar.random(8, 2, 4, 3, seed, zipf=0.3) for seed in range(3)]
    together = cluster.recover(grammars, [64, 512, 4096], [5, 6, 7], positions="cousins")
    alone = [cluster.recover([g], [P], [seed], positions="cousins")[0]
             for g, P, seed in zip(grammars, [64, 512, 4096], [5, 6, 7])]
    assert together == alone and together[2].accuracy[0] > together[0].accuracy[0]
    with pytest.raises(ValueError):
        cluster.recover(grammars, [64], [5, 6, 7])


def test_scrambled_strings_teach_nothing():
    g = Grammar.random(8, 2, 4, 3, seed=0)
    x, truth = g.sample(20000, 0)[0], g.sample(4096, (0, 1))
    order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))
    mixed = x.flatten()[order].view_as(x)
    assert accuracy(cluster.fit(x, 8, 2).label(truth[0])[1], truth[1], 8) == 1
    # below is the best of 8! matchings of noise
    assert accuracy(cluster.fit(mixed, 8, 2).label(truth[0])[1], truth[1], 8) < 0.6


def test_unseen_tuples_are_unknown_and_so_is_all_above(monkeypatch):
    g = Grammar.random(8, 2, 4, 3, seed=0)
    x, fresh = g.sample(12, 0)[0], g.sample(500, 1)[0]
    tree = cluster.fit(x, 8, 2)
    seen = set(map(tuple, x.reshape(-1, 2).tolist()))
    pairs = fresh.unflatten(1, (-1, 2))
    known = torch.tensor([[tuple(t) in seen for t in row] for row in pairs.tolist()])
    levels = tree.label(fresh)
    assert torch.equal(levels[0], fresh)
    assert torch.equal(levels[1] >= 0, known) and not known.all()
    assert (levels[2][~known.unflatten(1, (-1, 2)).all(2)] == -1).all()
    monkeypatch.setattr(cluster, "DENSE_TUPLES", 0)  # a search numbers the tuples alike
    assert all(map(torch.equal, cluster.fit(x, 8, 2).label(fresh), levels))


@pytest.mark.parametrize("target", cluster.TARGETS)
@pytest.mark.parametrize("form", [torch.int64, torch.int32, torch.int16, "array", "lists"])
def test_any_whole_numbers_do_and_none_are_written_to(target, form):
    levels = Grammar.random(8, 2, 4, 3, seed=0).sample(40, 0)
    x, root = levels[0], levels[3][:, 0]
    wanted = cluster.fit(x, 8, 2, target, root=root).label(x)

    def change(a):
        if form == "array":
            return a.numpy().astype(np.int64)
        return a.tolist() if form == "lists" else a.to(form)

    given, labels = change(x), change(root)
    tree = cluster.fit(given, 8, 2, target, root=labels)
    assert all(map(torch.equal, tree.label(given), wanted))
    assert torch.equal(torch.as_tensor(given).byte(), x)
    assert torch.equal(torch.as_tensor(labels).byte(), root)


def test_same_seed_same_tree_whatever_the_global_generator():
    x = Grammar.random(8, 2, 4, 3, seed=0).sample(1000, 0)[0]
    torch.manual_seed(1)
    a = cluster.fit(x, 8, 2, seed=3)
    torch.manual_seed(2)
    b = cluster.fit(x, 8, 2, seed=3)
    assert all(map(torch.equal, a.symbols, b.symbols))
    assert repr(a) == "Tree(v=8, s=2, L=3, target='latent', tuples=[32, 32])"


def test_kmeans_finds_planted_clusters_and_the_best_partition():
    random = torch.Generator().manual_seed(0)
    centers = torch.randn(6, 5, generator=random) * 3
    truth = torch.arange(6).repeat_interleave(20)
    X = centers[truth] + 0.3 * torch.randn(120, 5, generator=random)
    labels, inertia = cluster.kmeans(X, 6, random, 8)
    assert accuracy(labels[0], truth, 6) == 1 and inertia[0] == inertia.min()
    means = torch.stack([X[truth == a].mean(0) for a in range(6)])
    planted = (X - means[truth]).square().sum().item()
    assert inertia[0].item() == pytest.approx(planted, rel=1e-4)
    X = torch.rand(9, 2, generator=random)  # no structure: against all 3^9 partitions
    member = F.one_hot(torch.cartesian_prod(*[torch.arange(3)] * 9), 3).float()
    means = member.mT @ X / member.sum(1)[:, :, None].clamp(min=1)
    best = (X - member @ means).square().sum((1, 2)).min().item()
    assert cluster.kmeans(X, 3, random, 8)[1][0].item() == pytest.approx(best, rel=1e-4)
    assert cluster.kmeans(X[:2], 3, random, 8)[0].max() == 1  # fewer points than clusters


def test_distances():
    random = torch.Generator().manual_seed(0)
    X, C = torch.randn(7, 3, generator=random), torch.randn(2, 4, 3, generator=random)
    wanted = torch.cdist(X.expand(2, -1, -1), C).square()
    assert torch.allclose(cluster.distances(X, C), wanted, atol=1e-5)


def test_exact_pair_tables_are_grouped_by_parent():
    g = Grammar.random(8, 2, 3, 3, seed=0)
    p = torch.full((8,), 1 / 8, dtype=torch.float64)
    pairs = torch.stack([g.siblings(2, i, 1 - i, p) for i in range(2)])  # of the parents
    tables = 1e6 * pairs.repeat_interleave(3, 1).repeat_interleave(3, 2)  # of the tuples
    labels = cluster.cluster_pairs(tables, 8, torch.Generator().manual_seed(0))
    assert accuracy(labels, torch.arange(24) // 3, 8) == 1


def test_the_paper_preset_counts_one_position():
    g = Grammar.random(8, 2, 4, 3, seed=0)
    x = g.sample(500, 0)[0]
    paper, same, ours = (cluster.fit(x, 8, 2, **given).symbols for given in
                         ({"preset": "paper"}, {"positions": "cousins"}, {}))
    assert all(map(torch.equal, paper, same)) and not torch.equal(paper[0], ours[0])


@pytest.mark.parametrize("change, named", [
    ({"x": "short"}, "x"), ({"x": "empty"}, "x"), ({"x": "float"}, "x"), ({"v": 3}, "x"),
    ({"s": 3}, "x"), ({"s": 1}, "s"), ({"v": 300}, "v"), ({"target": "leaf"}, "target"),
    ({"target": "root", "root": None}, "root"), ({"target": "root", "root": [0]}, "root"),
    ({"target": "root", "root": [4] * 10}, "root"), ({"target": "root", "root": [-1] * 10}, "root"),
    ({"target": "root", "root": [0.5] * 10}, "root"), ({"seed": -1}, "seed"),
    ({"positions": "most"}, "positions"), ({"restarts": 0}, "restarts"), ({"rounds": 2.5}, "rounds"),
    ({"context": "all"}, "context"), ({"preset": "theirs"}, "preset"),
])
def test_fit_refuses_bad_input(change, named):
    x = Grammar.random(4, 2, 2, 3, seed=0).sample(10, 0)[0]
    forms = {"short": x[:, :6], "empty": x[:0], "float": x.float()}
    given = {"x": x, "v": 4, "s": 2} | change
    given["x"] = forms.get(change.get("x"), x)
    with pytest.raises(ValueError, match=f"^{named}: ") as error:
        cluster.fit(**given)
    assert "\n" not in str(error.value)


def test_label_checks_as_fit_does():
    x = Grammar.random(4, 2, 2, 3, seed=0).sample(10, 0)[0]
    tree = cluster.fit(x, 4, 2)
    for wrong in (x.float(), x + 4, x[:, :4], x[0], torch.cat([x, x], 1)):
        with pytest.raises(ValueError, match="^x: "):
            tree.label(wrong)


@pytest.mark.parametrize("command, named", [
    ("--depth 24 --samples 1", "--depth"), ("--depth 2147483647", "--depth"),
    ("--samples 2147483647", "--samples"), ("--restarts 0", "--restarts"), ("--m 9", "--m"),
    ("--v 256 --m 256 --target joint --samples 1000000", "--m"), ("--target leaf", "--target"),
    ("--v 256 --m 256 --samples 1000000", "--restarts"), ("--positions most", "--positions"),
    ("--v 256 --m 256 --depth 16 --target root", "--depth"), ("--context all", ""),
])
def test_cluster_refuses_in_one_line(command, named, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cluster.py", *command.split()])
    start = time.time()
    with pytest.raises(SystemExit) as error:
        cluster.main()
    told = capsys.readouterr()
    assert error.value.code == 2 and told.out == "" and time.time() - start < 1
    assert told.err.count("\n") == 1 and named in told.err


def test_the_script_shows_what_recover_scores(capsys, monkeypatch):
    words = "cluster.py --depth 3 --samples 300 --m 4 --seed 2 --positions cousins --zipf 0.5"
    monkeypatch.setattr(sys, "argv", words.split())
    cluster.main()
    shown = capsys.readouterr().out
    g = Grammar.random(8, 2, 4, 3, seed=2, zipf=0.5)
    (score,) = cluster.recover([g], [300], [2], positions="cousins")
    for level, right in enumerate(score.accuracy, 1):
        assert re.search(rf"^ +{level} .* {right:.3f}$", shown, re.M)


# ----------------------------------------------------------------------------------------------------------------------
# predictor.py


def small_network(s, L, d=4, target="latent", elements="all", R=1, seed=0):
    network = predictor.Network(R, s, d, 8, predictor.heads_of(target, elements, s, L))
    network.draw([torch.Generator().manual_seed(seed + r) for r in range(R)])
    return network


def small_draw(g, strings=64):
    """One step's random numbers for one run on a grammar's strings."""
    x = [g.sample(strings, 1)[0]]
    options = predictor.read_options(g.v, "latent", {"batch": strings})
    return next(predictor.draws(x, g.s, g.L, options, [torch.Generator().manual_seed(0)], "cpu"))


def small_losses(g, student, teacher, target="latent", **settings):
    """The losses of one run, as a list: of prediction, then of clustering."""
    options = predictor.read_options(g.v, target, {"gate": 0.0} | settings)
    draw = small_draw(g)
    wanted = [h.detach() for h in teacher(draw[0])[1]]
    parts = predictor.losses(student, wanted, draw, options)
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
    return all(torch.equal(a[name].nan_to_num(7), b[name].nan_to_num(7)) for name in a)  # a NaN equals a NaN


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
    x = small_draw(g)[0]
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
        own = student(draw[0])[1]
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


def test_two_different_tuples_of_every_string_are_chosen():
    g = Grammar.random(4, 2, 2, 4, seed=0)
    chosen = small_draw(g, 500)[1]  # one run, three modules, 8, 4 and 2 tuples in a string
    for l, n in enumerate([8, 4, 2]):
        first, second = chosen[0, l].view(2, 500)
        assert (first != second).all()
        assert torch.equal(first // n, torch.arange(500)) and torch.equal(second // n, torch.arange(500))
    pairs = torch.bincount(chosen[0, 1].view(2, 500).T.remainder(4) @ torch.tensor([4, 1]), minlength=16)
    expected = 500 / 12
    assert (pairs[pairs > 0] - expected).abs().max() < 5 * expected**0.5 and (pairs > 0).sum() == 12


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
    runs = predictor.fit_many([x, scrambled, g], 6, 2, seeds=[0, 0, 0], steps=250)
    found = [predictor.score(run, g.sample(64, 0), g.sample(1024, (0, 1)))[0][0] for run in runs]
    assert found[0] > 0.95 and found[1] < 0.8 and found[2] > 0.95  # the third on always fresh strings


def test_recover_of_predictor_keeps_the_sweeps_contract():
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
    saved["predictor"]["v"] = 300
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
    assert all(text in out for text in ("symbols in use", "linear probe", "codes=128"))
    header, *rows = (tmp_path / "trace.csv").read_text().splitlines()
    assert header == "step,accuracy 1,prediction 1,accuracy 2,prediction 2,v,m,P"
    assert len(rows) == 2 and rows[0].endswith(",4,2,50")
    assert predictor.load("a.pt").target == "latent"


def test_a_predictor_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    """Two runs beside each other, one of which has diverged by then."""
    xs, file = eight_runs()[:2], tmp_path / "run"
    monkeypatch.setattr(grammar, "SAVE_EVERY", 0)
    monkeypatch.setattr(predictor, "BLOCK", 3)

    def poison(step, steps, network, prediction):
        if step == 2:
            network.layers[0].predict[0].weight.data[1, 0, 0] = math.nan

    def stop(step, *rest):
        poison(step, *rest)
        if step == 8:
            raise KeyboardInterrupt

    whole = predictor.fit_many(xs, 8, 2, "latent", [0, 1], poison, steps=13)
    with pytest.raises(KeyboardInterrupt):
        predictor.fit_many(xs, 8, 2, "latent", [0, 1], stop, resume=file, steps=13)
    assert torch.load(file, weights_only=True)["step"] == 6
    again = predictor.fit_many(xs, 8, 2, "latent", [0, 1], poison, resume=file, steps=13)
    ended = predictor.fit_many(xs, 8, 2, "latent", [0, 1], resume=file, steps=13)
    assert all(map(same_weights, whole, again)) and all(map(same_weights, whole, ended))
    assert [run.diverged for run in again] == [run.diverged for run in ended] == [0, 3]
    state = file.read_bytes()
    for change in ({"target": "token"}, {"seeds": [0, 2]}, {"steps": 14}, {"xs": xs[::-1]}):
        more = {"xs": xs, "target": "latent", "seeds": [0, 1], "steps": 13} | change
        with pytest.raises(ValueError, match="^resume: .* is of another run: .* there, .* here$"):
            predictor.fit_many(v=8, s=2, resume=file, **more)
    with pytest.raises(ValueError, match="^resume: is for runs that train in one loop"):
        predictor.fit_many([xs[0], xs[1][:20]], 8, 2, seeds=[0, 1], resume=file, epochs=4)
    assert file.read_bytes() == state


def test_a_trace_goes_on_where_its_run_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grammar, "SAVE_EVERY", 0)
    monkeypatch.setattr(predictor, "BLOCK", 2)
    flags = "predictor.py --depth 2 --v 4 --m 2 --samples 50 --steps 5 --device cpu --trace trace --resume run"
    monkeypatch.setattr(sys, "argv", flags.split())
    predictor.main()
    table, trace = capsys.readouterr().out, Path("trace").read_text()
    fit = predictor.fit

    def stopped(x, v, s, target, seed, watch, resume, **settings):
        def stop(step, *rest):
            watch(step, *rest)
            if step == 3:
                raise KeyboardInterrupt

        return fit(x, v, s, target, seed, watch=stop, resume=resume, **settings)

    os.remove("run")
    monkeypatch.setattr(predictor, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        predictor.main()
    with open("trace", "a") as file:
        file.write("4,0.1")  # a row that a kill cut short
    monkeypatch.setattr(predictor, "fit", fit)
    predictor.main()
    assert Path("trace").read_text() == trace and capsys.readouterr().out == table


@pytest.mark.parametrize("flags", [
    "--save x --trace x", "--resume x --save x", "--save no/x --trace x", "--trace no/x", "--codes 3 --trace x", "--hidden 999999999",
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


def streams(seeds):
    return [(data2vec.stream(seed, 1), data2vec.stream(seed, 2)) for seed in seeds]


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
    seen, build = [], data2vec.ENCODERS["tree"]

    def watched(*arguments):
        encoder = build(*arguments)
        encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        return encoder

    monkeypatch.setitem(data2vec.ENCODERS, "tree", watched)
    _, xs = drawn(2)
    data2vec.fit_many(xs, 4, 2, "latent", [0, 1], **TINY["tree"])
    steps = data2vec.batches(xs, 3, 2, [0, 1], streams([0, 1]), options(**TINY["tree"]))
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
    losses, v = [], 4
    data2vec.fit_many(xs, v, 2, target, [4, 5, 6], lambda step, steps, network, loss: losses.append(loss), **vars(settings))
    x, hidden = next(data2vec.batches(xs, 3, 2, [4, 5, 6], streams([4, 5, 6]), settings))

    def standard(h):
        return (h - h.mean()) / (h.var(correction=0) + 1e-5) ** 0.5

    def huber(a, b):
        gap = (a - b).abs()
        return torch.where(gap < 4, gap**2 / 8, gap - 2).mean()

    for r, seed in enumerate((4, 5, 6)):
        start = [data2vec.stream(seed, 0)]
        encoder = data2vec.initialise(data2vec.ENCODERS[preset](1, v, 2, 3, settings), start)
        sizes = [8] if target == "token" else [16] * (1 if target == "latent" else 2)  # 4 tokens, in a multiple of 8
        heads = [data2vec.initialise(data2vec.Linear(1, 16, size), start) for size in sizes]
        maps = [[data2vec.pool(h, 8)[0] for h in encoder(tokens[r : r + 1])[-2:]]
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

    def watch(step, steps, teacher, loss):
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
    with pytest.raises(FloatingPointError, match="^step [0-9]+: the loss is not finite; lower lr or decay$"):
        data2vec.fit(g.sample(50)[0], 4, 2, **wild)
    score = data2vec.recover([g], [50], [0], **wild, probe_strings=50, test_strings=50, probe_steps=5)[0]
    assert score.accuracy == [0.0, 0.0, 0.0] and score.diverged > 1 and len(score.floor) == 3
    flags = "--depth 3 --v 4 --m 2 --samples 50 --steps 300 --batch 8 --width 16 --hidden 24 --lr 1 --decay 10"
    flags += f" --warmup 1 --probes 100 --probe-strings 50 --probe-steps 5 --test-strings 50 --trace {tmp_path / 'trace.csv'}"
    monkeypatch.setattr(sys, "argv", ["data2vec.py", *flags.split()])
    with pytest.raises(SystemExit) as end:
        data2vec.main()
    assert end.value.code == 1 and capsys.readouterr().err.strip().splitlines()[-1].startswith("data2vec.py: step ")
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
    assert equal(loaded.network.heads.parameters(), model.network.heads.parameters())
    for name, content in (("text", b"hello"), ("empty", b""), ("other", None)):
        file = tmp_path / name
        torch.save({"v": 8}, file) if content is None else file.write_bytes(content)
        with pytest.raises(ValueError, match="^file: .* was not written by data2vec.py"):
            data2vec.load(file)


@pytest.mark.parametrize("x, settings, message", [
    ([[0, 1, 2, 4]], {}, "x: must hold symbols 0..3"),  # 4 is the number of a hidden token
    ([[0.0, 1.0, 2.0, 3.0]], {}, "x: must hold whole numbers"),
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
    steps = list(data2vec.batches([offline, online], 4, 2, [3, 3], streams([3, 3]), settings))
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
    with pytest.raises(ValueError, match="m: must be 2 or more"):
        single.swap(single.sample(5, 0), 1, "synonym")
    with pytest.raises(ValueError, match="l: must be a whole number from 1 to 3"):
        g.swap(levels, 4, "generic")


def test_probes_read_planted_features_and_nothing_else():
    random = torch.Generator().manual_seed(0)
    labels, test = (torch.randint(8, (n,), generator=random) for n in (2048, 4096))
    planted = torch.randn(8, 32, generator=random)
    stacked = []
    for size, low, high in ((1.0, 0.99, 1.0), (0.0, 0.08, 0.17)):
        train, fresh = (size * planted[y] + 0.1 * torch.randn(len(y), 32, generator=random) for y in (labels, test))
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
    levels = g.sample(2048, 0, without=level)
    codes = tuple_codes(levels[level - 1].unflatten(1, (-1, 2)), 8).unique().tolist()
    allowed = tuple_codes(g.rules[level - 1][:, 1:].flatten(0, 1), 8).tolist()
    assert sorted(codes) == sorted(allowed) and equal(g.parse(levels[0]), levels)
    with pytest.raises(ValueError, match="^m: must be 2 or more"):
        data2vec.unseen_synonyms(lambda x: [], Grammar.random(8, 2, 1, 3, 0), 0, settings)


def test_best_of_several_maps_counts():
    """Two maps, one that knows level 1 and one of noise, are as good as the one."""
    g, settings = Grammar.random(8, 2, 3, 3, 0), options(test_strings=512)
    known, noise = oracle(g, 1, raw=False), torch.Generator().manual_seed(0)

    def features(x):
        maps = known(x)
        return [torch.randn(maps[0].shape, generator=noise), *maps]

    assert data2vec.unseen_synonyms(features, g, 0, settings)[0][0] == 1


def test_synonym_score_is_one_for_latents_and_about_zero_for_tuples():
    g, settings = Grammar.random(8, 2, 3, 3, 0), options(test_strings=1024)
    assert data2vec.synonym_scores(oracle(g, 1, raw=False), g, 0, settings)[0] == 1
    assert abs(data2vec.synonym_scores(oracle(g, 1, raw=True), g, 0, settings)[0]) < 0.1


def test_token_losses_are_those_of_a_loop_and_of_enumeration():
    g, few = Grammar.random(3, 2, 2, 2, 1, zipf=1.0), {"test_strings": 20, "mask": 0.4, "mask_block": 0}
    model = data2vec.fit(g, 3, 2, "token", 5, **TINY["tree"], **few)
    found = data2vec.token_losses(model, g, 5)
    x = g.sample(20, (5, 1))[0].long()
    hidden = data2vec.draw_mask(20, 2, 2, 0.4, 0, data2vec.stream(5, 1))
    levels, chance = every_string(g)
    terms = []
    for b, t in hidden.nonzero().tolist():
        last = model.encoder(torch.where(hidden, 3, x)[None, b : b + 1])[-1][0, 0, t]
        said = last @ model.network.heads[0].weight[0] + model.network.heads[0].bias[0, 0]
        same, token = (levels[0] == x[b])[:, ~hidden[b]].all(1), levels[0][:, t] == x[b, t]
        known = chance[same & token].sum() / chance[same].sum()
        terms.append([-F.log_softmax(said[:3], 0)[x[b, t]].item(), -known.log(), -chance[token].sum().log()])
    assert np.allclose(found, np.mean(terms, 0), rtol=1e-5)
    with pytest.raises(ValueError, match="^model: must be trained with target token, not latent"):
        data2vec.token_losses(data2vec.fit(g, 3, 2, **TINY["tree"]), g, 5)


def test_a_model_of_tokens_stands_between_the_bayes_limit_and_the_unigram_loss():
    g = Grammar.random(8, 2, 2, 3, 0)
    model = data2vec.fit(g, 8, 2, "token", 0, steps=200, test_strings=1000, mask_block=0)
    loss, bayes, unigram = data2vec.token_losses(model, g, 0)
    assert bayes + 0.01 < loss < unigram - 0.1


def test_collapse_is_seen():
    g = Grammar.random(8, 2, 3, 3, 0)
    x = g.sample(512, 1)[0]
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
    monkeypatch.setattr(sys, "argv", ["data2vec.py", *flags, "--probe-strings", "100", "--test-strings", "100", "--probe-steps", "5",
                                      "--probes", "2"])
    data2vec.main()
    out = capsys.readouterr().out
    assert all(text in out for text in ("level 1", "level 2", "unseen synonyms", "MLP probe", "untrained"))
    header, *rows = (tmp_path / "trace.csv").read_text().splitlines()
    assert header.endswith(",unseen 1,unseen 2,synonyms 1,synonyms 2,v,m,P") and len(rows) == 2
    x = Grammar.random(4, 2, 2, 3, 0).sample(50, 0)[0]
    model = data2vec.fit(x, 4, 2, "several", 0, preset=preset, steps=2, batch=8, width=16, hidden=16)
    assert equal(data2vec.load(tmp_path / "encoder.pt").features(x), model.features(x))
    assert "Bayes" not in out


def test_target_token_is_shown_beside_the_bayes_limit(monkeypatch, capsys):
    flags = "--depth 2 --v 4 --m 2 --samples 50 --steps 2 --batch 8 --width 16 --hidden 16 --target token"
    monkeypatch.setattr(sys, "argv", ["data2vec.py", *flags.split()])
    data2vec.main()
    out = capsys.readouterr().out
    assert "on 8 fresh strings" in out  # a trial of two steps is not measured on thousands
    last = out.splitlines()[-1]
    assert re.fullmatch("loss per hidden token [0-9.]+, exact Bayes limit [0-9.]+, unigram [0-9.]+", last)


def test_trace_and_save_are_two_files_and_nothing_is_left_by_a_refusal(tmp_path, monkeypatch, capsys):
    for flags in (["--trace", "both", "--save", "./both"], ["--trace", "trace.csv", "--save", "NOWHERE/x.pt"]):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["data2vec.py", *flags])
        with pytest.raises(SystemExit) as end:
            data2vec.main()
        assert end.value.code == 2 and capsys.readouterr().err.startswith("data2vec.py: argument --save: ")
    assert not list(tmp_path.iterdir())


# a script that is killed in its 8th step, of blocks of two, and writes its state after each
KILLED = """
import os, signal, sys, torch
sys.path.insert(0, {here!r})
import data2vec, grammar
torch.set_num_threads(1)
grammar.SAVE_EVERY, data2vec.DRAWN = 0, 2
follow, calls = data2vec.follow, []
def killed(*rest):
    calls.append(follow(*rest))
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
data2vec.follow = killed
data2vec.main()
"""


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch, capsys):
    flags = "--preset transformer --depth 2 --v 4 --m 2 --samples 50 --steps 9 --batch 8 --width 16 --hidden 16"
    flags += " --dropout 0.1 --probes 9 --probe-strings 50 --test-strings 50 --probe-steps 5 --device cpu"
    flags += " --resume run --trace trace --save model"
    monkeypatch.setattr(grammar, "SAVE_EVERY", 0)
    monkeypatch.setattr(data2vec, "DRAWN", 2)

    def go_on(folder, *more):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["data2vec.py", *flags.split(), *more])
        data2vec.main()
        table = capsys.readouterr().out.partition("on 50 fresh")[2]
        return table, (folder / "trace").read_bytes(), data2vec.load("model").network

    table, trace, whole = go_on(tmp_path / "whole")
    killed = tmp_path / "killed"
    killed.mkdir()
    command = [sys.executable, "-c", KILLED.format(here=str(HERE)), *flags.split()]
    assert subprocess.run(command, cwd=killed, capture_output=True).returncode == -9
    assert torch.load(killed / "run", weights_only=True)["step"] == 6
    again = go_on(killed)
    assert again[:2] == (table, trace) and equal(again[2].parameters(), whole.parameters())
    # it is at its end, and remains there; other runs are refused
    again = go_on(killed)
    assert again[:2] == (table, trace) and equal(again[2].parameters(), whole.parameters())
    state = (killed / "run").read_bytes()
    for change in ("--lr 0.5", "--steps 10", "--seed 1", "--samples 49", "--depth 3", "--target token"):
        with pytest.raises(SystemExit) as end:
            go_on(killed, *change.split())
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert end.value.code == 2 and said.startswith("data2vec.py: argument --resume: run is of another run")
    assert (killed / "run").read_bytes() == state
    (killed / "run").write_bytes(b"mine")
    with pytest.raises(SystemExit):
        go_on(killed)
    assert (killed / "run").read_bytes() == b"mine" and (killed / "trace").read_bytes() == trace


def test_bfloat16_and_compile_are_options_that_are_refused_where_they_fail(monkeypatch):
    g, losses = Grammar.random(4, 2, 2, 3, 0), []
    for half in (False, True):
        watch = lambda step, steps, network, loss: losses.append(loss.item())  # noqa: E731
        data2vec.fit(g, 4, 2, "latent", 0, watch, **TINY["tree"], bfloat16=half)
    assert np.allclose(losses[:3], losses[3:], rtol=0.02) and losses[:3] != losses[3:]

    def missing(*arguments):
        raise RuntimeError("there is none\nfurther reading")

    monkeypatch.setattr(torch, "compile", missing)
    monkeypatch.setattr(torch, "autocast", missing)
    for name in ("bfloat16", "compile"):
        with pytest.raises(ValueError, match=f"^{name}: does not work on cpu here: there is none$"):
            data2vec.fit(g, 4, 2, **TINY["tree"], **{name: True})


def one_of_two(rank, port, argv):
    """What torchrun runs, in a forked process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    sys.argv = argv
    data2vec.main()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked only on Linux")
@pytest.mark.parametrize("preset, target", [("tree", "latent"), ("transformer", "token")])
def test_two_processes_train_as_one(preset, target, tmp_path, monkeypatch, capsys):
    """The same loss at every step, to 1e-4, from a batch that is split 5 to 4; one of them writes the files."""
    flags = f"data2vec.py --preset {preset} --depth 3 --v 4 --m 2 --samples 50 --steps 12 --batch 9 --dropout 0.1"
    flags += f" --width 16 --hidden 16 --target {target} --probes 12 --probe-strings 50 --test-strings 50"
    flags += f" --probe-steps 5 --warmup 1 --device cpu --trace {tmp_path}/"
    monkeypatch.setattr(sys, "argv", (flags + "one").split())
    data2vec.main()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    fork = torch.multiprocessing.get_context("fork")
    argv = (flags + f"two --resume {tmp_path}/run").split()
    ranks = [fork.Process(target=one_of_two, args=(rank, port, argv)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    one, two = (np.genfromtxt(tmp_path / name, delimiter=",", skip_header=1) for name in ("one", "two"))
    assert one.shape == (12, 11) and np.allclose(one[:, 1], two[:, 1], rtol=1e-4)
    assert torch.load(tmp_path / "run", weights_only=True)["step"] == 12


@every_target
def test_recover_of_data2vec_keeps_the_sweeps_contract(target):
    """Two runs at once score as each alone, with the root and the floor of an untrained encoder."""
    grammars = drawn(2)[0]
    small = {**TINY["tree"], "probe_strings": 100, "test_strings": 100, "probe_steps": 5}
    scores = data2vec.recover(grammars, [32, 48], [0, 1], target, **small)
    assert scores[1] == data2vec.recover(grammars[1:], [48], [1], target, **small)[0]
    for score in scores:
        assert [len(part) for part in (score.accuracy, score.collapsed, score.floor)] == [3, 3, 3]
        assert all(isinstance(a, float) and 0 <= a <= 1 for a in score.accuracy + score.floor)
        assert all(isinstance(c, bool) for c in score.collapsed) and score.diverged == 0


def test_online_runs_of_one_length_train_together_and_score_as_alone():
    """P strings are P / batch steps, whichever runs are asked for at once."""
    grammars, P = drawn(3)[0], [32, 64, 32]
    small = {**TINY["tree"], "online": True, "probe_strings": 100, "test_strings": 100, "probe_steps": 5}
    scores = data2vec.recover(grammars, P, [0, 1, 2], **small)
    for r in range(3):
        assert scores[r] == data2vec.recover([grammars[r]], [P[r]], [r], **small)[0]
    # and twice the strings are twice the steps
    steps = {"online": False, "steps": 64 // TINY["tree"]["batch"]}
    alone = data2vec.fit_many([grammars[1]], 4, 2, "latent", [1], **small | steps)
    assert scores[1] == data2vec.measure(alone, [grammars[1]], [1])[0]


def test_it_learns():
    """Level 1 of a small grammar, where an untrained encoder is near chance, in a few hundred steps."""
    g = Grammar.random(8, 2, 3, 3, 100)
    small = {"probe_steps": 5, "test_strings": 512, "mask": 0.3, "mask_block": "mixed"}
    for target in ("latent", "token"):
        score = data2vec.recover([g], [1024], [100], target, steps=400, cooldown=0.25, **small)[0]
        assert score.floor[0] < 0.4 and score.accuracy[0] > 0.55


# ----------------------------------------------------------------------------------------------------------------------
# CUDA against the CPU: python -m pytest test_all.py -k cuda -rs


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@cuda
def test_cuda_samples_counts_and_probes_as_the_cpu():
    g = Grammar.random(8, 2, 3, 3, 0)
    x, there = g.sample(2048, 0), g.sample(2048, 0, "cuda")
    assert all(torch.equal(h, k.cpu()) for h, k in zip(x, there)) and there[0].is_cuda
    assert all(torch.equal(h, k.cpu()) for h, k in zip(g.parse(x[0]), g.parse(there[0])))
    maps = torch.randn(2048, 16, generator=torch.Generator().manual_seed(0))
    scores = linear_probe(maps, x[3][:, 0], 8)(maps)
    assert torch.allclose(linear_probe(maps.cuda(), there[3][:, 0], 8)(maps.cuda()).cpu(), scores, atol=1e-4)
    for target in cluster.TARGETS:
        here, there = (cluster.recover([g], [4096], [0], target, device)[0] for device in ("cpu", "cuda"))
        assert np.allclose(here.accuracy, there.accuracy, atol=0.02)


@cuda
@pytest.mark.parametrize("target", predictor.TARGETS)
def test_cuda_trains_the_predictor_as_the_cpu(target):
    """Its random numbers are drawn on the CPU: the same steps, but for rounding."""
    x, losses = Grammar.random(8, 2, 3, 3, 0).sample(512, 0)[0], []
    for strings in (x, x.cuda()):
        predictor.fit(strings, 8, 2, target, 0, lambda *now: losses.append(now[3].cpu()), steps=10)
    assert torch.allclose(torch.stack(losses[:10]), torch.stack(losses[10:]), rtol=1e-2)


@cuda
@both
def test_cuda_encodes_and_measures_as_the_cpu(preset):
    """Strings and masks of a step are drawn on the device, so that only what follows can be compared."""
    g, small = Grammar.random(8, 2, 3, 3, 0), {"probe_strings": 512, "test_strings": 512, "probe_steps": 50}
    model = data2vec.fit(g, 8, 2, **{**TINY[preset], **small, "steps": 20})
    here = data2vec.measure([model], [g], [0])[0]
    model.encoder.cuda(), model.untrained.cuda()
    there = data2vec.measure([model], [g], [0], "cuda")[0]
    assert np.allclose(here.accuracy, there.accuracy, atol=0.02) and np.allclose(here.floor, there.floor, atol=0.02)


@cuda
@both
@every_target
def test_cuda_trains_data2vec(preset, target, tmp_path):
    """Losses fall, a run depends on its seed alone, and goes on from a checkpoint."""
    g, losses = Grammar.random(8, 2, 3, 3, 0), []
    settings = {**TINY[preset], "steps": 60, "batch": 64}
    run = lambda **more: data2vec.fit(g, 8, 2, target, 0, **more, device="cuda", **settings)  # noqa: E731
    model = run(watch=lambda step, steps, network, loss: losses.append(loss.item()), resume=tmp_path / "run")
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    for again in (run(), run(resume=tmp_path / "run")):
        assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(weights(model), weights(again)))


# ----------------------------------------------------------------------------------------
# sweep.py


CELL = sweep.Cell("cluster", 8, 2, 3, 3, 0.0)


def a_run(*accuracy, floor=None, diverged=0, device="cpu"):
    score = grammar.Score(accuracy, (False,) * len(accuracy), floor, diverged)
    return sweep.Run(score, 0.5, device)


def a_ladder(accuracies, first=4):
    """{P: Run} with these accuracies of level 2, P = 4, 8, 16, ..."""
    return {first * 2**i: a_run(1.0, a) for i, a in enumerate(accuracies)}


def test_crossing_on_a_known_curve():
    P = [2.0**k for k in range(4, 16)]
    curve = [1 / (1 + math.exp(-3 * math.log2(p / 300))) for p in P]  # logistic in log P, 0.5 at P = 300
    star, sign = sweep.crossing(P, curve, 0.5)
    assert sign == 0 and star == pytest.approx(300, rel=0.05)
    assert sweep.crossing([8, 16, 32, 64], [0.1, 0.4, 0.6, 0.9], 0.5)[0] == pytest.approx(16 * 2**0.5)
    # one rung above the threshold proves nothing yet, and what comes after two in a row changes nothing
    assert sweep.crossing([8, 16, 32, 64, 128], [0.1, 0.9, 0.1, 0.9, 0.9], 0.5) == (pytest.approx(32 * 2**0.5), 0)
    assert sweep.crossing([8, 16, 32, 64], [0.1, 0.9, 0.9, 0.1], 0.5) == (pytest.approx(8 * 2**0.5), 0)
    assert sweep.crossing([8, 16], [0.1, 0.4], 0.5) == (16, 1)
    assert sweep.crossing([8, 16, 32], [0.1, 0.2, 0.6], 0.5) == (16, 1)
    assert sweep.crossing([8, 16, 32], [0.6, 0.7, 0.1], 0.5) == (8, -1)


def test_means_of_censored_seeds_are_bounds():
    assert sweep.estimate([[(4.0, 0), (16.0, 0)]]) == ("8", "4", "16")
    assert sweep.estimate([[(4.0, 0), (16.0, 0)]], digits=1) == ("8.0", "4.0", "16.0")
    assert sweep.estimate([[(64.0, 1), (1024.0, 1)]]) == ("> 256", "", "")  # and not > 64
    assert sweep.estimate([[(4.0, 0), (16.0, 1)]]) == ("> 8", "", "")
    assert sweep.estimate([[(4.0, 0), (16.0, -1)]]) == ("< 8", "", "")
    assert sweep.estimate([[(4.0, -1), (16.0, 1)]]) == ("?", "", "")
    assert sweep.estimate([[(4.0, 0)]]) == ("4", "", "")  # one seed, no interval


def test_slopes_know_what_a_bound_allows():
    exact = {math.log(m): [(5.0 * m**2, 0)] * 2 for m in (2, 4, 8)}
    assert sweep.slope(exact, float) == "2.00 [2.00, 2.00]"
    grows = {3: [(100.0, 0)], 4: [(100.0, 0)], 5: [(400.0, 1)]}  # at least 400 at the deepest
    assert sweep.slope(grows, math.exp) == "> 2.00"
    assert sweep.slope({3: [(100.0, -1)], 4: [(200.0, 0)]}, math.exp) == "> 2.00"
    assert sweep.slope({3: [(100.0, 1)], 4: [(100.0, 0)]}, math.exp) == "< 1.00"
    assert sweep.slope({3: [(100.0, 1)], 4: [(100.0, 1)]}, math.exp) == ""
    assert sweep.slope({3: [(100.0, 0)], 4: [(200.0, 0)]}, math.exp) == "2.00"  # one seed, no interval
    assert sweep.slope({3: [(100.0, 0)]}, math.exp) == ""


def test_a_ladder_ends_by_its_rules_and_not_by_the_cap():
    ladder = [0.2, 0.95, 0.9, 0.96, 0.97]
    assert sweep.climb(CELL, {}, 1000) == ([], 4, "not finished")
    assert sweep.climb(CELL, a_ladder(ladder[:4]), 1000) == ([4, 8, 16, 32], 64, "not finished")
    assert sweep.climb(CELL, a_ladder(ladder[:4]), 63) == ([4, 8, 16, 32], None, "beyond Pmax")
    for beyond in ([], [0.1], [0.1] * 9):  # rungs that a longer ladder had do not count
        assert sweep.climb(CELL, a_ladder(ladder + beyond), 2**20) == ([4, 8, 16, 32, 64], None, "")
    network = sweep.Cell("predictor", 8, 2, 3, 3, 0.0)
    flat = [0.3, 0.6, 0.62, 0.5, 0.64, 0.9, 0.9]
    assert sweep.climb(network, a_ladder(flat, 64), 2**20)[1:] == (None, "limited by steps")
    assert len(sweep.climb(network, a_ladder(flat, 64), 2**20)[0]) == 5  # three rungs after the .6
    rising = [0.3, 0.6, 0.62, 0.5, 0.66]
    assert sweep.climb(network, a_ladder(rising, 64), 2**20)[1:] == (2048, "not finished")
    steps = 8 * 300 // 64  # too few to see 512 strings 8 times
    short = network._replace(method=f"predictor:steps={steps}")
    assert sweep.climb(short, a_ladder([0.1, 0.2, 0.1], 64), 2**20)[1:] == (None, "limited by steps")
    deep = CELL._replace(L=20)
    last, reason = sweep.last_rung(deep, 2**20)
    assert reason == "limited by memory" and last < 2**15 and sweep.last_rung(CELL, 100) == (64, "beyond Pmax")


def test_methods_have_one_spelling():
    for text, name in [
        ("cluster-latent", "cluster"), ("predictor:hidden=64", "predictor"), ("data2vec:preset=tree", "data2vec"),
        ("data2vec-token:mask=.3:steps=8000", "data2vec-token:steps=8000:mask=0.3"),
        ("data2vec:mask-block=top", "data2vec:mask_block=top"),
    ]:
        assert sweep.read_method(text).name == name == sweep.read_method(name).name
    assert sweep.read_method("predictor-token:steps=3200").options.steps == 3200
    for text, hint in [("clutser", "cluster"), ("cluster-leaf", "cluster-"), ("predictor:step=3", "steps"),
                       ("predictor:steps=x", "steps"), ("predictor:steps", "name=value"), ("", "cluster"),
                       ("predictor:steps=4:steps=5", "once"), ("predictor:ema=2", "ema")]:
        with pytest.raises(ValueError, match=hint):
            sweep.read_method(text)


def test_summary_of_known_ladders():
    """P* of the token's ladders is 100 * 3^L by construction; the others have bounds of every kind."""
    def ladder(star, top=1.0):
        return {P: a_run(*[1.0] * (L - 2), top * (P > star)) for P in map(float, (star / 4, star * 4, star * 16))}

    runs, climb = {}, sweep.climb
    for L, seed in itertools.product((3, 4, 5), range(4)):
        cell = sweep.Cell("cluster-token", 8, 2, 3, L, 0.0)
        runs[(cell, seed)] = ladder(100 * 3.0**L)
    try:
        sweep.climb = lambda cell, runs, cap: (sorted(runs), None, "")
        rows = sweep.summarise(runs, {})
        text = sweep.tables(rows, is_long=True) + sweep.tables(rows, is_long=False)
    finally:
        sweep.climb = climb
    assert [row["P50"] for row in rows] == ["2700", "8100", "24300"]
    assert "3.00 [3.00, 3.00] 3..5 | m" in text and " | 2700 [2700, 2700] | " in text and " | 2700 | " in text

    floors = {P: a_run(0.3, 0.2, 0.1, floor=(0.1, 0.2, 0.6)) for P in (128, 256, 512)}
    runs = {
        (CELL, 0): a_ladder([0.2, 0.3]), (CELL, 1): a_ladder([0.2, 0.9, 0.9]),
        (CELL._replace(method="data2vec"), 0): floors,
    }
    left_out = [CELL._replace(method="data2vec-token", L=5), CELL]  # the second is there
    rows = sweep.summarise(runs, {CELL: 1024}, left_out)
    assert [row["status"] for row in rows] == ["not finished", "beyond Pmax", "not run"]
    assert rows[0]["P50"].startswith("> ") and rows[0]["seeds"] == 2  # P* > 8 for one reason, and not for another
    assert sweep.summarise(runs, {})[0]["status"] == "not finished"  # seed 0 stopped short of seed 1
    assert rows[1]["root_stars"] == [(512.0, 1)] and rows[1]["root_P50"] == "> 512"
    assert rows[1]["root_floor"] == "0.600" and rows[1]["floor"] == "0.200" and rows[2]["P50"] == ""
    text = sweep.tables(rows, is_long=False)
    assert "- not run" in text and "--methods data2vec-token --depth 5 runs the last" in text
    assert "! untrained above 0.5" in text and "~ one seed" in text and ".. not finished" in text
    assert "data2vec, root" in text and ">512!~" in text and rows[1]["root_notes"] >= {"one seed", "beyond Pmax"}


SMALL = "--depth 2,3 --seeds 2 --methods cluster,cluster-root --m 4 --max-samples 4096 --device cpu".split()


def start_sweep(out, *more):
    command = [sys.executable, "sweep.py", *SMALL, "--jobs", "1", *more, "--out", str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=HERE, **pipes)


def wait_for_runs(out, process, files):
    """Until so many files of runs are there, and the last has a few."""
    while process.poll() is None:
        sizes = [file.stat().st_size for file in out.glob("runs/*.csv")]
        if len(sizes) == files and min(sizes) > 200:
            break
        time.sleep(0.02)


def test_the_last_cell_is_shared_among_idle_processes():
    """Nine runs of one cell are 5 and 4 for two processes, and 9 for one while others have work of their own."""
    cell = sweep.Cell("predictor", 8, 2, 3, 3, 0.0)
    last, everything = [(cell, (0, 1, 2))], [(P, seed) for P in (64, 128, 256) for seed in range(3)]
    one = sweep.next_batch(last, {}, 2**20, [], idle=2)
    two = sweep.next_batch(last, {}, 2**20, [one], idle=1)
    assert one == (cell, everything[:5]) and two == (cell, everything[5:])
    other = cell._replace(L=4), (0,)
    assert sweep.next_batch([*last, other], {}, 2**20, [], idle=2) == (cell, everything)


def rows_without_seconds(out):
    with open(out / "runs.csv", newline="") as file:
        return [{k: x for k, x in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_sweeps_that_are_killed_stopped_or_not_alone_give_the_same_bytes(tmp_path):
    """One straight through; one killed and torn while writing, then stopped, then finished by two at once."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    straight, killed = start_sweep(whole), start_sweep(broken)
    wait_for_runs(broken, killed, 1)
    killed.kill()
    killed.communicate()
    (torn,) = (broken / "runs").glob("*.csv")
    with open(torn, "a") as file:
        file.write("cluster,8,2,4,3,0,64,1,2,0.500000,,0.100,cpu,\ncluster,8,2,4,3,0,64,1,1,0.")
    before = torn.read_bytes()
    stopped = start_sweep(broken)
    wait_for_runs(broken, stopped, 2)
    stopped.terminate()
    said = stopped.communicate()[1]
    if sys.platform != "win32":
        assert stopped.returncode == 1 and "the same command continues" in said and "Traceback" not in said
    both = [start_sweep(broken), start_sweep(broken, "--seeds", "1")]
    for done in (straight, *both):
        out, said = done.communicate()
        assert done.returncode == 0 and "growth, L" in out and "Traceback" not in said, said
    assert torn.read_bytes() == before  # nobody writes into another's file
    assert rows_without_seconds(whole) == rows_without_seconds(broken)
    for name in ("samples_vs_depth.csv", "samples_vs_depth.md", "settings.json", "samples_vs_depth.png"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
    assert not list(tmp_path.rglob("*.part"))


def sweep_here(monkeypatch, capsys, out, *flags):
    """A sweep in this process. Returns (exit code, what it printed, what it complained of)."""
    monkeypatch.setattr(sys, "argv", ["sweep.py", *flags, "--jobs", "1", "--device", "cpu", "--out", str(out)])
    monkeypatch.setattr(sweep, "draw", lambda out: [])
    code = 0
    try:
        sweep.main()
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_time_left_counts_the_rungs_that_are_expected():
    tokens = sweep.LEARNERS["cluster"].seconds * 2**3  # before any run is timed
    # rungs from 4 to 8 v m^3 = 1728, or v m^(L+1), or the cap
    for cap, rungs in ((2**20, 9), (100, 5)):
        assert sweep.seconds_left(CELL, (0, 1), {}, cap) == pytest.approx(2 * rungs * tokens)
    deep = CELL._replace(method="cluster-token", L=5)
    assert sweep.seconds_left(deep, (0,), {}, 2**20) == pytest.approx(14 * tokens * 4)
    # one has ended at 64: the others are expected to, with the half second of its rungs
    ended = {(CELL, 0): a_ladder([0.2, 0.5, 0.9, 1.0, 1.0])}
    assert sweep.seconds_left(CELL, (0, 1), ended, 2**20) == 5 * 0.5
    beyond = ended | {(CELL, 1): a_ladder([0.2] * 7)}  # but for one that has not, one rung at least
    assert sweep.seconds_left(CELL, (0, 1), beyond, 2**20) == 0.5
    assert sweep.seconds_left(CELL, (0,), ended, 2**20) == 0


def test_ranks_share_a_sweep_out_by_what_it_costs():
    cells = {CELL._replace(L=L, method=method): range(2) for L in (3, 5) for method in ("cluster", "data2vec")}
    alone = sweep.units_of(cells, 1024, 0, 1)
    assert [(cell.method, cell.L) for cell, _ in alone] == [
        ("cluster", 5), ("cluster", 5), ("cluster", 3), ("cluster", 3), ("data2vec", 5), ("data2vec", 3)]
    for size in (2, 3, 7):
        shares = [sweep.units_of(cells, 1024, rank, size) for rank in range(size)]
        assert sorted(sum(shares, [])) == sorted(alone)
        costs = [[sweep.seconds_left(*unit, {}, 1024) for unit in share] for share in shares]
        # no rank has more than another by more than the dearest unit
        assert max(map(sum, costs)) - min(map(sum, costs)) <= max(sum(costs, []))


def test_torchrun_of_a_sweep_survives_a_killed_rank(tmp_path, monkeypatch, capsys):
    """Begun by one process, gone on with by two, of which one is killed and started again."""
    code, table, _ = sweep_here(monkeypatch, capsys, tmp_path / "whole", *SMALL)
    sweep_here(monkeypatch, capsys, tmp_path / "ranks", *SMALL, "--depth", "2", "--seeds", "1")
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1 --monitor-interval .1 --"
    command = [sys.executable, *command.split(), "sweep.py", *SMALL, "--out", str(tmp_path / "ranks")]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_runs(tmp_path / "ranks", process, 3)
    ranks = [int(pid) for file in Path("/proc").glob(f"{process.pid}/task/*/children") for pid in file.read_text().split()]
    if ranks:  # one that ends by itself meanwhile does no harm
        os.kill(ranks[-1], signal.SIGKILL)
    out, said = process.communicate()
    assert code == process.returncode == 0, said
    table = table[table.index("v=8"):]
    assert table in out and out.count("law\n") == table.count("law\n")  # said once, by rank 0
    assert rows_without_seconds(tmp_path / "ranks") == rows_without_seconds(tmp_path / "whole")
    assert len(list((tmp_path / "ranks" / "runs").glob("*.csv"))) > 3 or not ranks


def half_learned(grammars, samples, seeds, target="latent", device="cpu"):
    """A learner that knows each level with the share P / 64, and diverges with seed 1 and P = 32."""
    scores = []
    for g, P, seed in zip(grammars, samples, seeds):
        accuracy = [min(1.0, P / 64)] * g.L
        diverged = 37 if (P, seed) == (32, 1) else 0
        scores.append(grammar.Score([0.0] * g.L if diverged else accuracy, [False] * g.L, [0.1] * g.L, diverged))
    return scores


def test_a_new_learner_is_one_function_and_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sweep.LEARNERS, "mine", sweep.Learner(half_learned))
    flags = "--methods mine --depth 3,4 --seeds 2".split()
    code, out, _ = sweep_here(monkeypatch, capsys, tmp_path, *flags)
    assert code == 0 and "mine, root" in out
    assert "mine L=3 m=3 P=32 seed 1: loss not finite at step 37\n" in out
    marked = [row for row in rows_without_seconds(tmp_path) if row["mark"] == "diverged@37"]
    assert len(marked) == 3 + 4 and {row["accuracy"] for row in marked} == {"0.000000"}
    before = files(tmp_path)
    code, out, said = sweep_here(monkeypatch, capsys, tmp_path, *flags)  # all is there
    assert code == 0 and "mine, root" in out and files(tmp_path) == before, said
    monkeypatch.delitem(sweep.LEARNERS, "mine")
    sweep.read_method.cache_clear()
    code, _, said = sweep_here(monkeypatch, capsys, tmp_path, "--methods", "cluster", "--depth", "2")
    assert code == 2 and "line 2" in said and "'mine'" in said and files(tmp_path) == before


@pytest.mark.parametrize("error, code", [
    (OSError(28, "No space left on device"), 1), (KeyboardInterrupt(), 130), (KeyboardInterrupt("SIGTERM"), 1),
    (sweep.futures.BrokenExecutor(), 1), (MemoryError(), 1), (RuntimeError("can't allocate memory"), 1),
])
def test_what_ends_a_sweep_from_outside_gets_one_line(error, code, tmp_path, monkeypatch, capsys):
    append, calls = sweep.Folder.append, []

    def fail_at_the_third(folder, cell, found):
        calls.append(found)
        if len(calls) == 3:
            raise error
        append(folder, cell, found)

    monkeypatch.setattr(sweep.Folder, "append", fail_at_the_third)
    got, _, said = sweep_here(monkeypatch, capsys, tmp_path, *SMALL[:4], "--methods", "cluster")
    assert got == code and "2 finished runs are safe" in said.splitlines()[-1] and "Traceback" not in said


def test_no_picture_is_a_reason_to_fail(tmp_path, monkeypatch):
    def fail(out):
        raise RuntimeError("no fonts\nat all")

    monkeypatch.setattr(plot, "draw", fail)
    assert sweep.draw(tmp_path) == ["no picture: no fonts"]


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


NEW = ",".join(sweep.COLUMNS) + "".join(
    f"\ncluster,8,2,4,3,0,8,0,{level},0.500000,,1.000,cuda:1," for level in (1, 2)) + "\n"
MINE = json.dumps({"sweep": {"format": 2, "recovered": 0.95, "rung": 2}, "cluster": {"restarts": 64}})


def test_runs_of_other_devices_are_read_and_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "settings.json").write_text(MINE)
    (tmp_path / "runs.csv").write_text(NEW.replace("cuda:1,\n", "mps,collapsed\n"))
    flags = "--methods cluster-root --depth 2 --seeds 1".split()
    code, out, _ = sweep_here(monkeypatch, capsys, tmp_path, *flags)
    rows = rows_without_seconds(tmp_path)
    assert code == 0 and "cpu, mps" in out and {"cluster", "cluster-root"} == {row["method"] for row in rows}
    assert [row["mark"] for row in rows if row["method"] == "cluster"] == ["collapsed"] * 2
    (tmp_path / "runs" / "another.csv").write_text(NEW.replace(",8,0,", ",16,0,"))
    code, out, _ = sweep_here(monkeypatch, capsys, tmp_path, *flags)
    assert code == 0 and "cpu, cuda:1, mps" in out
    assert sum(row["device"] == "cuda:1" for row in rows_without_seconds(tmp_path)) == 2


@pytest.mark.parametrize("runs, settings, reason", [
    ("a,b\n1,2\n", MINE, "columns"), (NEW.replace(",mark", ""), MINE, "columns"), ("\x00\xff", MINE, "columns"),
    (NEW.replace("cuda:1,", "cuda:1,foo"), MINE, "line 2"), (NEW.replace("cuda:1,", "\xff"), MINE, "line 2"), (NEW.replace("cuda:1,", "cuda:1,x"), MINE, "line 2"),
    (NEW.replace("cluster,", "clusters,"), MINE, "line 2"), (NEW.replace("000,,1", "000,,1,"), MINE, "line 2"),
    (NEW.replace("cluster,", "cluster:restarts=64,"), MINE, "line 2"), (NEW.replace("1.000", "1"), MINE, "line 2"),
    (NEW.replace(",8,0,1,", ",-8,0,1,"), MINE, "line 2"), (NEW.replace(",0,8,0,1,", ",0,9,0,1,"), MINE, "no rung"),
    (NEW.replace("8,2,4,3", "8,2,0,3"), MINE, "line 2"), (NEW.replace(",8,0,1,", ",8,-1,1,"), MINE, "line 2"),
    (NEW.replace("2,4,3,0", "2,4,1,0"), MINE, "line 2"), (NEW.replace("0.5", "1.5"), MINE, "line 2"),
    (NEW.replace("cuda:1", "toaster"), MINE, "toaster"), (NEW.replace(",8,0,1,", ",8,0,4,"), MINE, "line 2"),
    (NEW.replace(",8,0,1,", ",16,0,1,"), MINE, "only a part"), (NEW.replace(",8,0,", ",2,0,"), MINE, "no rung"),
    (NEW, None, "settings.json"), (NEW, "{", "settings.json"), (NEW, "[1]", "settings.json"), (NEW, '"abc"', "settings"),
    (NEW, '{"name": "my-app"}', "settings.json"), (NEW, "[" * 100000, "settings.json"), (NEW, '{"sweep": 7}', "settings"),
    (NEW, MINE.replace('"rung": 2', '"rung": 3'), "rung"), (NEW, MINE.replace("64", "65"), "restarts"),
])
def test_foreign_results_are_refused_and_left_alone(runs, settings, reason, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs.csv").write_bytes(runs.encode("latin-1"))
    if settings is not None:
        (tmp_path / "settings.json").write_text(settings)
    before = files(tmp_path)
    code, _, said = sweep_here(monkeypatch, capsys, tmp_path, *SMALL[:4])
    assert code == 2 and said.count("\n") == 1 and "--out" in said and reason in said
    assert files(tmp_path) == before


def test_the_forks_of_the_readme_run_as_they_stand_there(tmp_path):
    """Its diffs, applied to copies of the files, and its new file; then one sweep with both."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    for file in HERE.glob("*.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    names = [tmp_path / "cluster.py", tmp_path / "sweep.py"]
    diffs = re.findall(r"```diff\n(.*?)```", text, re.S)
    assert len(diffs) == len(names)
    for name, diff in zip(names, diffs):
        source = name.read_text(encoding="utf-8")
        for old, new in re.findall(r"^-(.*)\n((?:\+.*\n)+)", diff, re.M):  # a line, and what replaces it
            assert source.count(old + "\n") == 1, old
            source = source.replace(old + "\n", re.sub(r"^\+", "", new, flags=re.M))
        name.write_text(source, encoding="utf-8")
    (mine,) = re.findall(r"here mine.py.*?```python\n(.*?)```", text, re.S)
    (tmp_path / "mine.py").write_text(mine, encoding="utf-8")
    flags = "--methods cluster-first,cluster-token,mine --depth 3 --seeds 1 --max-samples 256 --jobs 1".split()
    done = subprocess.run([sys.executable, "sweep.py", *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = rows_without_seconds(tmp_path / "out")
    first, token, other = ([row["accuracy"] for row in found if row["method"] == name]
                           for name in ("cluster-first", "cluster-token", "mine"))
    assert len(first) == len(token) and first != token and float(other[0]) < 0.6  # a first symbol is no parent


BAD = """
    sweep --m 9 | --m 0 | --m 4..x | --m 1..2147483647 | --depth 1..3 | --depth 6..2 | --depth 2..4..6 | --depth 40
    sweep --depth 2..2147483647 | --v 1 | --v 300 | --s 1 | --s 62 | --seeds 0 | --seeds 2147483647 | --seed 3
    sweep --max-samples 0 | --max-samples 2 | --max-samples ² | --device tpu | --device cuda:99 | --jobs 0 | --zipf -1
    sweep --methods cluster,magic | --methods predictor:steps=0 | --methods data2vec:steps=9 | --out FILE | --out ""
    sweep --m 1 --methods data2vec | --m 256 --v 256 --methods cluster-joint
    cluster --samples 0 | --depth 1 | --m 9 | --target leaf | --device tpu | --v two | --depth 24 --samples 1
    cluster --samples 2147483647
    predictor --samples 0 | --codes 3 | --target root | --lr x | --ema 2 | --steps 0 | --m 9 | --hidden 2147483647
    predictor --samples 2147483647
    data2vec --target labels | --mask 1.5 | --mask-block 3 | --mask-block Top | --m 1 | --save NOWHERE/x.pt | --steps 0
    data2vec --preset gpu | --lr nan | --width 30 --preset transformer | --samples 2147483647 | --batch 2147483647
    grammar --m 9 | --samples -1 | --save NOWHERE/x.npz | --samples 2147483647
    plot NOWHERE | NOWHERE/trace.csv
"""
BAD = [(line.split()[0], flag) for line in BAD.strip().splitlines() for flag in line.split(None, 1)[1].split(" | ")]


@pytest.mark.parametrize("script, arguments", BAD)
def test_bad_input_gets_one_line(script, arguments, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    flag = arguments.split()[0] if arguments[0] == "-" else ""
    arguments = arguments.replace("FILE", str(tmp_path / "file")).replace("NOWHERE", str(tmp_path / "nowhere"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *shlex.split(arguments)])
    with pytest.raises(SystemExit) as end:
        sys.modules[script].main()
    said = capsys.readouterr()
    assert end.value.code == 2 and said.err.count("\n") == 1 and flag in said.err and not said.out
    assert flag != "--seed" or "--seeds" in said.err
    assert files(tmp_path) == {tmp_path / "file": b"mine"}


# ----------------------------------------------------------------------------------------------------------------------
# plot.py


STARS = "method,v,s,m,L,zipf,P50,P50_lo,P50_hi,P90,root_P50,root_P50_lo,root_P50_hi,seeds,status\n"
STARS_OLD = "method,v,s,m,L,P50,P50_lo,P50_hi,P90,P50_over_vm3,seeds,censored\n"
RUNS = "method,v,s,m,L,zipf,P,seed,level,accuracy\n"
TRACE = "step,loss 1,unseen 1,unseen 2,synonyms 1,synonyms 2\n"
ALL_CELLS = STARS + """\
cluster-first,8,2,3,3,0,229,200,260,500,,,,5,
cluster-first,8,2,3,4,0,250,220,280,500,,,,5,
cluster-token,8,2,3,3,0,"> 4096",,,,,,,5,beyond Pmax
cluster-token,8,2,3,4,0,"> 4096",,,,,,,5,not finished
mine-token,8,2,3,3,0,"< 16",,,,"> 512",,,1,below Pmin
data2vec-token:mask=0.15:steps=8000,8,2,3,3,0,"> 4096",,,,,,,3,limited by steps
data2vec-token,8,2,3,4,0,,,,,,,,0,not run
data2vec-token,8,2,3,3,0,,,,,,,,,not run
"""


def stars(P, spread=1.05):
    """Cells of one method at depths 3, 4, ..."""
    return [{"L": L, "low": p / spread, "high": p * spread} for L, p in enumerate(P, 3)]


def table(tmp_path, text, name="samples_vs_depth.csv"):
    (tmp_path / name).write_text(text)
    return plot.read(tmp_path / name)


@pytest.mark.parametrize("cells, said", [
    (stars([200, 210, 190]), "From L = 3 on, P* is flat for cluster"),
    (stars([200, 600, 1800]), "From L = 3 on, P* grows with depth for cluster"),
    (stars([200, 210, 190], spread=4), "P* against depth"),  # may be either
    (stars([200, 210, 190], spread=math.nan), "P* against depth"),  # no interval
    (stars([200]), "P* against depth"),
])
def test_a_title_says_what_intervals_allow(cells, said):
    assert plot.conclusion({"cluster": cells}, 3) == said
    both = plot.conclusion({"cluster": cells, "mine": stars([20, 60])}, 3)
    assert both.replace("\n", " ").endswith("grows with depth for mine") == ("grows" not in said)


def test_unknown_targets_share_the_panel_and_have_their_own_colours(tmp_path):
    kind, rows = table(tmp_path, ALL_CELLS)
    root, *tree = sorted(plot.cells_of(rows), key=lambda cell: not cell["what"].startswith("root"))
    assert kind == "depth" and root["method"] == "mine-token"
    found = {(cell["method"], cell["L"]): cell["state"] for cell in tree}
    assert found == {
        ("cluster-first", 3): "", ("cluster-first", 4): "",
        ("cluster-token", 3): "beyond Pmax", ("cluster-token", 4): "not finished",
        ("mine-token", 3): "below Pmin",
        ("data2vec-token:mask=0.15:steps=8000", 3): "limited by steps",
    }  # and none for what was not run
    assert root["state"] == "beyond Pmax"  # the status is not the root's

    figure = plot.draw_depth({"depth": rows, "runs": []})
    assert len(figure.axes) == 2
    assert figure.axes[0].get_title().startswith("From L = 3 on, P* is flat for cluster-first\n")
    signs = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(signs) == sorted(["\u2191", "\u2191?", "\u2193", "\u2191s"])
    styles = plot.styles_of(["cluster-first", "cluster", "cluster-token", "cluster-second"])
    assert len({style["color"] for style in styles.values()}) == 4
    lighter = plot.styles_of(["cluster", "cluster:lr=1"])["cluster:lr=1"]
    assert lighter["color"] == styles["cluster"]["color"] and lighter["alpha"] < 1


def test_collapse_is_by_each_methods_own_law_at_the_largest_depth():
    row = {"v": 8, "s": 2, "zipf": 0.0, "seed": 0, "accuracy": 0.5}
    runs = [row | {"method": method, "m": m, "L": L, "level": L - 1, "P": 8 * m**power}
            for method, power in (("cluster", 3), ("cluster-joint", 2), ("cluster-token", 5))
            for m in (2, 4) for L in (3, 4)]
    runs += [row | {"method": "cluster", "m": 2, "L": 5, "level": 4, "P": 64}]  # of one m
    paper = [{"method": "ilc", "v": 8, "s": 2, "m": 2, "L": 4, "target": "h^(L-1)", "P_star": 64.0}]
    figure = plot.draw_collapse({"runs": runs, "depth": [], "paper": paper})
    for i, panel in enumerate((1, 2, 2)):
        axis = figure.axes[3 * i + panel]
        x = [line.get_xdata()[0] for line in axis.lines if len(line.get_xdata()) == 1]
        assert x == pytest.approx([1.0] * len(x)) and len(x) == (3 if i == 0 else 2)


    # P* of m = 2 and 4, and so by how much a law is off
    known = [row | {"method": "cluster", "m": m, "L": 4, "P50": ("=", P)}
             for m, P in ((2, 64.0), (4, 1024.0))]
    figure = plot.draw_collapse({"runs": runs, "depth": known, "paper": []})
    said = [axis.get_xlabel().partition("\n")[2] for axis in figure.axes[:3]]
    assert said == [f"P* within a factor of {factor}" for factor in (16, 2, 2)]


def test_one_depth_is_a_line_for_each_learner_and_a_colour_for_each_target(tmp_path):
    text = STARS + """\
predictor,8,2,3,4,0,200,180,220,400,,,,3,
predictor-token,8,2,3,4,0,"> 512",,,,,,,3,limited by steps
predictor:elements=one,8,2,3,4,0,400,380,420,900,,,,3,
"""
    _, rows = table(tmp_path, text)
    axis, = plot.draw_methods({"depth": rows, "runs": []}).axes
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == ["predictor", "predictor:elements=one"]
    dots = [line for line in axis.lines if len(line.get_xdata())]
    assert [line.get_xdata()[0] for line in dots] == [200, 512, 400]
    assert dots[1].get_markerfacecolor() == "white" and dots[0].get_color() == dots[2].get_color()
    assert [text.get_text() for text in axis.texts] == ["", "\u2192s", ""]
    assert plot.draw_depth({"depth": rows, "runs": []}) is None


def test_prediction_fits_one_constant(tmp_path):
    sizes = {"v": 8, "s": 2, "m": 3, "zipf": 0.0}
    contrast = [sizes | {"L": L, "target": target, "level": l, "P_noise": 10.0 * l}
                for L in (3, 4) for target in ("latent", "token") for l in range(1, L)]
    measured = {("cluster", 3): 60, ("cluster", 4): 90, ("cluster-token", 3): 60,
                ("cluster:positions=cousins", 3): 999, ("predictor", 3): 999}
    depth = [sizes | {"method": method, "L": L, "P50": ("=", float(P))}
             for (method, L), P in measured.items()]
    depth += [sizes | {"method": "cluster-token", "L": 4, "P50": (">", 999.0)}]
    tables = {"contrast": contrast, "depth": depth}
    # the highest level is the hardest here
    assert plot.predictions(tables) == [
        ("latent", 3, 20.0, 60.0), ("latent", 3, 30.0, 90.0), ("token", 3, 20.0, 60.0)]
    axis, = plot.draw_prediction(tables).axes
    assert axis.get_xlabel().startswith("3 \u00d7") and "factor of 1\n" in axis.get_title()


@pytest.mark.parametrize("name, text, said", [
    ("samples_vs_depth.csv", "a,b\n1,2\n", "no table"),
    ("samples_vs_depth.csv", STARS, "no rows"),
    ("samples_vs_depth.csv", STARS_OLD + "cluster,8,2,0,3,9,8,10,,,5,0\n", "line 2: m = '0'"),
    ("samples_vs_depth.csv", STARS_OLD + "cluster,8,2,3,3,nan,8,10,,,5,0\n", "P50 = 'nan'"),
    ("samples_vs_depth.csv", STARS_OLD + "cluster,8,2,3,3,-9,8,10,,,5,0\n", "P50 = '-9'"),
    ("samples_vs_depth.csv", STARS_OLD + "cluster,8,2,3,3,= 9,8,10,,,5,0\n", "P50 = '= 9'"),
    ("samples_vs_depth.csv", STARS_OLD + "cluster,8,2,3,3,9,8,10,,,5\n", "12 cells"),
    ("samples_vs_depth.csv", STARS_OLD + "$x$,8,2,3,3,9,8,10,,,5,0\n", "method = '$x$'"),
    ("samples_vs_depth.csv", STARS_OLD + "cluster,8,2,3,99,9,8,10,,,5,0\n", "L = '99'"),
    ("runs.csv", RUNS + "cluster,8,2,3,3,0,0,0,2,1.0\n", "P = '0'"),
    ("runs.csv", RUNS + "cluster,8,2,3,3,0,8,0,2,1.5\n", "accuracy = '1.5'"),
    ("trace.csv", TRACE + "1,.5,.1,.1,0,0\n9,.4,.9,.2", "cut off"),
    ("trace.csv", TRACE + "1,.5,.1,.1,0,0\n9,.4,.9\n", "line 3: must have 6 cells"),
    ("trace.csv", TRACE + "x,.5,.1,.1,0,0\n", "step = 'x'"),
])
def test_plot_checks_all_files_before_it_draws(name, text, said, tmp_path):
    (tmp_path / "samples_vs_depth.csv").write_text(ALL_CELLS)
    (tmp_path / name).write_text(text)
    before = files(tmp_path)
    with pytest.raises(ValueError) as error:
        plot.draw(tmp_path, *tmp_path.glob("trace.csv"))
    assert said in str(error.value) and name in str(error.value) and "\n" not in str(error.value)
    assert files(tmp_path) == before


def test_plot_draws_whatever_the_environment_says_and_always_the_same_bytes(tmp_path):
    (tmp_path / "samples_vs_depth.csv").write_text(ALL_CELLS)
    ladders = [f"cluster-first,8,2,{m},3,0,{P},0,2,{P > 400}\n" for m in (3, 4) for P in (256, 512)]
    ladders = "".join(ladders).replace("True", "1").replace("False", "0.1")
    (tmp_path / "runs.csv").write_text(RUNS + ladders)
    environment = os.environ | {"MPLBACKEND": "nonsense"}
    command = [sys.executable, str(HERE / "plot.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and done.stdout.count("wrote") == 2
    first = files(tmp_path)
    assert len(first) == 4
    picture = tmp_path / "samples_vs_depth.png"
    assert plot.draw(tmp_path / "samples_vs_depth.csv") == [picture]
    assert files(tmp_path) == first


@pytest.mark.parametrize("raised, code, said", [
    (ValueError("x.csv: bad"), 2, "plot.py: argument out: x.csv: bad\n"),
    (PermissionError(13, "Permission denied", "x.png"), 1, "Permission denied: 'x.png'\n"),
    (ImportError("No module named 'matplotlib'"), 1, "plot.py: No module named 'matplotlib'\n"),
    (KeyboardInterrupt(), 130, "plot.py: stopped\n"),
])
def test_plot_ends_with_one_line_and_a_code(raised, code, said, monkeypatch, capsys):
    def draw(*names):
        raise raised

    monkeypatch.setattr(plot, "draw", draw)
    monkeypatch.setattr(sys, "argv", ["plot.py"])
    with pytest.raises(SystemExit) as end:
        plot.main()
    assert end.value.code == code and capsys.readouterr().err.strip("\n").endswith(said.strip())


def test_traces_become_one_picture(tmp_path, monkeypatch):
    for seed in range(2):
        (tmp_path / f"{seed}.csv").write_text(TRACE + "1,.5,.1,.1,0,0\n9,.4,.9,.2,.8,.1\n")
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "0.csv"), str(tmp_path / "1.csv")])
    plot.main()
    assert (tmp_path / "phases.png").read_bytes()[:4] == b"\x89PNG"


def test_traces_of_several_P_end_against_it(tmp_path):
    rows = []
    for P in (216, 432):
        text = "step,unseen 1,synonyms 1,v,m,P\n" + f"1,0,0,8,3,{P}\n9,0.5,{P / 864},8,3,{P}\n"
        rows += table(tmp_path, text, f"{P}.csv")[1]
    tables = dict.fromkeys(plot.KINDS, []) | {"data2vec": rows}
    ends = plot.draw_phases(tables).axes[3].lines[0]
    assert list(ends.get_xdata()) == [1, 2] and list(ends.get_ydata()) == [0.25, 0.5]
    assert len(plot.draw_phases(tables | {"data2vec": rows[:2]}).axes) == 2


def test_contrast_names_every_target_and_its_change(tmp_path):
    rows = [f"8,2,3,4,0,5,{target},{l},{0.5**(l * (target == 'token'))},9\n"
            for target in ("latent", "token", "other") for l in (1, 2, 3)]
    header = "v,s,m,L,zipf,seeds,target,level,contrast,P_noise\n"
    kind, rows = table(tmp_path, header + "".join(rows), "contrast.csv")
    axis, = plot.draw_contrast({"contrast": rows}).axes
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert kind == "contrast" and sorted(names) == [
        "other, \u00d71.00 a level", "own latents, \u00d71.00 a level", "tokens, \u00d70.50 a level"]
    assert names[-1].startswith("tokens")  # the lowest line is the last name
