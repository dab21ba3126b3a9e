"""Temperature from samples alone, and generation: what sample.py does. (Statistical claims are
tested five standard errors wide, or at a p-value of 1e-5.)"""
import math

import pytest
import torch

import sample
from helpers import BOTH, EOT, V, tiny_calm
from sample import (generate, next_chunks, temperature_batch, temperature_exact,
                    whole_chunks)


def power(p, temperature):
    return p ** (1 / temperature) / (p ** (1 / temperature)).sum()


def expected_samples(p, temperature):
    """Theorem 2, but sample j + 1 of the first n is only drawn if the first j are equal."""
    s = 1 / temperature
    first = 1 + sum((p ** j).sum() for j in range(1, math.floor(s)))
    more = (p ** (s - 1)).sum() if s % 1 else 0
    return (first + more) / (p ** s).sum()


@pytest.mark.parametrize("temperature", [0.9, 0.75, 0.5, 0.4, 1 / 3])
def test_exact_sampling_draws_from_the_power_of_the_distribution(temperature):
    """And takes as many samples as it should."""
    torch.manual_seed(0)
    draws = 3000
    p = 1 / torch.arange(1, 11).double()
    p /= p.sum()
    stream = iter(torch.multinomial(p, 200_000, replacement=True).tolist())
    found = []
    left = [200_000]
    for _ in range(draws):
        found.append(temperature_exact(stream, temperature))
        left.append(stream.__length_hint__())
    expected = draws * power(p, temperature)
    seen = torch.tensor(found).bincount(minlength=10).double()
    chi2 = ((seen - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor(4.5), chi2 / 2) > 1e-5   # the p-value
    taken = -torch.tensor(left).double().diff()
    error = taken.std() / draws ** 0.5
    assert abs(taken.mean() - expected_samples(p, temperature)) < 5 * error


def frequencies(p, N, temperature, batch, repeats=1):
    """How often Algorithm 2 picks each outcome, written as a chunk of two tokens."""
    picks = []
    for _ in range(repeats):
        draws = torch.multinomial(p, N * batch, replacement=True)
        samples = draws.view(N, batch, 1).expand(-1, -1, 2)
        picks.append(temperature_batch(samples, temperature)[:, 0])
    return torch.cat(picks).bincount(minlength=len(p)).double() / (repeats * batch)


@pytest.mark.parametrize("temperature", [0.7, 0.5, 0.4])
def test_batch_sampling_converges_to_the_power_of_the_distribution(temperature):
    torch.manual_seed(0)
    p = 1 / torch.arange(1, 21).double()
    p /= p.sum()
    few, many = (frequencies(p, N, temperature, 500, repeats=40) for N in (5, 400))
    far = (few - power(p, temperature)).abs().sum() / 2    # the total variation distance
    near = (many - power(p, temperature)).abs().sum() / 2
    assert near < 0.02 and near < far   # 20,000 draws of 20 outcomes: an error of about 0.01


def test_batch_sampling_has_the_law_of_algorithm_2():
    """Two outcomes, N = 4, at 1/2: the law, by enumeration of all counts."""
    torch.manual_seed(0)
    batch = 100_000
    law = 0
    for c in range(5):   # how often the first outcome occurs, and in how many ways twice
        ways = math.comb(c, 2)
        ways_of_the_other = math.comb(4 - c, 2)
        chance = math.comb(4, c) * 0.7 ** c * 0.3 ** (4 - c)
        law += chance * ways / (ways + ways_of_the_other)
    found = frequencies(torch.tensor([0.7, 0.3]).double(), 4, 0.5, batch)[0]
    assert abs(found - law) < 5 * math.sqrt(law * (1 - law) / batch)


def test_batch_sampling_falls_back_to_smaller_orders():
    samples = torch.tensor([[1, 1], [2, 2], [1, 1], [3, 3]])[:, None]     # none is there 4 times
    assert all(temperature_batch(samples, 0.25).tolist() == [[1, 1]] for _ in range(20))


def test_many_candidates_take_no_table_of_pairs():
    """Which would have 4.5e9 numbers. Of 3,000 candidates 60 % are one chunk: at 1/2 9/13."""
    first = (torch.arange(3000) < 1800).long().view(-1, 1, 1)
    share = temperature_batch(first.expand(-1, 500, -1), 0.5).double().mean()
    assert abs(share - 9 / 13) < 5 * (9 / 13 * 4 / 13 / 500) ** 0.5


@torch.no_grad()
def test_both_algorithms_give_a_model_the_same_frequencies():
    torch.manual_seed(0)
    model = tiny_calm(K=1)
    h = torch.randn(32).expand(1000, -1)
    exact = next_chunks(model, h, 2, temperature=0.7, exact=True)
    batch = next_chunks(model, h, 2, temperature=0.7, num_candidates=300)
    assert exact.shape == batch.shape == (2, 1000, 1)
    exact = exact.flatten().bincount(minlength=V) / 2000
    batch = batch.flatten().bincount(minlength=V) / 2000
    assert (exact - batch).abs().max() < 5 * (0.25 * 2 / 2000) ** 0.5 and exact.max() < 0.9


def test_a_chunk_ends_where_the_prompt_ends_and_nothing_is_put_before_it():
    """Only what is shorter than a chunk is filled up."""
    assert whole_chunks(torch.tensor([[1, 2, 3, 4, 5, 6]]), 4, EOT).tolist() == [[3, 4, 5, 6]]
    assert whole_chunks(torch.tensor([[1, 2, 3, 4]]), 4, EOT).tolist() == [[1, 2, 3, 4]]
    assert whole_chunks(torch.tensor([[1]]), 4, EOT).tolist() == [[EOT, EOT, EOT, 1]]
    assert whole_chunks(torch.zeros(1, 0).long(), 4, EOT).tolist() == [[EOT] * 4]


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("length", [0, 3, 8, 60])
def test_prompts_of_any_length_are_continued(make, temperature, length):
    """Also of one that is longer than the context; and the same seed makes the same text."""
    model = make()
    prompt = torch.randint(V - 1, (3, length))
    texts = []
    for _ in range(2):
        torch.manual_seed(1)
        texts.append(generate(model, prompt, 10, temperature, EOT))
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0][:, :length], prompt)
    assert texts[0].shape == (3, length + 10)


