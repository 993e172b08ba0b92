"""`mlx-fastvlm serve`: a model behind OpenAI's interface, on this machine or for others."""

from __future__ import annotations

import ipaddress
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_fastvlm.cli.options import ComputeDType, Fit, FitOption, resolution_of
from mlx_fastvlm.cli.terminal import DType, Revision, load_model, say
from mlx_fastvlm.errors import FastVLMWarning, OptionError
from mlx_fastvlm.loading import DEFAULT_MODEL

if TYPE_CHECKING:
    from mlx_fastvlm.server.app import ServedModel

_API_KEY = "MLX_FASTVLM_API_KEY"

Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        help='Hub id, model folder, or "demo"; given again, clients choose.',
        show_default=DEFAULT_MODEL,
    ),
]


def serve(
    model: Models = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8080,
    api_key: Annotated[
        str | None, typer.Option(envvar=_API_KEY, help="Clients must send this key.", show_default="no key")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers made at once.")] = 16,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 64,
    max_request_mb: Annotated[float, typer.Option(help="Largest request, in MiB.")] = 20,
    max_images: Annotated[int, typer.Option(min=1, help="Most images of a request.")] = 8,
    max_image_mp: Annotated[float, typer.Option(help="Largest image, in megapixels.")] = 50,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 1024,
    max_seconds: Annotated[float, typer.Option(help="Most time for a request, waiting included.")] = 300,
    allow_remote_images: Annotated[
        bool, typer.Option("--allow-remote-images", help="Fetch images that clients name by http(s) URLs.")
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Web pages from there may call; may be given again.", metavar="URL", show_default=False),
    ] = None,
    resolution: Annotated[
        Any,  # of what `resolution_of` gives, or None
        typer.Option(
            metavar="N|auto",
            parser=resolution_of,
            help="Pixels on a side in which the model sees pictures, where a request does not say; a multiple of 64, or "
            "auto: by their detail.",
            show_default="as trained",
        ),
    ] = None,
    fit: FitOption = None,
    dtype: ComputeDType = None,
    revision: Revision = None,
) -> None:
    """Answer OpenAI clients, and people at a page for camera and files.

    POST /v1/chat/completions; GET / (the page), /v1/models, /health, /metrics.

    \b
    mlx-fastvlm serve --model demo
    mlx-fastvlm serve --port 0
    MLX_FASTVLM_API_KEY=… mlx-fastvlm serve --host 0.0.0.0
    """
    is_local = _is_local(host)
    if not is_local and not api_key:
        raise OptionError(
            f"With --host {host} others can reach this server; choose a key for them: --api-key or {_API_KEY}."
        )
    _check_key(api_key)
    if fit is Fit.tiles:
        raise OptionError("The server cannot show pictures in tiles; choose --fit pad, crop or native.")
    _check_installed()

    from mlx_fastvlm.server.app import create_app
    from mlx_fastvlm.server.limits import Limits
    from mlx_fastvlm.server.run import Server, open_socket

    limits = Limits(
        max_batch=max_batch,
        max_queue=max_queue,
        max_request_mb=max_request_mb,
        max_images=max_images,
        max_image_mp=max_image_mp,
        max_tokens=max_tokens,
        max_seconds=max_seconds,
    )
    chosen = {"resolution": resolution, "fit": fit and fit.value}
    defaults = {name: value for name, value in chosen.items() if value is not None}
    with open_socket(host, port) as listener:
        models = [_load(name, defaults, dtype, revision) for name in model or [DEFAULT_MODEL]]
        app = create_app(
            models,
            limits=limits,
            api_key=api_key,
            local_only=is_local,
            allow_remote_images=allow_remote_images,
            cors_origins=cors_origin or (),
        )
        say(_greeting(host, listener.getsockname()[1], [served.model_id for served in models], bool(api_key)))
        with warnings.catch_warnings(), suppress(KeyboardInterrupt):  # the server has ended by then
            warnings.simplefilter("ignore", FastVLMWarning)  # of what clients choose, which its log need not tell
            Server(app, limits.grace_seconds).run(sockets=[listener])
    say("Stopped.")


def _load(model: str, defaults: Mapping[str, Any], dtype: DType | None, revision: str | None) -> ServedModel:
    from mlx_fastvlm.server.app import ServedModel

    loaded, processor = load_model(model, dtype, revision)
    processor.images_at(defaults.get("resolution"), defaults.get("fit"))  # says now what is wrong with that
    return ServedModel(_public_name(model), loaded, processor, defaults)


def _is_local(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_key(api_key: str | None) -> None:
    if api_key is not None and not re.fullmatch("[!-~]+", api_key):
        raise OptionError(
            "The API key cannot travel in a header as it is; choose one of ASCII letters, digits and signs, no spaces."
        )


def _check_installed() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise OptionError(f"The server needs {error.name}: run `pip install 'mlx-fastvlm[server]'`.") from None


def _public_name(model: str) -> str:
    """What clients call the model: a hub id as it is, but nothing of where a folder lies."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def _greeting(host: str, port: int, model_ids: Sequence[str], needs_key: bool) -> str:
    """Where the server is and how to call it."""
    name = f"[{host}]" if ":" in host else host
    page = f"http://{name}:{port}/"
    url = f"{page}v1"
    key = "KEY" if needs_key else "none"
    return (
        f"{', '.join(model_ids)} at {url}\n"
        f"  page:   {page}\n"
        f'  python: openai.OpenAI(base_url="{url}", api_key="{key}").chat.completions.create(model="{model_ids[0]}", …)\n'
        f"  shell:  curl {url}/models" + (' -H "Authorization: Bearer KEY"' if needs_key else "") + "\n"
        "Ctrl-C stops it."
    )
