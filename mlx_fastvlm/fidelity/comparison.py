"""Measures a candidate against its reference: features, next-token distributions, answers, memory and speed.

One model is in memory at a time, so whatever can be run can be compared: the reference answers first, and what the
comparison needs of it (feature rows, and log-probabilities of every position, up to 39 MB an answer with Qwen2's
vocabulary) waits in a temporary folder until the candidate has been asked the same. Greedy, so the same every time.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fastvlm.benchmarks.command import DEFAULT_PROMPT
from mlx_fastvlm.benchmarks.machine import describe_machine
from mlx_fastvlm.benchmarks.picture import png_bytes
from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.convert.record import RECORD, read_record
from mlx_fastvlm.errors import CheckpointError, OptionError
from mlx_fastvlm.fidelity.arithmetic import NextTokenTally, compare_answers, row_cosines, summarize_cosines
from mlx_fastvlm.fidelity.pictures import NUM_GENERATED, write_generated
from mlx_fastvlm.fidelity.results import Cosine, Fidelity, ModelFacts, with_speed
from mlx_fastvlm.fidelity.stopwatch import SPEED_TOKENS, time_in_turns
from mlx_fastvlm.generate import generate_step, prefill
from mlx_fastvlm.image_decoding import open_image
from mlx_fastvlm.loading import load, resolve_model
from mlx_fastvlm.options import GenerationOptions
from mlx_fastvlm.processor import Processor
from mlx_fastvlm.sampling import make_sampler

DEFAULT_PROMPTS = (DEFAULT_PROMPT,)
DEFAULT_MAX_TOKENS = 64
DEFAULT_SPEED_ROUNDS = 3

Picture = str | os.PathLike[str] | np.ndarray  # a file, or (H, W, 3) uint8
OnStep = Callable[[str, int, int], None]  # (what is being done, steps done, steps in all)

_PROVENANCE = ("source", "revision", "license", "dtype", "quantization", "created", "converter")


def measure(
    reference: str | os.PathLike[str],
    candidate: str | os.PathLike[str],
    images: Sequence[Picture] | None = None,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    dtype: str | None = None,
    kv_bits: int | None = None,
    speed_rounds: int = DEFAULT_SPEED_ROUNDS,
    on_progress: OnStep | None = None,
) -> Fidelity:
    """Compare two models on every prompt about every image.

    Args:
        reference: the model to be faithful to: whatever `load` takes.
        candidate: the model to be measured: the same kind, with the same tokenizer and image preprocessing.
        images: files or (H, W, 3) uint8 arrays; None takes NUM_GENERATED built-in pictures.
        prompts: questions, each asked about each image.
        max_tokens: longest answer in tokens.
        dtype: type to compute in, for both; see `load`.
        kv_bits: the candidate holds keys and values in so many bits; see `stream_generate`.
        speed_rounds: processes per model for memory and speed; 0 leaves these out.
        on_progress: told how far the work is, a conversion included.

    Raises:
        OptionError: the two cannot be compared, there is nothing to ask, or the disk has no room for the reference's
            log-probabilities.
        FastVLMError: a model cannot be loaded or an image cannot be read, see `load` and `open_image`.
    """
    _check_options(images, prompts, max_tokens, speed_rounds)
    GenerationOptions(max_tokens=max_tokens, kv_bits=kv_bits)  # refuses numbers out of range
    report = on_progress or (lambda what, done, total: None)
    folders = {"reference": resolve_model(reference, None, report), "candidate": resolve_model(candidate, None, report)}
    provenance = {role: _provenance(folder) for role, folder in folders.items()}
    with tempfile.TemporaryDirectory(prefix="mlx-fastvlm-") as name:
        work = Path(name)
        pictures = write_generated(work, NUM_GENERATED) if images is None else list(images)
        for picture in pictures:
            open_image(picture)  # a wrong file should be known before the first model is asked
        questions = _comparable_questions(folders["reference"], folders["candidate"], prompts, max_tokens)
        _check_room(work, folders["reference"], len(pictures) * len(prompts) * max_tokens)

        recorded, reference_type = _record(folders["reference"], dtype, pictures, questions, max_tokens, work, report)
        subject = _Subject(folders["candidate"], dtype, kv_bits)
        comparison = _compare(subject, pictures, questions, recorded, work, report)
        facts = {
            "reference": _model_facts(reference, folders["reference"], reference_type, provenance["reference"]),
            "candidate": _model_facts(candidate, folders["candidate"], subject.dtype, provenance["candidate"]),
        }
        machine = describe_machine()
        if speed_rounds:
            picture = _as_file(pictures[0], work / "speed.png")
            speeds = time_in_turns(
                folders, picture, prompts[0], dtype, speed_rounds, report, kv_bits={"candidate": kv_bits}
            )
            facts = {role: with_speed(facts[role], speeds[role]) for role in facts}
    return Fidelity(
        **facts,
        **comparison,
        pictures="generated" if images is None else "own",
        num_images=len(pictures),
        prompts=tuple(prompts),
        max_tokens=max_tokens,
        machine=machine,
        kv_bits=kv_bits,
    )


class _Subject:
    """A loaded model that is being asked."""

    def __init__(self, folder: Path, dtype: str | None, kv_bits: int | None = None):
        mx.clear_cache()  # what a model before this one held
        self._folder = folder
        self._kv_bits = kv_bits
        self._model, self._processor = load(folder, dtype=dtype)
        self.dtype = str(self._model.dtype).removeprefix("mlx.core.")

    def see(self, picture: Picture) -> tuple[np.ndarray, mx.array]:
        """(the tower's rows (N, width) float32, the projected rows (N, hidden)) of a picture."""
        pixel_values = self._processor.preprocess(picture).astype(self._model.dtype)
        tower_rows = self._model.vision_tower(pixel_values)
        return _to_numpy(tower_rows[0]), self._model.project(tower_rows)[0]

    def answer(self, input_ids: Sequence[int], rows: mx.array, max_tokens: int) -> list[int]:
        """Greedy tokens; the one that ends the answer is the last, unless max_tokens cuts it off."""
        cache = self._model.make_cache(self._kv_bits)
        logits = prefill(self._model, self._model.embed(input_ids, [rows]), cache)
        tokens = []
        for token in generate_step(logits, self._model, cache, max_tokens=max_tokens, sampler=make_sampler()):
            tokens.append(token)
            if token in self._processor.eos_token_ids:
                break
        return tokens

    def log_probabilities(self, input_ids: Sequence[int], rows: mx.array, answer: Sequence[int]) -> np.ndarray:
        """Natural log-probabilities while the answer is forced: (T, vocab) float32, row i before token i.

        Raises:
            CheckpointError: they are not finite numbers.
        """
        decoder = self._model.language_model
        embeddings = self._model.embed([*input_ids, *answer[:-1]], [rows])
        hidden = decoder.hidden_states(embeddings, self._model.make_cache(self._kv_bits))
        logits = decoder.logits(hidden[0, -len(answer) :]).astype(mx.float32)
        found = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        if not np.isfinite(found).all():
            raise CheckpointError(
                f"{self._folder.name} gives logits that are no finite numbers in {self.dtype}: its weights are damaged, "
                "or the type is too narrow for them (try float32 or bfloat16)."
            )
        return found


def _record(
    folder: Path,
    dtype: str | None,
    pictures: Sequence[Picture],
    questions: Sequence[list[int]],
    max_tokens: int,
    work: Path,
    report: OnStep,
) -> tuple[dict[tuple[int, int], list[int]], str]:
    """Ask the reference; its rows and log-probabilities go to files in `work`.

    Returns:
        (picture, question) → its answer's tokens, and the type it computed in.
    """
    subject = _Subject(folder, dtype)
    answers: dict[tuple[int, int], list[int]] = {}
    for index, picture in enumerate(pictures):
        tower_rows, rows = subject.see(picture)
        np.save(work / f"{index}-tower.npy", tower_rows)
        np.save(work / f"{index}-image.npy", _to_numpy(rows))
        for number, input_ids in enumerate(questions):
            report("asking the reference", len(answers), len(pictures) * len(questions))
            answer = answers[index, number] = subject.answer(input_ids, rows, max_tokens)
            np.save(work / f"{index}-{number}.npy", subject.log_probabilities(input_ids, rows, answer))
    report("asking the reference", len(answers), len(answers))
    return answers, subject.dtype


def _compare(
    subject: _Subject,
    pictures: Sequence[Picture],
    questions: Sequence[list[int]],
    recorded: dict[tuple[int, int], list[int]],
    work: Path,
    report: OnStep,
) -> dict[str, Any]:
    """Ask the candidate the same and compare; files in `work` are deleted once they are used.

    Returns:
        Fidelity's fields that come of the comparison.
    """
    cosines: dict[str, list[np.ndarray]] = {"tower": [], "image": []}
    tally = NextTokenTally()
    pairs = []
    for index, picture in enumerate(pictures):
        tower_rows, rows = subject.see(picture)
        for kind, found in (("tower", tower_rows), ("image", _to_numpy(rows))):
            expected = _take(work / f"{index}-{kind}.npy")
            if expected.shape == found.shape:
                cosines[kind].append(row_cosines(expected, found))
        for number, input_ids in enumerate(questions):
            report("asking the candidate", len(pairs), len(recorded))
            answer = recorded[index, number]
            tally.add(_take(work / f"{index}-{number}.npy"), subject.log_probabilities(input_ids, rows, answer), answer)
            # As many tokens as the reference was given: a longer answer than its own has diverged at the last of them.
            pairs.append((answer, subject.answer(input_ids, rows, len(answer))))
    report("asking the candidate", len(pairs), len(recorded))
    return {
        "tower_features": _cosine_or_none(cosines["tower"]),
        "image_features": _cosine_or_none(cosines["image"]),
        "next_token": tally.summarize(),
        "answers": compare_answers(pairs),
    }


def _cosine_or_none(rows: list[np.ndarray]) -> Cosine | None:
    return summarize_cosines(rows) if rows else None


def _take(path: Path) -> np.ndarray:
    """Load a recorded array and free its room on the disk."""
    array = np.load(path)
    path.unlink()
    return array


def _to_numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def _check_options(
    images: Sequence[Picture] | None, prompts: Sequence[str], max_tokens: int, speed_rounds: int
) -> None:
    if images is not None and not len(images):
        raise OptionError("There are no images to compare on; give one or more, or None for the built-in ones.")
    if not prompts:
        raise OptionError("There are no prompts to compare on; give one or more.")
    if max_tokens < 1:
        raise OptionError(f"max_tokens is {max_tokens}; expected 1 or more.")
    if speed_rounds < 0:
        raise OptionError(f"speed_rounds is {speed_rounds}; expected 0 (no timing) or more.")


def _comparable_questions(reference: Path, candidate: Path, prompts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """The prompts' ids, after a check that they mean the same to both models. Reads no weights.

    Raises:
        OptionError: tokenizer, vocabulary or image preprocessing differ, or a prompt does not fit the context.
    """
    configs = [FastVLMConfig.from_folder(folder) for folder in (reference, candidate)]
    processors = [
        Processor.from_folder(folder, config) for folder, config in zip((reference, candidate), configs, strict=True)
    ]
    advice = "compare models converted from the same checkpoint."
    sizes = [config.text_config.vocab_size for config in configs]
    if sizes[0] != sizes[1]:
        raise OptionError(f"The models' vocabularies have {sizes[0]} and {sizes[1]} entries: {advice}")
    images = [processor.image_processor for processor in processors]
    if images[0].image_size != images[1].image_size:
        raise OptionError(
            f"The models see pictures of {images[0].image_size} and {images[1].image_size} pixels: {advice}"
        )
    if images[0] != images[1]:
        raise OptionError(f"The models prepare pictures differently (see their preprocessor_config.json): {advice}")
    questions = [[processor.tokenize(prompt, 1) for prompt in prompts] for processor in processors]
    vocabularies = [processor.tokenizer.get_vocab(with_added_tokens=True) for processor in processors]
    same_ends = processors[0].eos_token_ids == processors[1].eos_token_ids
    if vocabularies[0] != vocabularies[1] or questions[0] != questions[1] or not same_ends:
        raise OptionError(f"The models' tokenizers differ: {advice}")
    for config in configs:
        _check_context(config, questions[0], max(max_tokens, SPEED_TOKENS))
    return questions[0]


def _check_context(config: FastVLMConfig, questions: Sequence[list[int]], max_tokens: int) -> None:
    limit = config.text_config.max_position_embeddings
    longest = max(map(len, questions)) - 1 + config.vision_config.num_image_tokens
    if longest + max_tokens > limit:
        raise OptionError(
            f"The longest prompt takes {longest} tokens and an answer up to {max_tokens}; the context holds {limit} in "
            "all. Shorten the prompt or lower max_tokens."
        )


def _check_room(work: Path, reference: Path, positions: int) -> None:
    """Refuse what could fill the disk of the temporary folder."""
    needed = positions * FastVLMConfig.from_folder(reference).text_config.vocab_size * 4
    free = shutil.disk_usage(work).free
    if needed > free * 0.9:
        raise OptionError(
            f"The reference's log-probabilities may take {needed / 1e9:.1f} GB in {work.parent}, which has "
            f"{free / 1e9:.1f} GB free; take fewer images, prompts or tokens, or set TMPDIR to a larger disk."
        )


def _provenance(folder: Path) -> dict[str, Any]:
    """What conversion.json tells of a model; nothing where there is none. Raises CheckpointError if it is damaged."""
    record = read_record(folder) if (folder / RECORD).exists() else {}
    provenance = {key: record[key] for key in _PROVENANCE if key in record}
    if Path(provenance.get("source", "")).is_absolute():
        provenance["source"] = Path(provenance["source"]).name  # where it lay concerns nobody else
    return provenance


def _model_facts(model: str | os.PathLike[str], folder: Path, dtype: str, provenance: dict[str, Any]) -> ModelFacts:
    path = Path(model).expanduser()
    quantization = FastVLMConfig.from_folder(folder).quantization
    return ModelFacts(
        name=path.resolve().name if path.is_dir() else str(model),
        weight_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        dtype=dtype,
        recipe=quantization and quantization.recipe,
        provenance=provenance,
    )


def _as_file(picture: Picture, path: Path) -> Path:
    """A picture as a file that another process can read; an array is written to `path`."""
    if not isinstance(picture, np.ndarray):
        return Path(picture).expanduser().resolve()
    path.write_bytes(png_bytes(np.asarray(open_image(picture))))
    return path
