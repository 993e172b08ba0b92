"""A comparison of two models says what an independent computation on their logits says; equal ones are equal.

The benchmark of quantization is here too: it is made of such comparisons.
"""

import json
import os
import re
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_fastvlm import generate, load
from mlx_fastvlm.benchmarks import easy_vqa, quantization, quantization_docs
from mlx_fastvlm.benchmarks.command import BenchmarkError
from mlx_fastvlm.config import read_config_dict
from mlx_fastvlm.convert.recipes import RECIPES
from mlx_fastvlm.convert.record import read_record
from mlx_fastvlm.errors import CheckpointError, OptionError
from mlx_fastvlm.fidelity import (
    Fidelity,
    arithmetic,
    comparison,
    format_fidelity,
    measure,
    pictures,
    plot,
    plot_fidelity,
    read_fidelity,
    run,
    stopwatch,
    write_card_entry,
)
from mlx_fastvlm.fidelity.report import card_table
from mlx_fastvlm.fidelity.results import Answers
from mlx_fastvlm.fidelity.stopwatch import time_in_turns
from tests.conftest import GOLDEN

ROOT = Path(__file__).parent.parent
PICTURE = GOLDEN / "images" / "landscape.png"
PROMPTS = ("Describe this image.", "What is written?")
MAX_TOKENS = 6


def changed_copy(folder: Path, destination: Path, change, **config) -> Path:
    """A converted folder with `change`d weights (name, array → array) and other entries in config.json."""
    destination.mkdir()
    for path in folder.iterdir():
        if path.name != "model.safetensors":
            (destination / path.name).write_bytes(path.read_bytes())
    weights = mx.load(str(folder / "model.safetensors"))
    changed = {name: change(name, array) for name, array in weights.items()}
    mx.save_safetensors(str(destination / "model.safetensors"), changed)
    raw = json.loads((destination / "config.json").read_text())
    (destination / "config.json").write_text(json.dumps({**raw, **config}))
    return destination


@pytest.fixture(scope="module")
def reference(converted_folder):
    return converted_folder("inference")


@pytest.fixture(scope="module")
def noisy(reference, tmp_path_factory):
    """The reference with a tenth of each weight's spread added as noise, fixed by a seed."""
    random = np.random.Generator(np.random.PCG64(5))

    def disturb(name, array):
        values = np.array(array)
        return mx.array(values + random.normal(0, 0.1 * values.std() + 1e-9, values.shape).astype(values.dtype))

    return changed_copy(reference, tmp_path_factory.mktemp("noisy") / "noisy", disturb)


@pytest.fixture(scope="module")
def compared(reference, noisy):
    return measure(reference, noisy, [PICTURE], PROMPTS, max_tokens=MAX_TOKENS, speed_rounds=0)


def test_a_model_is_faithful_to_itself(reference):
    found = measure(reference, reference, None, max_tokens=3, speed_rounds=0)
    assert (found.tower_features.worst, found.image_features.worst) == (1.0, 1.0)
    assert (found.next_token.kl_max, found.next_token.top1_agreement) == (0.0, 1.0)
    assert found.next_token.perplexity_change == 0.0
    assert (found.answers.identical, found.answers.median_divergence) == (1.0, None)
    assert (found.size_ratio, found.num_images, found.pictures) == (1.0, pictures.NUM_GENERATED, "generated")


