"""BrierLM: its estimates, what eval_brier.py prints, and figures of runs.

Statistical claims are tested five standard errors wide.
"""
import dataclasses
import itertools
import json
import math
import shutil
import xml.etree.ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval_brier
from autoencoder import posterior_samples
from data.checkpoint import save_checkpoint
from data.figure import linear_ticks, log_ticks, read_series
from data.prepare import TokenData, get_tokenizer
from eval_brier import (bits_per_token, brier_ngram, brierlm, describe, difference,
                        distances_to_means, distinct, hit_and_collision, score_by_rollout,
                        score_documents, summary)
from helpers import V, assert_one_line, checkpoint_of, last_line, tiny_ar, tiny_calm
from sample import generate


def assert_unbiased(found, exact, floor=0.0):
    """The mean of found (P,) is `exact`, within five standard errors."""
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean() - exact) < 5 * error + floor


@pytest.mark.parametrize("S", [2, 8])
def test_brier_ngram_is_unbiased(S):
    torch.manual_seed(0)
    P = 100_000
    ways = torch.tensor(list(itertools.product(range(2), repeat=4)))   # 16 chunks of two tokens
    p = torch.rand(16).double().softmax(0)
    y = torch.tensor([0, 1, 1, 0])
    samples = ways[torch.multinomial(p, S * P, replacement=True)].view(S, P, 4)
    found = brier_ngram(samples, y.expand(P, 4)).double()          # (P, 4)
    for n in range(1, 5):
        begins_as_y = (ways[:, :n] == y[:n]).all(1)
        number = (ways[:, :n] * 2 ** torch.arange(n)).sum(1)       # of each way's first n tokens
        law = torch.zeros(2 ** n).double().index_add_(0, number, p)
        assert_unbiased(found[:, n - 1], 2 * p[begins_as_y].sum() - (law ** 2).sum())


def test_hits_and_collisions_are_counted_over_all_pairs():
    samples = torch.randint(2, (7, 3, 4))
    targets = torch.randint(2, (3, 4))
    hit, collision = hit_and_collision(samples, targets)
    for n in range(1, 5):
        begins = [(a[:, :n] == targets[:, :n]).all(1).float() for a in samples]
        torch.testing.assert_close(hit[:, n - 1], torch.stack(begins).mean(0))
        same = [(a[:, :n] == b[:, :n]).all(1).float()
                for a, b in itertools.permutations(samples, 2)]
        torch.testing.assert_close(collision[:, n - 1], torch.stack(same).mean(0))


