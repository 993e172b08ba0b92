"""What OpenAI's own client gets from a live server: the library's answers, true counts, and errors that say why."""

import io
import json
import random
import warnings
from concurrent.futures import ThreadPoolExecutor

import httpx
import PIL.Image
import pytest

from mlx_fastvlm import load
from mlx_fastvlm.auto_resolution import AutoResolution
from mlx_fastvlm.errors import FastVLMWarning, OptionError
from mlx_fastvlm.feature_cache import image_features
from mlx_fastvlm.generate import stream_generate
from mlx_fastvlm.image_decoding import open_image
from mlx_fastvlm.processor import Processor
from mlx_fastvlm.reuse import Reuse
from tests.demo_pictures import draw
from tests.live_server import data_url, example, openai_or_skip, serving, user

openai = openai_or_skip()

QUESTION = "Describe this image."
SHAPES = example("shapes-two.png")


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture(scope="module")
def library(demo):
    """The library's responses to a question, as a list."""
    reuse = Reuse(*demo)

    def answer(*question, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FastVLMWarning)  # several pictures
            return list(stream_generate(*demo, *question, reuse=reuse, **options))

    return answer


@pytest.fixture(scope="module")
def live(demo):
    with serving(*demo) as server:
        yield server


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    file.name = "picture.png"
    draw(file, seed)
    return file.getvalue()


def text_of(answer) -> str:
    """The words of a completion, or of the library's responses."""
    if isinstance(answer, list):
        return "".join(response.text for response in answer)
    return answer.choices[0].message.content


@pytest.mark.parametrize("name", ["shapes-two.png", "word.png"])
def test_an_answer_is_the_librarys_with_true_counts(live, library, name):
    responses = library(QUESTION, example(name))
    completion = live.ask(QUESTION, example(name))
    assert text_of(completion) == text_of(responses)
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.prompt_tokens == responses[-1].prompt_tokens
    assert completion.usage.completion_tokens == len(responses)
    assert completion.usage.total_tokens == responses[-1].prompt_tokens + len(responses)
    assert completion.model == "demo"


def test_a_stream_has_the_same_answer_and_counts(live):
    whole = live.ask(QUESTION, SHAPES)
    *chunks, counts = live.ask(QUESTION, SHAPES, stream=True, stream_options={"include_usage": True})
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text_of(whole)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert counts.choices == []
    assert counts.usage.completion_tokens == whole.usage.completion_tokens == len(chunks) - 1
    assert len({chunk.id for chunk in [*chunks, counts]}) == 1


def test_a_stream_without_asking_for_counts_has_none(live):
    chunks = list(live.ask(QUESTION, SHAPES, stream=True))
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks)


def test_a_stream_ends_as_openais_does(live):
    body = {"model": "demo", "messages": [user(QUESTION, SHAPES)], "stream": True}
    response = live.http().post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")


def test_more_questions_about_a_picture_need_no_encoder(live, library, monkeypatch):
    encoded = []

    def counting(*args):
        encoded.append(args)
        return image_features(*args)

    monkeypatch.setattr("mlx_fastvlm.feature_cache.image_features", counting)
    new = picture(seed=99)
    before = live.figures()
    answers = [live.ask(question, new) for question in (QUESTION, "How many shapes are there?", QUESTION)]
    assert len(encoded) == 1
    assert live.figures()["encoded_requests_total"] == before["encoded_requests_total"] + 1
    assert live.figures()["image_requests_total"] == before["image_requests_total"] + 3
    assert answers[2].usage.prompt_tokens_details.cached_tokens == answers[2].usage.prompt_tokens - 1
    assert 16 < answers[1].usage.prompt_tokens_details.cached_tokens < answers[1].usage.prompt_tokens - 1
    assert text_of(answers[1]) == text_of(library("How many shapes are there?", new))


