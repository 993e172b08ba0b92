"""Conversations: every question is asked with what was said before, saved and branched ones go on where they were."""

import itertools
import json
import warnings
from contextlib import closing

import numpy as np
import pytest

from mlx_fastvlm import Conversation, Reuse, conversation_file, generate, load
from mlx_fastvlm.conversation_file import Turn
from mlx_fastvlm.errors import ConversationError, ImageError, OptionError
from tests.conftest import GOLDEN

PICTURE = GOLDEN / "images" / "landscape.png"
OTHER = GOLDEN / "images" / "portrait.png"


@pytest.fixture(autouse=True)
def _no_notice():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FastVLM was trained on one image")
        yield


@pytest.fixture(scope="module")
def demo():
    """(model, processor) whose words are words: what is said survives being tokenized again."""
    return load("demo")


def start(demo, image=PICTURE, **options):
    return Conversation(*demo, image, **({"max_tokens": 12} | options))


def from_scratch(demo, turns, question, images, **options):
    """The answer to `question` after `turns`, with nothing reused; images all come with the first question."""
    said = [
        message
        for asked, answer in turns
        for message in ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})
    ]
    said.append({"role": "user", "content": question})
    return generate(*demo, said, images, **({"max_tokens": 12} | options))


def test_every_turn_equals_a_start_from_scratch(demo):
    chat = start(demo)
    said = []
    for question in ("Describe this image.", "How many shapes are there?", "What color is the circle?"):
        answer = chat.ask(question)
        assert answer == from_scratch(demo, said, question, [PICTURE])
        said.append((question, answer))
    assert [(turn.question, turn.answer) for turn in chat.turns] == said


def test_later_questions_encode_nothing_and_know_all_that_was_said(demo):
    chat = start(demo)
    first = list(chat.stream("Describe this image."))[-1]
    last = list(chat.stream("How many shapes are there?"))[-1]
    assert "encode" not in last.timings
    assert last.cached_tokens == first.prompt_tokens + first.generation_tokens - 1  # the decoder has not seen the last


def test_images_may_come_at_any_turn_and_anywhere_in_a_question(demo):
    chat = start(demo)
    first = chat.ask("Describe this image.")
    second = chat.ask("Is <image> the same?", OTHER)
    whole = [
        {"role": "user", "content": "<image>\nDescribe this image."},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Is <image> the same?"},
    ]
    assert second == generate(*demo, whole, [PICTURE, OTHER], max_tokens=12)
    assert [len(turn.images) for turn in chat.turns] == [1, 1]
    chat.show([PICTURE, OTHER])
    third = chat.ask("And these?")
    whole += [{"role": "assistant", "content": second}, {"role": "user", "content": "<image>\n<image>\nAnd these?"}]
    assert third == generate(*demo, whole, [PICTURE, OTHER, PICTURE, OTHER], max_tokens=12)
    assert len(chat.images) == 4


def test_what_is_known_can_be_prepared(demo):
    chat = start(demo)
    assert "encode" in chat.prepare().seconds
    known = chat.context_tokens
    last = list(chat.stream("Describe this image."))[-1]
    assert "encode" not in last.timings
    assert last.cached_tokens >= known - 6  # the end of the question and the frame of the answer come after the words
    chat.show(OTHER)
    assert "encode" in chat.prepare().seconds
    assert "encode" not in list(chat.stream("And this?"))[-1].timings


def test_the_system_line_may_change_between_questions(demo):
    chat = start(demo, system="Be brief.")
    chat.ask("Describe this image.")
    chat.system = "Be long."
    answer = chat.ask("How many shapes are there?")
    said = [(chat.turns[0].question, chat.turns[0].answer)]
    assert answer == from_scratch(demo, said, "How many shapes are there?", [PICTURE], system="Be long.")


def test_a_branch_goes_its_own_way(demo):
    chat = start(demo)
    for question in ("Describe this image.", "How many shapes are there?"):
        chat.ask(question)
    before = list(chat.turns)
    branch = chat.branch(1)
    answer = branch.ask("What color is the circle?")
    said = [(before[0].question, before[0].answer)]
    assert answer == from_scratch(demo, said, "What color is the circle?", [PICTURE])
    assert chat.turns == before
    assert len(branch.turns) == 2
    assert len(chat.branch().turns) == 2 and len(chat.branch(0).turns) == 0
    for impossible in (-1, 3):
        with pytest.raises(OptionError, match="turns"):
            chat.branch(impossible)


def test_retry_takes_the_last_answers_place(demo):
    chat = start(demo)
    with pytest.raises(OptionError, match="no question"):
        next(chat.retry())
    chat.ask("Describe this image.")
    first = chat.ask("How many shapes are there?", OTHER)
    again = "".join(response.text for response in chat.retry())
    assert again == first
    assert [len(turn.images) for turn in chat.turns] == [1, 1]
    other = "".join(response.text for response in chat.retry(temp=3.0, seed=3))
    assert other != first
    assert chat.turns[-1].answer == other and len(chat.turns) == 2


