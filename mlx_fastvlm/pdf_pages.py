"""Pages of PDF documents as pixels, through PDFium (the pypdfium2 package, in the extra `formats`).

Knows nothing of images otherwise: `image_decoding` calls it when it meets a document's bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlx_fastvlm.errors import ImageError

if TYPE_CHECKING:
    from pypdfium2 import PdfDocument

LONG_SIDE = 2048  # pixels of a page's longer side: twice what the vision tower sees, so that small print stays sharp

_PASSWORD_NEEDED = 4  # FPDF_ERR_PASSWORD in PDFium's fpdfview.h
_lock = threading.Lock()  # PDFium may be entered by one thread at a time


def is_pdf(data: bytes) -> bool:
    """Whether these are a PDF document's bytes; readers allow for some junk before the header."""
    return b"%PDF-" in data[:1024]


def count_pages(path: Path) -> int:
    """How many pages a document has. Reads only its tables. Raises ImageError as `render_page` does."""
    with _opened(path, str(path)) as document:
        return len(document)


def render_page(data: bytes, page: int, name: str) -> np.ndarray:
    """Draw one page on white, with its annotations and filled-in forms.

    Args:
        data: the document.
        page: its number, from 1.
        name: what messages call the document, as a sentence's first words.

    Returns:
        (H, W, 3) uint8 RGB. The longer side has `LONG_SIDE` pixels whatever size the document states.

    Raises:
        ImageError: pypdfium2 is missing, the document is encrypted or damaged, or has no such page.
    """
    with _opened(data, name) as document:
        document.init_forms()  # before any page is counted or loaded, or forms stay empty
        count = len(document)
        if not 1 <= page <= count:
            raise ImageError(f"{name} has {count} {'page' if count == 1 else 'pages'}; page {page} does not exist.")
        sheet = document[page - 1]
        longer = max(sheet.get_size())
        if not 0 < longer < float("inf"):
            raise ImageError(f"{name} is damaged: page {page} states no usable size. Get a new copy.")
        bitmap = sheet.render(scale=LONG_SIDE / longer, rev_byteorder=True)
        return bitmap.to_numpy()[:LONG_SIDE, :LONG_SIDE].copy()  # rounding up may have added one row or column


@contextmanager
def _opened(document: bytes | Path, name: str) -> Iterator[PdfDocument]:
    """The document, open while the lock is held; closed in this thread, not by the garbage collector in any other."""
    try:
        import pypdfium2  # here, because most runs see no PDF document and it takes 65 ms
    except ImportError:
        raise ImageError(f"{name} is a PDF document: run `pip install 'mlx-fastvlm[formats]'` to read it.") from None
    with _lock:
        try:
            opened = pypdfium2.PdfDocument(document)
            try:
                yield opened
            finally:
                opened.close()
        except (RuntimeError, ValueError, ArithmeticError, OSError) as error:  # PdfiumError is a RuntimeError
            if getattr(error, "err_code", None) == _PASSWORD_NEEDED:
                raise ImageError(f"{name} is encrypted: save a copy of it without a password.") from None
            reason = str(error).rstrip(".")
            raise ImageError(
                f"{name} is damaged: the PDF document cannot be read ({reason}). Get a new copy."
            ) from error
