"""What steering adds to vLLM on a CPU: batches of requests that begin together, all their prompts
in one step and then a token each a step.

unsteered, again    two engines alike: how far apart no difference is measured
ours                saesteer_fast.serve.vllm, one configuration, the scope all
table               the same with three, which requests choose in turn, the scope generated
naive               a forward hook on the same layer that does baselines.naive

Each is an engine in a process of its own. They take turns, a batch each, in shuffled rounds; a
round in which other processes took our cores is taken again. On one core (`taskset -c 0`) CPU time
is measured instead, to which others add little. Two models: the miniature with its own SAE, whose
steps are short, and the first layers of a Phi-3 Mini of random weights with a planted one. Tokens
are drawn by their probability, so that they differ. Short: eager only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import saesteer_fast as sf
from saesteer_fast import mini
from saesteer_fast.eval import chat_text
from saesteer_fast.find import capture
from saesteer_fast.mini import corpus

from .. import engine, exactness, phi3, workloads
from ..workloads import Workload

PROMPT, NEW = 32, 16
ROUNDS, TRIES = {"miniature": 21, "phi3": 7}, 3
QUIET = 0.05
"""The most of our cores' time that other processes may take in a round, one of TRIES."""
LAYERS, LAYER = 2, 1
"""Of Phi-3 Mini: how many, and the one that is steered."""
TEXT = 1024
"""Tokens that prompts are cut from."""
NAMES = ("unsteered", "again", "ours", "table", "naive")
KINDS = ("strong", "weak", None)
"""What requests of the table ask for; without a name they are unsteered."""
NEAR = 0.5
"""How far log-probabilities may be from those of transformers, in units of what steering does."""
OPTIONS = {"dtype": "bfloat16", "max_model_len": 128, "kv_cache_memory_bytes": 1 << 28}


@dataclass(frozen=True)
class Case:
    model: str
    mode: str
    requests: int
    run: str

    def __str__(self) -> str:
        return f"{self.model}-{self.mode}-{self.requests}-{self.run}"


def cases(full: bool) -> list[Case]:
    return [
        Case(model, mode, requests, run)
        for model in ("miniature", "phi3")
        for mode in ("eager", "compiled")[: 1 + full]
        for requests in (1, 8, 32)
        for run in ("prompt", "decode")
    ]


def names(case: Case) -> tuple[str, ...]:
    return NAMES


@dataclass
class Subject:
    """A model, in transformers and on disk, and what is done to it."""

    model: nn.Module
    path: Path
    ids: Tensor  # [TEXT]
    sae: sf.SAE
    layer: int
    latent: int
    value: float

    def steerings(self) -> dict[str, dict]:
        """Arguments of sf.Steering."""
        strong, weak = ({self.latent: share * self.value} for share in (1, 0.5))
        table = {"default": {}, "strong": strong, "weak": weak}
        return {"ours": {"edits": strong}, "table": {"edits": table, "scope": "generated"}}

    def contestants(self, folder: Path) -> dict[str, dict]:
        """Of each engine its arguments; `folder` then holds what they name."""
        sae = str(folder / f"layers.{self.layer}")
        self.sae.save(sae)
        told = {"sae": sae, "layer": self.layer, "latent": self.latent, "value": self.value}
        naive = {"worker_cls": "bench.naive_worker.Worker", "additional_config": told}
        found = {name: {} for name in NAMES} | {"naive": naive}
        for name, arguments in self.steerings().items():
            sf.Recipe([sf.Steering(sae, **arguments)]).save(folder / f"{name}.json")
            found[name] = {"steering": folder / f"{name}.json"}
        return found

    def prompts(self, requests: int, seed: int) -> list[list[int]]:
        at = random.Random(f"{requests}, {seed}")
        starts = [at.randrange(len(self.ids) - PROMPT) for _ in range(requests)]
        return [self.ids[start : start + PROMPT].tolist() for start in starts]

    def score(self, name: str, asked: str | None, prompt: list[int], made: list[int]) -> Tensor:
        """Log-probabilities of what was made, in transformers, steered as this contestant is."""
        steerings = self.steerings()
        given = steerings.get("ours" if name == "naive" else name, {"edits": {}})
        if name == "table":
            given = given | {"edits": given["edits"][asked or "default"]}
        edits = given.pop("edits")
        with sf.steering(self.model, self.sae, edits, layer=self.layer, **given) as handle:
            with handle.prompt(len(prompt)):
                logits = self.model(torch.tensor([prompt + made])).logits[0, len(prompt) - 1 : -1]
        return logits.float().log_softmax(-1)[range(len(made)), made]

    def shares(self) -> dict[str, float]:
        """Of the tokens of `ids`, as one sequence."""
        x = capture(self.model, self.ids[None], [self.layer])[0][0]
        shares = Workload.of("text", x, self.sae, torch.tensor([self.latent])).shares(1)
        return {name: shares[name] for name in ("undecided", "live")}


def miniature(folder: Path) -> Subject:
    """Its own SAE, latent and strength, and prompts of its test set, one after the other."""
    model, tokenizer, sae, layer, _ = mini.load()
    texts = [chat_text(tokenizer, prompt) for prompt in corpus.prompts("test")]
    random.Random(0).shuffle(texts)
    ids = torch.tensor([*chain.from_iterable(tokenizer(texts).input_ids)])[:TEXT]
    w = workloads.miniature("bf16", tokens=TEXT)
    model, sae = (each.to(dtype=torch.bfloat16) for each in (model, sae))
    return Subject(model, mini.ASSETS, ids, sae, layer, int(w.features[0]), w.value)