def test_a_conversation_goes_on_where_its_last_answer_ended(live, library):
    first = live.ask(QUESTION, SHAPES)
    messages = [
        user(QUESTION, SHAPES),
        {"role": "assistant", "content": text_of(first)},
        {"role": "user", "content": "How many shapes are there?"},
    ]
    second = live.openai().chat.completions.create(model="demo", messages=messages)
    known = first.usage.total_tokens - 1  # all but the token that ends an answer
    assert second.usage.prompt_tokens_details.cached_tokens >= known
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}, *messages[1:]]
    assert text_of(second) == text_of(library(turns, SHAPES))


def test_several_pictures_keep_their_places(live, library):
    one, other = picture(1), picture(2)
    assert text_of(live.ask(QUESTION, one, other)) == text_of(library(QUESTION, [one, other]))
    parts = [
        {"type": "text", "text": "First:"},
        {"type": "image_url", "image_url": {"url": data_url(one)}},
        {"type": "text", "text": "Second:"},
        {"type": "image_url", "image_url": {"url": data_url(other)}},
    ]
    turns = [{"role": "user", "content": [p if p["type"] == "text" else {"type": "image"} for p in parts]}]
    asked = live.openai().chat.completions.create(model="demo", messages=[{"role": "user", "content": parts}])
    assert text_of(asked) == text_of(library(turns, [one, other]))


def test_words_alone_and_a_system_line(live, library):
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    answer = live.openai().chat.completions.create(model="demo", messages=messages, max_tokens=5)
    assert text_of(answer) == text_of(library("Hello", system="Be brief.", max_tokens=5))
    assert answer.usage.completion_tokens <= 5


def test_draws_stops_and_lengths_are_the_librarys(live, library):
    chosen = {"seed": 7, "top_p": 0.9, "max_tokens": 20}
    drawn = live.ask(QUESTION, SHAPES, temperature=1.5, **chosen)
    assert text_of(drawn) == text_of(library(QUESTION, SHAPES, temp=1.5, **chosen))
    stopped = live.ask(QUESTION, SHAPES, stop=[" yellow"])
    assert text_of(stopped) == text_of(library(QUESTION, SHAPES)).partition(" yellow")[0]
    cut = live.ask(QUESTION, SHAPES, max_completion_tokens=3)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage.completion_tokens == 3


def test_an_answer_follows_a_schema(live):
    schema = {
        "type": "object",
        "properties": {"color": {"enum": ["red", "yellow"]}},
        "required": ["color"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "color", "schema": schema, "strict": True}}
    assert json.loads(text_of(live.ask(QUESTION, SHAPES, response_format=form)))["color"] in ("red", "yellow")
    any_object = live.ask(QUESTION, SHAPES, response_format={"type": "json_object"}, max_tokens=60)
    assert isinstance(json.loads(text_of(any_object)), dict)


def test_32_clients_at_once_get_the_answers_they_would_get_alone(live, library):
    pictures = [SHAPES, example("word.png"), picture(1), picture(2)]
    questions = [QUESTION, "How many shapes are there?"]
    asked = [(questions[i % 2], pictures[i // 2 % 4]) for i in range(32)]
    alone = {(question, image): text_of(library(question, image)) for question, image in set(asked)}
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda pair: text_of(live.ask(*pair)), asked))
    assert answers == [alone[pair] for pair in asked]
    live.wait_for("requests_running", 0)


def test_langchains_client_gets_the_same(live):
    chat_models = pytest.importorskip("langchain_openai")
    model = chat_models.ChatOpenAI(model="demo", base_url=live.url, api_key="none", max_retries=0)
    expected = live.ask(QUESTION, SHAPES)
    answer = model.invoke([user(QUESTION, SHAPES)])
    assert answer.content == text_of(expected)
    assert answer.usage_metadata["output_tokens"] == expected.usage.completion_tokens
    assert "".join(piece.content for piece in model.stream([user(QUESTION, SHAPES)])) == answer.content


def test_the_model_is_listed(live, demo):
    client = live.openai()
    (card,) = client.models.list()
    assert card.id == "demo"
    resolutions = demo[1].image_processor.resolutions
    assert card.mlx_fastvlm == {
        "resolution": 256,
        "default_resolution": 256,
        "fit": "pad",
        "default_fit": "pad",
        "min_resolution": resolutions[0],
        "max_resolution": resolutions[-1],
        "resolution_step": 64,
        "max_tokens": 1024,
        "max_images": 8,
        "context_length": demo[0].config.text_config.max_position_embeddings,
    }
    assert client.models.retrieve("demo").object == "model"
    with pytest.raises(openai.NotFoundError, match="this server has 'demo'"):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=[user("Hello")])
    assert caught.value.code == "model_not_found"


