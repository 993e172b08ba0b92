"""Answers in a given form: whatever the model's habits, the answer is whole and of that form within its tokens.

The judge of schemas is the jsonschema package, which knows nothing of how answers are made.
"""

import gc
import itertools
import json
import random
import subprocess
import sys
import weakref
from pathlib import Path

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from mlx_fastvlm import generate, load, stream_generate
from mlx_fastvlm.constraint import make_constraint, read_json_schema
from mlx_fastvlm.constraint.json_schema import ending_bound, narrow
from mlx_fastvlm.constraint.token_table import token_table
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.processor import Processor
from tests.reference.qwen_tokenizer import SKIP_REASON, qwen_tokenizer_json

EXAMPLES = Path(__file__).parent.parent / "examples"

LEAF = {"type": "object", "properties": {"lit": {"type": "integer"}}, "required": ["lit"]}
SUM = {"type": "object", "properties": {"add": {"$ref": "#/$defs/sums"}}, "required": ["add"]}
SCHEMAS = {
    "any object": True,
    "scene": {
        "type": "object",
        "properties": {
            "color": {"enum": ["red", "green", "dark blue"]},
            "count": {"type": "integer"},
            "text": {"type": "string"},
        },
        "required": ["color", "count", "text"],
    },
    "open": {
        "type": "object",
        "properties": {"a": {"type": "string"}},
        "required": ["a"],
        "additionalProperties": True,
    },
    "optional": {
        "type": "object",
        "properties": {"a": {"type": "string"}, "b": {"type": "array", "items": {"type": "number"}}, "c": {}},
    },
    "tree": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                },
                "required": ["name", "children"],
            }
        },
        "$ref": "#/$defs/node",
    },
    # A greedy way out of the recursion never ends: "add" comes before "lit" in the alphabet and in the schema.
    "sums": {
        "$defs": {
            "sum": {"anyOf": [SUM, LEAF]},
            "sums": {"type": "array", "items": {"$ref": "#/$defs/sum"}, "minItems": 2, "maxItems": 2},
        },
        "$ref": "#/$defs/sum",
    },
    "items": {"type": "array", "items": {"type": "string"}, "minItems": 3, "maxItems": 30},
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 4},
    "patterns": {
        "type": "object",
        "properties": {
            "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
            "anywhere": {"type": "string", "pattern": "[0-9]{3}"},
            "inside": {"type": "string", "pattern": "^x.*foo$"},
        },
        "required": ["code", "anywhere", "inside"],
    },
    # The first byte of an answer decides between 1 token and dozens.
    "null or much": {
        "anyOf": [
            {"type": "null"},
            {
                "type": "object",
                "properties": {key: {"type": "string", "minLength": 5} for key in ("alpha", "beta", "gamma", "delta")},
                "required": ["alpha", "beta", "gamma", "delta"],
            },
        ]
    },
    "numbers": {
        "type": "object",
        "properties": {
            "share": {"type": "number", "minimum": 0, "maximum": 1},
            "large": {"type": "integer", "exclusiveMinimum": 1000},
            "free": {"type": "number"},
            "weeks": {"type": "integer", "multipleOf": 7},
        },
        "required": ["share", "large", "free", "weeks"],
    },
    "formats": {
        "type": "object",
        "properties": {name: {"type": "string", "format": name} for name in ("email", "uri", "date")},
        "required": ["email", "uri", "date"],
    },
    "types": {"type": ["string", "number", "null", "object"], "maxLength": 5},
    "constant": {"const": {"a": [1, 2, "é☃"]}},
    "tuple": {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False, "minItems": 2},
    "other scripts": {
        "type": "object",
        # The last key is not in normal form C, into which the tokenizer would turn what it reads.
        "properties": {"naïve 名前": {"enum": ["é", "日本語", '"\\\n']}, "e\u0301": {"type": "boolean"}},
        "required": ["naïve 名前", "e\u0301"],
    },
    "lengths": {
        "type": "object",
        "properties": {"s": {"type": "string", "minLength": 10, "maxLength": 20}},
        "required": ["s"],
    },
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
            {"properties": {"b": {"type": "integer"}}, "required": ["b"]},
        ]
    },
    "one of": {"oneOf": [{"type": "integer"}, {"type": "string"}]},
}