def first_layers(folder: Path) -> Subject:
    """Of Phi-3 Mini, its SAE chosen from its own stream as in model.py."""
    drawn = torch.Generator().manual_seed(0)
    model, shape = phi3.build(LAYERS), workloads.FULL
    ids = torch.randint(model.config.vocab_size, (TEXT,), generator=drawn)
    stream = capture(model, ids[None], [LAYER])[0][0]
    W_enc, W_dec = workloads.dictionary(shape.N, stream.shape[1], stream.dtype, drawn)
    planted, sae, _ = workloads.on_stream(stream, W_enc, W_dec.to(stream.dtype), shape.k)
    model.save_pretrained(folder / "model")
    latent = int(planted.features[0])
    return Subject(model, folder / "model", ids, sae, LAYER, latent, workloads.VALUE)


SUBJECTS = {"miniature": miniature, "phi3": first_layers}
Engines = dict[str, engine.Engine]


@contextmanager
def running(subject: Subject, folder: Path, mode: str) -> Iterator[Engines]:
    with ExitStack() as stack:
        found = {}
        for name, given in subject.contestants(folder).items():
            options = OPTIONS | {"model": str(subject.path), "enforce_eager": mode == "eager"}
            found[name] = engine.Engine(folder, **options | given)
            stack.callback(found[name].close)
        yield found


def batch(subject: Subject, one: engine.Engine, name: str, requests: int, seed: int, **more):
    asked = [KINDS[i % len(KINDS)] if name == "table" else None for i in range(requests)]
    prompts = subject.prompts(requests, seed)
    return prompts, asked, one.ask(prompts, asked, NEW, **more)


def verify_all(subject: Subject, engines: Engines) -> dict[str, list[float]]:
    """How far each engine's log-probabilities are from those of transformers, steered alike, and
    how far these are from unsteered ones; Disagreement unless that is much further."""
    found = {}
    for name, one in engines.items():
        prompts, asked, answer = batch(subject, one, name, len(KINDS), seed=-1, scored=True)
        made = list(zip(asked, prompts, answer["ids"], strict=True))
        wanted, plain = (
            torch.stack([subject.score(way, *each) for each in made]) for way in (name, "unsteered")
        )
        scores = torch.tensor(answer["scores"])
        error, moved = ((each - wanted).square().mean().sqrt().item() for each in (scores, plain))
        if name not in ("unsteered", "again") and not error <= NEAR * moved:
            raise exactness.Disagreement(
                f"{name}: log-probabilities are {error:.3g} away from those of transformers, which "
                f"steering moves by {moved:.3g}"
            )
        found[name] = [error, moved]
    return found


def rounds(
    subject: Subject, engines: Engines, requests: int, count: int
) -> tuple[dict[str, dict[str, list[float]]], float]:
    """Seconds by run, contestant and round, and the most that others took of a round."""
    order, shuffle = list(engines), random.Random(0).shuffle
    taken: list[dict[str, dict]] = []

    def others(one: dict[str, dict]) -> float:
        return max(answer["others"] for answer in one.values())

    for seed in range(-1, TRIES * count):
        shuffle(order)
        one = {n: batch(subject, engines[n], n, requests, seed)[2] for n in order}
        taken += [one] if seed >= 0 else []  # the first warms up
        if sum(others(each) <= QUIET for each in taken) == count:
            break
    best = sorted(taken, key=others)[:count]
    seconds = {
        run: {name: [one[name][run] for one in best] for name in NAMES}
        for run in ("prompt", "decode")
    }
    return seconds, others(best[-1])


@contextmanager
def measuring(every: list[Case]) -> Iterator[Callable[[Case], dict]]:
    """A case's record: `seconds` a step by contestant and round."""
    folders, started = ExitStack(), ExitStack()

    @cache
    def subject(model: str) -> tuple[Subject, Path]:
        folder = Path(folders.enter_context(TemporaryDirectory()))
        return SUBJECTS[model](folder), folder

    @cache
    @torch.inference_mode()
    def engines(model: str, mode: str) -> tuple[Subject, Engines, dict]:
        """Verified; those of one model and mode run at a time."""
        started.close()
        made, folder = subject(model)
        found = started.enter_context(running(made, folder, mode))
        facts = {"engine": next(iter(found.values())).versions, **made.shares()}
        return made, found, facts | {"scores": verify_all(made, found)}

    @cache
    def of_runs(model: str, mode: str, requests: int) -> tuple[dict, dict]:
        """What both runs share, and the seconds of each."""
        made, found, facts = engines(model, mode)
        seconds, others = rounds(made, found, requests, ROUNDS[model])
        d, N, k = made.sae.d, made.sae.num_latents, made.sae.k
        facts = facts | {"others": others, "d": d, "N": N, "k": k}
        return facts | {"layers": len(made.model.model.layers), "layer": made.layer}, seconds

    def measure(case: Case) -> dict:
        facts, seconds = of_runs(case.model, case.mode, case.requests)
        T = case.requests * (PROMPT if case.run == "prompt" else 1)
        return asdict(case) | {"T": T} | facts | {"seconds": seconds[case.run]}

    with folders, started:
        yield measure
