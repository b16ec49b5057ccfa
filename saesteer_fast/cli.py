"""The `saesteer` command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import __version__


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a subcommand: demo, mini build, convert, check, verify, env."""
    arguments = vars(_parser().parse_args(argv))
    try:
        arguments.pop("run")(**arguments)
    except OSError as error:  # a folder that cannot be written, above all
        raise SystemExit(f"saesteer: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as shells say it of what Ctrl-C ended


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="saesteer", description="Steers SAE latents, exactly.")
    parser.add_argument("--version", action="version", version=f"saesteer_fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser(
        "demo", help="the paper in miniature: finds a refusal latent, clamps it"
    )
    demo.add_argument(
        "--out", default="saesteer-demo", help="folder to write (default: %(default)s)"
    )
    demo.set_defaults(run=_demo)

    mini = commands.add_parser("mini", help="the embedded model and SAE")
    build = mini.add_subparsers(required=True, metavar="action").add_parser(
        "build", help="trains them from nothing"
    )
    build.add_argument(
        "--out", default="saesteer-mini", help="folder to write (default: %(default)s)"
    )
    build.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    build.add_argument("--threads", type=_threads, default=1, help="default: %(default)s")
    build.set_defaults(run=_mini_build)

    convert = commands.add_parser("convert", help="writes an SAE in another format")
    convert.add_argument("source", help="folder, file, or repository on the Hugging Face Hub")
    convert.add_argument("target", help="folder to write")
    convert.add_argument("--to", required=True, choices=("sparsify", "saelens"))
    convert.add_argument(
        "--fold",
        action="store_true",
        help="multiply scale and decoder norms into the weights, where the format lacks a place",
    )
    convert.set_defaults(run=_convert)

    check = commands.add_parser("check", help="what a steering file would do; fails if it cannot")
    check.add_argument("file", help="JSON, or steer_path of lm-evaluation-harness: .csv, .pt")
    check.add_argument(
        "--model", help="folder or repository with a config.json, to find the modules in"
    )
    check.set_defaults(run=_check)

    verify = commands.add_parser(
        "verify",
        help="tries the kernels on the GPUs at hand; those that are right run from then on",
    )
    verify.set_defaults(run=_verify)

    env = commands.add_parser("env", help="what is installed, and which implementation runs here")
    env.set_defaults(run=_env)
    return parser


def _threads(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; 1 or more are needed")
    return int(text)


def _demo(out: str) -> None:
    from .demo import run

    try:
        run(out)
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"saesteer demo: {error.name} is missing: pip install {error.name}"
        ) from None


def _mini_build(out: str, seed: int, threads: int) -> None:
    from .mini.build import build

    metrics = build(out, seed, threads)
    print(f"Written: {out} (latent {metrics['latent']} of layer {metrics['layer']} refuses best)")


def _convert(source: str, target: str, to: str, fold: bool) -> None:
    from .sae import SAE

    try:
        sae = SAE.load(source)
        sae = sae.fold() if fold else sae
        sae.save(target, to)
        held = SAE.load(target)
    except (OSError, ValueError) as error:
        raise SystemExit(f"saesteer convert: {error}") from None
    lost = sae.hookpoint and not held.hookpoint
    hint = f"; hookpoint lost: only a folder named {sae.hookpoint} keeps it" if lost else ""
    print(f"Written: {target} ({held}){hint}")


def _check(file: str, model: str | None) -> None:
    from .recipe.check import report

    try:
        print(report(file, model))
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"saesteer check: {error}") from None


def _verify() -> None:
    from .verify import main

    main()


def _env() -> None:
    from .env import main

    main()


if __name__ == "__main__":
    main()
