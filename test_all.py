"""
Everything against an oracle: brute force, a closed form, or the population limit computed from
the rules.

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
from collections import Counter
from contextlib import contextmanager
from functools import partial
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
torch.set_num_threads(1)
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no bash, links and kill -9")


def samples_of(n, v=4):
    """Strings of n grammars, no two samples of one size; those from the sixth on are larger."""
    sizes = [50 + r + 30 * (r > 4) for r in range(n)]
    return [Grammar.random(v, 2, 3, 3, r).sample(P, r)[0] for r, P in enumerate(sizes)]


@contextmanager
def refused(start):
    """A ValueError of one line that begins like this."""
    with pytest.raises(ValueError, match=f"^{start}") as error:
        yield
    assert "\n" not in str(error.value)


def as_likely(counts, p):
    """Are counts within five standard deviations of what the probabilities p give?"""
    n = counts.sum()
    return bool(((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 1e-9).all())


def failing(error):
    """A function that does nothing but raise this."""
    def fail(*arguments):
        raise error

    return fail


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call("grammar", "--depth 3") runs a script in an empty folder: (exit code, out, err)."""
    monkeypatch.chdir(tmp_path)

    def run(script, flags):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *shlex.split(flags)])
        module, code = sys.modules[script], 0
        try:
            if script == "plot":  # which needs nothing of ours but files
                module.main()
            else:
                grammar.run_script(module.main)
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


# ----------------------------------------------------------------------------------------
# grammar.py


# v, s, m, L; all tuples are in use in two of them
SIZES = [(8, 2, 4, 3), (5, 3, 7, 3), (3, 2, 3, 4), (256, 4, 5, 2), (256, 2, 256, 2)]
uniform_and_zipf = pytest.mark.parametrize("zipf", [0, 1.0])


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
    rules = [Grammar.random(3, 2, 1, 2, seed).rules[0][0, 0] for seed in range(2000)]
    used = torch.bincount(tuple_codes(torch.stack(rules), 3), minlength=9)
    assert as_likely(used, torch.full((9,), 1 / 9))


GOOD_RULES = [[[[0, 0], [0, 1]], [[1, 0], [1, 1]]]] * 2
GOOD = dict(v=2, s=2, m=2, L=2, rules=GOOD_RULES)


def test_a_grammar_owns_its_rules():
    rules = torch.tensor(GOOD_RULES, dtype=torch.uint8)
    g = Grammar(2, 2, 2, 2, rules)
    rules[:] = 0
    assert [rule.tolist() for rule in g.rules] == GOOD_RULES


@pytest.mark.parametrize("change, start", [
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
def test_a_grammar_that_fits_nothing_is_refused(change, start):
    assert Grammar(**GOOD).rules[1].tolist() == GOOD_RULES[1]
    with refused(start):
        Grammar(**(GOOD | change))


@pytest.mark.parametrize("zipf", [0.0, 1.5])
@pytest.mark.parametrize("size", SIZES)
def test_parse_inverts_sample(size, zipf):
    g = Grammar.random(*size, seed=2, zipf=zipf)
    levels = g.sample(3000, seed=3)
    assert [h.shape for h in levels] == [(3000, g.s ** (g.L - l)) for l in range(g.L + 1)]
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
    g = Grammar.random(128, 2, m, 2, seed=0, zipf=zipf)
    levels = g.sample(4000, seed=1)
    p = (torch.arange(m).double() + 1) ** -zipf
    p = p / p.sum()
    assert torch.allclose(p, g.p)
    for l in (1, 2):
        # which rule each symbol of the level picked
        tuples = levels[l - 1].unflatten(1, (-1, 2))[:, :, None]    # (P, n, 1, 2)
        rules = g.rules[l - 1][levels[l].long()]                    # (P, n, m, 2)
        picked = (rules == tuples).all(3).flatten(0, 1).double().sum(0)
        assert picked.sum() == levels[l].numel() and as_likely(picked, p)


@pytest.mark.parametrize("l", [1, 2, 3])
def test_without_a_rule(l):
    g = Grammar.random(4, 2, 3, 3, seed=0)
    levels, other = g.sample(2000, 5), g.sample(2000, 5, without=l)
    assert equal(levels[l:], other[l:]) and equal(g.parse(other[0]), other)
    left_out, instead = (g.rules[l - 1][levels[l].long(), rule] for rule in (0, 1))
    tuples, theirs = (h[l - 1].unflatten(1, (-1, 2)) for h in (levels, other))
    absent = (tuples == left_out).all(2)
    assert absent.any() and torch.equal(theirs[~absent], tuples[~absent])
    assert torch.equal(theirs[absent], instead[absent])


def strings_with_a_wrong_tuple():
    """A grammar and five of its strings, of which no rule explains tokens 4, 5 of string 3."""
    g = Grammar.random(4, 2, 2, 3, seed=0)
    x = g.sample(5, 0)[0].clone()
    valid = set(map(tuple, g.rules[0].reshape(-1, 2).tolist()))
    wrong = next(t for t in itertools.product(range(4), repeat=2) if t not in valid)
    x[3, 4:6] = torch.tensor(wrong)
    return g, x


def test_parse_names_what_it_cannot_explain():
    g, x = strings_with_a_wrong_tuple()
    with refused("x: string 3, level 0, position 4"):
        g.parse(x)
    x[2, 1] = 4
    for wrong, reason in [(x, "must hold symbols 0..3"), (x[:2, :7], "the shape must be"),
                          (x.float(), "must hold whole numbers")]:
        with refused(f"x: {reason}"):
            g.parse(wrong)


def test_requests_that_cannot_be_met():
    g = Grammar.random(4, 2, 2, 3, seed=0)
    levels = g.sample(5)
    for named, request in [
        ("samples", lambda: g.sample(0)), ("samples", lambda: g.sample(2.5)),
        ("samples", lambda: g.sample(2**31 - 1)), ("seed", lambda: g.sample(1, -1)),
        ("seed", lambda: g.sample(1, 0.5)), ("seed", lambda: Grammar.random(4, 2, 2, 3, "a")),
        *(("without", partial(g.sample, 5, without=wrong)) for wrong in (0, 4, 0.5, (1, 0))),
        ("m", lambda: Grammar.random(4, 2, 1, 2).sample(5, without=1)),
        ("l", lambda: g.swap(levels, 0, "generic")), ("l", lambda: g.swap(levels, 4, "generic")),
        ("kind", lambda: g.swap(levels, 1, "x")),
        ("m", lambda: Grammar.random(8, 3, 1, 3).swap(levels, 1, "synonym")),
        ("table", lambda: grammar.best_matching([[1.0, math.nan]])),
        ("table", lambda: grammar.best_matching([[1.0, math.inf]])),
        ("estimate", lambda: accuracy(levels[0].float(), levels[0], 4)),
        ("estimate", lambda: accuracy(levels[0].long() + 2**40, levels[0], 4)),
        ("estimate: must have the shape", lambda: accuracy(levels[0][:1], levels[0], 4)),
        ("truth", lambda: accuracy(levels[0], levels[0], 2)),
        ("x", lambda: grammar.as_strings([[0, 1, 2], [0]], 4, 2)),
        ("x", lambda: grammar.as_strings([[0, 1, 2, 300]], 256, 2)),
        ("x", lambda: grammar.as_strings(levels[0].double(), 4, 2)),
        ("s", lambda: grammar.as_strings(levels[0], 4, 1)),
        ("s", lambda: grammar.as_strings(levels[0], 256, 8)),
    ]:
        with refused(named if ":" in named else f"{named}: "):
            request()


@pytest.mark.parametrize("size", [(8, 2, 4, 4), (6, 3, 20, 3)])
@uniform_and_zipf
def test_marginals_match_the_population(size, zipf):
    g = Grammar.random(*size, seed=5, zipf=zipf)
    for l, h in enumerate(g.sample(40000, seed=6)):
        for n in range(h.shape[1]):
            assert as_likely(torch.bincount(h[:, n], minlength=g.v), g.marginal(l, n))


def every_string(g):
    """All derivations of a tiny grammar, level by level as in sample, and how likely each is."""
    levels = [torch.arange(g.v)[:, None]]
    chance = torch.full((g.v,), 1 / g.v, dtype=torch.float64)
    for rules in reversed(g.rules):
        h = levels[0]
        picks = torch.tensor(list(itertools.product(range(g.m), repeat=h.shape[1])))
        levels = [a.repeat_interleave(len(picks), 0) for a in levels]
        chance = chance.repeat_interleave(len(picks)) * g.p[picks].prod(1).repeat(len(h))
        below = rules.long()[levels[0], picks.repeat(len(h), 1)]
        levels.insert(0, below.flatten(1))
    return levels, chance


@pytest.mark.parametrize("size", [(3, 2, 2, 3), (2, 3, 3, 2)])
@uniform_and_zipf
def test_context_and_marginal_equal_brute_force_and_synonyms_share_them(size, zipf):
    g = Grammar.random(*size, seed=1, zipf=zipf)
    levels, chance = every_string(g)
    nodes = [(l, n) for l, h in enumerate(levels) for n in range(h.shape[1])]
    for level, n in nodes:
        target = F.one_hot(levels[level][:, n], g.v).double() * chance[:, None]
        assert torch.allclose(target.sum(0), g.marginal(level, n))
        for l, t in [(above - 1, node) for above, node in nodes if above > 0]:
            if level <= l and n // g.s ** (l + 1 - level) == t:
                with refused(f"n: node {n} lies within tuple {t} of level {l}"):
                    g.context(l, t, level, n)
                continue
            context = g.context(l, t, level, n)
            tuples = levels[l].unflatten(1, (-1, g.s))[:, t]
            # every tuple on its own: the synonyms must agree
            for a, rule in itertools.product(range(g.v), range(g.m)):
                seen = target[(tuples == g.rules[l][a, rule]).all(1)].sum(0)
                assert torch.allclose(seen / seen.sum().clamp(min=1e-300), context[a])


@pytest.mark.parametrize("target, target_level, n", [
    ("latent", 1, 2), ("token", 0, 4), ("root", 3, 0),
])
def test_empirical_contexts_converge_at_the_root_rate(target, target_level, n):
    g = Grammar.random(8, 2, 3, 3, seed=7)
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


@uniform_and_zipf
def test_contrast_is_the_spread_of_contexts(zipf):
    # m = v, so that every symbol stands everywhere and no context is missing
    g = Grammar.random(4, 2, 4, 3, seed=3, zipf=zipf)
    found = g.contrast()

    def distances(phi):
        a, b = torch.triu_indices(4, 4, 1)
        return (phi[a] - phi[b]).square().sum(1)

    for l in range(2):
        squares = {"latent": [], "token": [], "root": [], "joint": []}
        # of each target: its level, and how many there are in a cousin
        targets = {"latent": (l, 2), "token": (0, 2 ** (l + 1)), "joint": (l + 1, 1)}
        for i, (name, (level, inside)) in itertools.product(range(2), targets.items()):
            for e in range(inside):
                joint = 0
                # pooled over grandparents, each weighed by how likely it is
                for grandparent in range(2 ** (g.L - l - 2)):
                    t = 2 * grandparent + i
                    n = (2 * grandparent + 1 - i) * inside + e
                    p = g.marginal(l + 1, t)[:, None]
                    joint = joint + p * g.context(l, t, level, n)
                squares[name].append(distances(joint / joint.sum(1, keepdim=True)))
        for t in range(2 ** (g.L - l - 1)):
            squares["root"].append(distances(g.context(l, t, g.L, 0)))
        for name, values in squares.items():
            rms = torch.stack(values).mean().sqrt().item()
            assert found[name][l] == pytest.approx(rms, rel=1e-6), (name, l)


@pytest.mark.parametrize("size", [(3, 2, 2, 3), (3, 2, 3, 2), (2, 3, 3, 2)])
@uniform_and_zipf
def test_posterior_equals_enumeration(size, zipf):
    g = Grammar.random(*size, seed=1, zipf=zipf)
    levels, chance = every_string(g)
    x = g.sample(12, 1)[0].long()
    visible = torch.from_numpy(np.random.default_rng(0).random(x.shape) < 0.5)
    visible[0], visible[1] = False, True
    x[~visible] = 77  # never read
    before = x.clone()
    found = g.posterior(x.numpy(), visible)
    assert torch.equal(x, before)
    for p in range(len(x)):
        fits = (levels[0] == x[p])[:, visible[p]].all(1)
        weight = chance * fits
        for l in range(g.L + 1):
            one_hot = F.one_hot(levels[l], g.v).double()
            share = torch.einsum("d,dnv->nv", weight, one_hot) / weight.sum()
            assert torch.allclose(found[l][p], share)


def test_posterior_refuses_what_no_derivation_explains():
    g, x = strings_with_a_wrong_tuple()
    visible = torch.ones(8, dtype=torch.bool)
    with refused("x: string 3 has no derivation"):
        g.posterior(x, visible)
    for bad_x, bad_visible in [(x[:, :4], visible), (x, visible[:4]), (x, visible.int()),
                               (x.float(), visible), (x + 4, visible)]:
        with refused("(x|visible): "):
            g.posterior(bad_x, bad_visible)


@pytest.mark.parametrize("l", [1, 2, 3])
def test_synonym_swap_keeps_what_is_above_and_generic_swap_changes_the_parent(l):
    g = Grammar.random(8, 3, 4, 3, 1)
    levels = g.sample(600, 5)
    synonym, node = g.swap(levels, l, "synonym", 2)
    generic, same = g.swap(levels, l, "generic", 2)
    assert torch.equal(node, same)
    assert all(map(torch.equal, g.parse(synonym[0]), synonym))  # still a derivation
    assert all(map(torch.equal, synonym[l:], levels[l:]))
    assert all(map(torch.equal, generic[l + 1 :], levels[l + 1 :]))
    rows = torch.arange(600)
    for swapped in (synonym, generic):
        for k in range(l + 1):
            # what stands on level k under each node of level l
            new, old = (h[k].view(600, -1, 3 ** (l - k)).clone() for h in (swapped, levels))
            moved = (new[rows, node] != old[rows, node]).any(1).float().mean()
            assert k == l or moved > 0.9
            new[rows, node] = old[rows, node]
            assert torch.equal(new, old)  # nothing outside the node changes
        new, old = (h[l - 1].view(600, -1, 3)[rows, node] for h in (swapped, levels))
        assert (new != old).any(1).all()
    share = (generic[l][rows, node] != levels[l][rows, node]).float().mean()
    assert abs(share - 28 / 31) < 0.06  # of the 31 other tuples, 28 have another parent


@uniform_and_zipf
@pytest.mark.parametrize("kind", ["synonym", "generic"])
def test_swap_draws_any_other_tuple_with_its_chance(kind, zipf):
    g, P = Grammar.random(3, 2, 3, 2, seed=1, zipf=zipf), 30000
    one = [h[:1].expand(P, -1) for h in g.sample(1, 0)]  # one string, many times
    swapped, node = g.swap(one, 1, kind, seed=2)
    rules = tuple_codes(g.rules[0].flatten(0, 1), 3)
    # the number, 0 to 8, of the rule that makes each tuple
    old, new = ((tuple_codes(h[0].unflatten(1, (-1, 2)), 3)[..., None] == rules).int().argmax(2)
                for h in (one, swapped))
    for n in range(2):
        seen = torch.bincount(new[node == n, n], minlength=9)
        p = (g.p / 3).repeat(3)
        if kind == "synonym":
            p[torch.arange(9) // 3 != old[0, n] // 3] = 0
        p[old[0, n]] = 0
        assert as_likely(seen, p / p.sum())


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 3), (5, 5), (6, 6), (6, 4), (3, 6)])
def test_matching_equals_brute_force(rows, columns):
    random = np.random.default_rng(rows * 10 + columns)
    for turn in range(40):
        whole, real = random.integers(0, 9, (rows, columns)), random.normal(size=(rows, columns))
        table = whole if turn < 30 else real
        small = table if rows <= columns else table.T
        pairings = itertools.permutations(range(small.shape[1]), small.shape[0])
        best = max(sum(small[i, j] for i, j in enumerate(p)) for p in pairings)
        assert grammar.best_matching(table) == pytest.approx(best, abs=1e-12)


