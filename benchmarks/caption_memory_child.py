"""The measuring process of caption-memory's --through python: a loop over `caption_images` that tells what it holds.

Argument: JSON of [model folder, folder of pictures, batch size, pictures from one report to the next]. Standard output:
one JSON line a report, the fields of `caption_memory.Sample`, or {"error": why}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import mlx.core as mx

from mlx_fastvlm import caption_images, load
from mlx_fastvlm.errors import FastVLMError

from .child import claim_stdout, send
from .machine import resident_bytes


def main() -> None:
    folder, pictures, batch_size, step = json.loads(sys.argv[1])
    replies = claim_stdout()
    try:
        model, processor = load(folder)
        paths = sorted(Path(pictures).iterdir())
        for done, caption in enumerate(caption_images(model, processor, paths, batch_size=batch_size), start=1):
            if caption.error:
                send(replies, {"error": caption.error})
                return
            if done % step == 0 or done == len(paths):
                held = {"mlx_active": mx.get_active_memory(), "mlx_cache": mx.get_cache_memory()}
                send(replies, {"done": done, "rss": resident_bytes(os.getpid()), **held})
    except FastVLMError as error:
        send(replies, {"error": str(error)})


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