@torch.no_grad()
def test_ar_rollout_gives_the_exact_brier_scores():
    torch.manual_seed(0)
    model = tiny_ar(vocab_size=3)
    window = torch.randint(3, (1, 8))
    hit, same = score_by_rollout(model, window.expand(4000, -1), stride=4, S=2)[:, :, 0].double()
    found = 2 * hit - same                                         # of n-grams from token 4 on
    ways = torch.tensor(list(itertools.product(range(3), repeat=4)))   # all texts of four tokens
    texts = torch.cat([window[:, :4].expand(81, -1), ways], dim=1)
    p = model.lm_head(model.hidden(texts[:, :-1])).softmax(-1)[:, 3:]     # (81, 4, V)
    p = p.gather(-1, ways[..., None])[..., 0].cumprod(-1).double()        # (81, 4): of n tokens
    for n in range(1, 5):
        prefix = (ways[:, :n] * 3 ** torch.arange(n)).sum(1)
        law = {key: p[prefix == key][0, n - 1] for key in prefix.unique().tolist()}
        y = (window[0, 4:4 + n] * 3 ** torch.arange(n)).sum().item()
        exact = 2 * law[y] - sum(value ** 2 for value in law.values())
        assert_unbiased(found[:, n - 1], exact, floor=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("K, S", [(1, 2), (2, 4), (3, 4)])
def test_calm_rollout_agrees_with_pairs_of_whole_texts(K, S):
    rows = 20_000
    model = tiny_calm(K)
    start = 2 * K
    length = K * math.ceil(4 / K)
    window = torch.randint(V, (1, start + length)).expand(rows, -1)
    pair = torch.stack([generate(model, window[:, :start], length)[:, start:] for _ in range(2)])
    direct = brier_ngram(pair, window[:, start:]).double()
    hit, same = score_by_rollout(model, window, stride=start, S=S)[:, :, 0].double()
    found = 2 * hit - same
    error = (direct.var(0) / rows + found.var(0) / rows).sqrt()
    assert ((direct.mean(0) - found.mean(0)).abs() < 5 * error + 1e-3).all()
    equal = pair[0, :, 0].eq(pair[1, :, 0]).double().mean()
    assert 0.05 < equal < 0.95   # else the claim would say little


def test_brierlm_is_the_geometric_mean_and_zero_below_zero():
    product = 0.4 * 0.2 * 0.1 * 0.05
    assert brierlm(np.array([0.4, 0.2, 0.1, 0.05])) == pytest.approx(100 * product ** 0.25)
    assert brierlm(np.array([0.4, 0.2, 0.1, -0.05])) == 0


# --- Errors --------------------------------------------------------------------------------
@pytest.fixture
def score_repetitions(monkeypatch):
    """score_repetitions(n, easier=1): Scores of 20 documents, the first of a single token over and
    over, n windows long; a model hits token t in `easier` * t % of its places."""

    def score_repetitions(n, easier=1.0):
        documents = [[256] + [token] * (16 * n - 1) for token in range(20, 40)]
        data = TokenData(None, {"border": 256}, get_tokenizer("bytes"), None,
                         np.concatenate(documents))

        def score_windows(model, tokens, stride, S):
            hit = easier * tokens[:, stride::stride, None].expand(-1, -1, 4) / 100
            return torch.stack([hit, 0.5 * hit])

        monkeypatch.setattr(eval_brier, "score_windows", score_windows)
        return score_documents(tiny_calm(), data, torch.device("cpu"), torch.float32, 20 * n,
                               stride=4, context=16)

    return score_repetitions


def test_an_error_is_over_documents_more_of_the_same_does_not_make_it_smaller(score_repetitions):
    once, often = (summary(score_repetitions(n)) for n in (1, 10))
    assert once["documents"] == often["documents"] == 20
    assert often["positions"] == 10 * once["positions"]
    assert once["stderr"] == pytest.approx(often["stderr"]) and once["stderr"] > 1
    spread = np.std([1.5 * token for token in range(20, 40)])      # of BrierLM, by document
    assert once["stderr"] == pytest.approx(spread / 20 ** 0.5, rel=0.15)


def test_of_one_document_the_error_is_unknown(score_repetitions):
    scores = score_repetitions(5)
    one = dataclasses.replace(scores, hits=scores.hits[:1], collisions=scores.collisions[:1],
                              count=scores.count[:1])
    result = summary(one)
    assert result["stderr"] is None and "+- ?" in describe(result)


def test_a_score_on_the_text_of_training_says_so(score_repetitions):
    scores = score_repetitions(5)
    assert "on the text of training" not in describe(summary(scores))
    scores.val_repeats_train = True
    assert "on the text of training" in describe(summary(scores))


def test_a_paired_difference_leaves_out_how_hard_the_documents_are(score_repetitions):
    worse = score_repetitions(2)
    better = score_repetitions(2, easier=1.1)
    found = difference(better, worse)
    assert found["ratio"] == pytest.approx(1.1) and found["ratio_stderr"] < 1e-6
    assert found["difference"] == pytest.approx(0.1 * worse.brierlm())
    assert found["difference_stderr"] == pytest.approx(0.1 * summary(worse)["stderr"])


# --- What BrierLM cannot see ---------------------------------------------------------------
@torch.no_grad()
def test_text_costs_its_entropy_where_its_own_model_reads_it():
    torch.manual_seed(0)
    model = tiny_ar()
    texts = generate(model, torch.randint(V, (500, 4)), 20)
    p = model.probabilities(model.hidden(texts[:, :-1])[:, 3:])    # (500, 20, V)
    entropy = -(p * p.log2()).sum(-1).mean(1)                      # (500,) of each text
    bits = torch.tensor([bits_per_token(model, text[None], 4) for text in texts])
    assert_unbiased(bits - entropy, 0.0)
    assert bits_per_token(model, texts, 4) == pytest.approx(bits.mean().item(), rel=1e-4)
    other = bits_per_token(model, torch.randint(V, (500, 24)), 4)
    assert other > bits.mean() + 0.5


class Corners:
    """An autoencoder of one token a chunk: token i is the i-th unit vector, times 4."""

    def encode(self, chunks):
        mean = 4 * F.one_hot(chunks[:, 0], 16).float()
        return mean, torch.full_like(mean, math.log(0.3))

    def tokens(self, z):
        return z.argmax(-1)[:, None]                               # (P, 1)


def test_samples_of_the_posterior_are_on_the_manifold_and_vectors_between_chunks_are_not():
    mean, log_std = Corners().encode(torch.arange(16).repeat(100)[:, None])
    own, usual = distances_to_means(Corners(), posterior_samples(mean, log_std, 1)[0])
    assert own.median() / usual.median() == pytest.approx(1, abs=0.02)
    between = 0.51 * mean + 0.49 * mean.roll(1, 0)
    far, usual = distances_to_means(Corners(), between)
    assert far.median().item() == pytest.approx(0.49 * 4 * 2 ** 0.5, rel=1e-4)
    assert far.median() / usual.median() > 2


def test_distinct_is_the_share_of_different_ngrams():
    texts = torch.tensor([[0, 1, 0, 1, 0, 1], [2, 2, 2, 2, 2, 2]])
    found = [distinct(texts, n) for n in (1, 2, 3, 4)]
    assert found == [3 / 12, 3 / 10, 3 / 8, 3 / 6]                 # 01, 10, 22; 010, 101, 222; ...


# --- python eval_brier.py ------------------------------------------------------------------
@pytest.mark.parametrize("model", ["calm", "ar"])
def test_the_frontier_falls_from_accuracy_and_collision_at_one(model, trained, run):
    """Colder samples are more alike. One candidate is too few for T = 1/2: no row."""
    result = run(eval_brier, "--out_dir", trained / "out", "--model", model, "--device", "cpu",
                 "--windows", 4, "--frontier", "--temperatures", 1, 0.5, "--candidates", 1, 20,
                 "--json")
    assert result.code == 0, result.err
    points = [json.loads(line) for line in result.out.splitlines() if line.startswith("{")]
    warm = [point["collision"] for point in points if point["temperature"] == 1]
    cold = [point["collision"] for point in points if point["temperature"] == 0.5]
    assert (len(warm), len(cold)) == ((2, 1) if model == "calm" else (1, 1))
    assert cold[0] > max(warm) and min(warm) > 0
    for point in points:   # what a temperature costs
        assert 1 <= point["candidates_drawn"] <= point["num_candidates"]
    costs = [point["flops_per_token"] for point in points]
    assert costs[-1] > costs[0] if model == "calm" else costs[-1] == costs[0]


def test_the_nearest_of_more_samples_are_more_alike_and_cost_more(trained, run):
    """The nearest of one is T = 1."""
    points = []
    near = ["--sampler", "near", "--noise", 1, "--candidates", 1, 4, 16]
    for flags in (near, ["--temperatures", 1]):
        result = run(eval_brier, "--out_dir", trained / "out", "--device", "cpu", "--windows", 4,
                     "--frontier", "--json", *flags)
        points += [json.loads(line) for line in result.out.splitlines() if line.startswith("{")]
    *near, plain = points
    assert near[0]["collision"] < near[1]["collision"] < near[2]["collision"]
    assert near[0]["flops_per_token"] < near[1]["flops_per_token"] < near[2]["flops_per_token"]
    for name in ("accuracy", "collision", "flops_per_token"):
        assert near[0][name] == plain[name]


def test_with_less_noise_samples_are_more_alike_at_the_same_cost(trained, run):
    """Without noise all are equal."""
    points = []
    for noise in (1, 0.3, 0):
        result = run(eval_brier, "--out_dir", trained / "out", "--device", "cpu", "--windows", 4,
                     "--frontier", "--json", "--temperatures", 1, "--noise", noise)
        points += [json.loads(line) for line in result.out.splitlines() if line.startswith("{")]
    assert points[0]["collision"] < points[1]["collision"] < points[2]["collision"] == 1
    assert len({point["flops_per_token"] for point in points}) == 1
    score = last_line(run(eval_brier, "--out_dir", trained / "out", "--device", "cpu", "--windows",
                          4, "--json", "--noise", 0))
    assert "model, T = 1, noise 0" in score["bits"]
    assert score["collision"] == [1.0] * 4


def test_a_score_says_what_it_was_measured_on(trained, run):
    flags = ["--windows", 4, "--context", 32, "--stride", 8, "--num_draws", 3, "--device", "cpu"]
    score = last_line(run(eval_brier, "--out_dir", trained / "out", *flags, "--json"))
    assert score["positions"] == 4 * 3 and score["samples"] == 3   # from tokens 8, 16, 24 on
    assert score["context"] == 32 and score["stride"] == 8 and score["step"] == 40
    assert len(score["brier"]) == 4 and score["brierlm"] >= 0
    assert score["documents"] == 1 and score["stderr"] is None     # of one document: unknown
    assert set(score["bits"]) == set(score["distinct"]) == {
        "real", "model, T = 1", "model, T = 0.5", "model, near", "judge, T = 1",
        "judge, T = 0.5"}
    assert 0 < score["bits"]["real"] < score["bits"]["model, T = 1"]   # CALM is a beginner here
    assert score["off_manifold"] > 0


@pytest.mark.parametrize("flags, message", [
    (["--judge", "calm.pt"], "cannot judge: expected an ar.pt that reads 64 tokens"),
    (["--against", "nothing"], "no checkpoint at"),
    (["--frontier", "--against", "ar.pt"], "drop --frontier"),
    ([], "has changed since the model was trained")])
def test_what_cannot_be_scored_is_said_before_it_is_scored(flags, message, trained, tmp_path, run):
    """The last one: its data set was prepared anew, from another text."""
    shutil.copytree(trained / "out", tmp_path / "out")
    checkpoint = checkpoint_of(tmp_path / "out", "calm")
    if not flags:
        checkpoint["data"]["fingerprint"] = ["other", "text"]
        save_checkpoint(tmp_path / "out" / "calm.pt", checkpoint)
    flags = [tmp_path / "out" / flag if flag[0] != "-" else flag for flag in flags]
    result = run(eval_brier, "--out_dir", tmp_path / "out", "--device", "cpu", *flags)
    assert_one_line(result, message)
    assert "BrierLM" not in result.out


def test_two_models_are_compared_at_the_same_ngrams(trained, run):
    flags = ["--out_dir", trained / "out", "--windows", 4, "--device", "cpu", "--json"]
    one = last_line(run(eval_brier, *flags, "--against", trained / "out" / "ar.pt"))
    flags += ["--model", "ar"]
    other = last_line(run(eval_brier, *flags, "--against", trained / "out" / "calm.pt"))
    assert one["brierlm"] == other["against"]["brierlm"]
    assert one["against"]["difference"] == -other["against"]["difference"]
    assert one["positions"] == other["positions"] and one["stride"] == other["stride"]


# --- Figures -------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


def write_log(folder, *entries):
    folder.mkdir(parents=True)
    lines = [{"step": 5, "seconds": 1, "chunk_size": 4, "inference_flops": 3e5, **entry}
             for entry in entries]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def runs(tmp_path):
    """A run of both models, and a folder of three runs with other K, one of which was resumed."""
    write_log(tmp_path / "run", {"stage": "calm", "flops": 1e12, "brierlm": 4},
              {"stage": "ar", "flops": 1e12, "brierlm": 5},
              {"stage": "calm", "flops": 2e12, "brierlm": 6, "final": True})
    spectrum = tmp_path / "spectrum"
    write_log(spectrum / "a", {"stage": "calm", "flops": 1e12, "brierlm": 4, "final": 1},
              {"stage": "calm", "flops": 3e12, "brierlm": 7, "final": 1})
    write_log(spectrum / "b", {"stage": "calm", "flops": 5e11, "brierlm": 1},
              {"stage": "calm", "flops": 2e12, "brierlm": 5, "final": 1, "chunk_size": 8})
    return tmp_path


def test_a_run_is_a_line_through_its_evaluations_a_folder_one_through_the_ends_of_its_runs(runs):
    calm, ar = read_series(runs / "run", "flops")
    assert (calm.name, ar.name) == ("CALM K = 4", "AR")
    assert [(point.x, point.score) for point in calm.points] == [(1e12, 4), (2e12, 6)]
    spectrum, = read_series(runs / "spectrum", "flops")
    assert spectrum.name == "CALM"   # of several K
    assert [(point.x, point.score) for point in spectrum.points] == [(2e12, 5), (3e12, 7)]


@pytest.mark.parametrize("x", ["flops", "inference_flops"])
def test_a_figure_names_its_lines_and_every_chunk_size(x, runs, run):
    with open(runs / "run" / "log.jsonl", "a") as log:
        log.write('{"stage": "calm", "st')   # killed while it wrote its log
    result = run(eval_brier, "--plot", runs / "x.svg", runs / "run", runs / "spectrum", "--x", x)
    assert result.code == 0 and "3 lines in" in result.out, result.err
    svg = xml.etree.ElementTree.parse(runs / "x.svg").getroot()
    texts = {text.text for text in svg.findall(f"{SVG}text")}
    assert {"CALM K = 4", "AR", "CALM", "K = 4", "K = 8", "BrierLM"} <= texts
    for line in svg.findall(f"{SVG}polyline"):   # on the sheet, and to the right
        corners = [tuple(map(float, corner.split(","))) for corner in line.get("points").split()]
        assert corners == sorted(corners) or x == "inference_flops"
        assert all(0 < cx < 720 and 0 < cy < 440 for cx, cy in corners)


def test_lines_of_one_name_are_told_apart_by_their_folder(runs, run):
    write_log(runs / "other", {"stage": "ar", "flops": 1e12, "brierlm": 3})
    assert run(eval_brier, "--plot", runs / "x.svg", runs / "run", runs / "other").code == 0
    text = (runs / "x.svg").read_text()
    assert "AR (run)" in text and "AR (other)" in text and "CALM K = 4<" in text


def test_ticks_are_one_two_and_five_times_powers_of_ten():
    assert log_ticks(8e12, 6e13) == [1e13, 2e13, 5e13]
    assert log_ticks(1e12, 1e17) == pytest.approx([1e12, 1e13, 1e14, 1e15, 1e16, 1e17])
    assert linear_ticks(17) == [0, 5, 10, 15, 20]
    assert linear_ticks(0.7) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