def test_images_shown_for_the_next_question_wait_for_it(demo):
    chat = start(demo)
    with closing(chat.stream("Describe this image.")) as responses:
        next(responses)
        chat.show(OTHER)
    assert [image.name for image in chat.images] == [str(PICTURE), str(OTHER)]
    with closing(chat.retry()) as responses:
        next(responses)
        chat.show(PICTURE)
    assert [len(turn.images) for turn in chat.turns] == [1]
    assert [image.name for image in chat.images] == [str(PICTURE), str(OTHER), str(PICTURE)]


def test_a_branch_goes_on_as_this_one_would(demo):
    chat = start(demo, system="Be brief.", context="slide", max_tokens=3)
    branch = chat.branch()
    assert branch.images == chat.images and branch.turns == [] and branch.reuse is chat.reuse
    assert branch.context == "slide"
    assert branch.ask("Describe this image.") == chat.ask("Describe this image.")
    assert branch.turns is not chat.turns
    assert repr(branch) == "<Conversation: 1 turns, 1 images>"


def test_another_models_memory_is_refused(demo):
    with pytest.raises(OptionError, match="another model"):
        Conversation(*demo, reuse=Reuse(*load("demo")))


def test_a_retry_that_is_refused_loses_nothing(demo):
    chat = start(demo)
    chat.ask("Describe this image.")
    before = list(chat.turns)
    with pytest.raises(OptionError):
        next(chat.retry(max_tokens=10**6))
    assert chat.turns == before


def test_an_answer_given_up_is_kept_as_far_as_it_went(demo):
    chat = start(demo, max_tokens=30)
    responses = chat.stream("Describe this image.")
    heard = "".join(response.text for response in itertools.islice(responses, 5))
    responses.close()
    assert [turn.answer for turn in chat.turns] == [heard]
    answer = chat.ask("How many shapes are there?")
    said = [("Describe this image.", heard)]
    assert answer == from_scratch(demo, said, "How many shapes are there?", [PICTURE], max_tokens=30)


def test_a_question_that_is_refused_is_not_recorded(demo):
    chat = start(demo)
    for question, image, options, error in [
        ("two <image> <image>", None, {}, OptionError),
        ("What?", "missing.png", {}, ImageError),
        ("What?", None, {"max_tokens": 10**6}, OptionError),
        ("What?", None, {"temp": -1}, OptionError),
    ]:
        with pytest.raises(error):
            chat.ask(question, image, **options)
        assert chat.turns == []
        assert len(chat.images) == 1
    with pytest.raises(ImageError):
        chat.show([OTHER, "missing.png"])
    assert len(chat.images) == 1
    assert chat.ask("Describe this image.") == from_scratch(demo, [], "Describe this image.", [PICTURE])


def test_what_a_model_calls_an_image_is_none(demo):
    chat = start(demo)
    chat.turns.append(Turn("What do you see?", "an <image> of an <image>", ()))
    chat._shown.clear()
    assert chat.ask("Describe this image.")


