"""Fetching checkpoints from the Hugging Face hub; the only file that knows huggingface_hub."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from mlx_fastvlm.checkpoint_files import WEIGHT_SUFFIXES, wanted_files
from mlx_fastvlm.errors import HubError

_FILE_SUFFIXES = (".zip", ".json", *WEIGHT_SUFFIXES)


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form owner/model and does not end as a file of a checkpoint does."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not name.lower().endswith(_FILE_SUFFIXES)


def download_checkpoint(hub_id: str, revision: str | None = None) -> Path:
    """Download a checkpoint, or what is missing of it, into the hub's own cache; interrupted downloads resume.

    Only the files that the converter reads are taken (`checkpoint_files.wanted_files`). Without the network, what was
    downloaded before is used. Progress bars go to stderr.

    Returns:
        The folder with the files; its name is the commit.

    Raises:
        HubError: the model is neither cached nor reachable, does not exist, or needs permission.
    """
    # Imported here: huggingface_hub is slow to load and not needed once a model is converted.
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub import errors as hub_errors

    try:
        try:
            listed = HfApi().model_info(hub_id, revision=revision).siblings or []
        except hub_errors.RevisionNotFoundError:
            raise
        except Exception:  # the network, the hub or a permission fails: a matter only if the files are not there
            cached = _cached(hub_id, revision)
            if cached is None:
                raise
            return cached
        wanted = wanted_files(file.rfilename for file in listed)
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_exactly(wanted)))
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


def _cached(hub_id: str, revision: str | None) -> Path | None:
    """The folder of an earlier download, or None if there is none or, as far as is known, it is not whole."""
    import huggingface_hub
    from huggingface_hub import errors as hub_errors

    try:
        listing = huggingface_hub.get_cached_repo_tree(hub_id, revision=revision)
        wanted = _exactly(wanted_files(file.path for file in listing))
    except Exception:  # an earlier huggingface_hub, or a download by one: there is no listing, and no base class for it
        wanted = None
    try:
        return Path(
            huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=wanted, local_files_only=True)
        )
    except (hub_errors.LocalEntryNotFoundError, OSError):
        return None


def _exactly(names: list[str]) -> list[str]:
    """Patterns for these names alone."""
    return [glob.escape(name) for name in names]


def _unreachable(hub_id: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0].rstrip(".:") if str(error).strip() else type(error).__name__
    return (
        f"{hub_id} is neither in the cache nor can it be downloaded ({reason[:160]}). Check the network, "
        "or try the built-in model: --model demo."
    )
