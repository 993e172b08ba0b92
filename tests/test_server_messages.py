"""What Anthropic's own client gets from a live server: the library's answers, its events, counts and errors."""

import base64

import pytest

from mlx_fastvlm import load
from mlx_fastvlm.generate import stream_generate
from mlx_fastvlm.server.limits import Limits
from tests.live_server import SlowSteps, data_url, example, openai_or_skip, serving, wait_until

openai_or_skip()
anthropic = pytest.importorskip("anthropic")

QUESTION = "Describe this image."
SHAPES = example("shapes-two.png")
PATH = "/v1/messages"


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture(scope="module")
def live(demo):
    with serving(*demo) as server:
        yield server


@pytest.fixture(scope="module")
def expected(demo):
    """The library's responses to the question about the shapes."""
    return list(stream_generate(*demo, QUESTION, SHAPES))


def client(live, key="none"):
    return anthropic.Anthropic(base_url=live.url.removesuffix("/v1"), api_key=key, max_retries=0, timeout=60)


def picture(data: bytes = SHAPES) -> dict:
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(data).decode()}
    return {"type": "image", "source": source}


def about(*blocks, question=QUESTION) -> list:
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": question}]}]


def ask(live, *blocks, max_tokens=100, **options):
    options.setdefault("messages", about(*blocks))
    return client(live).messages.create(model="demo", max_tokens=max_tokens, **options)


def text_of(responses) -> str:
    return "".join(response.text for response in responses)


def test_an_answer_is_the_librarys_with_true_counts(live, expected):
    answer = ask(live, picture())
    assert [block.type for block in answer.content] == ["text"]
    assert answer.content[0].text == text_of(expected)
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "demo")
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert answer.usage.output_tokens == len(expected)
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens == expected[-1].prompt_tokens
    assert ask(live, picture()).usage.input_tokens == 1  # all the rest is known now


def test_a_stream_has_anthropics_events_in_their_order(live, expected):
    with client(live).messages.stream(model="demo", max_tokens=100, messages=about(picture())) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    raw = [kind for kind in kinds if kind not in ("text",)]  # the client's own
    assert raw[:2] == ["message_start", "content_block_start"]
    assert raw[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(raw[2:-3]) == {"content_block_delta"}
    assert final.content[0].text == text_of(expected)
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", len(expected))
    assert final.usage.input_tokens + final.usage.cache_read_input_tokens == expected[-1].prompt_tokens


def test_a_conversation_with_a_system_line(live, demo):
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": "Shapes."},
        {"role": "user", "content": "How many shapes are there?"},
    ]
    words = text_of(stream_generate(*demo, [{"role": "system", "content": "Be\nbrief."}, *turns], SHAPES))
    asked = [*about(picture()), *turns[1:]]
    for system in ("Be\nbrief.", [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]):
        assert ask(live, messages=asked, system=system).content[0].text == words


def test_draws_and_lengths_are_the_librarys(live, expected):
    cut = ask(live, picture(), max_tokens=3)
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 3)
    drawn = ask(live, picture(), extra_body={"temperature": 1, "top_p": 0.5, "top_k": 1})
    assert drawn.content[0].text == text_of(expected)
    assert ask(live, picture(), extra_body={"fit": "crop", "resolution": 256}).content[0].text


@pytest.mark.parametrize("streams", [False, True])
def test_the_stop_sequence_that_ended_an_answer_is_named(live, expected, streams):
    words = text_of(expected).split()
    stop = f" {words[3]}"
    options = {"messages": about(picture()), "stop_sequences": ["nowhere", words[-1], stop]}
    if streams:
        with client(live).messages.stream(model="demo", max_tokens=100, **options) as stream:
            answer = stream.get_final_message()
    else:
        answer = ask(live, **options)
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert answer.content[0].text == text_of(expected).partition(stop)[0]


def test_a_data_url_is_an_image_too_and_others_are_not_fetched(live, expected):
    block = {"type": "image", "source": {"type": "url", "url": data_url(SHAPES)}}
    assert ask(live, block).content[0].text == text_of(expected)
    for url in ("https://example.org/a.png", "/etc/hostname", "file:///etc/hostname"):
        with pytest.raises(anthropic.BadRequestError, match="--allow-remote-images|files are not read"):
            ask(live, {"type": "image", "source": {"type": "url", "url": url}})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": 0}, "max_tokens.*greater"),
        ({"max_tokens": 10**6}, "at most 1024"),
        ({"messages": []}, "at least 1"),
        ({"messages": [{"role": "system", "content": "a"}]}, "'user'"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "go on"),
        ({"messages": about(picture(b"%PNG"))}, "not an image|text"),
        ({"messages": about({"type": "image", "source": {"type": "file", "file_id": "f"}})}, "'base64'"),
        ({"messages": [{"role": "assistant", "content": [picture()]}, *about()]}, "only the user's"),
        ({"system": "an <image>"}, "reword"),
        ({"temperature": 1.5}, "temperature"),
        ({"stop_sequences": ["a"] * 17}, "at most 16"),
        ({"tools": [{"name": "t", "input_schema": {"type": "object"}}]}, "tools"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"model": "claude"}, "this server has 'demo'"),
    ],
)
def test_errors_have_anthropics_form(live, fields, words):
    body = {"model": "demo", "max_tokens": 5, "messages": about(), **fields}
    with pytest.raises(anthropic.APIStatusError, match=words) as caught:
        client(live).post(PATH, body=body, cast_to=object)
    error = caught.value
    assert error.status_code == (404 if "model" in fields else 400)
    kind = "not_found_error" if "model" in fields else "invalid_request_error"
    assert error.body["type"] == "error" and error.body["error"]["type"] == kind


def test_a_request_without_a_length_or_with_no_json_is_refused(live):
    body = {"model": "demo", "messages": about()}
    for response in (live.http().post(PATH, json=body), live.http().post(PATH, content=b"{")):
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_what_asks_for_nothing_is_no_reason_to_refuse(live):
    answer = ask(live, tools=[], thinking={"type": "disabled"}, metadata={"user_id": "a"}, max_tokens=2)
    assert answer.usage.output_tokens <= 2


def test_the_key_is_asked_for(demo):
    with serving(*demo, api_key="s3cret") as live:
        assert client(live, "s3cret").messages.create(model="demo", max_tokens=1, messages=about()).content
        with pytest.raises(anthropic.AuthenticationError) as caught:
            client(live, "wrong").messages.create(model="demo", max_tokens=1, messages=about())
        assert caught.value.body["error"]["type"] == "authentication_error"


def test_an_answer_that_breaks_off_ends_with_an_error_event(demo, monkeypatch):
    slow = SlowSteps(0.05)
    slow.may_go.set()
    slow.install(monkeypatch)
    with serving(*demo, limits=Limits(), grace_seconds=0.05) as live:
        with client(live).messages.stream(model="demo", max_tokens=100, messages=about(picture())) as stream:
            next(iter(stream))
            live.server.should_exit = True
            with pytest.raises(anthropic.APIStatusError, match="stopping"):
                stream.until_done()
        wait_until(lambda: not live.engine._thread.is_alive(), "the engine has not ended")