# What a model may favor against all reason, by the text of a token. None ends its answer by itself.
HABITS = {
    "none": lambda text: False,
    "talk": lambda text: text.strip().isalpha(),
    "digits": str.isdigit,
    "brackets": lambda text: any(bracket in text for bracket in "[{"),
    "commas": lambda text: "," in text,
    "spaces": str.isspace,
    "escapes": lambda text: "\\" in text,
    "half characters": lambda text: "\ufffd" in text,
}


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture(scope="module")
def processor(demo):
    return demo[1]


@pytest.fixture(scope="module")
def qwen():
    path = qwen_tokenizer_json()
    if path is None:
        pytest.skip(SKIP_REASON)
    return Processor(Tokenizer.from_file(str(path)), None, frozenset({151643, 151645}))


def width(processor, spare: int = 7) -> int:
    """As many logits as a model gives: more than there are tokens."""
    return processor.tokenizer.get_vocab_size() + spare


def favored(processor, habit: str) -> np.ndarray:
    """(vocab,) what a habit adds to logits."""
    tokens = processor.tokenizer.get_vocab_size()
    texts = [processor.tokenizer.decode([token]) for token in range(tokens)]
    bias = np.zeros(width(processor), np.float32)
    bias[:tokens] = [30 * bool(text and HABITS[habit](text)) for text in texts]
    bias[list(processor.eos_token_ids)] = -60
    return bias


def answer(processor, constraint, next_logits, max_tokens: int) -> tuple[str, bool]:
    """What a model with these logits says, and whether it came to its end."""
    stream = processor.text_stream()
    text = ""
    for _ in range(max_tokens):
        restricted = constraint.restrict(mx.array(next_logits()[None]))
        token = mx.argmax(restricted, axis=-1).item()
        assert restricted[0, token].item() > -np.inf
        if token in processor.eos_token_ids:
            return text + stream.finish(), True
        text += stream.add(token)
        constraint.accept(token)
    return text + stream.finish(), False


def fewest_tokens(processor, **form) -> int:
    """The least max_tokens that is taken for a form."""
    with pytest.raises(OptionError, match=r"takes about \d+\. Raise max_tokens") as caught:
        make_constraint(processor, **form, max_tokens=1)
    return int(str(caught.value).rpartition("about ")[2].partition(".")[0])


def check_validity(processor, schema, habits, budgets):
    """Answers of random models with these habits are valid, given one after the other of the budgets: tokens to spare."""
    fewest = fewest_tokens(processor, json_schema=schema)
    draw = np.random.default_rng(0)
    for habit, more in zip(habits, itertools.cycle(budgets), strict=False):
        bias = favored(processor, habit)
        constraint = make_constraint(processor, json_schema=schema, max_tokens=fewest + more)
        text, ended = answer(
            processor,
            constraint,
            lambda bias=bias: bias + 4 * draw.normal(size=bias.size).astype(np.float32),
            fewest + more,
        )
        assert ended, (habit, more, text)
        jsonschema.validate(json.loads(text), {"type": "object"} if schema is True else schema)


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_are_whole_and_valid_whatever_the_habits_and_the_budget(processor, name):
    check_validity(processor, SCHEMAS[name], HABITS, (0, 30, 3))


