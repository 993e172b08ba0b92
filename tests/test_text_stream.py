"""Streaming: pieces are whole characters, join to the whole answer, and end before a stop string."""

import pytest

TEXTS = [
    "A large red circle.",
    "naïve café — 日本語のテキスト",
    "emoji 👩‍👩‍👧 and 🎉🎉 done",
    "  leading and   inner spaces\n\nnew lines\t",
    "",
]


def stream(processor, ids, stop=()):
    text_stream = processor.text_stream(stop)
    pieces = [text_stream.add(token) for token in ids]
    return [*pieces, text_stream.finish()], text_stream


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_never_split_a_character(tiny, text):
    _, processor = tiny
    ids = processor.tokenizer.encode(text).ids
    pieces, _ = stream(processor, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_answer_cut_inside_a_character_shows_what_decoding_shows(tiny):
    _, processor = tiny
    ids = processor.tokenizer.encode("ab🎉").ids[:-1]
    pieces, _ = stream(processor, ids)
    assert "".join(pieces) == processor.decode(ids)


@pytest.mark.parametrize(
    "stop, kept",
    [
        (["circle"], "A large red "),
        (["red", "large"], "A "),
        (["xyz"], "A large red circle."),
        ([""], "A large red circle."),
        (["circle?"], "A large red circle."),
    ],
)
def test_text_ends_before_the_first_stop_string(tiny, stop, kept):
    _, processor = tiny
    pieces, text_stream = stream(processor, processor.tokenizer.encode("A large red circle.").ids, stop)
    assert "".join(pieces) == kept
    assert text_stream.stopped == (kept != "A large red circle.")


def test_a_possible_beginning_of_a_stop_string_is_held_back(tiny):
    _, processor = tiny
    text_stream = processor.text_stream(["###END"])
    shown = "".join(text_stream.add(token) for token in processor.tokenizer.encode("ok ###").ids)
    assert shown == "ok "
    assert text_stream.finish() == "###"