def test_accuracy():
    truth = torch.tensor([[0, 1, 2], [2, 1, 0]])
    assert accuracy((truth + 1) % 3, truth, 3) == 1  # names of clusters don't matter
    some = torch.tensor([[7, 1, -1], [2, 1, 7]])
    assert accuracy(some, truth, 3) == pytest.approx(5 / 6)  # unknown is wrong
    assert accuracy(torch.full((2, 3), -1), truth, 3) == 0
    assert accuracy(truth[:0], truth[:0], 3) == 0


@pytest.mark.parametrize("n, d", [(10, 40), (40, 10)])
def test_the_probe_is_ridge_regression(n, d):
    random = torch.Generator().manual_seed(0)
    features, new = torch.randn(n, d, generator=random), torch.randn(5, d, generator=random)
    labels = torch.randint(4, (n,), generator=random)
    x, y = features.double(), F.one_hot(labels, 4).double()
    centre, share = x.mean(0), y.mean(0)
    x, y = x - centre, y - share
    weight = (x.T @ x / n + grammar.RIDGE * torch.eye(d)).inverse() @ x.T @ y / n
    expected = (new - centre) @ weight + share
    found = linear_probe(features, labels, 4)(new)
    assert torch.allclose(found.double(), expected, atol=1e-4)


def test_load_reads_what_save_wrote_and_arrays_from_elsewhere(tmp_path):
    g = Grammar.random(6, 3, 5, 3, seed=4, zipf=0.5)
    rules = [rule.long().numpy() for rule in g.rules]
    np.savez(tmp_path / "theirs.npz", *rules)
    np.save(tmp_path / "theirs.npy", np.stack(rules))
    grammar.save_strings(tmp_path / "ours.npz", g, g.sample(7))
    for file in tmp_path.iterdir():
        assert all(map(torch.equal, Grammar.load(file).rules, g.rules))
    assert repr(Grammar.load(tmp_path / "ours.npz")) == repr(g)
    with np.load(tmp_path / "ours.npz") as file:
        assert torch.equal(torch.from_numpy(file["level0"]), g.sample(7)[0])


def test_load_refuses_what_is_no_grammar(tmp_path):
    good = np.array(GOOD_RULES)
    bad = {"dict": {"rules0": good[0]}, "one": good[0][:1], "float": good / 2,
           "flat": good.reshape(-1), "short": good[:1], "twice": good * 0}
    for name, value in bad.items():
        np.save(tmp_path / f"{name}.npy", value, allow_pickle=True)
    np.savez(tmp_path / "gap.npz", rules0=good[0], rules2=good[1])
    (tmp_path / "text").write_bytes(b"hello")
    for file in tmp_path.iterdir():
        with refused("load: "):
            Grammar.load(file)
    with refused("load: .*No such file"):
        Grammar.load(tmp_path / "missing")


@posix
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
    def read(**given):
        return vars(grammar.read_settings(TABLE, CHOICES, given))

    assert read() == {"rate": 0.5, "steps": 4, "how_much": "all", "ema": True}
    paper = {"rate": 0.1, "steps": 3, "how_much": "some", "ema": False}
    assert read(preset="paper", how_much="some") == paper
    assert read(rate=np.float64(0.25), steps=np.int64(2))["rate"] == 0.25
    for name, value in [("rate", 2), ("rate", math.nan), ("steps", 2.0), ("steps", True),
                        ("steps", "²"), ("steps", 10**5000), ("ema", 1), ("rates", 0.5),
                        ("how_much", "Some"), ("preset", "theirs")]:
        with refused(name.replace("_", "-") + ": "):
            read(**{name: value})


def test_flags_and_python_read_a_setting_alike():
    parser = grammar.Parser("")
    grammar.add_settings(parser, TABLE, CHOICES)
    args = parser.parse_args("--rate 0.25 --ema --how-much some --preset paper".split())
    given = grammar.given_settings(TABLE, args)
    assert given == {"preset": "paper", "rate": 0.25, "how_much": "some", "ema": True}
    assert grammar.given_settings(TABLE, parser.parse_args([])) == {}


def test_the_script_draws_a_derivation(call):
    _, out, _ = call("grammar", "--v 2 --m 1 --depth 2 --seed 1")
    lines = out.splitlines()
    g = Grammar.random(2, 2, 1, 2, seed=1)
    for a, b in g.rules[1][:, 0].tolist():
        assert any(line.endswith(f"-> {a} {b}") for line in lines)
    drawn = [line.split()[2:] for line in lines if re.match("level [0-9]  ", line)]
    levels = g.sample(1, 1)
    assert drawn == [list(map(str, h[0].tolist())) for h in reversed(levels)]


def test_contrast_as_a_script(call):
    _, out, _ = call("grammar", "--depth 4 --m 3 --contrast --seeds 3 --csv contrast.csv")
    rows = list(csv.DictReader(open("contrast.csv")))
    assert "latent" in out
    assert list(rows[0]) == "v s m L zipf seeds target level contrast P_noise".split()
    assert len(rows) == 4 * 3 and {row["seeds"] for row in rows} == {"3"}
    grammars = [Grammar.random(8, 2, 3, 4, seed) for seed in range(3)]
    square = np.mean([g.contrast()["token"][2] ** 2 for g in grammars])
    (row,) = [row for row in rows if row["target"] == "token" and row["level"] == "3"]
    assert float(row["contrast"]) == pytest.approx(square**0.5, rel=1e-4)
    assert float(row["P_noise"]) == pytest.approx(24 / square, rel=1e-4)


@posix
def test_a_reader_that_has_gone_is_no_error():
    words = ["bash", "-c", f"{shlex.quote(sys.executable)} grammar.py --depth 3 | head -1"]
    broken = subprocess.run(words, cwd=HERE, capture_output=True, text=True, timeout=120)
    assert broken.stdout.startswith("level 3 -> 2") and broken.stderr == ""


def test_a_script_runs_with_its_outputs_closed(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    grammar.run_script(lambda: print("nobody reads it", file=sys.stderr))


# ----------------------------------------------------------------------------------------
# cluster.py


@pytest.mark.parametrize("target", cluster.TARGETS)
@pytest.mark.parametrize("positions", ["all", "cousins", "element"])
def test_count_equals_a_loop(target, positions, monkeypatch):
    monkeypatch.setattr(cluster, "CHUNK_TOKENS", 64)  # several chunks
    g, s, l = Grammar.random(3, 3, 4, 3, seed=0), 3, 1
    levels = g.sample(30, seed=0)
    x, h, root = levels[0], levels[l], levels[-1][:, 0]
    support = cluster.Support(h, g.v, s)
    ids = support.ids(h)
    below = {"latent": h, "token": x, "joint": ids, "root": None}[target]
    loop = Counter()
    positions_used = range(ids.shape[1]) if positions == "all" else [0]
    for p, t in itertools.product(range(len(h)), positions_used):
        if target == "root":
            i, seen = t, [root[p]]
        else:
            i, cousins = t % s, [t - t % s + j for j in range(s) if j != t % s]
            seen = below[p].unflatten(0, (ids.shape[1], -1))[cousins].flatten()
        for k, symbol in enumerate(seen[:1] if positions == "element" else seen):
            loop[i, k, int(ids[p, t]), int(symbol)] += 1
    tables = cluster.count(h, x, root, support, target, positions)
    targets = len({k for _, k, _, _ in loop})
    assert tables.sum() == sum(loop.values()) and tables.shape[1] == len(support.codes)
    assert all(tables[i * targets + k, a, b] == n for (i, k, a, b), n in loop.items())


def test_contexts_are_shares_and_the_mean_where_a_tuple_is_missing():
    tables = torch.tensor([[[1, 3], [0, 0], [2, 0]]])  # one position, three tuples, two symbols
    phi = torch.tensor([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]])
    assert torch.allclose(cluster.contexts(tables), phi)


@pytest.mark.parametrize("v, s, m, seed", [(8, 2, 3, 0), (8, 2, 4, 1), (4, 3, 4, 2)])
@pytest.mark.parametrize("target", cluster.TARGETS)
def test_every_target_recovers_every_level(v, s, m, seed, target):
    g = Grammar.random(v, s, m, 3, seed)
    (score,) = cluster.recover([g], [60000], [seed], target)
    assert score.accuracy == [1, 1] and score.collapsed == [False, False]


def test_few_tuples_are_a_collapse():
    (score,) = cluster.recover([Grammar.random(8, 2, 3, 3, 0)], [1], [0])
    assert score.collapsed == [True, True]


def test_token_fails_where_latent_succeeds():
    g = Grammar.random(8, 2, 4, 4, seed=1)
    latent, token = (cluster.recover([g], [4096], [1], t)[0] for t in ("latent", "token"))
    assert min(latent.accuracy) > 0.99 and token.accuracy[-1] < 0.75


def test_scrambled_strings_teach_nothing():
    g = Grammar.random(8, 2, 4, 3, seed=0)
    x, truth = g.sample(20000, 0)[0], g.sample(4096, (0, 1))
    order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))
    tree, mixed = cluster.fit(x, 8, 2), cluster.fit(x.flatten()[order].view_as(x), 8, 2)
    assert repr(tree) == "Tree(v=8, s=2, L=3, target='latent', tuples=[32, 32])"
    assert accuracy(tree.label(truth[0])[1], truth[1], 8) == 1
    # below is the best of 8! matchings of noise
    assert accuracy(mixed.label(truth[0])[1], truth[1], 8) < 0.6


def test_unseen_tuples_are_unknown_and_so_is_all_above(monkeypatch):
    g = Grammar.random(8, 2, 4, 3, seed=0)
    x, fresh = g.sample(12, 0)[0], g.sample(500, 1)[0]
    seen = set(map(tuple, x.reshape(-1, 2).tolist()))
    pairs = fresh.unflatten(1, (-1, 2))
    known = torch.tensor([[tuple(t) in seen for t in row] for row in pairs.tolist()])
    levels = cluster.fit(x, 8, 2).label(fresh.tolist())
    assert torch.equal(levels[0], fresh)
    assert torch.equal(levels[1] >= 0, known) and not known.all()
    assert (levels[2][~known.unflatten(1, (-1, 2)).all(2)] == -1).all()
    monkeypatch.setattr(cluster, "DENSE_TUPLES", 0)  # a search numbers the tuples alike
    assert all(map(torch.equal, cluster.fit(x, 8, 2).label(fresh), levels))


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
    # no structure: against all 3^9 partitions
    X = torch.rand(9, 2, generator=random)
    member = F.one_hot(torch.cartesian_prod(*[torch.arange(3)] * 9), 3).float()
    means = member.mT @ X / member.sum(1)[:, :, None].clamp(min=1)
    best = (X - member @ means).square().sum((1, 2)).min().item()
    assert cluster.kmeans(X, 3, random, 8)[1][0].item() == pytest.approx(best, rel=1e-4)
    assert cluster.kmeans(X[:2], 3, random, 8)[0].max() == 1  # fewer points than clusters