def random_schema(draw: random.Random, depth: int = 0) -> dict:
    """A schema of what the grammar library knows, three levels deep at most."""
    leaves = [
        {"type": "string", "maxLength": draw.randrange(9)},
        {"type": "string", "minLength": draw.randrange(9)},
        {
            "type": "string",
            "pattern": draw.choice(["^[a-z]+$", "^a{3,5}b?$", "foo|ba[rz]", "^(x|yy)*z$", r"\.(png|jpg)$"]),
        },
        {"type": "string", "format": draw.choice(["time", "date-time", "uuid", "hostname", "duration", "ipv6"])},
        {"type": "integer", draw.choice(["minimum", "exclusiveMaximum"]): draw.choice([-7, 0, 10**6])},
        {"type": "number", "minimum": draw.choice([-0.5, 0.001]), "maximum": 2},
        {"type": draw.sample(["string", "integer", "null", "boolean", "array", "object"], 2)},
        {"enum": draw.sample(["red", "reddish", 'q"\\', "é", "", 1, 2.5, None, True, [1, {"a": 2}]], 3)},
        {"$ref": "#/$defs/chain"},
        {},
    ]
    if depth == 2 or draw.random() < 0.3:
        return draw.choice(leaves)

    def parts(count: int) -> list[dict]:
        return [random_schema(draw, depth + 1) for _ in range(count)]

    names = draw.sample(["a", "ab", "long_name", "é", 'q"t'], draw.randrange(1, 4))
    items = draw.randrange(3)
    return draw.choice(
        [
            {
                "type": "object",
                "properties": dict(zip(names, parts(len(names)), strict=True)),
                "required": draw.sample(names, draw.randrange(len(names) + 1)),
                **draw.choice([{}, {"additionalProperties": True}]),
            },
            {"type": "object", "additionalProperties": parts(1)[0], "minProperties": 1, "maxProperties": 2},
            {"type": "array", "items": parts(1)[0], "minItems": items, "maxItems": items + 1},
            {"type": "array", "prefixItems": parts(2), "minItems": 1},
            {"anyOf": parts(2)},
        ]
    )


CHAIN = {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/chain"}, "minItems": 1}]}


@pytest.mark.parametrize("seed", range(25))
def test_so_they_are_for_random_schemas(processor, seed):
    schema = random_schema(random.Random(seed)) | {"$defs": {"chain": CHAIN}}
    check_validity(processor, schema, random.Random(seed).sample(list(HABITS), 3), (20, 1))


@pytest.mark.parametrize("name", ["any object", "scene", "sums", "patterns", "other scripts"])
def test_so_they_are_with_the_true_vocabulary(qwen, name):
    check_validity(qwen, SCHEMAS[name], ("none", "talk", "brackets"), (0, 5, 30))


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (True, '{"a b":[1,-2.5e3,null,{"c":{}}],"é\\n":"日本","x":true}'),
        (SCHEMAS["scene"], '{"color":"dark blue","count":-12,"text":"a \\"wide\\" road, and [more]"}'),
        (SCHEMAS["tree"], '{"name":"a","children":[{"name":"b","children":[]},{"name":"","children":[]}]}'),
        (SCHEMAS["patterns"], '{"code":"AB-1234","anywhere":"room 101!","inside":"x to foo"}'),
        (SCHEMAS["open"], '{"a":"b","more":[1,2]}'),
        ({"type": "null", "$defs": {"unused": {"properties": {"a": 1}, "required": 3, "type": 4}}}, "null"),
    ],
)
@pytest.mark.parametrize("spare", [0, 300])
def test_a_model_that_knows_the_form_is_left_alone(processor, schema, text, spare):
    tokens = iter(processor.tokenizer.encode(text).ids)
    needed = len(processor.tokenizer.encode(text).ids) + 1
    constraint = make_constraint(processor, json_schema=schema, max_tokens=needed + spare)
    assert answer(processor, constraint, lambda: wish(processor, next(tokens, None)), needed + spare) == (text, True)


def wish(processor, token: int | None) -> np.ndarray:
    """(vocab,) logits of a model that is sure of its next token, None for an end."""
    logits = np.zeros(width(processor), np.float32)
    logits[min(processor.eos_token_ids) if token is None else token] = 20
    return logits


CHOICES = ["red", "red car", "green", "grün", 'It\'s "blue"\\\n', "日本"]


@pytest.mark.parametrize("habit", HABITS)
def test_the_answer_is_one_of_the_choices(processor, habit):
    bias = favored(processor, habit)
    draw = np.random.default_rng(1)
    for max_tokens in (fewest_tokens(processor, choices=CHOICES), 5, 50):
        constraint = make_constraint(processor, choices=CHOICES, max_tokens=max_tokens)
        text, ended = answer(processor, constraint, lambda: bias + 4 * draw.normal(size=bias.size), max_tokens)
        assert ended
        assert text in CHOICES


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_can_be_chosen(processor, choice):
    tokens = iter(processor.tokenizer.encode(choice).ids)
    constraint = make_constraint(processor, choices=CHOICES, max_tokens=30)
    assert answer(processor, constraint, lambda: wish(processor, next(tokens, None)), 30) == (choice, True)