def test_several_models_behind_one_server(demo, library):
    with serving(*demo, others={"second": load("demo")}) as live:
        client = live.openai()
        assert [card.id for card in client.models.list()] == ["demo", "second"]
        assert live.http().get("/health").json()["models"] == ["demo", "second"]
        asked = [(model, number) for model in ("demo", "second") for number in range(4)]
        with ThreadPoolExecutor(8) as pool:
            answers = list(
                pool.map(
                    lambda one: client.chat.completions.create(
                        model=one[0], messages=[user(QUESTION, picture(one[1]))]
                    ),
                    asked,
                )
            )
        expected = [text_of(library(QUESTION, picture(number))) for number in range(4)]
        assert [text_of(answer) for answer in answers] == expected * 2
        assert [answer.model for answer in answers] == [model for model, _ in asked]


def test_two_models_of_one_name_are_refused(demo):
    with pytest.raises(OptionError, match="Two models are called demo"), serving(*demo, others={"demo": demo}):
        pass


@pytest.mark.filterwarnings("ignore:This model was trained")
def test_what_a_request_leaves_open_is_as_the_server_was_told(demo, library):
    with serving(*demo, defaults={"resolution": 320, "fit": "native"}) as live:
        card = live.openai().models.retrieve("demo").mlx_fastvlm
        assert (card["default_resolution"], card["default_fit"]) == (320, "native")
        chosen, own = live.ask(QUESTION, SHAPES), live.ask(QUESTION, SHAPES, extra_body={"resolution": 256})
        assert text_of(chosen) == text_of(library(QUESTION, SHAPES, resolution=320, fit="native"))
        assert chosen.usage.prompt_tokens - own.usage.prompt_tokens == 5**2 - 4**2


def test_health_and_figures(live):
    before = live.figures()
    live.ask("Hello", max_tokens=4)
    after = live.figures()
    assert live.http().get("/health").json() == {"status": "ok", "models": ["demo"]}
    assert after["ttft_seconds_count"] == before["ttft_seconds_count"] + 1
    assert after["prompt_tokens_total"] > before["prompt_tokens_total"]
    assert after["memory_bytes"] > 4e6  # the model


def test_times_count_from_the_requests_arrival(live):
    timings = live.ask(QUESTION, SHAPES).timings
    assert 0 < timings["ttft"] < 60
    assert sum(timings["stages"].values()) == pytest.approx(timings["ttft"], abs=1e-3)
    assert {"receive", "decode", "tokenize", "wait", "prefill", "first_token"} <= set(timings["stages"])


def test_the_first_chunk_and_the_last_say_how_long_the_first_token_took(live):
    chunks = list(live.ask(QUESTION, SHAPES, stream=True))
    first, last = chunks[0].timings, chunks[-1].timings
    assert first["ttft"] == last["ttft"] == pytest.approx(sum(first["stages"].values()), abs=1e-3)
    assert not any(hasattr(chunk, "timings") for chunk in chunks[1:-1])


@pytest.mark.filterwarnings("ignore:This model was trained")
def test_resolution_and_fit_are_the_librarys(live, library):
    wide = io.BytesIO()
    PIL.Image.open(io.BytesIO(picture(3))).resize((640, 320)).save(wide, "PNG")
    wide = wide.getvalue()
    for chosen in ({"resolution": 384}, {"resolution": 512, "fit": "native"}, {"fit": "crop"}):
        expected = library(QUESTION, wide, **chosen)
        answer = live.ask(QUESTION, wide, extra_body=chosen)
        assert (text_of(answer), answer.usage.prompt_tokens) == (text_of(expected), expected[-1].prompt_tokens)
    # The rows of one size are not taken for those of another.
    assert text_of(live.ask(QUESTION, wide)) == text_of(library(QUESTION, wide))