def test_a_noisy_model_is_as_far_off_as_its_logits_are(reference, noisy, compared):
    (model, processor), (other, _) = load(reference), load(noisy)
    pixels = processor.preprocess(PICTURE)
    tower = [np.array(subject.vision_tower(pixels)[0], np.float64) for subject in (model, other)]
    rows = [subject.encode_images(pixels) for subject in (model, other)]
    divergences, agreements, scores, answered = [], [], ([], []), []
    for prompt in PROMPTS:
        input_ids = processor.tokenize(prompt, 1)
        # Without a cache: the whole sequence again for every token.
        answers = [
            greedy(subject, input_ids, seen, processor) for subject, seen in zip((model, other), rows, strict=True)
        ]
        answered.append(answers)
        p, q = (
            log_softmax(np.array(subject([*input_ids, *answers[0]], seen)[0, -len(answers[0]) - 1 : -1], np.float64))
            for subject, seen in zip((model, other), rows, strict=True)
        )
        divergences += list((np.exp(p) * (p - q)).sum(axis=1))
        agreements += list(p.argmax(axis=1) == q.argmax(axis=1))
        for score, logprobs in zip(scores, (p, q), strict=True):
            score += [logprobs[i, token] for i, token in enumerate(answers[0])]

    found = compared.next_token
    assert found.positions == len(divergences)
    assert found.kl_mean == pytest.approx(np.mean(divergences), rel=1e-3)
    assert found.kl_median == pytest.approx(np.median(divergences), rel=1e-3)
    assert found.kl_max == pytest.approx(max(divergences), rel=1e-3)
    assert max(divergences) > 1e-4
    assert found.top1_agreement == np.mean(agreements)
    assert found.reference_perplexity == pytest.approx(np.exp(-np.mean(scores[0])), rel=1e-4)
    assert found.candidate_perplexity == pytest.approx(np.exp(-np.mean(scores[1])), rel=1e-4)
    for cosine, pair in ((compared.tower_features, tower), (compared.image_features, [np.array(r[0]) for r in rows])):
        expected = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*pair, strict=True)]
        assert cosine.mean == pytest.approx(np.mean(expected), abs=1e-6)
        assert cosine.worst == pytest.approx(min(expected), abs=1e-6)
        assert cosine.worst < 0.9999
    parted = tuple(
        next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None) for one, two in answered
    )
    assert compared.answers.first_divergences == parted


def greedy(model, input_ids, rows, processor):
    tokens = []
    while len(tokens) < MAX_TOKENS and not (tokens and tokens[-1] in processor.eos_token_ids):
        tokens.append(int(mx.argmax(model([*input_ids, *tokens], rows)[0, -1]).item()))
    return tokens


def log_softmax(logits):
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def test_measuring_again_finds_the_same(reference, noisy, compared):
    again = measure(reference, noisy, [PICTURE], PROMPTS, max_tokens=MAX_TOKENS, speed_rounds=0)
    assert (again.next_token, again.image_features, again.answers) == (
        compared.next_token,
        compared.image_features,
        compared.answers,
    )


def test_cosines_count_rows_by_direction_alone():
    rows = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    others = np.array([[6.0, 8.0], [0.0, -2.0], [0.0, 0.0], [1.0, 0.0], [-1.0, -1.0]])
    np.testing.assert_array_equal(arithmetic.row_cosines(rows, others), [1, 0, 1, 0, -1])


@pytest.mark.parametrize(
    ("one", "other", "first"), [([1, 2], [1, 2], None), ([1, 2, 3], [1, 4, 3], 1), ([1, 2, 3], [1, 2], 2), ([], [1], 0)]
)
def test_answers_part_at_the_first_different_token(one, other, first):
    assert arithmetic.first_divergence(one, other) == first


@pytest.mark.parametrize(
    ("divergences", "identical", "median"),
    [((None, None), 1.0, None), ((4, None, 1, 2), 0.25, 2), ((4, 1), 0.0, 2.5)],
)
def test_the_median_divergence_is_of_the_answers_that_differ(divergences, identical, median):
    assert (Answers(divergences).identical, Answers(divergences).median_divergence) == (identical, median)


def test_each_model_is_timed_alone_and_in_turns(reference, noisy):
    steps = []
    found = measure(
        reference, noisy, [PICTURE], max_tokens=2, speed_rounds=2, on_progress=lambda *step: steps.append(step)
    )
    for facts in (found.reference, found.candidate):
        assert len(facts.speed.ttft_s.samples) == 2
        assert facts.speed.ttft_s.median == pytest.approx(np.median(facts.speed.ttft_s.samples))
        assert facts.speed.decode_tps.median > 0
        # Loading counts: the weights were all there at once.
        assert facts.speed.peak_rss_bytes.median > facts.speed.peak_mlx_bytes.median > facts.weight_bytes
    assert steps[-1] == ("timing", 4, 4)
    assert "decoding, tok/s" in format_fidelity(found)
    assert Fidelity.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_a_timing_that_fails_says_why_in_one_line(tmp_path):
    with pytest.raises(BenchmarkError, match=r"^Timing failed: .* has no config\.json"):
        time_in_turns({"reference": tmp_path}, PICTURE, "What?", None, rounds=1)


def test_a_timed_process_runs_nothing_of_the_current_folder(tmp_path, monkeypatch):
    for name in ("random", "json", "mlx", "runpy"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'has-run')!r}, 'w').close()")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BenchmarkError, match=r"has no config\.json"):
        time_in_turns({"reference": tmp_path}, PICTURE, "What?", None, rounds=1)
    assert not (tmp_path / "has-run").exists()


