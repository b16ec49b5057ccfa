"""Tensors in zip archives, .pt and .npz, read as a stream of blocks with its checksum checked.

Of a .pt file torch reads the pickle, weights_only and without the numbers; of an .npz nothing can
be a pickle.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from numpy.lib import format as npy
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .files import BLOCK, DTYPES, Tensors

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
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

    def blocks(self, key: str) -> Iterator[tuple[int, Tensor]]:
        """Rows as they lie in the archive."""
        member, dtype = self.members[key], DTYPES[self.dtypes[key]]
        shape = self.shapes[key][::-1] if key in self.columns else self.shapes[key]
        width = dtype.itemsize * (shape[1] if len(shape) == 2 else 1)
        step = max(1, BLOCK // width)
        try:
            with self.archive.open(member.name) as stream:
                stream.read(member.skip)
                for begin in range(0, shape[0], step):
                    count = min(step, shape[0] - begin)
                    yield begin, self._numbers(stream, key, dtype, (count, *shape[1:]))
                stream.read()  # to its end, where its checksum is compared
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self.path}: {key} is damaged ({error})") from None

    def _numbers(self, stream, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        wanted = dtype.itemsize
        for size in shape:
            wanted *= size
        data = bytearray(stream.read(wanted))
        if len(data) != wanted:
            raise ValueError(f"{self.path}: {key} is cut short")
        return torch.frombuffer(data, dtype=dtype).reshape(shape)


class Torch(_Zipped):
    """A state dict that torch.save wrote; what is no tensor is in `settings`."""

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            # No tensor gets memory; each is told where in the file its numbers are.
            with FakeTensorMode():
                content = torch.load(path, weights_only=True)
        except (UnpicklingError, RuntimeError, ValueError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{path}: holds more than tensors and settings, or is damaged, and is not opened: "
                f"loading it otherwise could run code ({reason})"
            ) from None
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
        dtype = {"torch.int32": torch.int32, "torch.int64": torch.int64, **DTYPES}.get(
            self.dtypes[key]
        )
        if self.shapes[key] != () or dtype is None:
            raise ValueError(f"{self.path}: {key} is no number")
        with self.archive.open(self.members[key].name) as stream:
            stream.read(self.members[key].skip)
            return self._numbers(stream, key, dtype, (1,)).item()

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
        name = begins[value.untyped_storage()._checkpoint_offset]
        return _Member(name, value.storage_offset() * value.dtype.itemsize)


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
                self.shapes[key] = shape
                self.dtypes[key] = _NUMPY.get(dtype.str, str(dtype))
                self.members[key] = _Member(name, stream.tell())
                if columns and len(shape) == 2:
                    self.columns.add(key)
