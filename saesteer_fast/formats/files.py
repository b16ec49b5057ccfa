"""What every format does with files: JSON, tensors in, a folder out, nothing executed.

Weights are read in blocks, each straight to its place, so that a matrix that lies transposed in
its file takes no more memory than one that does not.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import nearest

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What weights may be stored in."""
_NUMBERS = DTYPES | {"I64": torch.int64}
BLOCK = 1 << 21
"""Bytes read at once."""

FOLD = "fold() the SAE first (saesteer convert --fold)"
"""The way out where a format has no place for scale or decoder norms."""

_CHECKSUM = "crc32."
_LFS = b"version https://git-lfs"


def absolute(path: str | os.PathLike[str]) -> Path:
    """`path` from the root on, without "..", which leads on from where a link before it leads.

    Other links keep their names, for these may tell a hookpoint.
    """
    parts = (Path.cwd() / os.path.expanduser(path)).parts
    end = len(parts) - parts[::-1].index("..") if ".." in parts else 0
    return Path(os.path.realpath(Path(*parts[:end])) if end else "", *parts[end:])


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file; ValueError if it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, an object is needed")
    return content


class Tensors:
    """The tensors of one file, by key: shapes and dtypes at once, numbers when asked for."""

    def __init__(self, path: Path):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.columns: set[str] = set()
        """Matrices whose columns follow each other in the file, not their rows."""

    def open(self, key: str) -> AbstractContextManager[BinaryIO]:
        """A stream that begins with the numbers of one tensor."""
        raise NotImplementedError

    def read(self, key: str, turned: bool = False) -> Tensor:
        """One tensor in memory of its own, contiguous; a matrix transposed if `turned`."""
        shape = self.shapes[key]
        out = torch.empty(shape[::-1] if turned else shape, dtype=_NUMBERS[self.dtypes[key]])
        if turned == (key in self.columns):
            for _ in self.blocks(key, out):
                pass
        else:
            for begin, block in self.blocks(key):
                out.T[begin : begin + len(block)] = block
        return out

    def blocks(self, key: str, out: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """Rows of one tensor (columns, of self.columns), and the number of the first of them.

        They are parts of `out`, or else each is gone when the next one comes.
        """
        dtype, shape = _NUMBERS[self.dtypes[key]], self.shapes[key]
        total, *rest = shape[::-1] if key in self.columns else shape
        width = dtype.itemsize * prod(rest)
        step = min(total, max(1, BLOCK // width))
        memory = memoryview(bytearray(step * width) if out is None else _bytes(out))
        with self.open(key) as stream:
            for begin in range(0, total, step):
                start = 0 if out is None else begin * width
                part = memory[start : start + min(step, total - begin) * width]
                if stream.readinto(part) != len(part):
                    raise ValueError(f"{self.path}: {key} is cut short")
                yield begin, torch.frombuffer(part, dtype=dtype).reshape(-1, *rest)


class Safetensors(Tensors):
    """A safetensors file; where it carries checksums, as those saved here do, they are checked."""

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            # pread and not mmap: a file that is cut short or replaced later would kill the process.
            with safe_open(path, framework="pt", backend="pread") as file:
                self.sums = file.metadata() or {}
                for key in file.keys():
                    self.shapes[key] = tuple(file.get_slice(key).get_shape())
                    self.dtypes[key] = file.get_slice(key).get_dtype()
        except SafetensorError as error:
            raise ValueError(
                f"{path}: not a whole safetensors file ({error}){_what(path)}"
            ) from None

    @contextmanager
    def open(self, key: str) -> Iterator[BinaryIO]:
        # Its slices read the whole tensor each time.
        with self.path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
            stream.seek(8 + length + header[key]["data_offsets"][0])
            yield stream

    def blocks(self, key: str, out: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        crc, wanted = 0, self.sums.get(_CHECKSUM + key)
        for begin, block in super().blocks(key, out):
            crc = checksum(block, crc) if wanted else 0
            yield begin, block
        if wanted not in (None, f"{crc:08x}"):
            raise ValueError(f"{self.path}: {key} is damaged: its checksum differs")


def checksum(tensor: Tensor, crc: int = 0) -> int:
    """CRC-32 of a tensor's bytes, continuing `crc`."""
    return zlib.crc32(_bytes(tensor), crc)


def _bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a contiguous tensor, shared with it."""
    return tensor.view(-1).view(torch.uint8).numpy()


Layout = Mapping[str, tuple[str, str]]
"""Of each key in a file the argument of SAE it is, and its sizes, as in {"W_enc": ("W_enc", "dN")};
what is "dN" in the file is read transposed."""


def read_weights(
    tensors: Tensors, layout: Layout, sizes: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """Exactly the tensors of `layout`, as arguments of SAE.

    Sizes are {"N": ..., "d": ...} as a configuration has them; without one, the first matrix tells.
    ValueError, naming the key, if one is missing, unknown, of another shape, or not of DTYPES.
    """
    path = tensors.path
    require_keys(path, set(tensors.shapes), set(layout))
    if sizes is None:
        key, (_, letters) = next(item for item in layout.items() if len(item[1][1]) == 2)
        shape = tensors.shapes[key]
        if len(shape) != 2 or 0 in shape:
            wanted = f"[{', '.join(letters)}]"
            raise ValueError(f"{path}: {key} has shape {shape}, {wanted} is needed, none of them 0")
        sizes = dict(zip(letters, shape, strict=True))
    for key, (_, letters) in layout.items():
        require_tensor(tensors, key, tuple(sizes[letter] for letter in letters))
    return {
        name: tensors.read(key, turned=letters == "dN") for key, (name, letters) in layout.items()
    }


def require_keys(path: Path, found: set[str], wanted: set[str]) -> None:
    missing, unknown = sorted(wanted - found), sorted(found - wanted)
    if missing:
        hint = nearest(missing[0], unknown, "is it called")
        raise ValueError(f"{path}: lacks {', '.join(missing)}{hint}")
    if unknown:
        raise ValueError(f"{path}: holds {', '.join(unknown)} besides {', '.join(sorted(wanted))}")


def require_tensor(tensors: Tensors, key: str, wanted: tuple[int, ...]) -> None:
    """ValueError for a tensor that is not of DTYPES, or of another shape."""
    path, dtype, got = tensors.path, tensors.dtypes[key], tensors.shapes[key]
    if dtype not in DTYPES:
        raise ValueError(f"{path}: {key} is {dtype}, accepted are {', '.join(DTYPES)}")
    if got != wanted:
        hint = "; it is transposed" if len(wanted) == 2 and got == wanted[::-1] else ""
        raise ValueError(f"{path}: {key} has shape {got}, {wanted} is needed{hint}")


def _what(path: Path) -> str:
    """What it is in place of safetensors, where that can be told."""
    with path.open("rb") as file:
        begins = file.read(len(_LFS))
    if begins.startswith((b"PK", b"\x80\x02")):
        return "; it is a pickle, which is never executed"
    if begins == _LFS:
        return "; it is what Git LFS has in its place: `git lfs pull` brings it"
    return "; it is a web page" if begins.lstrip().startswith(b"<") else ""


def require_files(folder: Path, names: tuple[str, ...]) -> None:
    """FileNotFoundError for the first of `names` that `folder` lacks."""
    for name in names:
        if not (folder / name).is_file():
            found = [entry.name for entry in folder.iterdir()]
            raise FileNotFoundError(f"{folder}: lacks {name}{nearest(name, found, 'is it called')}")


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # safetensors refuses tensors that are one in memory, as tied weights are.
        tied = any(tensor.data_ptr() == other.data_ptr() for other in apart.values())
        apart[name] = (tensor.clone() if tied else tensor).cpu().contiguous()
    # It also makes files that only their owner can read, whatever the umask says.
    path.touch()
    mode = path.stat().st_mode
    sums = {_CHECKSUM + key: f"{checksum(tensor):08x}" for key, tensor in apart.items()}
    save_file(apart, path, metadata={"format": "pt"} | sums)
    path.chmod(mode)


def write_folder(folder: Path, writers: Mapping[str, Callable[[Path], None] | None]) -> None:
    """Write `{file name: what writes it}` into `folder`: all on disk first, then put in place.

    What nothing writes is removed.
    """
    folder = Path(os.path.realpath(folder))  # a link may lead to another disk
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        written = [name for name, write in writers.items() if write is not None]
        for name in written:
            writers[name](Path(scratch, name))
            _sync(Path(scratch, name))
        folder.mkdir(exist_ok=True)
        for name in writers.keys() - written:
            (folder / name).unlink(missing_ok=True)
        for name in written:
            os.replace(Path(scratch, name), folder / name)
        _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
