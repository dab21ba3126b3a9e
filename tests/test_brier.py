"""BrierLM: its estimates, their errors, and what eval_brier.py prints.

Statistical claims are tested five standard errors wide.
"""
import itertools
import json

import numpy as np
import pytest
import torch

import eval_brier
from data.machine import Machine
from data.prepare import TokenData
from eval_brier import (bits_per_token, brier_ngram, brierlm, describe, difference, distinct,
                        evaluate, sample_ngrams, summary)
from helpers import V, assert_unbiased, tiny_ar, tiny_calm
from sample import generate, load_model


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
def test_ngrams_of_ar_have_its_softmaxes_law():
    """At each of two starts, given all that stands before it."""
    torch.manual_seed(0)
    model = tiny_ar(vocab_size=3)
    window = torch.randint(3, (1, 12))
    ngrams = sample_ngrams(model, window.expand(50, -1), [4, 8], 200)   # (200, 50, 2, 4)
    ways = torch.tensor(list(itertools.product(range(3), repeat=4)))    # all n-grams of four
    for i, start in enumerate((4, 8)):
        texts = torch.cat([window[:, :start].expand(81, -1), ways], dim=1)
        p = model.lm_head(model.hidden(texts[:, :-1])).softmax(-1)[:, start - 1:]   # (81, 4, 3)
        law = p.gather(-1, ways[..., None])[..., 0].prod(-1).double()   # (81,)
        number = (ngrams[:, :, i] * 3 ** torch.arange(3, -1, -1)).sum(-1).flatten()
        found = number.bincount(minlength=81) / 10_000
        assert ((found - law).abs() < 5 * (law * (1 - law) / 10_000).sqrt() + 1e-4).all()


@torch.no_grad()
@pytest.mark.parametrize("K", [1, 2, 3, 4])
def test_ngrams_of_calm_are_texts_that_it_generates(K):
    """Whatever was drawn at a later start before."""
    rows = 20_000
    model = tiny_calm(K)
    start = 2 * K
    window = torch.randint(V, (1, 6 * K)).expand(rows, -1)
    torch.manual_seed(0)
    found = sample_ngrams(model, window, [start, start + 2 * K], 1)[0, :, 0]
    text = generate(model, window[:, :start], 4)[:, start:]
    for n in range(1, 5):
        once, often = (brier_ngram(ngrams.view(2, -1, 4), text.view(2, -1, 4)[0])[:, n - 1].double()
                       for ngrams in (found, text.roll(1, 0)))
        error = (once.var() / len(once) + often.var() / len(often)).sqrt()
        assert (once.mean() - often.mean()).abs() < 5 * error + 1e-3
    equal = text[::2, 0].eq(text[1::2, 0]).double().mean()
    assert 0.05 < equal < 0.95   # else the claim would say little


def test_brierlm_is_the_geometric_mean_and_zero_below_zero():
    product = 0.4 * 0.2 * 0.1 * 0.05
    assert brierlm(np.array([0.4, 0.2, 0.1, 0.05])) == pytest.approx(100 * product ** 0.25)
    assert brierlm(np.array([0.4, 0.2, 0.1, -0.05])) == 0


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
        assert ("+- ?" in describe({**result, **GRID})) == (often != "sure")
        assert ("too early" in describe({**result, **GRID})) == (often == "always")
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
    assert too_early["Brier-1"][0] == pytest.approx(0.75) and "NaN" not in json.dumps(too_early)


def test_an_evaluation_takes_no_more_windows_at_once_than_it_may(trained, monkeypatch):
    data = TokenData(trained / "foxes")
    model, _ = load_model(trained / "out", "calm")
    plain = sample_ngrams
    seen = []

    def count(model, tokens, *args, **kwargs):
        seen.append(len(tokens))
        return plain(model, tokens, *args, **kwargs)

    monkeypatch.setattr(eval_brier, "sample_ngrams", count)
    result, rows = evaluate(model, data, Machine("cpu", "float32"), windows=7, batch_size=3)
    assert seen == [3, 3, 1]
    assert result["positions"] == 7 * 3 == rows[:, 0].sum()   # at tokens 16, 32 and 48


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


def test_distinct_is_the_share_of_different_ngrams():
    texts = torch.tensor([[0, 1, 0, 1, 0, 1], [2, 2, 2, 2, 2, 2]])
    found = [distinct(texts, n) for n in (1, 2, 3, 4)]
    assert found == [3 / 12, 3 / 10, 3 / 8, 3 / 6]   # 01, 10, 22; 010, 101, 222; ...


@pytest.fixture
def score(run, trained):
    """score("--flag", value, ...) -> the JSON object that eval_brier.py ends with."""

    def score(*flags):
        result = run(eval_brier, "--out_dir", trained / "out", "--device", "cpu", "--dtype",
                     "float32", "--windows", 4, "--json", *flags)
        assert result.error is None
        return json.loads(result.out.splitlines()[-1])

    return score


def test_a_score_says_what_it_was_measured_on(score):
    found = score("--stride", 8, "--num_draws", 3)
    assert found["positions"] == 4 * 7 and found["samples"] == 3   # from tokens 8, 16, ... 56 on
    assert found["context"] == 64 and found["stride"] == 8
    assert len(found["brier"]) == 4 and found["brierlm"] >= 0
    assert 0 < found["text"]["real"]["bits"] < found["text"]["model"]["bits"]   # a beginner
    assert 0 < found["text"]["model"]["distinct-4"] <= 1


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