def test_exact_pair_tables_are_grouped_by_parent():
    g = Grammar.random(8, 2, 3, 3, seed=0)
    p = torch.full((8,), 1 / 8, dtype=torch.float64)
    parents = torch.stack([g.siblings(2, i, 1 - i, p) for i in range(2)])
    tables = 1e6 * parents.repeat_interleave(3, 1).repeat_interleave(3, 2)  # of their tuples
    labels = cluster.cluster_pairs(tables, 8, torch.Generator().manual_seed(0))
    assert accuracy(labels, torch.arange(24) // 3, 8) == 1


def test_the_paper_preset_counts_one_position():
    x = Grammar.random(8, 2, 4, 3, seed=0).sample(500, 0)[0]
    paper, same, ours = (cluster.fit(x, 8, 2, **given).symbols for given in
                         ({"preset": "paper"}, {"positions": "cousins"}, {}))
    assert all(map(torch.equal, paper, same)) and not torch.equal(paper[0], ours[0])


def test_the_script_shows_what_recover_scores(call):
    flags = "--depth 3 --samples 300 --m 4 --seed 2 --positions cousins --zipf 0.5"
    _, out, _ = call("cluster", flags)
    g = Grammar.random(8, 2, 4, 3, seed=2, zipf=0.5)
    (score,) = cluster.recover([g], [300], [2], positions="cousins")
    for level, right in enumerate(score.accuracy, 1):
        assert re.search(rf"^ +{level} .* {right:.3f}$", out, re.M)


# ----------------------------------------------------------------------------------------
# predictor.py


def small_network(s, L, d=4, target="latent", elements="all", seed=0):
    heads = predictor.heads_of(target, elements, s, L)
    network = predictor.Network(1, s, d, 8, heads)
    network.draw([torch.Generator().manual_seed(seed)])
    return network


def small_draw(g, strings=64):
    """One step's random numbers for one run on a grammar's strings."""
    x = [g.sample(strings, 1)[0]]
    options = predictor.read_options(g.v, "latent", {"batch": strings})
    random = [torch.Generator().manual_seed(0)]
    return next(predictor.draws(x, g.s, g.L, options, random, "cpu"))


def small_losses(g, student, teacher, target="latent", **settings):
    """The losses of one run, as a list: of prediction, then of clustering."""
    options = predictor.read_options(g.v, target, {"gate": 0.0} | settings)
    draw = small_draw(g)
    taught = [h.detach() for h in teacher(draw[0])[1]]
    prediction, clustering = predictor.losses(student, taught, draw, options)
    return [*prediction[0], *clustering[0]]


def reached(loss, network):
    """Which weights a loss has a gradient for: {(module, part)}, part predict or cluster."""
    names, weights = zip(*network.named_parameters())
    grads = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
    parts = [name.split(".")[1:3] for name in names]
    return {(int(l), part) for (l, part), grad in zip(parts, grads)
            if grad is not None and grad.abs().max() > 0}


def test_gain_is_0_for_the_marginal_and_1_for_the_cousins_themselves():
    random = torch.Generator().manual_seed(0)
    symbols = torch.randint(5, (1, 40, 2, 1), generator=random)  # two cousins in a string
    codes = F.one_hot(symbols, 5).float()
    known = codes.flip(2)
    marginal = known.mean(1, keepdim=True).expand_as(known)
    for phi, gain in ((known, 1), (marginal, 0)):
        log_phi = phi.clamp(min=1e-9).log().view(1, 80, 1, 1, 1, 5).expand(-1, -1, 2, -1, -1, -1)
        found = predictor.prediction_loss(log_phi, codes, 2)[1]
        assert found.item() == pytest.approx(gain, abs=2e-3)


def test_clustering_loss_equals_the_double_loop():
    random = torch.Generator().manual_seed(0)
    codes = torch.randn(2, 7, 4, generator=random).softmax(-1)
    alike = torch.rand(2, 7, 7, generator=random) < 0.5
    found = predictor.clustering_loss(codes, alike, 0.3, 0.2)
    for k in range(2):
        total = 0.0
        for i, j in itertools.permutations(range(7), 2):
            overlap = float(codes[k, i] @ codes[k, j])
            like, unlike = math.log(overlap + 0.01), 0.3 * math.log(1.0001 - overlap)
            total -= like if alike[k, i, j] else unlike
        entropy = -float((codes[k] * codes[k].log()).sum()) / 7
        assert found[k].item() == pytest.approx(total / 42 + 0.2 * entropy, rel=1e-3)
    # a code may become exactly one-hot
    logits = torch.tensor([[[0.0, 200.0], [1.0, 0.0]]], requires_grad=True)
    predictor.clustering_loss(logits.softmax(-1), alike[:1, :2, :2], 0.3, 0.2).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("centred", [False, True])
def test_similar_is_the_papers_rule(centred):
    phi = torch.rand(1, 6, 5, generator=torch.Generator().manual_seed(0))
    vectors = (phi[0] - phi[0].mean(0) if centred else phi[0]).numpy()
    found = predictor.similar(phi, 0.8, centred)[0]
    for i, j in itertools.product(range(6), repeat=2):
        a, b = vectors[i], vectors[j]
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert bool(found[i, j]) == ((1 + cosine) / 2 > 0.8)


def test_the_gate_is_shut_until_a_predictor_knows_something():
    g, networks = Grammar.random(4, 2, 2, 4, seed=0), (small_network(2, 4), small_network(2, 4))
    opened, shut = (small_losses(g, *networks, gate=gate)[3:] for gate in (0.0, 1.0))
    assert min(opened) > 0.1 and max(shut) < 1e-3


def test_the_learning_rate_falls_to_zero():
    weights = []
    watch = lambda step, steps, network, loss: weights.append(
        [w.detach().clone() for w in network.parameters()])
    predictor.fit(STRINGS, 4, 2, steps=20, epochs=200, watch=watch)
    pairs = itertools.pairwise(weights)
    moved = [max((b - a).abs().max() for a, b in zip(*pair)) for pair in pairs]
    # steps 2 and 20, at 19/20 and at 1/20 of the first rate
    assert len(moved) == 19 and moved[-1] < moved[0] / 5


@pytest.mark.parametrize("detach", ["none", "layers", "layers+clusterer"])
def test_each_loss_reaches_the_weights_it_should(detach):
    g, student = Grammar.random(4, 2, 2, 4, seed=0), small_network(2, 4)
    parts = small_losses(g, student, small_network(2, 4, seed=1), detach=detach)
    for l in range(3):
        all_below = set(itertools.product(range(l), ("predict", "cluster")))
        below = all_below if detach == "none" else set()
        own = {(l, "cluster")} if detach == "layers+clusterer" else {(l, "cluster"), (l, "predict")}
        assert reached(parts[l], student) == below | {(l, "predict")}
        assert reached(parts[3 + l], student) == below | own


@pytest.mark.parametrize("s, l", [(2, 0), (2, 1), (3, 1)])
@pytest.mark.parametrize("elements", ["all", "one"])
@pytest.mark.parametrize("target", predictor.TARGETS)
def test_targets_are_what_they_say(target, elements, s, l):
    """Of module l: the cousins' symbols by the teacher, their tokens, or them and theirs."""
    g = Grammar.random(4, s, 2, 3, seed=0)
    student, teacher = (small_network(s, 3, 4, target, elements, seed) for seed in (0, 1))
    x = small_draw(g)[0]
    codes, log_phi = [h.detach()[0] for h in teacher(x)[1]], student(x)[0][l].detach()[0]
    below = codes[0] if target == "token" else codes[l]
    n = s ** (2 - l)                                        # tuples in a string
    below = below.unflatten(1, (n, -1))
    terms = []
    for b, t in itertools.product(range(64), range(n)):
        others = [t - t % s + j for j in range(s) if j != t % s]
        if elements == "one":                               # from the first position alone
            others = others[:1] if t % s == 0 else []
        for c, cousin in enumerate(others):
            known = below[b, cousin, :1] if elements == "one" else below[b, cousin]
            if target == "joint":
                known = torch.cat([known, codes[l + 1][b, cousin : cousin + 1]])
            terms += (-log_phi[b * n + t, t % s, c] * known).sum(1).tolist()
    found = small_losses(g, student, teacher, target, elements=elements)[l]
    assert found.item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_without_a_teacher_the_targets_are_the_students_own_codes(monkeypatch):
    """ema = 0: after every step the teacher's codes are the student's, to the byte."""
    x = Grammar.random(4, 2, 2, 3, seed=0).sample(64, 0)[0]
    losses, equal = predictor.losses, []

    def watched(student, taught, draw, *rest):
        own = student(draw[0])[1]
        equal.append(all(map(torch.equal, taught, own)))
        return losses(student, taught, draw, *rest)

    monkeypatch.setattr(predictor, "losses", watched)
    predictor.fit(x, 4, 2, ema=0.0, steps=4)
    predictor.fit(x, 4, 2, ema=0.5, steps=4)
    assert equal == [True] * 5 + [False] * 3  # the first step has no past


def test_exact_contexts_are_grouped_by_parent():
    g, random = Grammar.random(8, 2, 3, 3, seed=0), torch.Generator().manual_seed(0)
    contexts = [g.context(0, t, 0, n) for t, n in ((0, 2), (0, 3), (1, 0), (1, 1))]
    symbols = g.sample(64, 1)[1].flatten().long()
    phi = torch.cat(contexts, 1).float()[symbols][None]  # (1, 256, 4 v)
    noise = torch.rand(1, 8, predictor.STARTS, predictor.TRIALS, generator=random)
    group = predictor.grouping(phi, 8, noise)[0]
    assert torch.equal(group[:, None] == group, symbols[:, None] == symbols)


def test_grouping_finds_the_likeliest_partition():
    random = torch.Generator().manual_seed(0)
    n, v = 7, 3
    phi = torch.rand(n, 2, 4, generator=random).pow(4).add(1e-2)
    phi = (phi / phi.sum(-1, keepdim=True)).flatten(1)

    def cost(group):
        parts = [phi[group == k] + 1e-3 for k in range(v)]
        divergences = [part * (part / part.mean(0)).log() for part in parts if len(part)]
        return sum(float(part.sum()) for part in divergences)

    best = min(cost(torch.tensor(group)) for group in itertools.product(range(v), repeat=n))
    noise = torch.rand(20, v, predictor.STARTS, predictor.TRIALS, generator=random)
    found = [cost(group) for group in predictor.grouping(phi.expand(20, -1, -1), v, noise)]
    assert min(found) == pytest.approx(best, rel=1e-4)
    assert sum(f < best * 1.001 for f in found) >= 10


def test_two_different_tuples_of_every_string_are_chosen():
    g = Grammar.random(4, 2, 2, 4, seed=0)
    chosen = small_draw(g, 500)[1][0].view(3, 2, 500)  # of three modules
    for (first, second), n in zip(chosen, [8, 4, 2]):  # tuples in a string
        assert (first != second).all()
        for one in (first, second):
            assert torch.equal(one // n, torch.arange(500))
    first, second = chosen[1] % 4
    pairs = torch.bincount(4 * first + second, minlength=16)
    assert as_likely(pairs, (1 - torch.eye(4)).flatten() / 12)


def test_batch_norm_is_right_from_the_first_step_on():
    x = Grammar.random(8, 2, 3, 3, seed=0).sample(512, 0)[0]
    learned = predictor.fit(x, 8, 2, lr=0.0, steps=2)
    norm = copy.deepcopy(learned.network.layers[0].norm)
    log_phi = learned.network(x[None])[0][0].detach()
    phi = log_phi.exp().flatten(2)[0]  # (2048, heads d)
    # two batches know it as well as that
    assert (norm.var[0, 0] / phi.var(0) - 1).abs().max() < 0.5
    assert (norm.mean[0, 0] - phi.mean(0)).abs().max() < 5 * (phi.var(0).max() / 64) ** 0.5


def test_labels_are_the_largest_codes():
    g = Grammar.random(4, 2, 2, 3, 0)
    learned, x = predictor.fit(g.sample(64, 0)[0], 4, 2, steps=3), g.sample(20, 1)[0]
    levels = learned.label(x.tolist())
    assert torch.equal(levels[0], x)
    for l, codes in enumerate(learned.codes(x), 1):
        assert torch.equal(levels[l], codes.argmax(-1)) and levels[l].shape == (20, 2 ** (3 - l))


def test_learns_level_1_and_not_from_scrambled_strings():
    g = Grammar.random(6, 2, 2, 2, seed=2)
    x = g.sample(2048, 0)[0]
    scrambled = x.clone()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    scrambled[:, 2:] = x[order, 2:]  # not its cousin any more
    # the third run is on always fresh strings
    runs = predictor.fit_many([x, scrambled, g], 6, 2, seeds=[0, 0, 0], steps=250)
    known, fresh = g.sample(64, 0), g.sample(1024, (0, 1))
    found = [predictor.score(run, known, fresh)[0][0] for run in runs]
    assert found[0] > 0.95 and found[1] < 0.8 and found[2] > 0.95


# ----------------------------------------------------------------------------------------
# data2vec.py


TINY = {
    "tree": {"width": 16, "hidden": 24, "steps": 3, "batch": 8},
    "transformer": {"preset": "transformer", "width": 16, "hidden": 24, "layers": 3, "steps": 3,
                    "batch": 8, "attention_bias": True, "dropout": 0.1},
}
both_presets = pytest.mark.parametrize("preset", TINY)
every_target = pytest.mark.parametrize("target", data2vec.TARGETS)


def options(**settings):
    return grammar.read_settings(data2vec.SETTINGS, data2vec.PRESETS, settings)


def streams(seeds):
    return [(data2vec.stream(seed, 1), data2vec.stream(seed, 2)) for seed in seeds]


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
    def draw(B, L, rate, block):
        random = torch.Generator().manual_seed(0)
        return data2vec.draw_mask(B, L, 2, rate, block, random)

    sizes = draw(6000, 4, 0.0, "mixed").sum(1)  # rate 0: one block each
    for size in (1, 2, 4):
        assert abs((sizes == size).float().mean() - 1 / 3) < 0.03
    top = draw(6, 4, 0.0, "top")
    assert (top.view(6, 4, 4).all(2).sum(1) == 1).all() and (top.sum(1) == 4).all()
    assert draw(5, 3, 1.0, 0).all()


@both_presets
@every_target
def test_loss_is_the_loop_over_masked_positions(preset, target):
    """The first loss of three runs at once, against one position of one run at a time. The
    student does not see what is hidden, the teacher sees all."""
    settings = options(**TINY[preset] | {"dropout": 0.0, "top": 2})
    xs, v, seeds, losses = samples_of(3), 4, [4, 5, 6], []
    watch = lambda step, steps, network, loss: losses.append(loss)  # noqa: E731
    data2vec.fit_many(xs, v, 2, target, seeds, watch, **vars(settings))
    x, hidden = next(data2vec.batches(xs, 3, 2, seeds, streams(seeds), settings))

    def standard(h):
        return (h - h.mean()) / (h.var(correction=0) + 1e-5) ** 0.5

    def huber(a, b):
        gap = (a - b).abs()
        return torch.where(gap < 4, gap**2 / 8, gap - 2).mean()

    for r, seed in enumerate(seeds):
        start = [data2vec.stream(seed, 0)]
        encoder = data2vec.initialise(data2vec.ENCODERS[preset](1, v, 2, 3, settings), start)
        # 4 tokens, in a multiple of 8
        sizes = {"token": [8], "latent": [16]}.get(target, [16, 16])
        heads = [data2vec.initialise(data2vec.Linear(1, 16, size), start) for size in sizes]
        # the last two maps of the student and the teacher, each (B, T, d)
        maps = [[data2vec.pool(h, 8)[0] for h in encoder(tokens[r : r + 1])[-2:]]
                for tokens in (x.masked_fill(hidden, v), x)]
        terms = []
        for b, t in hidden[r].nonzero().tolist():
            own, whole = ([standard(h[b, t]) for h in some] for some in maps)
            sources = own if target == "stacked" else [own[-1]] * 2
            said = [h @ head.weight[0] + head.bias[0, 0] for h, head in zip(sources, heads)]
            if target == "token":
                terms.append(-F.log_softmax(said[0][:v], 0)[x[r, b, t]])
            elif target == "latent":
                terms.append(huber(said[0], (whole[0] + whole[1]) / 2))
            else:
                terms.append(huber(said[0], whole[0]) + huber(said[1], whole[1]))
        assert torch.allclose(losses[0][r], torch.stack(terms).mean(), rtol=1e-4)


def test_attention_is_the_usual_one_of_every_run():
    random = torch.Generator().manual_seed(0)
    block = data2vec.Block(2, 8, options(**TINY["transformer"]))    # R = 2, T = 8
    for w in block.parameters():
        w.data.normal_(std=0.5, generator=random)
    h = torch.randn(2, 3, 8, 16, generator=random)
    for r, found in enumerate(block.attend(h)):
        qkv = h[r] @ block.qkv.weight[r] + block.qkv.bias[r]        # (B, T, 3 d)
        q, k, v = (part.unflatten(2, (4, 4)).transpose(1, 2) for part in qkv.split(16, 2))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=block.bias[r])
        out = mixed.transpose(1, 2).flatten(2) @ block.out.weight[r] + block.out.bias[r]
        assert torch.allclose(found, out, atol=1e-5)


def test_dropout_keeps_the_mean():
    drop = data2vec.Dropout(0.25, 6, [data2vec.stream(0, 3)], slice(None, None, 2))
    dropped = drop(torch.ones(1, 3, 8, 1000))
    assert {round(x, 4) for x in dropped.unique().tolist()} == {0, 1.3333}
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)


