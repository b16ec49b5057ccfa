"""vLLM in a process of its own, which answers batches of requests with what they took.

Its Python may be another one than ours, since vLLM for CPUs wants an environment for itself. It
finds this checkout by links in a folder of its own: beside ours vLLM's `triton_kernels` is hidden.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from . import ROOT
from .timing import Others

PYTHON = os.environ.get("SAESTEER_VLLM") or sys.executable
"""The one that has vLLM."""
THERE = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"


def missing() -> str | None:
    """Why there is no engine here, if so."""
    try:
        found = subprocess.run([PYTHON, "-c", THERE], capture_output=True).returncode == 0
    except OSError:
        found = False
    return None if found else f"{PYTHON} has no vLLM; name one that has with SAESTEER_VLLM="


class Engine:
    """A `vllm.LLM` with these arguments, started in `folder`.

    With `steering`, a file, saesteer_fast.serve.vllm steers it. Raises RuntimeError, with the last
    that vLLM said, if it does not start or ends.
    """

    def __init__(self, folder: Path, steering: Path | None = None, **options):
        for package in ("bench", "saesteer_fast"):
            if not (link := folder / package).exists():
                link.symlink_to(ROOT / package)
        settings = {"steering": steering and str(steering), "options": options}
        self.log = folder / "vllm.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [PYTHON, "-m", __name__, json.dumps(settings)],
                cwd=folder,
                env=os.environ | _environment(folder),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.versions = self._answer()

    def ask(self, prompts: list[list[int]], asked: list[str | None], new: int, **more) -> dict:
        """What `batch` gives for it."""
        question = {"prompts": prompts, "asked": asked, "new": new} | more
        self.process.stdin.write(f"{json.dumps(question)}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _answer(self) -> dict:
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.process.wait()
        raise RuntimeError(f"vLLM ended: {self.log.read_text()[-3000:]}")


def _environment(folder: Path) -> dict[str, str]:
    """Of its process: our cores and no others, steps that can be timed, and nothing left behind."""
    return {
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }


# ---- the child ----


def batch(
    llm,
    names: itertools.count,
    prompts: list[list[int]],
    asked: list[str | None],
    new: int,
    scored: bool = False,
) -> dict:
    """Requests that begin and end together: `prompt`, seconds until each has its first token, and
    `decode`, those of a later step; `others`, the share of our cores that other processes took
    from them. With `scored` the tokens that were drawn, and their log-probabilities."""
    import vllm

    engine, seconds, outputs = llm.llm_engine, [], {}
    alone = len(os.sched_getaffinity(0)) == 1
    clock = time.process_time if alone else time.perf_counter
    others, start = Others(), clock()
    for ids, name in zip(prompts, asked, strict=True):
        parameters = vllm.SamplingParams(
            temperature=1,
            max_tokens=new,
            ignore_eos=True,
            detokenize=False,
            logprobs=0 if scored else None,
            extra_args=None if name is None else {"saesteer": name},
        )
        engine.add_request(str(next(names)), {"prompt_token_ids": ids}, parameters)
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output.outputs[0] for output in engine.step()}
        now = clock()
        seconds.append(now - start)
        start = now
    if len(seconds) != new:
        raise RuntimeError(f"{len(seconds)} steps for {new} tokens of each request")
    prompt, *decode = seconds
    found = {"prompt": prompt, "decode": sum(decode) / len(decode)}
    found["others"] = 0.0 if alone else others.share()
    if scored:
        found["ids"] = [list(each.token_ids) for each in outputs.values()]
        found["scores"] = [
            [at[token].logprob for at, token in zip(each.logprobs, each.token_ids, strict=True)]
            for each in outputs.values()
        ]
    return found


def serve(say: Callable[[dict], None], steering: str | None, options: dict) -> None:
    import torch
    import transformers
    import vllm
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise RuntimeError(f"this vLLM is for {current_platform.device_name}, not for a CPU")
    if steering is not None:
        from saesteer_fast.serve.vllm import options as steered

        options |= steered(steering)
    llm, names = vllm.LLM(skip_tokenizer_init=True, **options), itertools.count()
    say({each.__name__: each.__version__ for each in (vllm, torch, transformers)})
    for question in sys.stdin:
        say(batch(llm, names, **json.loads(question)))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is for its log
    serve(
        lambda found: print(json.dumps(found), file=answers, flush=True), **json.loads(sys.argv[1])
    )


if __name__ == "__main__":
    main()