def test_an_end_is_allowed_where_the_answer_may_end_and_nothing_else_once_it_must(processor):
    constraint = make_constraint(processor, choices=["a", "ab"], max_tokens=20)
    flat = mx.zeros((1, width(processor)))

    def allowed() -> set[int]:
        return set(np.flatnonzero(np.isfinite(np.array(constraint.restrict(flat))[0])).tolist())

    a, b, ab = (processor.tokenizer.token_to_id(text) for text in ("a", "b", "ab"))
    assert allowed() == {a, ab} - {None}
    constraint.accept(a)
    assert allowed() == {b, *processor.eos_token_ids}
    constraint.accept(b)
    assert allowed() == set(processor.eos_token_ids)


def test_marks_and_ids_without_a_token_never_follow(processor):
    size = processor.tokenizer.get_vocab_size()
    marks = {*range(size, width(processor)), *processor.tokenizer.get_added_tokens_decoder()} - processor.eos_token_ids
    assert marks
    for form in ({"json_schema": {"type": "string"}}, {"choices": ["<|im_start|>"]}):
        constraint = make_constraint(processor, **form, max_tokens=30)
        for token in processor.tokenizer.encode('"<' if "json_schema" in form else "<", add_special_tokens=False).ids:
            assert not np.isfinite(
                np.array(constraint.restrict(mx.zeros((1, width(processor)))))[0, sorted(marks)]
            ).any()
            constraint.accept(token)


def test_logits_keep_their_values_and_type(processor):
    constraint = make_constraint(processor, choices=["a", "b"], max_tokens=5)
    logits = mx.arange(width(processor))[None].astype(mx.bfloat16)
    restricted = constraint.restrict(logits)
    assert restricted.dtype == mx.bfloat16
    kept = mx.isfinite(restricted.astype(mx.float32))
    assert kept.sum().item() == 2
    assert mx.array_equal(mx.where(kept, restricted, 0), mx.where(kept, logits, 0))


def test_there_is_no_whitespace_between_the_parts(processor):
    constraint = make_constraint(processor, json_schema=True, max_tokens=100)
    text, _ = answer(processor, constraint, lambda: favored(processor, "spaces"), 100)
    assert json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False) == text


def test_no_form_is_no_constraint(processor):
    assert make_constraint(processor, max_tokens=1) is None
    assert make_constraint(processor, json_schema=False, max_tokens=1) is None


def test_a_schema_may_be_text(processor):
    schema = json.dumps({"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]})
    constraint = make_constraint(processor, json_schema=schema, max_tokens=20)
    assert answer(processor, constraint, lambda: favored(processor, "talk"), 20)[0] == '{"a":1}'


def nested(levels: int) -> dict:
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
DOUBLING = {
    "$ref": "#/$defs/d0",
    "$defs": {
        f"d{n}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{n + 1}"}] * 2, "minItems": 2} for n in range(30)
    }
    | {"d30": {"type": "null"}},
}
CIRCLE: dict = {}
CIRCLE["properties"] = {"a": CIRCLE}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{bad", "is not JSON"),
        ("[1]", r"is \[1\]; expected an object"),
        ("false", "is false; expected an object"),
        ({"a": float("nan")}, "is not JSON"),
        ('{"const": NaN}', "NaN is no JSON number"),
        ({"a": {1}}, "is not JSON"),
        (CIRCLE, "is not JSON"),
        ("[" * 50_000, "is not JSON"),
        (" " * 70_000, "more than 64 KB"),
        (nested(80), "more than 64 levels deep"),
        ({"type": "objct"}, "Invalid type: objct"),
        ({"not": {}}, r'Unimplemented keys: \["not"\]'),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "not"),
        ({"$ref": "#/nope"}, "Pointer '/nope' does not exist"),
        ({"$ref": "http://example.com/x.json"}, "example.com"),
        ({"type": "string", "pattern": "(?=a)b"}, r"regex parse error: \(\?=a\)b error: look-around"),
        ({"type": "string", "format": "nonsense"}, "Unknown format: nonsense"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ({"enum": []}, "Unsatisfiable"),
        ({"enum": 3}, "enum must be an array"),
        ({"anyOf": 3}, "anyOf must be an array"),
        ({"$ref": 3}, r"\$ref must be a string"),
        ({"type": "string", "minLength": "x"}, "minLength"),
        ({"type": "integer", "minimum": "x"}, "minimum"),
        ({"type": "object", "properties": {"a": {}}, "required": [["x"]]}, "required"),
        ({"type": "object", "minProperties": 3}, "minProperties is 3"),
        ({"multipleOf": 123457}, "multipleOf is 123457"),
        (ENDLESS, "no answer was found"),
        (DOUBLING, "no answer was found"),
        ({"type": "string", "minLength": 10**8}, "no answer was found"),
        ({"type": "string", "minLength": 500}, r"in 400 tokens: the shortest answer takes about \d+"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_one_clear_line(processor, schema, message):
    with pytest.raises(OptionError, match=message) as caught:
        make_constraint(processor, json_schema=schema, max_tokens=400)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([], "choices is empty"),
        ("abc", "expected a list"),
        ({"a": 1}, "expected a list"),
        (["a", 3], "expected a list"),
        (["a", ""], "is empty"),
        (["a", "b", "a"], "'a' is given twice"),
        (["\ud800"], "Unicode"),
        (["x" * 300_000], "more than 256 KB"),
        (["x" * 500], "in 400 tokens: the shortest answer takes about 501"),
    ],
)
def test_choices_that_are_none_are_refused(processor, choices, message):
    with pytest.raises(OptionError, match=message):
        make_constraint(processor, choices=choices, max_tokens=400)


