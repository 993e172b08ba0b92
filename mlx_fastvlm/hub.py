"""Fetching checkpoints from the Hugging Face hub; the only file that knows huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from mlx_fastvlm.errors import HubError

_PATTERNS = ("*.json", "*.safetensors", "merges.txt", "*.jinja", "LICENSE*", "README.md")


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form owner/model."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def download_checkpoint(hub_id: str, revision: str | None = None) -> Path:
    """Download a checkpoint, or what is missing of it, into the hub's own cache; interrupted downloads resume.

    Progress bars go to stderr.

    Returns:
        The folder with the files; its name is the commit.

    Raises:
        HubError: the model is neither cached nor reachable, does not exist, or needs permission.
    """
    # Imported here: huggingface_hub is slow to load and not needed once a model is converted.
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=list(_PATTERNS), ignore_patterns=["*/*"])
        )
    except hub_errors.HFValidationError:
        raise HubError(f"{hub_id!r} is not a valid hub id; expected owner/name, such as apple/FastVLM-0.5B.") from None
    except hub_errors.GatedRepoError:
        raise HubError(f"{hub_id} needs permission: accept its terms on the hub, then run `hf auth login`.") from None
    except hub_errors.RevisionNotFoundError:
        raise HubError(
            f"{hub_id} has no revision {revision!r}; see its 'Files and versions' page on the hub."
        ) from None
    except hub_errors.RepositoryNotFoundError:
        raise HubError(f"There is no model {hub_id} on the hub (or it is private: run `hf auth login`).") from None
    except (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError, OSError) as error:
        raise HubError(_unreachable(hub_id, error)) from None
    except Exception as error:
        # The HTTP library's own errors have no base class that huggingface_hub would export.
        if type(error).__module__.split(".")[0] in {"httpx", "httpx2", "httpcore", "httpcore2", "requests"}:
            raise HubError(_unreachable(hub_id, error)) from None
        raise


def _unreachable(hub_id: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0].rstrip(".:") if str(error).strip() else type(error).__name__
    return (
        f"{hub_id} is neither in the cache nor can it be downloaded ({reason[:160]}). Check the network, "
        "or try the built-in model: --model demo."
    )
