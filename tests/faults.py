"""The faults that must give a clear error or the right answer, and which tests hold each: tests say
so by `@pytest.mark.fault(number, ...)`. docs/faults.md is made from both.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

FAULTS = {
    "The stream": {
        1: "NaN in one token: that token alone is NaN, its neighbours keep every bit",
        2: "Infinity in a token",
        3: "All tokens NaN: no index out of bounds",
        4: "NaN with a sign or a payload",
        5: "No tokens",
        6: "x of one, three or four dimensions",
        7: "Views: strided, transposed, expanded, offset, negated",
        8: "x of another width, also 1, which would broadcast",
        9: "Integer or bool x",
        10: "x and SAE of different dtypes: the result has x's",
        11: "fp16 overflow of a pre-activation, a norm, a strength, a result",
        12: "Massive activations, 1e3 to 1e4, in bf16",
        13: "Subnormal numbers and -0",
        14: "x requires a gradient: that of the identity",
        15: "inference_mode, no_grad, torch.func",
        79: "Products of fp32 that PyTorch is told to round, as to tf32",
        16: "x shares memory with the weights; inputs are never written",
        17: "More than 2^31 numbers in x, in W_enc, or tokens times latents",
        18: "Sizes that divide by no tile; one latent, one token",
        19: "Meta and fake tensors; tensors on two devices",
    },
    "Latents and top-k": {
        20: "A latent below 0 or past the last",
        21: "A latent named twice",
        22: "No latents: a copy, bit for bit, that shares no memory",
        23: "A strength that is NaN, infinite, or negative",
        24: "k of 0, negative, N, more than N, or no integer",
        25: "Ties at the k-th place: the lower latent wins",
        26: "Fewer than k positive pre-activations",
        27: "A latent among the k largest, positive but outside, or not positive",
        28: "Clamping to its own value changes no bit",
        29: "Two latents of one direction",
        82: "A latent whose direction is 0, so that no edit of it would do anything",
        30: "int32 indices, or indices on another device",
        31: "The same bits however a batch is cut, on any number of threads, on any stream",
    },
    "Files": {
        32: "Cut short, too long, empty, or all zeros",
        33: "A header past the end, of 2^40 bytes, with a key twice, with overlaps or gaps",
        34: "A key that is missing, unexpected, or spelt otherwise",
        35: "W_enc transposed; d = N, where no shape can tell",
        36: "NaN or infinity among the weights",
        37: "A flipped bit",
        38: "Mixed dtypes; int8",
        39: "A configuration without k, with k as text or above N, of another width, or no JSON",
        40: "Another kind of SAE in a top-k SAE's clothes",
        41: "Normalised inputs, whitening, rescaling",
        42: "A pickle: refused, never executed",
        43: "Killed while saving",
        44: "A full disk, or a power cut, while saving",
        45: "A file that is cut or replaced once loaded",
        46: "Links, paths that lead elsewhere, files that cannot be read",
        47: "Loading takes no more memory than the weights",
        78: "Loading under another default dtype or device",
    },
    "Models": {
        48: "Layers that return tuples or tensors; batches",
        49: "An error or Ctrl-C in the model, in the body, or while attaching: no hook is left",
        50: "Attached by half: rolled back",
        51: "Removing our hooks keeps those of others",
        52: "Two steerings on one layer: they act in order",
        53: "A layer that is not there, by name or number",
        54: "Attached after torch.compile",
        55: "Removed after torch.compile",
        56: "With a KV cache as without; every decoded token is steered",
        57: "Left padding: each row as if alone",
        58: "Right padding",
        59: "Beam search, several sequences, assisted decoding, static cache",
        60: "output_hidden_states shows the steered stream",
        61: "half() or to() after attaching",
        62: "deepcopy, pickle, save_pretrained",
        63: "Gradient checkpointing: what is computed again is steered again, or refused",
        64: "Two threads, one of them steered",
        65: "Two models in one process",
        66: "A process forked after its parent used threads: calls of few tokens, which need none",
        67: "Layers on several devices, tensor parallelism, PEFT's names",
        68: "CUDA graphs and streams; no wait for the device",
        69: "A layer that is called past its hooks",
        70: "A tensor that an earlier hook kept is not overwritten",
        71: "Each row of a batch steered in its own way, some not at all",
        72: "Autocast",
        73: "An adapter that is put around the steered module later",
        74: "A gate on a prompt of which a cache holds a part",
        75: "Several sequences packed in a row",
        76: "Virtual tokens, as of prompt tuning, before the prompt",
        77: "A past that tells no length, as a tuple",
        80: "Guidance, which reads a second prompt, with a cache of its own",
        81: "An attention mask that weighs keys, as a bias, rather than leaving them out",
        83: "One new token where generated ones are steered: none is ever read",
        84: "An attention mask of more columns than there are tokens, as for a static cache",
        85: "position_ids that say how tokens are rotated, not where they stand",
        86: "Hooks that somebody removes, or whose dicts somebody replaces",
        87: "A steering that is removed while another thread is in the middle of a call",
        88: "A layer that runs several times in a call, as where all are one",
    },
}


def holders(tests: Path) -> dict[int, list[tuple[str, str, bool]]]:
    """By fault: file, test, and whether it needs a GPU."""
    found = defaultdict(list)
    for path in sorted(tests.glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = {name: numbers for name, numbers in map(_mark, node.decorator_list)}
                on_gpu = path.name == "test_gpu.py" or "gpu" in marks
                for number in marks.get("fault", ()):
                    found[number].append((path.name, node.name, on_gpu))
    return found


def _mark(decorator: ast.expr) -> tuple[str, tuple]:
    """The name of a pytest mark, and its numbers."""
    numbers = ()
    if isinstance(decorator, ast.Call):
        numbers = tuple(a.value for a in decorator.args if isinstance(a, ast.Constant))
        decorator = decorator.func
    return ast.unparse(decorator).removeprefix("pytest.mark."), numbers


def faults_page(tests: Path) -> str:
    """docs/faults.md."""
    held = holders(tests)
    lines = [
        "# Faults, and the tests that hold them",
        "",
        "What goes wrong with steering in practice. Each gives a clear error or the right answer: "
        "never a model",
        "that is silently unsteered, never a file lost. Written by `python -m tests.pages --write` "
        "from the marks on the tests.",
    ]
    for section, faults in FAULTS.items():
        lines += ["", f"## {section}", "", "| | fault | held by |", "| ---: | --- | --- |"]
        lines += [f"| {n} | {text} | {_listed(held[n])} |" for n, text in faults.items()]
    return "\n".join(lines) + "\n"


def _listed(tests: list[tuple[str, str, bool]]) -> str:
    by_file = defaultdict(list)
    for file, name, on_gpu in tests:
        by_file[file].append(f"`{name}`" + (" (needs a GPU)" if on_gpu else ""))
    return "; ".join(f"{file}: {', '.join(names)}" for file, names in by_file.items())