def test_biases_and_norms_do_not_decay():
    network = data2vec.Network(1, 4, 2, 3, "latent", options(**TINY["transformer"]))
    groups = data2vec.adamw(network, 0.3).param_groups
    decay = {id(w): group["weight_decay"] for group in groups for w in group["params"]}
    for name, w in network.named_parameters():
        assert decay[id(w)] == (0 if name.rpartition(".")[2] in ("bias", "gain") else 0.3)


def test_gradients_are_clipped_run_by_run():
    random = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.01, 1.0, 100.0]).view(3, 1, 1)
    grads = [torch.randn(size, generator=random) * scale for size in [(3, 4, 5), (3, 1, 7)]]
    weights = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for w, grad in zip(weights, grads):
        w.grad = grad.clone()
    norms = data2vec.clip_each_run(weights)
    assert torch.allclose(norms, torch.cat([grad.flatten(1) for grad in grads], 1).norm(dim=1))
    factors = (data2vec.CLIP / norms).clamp(max=1).view(3, 1, 1)
    for w, grad in zip(weights, grads):
        assert torch.allclose(w.grad, grad * factors, rtol=1e-5)


def test_learning_rate_rises_stays_and_falls_to_zero():
    settings = options(steps=100, warmup=10, cooldown=0.25, lr=1.0)
    rates = [data2vec.learning_rate(step, settings) for step in range(1, 101)]
    assert rates[0] == 0.1 and rates[9:75] == [1.0] * 66
    assert np.allclose(rates[75:], np.arange(25, 0, -1) / 25)
    settings = options(steps=100, warmup=10, cooldown=0, lr=1.0)
    assert [data2vec.learning_rate(step, settings) for step in (10, 100)] == [1.0, 1.0]


@both_presets
def test_teacher_is_the_closed_form_average_without_gradient(preset, monkeypatch):
    """ema^k start + (1 - ema) sum_i ema^(k-i) student_i after k steps, of recorded students."""
    students, follow = [], data2vec.follow

    def recorded(teacher, student, ema):
        students.append([w.detach().clone() for w in student.parameters()])
        follow(teacher, student, ema)

    def watch(step, steps, teacher, loss):
        assert all(not w.requires_grad and w.grad is None for w in teacher.parameters())

    monkeypatch.setattr(data2vec, "follow", recorded)
    settings = TINY[preset] | {"steps": 5, "ema": 0.9}
    (model,) = data2vec.fit_many(samples_of(1), 4, 2, "latent", [0], watch, **settings)
    pairs = zip(model.untrained.parameters(), model.encoder.parameters())
    for j, (start, last) in enumerate(pairs):
        steps = sum(0.1 * 0.9 ** (4 - i) * students[i][j] for i in range(5))
        assert torch.allclose(last, 0.9**5 * start + steps, atol=1e-6)
    assert not equal(students[0], students[-1])


@both_presets
def test_features_know_the_tree_and_see_all_of_it(preset):
    x, other = samples_of(2)
    model = data2vec.fit(other.tolist(), 4, 2, "several", **TINY[preset])
    maps = model.features(x)
    nodes = [2, 4, 8] if preset == "tree" else [8, 8, 8]
    assert [tuple(h.shape) for h in maps] == [(50, n, 16) for n in nodes]
    changed = x.clone()
    changed[:, 7] = (x[:, 7] + 1) % 4
    # the first token has seen the last
    assert not torch.allclose(model.features(changed)[-1][:, 0], maps[-1][:, 0])
    # and knows where it stands among equal ones
    (equal_ones,) = model.features(torch.zeros(1, 8, dtype=torch.uint8))[-1]
    assert torch.pdist(equal_ones).min() > 0.01


def test_offline_repeats_p_strings_and_online_never():
    g, settings = Grammar.random(8, 2, 4, 4, 0), options(steps=150, batch=16)
    strings = g.sample(20, 3)[0]
    steps = data2vec.batches([strings, g], 4, 2, [3, 3], streams([3, 3]), settings)
    x = torch.stack([x for x, _ in steps], 1).flatten(1, 2)  # (2, 2400, T)
    assert x.shape == (2, 2400, 16) and x.dtype == torch.int64
    assert {tuple(row) for row in x[0].tolist()} == {tuple(row) for row in strings.tolist()}
    assert len(x[1].unique(dim=0)) > 2390


def test_the_mlp_probe_reads_planted_features_and_nothing_else():
    random = torch.Generator().manual_seed(0)
    labels, test = (torch.randint(8, (n,), generator=random) for n in (2048, 4096))
    planted = torch.randn(8, 32, generator=random)
    probe = partial(data2vec.mlp_probe, v=8, steps=150, lr=2e-2)
    stacked = []
    for size, low, high in ((1.0, 0.99, 1.0), (0.0, 0.08, 0.17)):
        known, fresh = (size * planted[y] + 0.1 * torch.randn(len(y), 32, generator=random)
                        for y in (labels, test))
        (answer,) = probe(known[None], labels[None])(fresh[None])
        assert low <= (answer == test).float().mean() <= high
        stacked.append((known, fresh, answer))
    known, fresh, answer = (torch.stack(parts) for parts in zip(*stacked))
    assert torch.equal(probe(known, labels.expand(2, -1))(fresh), answer)  # both at once


def oracle(g, level, raw):
    """Features that parse: at every position a random vector for each symbol of the level. raw:
    for each tuple below, without knowing which are synonyms. Another map is noise."""
    random = torch.Generator().manual_seed(1)
    vectors = torch.randn(g.v**g.s, 64, generator=random)

    def features(x):
        symbols = x  # of strings that may have no derivation above this level
        for rules in g.rules[:level]:
            parent = torch.zeros(g.v**g.s, dtype=torch.long)
            parent[tuple_codes(rules, g.v)] = torch.arange(g.v)[:, None]
            codes = tuple_codes(symbols.unflatten(1, (-1, g.s)), g.v)
            symbols = parent[codes]
        known = vectors[codes if raw else symbols].repeat_interleave(g.s**level, 1)
        return [torch.randn(known.shape, generator=random), known][raw:]

    return features


@pytest.mark.parametrize("level", [1, 2])
def test_unseen_synonym_accuracy_tells_knowing_a_level_from_looking_it_up(level):
    g, settings = Grammar.random(8, 2, 3, 3, 0), options(test_strings=1024)
    unseen, seen, collapsed = data2vec.unseen_synonyms(oracle(g, level, raw=False), g, 0, settings)
    assert unseen[level - 1] == 1 and seen[level - 1] == 1 and not collapsed[level - 1]
    unseen, seen, _ = data2vec.unseen_synonyms(oracle(g, level, raw=True), g, 0, settings)
    assert seen[level - 1] > 0.99 and unseen[level - 1] < 0.4
    # a single string may have no unseen tuple
    known, one = oracle(g, level, raw=False), options(test_strings=1)
    found = [data2vec.unseen_synonyms(known, g, seed, one)[0][level - 1] for seed in range(8)]
    assert set(found) == {0, 1}
    with refused("m: must be 2 or more"):
        data2vec.unseen_synonyms(lambda x: [], Grammar.random(8, 2, 1, 3, 0), 0, settings)


def test_synonym_score_is_one_for_latents_and_about_zero_for_tuples():
    g, settings = Grammar.random(8, 2, 3, 3, 0), options(test_strings=1024)
    latent, raw = (data2vec.synonym_scores(oracle(g, 1, raw), g, 0, settings)[0]
                   for raw in (False, True))
    assert latent == 1 and abs(raw) < 0.1


def test_token_losses_are_those_of_a_loop_and_of_enumeration():
    g = Grammar.random(3, 2, 2, 2, 1, zipf=1.0)
    few = {"test_strings": 20, "mask": 0.4, "mask_block": 0}
    model = data2vec.fit(g, 3, 2, "token", 5, **TINY["tree"], **few)
    x = g.sample(20, (5, 1))[0].long()
    hidden = data2vec.draw_mask(20, 2, 2, 0.4, 0, data2vec.stream(5, 1))
    levels, chance = every_string(g)
    (head,) = model.network.heads
    terms = []
    for b, t in hidden.nonzero().tolist():
        seen = torch.where(hidden, 3, x)[None, b : b + 1]
        said = model.encoder(seen)[-1][0, 0, t] @ head.weight[0] + head.bias[0, 0]
        same, token = (levels[0] == x[b])[:, ~hidden[b]].all(1), levels[0][:, t] == x[b, t]
        known = chance[same & token].sum() / chance[same].sum()
        by_model = -F.log_softmax(said[:3], 0)[x[b, t]].item()
        terms.append([by_model, -known.log(), -chance[token].sum().log()])
    assert np.allclose(data2vec.token_losses(model, g, 5), np.mean(terms, 0), rtol=1e-5)
    with refused("model: must be trained with target token, not latent"):
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


def test_bfloat16_and_compile_are_options_that_are_refused_where_they_fail(monkeypatch):
    g, losses = Grammar.random(4, 2, 2, 3, 0), {False: [], True: []}
    for half, found in losses.items():
        watch = lambda step, steps, network, loss: found.append(loss.item())  # noqa: E731
        data2vec.fit(g, 4, 2, "latent", 0, watch, **TINY["tree"], bfloat16=half)
    assert np.allclose(losses[False], losses[True], rtol=0.02) and losses[False] != losses[True]
    for name, function in (("bfloat16", "autocast"), ("compile", "compile")):
        missing = failing(RuntimeError("there is none\nfurther reading"))
        monkeypatch.setattr(torch, function, missing)
        with refused(f"{name}: does not work on cpu here: there is none$"):
            data2vec.fit(g, 4, 2, **TINY["tree"], **{name: True})


@posix
@pytest.mark.parametrize("preset, target", [("tree", "latent"), ("transformer", "token")])
def test_two_processes_train_as_one(preset, target, call):
    """The same loss at every step, to 1e-4, from batches split 5 to 4; one writes the files."""
    flags = f"--preset {preset} --target {target} --depth 3 --v 4 --m 2 --samples 50 --steps 12"
    flags += " --batch 9 --dropout 0.1 --width 16 --hidden 16 --warmup 1 --device cpu"
    flags += " --probes 12 --probe-strings 50 --test-strings 50 --probe-steps 5"
    call("data2vec", flags + " --trace one")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, HERE / "data2vec.py", *flags.split(), "--trace=two", "--resume=run"]
    both = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks = []
    for rank in "01":  # as torchrun starts them
        env = both | {"RANK": rank, "LOCAL_RANK": rank}
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL))
    assert [rank.wait(60) for rank in ranks] == [0, 0]
    one, two = (np.genfromtxt(name, delimiter=",", skip_header=1) for name in ("one", "two"))
    assert one.shape == (12, 11) and np.allclose(one[:, 1], two[:, 1], rtol=1e-4)
    assert torch.load("run", weights_only=True)["step"] == 12


@pytest.mark.parametrize("target", ["latent", "token"])
def test_it_learns(target):
    """Level 1, where an untrained encoder is near chance, in a few hundred steps."""
    g = Grammar.random(8, 2, 3, 3, 100)
    settings = {"steps": 400, "mask": 0.3, "mask_block": "mixed", "cooldown": 0.25}
    few = {"probe_steps": 5, "test_strings": 512}
    (score,) = data2vec.recover([g], [1024], [100], target, **settings, **few)
    assert score.floor[0] < 0.4 and score.accuracy[0] > 0.55


# ----------------------------------------------------------------------------------------
# all learners


FEW = {"probe_strings": 100, "test_strings": 100, "probe_steps": 5}
# steps so large that every one of them is seen in the scores
STRONG = TINY["tree"] | FEW | {"warmup": 1, "lr": 0.1}
SLIM = {"width": 16, "hidden": 16, "batch": 8}
QUICK = {cluster: {}, predictor: {"steps": 3}, data2vec: TINY["tree"]}
name_of = lambda learner: getattr(learner, "__name__", None)  # noqa: E731
learners = pytest.mark.parametrize("learner", QUICK, ids=name_of)
networks = pytest.mark.parametrize("learner", [predictor, data2vec], ids=name_of)
STRINGS = Grammar.random(4, 2, 2, 3, seed=0).sample(10, 0)[0]


