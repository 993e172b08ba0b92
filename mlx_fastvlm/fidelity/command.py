"""What `mlx-fastvlm fidelity` does, without its command line: options in, files and a result out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx_fastvlm.convert.record import read_record
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.fidelity.comparison import (
    DEFAULT_MAX_TOKENS,
    DEFAULT_PROMPTS,
    DEFAULT_SPEED_ROUNDS,
    OnStep,
    measure,
)
from mlx_fastvlm.fidelity.output import check_writable
from mlx_fastvlm.fidelity.pictures import OnSkip, find_images
from mlx_fastvlm.fidelity.plot import check_plot, plot_fidelity
from mlx_fastvlm.fidelity.report import CARD_FILE, save_fidelity, write_card_entry
from mlx_fastvlm.fidelity.results import Fidelity
from mlx_fastvlm.loading import DEMO, as_path, is_converted

DEFAULT_MAX_IMAGES = 16


def run(
    reference: str,
    candidate: str,
    images: Path | None = None,
    prompts: Sequence[str] | None = None,
    *,
    max_images: int = DEFAULT_MAX_IMAGES,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    dtype: str | None = None,
    kv_bits: int | None = None,
    speed_rounds: int = DEFAULT_SPEED_ROUNDS,
    json_path: Path | None = None,
    plot_path: Path | None = None,
    save_to_model: bool = False,
    on_progress: OnStep | None = None,
    on_skip: OnSkip | None = None,
) -> Fidelity:
    """Measure, and write what was asked for.

    Args:
        reference, candidate, max_tokens, dtype, kv_bits, speed_rounds, on_progress: see `comparison.measure`.
        images: folder with pictures; None takes the built-in ones. Those that cannot be decoded are left out.
        prompts: questions; None or none takes DEFAULT_PROMPTS.
        max_images: take this many pictures of the folder at most, the first by name.
        json_path: where to write the result, in a folder that exists.
        plot_path: where to draw it, ending in .png, in a folder that exists.
        save_to_model: also keep the result in the candidate's folder, and renew its model card.
        on_skip: told of each picture that is left out, and why.

    Raises:
        OptionError: an option is out of range, or nothing can be written where it should be. Known before measuring.
        FastVLMError: see `comparison.measure`.
    """
    if max_images < 1:
        raise OptionError(f"max_images is {max_images}; expected 1 or more.")
    home = _model_home(candidate) if save_to_model else None
    if json_path is not None:
        json_path = as_path(json_path)
        check_writable(json_path)
    if plot_path is not None:
        plot_path = as_path(plot_path)
        check_plot(plot_path)
    fidelity = measure(
        reference,
        candidate,
        None if images is None else find_images(as_path(images), max_images, on_skip),
        tuple(prompts or DEFAULT_PROMPTS),
        max_tokens=max_tokens,
        dtype=dtype,
        kv_bits=kv_bits,
        speed_rounds=speed_rounds,
        on_progress=on_progress,
    )
    if json_path is not None:
        save_fidelity(fidelity, json_path)
    if plot_path is not None:
        plot_fidelity([fidelity], plot_path)
    if home is not None:
        _keep(fidelity, home)
    return fidelity


def _model_home(candidate: str) -> Path:
    """The folder that keeps the candidate's result: the user's own converted model, never the package or the cache.

    Raises:
        OptionError: it is none, or cannot be written.
        CheckpointError: it has no conversion.json to write the card from, or a damaged one.
    """
    folder = as_path(candidate)
    if candidate == DEMO or not folder.is_dir() or not is_converted(folder):
        raise OptionError(
            f"{candidate} is not the folder of a converted model, so the result cannot be kept there; use --json."
        )
    read_record(folder)  # the card is written from it
    check_writable(folder / CARD_FILE)
    return folder


def _keep(fidelity: Fidelity, home: Path) -> None:
    # Imported here: only what is kept needs the card.
    from mlx_fastvlm.convert.model_card import write_card

    write_card_entry(fidelity, home)
    write_card(home, home.resolve().name)
