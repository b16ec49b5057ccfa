"""Settings of a configuration file, by key; ValueError names the file, the key, what is there and
what is accepted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from ..errors import among, nearest
from ..numbers import is_number

Config = Mapping[str, object]


def integer(source: Path, config: Config, key: str, least: int = 1) -> int:
    value = _needed(source, config, key)
    if type(value) is not int or value < least:
        raise ValueError(f"{source}: {key} is {value!r}, an integer of at least {least} is needed")
    return value


def positive(source: Path, config: Config, key: str) -> float:
    value = _needed(source, config, key)
    if not is_number(value) or not value > 0:
        raise ValueError(f"{source}: {key} is {value!r}, a positive number is needed")
    return float(value)


def flag(source: Path, config: Config, key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{source}: {key} is {value!r}, true or false is needed")
    return value


def mapping(source: Path, config: Config, key: str) -> Config:
    """An object; where there is none, an empty one."""
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{source}: {key} is {value!r}, an object is needed")
    return value or {}


def one_of(source: Path, config: Config, key: str, choices: Collection[str], why: str = "") -> str:
    """`why` ends what is said of a value that is none of them."""
    value = config.get(key)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{source}: {key} is {among(value, choices)}{why}")
    return value


def _needed(source: Path, config: Config, key: str) -> object:
    if key not in config:
        raise ValueError(f"{source}: lacks {key}{nearest(key, config, 'is it called', 0.75)}")
    return config[key]