def test_keys_and_values_in_fewer_bits_are_the_candidates_alone():
    kinds = [measure("demo", "demo", [PICTURE], max_tokens=8, kv_bits=bits, speed_rounds=0) for bits in (None, 8, 2)]
    divergences = [kind.next_token.kl_mean for kind in kinds]
    assert divergences[0] == 0 < divergences[1] < divergences[2]
    assert "demo holds keys and values in 2 bits." in format_fidelity(kinds[2])
    assert Fidelity.from_dict(kinds[2].to_dict()).kv_bits == 2
    with pytest.raises(OptionError, match="kv_bits is 7"):
        measure("demo", "demo", [PICTURE], kv_bits=7)


def test_ctrl_c_ends_the_process_that_is_timed(tmp_path, monkeypatch):
    started = tmp_path / "pid"
    sleep = f"import os, time; open({str(started)!r}, 'w').write(f'{{os.getpid()}}\\n'); time.sleep(60)"
    monkeypatch.setattr(stopwatch, "module_command", lambda *_: [sys.executable, "-c", sleep])

    def press_ctrl_c():
        while not (started.exists() and started.read_text().endswith("\n")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)  # to this process alone, not to its group as a terminal does

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background start with it ignored
    try:
        threading.Thread(target=press_ctrl_c, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            time_in_turns({"reference": tmp_path}, PICTURE, "What?", None, rounds=1)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        _, status = os.waitpid(int(started.read_text()), 0)
    except ChildProcessError:
        return  # it has been waited for already
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_the_result_survives_json_and_the_candidates_folder(compared, noisy, tmp_path):
    assert Fidelity.from_dict(json.loads(json.dumps(compared.to_dict()))) == compared
    path = write_card_entry(compared, noisy)
    try:
        assert path == noisy / "fidelity.json"
        assert read_fidelity(path) == compared
    finally:
        path.unlink()
    assert str(noisy.parent) not in json.dumps(compared.to_dict())


def test_the_table_names_both_models_and_the_pictures(compared, reference, noisy):
    text = format_fidelity(compared)
    assert text.startswith(f"{noisy.name} against {reference.name}: 1 pictures")
    assert f"{compared.next_token.kl_mean:.2e}" in text
    assert "generated" not in text


def test_the_cards_table_leaves_out_what_only_concerned_this_machine(compared):
    text = card_table(compared)
    table, _, machine = format_fidelity(compared).rpartition("\n\n")
    assert "load average" in machine
    assert text.startswith(table + "\n\n")
    where = text.removeprefix(table)
    assert compared.machine["cpu"] in where and f"MLX {compared.machine['mlx']}" in where
    assert "load average" not in where and "BLAS" not in where


def test_run_writes_what_it_is_asked_for_and_nothing_else(reference, noisy, tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("b.png", "a.png", "c.png"):
        (tmp_path / "images" / name).write_bytes(PICTURE.read_bytes())
    (tmp_path / "images" / "notes.txt").write_text("no picture")
    copy = changed_copy(noisy, tmp_path / "copy", lambda name, array: array)
    found = run(
        str(reference),
        str(copy),
        tmp_path / "images",
        max_images=2,
        max_tokens=2,
        speed_rounds=0,
        json_path=tmp_path / "result.json",
        save_to_model=True,
    )
    assert (found.num_images, found.pictures) == (2, "own")
    assert read_fidelity(tmp_path / "result.json") == read_fidelity(copy / "fidelity.json") == found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "images", "result.json"]


def test_a_result_kept_in_a_model_is_in_its_card_too(reference, noisy, tmp_path, monkeypatch):
    copy = changed_copy(noisy, tmp_path / "copy", lambda name, array: array)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = run(str(reference), "~/copy", max_tokens=2, speed_rounds=0, save_to_model=True)
    assert found.candidate.name == "copy"
    card = (copy / "README.md").read_text()
    assert card.count("# copy\n") == 1
    assert f"{found.next_token.kl_mean:.2e}" in card


def test_pictures_that_cannot_be_decoded_are_left_out_and_named(tmp_path):
    (tmp_path / "a.jpg").write_text("no picture")
    (tmp_path / "b.png").write_bytes(PICTURE.read_bytes()[:200])
    for name in ("c.png", "d.png", "e.png"):
        (tmp_path / name).write_bytes(PICTURE.read_bytes())
    (tmp_path / "f.png").write_text("not looked at: there are enough")
    skipped = []
    found = pictures.find_images(tmp_path, 2, lambda path, reason: skipped.append((path.name, reason)))
    assert [path.name for path in found] == ["c.png", "d.png"]
    assert [name for name, _ in skipped] == ["a.jpg", "b.png"]
    assert "a.jpg" in skipped[0][1]
    assert pictures.find_images(tmp_path, 2) == found
    for path in found:
        path.unlink()
    (tmp_path / "e.png").unlink()
    with pytest.raises(OptionError, match=r"no picture that can be decoded: .*a\.jpg"):
        pictures.find_images(tmp_path, 2)


def test_run_tells_of_pictures_it_leaves_out(reference, tmp_path):
    (tmp_path / "broken.png").write_text("no picture")
    (tmp_path / "good.png").write_bytes(PICTURE.read_bytes())
    skipped = []
    options = {"max_tokens": 2, "speed_rounds": 0, "on_skip": lambda path, reason: skipped.append(path.name)}
    assert run(str(reference), str(reference), tmp_path, **options).num_images == 1
    assert skipped == ["broken.png"]


def test_a_plot_is_a_png_of_all_results(compared, tmp_path):
    pytest.importorskip("matplotlib")
    path = plot_fidelity([compared, compared], tmp_path / "plot.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [entry.name for entry in path.parent.iterdir()] == ["plot.png"]
    with pytest.raises(OptionError, match="no fidelity results"):
        plot_fidelity([], tmp_path / "empty.png")
    with pytest.raises(OptionError, match=r"is not a folder; make it first\.$"):
        plot_fidelity([compared], tmp_path / "new" / "plot.png")


def test_no_tick_of_a_plot_is_above_all_positions(compared):
    pytest.importorskip("matplotlib")
    perfect = replace(compared, next_token=replace(compared.next_token, top1_agreement=1.0))
    for result in (compared, perfect):
        (axes,) = plot._draw([result]).axes
        ticks = axes.get_yticks()
        assert max(ticks) == pytest.approx(100)
        assert axes.get_ylim()[1] > 100


def test_without_matplotlib_a_plot_is_refused_before_the_measurement(reference, noisy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("mlx_fastvlm.fidelity.command.measure", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(OptionError, match=r"pip install 'mlx-fastvlm\[plot\]'"):
        run(str(reference), str(noisy), plot_path=tmp_path / "plot.png")


def test_models_that_cannot_be_compared_are_refused(reference, tmp_path):
    def same(name, array):
        return array

    def smaller_picture(folder):
        path = folder / "preprocessor_config.json"
        raw = json.loads(path.read_text())
        raw |= {"size": {"shortest_edge": 128}, "crop_size": {"height": 128, "width": 128}}
        path.write_text(json.dumps(raw))

    def other_words(folder):
        path = folder / "tokenizer.json"
        raw = json.loads(path.read_text())
        vocabulary = raw["model"]["vocab"]
        first, second = list(vocabulary)[:2]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        path.write_text(json.dumps(raw))

    for number, (change, message) in enumerate(
        [(smaller_picture, "pictures of 256 and 128 pixels"), (other_words, "tokenizers differ")]
    ):
        folder = changed_copy(reference, tmp_path / str(number), same)
        change(folder)
        with pytest.raises(OptionError, match=message):
            measure(reference, folder, [PICTURE], max_tokens=2, speed_rounds=0)
    wider = changed_copy(reference, tmp_path / "wider", same, vocab_size=10_000)
    with pytest.raises(OptionError, match="vocabularies have"):
        measure(reference, wider, [PICTURE], max_tokens=2, speed_rounds=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": []}, "no images"),
        ({"prompts": ()}, "no prompts"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"speed_rounds": -1}, "speed_rounds is -1"),
        ({"max_tokens": 10**6}, "the context holds"),
    ],
)
def test_options_out_of_range_are_one_line(reference, options, message):
    with pytest.raises(OptionError, match=message) as caught:
        measure(reference, reference, **options)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_known_before_the_models_are_asked(reference, monkeypatch):
    monkeypatch.setattr(comparison.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(OptionError, match="set TMPDIR"):
        measure(reference, reference, [PICTURE], speed_rounds=0)


def test_broken_weights_are_named(reference, tmp_path):
    def break_one(name, array):
        return array * float("nan") if name == "language_model.norm.weight" else array

    broken = changed_copy(reference, tmp_path / "broken", break_one)
    with pytest.raises(CheckpointError, match="broken gives logits that are no finite numbers"):
        measure(reference, broken, [PICTURE], max_tokens=2, speed_rounds=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "nowhere"}, "nowhere is not a folder"),
        ({"images": "{empty}"}, "holds no pictures"),
        ({"max_images": 0}, "max_images is 0"),
        ({"json_path": "{empty}"}, "is a folder; give a file"),
        ({"json_path": "{empty}/new/x.json"}, "new is not a folder; make it first."),
        ({"json_path": "{file}/x.json"}, "is not a folder; make it first."),
        ({"json_path": "{empty}/" + 250 * "x"}, "cannot be written (File name too long)"),
        ({"json_path": "/proc/x.json"}, "x.json cannot be written"),
        ({"plot_path": "{empty}/new/x.png"}, "new is not a folder; make it first."),
        ({"plot_path": "{empty}/x.jpg"}, "does not end in .png"),
    ],
)
def test_run_refuses_what_it_cannot_do_before_it_measures(reference, options, message, tmp_path, monkeypatch):
    if "/proc/x.json" in options.values() and not Path("/proc/self").exists():
        pytest.skip("there is no /proc here")
    monkeypatch.setattr("mlx_fastvlm.fidelity.command.measure", lambda *_, **__: pytest.fail("measured"))
    empty, file = tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.touch()
    places = {
        name: Path(value.format(empty=empty, file=file)) for name, value in options.items() if isinstance(value, str)
    }
    with pytest.raises(OptionError, match=re.escape(message)):
        run(str(reference), str(reference), **{**options, **places})
    assert sorted(tmp_path.rglob("*")) == [empty, file]


