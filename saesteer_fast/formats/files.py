"""What every format does with files: JSON and safetensors in, a folder out, nothing executed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import nearest

FLOATS = ("F32", "BF16", "F16")


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file; ValueError if it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, an object is needed")
    return content


def read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Exactly the tensors `shapes` names, in the file's dtypes, in memory of their own.

    ValueError, naming the key, if one is missing, unknown, of another shape, or not of FLOATS.
    """
    try:
        # pread and not mmap: a file that is cut short or replaced later would kill the process.
        with safe_open(path, framework="pt", backend="pread") as file:
            found = {key: file.get_slice(key) for key in file.keys()}
            _check_keys(path, set(found), set(shapes))
            for key, shape in shapes.items():
                _check_tensor(f"{path}: {key}", found[key], shape)
            return {key: file.get_tensor(key) for key in shapes}
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}){_pickled(path)}"
        ) from None


def _check_keys(path: Path, found: set[str], wanted: set[str]) -> None:
    missing, unknown = sorted(wanted - found), sorted(found - wanted)
    if missing:
        hint = nearest(missing[0], unknown, "is it called")
        raise ValueError(f"{path}: lacks {', '.join(missing)}{hint}")
    if unknown:
        raise ValueError(f"{path}: holds {', '.join(unknown)} besides {', '.join(sorted(wanted))}")


def _check_tensor(name: str, tensor, shape: tuple[int, ...]) -> None:
    if tensor.get_dtype() not in FLOATS:
        raise ValueError(f"{name} is {tensor.get_dtype()}, accepted are {', '.join(FLOATS)}")
    got = tuple(tensor.get_shape())
    if got != shape:
        hint = "; it is transposed" if len(shape) == 2 and got == shape[::-1] else ""
        raise ValueError(f"{name} has shape {got}, the configuration makes it {shape}{hint}")


def _pickled(path: Path) -> str:
    with path.open("rb") as file:
        magic = file.read(2)
    return "; it is a pickle, which is never executed" if magic in (b"PK", b"\x80\x02") else ""


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # safetensors refuses tensors that are one in memory, as tied weights are.
        tied = any(tensor.data_ptr() == other.data_ptr() for other in apart.values())
        apart[name] = tensor.clone().cpu() if tied else tensor.cpu()
    # It also makes files that only their owner can read, whatever the umask says.
    path.touch()
    mode = path.stat().st_mode
    save_file(apart, path)
    path.chmod(mode)


def write_folder(folder: Path, writers: Mapping[str, Callable[[Path], None]]) -> None:
    """Write `{file name: what writes it}` into `folder`: all on disk first, then put in place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        for name, write in writers.items():
            write(Path(scratch, name))
            _sync(Path(scratch, name))
        folder.mkdir(exist_ok=True)
        for name in writers:
            os.replace(Path(scratch, name), folder / name)
        _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
