"""Which launch shape won on this machine: what `mlx-fastvlm tune` has measured, read by the dispatchers.

One JSON file per chip and MLX version in the cache folder. It counts only for the very chip, MLX and kernels it was
measured with; anything else in its place (damaged, of another release, copied from another machine) is ignored.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_fastvlm.cache_folder import CACHE_VARIABLE, cache_home
from mlx_fastvlm.errors import FastVLMError, OptionError
from mlx_fastvlm.json_file import read_json_object
from mlx_fastvlm.kernels.chip import this_chip
from mlx_fastvlm.kernels.launch_table import PLAIN, Launch
from mlx_fastvlm.replace_file import replace_file

Winner = Launch | str  # a launch shape, or PLAIN

_FORMAT = 1
_NEAREST = 4.0  # a call that was not tuned takes the winner of one that is up to this many times larger or smaller


@dataclass(frozen=True)
class Call:
    """What a winner is for: an op, with the shapes and the type of its arrays and its other options.

    Attributes:
        op: name of the op.
        dtype: of the first array, "float16".
        shapes: of all arrays.
        options: name and value, sorted.
    """

    op: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, op: str, arrays: Sequence[mx.array], options: dict[str, Any]) -> Call:
        shapes = tuple(tuple(array.shape) for array in arrays)
        return cls(op, dtype_name(arrays[0].dtype), shapes, tuple(sorted(options.items())))

    @property
    def kind(self) -> tuple:
        """What calls must share for one's winner to serve the other: all but how many rows or pixels there are."""
        rows = self.shapes[0][:-1]
        lengths = tuple(shape[-1:] if shape[:-1] == rows else shape for shape in self.shapes)
        return self.op, self.dtype, lengths, self.options

    @property
    def elements(self) -> int:
        """Of the first array."""
        count = 1
        for length in self.shapes[0]:
            count *= length
        return count


def find_winner(call: Call) -> Winner | None:
    """What won for `call`, or for the call of its kind that is nearest in size; None if nothing near was tuned."""
    winners = _winners()
    if call in winners:
        return winners[call]
    near = [(_ratio(call, other), winner) for other, winner in winners.items() if other.kind == call.kind]
    ratio, winner = min(near, key=lambda pair: pair[0], default=(_NEAREST + 1, None))
    return winner if ratio <= _NEAREST else None


def keep_winner(call: Call, winner: Winner) -> Path:
    """Add to the file, or replace there, what won for `call`. From now on it counts in this process too.

    Raises:
        OptionError: there is no cache folder, or it cannot be written.
    """
    path = winners_file()
    _winners.cache_clear()
    winners = {**_winners(), call: winner}
    entries = [
        {
            "op": kept.op,
            "dtype": kept.dtype,
            "shapes": kept.shapes,
            "options": dict(kept.options),
            "winner": winners[kept],
        }
        for kept in winners
    ]
    content = json.dumps({**_identity(), "winners": entries}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content.encode())
    except OSError as error:
        raise _unusable(path, error) from None
    _winners.cache_clear()
    return path


def clear_winners() -> int:
    """Delete what was tuned, for every chip and MLX version; how many files that were. Raises OptionError."""
    files = list(_folder().glob("*.json"))
    try:
        for path in files:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise _unusable(path, error) from None
    _winners.cache_clear()
    return len(files)


def winners_file() -> Path:
    """Where winners for this chip and this MLX are kept. Raises OptionError if that is nowhere."""
    name = re.sub(r"[^a-z0-9]+", "-", this_chip().name.lower()).strip("-")
    return _folder() / f"{name}-mlx-{mx.__version__}.json"


def dtype_name(dtype: mx.Dtype) -> str:
    """ "float16" for mx.float16."""
    return str(dtype).removeprefix("mlx.core.")


def sources_hash(folder: Path) -> str:
    """Changes when any module in `folder` does: what was measured then says nothing about what runs now."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _folder() -> Path:
    """Raises OptionError if nobody has the home folder that is named."""
    try:
        return cache_home().expanduser() / "tuning"
    except RuntimeError as error:
        raise OptionError(f"{cache_home()} is no folder ({error}); set {CACHE_VARIABLE} to one.") from None


@functools.cache
def _winners() -> dict[Call, Winner]:
    """The file's content; nothing if it is missing, damaged, or not of this chip, MLX and kernels."""
    try:
        path = winners_file()
        if not path.is_file():
            return {}
        content = read_json_object(path, OptionError)
        if any(content.get(key) != value for key, value in _identity().items()):
            return {}
        return dict(_read_entry(entry) for entry in content["winners"])  # TypeError also for what cannot be a key
    except (FastVLMError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _read_entry(entry: dict[str, Any]) -> tuple[Call, Winner]:
    """Raises ValueError, KeyError, TypeError or AttributeError if it is not one of ours."""
    shapes = tuple(tuple(int(length) for length in shape) for shape in entry["shapes"])
    call = Call(str(entry["op"]), str(entry["dtype"]), shapes, tuple(sorted(entry["options"].items())))
    winner = entry["winner"]
    if winner != PLAIN:
        winner = {str(name): int(value) for name, value in winner.items()}
    if not shapes:
        raise ValueError("an entry without shapes")
    return call, winner


def _identity() -> dict[str, Any]:
    """What a file must say of itself to count here."""
    chip = this_chip()
    return {
        "format": _FORMAT,
        "chip": chip.name,
        "architecture": chip.architecture,
        "mlx": mx.__version__,
        "kernels": sources_hash(Path(__file__).parent),
    }


def _ratio(a: Call, b: Call) -> float:
    sizes = sorted((max(a.elements, 1), max(b.elements, 1)))
    return sizes[1] / sizes[0]


def _unusable(path: Path, error: OSError) -> OptionError:
    return OptionError(
        f"{path.parent} cannot be written ({error.strerror or error}); set {CACHE_VARIABLE} to a folder that can."
    )
