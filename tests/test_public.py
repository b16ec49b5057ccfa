"""What `import saesteer_fast as sf` gives: its names, their types, and what they hide."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator
from typing import get_args, get_type_hints

import pytest
import torch

import saesteer_fast as sf
from saesteer_fast import ops
from saesteer_fast.choice import Impl
from saesteer_fast.scopes import NAMED, Named


def test_no_public_name_hides_a_module():
    """`import saesteer_fast.steering as m` would bind the function."""
    modules = {module.name for module in pkgutil.iter_modules(sf.__path__)}
    assert not modules & set(sf.__all__)


@pytest.mark.parametrize("name", sf.__all__)
def test_types_in_public_signatures_are_public(name):
    ours = {kind for hint in hints(getattr(sf, name)) for kind in classes(hint)}
    assert {kind.__name__ for kind in ours} <= set(sf.__all__)


def hints(thing) -> Iterator[object]:
    """Of a function, or of a class's fields, methods and properties."""
    if inspect.isfunction(thing):
        yield from get_type_hints(thing).values()
    elif inspect.isclass(thing):
        yield from get_type_hints(thing).values()
        for name, member in vars(thing).items():
            function = getattr(member, "fget", getattr(member, "__func__", member))
            if not name.startswith("_") and inspect.isfunction(function):
                yield from get_type_hints(function).values()


def classes(hint) -> Iterator[type]:
    """Those of ours in it."""
    if inspect.isclass(hint) and hint.__module__.startswith("saesteer_fast"):
        yield hint
    for inner in hint if isinstance(hint, list) else get_args(hint):
        yield from classes(inner)


@pytest.mark.parametrize("name", sf.__all__)
def test_what_is_public_is_explained(name):
    thing = getattr(sf, name)
    members = vars(thing).items() if inspect.isclass(thing) else ()
    public = [getattr(thing, key) for key, _ in members if not key.startswith("_")]
    explained = [each for each in (thing, *public) if inspect.isroutine(each) or each is thing]
    is_alias = not (inspect.isfunction(thing) or inspect.isclass(thing))  # of types, or a string
    assert is_alias or all(inspect.getdoc(each) for each in explained)


def test_names_for_type_checkers_are_those_that_are_accepted():
    assert set(get_args(Named)) == set(NAMED)
    with pytest.raises(ValueError, match=f"accepted are {', '.join(get_args(Impl))};.*'cuda'"):
        ops.project(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), impl="cuad")