@torch.no_grad()
@pytest.mark.parametrize("make", BOTH)
def test_a_text_that_outgrows_the_context_goes_on_with_the_last_half_of_it(make, monkeypatch):
    model = make()
    K = model.chunk_size
    context = model.config.block_size
    seen = []

    def remember(model, h, **_):
        seen.append(h)
        return torch.randint(V, (1, len(h), K))

    monkeypatch.setattr(sample, "next_chunks", remember)
    text = generate(model, torch.randint(V, (1, K)), (context + 3) * K)
    # Draw i sees i + 1 chunks; draw number `context` is the first after the cache was full.
    half = text[:, (context + 1 - context // 2) * K:(context + 1) * K]
    expected = model.hidden(half)[:, -1]
    torch.testing.assert_close(seen[context], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["calm", "ar"])
def test_a_model_writes(model, run, trained):
    """Side by side, with a line end in the prompt, and bars between chunks, at each temperature."""
    flags = ["--out_dir", trained / "out", "--model", model, "--device", "cpu",
             "--max_new_tokens", 8, "--start", r"the\nquick"]
    for more in ([], ["--temperature", 0.5, "--num_candidates", 9]):
        text = run(sample, *flags, *more).out
        assert text.startswith("the\nquick") and text == run(sample, *flags, *more).out
        assert run(sample, *flags, *more, "--seed", 1).out != text or "--temperature" in more
    assert run(sample, *flags, "--texts", 2, "--chunks").out.count("the\nquick|") == 2


def test_what_is_printed_ends_at_the_first_border(monkeypatch, run, trained):
    def write(model, prompt, *_, **__):
        new = torch.tensor([[*b"one", 256, *b"two"]])
        return torch.cat([prompt, new], dim=1)

    monkeypatch.setattr(sample, "generate", write)
    flags = ["--out_dir", trained / "out", "--start", "x"]
    assert run(sample, *flags).out == "xone\n"
    assert run(sample, *flags, "--chunks").out == "x|one\n"
