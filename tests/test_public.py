"""What `import saesteer_fast as sf` gives: its names, and what they hide."""

from __future__ import annotations

import pkgutil

import saesteer_fast as sf


def test_no_public_name_hides_a_module():
    """`import saesteer_fast.steering as m` would bind the function."""
    modules = {module.name for module in pkgutil.iter_modules(sf.__path__)}
    assert not modules & set(sf.__all__)
