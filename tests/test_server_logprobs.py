"""Log-probabilities as OpenAI's client gets them: each token with its bytes, beside the text it is part of."""

import math

import pytest

from mlx_fastvlm import load
from mlx_fastvlm.answer import GenerationResponse
from mlx_fastvlm.generate import stream_generate
from mlx_fastvlm.logprobs import TokenLogprobs
from mlx_fastvlm.processor import Processor
from mlx_fastvlm.text_stream import TextStream
from tests.live_server import example, openai_or_skip, serving, user

openai_or_skip()

from openai.types.chat import ChatCompletionTokenLogprob  # noqa: E402

from mlx_fastvlm.server.token_logprobs import LogprobsForm, TokenTexts  # noqa: E402

QUESTION = "Describe this image."
SHAPES = example("shapes-two.png")


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture(scope="module")
def live(demo):
    with serving(*demo) as server:
        yield server


def text_in(entries: list[ChatCompletionTokenLogprob]) -> str:
    return b"".join(bytes(entry.bytes) for entry in entries).decode()


def test_they_are_the_librarys_in_openais_types(live, demo):
    expected = list(stream_generate(*demo, QUESTION, SHAPES, logprobs=3))[:-1]  # the last token ends the answer
    choice = live.ask(QUESTION, SHAPES, logprobs=True, top_logprobs=3).choices[0]
    entries = choice.logprobs.content
    assert all(isinstance(entry, ChatCompletionTokenLogprob) for entry in entries)
    assert choice.logprobs.refusal is None
    assert text_in(entries) == "".join(entry.token for entry in entries) == choice.message.content
    assert len(entries) == len(expected)
    for entry, response in zip(entries, expected, strict=True):
        assert entry.logprob == pytest.approx(response.logprobs.token, abs=1e-4)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(
            [logprob for _, logprob in response.logprobs.top], abs=1e-4
        )
        best = entry.top_logprobs[0]  # the answer is greedy
        assert (best.token, best.bytes, best.logprob) == (entry.token, entry.bytes, entry.logprob)


def test_a_stream_has_the_same_and_each_chunk_those_of_its_text(live):
    whole = live.ask(QUESTION, SHAPES, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    streamed = []
    for chunk in live.ask(QUESTION, SHAPES, stream=True, logprobs=True, top_logprobs=2):
        choice = chunk.choices[0]
        entries = choice.logprobs.content if choice.logprobs else []
        assert text_in(entries) == (choice.delta.content or "")
        streamed += entries
    assert streamed == whole


def test_a_drawn_token_need_not_be_among_the_likeliest(live):
    answers = [
        live.ask("Hello", temperature=2, seed=seed, max_tokens=10, logprobs=True, top_logprobs=1) for seed in range(5)
    ]
    entries = [entry for answer in answers for entry in answer.choices[0].logprobs.content]
    assert any(entry.token != entry.top_logprobs[0].token for entry in entries)
    assert all(entry.logprob <= entry.top_logprobs[0].logprob <= 0 for entry in entries)


def test_none_are_sent_that_nobody_asked_for(live):
    assert live.ask("Hello", max_tokens=2).choices[0].logprobs is None
    assert live.ask("Hello", max_tokens=2, logprobs=False).choices[0].logprobs is None
    bare = live.ask("Hello", max_tokens=2, logprobs=True).choices[0].logprobs.content
    assert bare and all(entry.top_logprobs == [] for entry in bare)


def test_what_a_stop_string_cuts_off_is_left_out(live):
    whole = live.ask(QUESTION, SHAPES).choices[0].message.content
    word = whole.split()[2]
    for options in ({}, {"stream": True}):
        answer = live.ask(QUESTION, SHAPES, logprobs=True, stop=[f" {word}"], **options)
        choices = [chunk.choices[0] for chunk in answer] if options else answer.choices
        entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
        assert text_in(entries) == whole.partition(f" {word}")[0]


def responses(processor: Processor, tokens: list[int], stop: str = "") -> list[GenerationResponse]:
    """What an answer of these tokens gives, the last one its end."""
    stream, made = TextStream(processor.tokenizer, [stop]), []
    for count, token in enumerate(tokens, 1):
        text = stream.add(token)
        is_last = stream.stopped or count == len(tokens)
        made.append(
            GenerationResponse(
                text=text + (stream.finish() if is_last else ""),
                token=token,
                prompt_tokens=1,
                prompt_tps=1.0,
                generation_tokens=count,
                generation_tps=1.0,
                ttft=0.0,
                peak_memory=0.0,
                finish_reason="stop" if is_last else None,
                logprobs=TokenLogprobs(-float(count), ()),
            )
        )
        if is_last:
            return made
    raise AssertionError("no tokens")


def test_tokens_that_are_part_of_a_character_have_their_bytes(demo):
    processor = demo[1]
    text = "né 🙂!"
    tokens = processor.tokenizer.encode(text).ids
    form = LogprobsForm(TokenTexts(processor))
    pieces = [(response.text, form.of(response)) for response in responses(processor, tokens)]
    for piece, entries in pieces:
        assert b"".join(bytes(entry["bytes"]) for entry in entries) == piece.encode()
    entries = [entry for _, entries in pieces for entry in entries]
    assert [entry["logprob"] for entry in entries] == [-float(count) for count in range(1, len(tokens) + 1)]
    parts = [entry for entry in entries if "\\x" in entry["token"]]
    assert parts and all(entry["token"] == "".join(f"\\x{byte:02x}" for byte in entry["bytes"]) for entry in parts)


def test_text_held_back_for_a_stop_string_keeps_its_tokens_waiting(demo):
    processor = demo[1]
    tokens = processor.tokenizer.encode("abc xyz").ids
    form = LogprobsForm(TokenTexts(processor))
    sent = ""
    for response in responses(processor, tokens, stop="bc q"):
        sent += response.text
        entries = form.of(response)
        if not response.text and response.finish_reason is None:
            assert entries == []
    assert sent == "abc xyz"
    cut = LogprobsForm(TokenTexts(processor))
    kept = [entry for response in responses(processor, tokens, stop="c x") for entry in cut.of(response)]
    assert "".join(entry["token"] for entry in kept).startswith("ab")
    assert not any("z" in entry["token"] for entry in kept)


def test_marks_have_no_bytes(demo):
    processor = demo[1]
    texts = TokenTexts(processor)
    (end,) = processor.tokenizer.encode("<|im_end|>").ids
    assert texts.written(end, -1.0) == {"token": "<|im_end|>", "logprob": -1.0, "bytes": None}
    assert texts.written(10**6, -1.0) == {"token": "", "logprob": -1.0, "bytes": None}  # padding of the vocabulary
    alternatives = [end, *range(20)]
    form = LogprobsForm(texts)
    (response,) = responses(processor, processor.tokenizer.encode("a").ids)
    response.logprobs = TokenLogprobs(math.log(0.5), tuple((token, -1.0) for token in alternatives))
    (entry,) = form.of(response)
    assert [top["bytes"] is None for top in entry["top_logprobs"]] == [True] + [False] * 20


def test_a_question_with_another_form_of_the_answer_has_them_too(live):
    form = {"type": "json_schema", "json_schema": {"name": "b", "schema": {"type": "boolean"}}}
    answer = live.openai().chat.completions.create(
        model="demo", messages=[user("Hello")], response_format=form, logprobs=True
    )
    assert text_in(answer.choices[0].logprobs.content) == answer.choices[0].message.content in ("true", "false")
