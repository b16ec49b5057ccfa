"""Triton's interpreter, made quicker: for every function that a kernel calls it puts its own
meaning of the language in place once more, which takes a third of its time."""

from __future__ import annotations

import triton.language as tl
from triton.runtime import interpreter

# To put back; before Triton 3.6 nothing ever is.
_Nothing = getattr(interpreter, "_LangPatchScope", lambda: None)


def replace_once() -> None:
    """From here on only where that meaning is not in place already."""
    replace = interpreter._patch_lang

    def where_needed(fn):
        seen = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.load) for language in seen):
            return replace(fn)
        return _Nothing()

    interpreter._patch_lang = where_needed