class TestFullContext:
    def full(self, demo, **options):
        """A conversation with little room left for another turn."""
        chat = start(demo, **options)
        while chat.context_tokens + 150 < chat.context_limit:
            chat.turns.append(Turn("Describe this image.", "Three shapes: " + "a large green triangle, " * 8, ()))
            if len(chat.turns) == 1:
                chat.turns[0] = Turn("Describe this image.", "One shape.", tuple(chat._shown))
                chat._shown.clear()
        return chat

    def test_an_error_says_what_to_do(self, demo):
        chat = self.full(demo, max_tokens=150)
        turns = len(chat.turns)
        with pytest.raises(OptionError, match="context holds 1024"):
            chat.ask("Describe this image.")
        assert len(chat.turns) == turns

    def test_sliding_leaves_the_oldest_turns_out_and_keeps_their_images(self, demo):
        chat = self.full(demo, max_tokens=150, context="slide")
        turns = list(chat.turns)
        last = list(chat.stream("Describe this image."))[-1]
        assert last.prompt_tokens + 150 <= chat.context_limit
        assert "encode" not in list(chat.stream("Describe this image."))[-1].timings
        assert chat.turns[: len(turns)] == turns
        told = chat._told([*chat.turns, Turn("Hello")], chat._chosen({}))
        assert len(told) < len(chat.turns)
        assert [len(turn.images) for turn in told] == [1] + [0] * (len(told) - 1)
        assert told[0].question == "<image>\nDescribe this image."

    def test_the_window_moves_rarely_and_is_found_fast(self, demo, monkeypatch):
        chat = self.full(demo, max_tokens=150, context="slide")
        tokenize, calls = chat.processor.tokenize, []
        monkeypatch.setattr(chat.processor, "tokenize", lambda *given: calls.append(1) or tokenize(*given))
        left_out = []
        for _ in range(40):
            chat.turns.append(Turn("And this?", "One shape.", ()))
            told = chat._told([*chat.turns, Turn("Hello")], chat._chosen({}))
            assert chat._positions(told, chat._chosen({})) + 150 <= chat.context_limit
            assert len(told) > 2
            left_out.append(len(chat.turns) + 1 - len(told))
        assert left_out == sorted(left_out) and left_out[-1] > left_out[0] > 0
        assert len(set(left_out)) <= 6
        assert len(calls) < 40 * 12

    def test_turns_are_told_even_if_images_take_most_of_the_context(self, demo):
        chat = start(demo, max_tokens=100, context="slide")
        rows = demo[0].config.vision_config.num_image_tokens
        chat.turns.append(Turn("These?", "Yes.", chat.images * (800 // rows)))
        chat.turns += [Turn("And this?", "One shape.")] * 12
        told = chat._told([*chat.turns, Turn("Hello")], chat._chosen({}))
        assert 1 < len(told) < len(chat.turns)

    def test_a_question_alone_that_is_too_long_is_refused_all_the_same(self, demo):
        chat = self.full(demo, max_tokens=150, context="slide")
        with pytest.raises(OptionError, match="context"):
            chat.ask("word " * 2000)


class TestFiles:
    def test_a_saved_conversation_goes_on(self, demo, tmp_path):
        chat = start(demo, system="Be brief.")
        chat.ask("Describe this image.")
        chat.ask("And <image>?", np.full((5, 7, 3), 200, np.uint8))
        chat.show(OTHER)
        chat.save(tmp_path / "chat.json")
        loaded = Conversation.load(*demo, tmp_path / "chat.json", max_tokens=12)
        assert loaded.turns == chat.turns and loaded.images == chat.images and loaded.system == "Be brief."
        assert loaded.ask("Are they alike?") == chat.ask("Are they alike?")
        loaded.save(tmp_path / "again.json")
        chat.save(tmp_path / "chat.json")
        assert (tmp_path / "again.json").read_bytes() == (tmp_path / "chat.json").read_bytes()

    @pytest.mark.parametrize(
        "content, message",
        [
            ("", "not a saved conversation"),
            ("\u00e9\u0000 words", "not a saved conversation"),
            ("[]", "not a saved conversation"),
            ("{}", "not a saved conversation"),
            ('{"format": "mlx-fastvlm conversation", "version": 99}', "version 99"),
            ('{"format": "mlx-fastvlm conversation", "version": 1, "system": null, "shown": []}', "damaged"),
            ("[" * 100_000, "not a saved conversation"),
        ],
    )
    def test_other_files_are_refused(self, content, message, demo, tmp_path):
        (tmp_path / "chat.json").write_text(content)
        with pytest.raises(ConversationError, match=message):
            Conversation.load(*demo, tmp_path / "chat.json")

    def test_damaged_turns_are_refused(self, demo, tmp_path):
        chat = start(demo)
        chat.ask("Describe this image.")
        chat.save(tmp_path / "chat.json")
        whole = json.loads((tmp_path / "chat.json").read_text())
        for damage in (
            lambda turn: turn.pop("answer"),
            lambda turn: turn.update(question=3),
            lambda turn: turn.update(images=[{"name": "a", "base64": "!"}]),
            lambda turn: turn.update(images=[{"name": "a", "is_file": True, "base64": "é"}]),
            lambda turn: turn.update(images=[{"name": "a", "is_file": True, "base64": ""}]),
            lambda turn: turn.update(images="no"),
        ):
            content = json.loads(json.dumps(whole))
            damage(content["turns"][0])
            (tmp_path / "damaged.json").write_text(json.dumps(content))
            with pytest.raises(ConversationError, match="damaged"):
                Conversation.load(*demo, tmp_path / "damaged.json")

    def test_files_that_cannot_be_reached_are_one_clear_line(self, demo, tmp_path):
        with pytest.raises(ConversationError, match="no file"):
            Conversation.load(*demo, tmp_path / "none.json")
        with pytest.raises(ConversationError, match="no file"):
            Conversation.load(*demo, "~nobody-of-this-name/chat.json")
        with pytest.raises(ConversationError, match="cannot be written"):
            start(demo).save(tmp_path / "none" / "chat.json")

    def test_what_could_not_be_read_again_is_not_written(self, demo, tmp_path, monkeypatch):
        monkeypatch.setattr(conversation_file, "MAX_FILE_BYTES", 1000)
        with pytest.raises(ConversationError, match="branch"):
            start(demo).save(tmp_path / "chat.json")
        assert not (tmp_path / "chat.json").exists()


def test_wrong_settings_are_refused_at_once(demo):
    for options in ({"temp": -1}, {"context": "forget"}):
        with pytest.raises(OptionError):
            start(demo, **options)
    with pytest.raises(TypeError, match="tempo"):
        start(demo, tempo=1)
    with pytest.raises(ImageError):
        start(demo, "missing.png")
