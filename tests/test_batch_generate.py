"""Batches: whatever is answered together, and whoever comes, goes or fails meanwhile, each gets what it would alone."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_fastvlm import batch_generate as module
from mlx_fastvlm import load, stream_generate
from mlx_fastvlm.answer import StageClock
from mlx_fastvlm.batch_generate import BatchGenerator
from mlx_fastvlm.errors import ImageError, OptionError
from mlx_fastvlm.generate import prefill_prompt
from mlx_fastvlm.options import GenerationOptions
from mlx_fastvlm.reuse import Reuse
from tests.conftest import GOLDEN

pytestmark = pytest.mark.filterwarnings("ignore::mlx_fastvlm.errors.FastVLMWarning")  # several images: as meant

LANDSCAPE, PORTRAIT = (GOLDEN / "images" / f"{name}.png" for name in ("landscape", "portrait"))

# (prompt, images, options): every kind of request, of many lengths
REQUESTS = [
    ("What is this?", [LANDSCAPE], {"max_tokens": 9}),
    ("What is this?", [PORTRAIT], {"max_tokens": 3}),
    ("Hello.", [], {"max_tokens": 14}),
    ("Which one is wider, <image> or <image>?", [LANDSCAPE, PORTRAIT], {"max_tokens": 5}),
    ("What is this?", [PORTRAIT], {"max_tokens": 12, "temp": 1.5, "seed": 3}),
    ("Name all that you see here, in many words, please.", [LANDSCAPE], {"max_tokens": 1}),
    ("What is this?", [LANDSCAPE], {"max_tokens": 20, "repetition_penalty": 1e6}),
    ("What is this?", [LANDSCAPE], {"max_tokens": 12, "temp": 1.0, "seed": 4, "top_p": 0.9, "top_k": 50}),
    ([{"role": "user", "content": "Hi <image>"}], [PORTRAIT], {"max_tokens": 6, "system": "Be brief."}),
    ("What is this?", [LANDSCAPE], {"max_tokens": 7}),
]


@pytest.fixture(scope="module", params=["tiny", "demo"])
def loaded(request):
    return request.getfixturevalue("tiny") if request.param == "tiny" else load("demo")


def alone(loaded, prompt, images, options):
    responses = list(stream_generate(*loaded, prompt, images, **options))
    return [r.token for r in responses], "".join(r.text for r in responses), responses[-1].finish_reason


@pytest.fixture(scope="module")
def wanted(loaded):
    """What each request gets alone."""
    return [alone(loaded, *request) for request in REQUESTS]


def add(generator, request):
    prompt, images, options = request
    return generator.add(prompt, images, options=GenerationOptions(**options))


class Answers:
    """Collects what steps return, by ticket."""

    def __init__(self):
        self.responses = {}

    def take(self, events):
        for ticket, response in events:
            assert not self.responses.get(ticket) or self.responses[ticket][-1].finish_reason is None
            self.responses.setdefault(ticket, []).append(response)

    def run(self, generator):
        """Step until nothing is left to do."""
        while generator.waiting or generator.decoding:
            self.take(generator.step())
        assert generator.step() == []
        return self

    def __getitem__(self, ticket):
        responses = self.responses[ticket]
        return [r.token for r in responses], "".join(r.text for r in responses), responses[-1].finish_reason


@pytest.mark.parametrize("max_rows", [1, 2, 3, 16])
def test_every_answer_is_what_it_would_be_alone(max_rows, loaded, wanted):
    generator, answers = BatchGenerator(*loaded, max_rows=max_rows), Answers()
    tickets = [add(generator, request) for request in REQUESTS]
    assert len(set(tickets)) == len(tickets)
    most = 0
    while generator.waiting or generator.decoding:
        answers.take(generator.step())
        most = max(most, generator.decoding)
    assert most <= max_rows
    assert [answers[ticket] for ticket in tickets] == wanted


@pytest.mark.parametrize("steps_between", [1, 2, 5])
def test_late_comers_join_what_is_being_decoded(steps_between, loaded, wanted):
    generator, answers, tickets = BatchGenerator(*loaded, max_rows=4), Answers(), []
    for request in REQUESTS:
        tickets.append(add(generator, request))
        for _ in range(steps_between):
            answers.take(generator.step())
    answers.run(generator)
    assert [answers[ticket] for ticket in tickets] == wanted


@pytest.mark.parametrize("step", range(8))
def test_a_request_can_be_taken_back_at_every_step(step, tiny):
    requests = [REQUESTS[0], REQUESTS[4], REQUESTS[2], REQUESTS[6]]
    generator, answers = BatchGenerator(*tiny, max_rows=3), Answers()
    tickets = [add(generator, request) for request in requests]
    for _ in range(step):
        answers.take(generator.step())
    generator.remove(tickets[1])
    generator.remove(tickets[1])
    heard = len(answers.responses.get(tickets[1], []))
    answers.run(generator)
    generator.remove(tickets[0])  # finished: nothing to take back
    assert len(answers.responses.get(tickets[1], [])) == heard == step
    for index in (0, 2, 3):
        assert answers[tickets[index]] == alone(tiny, *requests[index])


def test_a_first_token_is_handed_out_before_anything_else_is_decoded(tiny, monkeypatch):
    decoded = []
    decode = BatchGenerator._decode
    monkeypatch.setattr(BatchGenerator, "_decode", lambda self: decoded.append(self.decoding) or decode(self))
    generator = BatchGenerator(*tiny)
    first = add(generator, REQUESTS[0])
    assert [ticket for ticket, _ in generator.step()] == [first] and decoded == []
    assert [ticket for ticket, _ in generator.step()] == [first] and decoded == [1]
    second = add(generator, REQUESTS[2])
    assert [ticket for ticket, _ in generator.step()] == [second] and decoded == [1]
    assert [ticket for ticket, _ in generator.step()] == [first, second] and decoded == [1, 2]


def test_answers_go_on_between_beginnings_however_many_come(tiny):
    generator, answers = BatchGenerator(*tiny, max_rows=8), Answers()
    first = add(generator, REQUESTS[0])
    for _ in range(9):
        add(generator, REQUESTS[2])
        answers.take(generator.step())
    assert len(answers.responses[first]) >= 4


def test_one_that_waits_can_be_taken_back(tiny):
    generator = BatchGenerator(*tiny, max_rows=1)
    first, second = (add(generator, REQUESTS[0]) for _ in range(2))
    generator.step()
    assert (generator.decoding, generator.waiting) == (1, 1)
    generator.remove(second)
    assert (generator.decoding, generator.waiting) == (1, 0)
    assert set(Answers().run(generator).responses) == {first}


def test_stop_strings_end_one_answer_and_no_other(loaded):
    prompt, images, options = REQUESTS[0]
    options = {"max_tokens": 40}
    _, whole, _ = alone(loaded, prompt, images, options)
    requests = [
        (prompt, images, options),
        (prompt, images, options | {"stop": [whole[4:6]]}),
        (prompt, images, options),
    ]
    generator = BatchGenerator(*loaded)
    tickets = [add(generator, request) for request in requests]
    answers = Answers().run(generator)
    assert [answers[ticket] for ticket in tickets] == [alone(loaded, *request) for request in requests]
    assert answers[tickets[1]][1] == whole[: whole.index(whole[4:6])]


def test_answers_in_a_given_form_keep_it_among_others(tiny):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    requests = [
        ("What is this?", [LANDSCAPE], {"max_tokens": 40, "choices": ["a cat", "a dog"]}),
        ("What is this?", [LANDSCAPE], {"max_tokens": 8}),
        ("What is this?", [PORTRAIT], {"max_tokens": 60, "json_schema": schema, "temp": 1.0, "seed": 1}),
    ]
    generator = BatchGenerator(*tiny)
    tickets = [add(generator, request) for request in requests]
    answers = Answers().run(generator)
    assert [answers[ticket] for ticket in tickets] == [alone(tiny, *request) for request in requests]
    assert answers[tickets[0]][1] in ("a cat", "a dog")


def test_a_draw_that_fails_ends_its_own_answer_only(tiny, monkeypatch):
    generator = BatchGenerator(*tiny)
    tickets = [add(generator, REQUESTS[index]) for index in (0, 4, 2)]
    answers = Answers()
    answers.take(generator.step())
    failing = next(row for row in generator._rows if row.ticket == tickets[1])
    problem = OptionError("no token may follow")

    class FailingDraw:
        is_greedy = False

        def __call__(self, logits):
            raise problem

    monkeypatch.setattr(failing, "draw", FailingDraw())
    events = generator.step()
    assert [event for ticket, event in events if ticket == tickets[1]] == [problem]
    answers.take(event for event in events if event[0] != tickets[1])
    answers.run(generator)
    for index, ticket in ((0, tickets[0]), (2, tickets[2])):
        assert answers[ticket] == alone(tiny, *REQUESTS[index])


def test_a_prompt_prefilled_elsewhere_goes_on_in_the_batch(loaded, wanted):
    model, processor = loaded
    generator, answers, tickets = BatchGenerator(*loaded), Answers(), {}
    for index in (2, 0, 4):
        prompt, images, options = REQUESTS[index]
        options, clock = GenerationOptions(**options), StageClock()
        input_ids = processor.tokenize(prompt, len(images), options.system)
        prefilled = prefill_prompt(model, processor, input_ids, images, options, clock)
        before = prefilled.cache[0].offset
        tickets[index] = generator.add_prefilled(prefilled, options=options, clock=clock)
        answers.take(generator.step())
        assert prefilled.cache[0].offset == before
    tickets[1] = add(generator, REQUESTS[1])
    answers.run(generator)
    for index, ticket in tickets.items():
        assert answers[ticket] == wanted[index]


def test_what_earlier_answers_computed_is_reused_in_a_batch(tiny):
    prompt, images, options = REQUESTS[0]
    reuse, options = Reuse(*tiny), GenerationOptions(**options)
    list(stream_generate(*tiny, prompt, images, reuse=reuse, max_tokens=9))
    clock, generator = StageClock(), BatchGenerator(*tiny)
    with reuse.prefilled(tiny[1].tokenize(prompt, 1, None), images, options, clock) as prefilled:
        ticket = generator.add_prefilled(prefilled, options=options, clock=clock)
        answers = Answers().run(generator)
    assert answers[ticket] == alone(tiny, *REQUESTS[0])
    last = answers.responses[ticket][-1]
    assert last.cached_tokens == last.prompt_tokens - 1 and "encode" not in last.timings


def test_what_the_decoder_saw_of_an_answer_can_be_taken_out(tiny):
    model, processor = tiny
    generator, answers = BatchGenerator(*tiny), Answers()
    tickets = [add(generator, REQUESTS[index]) for index in (0, 1, 2)]
    for _ in range(3):
        answers.take(generator.step())
    assert answers[tickets[1]][2] == "length"  # finished with this step
    for ticket, (_, images, _) in zip(tickets[:2], REQUESTS, strict=False):
        caches, responses = generator.caches(ticket), answers.responses[ticket]
        assert [cache.offset for cache in caches] == [responses[0].prompt_tokens + 2] * len(caches)
        afresh = model.make_cache()
        ids = [*processor.tokenize("What is this?", 1), *(response.token for response in responses[:-1])]
        model(ids, [model.encode_images(processor.preprocess(images[0]))[0]], afresh)
        for found, cache in zip(caches, afresh, strict=True):
            np.testing.assert_allclose(found.keys, cache.keys[..., : cache.offset, :], atol=2e-4)
    generator.step()
    with pytest.raises(KeyError):
        generator.caches(tickets[1])


def test_images_that_wait_together_are_encoded_in_batches_of_limited_size(tiny, monkeypatch):
    model, _ = tiny
    sizes = []
    encode = type(model).encode_images
    monkeypatch.setattr(type(model), "encode_images", lambda self, x: sizes.append(len(x)) or encode(self, x))
    monkeypatch.setattr(module, "ENCODE_PIXELS", 3 * 256**2)
    generator = BatchGenerator(*tiny)
    for request in [REQUESTS[0]] * 3 + [REQUESTS[3]] * 2:
        add(generator, request)
    generator.step()
    assert sizes == [3, 3, 1]
    add(generator, REQUESTS[2])
    generator.step()
    assert sizes == [3, 3, 1]


def test_prompts_of_equal_length_are_prefilled_together_within_limits(tiny, monkeypatch):
    shapes = []
    prefill = module.prefill
    monkeypatch.setattr(
        module, "prefill", lambda model, x, cache: shapes.append(x.shape[:2]) or prefill(model, x, cache)
    )
    generator = BatchGenerator(*tiny)
    for index in (0, 2, 1, 4):
        add(generator, REQUESTS[index])
    generator.step()
    assert sorted(batch for batch, _ in shapes) == [1, 3]
    monkeypatch.setattr(module, "PREFILL_POSITIONS", 2 * max(length for _, length in shapes))
    generator.step()
    shapes.clear()
    for index in (0, 1, 4):
        add(generator, REQUESTS[index])
    generator.step()
    assert [batch for batch, _ in shapes] == [2, 1]


def test_newcomers_wait_for_company_if_asked_but_not_for_ever(tiny):
    generator, answers = BatchGenerator(*tiny, max_rows=4, min_group=2), Answers()
    long, late = add(generator, REQUESTS[0]), None
    answers.take(generator.step())  # nobody decodes: it begins alone
    late = add(generator, REQUESTS[1])
    answers.take(generator.step())
    assert late not in answers.responses and generator.waiting == 1
    more = add(generator, REQUESTS[2])
    answers.take(generator.step())
    assert {long, late, more} == set(answers.responses)
    answers.take(generator.step())
    hurried = add(generator, REQUESTS[1])
    answers.take(generator.step(hurry=True))
    assert hurried in answers.responses
    last = add(generator, REQUESTS[1])
    answers.run(generator)
    assert answers[last] == alone(tiny, *REQUESTS[1])


def test_numbers_tell_what_happened(tiny):
    generator = BatchGenerator(*tiny)
    with_image, words = add(generator, REQUESTS[0]), add(generator, REQUESTS[2])
    answers = Answers().run(generator)
    first, last = answers.responses[with_image][0], answers.responses[with_image][-1]
    assert list(last.timings) == ["tokenize", "decode", "resize", "wait", "encode", "prefill", "first_token"]
    assert sum(last.timings.values()) == pytest.approx(last.ttft, rel=0.01) and first.ttft == last.ttft
    assert last.generation_tokens == 9 and last.prompt_tokens > answers.responses[words][-1].prompt_tokens
    assert list(answers.responses[words][-1].timings) == ["tokenize", "wait", "prefill", "first_token"]


@pytest.mark.parametrize(
    "request_, error, text",
    [
        (("Hi", [], {"kv_bits": 8}), OptionError, "kv_bits cannot be had in a batch"),
        (("Hi", [], {"max_tokens": 10**6}), OptionError, "context"),
        (("Hi <image> <image>", [LANDSCAPE], {}), OptionError, "marks"),
        (("Hi", ["missing.png"], {}), ImageError, "missing.png"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_and_harms_no_other(request_, error, text, tiny):
    generator = BatchGenerator(*tiny)
    ticket = add(generator, REQUESTS[0])
    with pytest.raises(error, match=text):
        add(generator, request_)
    answers = Answers()
    answers.take(generator.step())
    with pytest.raises(error, match=text):
        add(generator, request_)
    assert answers.run(generator)[ticket] == alone(tiny, *REQUESTS[0])
    assert set(answers.responses) == {ticket}


@pytest.mark.parametrize("sizes", [{"max_rows": 0}, {"min_group": 0}, {"max_rows": 2, "min_group": 3}])
def test_sizes_that_make_no_sense_are_refused(sizes, tiny):
    with pytest.raises(OptionError, match="max_rows is"):
        BatchGenerator(*tiny, **sizes)


def test_an_idle_generator_holds_no_keys_and_values(tiny):
    generator = BatchGenerator(*tiny)
    add(generator, REQUESTS[0])
    generator.step()
    assert generator._cache.nbytes > 0
    Answers().run(generator)
    assert generator._cache.nbytes == 0


def test_half_precision_works_too(converted_folder):
    loaded = load(converted_folder("inference"), dtype="bfloat16")
    generator = BatchGenerator(*loaded)
    tickets = [add(generator, REQUESTS[index]) for index in (0, 2, 3)]
    answers = Answers().run(generator)
    assert [len(answers[ticket][0]) for ticket in tickets] == [9, 14, 5]
    assert loaded[0].dtype == mx.bfloat16


def test_freed_memory_is_given_back_once_it_is_much(tiny, monkeypatch):
    cleared = []
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(mx.get_cache_memory()))
    for limit, expected in ((10**12, 0), (-1, 1)):
        monkeypatch.setattr(module, "_FREED_BYTES", limit)
        generator = BatchGenerator(*tiny)
        add(generator, REQUESTS[0])
        Answers().run(generator)
        assert len(cleared) == expected


def test_an_answer_prefilled_elsewhere_must_fit_too(tiny):
    options, clock = GenerationOptions(max_tokens=5), StageClock()
    prefilled = prefill_prompt(*tiny, tiny[1].tokenize("Hi"), [], options, clock)
    with pytest.raises(OptionError, match="context"):
        BatchGenerator(*tiny).add_prefilled(prefilled, options=GenerationOptions(max_tokens=10**6), clock=clock)