@pytest.mark.filterwarnings("ignore:This model was trained")
def test_resolution_auto_chooses_one_for_all_pictures_of_a_request(demo, library):
    file = io.BytesIO()
    PIL.Image.new("RGB", (300, 200), "red").save(file, "PNG")
    flat = file.getvalue()
    auto = AutoResolution(256, ((64, 1e-6),))
    assert auto.choose(open_image(SHAPES)) == 256
    with serving(*demo, defaults={"resolution": auto}) as live:
        assert live.openai().models.retrieve("demo").mlx_fastvlm["default_resolution"] == "auto"
        for pictures, side in ([flat], 64), ([SHAPES], 256), ([flat, SHAPES], 256), ([flat], 64):
            expected = library(QUESTION, pictures, resolution=side)
            answer = live.ask(QUESTION, *pictures)
            assert (text_of(answer), answer.usage.prompt_tokens) == (text_of(expected), expected[-1].prompt_tokens)
        assert live.ask(QUESTION, max_tokens=1).usage.prompt_tokens  # no picture, nothing to choose
        # A client's "auto" has the model's own thresholds, the same as the library's, which are not the server's.
        expected = library(QUESTION, flat, resolution="auto")
        answer = live.ask(QUESTION, flat, extra_body={"resolution": "auto"})
        assert answer.usage.prompt_tokens > live.ask(QUESTION, flat).usage.prompt_tokens
        assert (text_of(answer), answer.usage.prompt_tokens) == (text_of(expected), expected[-1].prompt_tokens)


@pytest.mark.filterwarnings("ignore:This model was trained")
def test_low_detail_is_half_the_models_own_resolution(demo):
    model, processor = demo
    larger = Processor(processor.tokenizer, processor.image_processor.at(512), processor.eos_token_ids)

    def asked(live, *details, **more):
        parts = [{"type": "image_url", "image_url": {"url": data_url(SHAPES), "detail": each}} for each in details]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}
        completions = live.openai().chat.completions
        return completions.create(model="demo", messages=[message], max_tokens=1, extra_body=more).usage.prompt_tokens

    with serving(model, larger) as live:
        high, low = 8**2, 4**2
        assert asked(live, "high") - asked(live, "low") == high - low
        assert asked(live, "auto") == asked(live, "original") == asked(live, "high")
        assert asked(live, "low", "low") < asked(live, "low", "high") == asked(live, "high", "high")
        assert asked(live, "low", resolution=512) == asked(live, "high")


def test_penalties_of_0_are_no_penalties(live):
    plain = text_of(live.ask(QUESTION, SHAPES))
    assert text_of(live.ask(QUESTION, SHAPES, frequency_penalty=0, presence_penalty=0.0)) == plain


def test_unknown_fields_are_ignored_and_null_means_left_out(live):
    body = {"model": "demo", "messages": [user("Hello")], "max_tokens": 2, "store": True, "stop": None, "seed": None}
    assert live.http().post("/v1/chat/completions", json=body).status_code == 200


