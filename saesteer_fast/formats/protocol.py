"""What a format is: the members of its module, which formats/__init__.py calls."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

from ..weights import Weights

Fields = dict[str, object]
"""The arguments of `SAE`, by name."""


@runtime_checkable
class Format(Protocol):
    """A module whose first lines say what the files hold, and which version of which library says
    so. Nothing in a file is executed."""

    __name__: str
    """Its last part is what the format is called."""

    FILES: tuple[str, ...]
    """Every file that `load` may read in an SAE's folder, by its path there, needed or not: what is
    fetched of a folder on the Hub."""

    NEEDED: str
    """Those that must be there, in the words of an error."""

    def recognises(self, path: Path) -> bool:
        """Whether the folder or file at `path` is in this format, by the names of files alone; also
        where a file is missing, which `load` then names."""

    def load(self, path: Path) -> Fields:
        """Of the SAE at `path`; weights on the CPU, in the file's dtype, `b_enc` with nothing
        subtracted.

        Raises FileNotFoundError for a file that is missing, and ValueError, which begins with the
        file's path, for one that is broken, and for an SAE that `SAE` cannot express exactly.
        """


@runtime_checkable
class Writable(Format, Protocol):
    """A format in which SAEs are saved too."""

    def save(self, sae: Weights, folder: Path) -> None:
        """Write `folder` by files.write_folder, what order.writers gives among its files.

        Raises ValueError, before anything is written, for an SAE that the format cannot express.
        """
