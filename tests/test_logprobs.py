"""Log-probabilities are the model's own: as NumPy computes them from its logits, however a token was drawn."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_fastvlm import load, stream_generate
from mlx_fastvlm.batch_generate import BatchGenerator
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.logprobs import PendingLogprobs
from mlx_fastvlm.options import GenerationOptions
from tests.conftest import GOLDEN

PORTRAIT = GOLDEN / "images" / "portrait.png"

# Every way in which a token is drawn
WAYS = [
    {"logprobs": 0},
    {"logprobs": 5},
    {"logprobs": 20, "temp": 1.5, "seed": 3, "top_k": 50},
    {"logprobs": 2, "repetition_penalty": 1e6},
    {"logprobs": 3, "choices": ["a cat", "a dog"], "max_tokens": 40},
    {},
]


@pytest.fixture(scope="module")
def demo():
    return load("demo")


def ask(loaded, way):
    if "choices" in way:
        pytest.importorskip("llguidance")
    return list(stream_generate(*loaded, "What is this?", PORTRAIT, **{"max_tokens": 8, **way}))


def own_logprobs(loaded, tokens):
    """(tokens, vocab) from the logits of one pass over prompt and answer, in float64."""
    model, processor = loaded
    ids = [*processor.tokenize("What is this?", 1), *tokens[:-1]]
    features = [model.encode_images(processor.preprocess(PORTRAIT))[0]]
    logits = np.asarray(model(ids, features, model.make_cache())[0, -len(tokens) :].astype(mx.float32), np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


@pytest.mark.parametrize("way", WAYS[:-1], ids=str)
def test_they_are_of_the_models_own_distribution(way, demo):
    responses = ask(demo, way)
    expected = own_logprobs(demo, [response.token for response in responses])
    for response, row in zip(responses, expected, strict=True):
        assert response.logprobs.token == pytest.approx(row[response.token], abs=1e-4)
        ids = [token for token, _ in response.logprobs.top]
        assert len(set(ids)) == way["logprobs"]
        likeliest = np.sort(row)[::-1][: way["logprobs"]]
        np.testing.assert_allclose([logprob for _, logprob in response.logprobs.top], likeliest, atol=1e-4)
        np.testing.assert_allclose(row[ids], likeliest, atol=1e-4)


def test_asking_for_them_changes_no_token(demo):
    for way in WAYS[:-1]:
        without = {name: value for name, value in way.items() if name != "logprobs"}
        assert [r.token for r in ask(demo, way)] == [r.token for r in ask(demo, without)]


def test_who_asks_for_none_gets_none_and_computes_none(demo, monkeypatch):
    monkeypatch.setattr("mlx_fastvlm.token_draw.PendingLogprobs", None)
    assert [response.logprobs for response in ask(demo, {})] == [None] * 8


def test_in_a_batch_each_answer_has_those_it_has_alone(demo):
    expected = [ask(demo, way) for way in WAYS]
    generator = BatchGenerator(*demo)
    tickets = [
        generator.add("What is this?", PORTRAIT, options=GenerationOptions(**{"max_tokens": 8, **way})) for way in WAYS
    ]
    found = {ticket: [] for ticket in tickets}
    while generator.waiting or generator.decoding:
        for ticket, response in generator.step():
            found[ticket].append(response)
    for ticket, alone in zip(tickets, expected, strict=True):
        assert [r.token for r in found[ticket]] == [r.token for r in alone]
        for one, other in zip(found[ticket], alone, strict=True):
            if other.logprobs is None:
                assert one.logprobs is None
                continue
            assert one.logprobs.token == pytest.approx(other.logprobs.token, abs=1e-4)
            assert [token for token, _ in one.logprobs.top] == [token for token, _ in other.logprobs.top]


def test_equally_likely_tokens_come_in_the_order_of_their_ids():
    found = PendingLogprobs(mx.array([[0.0, 1.0, 0.0, 1.0]]), mx.array([2]), 2).read()
    assert [token for token, _ in found.top] == [1, 3]
    assert found.top[0][1] - found.token == pytest.approx(1)


@pytest.mark.parametrize("number", [-1, 21])
def test_more_than_20_or_fewer_than_none_cannot_be_had(number):
    with pytest.raises(OptionError, match=f"logprobs is {number}; expected 0 to 20"):
        GenerationOptions(logprobs=number)