def test_a_schema_and_choices_are_refused_together(processor):
    with pytest.raises(OptionError, match="one of them"):
        make_constraint(processor, json_schema=True, choices=["a"], max_tokens=400)


def small_processor(letters: str) -> Processor:
    """A processor with a token for each letter, and an end."""
    vocabulary = {letter: number for number, letter in enumerate([*letters, "<|im_end|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>"])
    return Processor(tokenizer, None, frozenset({vocabulary["<|im_end|>"]}))


def test_choices_must_be_in_the_vocabularys_letters():
    processor = small_processor("abc")
    constraint = make_constraint(processor, choices=["ab", "cab"], max_tokens=5)
    assert answer(processor, constraint, lambda: np.array([0, 0, 1, 0, 0], np.float32), 5) == ("cab", True)
    with pytest.raises(OptionError, match="no tokens for the choice 'dab'"):
        make_constraint(processor, choices=["ab", "dab"], max_tokens=5)
    with pytest.raises(OptionError, match="cannot be followed"):
        make_constraint(processor, json_schema=True, max_tokens=5)


def test_a_tokenizer_of_another_kind_is_refused():
    words = Tokenizer(models.WordLevel(vocab={"red": 0, "<end>": 1}, unk_token="<end>"))
    with pytest.raises(OptionError, match="byte-level"):
        make_constraint(Processor(words, None, frozenset({1})), choices=["red"], max_tokens=5)


def test_the_table_of_tokens_is_made_once_and_goes_with_its_processor():
    processor = small_processor("ab")
    assert token_table(processor) is token_table(processor)
    gone = weakref.ref(token_table(processor))
    del processor
    gc.collect()
    assert gone() is None


def test_the_library_is_loaded_only_for_answers_in_a_form():
    code = "import sys, mlx_fastvlm.constraint; sys.exit('llguidance' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_properties_that_are_listed_are_all_there_are_unless_the_schema_says_so():
    def closed(schema: dict) -> dict:
        narrow(schema)
        return schema

    listed = {"properties": {"a": {"properties": {"b": {}}}}}
    assert closed(listed) == {
        "properties": {"a": {"properties": {"b": {}}, "additionalProperties": False}},
        "additionalProperties": False,
    }
    said = {"properties": {"a": {}}, "additionalProperties": {"type": "string"}}
    assert closed(json.loads(json.dumps(said))) == said
    elsewhere = {"properties": {"a": {}}, "anyOf": [{"required": ["b"]}, {"properties": {"c": {}}}]}
    assert closed(json.loads(json.dumps(elsewhere))) == elsewhere
    unlisted = {"properties": {"a": {}}, "required": ["b"]}
    assert closed(json.loads(json.dumps(unlisted))) == unlisted


@pytest.mark.parametrize(
    ("schema", "limits"),
    [
        ({"type": "integer"}, {"minimum": -(2**53) + 1, "maximum": 2**53 - 1}),
        ({"type": ["number", "null"], "minimum": 0}, {"maximum": 2**53 - 1}),
        ({"type": "integer", "exclusiveMaximum": 5}, {"minimum": -(2**53) + 1}),
        ({"type": "integer", "minimum": 2**60}, {}),
        ({"type": "integer", "enum": [2**60]}, {}),
        ({"type": "string"}, {}),
        ({"type": [["integer"]], "minimum": "x", "properties": {"a": 1}, "required": 3}, {}),
    ],
)
def test_numbers_have_no_more_digits_than_every_reader_keeps(schema, limits):
    narrowed = dict(schema)
    narrow(narrowed)
    assert narrowed == schema | limits


@pytest.mark.parametrize("name", ["scene", "lengths", "null or much", "constant"])
def test_the_ending_bound_holds_at_every_point(processor, name):
    """Where it is finite, tokens are given out freely as long as it fits: it must be no less than what is needed."""
    schema = json.loads(json.dumps(SCHEMAS[name]))
    narrow(schema)
    bound = ending_bound(schema)
    assert bound < 500
    draw = np.random.default_rng(2)
    for habit in ("none", "talk", "brackets", "escapes"):
        bias = favored(processor, habit)
        constraint = make_constraint(processor, json_schema=schema, max_tokens=1000)
        written = b""
        for _ in range(40):
            logits = bias + 4 * draw.normal(size=bias.size).astype(np.float32)
            token = mx.argmax(constraint.restrict(mx.array(logits[None])), axis=-1).item()
            if token in processor.eos_token_ids:
                break
            constraint.accept(token)
            written += token_table(processor).bytes_of(token)
            assert len(constraint._ending_at_hand().text) <= bound, written


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {}}, "additionalProperties": False},
        {"type": "string", "pattern": "a"},
        SCHEMAS["tree"],
        ENDLESS,
    ],
)
def test_no_ending_bound_is_claimed_for_what_may_nest_or_match_anything(schema):
    assert ending_bound(schema) == float("inf")


