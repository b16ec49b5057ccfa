"""What many tests stand on: a tiny Phi-3, SAEs of random weights, and an independent truth."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import ptx
import pytest
import torch
from filelock import FileLock
from ptx import cuda
from ptx.executor import Executor
from safetensors.torch import load_file
from torch import Tensor

import saesteer_fast as sf

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # bench is not installed
# Inductor would start processes that import PyTorch, to compile a graph or two.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

GOLDEN = Path(__file__).parent / "golden"
LONGEST = {"test_build", "test_compile", "test_cuda_build", "test_cuda_host", "test_cuda_races"}
LONGEST |= {"test_demo", "test_ops", "test_triton", "test_triton_ptx"}


def pytest_configure(config: pytest.Config) -> None:
    """Files in the order of this process's items, not by how many tests they have."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, so that no process is left with it at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_collection_finish() -> None:
    """What is there by now stays: the garbage collector need not look through it again."""
    gc.freeze()


@pytest.fixture
def poisoned_memory():
    """Memory that nobody wrote to holds NaN, so that reading it shows."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def golden() -> Callable[[str], SimpleNamespace]:
    """A case of golden/record.py: .folder (or file), .x, .acts, .recon, .steered, .edits, .k."""

    def case(name: str) -> SimpleNamespace:
        folder = GOLDEN / name
        case = json.loads((folder / "case.json").read_text())
        edits = dict(zip(case["features"], case["values"], strict=True))
        tensors = load_file(folder / "case.safetensors")
        place = folder / "sae" / case.get("place", "")
        return SimpleNamespace(folder=place, edits=edits, k=case["k"], **tensors)

    return case


@pytest.fixture(scope="session")
def make_sae() -> Callable[..., sf.SAE]:
    """An SAE of random weights: unit decoder rows, encoder rows that lean towards them."""

    def make(d=32, N=128, k=8, seed=0, dtype=torch.float32, hookpoint="layers.1") -> sf.SAE:
        random = torch.Generator().manual_seed(seed)
        noise, W_dec = torch.randn(2, N, d, generator=random)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        bias, b_dec = torch.randn(N, generator=random), torch.randn(d, generator=random)
        weights = dict(W_enc=W_dec + 0.1 * noise, b_enc=0.1 * bias, W_dec=W_dec, b_dec=0.3 * b_dec)
        stored = {name: tensor.to(dtype) for name, tensor in weights.items()}
        return sf.SAE(**stored, k=k, hookpoint=hookpoint)

    return make


@pytest.fixture(scope="session")
def textbook() -> Callable[..., Tensor]:
    """decode(a') + (x - decode(a)) in fp64, dense, from the unfolded biases; [..., d] fp64."""

    def steered(x: Tensor, sae: sf.SAE, edits: Mapping[int, float], mask: Tensor | None = None):
        W_enc, bias, W_dec, b_dec = (
            t.double() for t in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
        )
        stream = x.double()
        top = torch.relu((stream - b_dec) @ W_enc.T + bias).topk(sae.k, dim=-1)
        acts = stream.new_zeros(*x.shape[:-1], len(W_enc)).scatter(-1, top.indices, top.values)
        edited = acts.clone()
        for latent, value in edits.items():
            edited[..., latent] = value
        changed = (edited @ W_dec + b_dec) + (stream - (acts @ W_dec + b_dec))
        return changed if mask is None else torch.where(mask[..., None], changed, stream)

    return steered


@pytest.fixture(scope="session")
def make_phi3() -> Callable[..., torch.nn.Module]:
    """A Phi3ForCausalLM of random weights: 4 layers, 32 wide, token 0 for padding, no end token."""
    transformers = pytest.importorskip("transformers")

    def make(seed=0, **options) -> torch.nn.Module:
        torch.manual_seed(seed)
        config = transformers.Phi3Config(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )
        return transformers.Phi3ForCausalLM(config).eval()

    return make


@pytest.fixture(scope="module")
def sae(make_sae) -> sf.SAE:
    return make_sae()


@pytest.fixture(scope="module")
def model(make_phi3) -> torch.nn.Module:
    return make_phi3()


def built_once(name: str, build: Callable[[Path], Path], made_of: bytes) -> Path:
    """What `build` makes in a folder of its own, shared by all processes and by later runs."""
    base = ROOT / "build" / "tests" / f"{name}-{hashlib.sha256(made_of).hexdigest()[:16]}"
    base.mkdir(parents=True, exist_ok=True)
    told = base / "built"
    with FileLock(base / "lock"):
        if not told.exists():
            told.write_text(build(base).name)
    return base / told.read_text()


@pytest.fixture(scope="session")
def executor_library() -> Path:
    if ptx.COMPILER is None:
        pytest.skip("running PTX needs g++ and an x86-64 processor")
    return built_once("ptx", ptx.compile_executor, ptx.made_of(ptx.HERE))


@pytest.fixture(scope="session")
def ptx_executor(executor_library) -> Executor:
    return Executor(executor_library)


@pytest.fixture(scope="session")
def compile_cuda(executor_library) -> Callable[..., Path]:
    """Makes a library of CUDA sources in a folder, csrc/cuda's unless others are named."""
    if cuda.find_nvcc() is None:
        pytest.skip("running CUDA sources on the CPU needs nvcc")
    return lambda folder, *sources: cuda.compile_library(
        folder, executor_library, sources or cuda.OPS
    )


@pytest.fixture(scope="session")
def cuda_machine(compile_cuda) -> cuda.Machine:
    """csrc/cuda's ops, on the CPU."""
    made_of = ptx.made_of(ptx.HERE, cuda.CSRC, compilers=(ptx.COMPILER, cuda.find_nvcc()))
    return cuda.Machine(built_once("cuda", compile_cuda, made_of))


@pytest.fixture(scope="module")
def one_thread():
    """For models that are too small to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
