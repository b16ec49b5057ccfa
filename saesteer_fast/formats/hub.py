"""SAEs in repositories of the Hugging Face Hub: brings only the files that an SAE is made of."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import nearest

_ID = re.compile(r"(?!\.)[\w.-]+/(?!\.)[\w.-]+(/(?!\.)[\w.+=-]+)*")


def is_id(path: str) -> bool:
    """Whether `path` can be org/name, or org/name/folder/in/it."""
    return _ID.fullmatch(path) is not None


def fetch(path: str, files: Iterable[str]) -> Path:
    """The local folder or file of org/name/folder, with those of `files` that the Hub has there.

    What was fetched before is not fetched again; with HF_HUB_OFFLINE=1 nothing is. Raises
    FileNotFoundError if there is neither a folder nor a repository of that name.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError:
        raise FileNotFoundError(
            f"path: no folder {path}; to look for a repository on the Hub, install huggingface_hub"
        ) from None
    org, name, *inside = path.split("/")
    folder = "/".join(inside)
    # A folder's files, or the one file that the path itself names.
    patterns = [f"{folder}/{file}".lstrip("/") for file in files] + [folder] * bool(folder)
    try:
        root = snapshot_download(f"{org}/{name}", allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FileNotFoundError(
            f"path: no folder {path} here, and no repository {org}/{name} from the Hub ({reason})"
        ) from None
    place = Path(root, *inside)
    if not place.exists():
        here = [entry.name for entry in place.parent.glob("*")]
        raise FileNotFoundError(
            f"path: no folder {path} here, and no {folder} in {org}/{name} from the Hub that holds "
            f"an SAE{nearest(place.name, here)}"
        )
    return place
