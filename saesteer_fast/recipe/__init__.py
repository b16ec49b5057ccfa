"""Recipes: the steerings of one model as data, kept in a steering file, attached all or none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from torch import nn

from ..attach import Handle, steering
from ..choice import Impl
from ..conditions import When
from ..edits import Configurations
from ..errors import named, nearest_file
from ..plan import ErrorTerm, Reading, Rows
from ..sae import SAE
from ..scopes import Scope, Scoped

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class Steering:
    """The arguments of sf.steering, less the model, as data.

    Raises TypeError for an SAE or edits of another kind, ValueError for a scope that is none; the
    rest is looked at where the recipe is attached.
    """

    sae: SAE | str | os.PathLike[str]
    """An SAE, or where one lies, as SAE.load takes it."""
    edits: Configurations
    layer: int | str | None = None
    scope: Scope = "all"
    rows: Rows | None = None
    when: When | None = None
    error: ErrorTerm = "keep"
    measure: Reading | None = None
    impl: Impl = "auto"

    def __post_init__(self):
        if not isinstance(self.sae, SAE | str | os.PathLike):
            raise TypeError(f"sae: got {type(self.sae).__name__}, an sf.SAE or a path is needed")
        rows = self.edits if isinstance(self.edits, Sequence) else [self.edits]
        for edits in rows:
            if not isinstance(edits, Mapping):
                kind = type(edits).__name__
                raise TypeError(f"edits: got {kind}, a mapping or a list of mappings is needed")
        Scoped(self.scope)

    def arguments(self) -> dict[str, object]:
        """Of sf.steering, by keyword: all but the model, the SAE and the edits."""
        names = ("layer", "scope", "rows", "when", "error", "measure", "impl")
        return {name: getattr(self, name) for name in names}

    @property
    def is_table(self) -> bool:
        """Whether its edits are configurations by name."""
        return any(isinstance(key, str) for key in self.edits)

    def of_a_batch(self) -> Iterator[str]:
        """The arguments that are for the rows of one batch."""
        if self.rows is not None:
            yield "rows"
        if not isinstance(self.edits, Mapping):
            yield "edits"
        if Scoped(self.scope).masks:
            yield "scope"


@dataclass(frozen=True, eq=False)
class Recipe:
    """Steerings, in the order in which they are attached and act."""

    steerings: Sequence[Steering]
    model: str | None = None
    """Of which model they are: a name or a path, for people to read; nothing is checked by it."""

    def __post_init__(self):
        if not isinstance(self.steerings, Sequence):
            kind = type(self.steerings).__name__
            raise TypeError(f"steerings: got {kind}, a list of sf.Steering is needed")
        if not self.steerings:
            raise ValueError("steerings: there are none, so nothing would be steered")
        for place, step in enumerate(self.steerings):
            if not isinstance(step, Steering):
                kind = type(step).__name__
                raise TypeError(f"steerings[{place}]: got {kind}, an sf.Steering is needed")

    def attach(self, model: nn.Module) -> Handles:
        """Attach all of them to `model`, or none: the handles, which one `with` removes.

            with sf.load_steering("refuse.json").attach(model) as (handle,):
                model.generate(...)

        An SAE that steerings in a row name is read once. Raises what SAE.load and sf.steering do,
        the place in the file before the argument's name.
        """
        with ExitStack() as undo:

            def attach(step: Steering, sae: SAE) -> Handle:
                handle = steering(model, sae, step.edits, **step.arguments())
                undo.push(handle)
                return handle

            return Handles(self.each(attach), undo.pop_all())

    def each(self, do: Callable[[Steering, SAE], Made]) -> list[Made]:
        """What `do` makes of every steering and its SAE; errors inside begin with the place."""
        load, made = lru_cache(1)(load_sae), []
        for place, step in enumerate(self.steerings):
            with named(f"steerings[{place}]."):
                made.append(do(step, load(step.sae)))
        return made

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a steering file that load_steering reads; it takes `path`'s place when complete.

        Paths of SAEs are written relative to it, strengths as numbers, a gate's weights inline.
        Raises FileNotFoundError where there is no folder for it; ValueError for a path that does
        not end in .json and, naming the place, for what is no data: an SAE in memory alone, or a
        gate that a callable decides.
        """
        from . import document

        document.write(self, Path(os.path.expanduser(path)))


class Handles(tuple[Handle, ...]):
    """The handles of one recipe. Leaving its `with` block removes them all."""

    def __new__(cls, handles: Sequence[Handle], undo: ExitStack) -> Handles:
        made = super().__new__(cls, handles)
        made._undo = undo
        return made

    def remove(self) -> None:
        """Stop steering, as Handle.remove does. Removing twice does no harm."""
        self._undo.close()

    def __enter__(self) -> Handles:
        try:
            for handle in self:
                handle.__enter__()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._undo.__exit__(*exc_info)


def load_steering(path: str | os.PathLike[str]) -> Recipe:
    """Read a steering file: `.json`, or what lm-evaluation-harness takes as `steer_path`.

    `saesteer_fast.recipe.document` describes the JSON, `saesteer_fast.recipe.lm_eval` what is read
    of the harness's `.csv` and `.pt` files. SAEs are read when the recipe is attached, and nothing
    in a file is executed. Raises TypeError, FileNotFoundError, and ValueError that names the place
    in the file, what is there, what is accepted, and the nearest of it.
    """
    from . import document, lm_eval

    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: got {type(path).__name__}, the path of a steering file is needed")
    path = Path(os.path.expanduser(path))
    readers = {
        ".json": document.read,
        ".csv": lm_eval.read_csv,
        ".pt": lm_eval.read_vectors,
        ".pth": lm_eval.read_vectors,
    }
    if path.is_dir():
        raise ValueError(f"path: {path} is a folder; accepted are files, {', '.join(readers)}")
    if not path.is_file():
        raise FileNotFoundError(f"path: no file {path}{nearest_file(path, readers)}")
    if path.suffix not in readers:
        raise ValueError(f"path: {path} is no steering file; accepted are {', '.join(readers)}")
    return readers[path.suffix](path)


def load_sae(sae: SAE | str) -> SAE:
    """What a Steering has as `sae`, in memory."""
    if isinstance(sae, SAE):
        return sae
    with named("sae: "):
        return SAE.load(sae)