def as_flags(settings):
    """{"lr": 0.1} -> --lr 0.1"""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())


def same(a, b):
    """Have two runs learned the same to the byte? A NaN equals a NaN."""
    if isinstance(a, cluster.Tree):
        return all(map(torch.equal, a.symbols, b.symbols))
    a, b = (model.network.state_dict().values() for model in (a, b))
    return all(torch.equal(p.nan_to_num(7), q.nan_to_num(7)) for p, q in zip(a, b, strict=True))


FORMS = {
    "uint8": torch.clone, "int16": torch.Tensor.short, "int32": torch.Tensor.int,
    "int64": torch.Tensor.long, "lists": torch.Tensor.tolist,
    "array": lambda x: x.numpy().astype(np.int64),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("learner, target, settings", [
    *((cluster, target, {}) for target in cluster.TARGETS),
    (predictor, "latent", {"steps": 2}),
    (data2vec, "stacked", TINY["tree"]), (data2vec, "stacked", TINY["transformer"]),
], ids=name_of)
def test_a_result_depends_on_strings_and_seed_alone(learner, target, settings, form):
    """Any whole numbers will do. Neither they nor the global generator are changed."""
    levels = Grammar.random(8, 2, 4, 3, seed=0).sample(40, 0)
    truth = levels[0], levels[3][:, 0]

    def fit(form, seed):
        x, root = given = [form(part) for part in truth]
        more = settings | ({"root": root} if target == "root" else {})
        model = learner.fit(x, 8, 2, target, seed, **more)
        kept = [torch.as_tensor(part).byte() for part in given]
        assert equal(kept, truth)
        return model

    wanted = fit(torch.clone, 3)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    assert same(wanted, fit(FORMS[form], 3)) and not same(wanted, fit(FORMS[form], 4))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("learner, change, start", [
    *((learner, *case) for learner in QUICK for case in [
        ({"x": STRINGS[:, :6]}, "x: "), ({"x": STRINGS[:, :2]}, "x: "), ({"v": 3}, "x: "),
        ({"x": STRINGS[:0]}, "x: "), ({"x": STRINGS.float()}, "x: "), ({"s": 3}, "x: "),
        ({"s": 1}, "s: "), ({"v": 300}, "v: "), ({"seed": -1}, "seed: "),
        ({"target": "leaf"}, "target: "), ({"preset": "theirs"}, "preset: "),
        ({"colour": 3}, "colour: "),
    ]),
    *((cluster, {"target": "root", "root": root}, "root: ") for root in
      (None, [0], [4] * 10, [-1] * 10, [0.5] * 10)),
    (cluster, {"rounds": 2.5}, "rounds: "), (predictor, {"codes": 3}, "codes: "),
    (predictor, {"gate": math.nan}, "gate: "), (predictor, {"batch": -1}, "batch: "),
    (data2vec, {"online": True}, "online: needs a Grammar"),
    (data2vec, {"preset": "transformer", "heads": 7}, "width: must be a multiple of heads"),
    (predictor, {"batch": 2**20}, "batch: a step"),
    (data2vec, {"batch": 2**20, "width": 2**14}, "batch: a step of"),
    (data2vec, {"width": 2**14, "hidden": 2**16}, "width: .* weights would need"),
], ids=name_of)
def test_fit_refuses_bad_input(learner, change, start):
    with refused(start):
        learner.fit(**{"x": STRINGS, "v": 4, "s": 2} | change)


@learners
def test_what_is_learned_reads_only_strings_like_its_own(learner):
    model = learner.fit(STRINGS, 4, 2, **QUICK[learner])
    read = model.features if learner is data2vec else model.label
    for wrong in (STRINGS.float(), STRINGS + 4, STRINGS[:, :4], STRINGS[0],
                  torch.cat([STRINGS, STRINGS], 1)):
        with refused("x: "):
            read(wrong)


@learners
def test_scores_are_taken_on_strings_that_no_training_saw(learner, monkeypatch):
    drawn, sample = [], Grammar.sample

    def recorded(g, P, seed=0, *more, **settings):
        drawn.append(seed)
        return sample(g, P, seed, *more, **settings)

    monkeypatch.setattr(Grammar, "sample", recorded)
    settings = STRONG if learner is data2vec else QUICK[learner]
    learner.recover([Grammar.random(4, 2, 2, 3, 0)], [64], [7], **settings)
    assert drawn.count(7) == 1 and (7, 1) in drawn


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:1", "", 7])
def test_a_device_that_is_not_there_is_one_line(device):
    g = Grammar.random(4, 2, 2, 2, 0)
    requests = [partial(g.sample, 10, 0)]
    requests += [partial(learner.recover, [g], [10], [0]) for learner in QUICK]
    requests += [partial(network.fit, g, 4, 2) for network in (predictor, data2vec)]
    for request in requests:
        with refused("device: must be cpu.* on this machine$"):
            request(device=device)


@pytest.mark.parametrize("learner, target, settings", [
    (cluster, "latent", {"positions": "cousins"}), (predictor, "latent", {"steps": 3}),
    *((data2vec, target, STRONG) for target in data2vec.TARGETS),
    (data2vec, "latent", STRONG | {"online": True}),
], ids=name_of)
def test_recover_scores_every_run_as_it_does_alone(learner, target, settings):
    grammars = [Grammar.random(4, 2, 2, 3, seed, zipf=0.3) for seed in range(3)]
    samples, seeds = [32, 64, 32], [5, 6, 7]
    scores = learner.recover(grammars, samples, seeds, target, **settings)
    assert scores[0] != scores[1]
    # a network reports the root, too, and a floor
    levels = 2 if learner is cluster else 3
    for g, P, seed, score in zip(grammars, samples, seeds, scores, strict=True):
        assert score == learner.recover([g], [P], [seed], target, **settings)[0]
        floor = [] if learner is cluster else score.floor
        assert len(score.accuracy) == len(score.collapsed) == levels
        assert (score.floor is None) if learner is cluster else (len(floor) == levels)
        assert all(isinstance(a, float) and 0 <= a <= 1 for a in score.accuracy + floor)
        assert all(isinstance(c, bool) for c in score.collapsed) and score.diverged == 0
    with pytest.raises(ValueError, match="zip|^seeds: "):
        learner.recover(grammars, samples[:1], seeds)


def test_online_p_strings_are_p_over_batch_steps():
    g, settings = Grammar.random(4, 2, 2, 3, 1), STRONG
    (score,) = data2vec.recover([g], [64], [1], online=True, **settings)
    model = data2vec.fit(g, 4, 2, "latent", 1, **settings | {"steps": 64 // settings["batch"]})
    assert score == data2vec.measure([model], [g], [1])[0]


@pytest.mark.parametrize("learner, target, settings", [
    *((predictor, target, {}) for target in ("latent", "token")),
    (predictor, "joint", {"detach": "layers"}),
    (predictor, "latent", {"alike": "threshold", "sparsity": 0.01, "elements": "one",
                           "schedule": "constant"}),
    *((data2vec, target, TINY[preset]) for target in data2vec.TARGETS for preset in TINY),
], ids=name_of)
def test_a_run_is_the_same_to_the_byte_whichever_stand_beside_it(learner, target, settings):
    """Runs of other lengths and one on always fresh strings among them."""
    v = 8 if learner is predictor else 5  # data2vec's may be no multiple of 8
    xs = samples_of(8, v)
    xs[3] = Grammar.random(v, 2, 3, 3, seed=3)
    if learner is predictor:
        settings = settings | {"epochs": 4, "steps": 6}
    together = learner.fit_many(xs, v, 2, target, range(8), **settings)
    for runs in ([0], [2], [3], [7], [2, 3, 4]):
        some = learner.fit_many([xs[r] for r in runs], v, 2, target, runs, **settings)
        assert all(same(a, together[r]) for a, r in zip(some, runs))
    assert not same(together[0], together[1])


def poison(step, *rest):
    """For watch: it spoils one weight of run 1, so that the loss of step 3 is not finite."""
    (network,) = [part for part in rest if isinstance(part, torch.nn.Module)]
    if step == 2:
        next(network.parameters()).data[1] = math.nan


STEADY = {predictor: {"schedule": "constant"}, data2vec: TINY["tree"] | {"cooldown": 0}}


@networks
def test_a_run_that_diverges_stops_and_leaves_its_neighbours_alone(learner):
    settings, xs = STEADY[learner] | {"steps": 6}, samples_of(3, 8)
    found = learner.fit_many(xs, 8, 2, "latent", range(3), poison, **settings)
    assert [run.diverged for run in found] == [0, 3, 0]
    alone = learner.fit_many(xs[::2], 8, 2, "latent", [0, 2], **settings)
    assert same(found[0], alone[0]) and same(found[2], alone[1])
    # but for the spoilt weight, it is as it was after two steps
    short = learner.fit(xs[1], 8, 2, "latent", 1, **settings | {"steps": 2})
    kept, wanted = ([*run.network.parameters()][1:] for run in (found[1], short))
    assert equal(kept, wanted)


@pytest.mark.parametrize("learner, settings", [
    (predictor, {"batch": 16, "test_strings": 100}),
    (data2vec, TINY["tree"] | FEW | {"steps": 300, "warmup": 1}),
], ids=name_of)
def test_divergence_is_reported(learner, settings, call):
    settings = settings | {"lr": 1.0, "decay": 10.0, "probes": 1000}
    g, name = Grammar.random(4, 2, 2, 3, 0), learner.__name__
    what = {predictor: "loss", data2vec: "loss or its gradient"}[learner]
    said = f"^step [0-9]+: the {what} is not finite; lower lr or decay$"
    with pytest.raises(FloatingPointError, match=said):
        learner.fit(g.sample(50)[0], 4, 2, **settings)
    (score,) = learner.recover([g], [50], [0], **settings)
    assert score.accuracy == [0.0] * 3 and score.diverged > 1
    assert len(score.floor) == 3 and score.collapsed == [False] * 3
    flags = f"--v 4 --m 2 --samples 50 --trace trace {as_flags(settings)}"
    code, _, said = call(name, flags)
    assert code == 1 and said.strip().splitlines()[-1].startswith(f"{name}.py: step ")
    assert len(Path("trace").read_text().splitlines()) > 2  # what came before is on disk


@networks
def test_runs_that_were_stopped_go_on_to_the_same_bytes(learner, tmp_path, monkeypatch):
    """Two runs beside each other, one of which has diverged by then."""
    file, xs = tmp_path / "run", samples_of(2, 8)
    monkeypatch.setattr(grammar, "SAVE_EVERY", 0)
    monkeypatch.setattr(learner, "BLOCK" if learner is predictor else "DRAWN", 3)

    def fit(watch=None, resume=file, xs=xs, seeds=[0, 1], **change):
        settings = STEADY[learner] | {"steps": 13, "target": "latent"} | change
        return learner.fit_many(xs, 8, 2, seeds=seeds, watch=watch, resume=resume, **settings)

    def stop(step, *rest):
        poison(step, *rest)
        if step == 8:
            raise KeyboardInterrupt

    whole = fit(poison, resume=None)
    with pytest.raises(KeyboardInterrupt):
        fit(stop)
    assert torch.load(file, weights_only=True)["step"] == 6
    for _ in range(2):  # the second time it is at its end
        again = fit()
        assert all(map(same, whole, again)) and [run.diverged for run in again] == [0, 3]
    state = file.read_bytes()
    for change in ({"target": "token"}, {"seeds": [0, 2]}, {"steps": 14}, {"xs": xs[::-1]}):
        with refused("resume: .* is of another run: .* there, .* here$"):
            fit(**change)
    if learner is predictor:
        with refused("resume: is for runs that train in one loop"):
            fit(xs=[xs[0], xs[1][:20]], epochs=4)
    assert file.read_bytes() == state


# a script that is killed in its 8th step, of blocks of two, and writes its state after each
KILLED = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import grammar, {name} as learner
learner.torch.set_num_threads(1)
grammar.SAVE_EVERY = 0
learner.{block} = 2
update = learner.tqdm.update
def killed(bar, steps):
    update(bar, steps)
    if bar.n == 8:
        os.kill(os.getpid(), signal.SIGKILL)
learner.tqdm.update = killed
learner.main()
"""


@posix
@pytest.mark.parametrize("learner, block, flags", [
    (predictor, "BLOCK", ""),
    (data2vec, "DRAWN", "--preset transformer --batch 8 --width 16 --hidden 16 --dropout 0.1 "
                        "--probes 9 --probe-strings 50 --test-strings 50 --probe-steps 5"),
], ids=name_of)
def test_a_killed_script_goes_on_to_the_same_bytes(learner, block, flags, call, tmp_path,
                                                   monkeypatch):
    monkeypatch.setattr(grammar, "SAVE_EVERY", 0)
    monkeypatch.setattr(learner, block, 2)
    name = learner.__name__
    flags = f"--depth 2 --v 4 --m 2 --samples 50 --steps 9 --device cpu {flags}"
    flags += " --resume run --trace trace --save model"

    def go_on(folder):
        monkeypatch.chdir(folder)
        code, out, _ = call(name, flags)
        table = out[out.index("\nlevel"):]
        return code, table, Path("trace").read_bytes(), Path("model").read_bytes()

    whole, folder = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    folder.mkdir()
    wanted = go_on(whole)
    program = KILLED.format(folder=str(HERE), name=name, block=block)
    command = [sys.executable, "-c", program, *flags.split()]
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == -9
    assert torch.load(folder / "run", weights_only=True)["step"] == 6
    with open(folder / "trace", "a") as file:
        file.write("8,0.1")  # a row that the kill cut short
    assert wanted[0] == 0 and go_on(folder) == wanted
    assert go_on(folder) == wanted  # it is at its end, and remains there
    # other runs are refused, and so is what is no state at all
    state = (folder / "run").read_bytes()
    for change in ("--lr 0.5", "--steps 10", "--seed 1", "--samples 49", "--depth 3",
                   "--target token"):
        code, _, said = call(name, f"{flags} {change}")
        line = said.strip().splitlines()[-1]
        assert code == 2 and line.startswith(f"{name}.py: argument --resume: run is of another run")
    assert (folder / "run").read_bytes() == state
    (folder / "run").write_bytes(b"mine")
    code, _, _ = call(name, flags)
    assert code == 2 and (folder / "run").read_bytes() == b"mine"
    assert (folder / "trace").read_bytes() == wanted[2]


@pytest.mark.parametrize("learner, settings", [
    (predictor, {"steps": 3}), (data2vec, TINY["tree"] | FEW),
    (data2vec, TINY["transformer"] | FEW),
], ids=name_of)
def test_what_is_learned_can_be_saved_and_nothing_else_loaded(learner, settings, tmp_path):
    file, target = tmp_path / "ours", learner.TARGETS[-1]
    model = learner.fit(STRINGS, 4, 2, target, **settings)
    model.save(file)
    again = learner.load(file)
    assert same(again, model) and repr(again) == repr(model)
    assert "\n" not in repr(model) and target in repr(model)
    read = [run.features if learner is data2vec else run.label for run in (model, again)]
    assert equal(*(reads(STRINGS) for reads in read))
    if learner is data2vec:
        # what is loaded can be measured, but for its floor
        g = Grammar.random(4, 2, 2, 3, 0)
        scores = [data2vec.measure([run], [g], [0])[0] for run in (model, again)]
        assert scores[0].floor and scores[1] == scores[0]._replace(floor=None)
    saved = torch.load(file, weights_only=True)
    saved.get("predictor", saved)["v"] = 300
    for wrong in (saved, [1], {"v": 8}, {"weights": {}}, b"hello", b""):
        if isinstance(wrong, bytes):
            file.write_bytes(wrong)
        else:
            torch.save(wrong, file)
        with refused(f"file: .* was not written by {learner.__name__}.py"):
            learner.load(file)


def test_a_model_can_be_loaded_even_if_its_measure_would_not_fit(tmp_path):
    model = data2vec.fit(STRINGS, 4, 2, **TINY["tree"] | {"width": 1024, "test_strings": 2**20})
    model.save(tmp_path / "ours")
    assert repr(data2vec.load(tmp_path / "ours")) == repr(model)


SHOWN = {
    (predictor, "latent"): "codes=128.*symbols in use.*linear probe",
    (data2vec, "several"): "untrained\n(level [12] +unseen synonyms[^\n]+\n){2}"
                           "level 3 +MLP probe[^\n]+\n$",
    # a trial of two steps is not measured on thousands of strings
    (data2vec, "token"): "on 8 fresh strings.*\nloss per hidden token [0-9.]+, "
                         "exact Bayes limit [0-9.]+, unigram [0-9.]+\n$",
}
COLUMNS = {
    predictor: "step,accuracy 1,prediction 1,accuracy 2,prediction 2,v,m,P",
    data2vec: "step,loss,target std,rank,unseen 1,unseen 2,synonyms 1,synonyms 2,v,m,P",
}


@pytest.mark.parametrize("learner, target, settings", [
    (predictor, "latent", {"preset": "paper"}),
    (data2vec, "several", {"preset": "tree", **SLIM, **FEW}),
    (data2vec, "several", {"preset": "transformer", **SLIM, **FEW}),
    (data2vec, "token", SLIM),
], ids=name_of)
def test_a_network_runs_alone(learner, target, settings, call):
    """The command line on a tiny run: a table, a trace, and weights that can be loaded."""
    settings = settings | {"steps": 2, "probes": 2}
    flags = f"--depth 3 --v 4 --m 2 --samples 50 --device cpu --target {target}"
    flags += f" {as_flags(settings)} --trace trace --save model"
    code, out, _ = call(learner.__name__, flags)
    assert code == 0 and re.search(SHOWN[learner, target], out, re.S)
    header, *rows = Path("trace").read_text().splitlines()
    assert header == COLUMNS[learner]
    assert len(rows) == 2 and all(row.endswith(",4,2,50") for row in rows)
    x = Grammar.random(4, 2, 2, 3, 0).sample(50, 0)[0]
    model = learner.load("model")
    assert model.target == target and same(model, learner.fit(x, 4, 2, target, 0, **settings))


# ----------------------------------------------------------------------------------------
# CUDA against the CPU: python -m pytest test_all.py -k cuda -rs


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@cuda
def test_cuda_samples_counts_and_probes_as_the_cpu():
    g = Grammar.random(8, 2, 3, 3, 0)
    here, there = g.sample(2048, 0), g.sample(2048, 0, "cuda")
    assert there[0].is_cuda and equal(here, [h.cpu() for h in there])
    assert equal(g.parse(here[0]), [h.cpu() for h in g.parse(there[0])])
    maps = torch.randn(2048, 16, generator=torch.Generator().manual_seed(0))
    scores = linear_probe(maps, here[3][:, 0], 8)(maps)
    found = linear_probe(maps.cuda(), there[3][:, 0], 8)(maps.cuda())
    assert torch.allclose(found.cpu(), scores, atol=1e-4)
    for target in cluster.TARGETS:
        here, there = (cluster.recover([g], [4096], [0], target, device)[0].accuracy
                       for device in ("cpu", "cuda"))
        assert np.allclose(here, there, atol=0.02)


@cuda
@pytest.mark.parametrize("target", predictor.TARGETS)
def test_cuda_trains_the_predictor_as_the_cpu(target):
    """Its random numbers are drawn on the CPU: the same steps, but for rounding."""
    x, losses = Grammar.random(8, 2, 3, 3, 0).sample(512, 0)[0], []
    watch = lambda *now: losses.append(now[3].cpu())  # noqa: E731
    for strings in (x, x.cuda()):
        predictor.fit(strings, 8, 2, target, 0, watch, steps=10)
    assert torch.allclose(torch.stack(losses[:10]), torch.stack(losses[10:]), rtol=1e-2)


@cuda
@both_presets
def test_cuda_encodes_and_measures_as_the_cpu(preset):
    """Strings and masks are drawn on the device, so that only what follows can be compared."""
    g, few = Grammar.random(8, 2, 3, 3, 0), {"probe_strings": 512, "test_strings": 512}
    settings = TINY[preset] | few | {"probe_steps": 50, "steps": 20}
    model = data2vec.fit(g, 8, 2, **settings)
    here = data2vec.measure([model], [g], [0])[0]
    model.encoder.cuda(), model.untrained.cuda()
    there = data2vec.measure([model], [g], [0], "cuda")[0]
    assert np.allclose(here.accuracy, there.accuracy, atol=0.02)
    assert np.allclose(here.floor, there.floor, atol=0.02)


@cuda
@both_presets
@every_target
def test_cuda_trains_data2vec(preset, target, tmp_path):
    """Losses fall, a run depends on its seed alone, and goes on from a checkpoint."""
    g, losses, file = Grammar.random(8, 2, 3, 3, 0), [], tmp_path / "run"
    settings = TINY[preset] | {"steps": 60, "batch": 64, "device": "cuda"}
    watch = lambda step, steps, network, loss: losses.append(loss.item())  # noqa: E731
    model = data2vec.fit(g, 8, 2, target, 0, watch, resume=file, **settings)
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    for resume in (None, file):
        again = data2vec.fit(g, 8, 2, target, 0, resume=resume, **settings)
        pairs = zip(model.encoder.parameters(), again.encoder.parameters())
        assert all(torch.allclose(a, b, atol=1e-3) for a, b in pairs)


# ----------------------------------------------------------------------------------------
# sweep.py


CELL = sweep.Cell("cluster", 8, 2, 3, 3, 0.0)
NETWORK = CELL._replace(method="predictor")


def a_run(*accuracy, floor=None, diverged=0):
    score = grammar.Score(accuracy, (False,) * len(accuracy), floor, diverged)
    return sweep.Run(score, 0.5, "cpu")


def a_ladder(accuracies, first=4):
    """{P: Run} with these accuracies of level 2, P = 4, 8, 16, ..."""
    return {first * 2**i: a_run(1.0, a) for i, a in enumerate(accuracies)}


def test_crossing_on_a_known_curve():
    P = [2.0**k for k in range(4, 16)]
    curve = [1 / (1 + math.exp(-3 * math.log2(p / 300))) for p in P]  # logistic, 0.5 at P = 300
    star, sign = sweep.crossing(P, curve, 0.5)
    assert sign == 0 and star == pytest.approx(300, rel=0.05)
    P = [8, 16, 32, 64, 128]
    for curve, star, sign in [
        ([0.1, 0.4, 0.6, 0.9], 16 * 2**0.5, 0),
        # one rung above it proves nothing yet, and nothing after two in a row changes P*
        ([0.1, 0.9, 0.1, 0.9, 0.9], 32 * 2**0.5, 0), ([0.1, 0.9, 0.9, 0.1], 8 * 2**0.5, 0),
        ([0.1, 0.4], 16, 1), ([0.1, 0.2, 0.6], 16, 1), ([0.6, 0.7, 0.1], 8, -1),
    ]:
        found = sweep.crossing(P[: len(curve)], curve, 0.5)
        assert found == (pytest.approx(star), sign)


def test_means_of_censored_seeds_are_bounds():
    estimate = sweep.estimate
    assert estimate([[(4.0, 0), (16.0, 0)]]) == ("8", "4", "16")
    assert estimate([[(4.0, 0), (16.0, 0)]], digits=1) == ("8.0", "4.0", "16.0")
    assert estimate([[(64.0, 1), (1024.0, 1)]]) == ("> 256", "", "")  # and not > 64
    assert estimate([[(4.0, 0), (16.0, 1)]]) == ("> 8", "", "")
    assert estimate([[(4.0, 0), (16.0, -1)]]) == ("< 8", "", "")
    assert estimate([[(4.0, -1), (16.0, 1)]]) == ("?", "", "")
    assert estimate([[(4.0, 0)]]) == ("4", "", "")  # one seed, no interval


def test_slopes_know_what_a_bound_allows():
    exact = {math.log(m): [(5.0 * m**2, 0)] * 2 for m in (2, 4, 8)}
    assert sweep.slope(exact, float) == "2.00 [2.00, 2.00]"
    for stars, said in [
        ([(100.0, 0), (100.0, 0), (400.0, 1)], "> 2.00"),  # at least 400 at the deepest
        ([(100.0, -1), (200.0, 0)], "> 2.00"), ([(100.0, 1), (100.0, 0)], "< 1.00"),
        ([(100.0, 1), (100.0, 1)], ""),
        ([(100.0, 0), (200.0, 0)], "2.00"),  # one seed, no interval
        ([(100.0, 0)], ""),
    ]:
        points = {L: [star] for L, star in enumerate(stars, 3)}
        assert sweep.slope(points, math.exp) == said


def test_a_ladder_ends_by_its_rules_and_not_by_the_cap():
    ladder = [0.2, 0.95, 0.9, 0.96, 0.97]
    begun = a_ladder(ladder[:4])
    assert sweep.climb(CELL, {}, 1000) == ([], 4, "not finished")
    assert sweep.climb(CELL, begun, 1000) == ([4, 8, 16, 32], 64, "not finished")
    assert sweep.climb(CELL, begun, 63) == ([4, 8, 16, 32], None, "beyond Pmax")
    for beyond in ([], [0.1], [0.1] * 9):  # rungs that a longer ladder had do not count
        found = sweep.climb(CELL, a_ladder(ladder + beyond), 2**20)
        assert found == ([4, 8, 16, 32, 64], None, "")
    assert sweep.last_rung(CELL, 100) == (64, "beyond Pmax")
    last, reason = sweep.last_rung(CELL._replace(L=20), 2**20)
    assert reason == "limited by memory" and last < 2**15


def test_a_networks_ladder_ends_on_a_plateau_or_with_its_steps():
    def climb(accuracies, cell=NETWORK):
        return sweep.climb(cell, a_ladder(accuracies, 64), 2**20)

    climbed, *ended = climb([0.3, 0.6, 0.62, 0.5, 0.64, 0.9, 0.9])
    assert ended == [None, "limited by steps"] and len(climbed) == 5  # three after the .6
    assert climb([0.3, 0.6, 0.62, 0.5, 0.66])[1:] == (2048, "not finished")
    steps = 8 * 300 // 64  # too few to see 512 strings 8 times
    short = NETWORK._replace(method=f"predictor:steps={steps}")
    assert climb([0.1, 0.2, 0.1], short)[1:] == (None, "limited by steps")


def test_methods_have_one_spelling():
    for text, name in [
        ("cluster-latent", "cluster"), ("predictor:hidden=64", "predictor"),
        ("data2vec:preset=tree", "data2vec"),
        ("data2vec:mask-block=top", "data2vec:mask_block=top"),
        ("data2vec-token:mask=.3:steps=8000", "data2vec-token:steps=8000:mask=0.3"),
    ]:
        assert sweep.read_method(text).name == name == sweep.read_method(name).name
    assert sweep.read_method("predictor-token:steps=3200").options.steps == 3200
    for text, hint in [
        ("clutser", "cluster"), ("cluster-leaf", "cluster-"), ("", "cluster"),
        ("predictor:step=3", "steps"), ("predictor:steps=x", "steps"), ("predictor:ema=2", "ema"),
        ("predictor:steps", "name=value"), ("predictor:steps=4:steps=5", "once"),
    ]:
        with refused(f"methods: .*{hint}"):
            sweep.read_method(text)


def test_the_table_shows_the_growth_that_ladders_have(monkeypatch):
    """P* is 100 * 3^L by construction."""
    runs = {}
    for L, seed in itertools.product((2, 3, 4, 5), range(4)):
        star = 100 * 3.0**L if L > 2 else 5     # which is not in the growth
        below, above = a_run(*[1.0] * (L - 2), 0.0), a_run(*[1.0] * (L - 1))
        ladder = {star / 4: below, star * 4: above, star * 16: above}
        runs[CELL._replace(method="cluster-token", L=L), seed] = ladder
    monkeypatch.setattr(sweep, "climb", lambda cell, runs, cap: (sorted(runs), None, ""))
    rows = sweep.summarise(runs, {})
    assert [row["P50"] for row in rows] == ["5", "2700", "8100", "24300"]
    long, short = sweep.tables(rows, is_long=True), sweep.tables(rows, is_long=False)
    assert "3.00 [3.00, 3.00] 3..5 | m" in long
    assert " | 2700 [2700, 2700] | " in long and " | 2700 | " in short


def test_a_row_of_the_table_has_what_its_ladders_say():
    early = CELL._replace(L=4)
    runs = {(CELL, 0): a_ladder([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])}
    runs[early, 0] = {P: a_run(1.0, 1.0, 0.97, diverged=37) for P in (4, 8)}
    row, below = sweep.summarise(runs, {})
    # halfway between 8 and 16, and between 32 and 64
    assert (row["P50"], row["P90"], row["censored"], row["status"]) == ("11", "45", 0, "")
    assert float(row["P50_over_vm3"]) == pytest.approx(8 * 2**0.5 / 216, rel=1e-3)
    assert below["P50"] == "< 4" and below["censored"] == 1 and "P50_over_vm3" not in below
    assert below["notes"] == {"diverged", "below Pmin", "one seed"}
    assert below["status"] == "diverged" and "<4x~" in sweep.tables([row, below], is_long=False)


def test_the_table_says_why_p_star_is_a_bound():
    network, unrun = (CELL._replace(method=f"data2vec{target}") for target in ("", "-token"))
    floors = {P: a_run(0.3, 0.2, 0.1, floor=(0.1, 0.2, 0.6)) for P in (128, 256, 512)}
    runs = {(CELL, 0): a_ladder([0.2, 0.3]), (CELL, 1): a_ladder([0.2, 0.9, 0.9])}
    runs[network, 0] = floors
    left_out = [unrun._replace(L=5), CELL]  # the second is there
    rows = sweep.summarise(runs, {CELL: 1024}, left_out)
    assert [row["status"] for row in rows] == ["not finished", "beyond Pmax", "not run"]
    ours, root, none = rows
    assert ours["P50"].startswith("> ") and ours["seeds"] == 2
    assert sweep.summarise(runs, {})[0]["status"] == "not finished"  # seed 0 stopped short
    assert root["root_stars"] == [(512.0, 1)] and root["root_P50"] == "> 512"
    assert root["root_floor"] == "0.600" and root["floor"] == "0.200" and none["P50"] == ""
    assert root["root_notes"] >= {"one seed", "beyond Pmax"}
    text = sweep.tables(rows, is_long=False)
    for said in ("- not run", "--methods data2vec-token --depth 5 runs the last", "~ one seed",
                 "! untrained above 0.5", ".. not finished", "data2vec, root", ">512!~"):
        assert said in text


def test_the_last_cell_is_shared_among_idle_processes():
    """Nine runs are 5 and 4 for two processes, and 9 for one while others have work."""
    last = [(NETWORK, (0, 1, 2))]
    everything = list(itertools.product((64, 128, 256), range(3)))
    one = sweep.next_batch(last, {}, 2**20, [], idle=2)
    two = sweep.next_batch(last, {}, 2**20, [one], idle=1)
    assert one == (NETWORK, everything[:5]) and two == (NETWORK, everything[5:])
    other = NETWORK._replace(L=4), (0,)
    assert sweep.next_batch([*last, other], {}, 2**20, [], idle=2) == (NETWORK, everything)


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
    beyond = ended | {(CELL, 1): a_ladder([0.2] * 7)}  # but for one that has not, one rung more
    assert sweep.seconds_left(CELL, (0, 1), beyond, 2**20) == 0.5
    assert sweep.seconds_left(CELL, (0,), ended, 2**20) == 0


def test_the_time_left_follows_how_long_the_highest_rungs_took():
    ladder = a_ladder([0.2] * 7)            # P = 4 to 256; one rung is left under a cap of 512
    for power, last in ((0.5, 512**0.5), (-0.5, np.mean([P**-0.5 for P in ladder]))):
        timed = {P: run._replace(seconds=P**power) for P, run in ladder.items()}
        left = sweep.seconds_left(CELL, (0,), {(CELL, 0): timed}, 512)
        assert left == pytest.approx(last), power   # where times fall, the mean is expected


def test_the_bar_moves_while_this_process_is_at_work(capsys):
    with sweep.time_bar(disable=False) as bar:
        bar.left, deadline = 60, time.time() + 60
        while bar.n == 0 and time.time() < deadline:
            pass
        bar.left = 0
    shown = capsys.readouterr().err
    assert re.search("1?[0-9]%.*<0[01]:[0-9]{2}", shown) and "100%" in shown


def test_ranks_share_a_sweep_out_by_what_it_costs():
    both = itertools.product((3, 5), ("cluster", "data2vec"))
    cells = {CELL._replace(L=L, method=method): range(2) for L, method in both}
    alone = sweep.units_of(cells, 1024, 0, 1)
    assert [(cell.method, cell.L) for cell, _ in alone] == [
        *[("cluster", 5)] * 2, *[("cluster", 3)] * 2, ("data2vec", 5), ("data2vec", 3)]
    for size in (2, 3, 7):
        shares = [sweep.units_of(cells, 1024, rank, size) for rank in range(size)]
        assert sorted(sum(shares, [])) == sorted(alone)
        costs = [[sweep.seconds_left(*unit, {}, 1024) for unit in share] for share in shares]
        # no rank has more than another by more than the dearest unit
        assert max(map(sum, costs)) - min(map(sum, costs)) <= max(sum(costs, []))


SHORT = "--depth 2,3 --seeds 2"
SMALL = f"{SHORT} --methods cluster,cluster-root --m 4 --max-samples 4096 --device cpu"
TABLES = "samples_vs_depth.csv", "samples_vs_depth.md", "settings.json", "samples_vs_depth.png"


@pytest.fixture
def sweep_here(call, monkeypatch):
    """sweep_here(flags) is a sweep in this process, without pictures: (exit code, out, err)."""
    monkeypatch.setattr(sweep, "draw", lambda out: [])
    return lambda flags, out="out": call("sweep", f"{flags} --jobs 1 --device cpu --out {out}")


def start(*words):
    command = [sys.executable, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=HERE, **pipes)


def wait_for_runs(out, process, files):
    """Until so many files of runs are there, and the last has a few."""
    while process.poll() is None:
        sizes = [file.stat().st_size for file in out.glob("runs/*.csv")]
        if len(sizes) == files and min(sizes) > 200:
            break
        time.sleep(0.02)


def rows_without_seconds(out):
    with open(out / "runs.csv", newline="") as file:
        return [{k: x for k, x in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_sweeps_that_are_killed_stopped_or_not_alone_give_the_same_bytes(tmp_path):
    """One straight through; one killed and torn while writing, stopped, finished by two."""
    def begin(out, *more):
        return start("sweep.py", *SMALL.split(), "--jobs", "1", *more, "--out", str(out))

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    straight, killed = begin(whole), begin(broken)
    wait_for_runs(broken, killed, 1)
    killed.kill()
    killed.communicate()
    (torn,) = (broken / "runs").glob("*.csv")
    run = "cluster,8,2,4,3,0,64,1"
    with open(torn, "a") as file:
        file.write(f"{run},2,0.500000,,0.100,cpu,\n{run},1,0.")
    before = torn.read_bytes()
    stopped = begin(broken)
    wait_for_runs(broken, stopped, 2)
    stopped.terminate()
    said = stopped.communicate()[1]
    if sys.platform != "win32":
        assert stopped.returncode == 1 and "Traceback" not in said
        assert "the same command continues" in said
    both = [begin(broken, "--jobs", "2"), begin(broken, "--seeds", "1")]
    for done in (straight, *both):
        out, said = done.communicate()
        assert done.returncode == 0 and "growth, L" in out and "Traceback" not in said, said
    assert torn.read_bytes() == before  # nobody writes into another's file
    assert rows_without_seconds(whole) == rows_without_seconds(broken)
    for name in TABLES:
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
    assert not list(tmp_path.rglob("*.part"))


@linux
def test_torchrun_of_a_sweep_survives_a_killed_rank(tmp_path, sweep_here):
    """Begun by one process, gone on with by two, of which one is killed and started again."""
    code, table, _ = sweep_here(SMALL, "whole")
    sweep_here(f"{SMALL} --depth 2 --seeds 1", "ranks")
    whole, ranks = tmp_path / "whole", tmp_path / "ranks"
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1"
    torchrun += f" --monitor-interval .1 -- sweep.py {SMALL} --out"
    process = start(*torchrun.split(), str(ranks))
    wait_for_runs(ranks, process, 3)
    children = Path("/proc").glob(f"{process.pid}/task/*/children")
    pids = [int(pid) for file in children for pid in file.read_text().split()]
    if pids:  # one that ends by itself meanwhile does no harm
        os.kill(pids[-1], signal.SIGKILL)
    out, said = process.communicate()
    assert code == process.returncode == 0, said
    table = table[table.index("v=8"):]
    assert table in out and out.count("law\n") == table.count("law\n")  # said once, by rank 0
    assert rows_without_seconds(ranks) == rows_without_seconds(whole)
    assert len(list((ranks / "runs").glob("*.csv"))) > 3 or not pids


def half_learned(grammars, samples, seeds, target="latent", device="cpu"):
    """A learner that knows each level with the share P / 64; seed 1 diverges at P = 32."""
    scores = []
    for g, P, seed in zip(grammars, samples, seeds):
        diverged = 37 if (P, seed) == (32, 1) else 0
        accuracy = 0.0 if diverged else min(1.0, P / 64)
        scores.append(grammar.Score([accuracy] * g.L, [False] * g.L, [0.1] * g.L, diverged))
    return scores


def test_a_new_learner_is_one_function_and_one_line(tmp_path, sweep_here, monkeypatch):
    monkeypatch.setitem(sweep.LEARNERS, "mine", sweep.Learner(half_learned))
    flags = "--methods mine --depth 3,4 --seeds 2"
    code, out, _ = sweep_here(flags)
    assert code == 0 and "mine, root" in out
    assert "mine L=3 m=3 P=32 seed 1: loss not finite at step 37\n" in out
    rows = rows_without_seconds(tmp_path / "out")
    marked = [row for row in rows if row["mark"] == "diverged@37"]
    assert len(marked) == 3 + 4 and {row["accuracy"] for row in marked} == {"0.000000"}
    before = files(tmp_path)
    code, out, said = sweep_here(flags)  # all is there
    assert code == 0 and "mine, root" in out and files(tmp_path) == before, said
    wrong = lambda *args, **more: [grammar.Score([math.nan] * 3, [False] * 3)]
    monkeypatch.setitem(sweep.LEARNERS, "mine", sweep.Learner(wrong))
    sweep.read_method.cache_clear()
    with pytest.raises(sweep.ArgumentTypeError, match="from 0 to 1, not 'nan'"):
        sweep_here(f"{flags} --seeds 3")
    assert files(tmp_path) == before    # what cannot be read again is not written
    monkeypatch.delitem(sweep.LEARNERS, "mine")
    sweep.read_method.cache_clear()
    code, _, said = sweep_here("--methods cluster --depth 2")
    assert code == 2 and "line 2" in said and "'mine'" in said and files(tmp_path) == before


@pytest.mark.parametrize("error, code", [
    (OSError(28, "No space left on device"), 1), (KeyboardInterrupt(), 130),
    (KeyboardInterrupt("SIGTERM"), 1), (sweep.futures.BrokenExecutor(), 1), (MemoryError(), 1),
    (RuntimeError("can't allocate memory"), 1),
])
def test_what_ends_a_sweep_from_outside_gets_one_line(error, code, sweep_here, monkeypatch):
    append, calls = sweep.Folder.append, []

    def fail_at_the_third(folder, cell, found):
        calls.append(found)
        if len(calls) == 3:
            raise error
        append(folder, cell, found)

    monkeypatch.setattr(sweep.Folder, "append", fail_at_the_third)
    got, _, said = sweep_here(f"{SHORT} --methods cluster")
    assert got == code and "Traceback" not in said
    assert "2 finished runs are safe" in said.splitlines()[-1]


def test_no_picture_is_a_reason_to_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "draw", failing(RuntimeError("no fonts\nat all")))
    assert sweep.draw(tmp_path) == ["no picture: no fonts"]


RESULT = "cluster,8,2,4,3,0,8,0,{},0.500000,,1.000,cuda:1,\n"
RESULTS = ",".join(sweep.COLUMNS) + "\n" + RESULT.format(1) + RESULT.format(2)
SWEEP = {"format": 2, "recovered": 0.95, "rung": 2}
SETTINGS = json.dumps({"sweep": SWEEP, "cluster": {"restarts": 64}})


def test_runs_of_other_devices_are_read_and_named(tmp_path, sweep_here):
    out = tmp_path / "out"
    out.mkdir()
    (out / "settings.json").write_text(SETTINGS)
    (out / "runs.csv").write_text(RESULTS.replace("cuda:1,\n", "mps,collapsed\n"))
    flags = "--methods cluster-root --depth 2 --seeds 1"
    code, said, _ = sweep_here(flags)
    rows = rows_without_seconds(out)
    assert code == 0 and "cpu, mps" in said
    assert {"cluster", "cluster-root"} == {row["method"] for row in rows}
    assert [row["mark"] for row in rows if row["method"] == "cluster"] == ["collapsed"] * 2
    (out / "runs" / "another.csv").write_text(RESULTS.replace(",8,0,", ",16,0,"))
    code, said, _ = sweep_here(flags)
    assert code == 0 and "cpu, cuda:1, mps" in said
    assert sum(row["device"] == "cuda:1" for row in rows_without_seconds(out)) == 2


def edited(old, new):
    return RESULTS.replace(old, new), SETTINGS


@pytest.mark.parametrize("texts, reason", [
    (("a,b\n1,2\n", SETTINGS), "columns"), (("\x00\xff", SETTINGS), "columns"),
    (edited(",mark", ""), "columns"), (edited("cuda:1,", "cuda:1,foo"), "line 2"),
    (edited("cuda:1,", "\xff"), "line 2"), (edited("cuda:1,", "cuda:1,x"), "line 2"),
    (edited("cluster,", "clusters,"), "line 2"), (edited("000,,1", "000,,1,"), "line 2"),
    (edited("cluster,", "cluster:restarts=64,"), "line 2"), (edited("1.000", "1"), "line 2"),
    (edited(",8,0,1,", ",-8,0,1,"), "line 2"), (edited(",0,8,0,1,", ",0,9,0,1,"), "no rung"),
    (edited("8,2,4,3", "8,2,0,3"), "line 2"), (edited(",8,0,1,", ",8,-1,1,"), "line 2"),
    (edited("2,4,3,0", "2,4,1,0"), "line 2"), (edited("0.5", "1.5"), "line 2"),
    (edited("cuda:1", "toaster"), "toaster"), (edited(",8,0,1,", ",8,0,4,"), "line 2"),
    (edited(",8,0,1,", ",16,0,1,"), "only a part"), (edited(",8,0,", ",2,0,"), "no rung"),
    *(((RESULTS, settings), "settings.json") for settings in
      (None, "{", "[1]", '"abc"', '{"name": "my-app"}', "[" * 100000, '{"sweep": 7}')),
    ((RESULTS, SETTINGS.replace('"rung": 2', '"rung": 3')), "rung"),
    ((RESULTS, SETTINGS.replace("64", "65")), "restarts"),
])
def test_foreign_results_are_refused_and_left_alone(texts, reason, tmp_path, sweep_here):
    runs, settings = texts
    out = tmp_path / "out"
    out.mkdir()
    (out / "runs.csv").write_bytes(runs.encode("latin-1"))
    if settings is not None:
        (out / "settings.json").write_text(settings)
    before = files(out)
    code, _, said = sweep_here(SHORT)
    assert code == 2 and said.count("\n") == 1 and "--out" in said and reason in said
    assert files(out) == before


def test_the_forks_of_the_readme_run_as_they_stand_there(tmp_path):
    """Its diffs, applied to copies of the files, and its new file; then one sweep with both."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    for file in HERE.glob("*.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    names = [tmp_path / "cluster.py", tmp_path / "sweep.py"]
    diffs = re.findall(r"```diff\n(.*?)```", text, re.S)
    for name, diff in zip(names, diffs, strict=True):
        source = name.read_text(encoding="utf-8")
        # a line, and what replaces it
        for old, new in re.findall(r"^-(.*)\n((?:\+.*\n)+)", diff, re.M):
            assert source.count(old + "\n") == 1, old
            source = source.replace(old + "\n", re.sub(r"^\+", "", new, flags=re.M))
        name.write_text(source, encoding="utf-8")
    (mine,) = re.findall(r"here mine.py.*?```python\n(.*?)```", text, re.S)
    (tmp_path / "mine.py").write_text(mine, encoding="utf-8")
    flags = "--methods cluster-first,cluster-token,mine --depth 3 --seeds 1 --max-samples 256"
    command = [sys.executable, "sweep.py", *flags.split(), "--jobs", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {"cluster-first": [], "cluster-token": [], "mine": []}
    for row in rows_without_seconds(tmp_path / "out"):
        found[row["method"]].append(row["accuracy"])
    first, token, other = found.values()
    assert len(first) == len(token) and first != token
    assert float(other[0]) < 0.6  # a first symbol is no parent


# ----------------------------------------------------------------------------------------
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


def table(folder, text, name="samples_vs_depth.csv"):
    (folder / name).write_text(text)
    return plot.read(folder / name)


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
    assert {(cell["method"], cell["L"]): cell["state"] for cell in tree} == {
        ("cluster-first", 3): "", ("cluster-first", 4): "",
        ("cluster-token", 3): "beyond the ladder", ("cluster-token", 4): "not finished",
        ("mine-token", 3): "below Pmin",
        ("data2vec-token:mask=0.15:steps=8000", 3): "limited by steps",
    }  # and none for what was not run
    assert root["state"] == "beyond the ladder"  # the status is not the root's

    figure = plot.draw_depth({"depth": rows, "runs": []})
    axis, _ = figure.axes
    assert axis.get_title().startswith("From L = 3 on, P* is flat for cluster-first\n")
    laws = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
    assert laws["$v\\,m^3$"] == [216, 216] and laws["$v\\,m^{L+1}$"] == [648, 1944]
    signs = [text.get_text() for text in axis.texts]
    assert sorted(signs) == sorted(["\u2191", "\u2191?", "\u2193", "\u2191s"])
    styles = plot.styles_of(["cluster-first", "cluster", "cluster-token", "cluster-second"])
    assert len({style["color"] for style in styles.values()}) == 4
    lighter = plot.styles_of(["cluster", "cluster:lr=1"])["cluster:lr=1"]
    assert lighter["color"] == styles["cluster"]["color"] and lighter["alpha"] < 1


def test_collapse_is_by_each_methods_own_law_at_the_largest_depth():
    row = {"v": 8, "s": 2, "zipf": 0.0, "seed": 0, "accuracy": 0.5}
    powers = {"cluster": 3, "cluster-joint": 2, "cluster-token": 5}
    runs = [row | {"method": method, "m": m, "L": L, "level": L - 1, "P": 8 * m**power}
            for method, power in powers.items() for m in (2, 4) for L in (3, 4)]
    runs += [row | {"method": "cluster", "m": 2, "L": 5, "level": 4, "P": 64}]  # of one m
    paper = [row | {"method": "ilc", "m": 2, "L": 4, "target": "h^(L-1)", "P_star": 64.0}]
    figure = plot.draw_collapse({"runs": runs, "depth": [], "paper": paper})
    # the panels of each method's law: two points, and the paper's in the first
    for panel, points in ((1, 3), (5, 2), (8, 2)):
        lines = [list(line.get_xdata()) for line in figure.axes[panel].lines]
        x = sum([places for places in lines if len(places) == 1], [])
        assert x == pytest.approx([1.0] * points)

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


def test_prediction_fits_one_constant():
    sizes = {"v": 8, "s": 2, "m": 3, "zipf": 0.0}
    contrast = [sizes | {"L": L, "target": target, "level": l, "P_noise": 10.0 * l}
                for L in (3, 4) for target in ("latent", "token") for l in range(1, L)]
    measured = {("cluster", 3): 30, ("cluster", 4): 90, ("cluster-token", 3): 120,
                ("cluster:positions=cousins", 3): 999, ("predictor", 3): 999}
    depth = [sizes | {"method": method, "L": L, "P50": ("=", float(P))}
             for (method, L), P in measured.items()]
    depth += [sizes | {"method": "cluster-token", "L": 4, "P50": (">", 999.0)}]
    tables = {"contrast": contrast, "depth": depth}
    # the highest level is the hardest here
    assert plot.predictions(tables) == [
        ("latent", 3, 20.0, 30.0), ("latent", 3, 30.0, 90.0), ("token", 3, 20.0, 120.0)]
    axis, = plot.draw_prediction(tables).axes
    # ratios of 3/2, 3, 6: exp(ln 2 sqrt(2/3)) is their standard deviation
    assert axis.get_xlabel().startswith("3 \u00d7") and "factor of 1.8\n" in axis.get_title()


@pytest.mark.parametrize("name, text, said", [
    ("samples_vs_depth.csv", "a,b\n1,2\n", "no table"),
    ("samples_vs_depth.csv", STARS, "no rows"),
    *(("samples_vs_depth.csv", STARS_OLD + row + "\n", said) for row, said in [
        ("cluster,8,2,0,3,9,8,10,,,5,0", "line 2: m = '0'"),
        ("cluster,8,2,3,3,nan,8,10,,,5,0", "P50 = 'nan'"),
        ("cluster,8,2,3,3,-9,8,10,,,5,0", "P50 = '-9'"),
        ("cluster,8,2,3,3,= 9,8,10,,,5,0", "P50 = '= 9'"),
        ("cluster,8,2,3,3,9,8,10,,,5", "12 cells"),
        ("$x$,8,2,3,3,9,8,10,,,5,0", "method = '$x$'"),
        ("cluster,8,2,3,99,9,8,10,,,5,0", "L = '99'"),
    ]),
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
    with refused(f".*{name}: .*{re.escape(said)}"):
        plot.draw(tmp_path, *tmp_path.glob("trace.csv"))
    assert files(tmp_path) == before


def test_plot_draws_whatever_the_environment_says_and_always_the_same_bytes(tmp_path):
    (tmp_path / "samples_vs_depth.csv").write_text(ALL_CELLS)
    rungs = itertools.product((3, 4), ((256, 0.1), (512, 1)))
    lines = [f"cluster-first,8,2,{m},3,0,{P},0,2,{right}\n" for m, (P, right) in rungs]
    (tmp_path / "runs.csv").write_text(RUNS + "".join(lines))
    environment = os.environ | {"MPLBACKEND": "nonsense"}
    command = [sys.executable, str(HERE / "plot.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and done.stdout.count("wrote") == 2
    first = files(tmp_path)
    assert len(first) == 4
    picture = tmp_path / "samples_vs_depth.png"
    assert plot.draw(tmp_path / "samples_vs_depth.csv") == [picture]
    assert files(tmp_path) == first


def test_traces_become_one_picture(call):
    for seed in range(2):
        Path(f"{seed}.csv").write_text(TRACE + "1,.5,.1,.1,0,0\n9,.4,.9,.2,.8,.1\n")
    call("plot", "0.csv 1.csv")
    assert Path("phases.png").read_bytes()[:4] == b"\x89PNG"


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
    text = "v,s,m,L,zipf,seeds,target,level,contrast,P_noise\n"
    for target, level in itertools.product(("latent", "token", "other"), (1, 2, 3)):
        contrast = 0.5**level if target == "token" else 1
        text += f"8,2,3,4,0,5,{target},{level},{contrast},9\n"
    kind, rows = table(tmp_path, text, "contrast.csv")
    axis, = plot.draw_contrast({"contrast": rows}).axes
    *others, last = [text.get_text() for text in axis.get_legend().get_texts()]
    assert kind == "contrast" and last == "tokens, \u00d70.50 a level"  # the lowest line
    assert sorted(others) == ["other, \u00d71.00 a level", "own latents, \u00d71.00 a level"]


# ----------------------------------------------------------------------------------------
# all scripts


# flags that are refused, the last of them by name
BAD_FLAGS = {
    "grammar": f"""
        --depth 2147483647 | --depth 24 --samples 2147483647 | --samples 2147483647
        --samples 0 | --samples -1 | --v 256 --s 7 --m 2147483647 | --m {"1" * 5000}
        --m 9 | --m ² | --m +-5 | --zipf nan | --save= | --save . | --save nowhere/x.npz
        --seeds 3 | --save a.npz --bench | --load file | --contrast --v 256 --depth 24
    """,
    "cluster": """
        --samples 1 --depth 24 | --depth 2147483647 | --depth 1 | --samples 2147483647
        --samples 0 | --m 9 | --v two | --device tpu | --target leaf | --positions most
        --restarts 0 | --v 256 --m 256 --samples 1000000 --restarts 64
        --v 256 --target joint --samples 1000000 --m 256 | --v 256 --m 256 --target root --depth 16
    """,
    "predictor": """
        --samples 2147483647 | --samples 0 | --samples 10 --depth 24 | --m 9 | --target root
        --trace x --codes 3 | --alike near | --lr x | --ema 2 | --steps 0 | --hidden 2147483647
        --batch 1048576 | --trace x --save x | --save x --resume x | --trace x --save nowhere/x
        --trace nowhere/x
    """,
    "data2vec": """
        --samples 2147483647 | --batch 2147483647 | --m 1 | --target labels | --preset gpu
        --steps 0 | --lr nan | --mask 1.5 | --mask-block 3 | --mask-block Top
        --preset transformer --width 30 | --save nowhere/x.pt
        --trace both --save ./both | --trace trace.csv --save nowhere/x.pt
    """,
    "sweep": """
        --m 9 | --m 0 | --m 4..x | --m 1..2147483647 | --m ² | --zipf -1 | --v 1 | --v 300
        --depth 1..3 | --depth 6..2 | --depth 2..4..6 | --depth 40 | --depth 2..2147483647
        --s 1 | --s 62 | --seeds 0 | --seeds 2147483647 | --jobs 0 | --out file | --out ""
        --max-samples 0 | --max-samples 2 | --max-samples ² | --device tpu | --device cuda:99
        --methods cluster,magic | --methods predictor:steps=0 | --methods data2vec:steps=9
        --m 1 --methods data2vec | --m 256 --v 256 --methods cluster-joint
    """,
}
BAD_COMMANDS = [
    ("cluster", "--context all", "unrecognized arguments: --context all"),
    ("sweep", "--seed 3", "unrecognized arguments: --seed 3; there is --seeds"),
    ("plot", "nowhere", "argument out: nowhere"),
    ("plot", "nowhere/trace.csv", "argument out: nowhere/trace.csv"),
]
for script, text in BAD_FLAGS.items():
    for flags in re.split(r" \| |\n", text.strip()):
        *_, last = re.findall(r"--[a-z-]+", flags)
        BAD_COMMANDS.append((script, flags.strip(), f"argument {last}: "))


@pytest.mark.parametrize("script, flags, reason", BAD_COMMANDS)
def test_bad_input_gets_one_line_and_leaves_nothing_behind(script, flags, reason, call):
    Path("file").write_text("mine")
    start = time.process_time()
    code, out, said = call(script, flags)
    assert code == 2 and out == "" and time.process_time() - start < 1
    assert said.startswith(f"{script}.py: {reason}") and said.count("\n") == 1
    assert files(Path(".")) == {Path("file"): b"mine"}


@pytest.mark.parametrize("script, ending, code, line", [
    ("grammar", KeyboardInterrupt(), 130, "stopped"),
    ("grammar", MemoryError(), 1, "out of memory; fewer or shorter strings need less"),
    ("grammar", OSError(28, "No space left", "a.npz"), 1, "a.npz: No space left"),
    ("plot", KeyboardInterrupt(), 130, "stopped"),
    ("plot", ValueError("x.csv: bad"), 2, "argument out: x.csv: bad"),
    ("plot", PermissionError(13, "Denied", "x.png"), 1, "[Errno 13] Denied: 'x.png'"),
    ("plot", ImportError("No module named 'matplotlib'"), 1, "No module named 'matplotlib'"),
])
def test_what_ends_a_script_from_outside_is_one_line(script, ending, code, line, call,
                                                     monkeypatch):
    work = {"grammar": "show", "plot": "draw"}[script]
    monkeypatch.setattr(sys.modules[script], work, failing(ending))
    got, out, said = call(script, "")
    assert got == code and out == "" and said.strip("\n") == f"{script}.py: {line}"
