"""Reading a JSON file that comes from outside: bounded in size, and every way it can be damaged is one clear error.

What its fields mean is the caller's matter.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

from mlx_fastvlm.errors import FastVLMError

MAX_BYTES = 2**26  # the largest such files, a tokenizer's, have about 11 MB


def read_json_object(
    path: Path | zipfile.Path,
    error_class: type[FastVLMError],
    *,
    if_missing: str | None = None,
    shown: Path | None = None,
) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file, which may lie in a zip.
        error_class: what is raised.
        if_missing: the message if there is no such file, in place of one that tells to finish the download.
        shown: what messages call the file, where `path` is a temporary copy.

    Raises:
        FastVLMError: `error_class`; the file is missing, unreadable, larger than MAX_BYTES, not JSON, or holds no object.
    """
    shown = shown or path
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES / 1e6:.0f} MB")
        value = json.loads(content.decode("utf-8"))
    except FileNotFoundError:
        raise error_class(if_missing or f"{shown.parent} has no {shown.name}; finish the download.") from None
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        # RuntimeError: a zip's encrypted member, and a million nested brackets (RecursionError).
        raise error_class(f"{shown} cannot be read as JSON ({error}); download or convert the model again.") from None
    if not isinstance(value, dict):
        raise error_class(f"{shown} holds a JSON {type(value).__name__}; expected an object.")
    return value
