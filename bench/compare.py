"""Two commits side by side: `python -m bench.compare REV`, which `make bench-compare` calls.

REV and HEAD are built in worktrees of their own, build/compare/<commit>. Then processes that time
the op's short set, ours alone, take turns: REV, HEAD, REV, HEAD, ... Each verifies first, and all
run HEAD's benchmark, whatever REV's was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import median

import torch

import saesteer_fast

from . import exactness, machine, workloads
from .peers import feature_acts, steer
from .suites.op import cases, inputs
from .tables.common import circumstances, duration, least_to_most, table
from .timing import Contestant, interleaved

ROUNDS = 7
TREES = machine.ROOT / "build/compare"
CHILD = (
    "import sys; sys.path.insert(0, sys.argv[1]); import saesteer_fast; del sys.path[0]; "
    "from bench import compare; compare.child(sys.argv[1])"
)
"""The package of one tree with the benchmark of another."""


def git(*arguments: str) -> str:
    command = ["git", "-C", machine.ROOT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip() or f"git {arguments[0]} failed")
    return done.stdout.strip()


def commits(revision: str) -> list[str]:
    """REV's and HEAD's; ValueError if REV is none, or HEAD is not what lies in the tree."""
    if changed := git("status", "--porcelain", "--untracked-files=no"):
        raise ValueError(f"HEAD: commit or undo what is changed first:\n{changed}")
    try:
        other = git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
    except ValueError:
        raise ValueError(f"REV: got {revision!r}, a commit, branch or tag is needed") from None
    head = git("rev-parse", "HEAD")
    if other == head:
        raise ValueError(f"REV: {revision} is HEAD itself, another commit is needed")
    return [other, head]


def built(commit: str) -> Path:
    """A worktree of this commit with its libraries built; ValueError if that fails."""
    tree = TREES / commit[:12]
    done = tree / "build/done"
    if not done.exists():
        git("worktree", "prune")
        if not tree.exists():
            git("worktree", "add", "--detach", str(tree), commit)
        print(f"building {commit[:12]} ...", flush=True)
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        ran = subprocess.run(build, cwd=tree, capture_output=True, text=True)
        if ran.returncode:
            raise ValueError(f"{commit[:12]} does not build:\n{(ran.stdout + ran.stderr)[-3000:]}")
        done.parent.mkdir(exist_ok=True)
        done.touch()
    return tree


def measure() -> dict[str, float]:
    """Seconds a call of the package that is loaded, by case: verified, then timed."""
    every, found = cases(full=False), {}
    for dtype, shape, real in dict.fromkeys(case.built for case in every):
        some = [case for case in every if case.built == (dtype, shape, real)]
        most = max(case.F for case in some)
        whole = [workloads.miniature(dtype)] if real else workloads.build(dtype, most, shape)
        of = {w.name: w for w in whole}
        contestants = {}
        for case in some:
            w = of[case.workload].first(case.F)
            batches = inputs(w, case.T)
            ours = partial(steer, w)
            exactness.check_ours(w, batches, ours, partial(feature_acts, w))
            contestants[str(case)] = Contestant(ours, batches, whole=case.workload != "worst")
        seconds = interleaved(contestants, ROUNDS)
        found |= {name: median(rounds) for name, rounds in seconds.items()}
    return found


def child(tree: str) -> None:
    """Prints, as JSON, what `measure` finds with the package of this tree."""
    if not Path(saesteer_fast.__file__).is_relative_to(tree):
        raise ImportError(f"{saesteer_fast.__file__} is loaded, not what lies in {tree}")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with torch.inference_mode():
        print(json.dumps(measure()))


def timed(tree: Path, benchmark: Path) -> dict[str, float]:
    """What a child finds with the package of one tree and the benchmark of another."""
    command = [sys.executable, "-c", CHILD, str(tree)]
    ran = subprocess.run(command, cwd=benchmark, capture_output=True, text=True)
    if ran.returncode:
        raise ValueError(f"{tree.name} does not run this benchmark:\n{ran.stderr[-3000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def render(names: list[str], pairs: list[tuple[dict[str, float], dict[str, float]]]) -> str:
    """A line a case: medians over the processes, and HEAD's time over REV's, pair by pair."""
    rows = []
    for case in pairs[0][0]:
        before, after = ([each[i][case] for each in pairs] for i in (0, 1))
        ratios = [b / a for a, b in zip(before, after, strict=True)]
        times = [duration(median(each)) for each in (before, after)]
        rows.append([case, *times, least_to_most(ratios, "×")])
    return table(["case", *names, f"{names[1]} / {names[0]}"], rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("rev", metavar="REV", help="a commit, branch or tag")
    parser.add_argument("--pairs", type=int, default=3, help="processes of each commit")
    options = parser.parse_args(arguments)
    try:
        found = commits(options.rev)
        trees = [built(commit) for commit in found]
        pairs = []
        for pair in range(options.pairs):
            print(f"pair {pair + 1} of {options.pairs} ...", flush=True)
            pairs.append(tuple(timed(tree, trees[1]) for tree in trees))
    except ValueError as error:
        sys.exit(f"bench-compare: {error}")
    names = [f"{options.rev} ({found[0][:12]})", f"HEAD ({found[1][:12]})"]
    print(f"\n{render(names, pairs)}\n\n{circumstances(machine.facts())}")


if __name__ == "__main__":
    main()