def test_a_model_without_a_record_is_of_unknown_provenance(reference, tmp_path):
    copy = changed_copy(reference, tmp_path / "copy", lambda name, array: array)
    (copy / "conversion.json").unlink()
    found = measure(copy, reference, [PICTURE], max_tokens=2, speed_rounds=0)
    assert found.reference.provenance == {}
    assert found.candidate.provenance["dtype"] == "float32"
    assert copy.name in format_fidelity(found)
    with pytest.raises(CheckpointError, match=r"has no conversion\.json"):
        run(str(reference), str(copy), save_to_model=True)


def test_a_damaged_record_is_known_before_the_models_are_asked(reference, tmp_path, monkeypatch):
    copy = changed_copy(reference, tmp_path / "copy", lambda name, array: array)
    (copy / "conversion.json").write_text("{")
    monkeypatch.setattr(comparison, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(CheckpointError, match=r"conversion\.json"):
        measure(reference, copy, [PICTURE], max_tokens=2, speed_rounds=0)


def test_a_result_is_not_kept_in_the_package_or_the_cache(reference):
    with pytest.raises(OptionError, match="not the folder of a converted model"):
        run(str(reference), "demo", save_to_model=True)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "next_token": 3}'])
def test_a_file_that_is_no_result_is_refused(content, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(CheckpointError, match="measure again"):
        read_fidelity(tmp_path / "x.json")


def test_generated_pictures_are_many_and_always_the_same(tmp_path):
    drawn = [pictures.draw(index) for index in range(pictures.NUM_GENERATED)]
    for index, picture in enumerate(drawn):
        assert picture.dtype == np.uint8 and picture.shape[2] == 3
        assert picture.std() > 5
        np.testing.assert_array_equal(picture, pictures.draw(index))
    assert len({picture.tobytes() for picture in drawn}) == len(drawn)
    assert [path.name for path in pictures.write_generated(tmp_path, 2)] == ["generated-0.png", "generated-1.png"]


def test_batched_answers_are_those_asked_one_by_one(tiny):
    model, processor = tiny
    asked = [
        (GOLDEN / "images" / name, [(question, "") for question in ("What?", "What is it?", "Why?")])
        for name in ("landscape.png", "square.png")
    ]
    alone = {
        (question, generate(model, processor, question, image=image, max_tokens=easy_vqa.MAX_TOKENS))
        for image, pairs in asked
        for question, _ in pairs
    }
    together = [(question, found) for question, _, found in easy_vqa.answers(model, processor, asked)]
    assert len(together) == 6
    assert set(together) == alone


def test_exact_match_is_the_share_of_whole_answers():
    answered = [("a?", "yes", "yes"), ("b?", "no", "no, never"), ("c?", "red", "red"), ("d?", "teal", "")]
    assert easy_vqa.exact_match(answered) == {"exact_match": 0.5, "questions": 4}


def run_benchmark(capsys, *arguments):
    quantization.main([str(argument) for argument in arguments])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_benchmark_measures_each_recipe_on_the_demo_model(capsys, monkeypatch):
    pytest.importorskip("easy_vqa")
    monkeypatch.setattr(quantization, "NUM_GENERATED", 1)
    monkeypatch.setattr(quantization, "FIDELITY_PROMPTS", ("Describe this image.",))
    result = run_benchmark(capsys, "--limit", 2, "--recipes", "int8", "float32")
    stored, int8, float32 = result["models"]
    assert [model["recipe"] for model in result["models"]] == ["as embedded", "int8", "float32"]
    assert stored["easy_vqa_test"]["exact_match"] > 0.9
    assert stored["bits_per_weight"] == 16
    assert 8 < int8["bits_per_weight"] < 12
    assert (stored["parts"], float32["parts"]) == (None, None)
    assert int8["parts"]["decoder"] == "8 bits, groups of 64"
    assert int8["parts"]["projector"] is None
    assert stored["fidelity"]["candidate"]["provenance"]["dtype"] == "float16"
    assert float32["fidelity"]["candidate"]["provenance"]["dtype"] == "float32"
    assert int8["fidelity"]["size_ratio"] < 0.7
    assert 0 < int8["fidelity"]["next_token"]["kl_mean"] < 0.01
    # The same values in a wider type, computed in the same type.
    assert float32["fidelity"]["next_token"]["kl_max"] == 0
    assert float32["fidelity"]["size_ratio"] == pytest.approx(2, abs=0.05)


def test_the_benchmark_measures_size_and_speed_of_any_model(capsys, reference, tmp_path):
    result = run_benchmark(
        capsys, "--full-size", reference, "--recipes", "bfloat16", "--image", PICTURE, "--repeat", 1, "--work", tmp_path
    )
    stored, halved = result["models"]
    assert result["dtype"] == "float32"
    assert halved["parts"] is None
    assert halved["weight_bytes"] == pytest.approx(stored["weight_bytes"] / 2, rel=0.1)
    assert all(model["decode_tps"]["median"] > 0 for model in result["models"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipes", "int9"], "There is no recipe int9"),
        (["--docs", "page.md"], "measure first, with --save"),
        (["--full-size", "nowhere"], "nowhere"),
        (["--full-size", "demo", "--recipes", "int8, calibrated"], "There is no recipe int8, calibrated"),
    ],
)
def test_what_the_benchmark_cannot_do_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        quantization.main(arguments)
    assert message in (capsys.readouterr().err or str(stop.value.code)).splitlines()[-1]


def test_a_copy_in_another_type_says_so(reference, tmp_path):
    copy = quantization.store_as(reference, tmp_path / "copy", "bfloat16")
    assert read_config_dict(copy)["torch_dtype"] == read_record(copy)["dtype"] == "bfloat16"
    assert quantization.stored_dtype(copy) == mx.bfloat16
    assert quantization.bits_per_weight(copy) == 16
    assert load(copy)[0].config == load(reference)[0].config


@pytest.mark.parametrize("page", ["", "<!-- end claim --> <!-- begin claim -->"])
def test_a_page_without_marks_is_refused_in_one_line(page, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "page.md").write_text(page)
    with pytest.raises(SystemExit) as stop:
        quantization.main(["--docs", str(tmp_path / "page.md")])
    assert str(stop.value.code).startswith("quantization: The page has no <!-- begin claim -->")
    assert (tmp_path / "page.md").read_text() == page


@pytest.mark.parametrize("name", ["quantization", "quantization-0.5b"])
def test_the_saved_results_are_of_todays_recipes(name):
    first, *models = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["models"]
    assert first["recipe"] in ("as embedded", "as stored")
    for model in models:
        label = model["recipe"]
        if label in quantization.UNQUANTIZED:
            assert model.get("parts") is None
            continue
        recipe = RECIPES[quantization.CALIBRATED.get(label, label)]
        if "parts" in model:  # results of earlier releases lack it
            assert model["parts"] == quantization.spell_parts(recipe.parts), label


def test_the_page_on_quantization_is_what_the_saved_results_render_to():
    results = {
        name: json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        for name in quantization_docs.SAVED
    }
    page = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    assert quantization_docs.fill_docs(page, results) == page
    changed = json.loads(json.dumps(results))
    changed["quantization"]["models"][0]["easy_vqa_test"]["exact_match"] = 0.1234
    assert "12.34%" in quantization_docs.fill_docs(page, changed)
    with pytest.raises(BenchmarkError, match="begin demo"):
        quantization_docs.fill_docs(page.replace("<!-- begin demo -->", ""), results)
