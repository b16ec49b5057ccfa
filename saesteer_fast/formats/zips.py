"""Tensors in zip archives, .pt and .npz, read as a stream of blocks with its checksum checked.

Of a .pt file torch reads the pickle, weights_only and without the numbers; of an .npz nothing can
be a pickle.
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from numpy.lib import format as npy
from torch import Tensor

from .files import DTYPES, Tensors

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SCALARS = {"torch.int32": torch.int32, "torch.int64": torch.int64, **DTYPES}
_NUMPY = {"<f4": "F32", "<f2": "F16"}
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class _Member(NamedTuple):
    name: str
    """Of the member of the archive."""
    skip: int
    """Bytes before the numbers."""


class _Zipped(Tensors):
    """Tensors that each lie, dense, in one member of an archive."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.members: dict[str, _Member] = {}
        try:
            self.archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(
                f"{path}: not a whole zip archive, which {path.suffix} files are ({error})"
            ) from None

    @contextmanager
    def open(self, key: str) -> Iterator[BinaryIO]:
        name, skip = self.members[key]
        try:
            with self.archive.open(name) as stream:
                stream.read(skip)
                yield stream
                stream.read()  # to its end, where its checksum is compared
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self.path}: {key} is damaged ({error})") from None


class Torch(_Zipped):
    """A state dict that torch.save wrote; what is no tensor is in `settings`."""

    def __init__(self, path: Path):
        super().__init__(path)
        # First, because swapping the bytes of numbers that have no memory ends the process.
        orders = [name for name in self.archive.namelist() if name.endswith("/byteorder")]
        if any(self.archive.read(name) != b"little" for name in orders):
            raise ValueError(f"{path}: its numbers are big-endian, little-endian ones are needed")
        try:
            content = _load_without_numbers(path)
        except OSError:
            raise
        except Exception as error:  # a damaged pickle raises anything
            raise ValueError(f"{path}: {_refusal(error)}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path}: holds a {type(content).__name__}, a state dict is needed")
        self.settings = {}
        begins = self._begins()
        for key, value in content.items():
            if not isinstance(value, Tensor):
                self.settings[key] = value
                continue
            self.shapes[key] = tuple(value.shape)
            self.dtypes[key] = _NAMES.get(value.dtype, str(value.dtype))
            self.members[key] = self._member(key, value, begins)
            if not value.is_contiguous():
                self.columns.add(key)

    def scalar(self, key: str) -> float:
        """The number that a tensor without dimensions holds."""
        dtype = _SCALARS.get(self.dtypes[key])
        if self.shapes[key] != () or dtype is None:
            raise ValueError(f"{self.path}: {key} is no number")
        with self.open(key) as stream:
            return torch.frombuffer(bytearray(stream.read(dtype.itemsize)), dtype=dtype).item()

    def _begins(self) -> dict[int, str]:
        """The members by where in the file their bytes begin."""
        begins = {}
        with self.path.open("rb") as file:
            for info in self.archive.infolist():
                file.seek(info.header_offset + 26)
                begins[info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))] = (
                    info.filename
                )
        return begins

    def _member(self, key: str, value: Tensor, begins: dict[int, str]) -> _Member:
        if not (value.is_contiguous() or (value.ndim == 2 and value.T.is_contiguous())):
            raise ValueError(f"{self.path}: {key} is a view with gaps, a dense tensor is needed")
        if value.is_neg():
            raise ValueError(f"{self.path}: {key} is a negated view, its own numbers are needed")
        name = begins.get(value.untyped_storage()._checkpoint_offset)
        if name is None:
            raise ValueError(f"{self.path}: {key} lies where no member of the archive does")
        return _Member(name, value.storage_offset() * value.dtype.itemsize)


def _refusal(error: Exception) -> str:
    """Without torch's own words, which advise to load the file unsafely."""
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"holds objects that would have to be executed ({found[1]}), and is not opened; "
            "accepted are tensors and settings"
        )
    return "is damaged, or holds more than tensors and settings, and is not opened"


def _load_without_numbers(path: Path) -> object:
    """What torch.save wrote; tensors have no memory, their storages know where the numbers lie."""
    content = torch.load(path, weights_only=True, map_location="meta")
    if not isinstance(content, dict) or all(map(_placed, content.values())):
        return content
    # PyTorch 2.10 says it only to fake tensors, which take seconds to import.
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.load(path, weights_only=True)


def _placed(value: object) -> bool:
    return not isinstance(value, Tensor) or value.untyped_storage()._checkpoint_offset is not None


class Numpy(_Zipped):
    """The arrays that numpy.savez wrote."""

    def __init__(self, path: Path):
        super().__init__(path)
        for name in self.archive.namelist():
            key = name.removesuffix(".npy")
            with self.archive.open(name) as stream:
                try:
                    shape, columns, dtype = _HEADERS[npy.read_magic(stream)](stream)
                except (ValueError, KeyError) as error:
                    raise ValueError(f"{path}: {key} is no array ({error})") from None
                except zipfile.BadZipFile as error:
                    raise ValueError(f"{path}: {key} is damaged ({error})") from None
                self.shapes[key] = shape
                self.dtypes[key] = _NUMPY.get(dtype.str, str(dtype))
                self.members[key] = _Member(name, stream.tell())
                if columns and len(shape) == 2:
                    self.columns.add(key)