HELLO = [user("Hello")]
IMAGE_AT = "messages[0].content[1].image_url.url"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": None}, "messages", "list"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [5]}, "messages[0]", "dictionary"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role", "'assistant'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string"),
        ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages[0].content[0]", "'image_url'"),
        ({"messages": [user("a", "photo.png")]}, IMAGE_AT, "files are not read"),
        ({"messages": [user("a", "/etc/hostname")]}, IMAGE_AT, "files are not read"),
        ({"messages": [user("a", "file:///etc/hostname")]}, IMAGE_AT, "files are not read"),
        ({"messages": [user("a", "-")]}, IMAGE_AT, "files are not read"),
        ({"messages": [user("a", "https://example.org/a.png")]}, IMAGE_AT, "--allow-remote-images"),
        ({"messages": [user("a", "data:image/png;base64,!")]}, IMAGE_AT, "base64"),
        ({"messages": [user("a", data_url(b"%PNG"))]}, IMAGE_AT, "not an image|text"),
        ({"messages": [user("a", data_url(SHAPES[:300]))]}, IMAGE_AT, "cut off|damaged"),
        ({"messages": [user("a", *[SHAPES] * 9)]}, "messages", "at most 8"),
        ({"messages": [{**user("a", SHAPES), "role": "system"}]}, "messages[0].content", "only the user's"),
        ({"messages": [user("What is <image>?")]}, "messages[0].content", "reword"),
        ({"messages": [user("word " * 2000)]}, "messages", "context"),
        ({"messages": [user("a" * 10**6)]}, "messages", "1000000 characters"),
        ({"model": 5}, "model", "string"),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_completion_tokens": 10**6}, "max_completion_tokens", "at most 1024"),
        ({"max_tokens": 1020}, "messages", "context"),
        ({"temperature": -1}, "temperature", "greater"),
        ({"temperature": True}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"seed": 2**70}, "seed", "less than"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": [1]}, "stop[0]", "string"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "without stream"),
        ({"n": 2}, "n", "several requests"),
        ({"top_logprobs": 2}, "top_logprobs", "without logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"logprobs": 2}, "logprobs", "boolean"),
        ({"resolution": 300}, None, "256 or 320"),
        ({"resolution": 10**30}, None, "2048"),
        ({"resolution": "256"}, "resolution", "integer"),
        ({"fit": "stretch"}, "fit", "'pad'"),
        ({"presence_penalty": -0.5}, "presence_penalty", "cannot be had"),
        ({"tools": [{"type": "function"}]}, "tools", "cannot be had"),
        ({"frequency_penalty": 1}, "frequency_penalty", "cannot be had"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "no json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}},
            "response_format",
            "schema",
        ),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong_with_it(live, fields, param, words):
    response = live.http().post("/v1/chat/completions", json={"model": "demo", "messages": HELLO, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert httpx.codes.is_client_error(response.status_code) and error["type"] == "invalid_request_error"
    assert any(word.lower() in error["message"].lower() for word in words.split("|")), error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"5",
        b'"x"',
        b"\xff\xfe",
        b"[" * 50_000,
        b'{"model": "demo"}',
        b"{}\0",
        b'{"a": 1e999}',
    ],
)
def test_a_body_that_is_no_request_is_a_clients_error(live, body):
    response = live.http().post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]


def test_random_nonsense_never_is_the_servers_fault(live):
    rng = random.Random(0)
    values = [
        None,
        True,
        -1,
        0,
        1e308,
        2**80,
        "",
        "\ud800",
        "\0",
        "<image>",
        [],
        [[]],
        {},
        {"type": "text"},
        "a" * 5000,
    ]
    fields = "model messages max_tokens temperature top_p top_k seed stop stream stream_options response_format user n"
    valid = {"model": "demo", "messages": [user("Hello", SHAPES)], "max_tokens": 1}

    def spoiled(value, depth=0):
        if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.8):
            key = rng.choice([*value, *fields.split()] if depth == 0 else list(value))
            return {**value, key: spoiled(value.get(key), depth + 1)}
        if isinstance(value, list) and value and rng.random() < 0.8:
            return [spoiled(item, depth + 1) for item in value]
        return rng.choice(values)

    statuses = set()
    with live.http() as http:
        for _ in range(300):
            body = json.dumps(spoiled(valid)).encode()
            response = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
            assert response.status_code in (200, 400, 404), (body, response.text)
            statuses.add(response.status_code)
    assert {200, 400} <= statuses
    assert live.http().get("/health").status_code == 200
    live.wait_for("requests_running", 0)
