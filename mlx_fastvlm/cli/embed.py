"""`mlx-fastvlm embed`: pictures in files and folders as vectors in one array, for search and research."""

from __future__ import annotations

import sys
import time
from contextlib import closing
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from mlx_fastvlm.cli.caption import named_pictures
from mlx_fastvlm.cli.options import ComputeDType, FitOption, ResolutionOption, given_settings
from mlx_fastvlm.cli.terminal import Model, Revision, counting, load_model, on_one_line, tell
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.loading import DEFAULT_MODEL


class Features(str, Enum):
    clip = "clip"
    pooled = "pooled"
    tokens = "tokens"


def embed(
    paths: Annotated[
        list[str] | None, typer.Argument(help="Pictures and folders of pictures, PDF documents, http(s) URLs.")
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE.npy",
            help="Array of float32, a row for each picture; FILE.jsonl beside it names the picture of each row.",
        ),
    ] = Path("features.npy"),
    features: Annotated[
        Features,
        typer.Option(
            help="clip: through CLIP's head, if the model has one; pooled: the tower's features, averaged; tokens: all of them."
        ),
    ] = Features.clip,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale every vector to length 1.")] = False,
    model: Model = DEFAULT_MODEL,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Also take folders inside folders.")] = False,
    files_from: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help='Take more paths from a file, one a line, or separated by null bytes; "-" for standard input.',
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files of an earlier run.")] = False,
    fail_on_bad: Annotated[
        bool, typer.Option("--fail-on-bad", help="Exit with 1 if a picture could not be read.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that read pictures.", show_default="as many as cores, up to 8")
    ] = None,
    resolution: ResolutionOption = None,
    fit: FitOption = None,
    dtype: ComputeDType = None,
    revision: Revision = None,
) -> None:
    """Make a vector of each picture, to search and compare pictures with. Those that cannot be read are left out.

    \b
    mlx-fastvlm embed photos/ --recursive --out photos.npy --normalize
    mlx-fastvlm embed *.jpg --features pooled --resolution 512
    """
    from mlx_fastvlm.embedding import check_features, embed_images
    from mlx_fastvlm.embedding_file import EmbeddingFile

    size = {"resolution": resolution, "fit": fit and fit.value}
    loading = {"dtype": dtype and dtype.value, "revision": revision}
    given = given_settings(size, loading | {"normalize": normalize or None})
    bad = 0

    def report_bad(message: str) -> None:
        nonlocal bad
        bad += 1
        tell(f"Bad: {on_one_line(message)}")

    pictures = named_pictures(paths or [], files_from, recursive, report_bad)
    settings = {"model": model, "features": features.value} | ({"options": given} if given else {})
    with closing(EmbeddingFile(out, settings, overwrite=overwrite)) as output:
        loaded, processor = load_model(model, dtype, revision)
        check_features(loaded, features.value)
        if features is Features.tokens and processor.images_at(**size).fixed_size is None:
            raise OptionError(
                "The tokens of pictures that differ in size make no array: leave out --fit native and --resolution auto."
            )
        made = embed_images(
            loaded,
            processor,
            (picture.source for picture in pictures),
            features=features.value,
            normalize=normalize,
            threads=threads,
            **size,
        )
        start = time.monotonic()
        with closing(made), counting(len(pictures), "pictures", visible=sys.stderr.isatty()) as report:
            for done, (picture, embedding) in enumerate(zip(pictures, made, strict=True), start=1):
                if embedding.vector is None:
                    report_bad(embedding.error)
                else:
                    output.add(picture, embedding.vector)
                report(done, bad)
        output.finish()
    tell(f"{output.rows} rows in {out} ({output.rows / (time.monotonic() - start):.1f}/s), {bad} bad.")
    if fail_on_bad and bad:
        raise typer.Exit(1)