def test_a_schema_is_read_from_a_file(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text('{"type": "object"}')
    assert read_json_schema(path) == {"type": "object"}
    for content, message in ((b"{", "is not JSON"), (b"\xff", "UTF-8"), (b"[]", "expected an object")):
        path.write_bytes(content)
        with pytest.raises(OptionError, match=f"schema.json.*{message}"):
            read_json_schema(path)
    with pytest.raises(OptionError, match=r"none\.json cannot be read"):
        read_json_schema(tmp_path / "none.json")


NUMBERS = ["zero", "one", "two", "three", "four"]


@pytest.mark.parametrize("name", ["number.png", "shapes-two.png", "shapes-three.png"])
def test_the_demo_model_chooses_what_it_would_have_said(demo, name):
    prompt = "How many shapes are there?"
    said = json.loads((EXAMPLES / "answers.json").read_text(encoding="utf-8"))[name][prompt]
    assert generate(*demo, prompt, image=EXAMPLES / name, choices=NUMBERS) == said
    others = [number for number in NUMBERS if number != said]
    assert generate(*demo, prompt, image=EXAMPLES / name, choices=others) in others


@pytest.mark.parametrize("options", [{}, {"temp": 1.5, "seed": 1}, {"repetition_penalty": 5.0}])
def test_the_demo_model_follows_a_schema_that_it_never_saw(demo, options):
    schema = SCHEMAS["scene"]
    for max_tokens in (fewest_tokens(demo[1], json_schema=schema), 60):
        *_, last = responses = list(
            stream_generate(
                *demo,
                "Describe this image.",
                image=EXAMPLES / "shapes-two.png",
                json_schema=schema,
                max_tokens=max_tokens,
                **options,
            )
        )
        assert last.finish_reason == "stop"
        jsonschema.validate(json.loads("".join(response.text for response in responses)), schema)


def test_a_random_model_follows_a_schema(tiny):
    text = generate(*tiny, "What is in the picture?", json_schema=SCHEMAS["sums"], max_tokens=60)
    jsonschema.validate(json.loads(text), SCHEMAS["sums"])
