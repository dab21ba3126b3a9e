"""BrierLM: its estimates, their errors, and what eval_brier.py prints. (Statistical claims are
tested five standard errors wide.)"""
import itertools
import json

import numpy as np
import pytest
import torch

import eval_brier
from eval_brier import (bits_per_token, brier_ngram, describe, difference, sample_ngrams, summary)
from helpers import V, assert_unbiased, tiny_ar, tiny_calm
from sample import generate


@pytest.mark.parametrize("S", [2, 8])
def test_brier_ngram_is_unbiased(S):
    torch.manual_seed(0)
    P = 100_000
    ways = torch.tensor(list(itertools.product(range(2), repeat=4)))   # 16 n-grams of four tokens
    p = torch.rand(16).double().softmax(0)
    y = torch.tensor([0, 1, 1, 0])
    samples = ways[torch.multinomial(p, S * P, replacement=True)].view(S, P, 4)
    found = brier_ngram(samples, y.expand(P, 4)).double()   # (P, 4)
    for n in range(1, 5):
        begins_as_y = (ways[:, :n] == y[:n]).all(1)
        number = (ways[:, :n] * 2 ** torch.arange(n)).sum(1)   # of each way's first n tokens
        law = torch.zeros(2 ** n).double().index_add_(0, number, p)
        assert_unbiased(found[:, n - 1], 2 * p[begins_as_y].sum() - (law ** 2).sum())


@torch.no_grad()
@pytest.mark.parametrize("make, K", [(tiny_calm, 1), (tiny_calm, 3), (tiny_calm, 4), (tiny_ar, 1)])
def test_ngrams_are_what_the_model_generates_at_each_start(make, K):
    """Whatever was drawn at a later start before."""
    model = tiny_calm(K) if make is tiny_calm else tiny_ar()
    window = torch.randint(V, (1, 6 * K)).expand(20_000, -1)
    found = sample_ngrams(model, window, [2 * K, 4 * K], 1)[0]       # (20_000, 2, 4)
    for i, start in enumerate((2 * K, 4 * K)):
        text = generate(model, window[:, :start], 4)[:, start:]
        once, again = (brier_ngram(ngrams.view(2, -1, 4), text[:10_000]).double()
                       for ngrams in (found[:, i], text.roll(1, 0)))
        error = ((once.var(0) + again.var(0)) / 10_000).sqrt()       # (4,)
        assert ((once.mean(0) - again.mean(0)).abs() < 5 * error + 1e-3).all()
        assert 0.01 < text[::2, 0].eq(text[1::2, 0]).double().mean() < 0.95   # it can go wrong


def rows_of(hits, n=1):
    """Documents of 8 n n-grams each, with these hits; two samples agree half as often."""
    return np.array([[8 * n, *[8 * n * hit] * 4, *[4 * n * hit] * 4] for hit in hits])


EASY_AND_HARD = np.arange(20, 40) / 100


def test_an_error_is_over_documents_more_of_the_same_does_not_make_it_smaller():
    once = summary(rows_of(EASY_AND_HARD))
    often = summary(rows_of(EASY_AND_HARD, n=10))
    assert once["documents"] == often["documents"] == 20
    assert often["positions"] == 10 * once["positions"]
    assert once["stderr"] == pytest.approx(often["stderr"]) and once["stderr"] > 1
    assert once["brierlm"] == pytest.approx(150 * EASY_AND_HARD.mean())
    assert once["stderr"] == pytest.approx(150 * EASY_AND_HARD.std() / 20 ** 0.5, rel=0.15)
    assert once["accuracy"] == pytest.approx(2 * once["collision"])


def test_where_an_error_says_nothing_there_is_none():
    """Of one document; where a Brier-n is below 0, in some texts of the bootstrap or in all."""
    lowest = {"sure": 0.2, "at times": -0.05, "always": -2}
    for often, hit in lowest.items():
        result = summary(rows_of([hit, 0.2, 0.2, 0.3]))
        assert (result["stderr"] is None) == (often != "sure")
        assert ("+- ? (one document, or a Br" in describe({**result, **GRID})) == (often != "sure")
        assert "NaN" not in json.dumps(result)
    assert summary(rows_of([0.3]))["stderr"] is None


GRID = {"samples": 4, "stride": 16, "context": 64}


def test_a_paired_difference_leaves_out_how_hard_the_documents_are():
    worse = rows_of(EASY_AND_HARD)
    better = rows_of(1.1 * EASY_AND_HARD)
    found = difference(better, worse)
    value, error = found["ratio"]
    assert value == pytest.approx(1.1) and error is None   # it is the same for all documents
    score = summary(worse)
    assert found["BrierLM"] == pytest.approx((0.1 * score["brierlm"], 0.1 * score["stderr"]))
    assert found["Brier-3"][0] == pytest.approx(0.1 * 1.5 * EASY_AND_HARD.mean())
    too_early = difference(rows_of(EASY_AND_HARD), rows_of(EASY_AND_HARD - 0.5))
    assert too_early["BrierLM"][1] is None and "ratio" not in too_early
    assert too_early["Brier-1"][0] == pytest.approx(0.75)


@torch.no_grad()
def test_text_costs_its_entropy_where_its_own_model_reads_it():
    torch.manual_seed(0)
    model = tiny_ar()
    texts = generate(model, torch.randint(V, (500, 4)), 20)
    p = model.lm_head(model.hidden(texts[:, :-1])[:, 3:]).softmax(-1)   # (500, 20, V)
    entropy = -(p * p.log2()).sum(-1).mean(1)                           # (500,) of each text
    bits = torch.tensor([bits_per_token(model, text[None], 4) for text in texts])
    assert_unbiased(bits - entropy, 0.0)
    assert bits_per_token(model, texts, 4) == pytest.approx(bits.mean().item(), rel=1e-4)
    assert bits_per_token(model, torch.randint(V, (500, 24)), 4) > bits.mean() + 0.5


@pytest.fixture
def score(run, trained):
    """score("--flag", value, ...) -> the JSON object that eval_brier.py ends with."""

    def score(*flags):
        result = run(eval_brier, "--out_dir", trained / "out", "--device", "cpu", "--dtype",
                     "float32", "--windows", 4, "--json", *flags)
        assert result.error is None
        return json.loads(result.out.splitlines()[-1])

    return score


@pytest.mark.parametrize("model", ["calm", "ar"])
def test_colder_samples_are_more_alike(model, score):
    """Those of CALM with less noise, too; without noise all are equal."""
    flags = ["--model", model, "--windows", 20]
    warm = score(*flags)["collision"]
    cold = score(*flags, "--temperature", 0.5, "--num_candidates", 20)["collision"]
    assert warm < cold
    if model == "calm":
        less, none = (score(*flags, "--noise", noise)["collision"] for noise in (0.3, 0))
        assert warm < less < none == 1


def test_two_models_are_compared_at_the_same_ngrams(score, trained):
    """Named by a run's folder or by a checkpoint."""
    out = trained / "out"
    one = score("--against", out / "ar.pt")
    other = score("--model", "ar", "--against", out / "calm.pt")
    assert one["positions"] == other["positions"] and one["stride"] == other["stride"] == 16
    for n in range(1, 5):
        value, error = one["against"][f"Brier-{n}"]
        assert [-value, error] == pytest.approx(other["against"][f"Brier-{n}"])
        assert value == pytest.approx(one["brier"][n - 1] - other["brier"][n - 1])
    assert score("--against", out)["against"]["Brier-1"][0] == 0
