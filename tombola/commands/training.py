"""The options of the commands that make libraries."""

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from model_store.errors import InputRejected, TombolaError
from model_store.input_spec import parse_size

SEARCH_EXAMPLES: Final = """\
a library from nothing, on two cores (hours; interrupt it at any time, the same command resumes it):
  tombola fetch cifar10
  tombola search --data cifar10 --state run
  tombola status --state run
  tombola export --state run my-library

an hour more for two tickets of a library that exists:
  tombola search --data cifar10 --state more --from my-library --only resnet18-07 resnet34-07 --epochs 2
  tombola export --state more --base my-library my-library

the pure scratch tickets (masks alone) that its searches went through, in minutes:
  tombola scratch my-library --data cifar10 --state scratch
  tombola export --state scratch my-scratch-library
"""
DEVICE: Final = "torch device (default: %(default)s)"
INTERRUPTED: Final = 130  # exit code: Ctrl-C, as shells have it
TERMINATED: Final = 143  # exit code: SIGTERM, as shells have it


def refuse_renamed_variables(environ: Mapping[str, str]) -> None:
    """The variables of these commands had another prefix before 0.2.0."""
    for name in ("COMMIT", "CACHE", "CHECKPOINT_SECONDS"):
        if f"TRAINING_{name}" in environ:
            raise TombolaError(f"TRAINING_{name}: now named TOMBOLA_{name}")


def set_command(parser: argparse.ArgumentParser, name: str, about: str) -> None:
    """Runs `training.commands.NAME` for this parser."""

    def run(arguments: argparse.Namespace) -> int:
        refuse_renamed_variables(os.environ)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
        from training import commands

        command: Callable[[argparse.Namespace], None] = getattr(commands, name)
        try:
            command(arguments)
        except KeyboardInterrupt:
            print("interrupted: the same command resumes from the last checkpoints", file=sys.stderr)
            return INTERRUPTED
        return 0

    parser.description = about
    parser.set_defaults(run=run)


def add_plan(parser: argparse.ArgumentParser) -> None:
    set_command(
        parser,
        "show_plan",
        "Shows the jobs of a library and what each should cost. With --data it measures that on this machine, about a\n"
        "minute long, and says time, memory and disk.",
    )
    add_recipe_options(parser)
    add_dense_epochs(parser)
    add_size_options(parser)
    parser.add_argument("--data", type=Path, help="the data set to measure on, as search takes it")
    parser.add_argument("--seconds", type=positive, default=60, help="how long to measure steps (%(default)s)")
    parser.add_argument("--workers", type=at_least_one, default=2, help="processes at once (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help=DEVICE)


def add_search(parser: argparse.ArgumentParser) -> None:
    set_command(parser, "run_search", "Searches tickets, in processes of one thread each. The same command resumes it.")
    parser.epilog = SEARCH_EXAMPLES
    add_recipe_options(parser)
    add_dense_epochs(parser)
    add_size_options(parser)
    add_run_options(parser)
    add_start_options(parser)


def add_baseline(parser: argparse.ArgumentParser) -> None:
    set_command(parser, "run_baseline", "Trains the dense networks to compare with: the same adversary, data and cost.")
    add_recipe_options(parser)
    add_size_options(parser)
    add_run_options(parser)


def add_scratch(parser: argparse.ArgumentParser) -> None:
    set_command(
        parser,
        "run_scratch",
        "Makes the pure scratch tickets that a library's own were trained from: the same masks over the frozen\n"
        "weights that they were found for. Nothing is searched again.",
    )
    parser.add_argument("library", type=Path, help="a library of tickets whose weights were trained")
    parser.set_defaults(preset="compact")  # whose cores a task asks of a cluster
    add_only(parser)
    add_run_options(parser)


def add_status(parser: argparse.ArgumentParser) -> None:
    set_command(parser, "show_status", "Shows what is done, its accuracy, what remains and how long it should take.")
    parser.add_argument("--state", type=Path, required=True, help="folder of the search")


def add_figures(parser: argparse.ArgumentParser) -> None:
    set_command(
        parser,
        "draw_figures",
        "Plots the searches' loss and accuracy against time; or what libraries' tickets reach against what was spent\n"
        "on them.",
    )
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--state", type=Path, help="folder of the search")
    given.add_argument("--library", type=Path, action="append", help="a library's folder; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("searches.svg"), help=".svg or .png (default: %(default)s)")


def add_export(parser: argparse.ArgumentParser) -> None:
    set_command(parser, "run_export", "Writes the finished tickets and their results as a library, also a partial one.")
    parser.add_argument("library", type=Path, help="folder to write; an existing library there is replaced atomically")
    parser.add_argument("--state", type=Path, action="append", default=[], help="folder of a search; may be repeated")
    parser.add_argument("--base", type=Path, help="a library whose tickets stay unless a finished job has a better one")


def add_table(parser: argparse.ArgumentParser) -> None:
    set_command(parser, "show_table", "Prints the paper's Table 1 from a library's reported results, in Markdown.")
    parser.add_argument("library", type=Path, nargs="?", help="default: the embedded library")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="write it between the page's table marks instead")


def add_compare(parser: argparse.ArgumentParser) -> None:
    set_command(parser, "show_differences", "Measures how different a library's tickets are: mask overlap, transfer.")
    parser.add_argument("library", type=Path, nargs="?", help="default: the embedded library")
    parser.add_argument("--data", type=Path, required=True, help="the data set that the library was searched on")
    add_skip_damaged(parser)
    parser.add_argument("--images", type=at_least_one, default=250, help="held-out training images (%(default)s)")
    parser.add_argument("--device", default="cpu", help=DEVICE)
    parser.add_argument("--json", type=Path, help="write the whole matrices here")


def add_fetch(parser: argparse.ArgumentParser) -> None:
    set_command(parser, "fetch", "Downloads CIFAR-10 (170 MB) with torchvision.")
    parser.add_argument("folder", type=Path, help="where to put it; give the same folder as --data")


def add_work(parser: argparse.ArgumentParser) -> None:
    set_command(parser, "work", "Runs one job's folder to its end. `search` starts it for each ticket.")
    parser.add_argument("folder", type=Path, help="the job's folder inside a --state folder")
    parser.add_argument("--data", type=Path, required=True, help="the data set, as given to search")
    add_skip_damaged(parser)
    parser.add_argument("--device", default="cpu", help=DEVICE)


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1")
    return int(text)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return value


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset", default="compact", help="widths and schedule: compact, wide or paper (default: %(default)s)"
    )
    add_only(parser)
    parser.add_argument(
        "--scratch", action="store_true", help="pure scratch tickets: masks alone, weights never trained"
    )
    parser.add_argument("--epochs", type=positive, help="passes over the search images (default: the preset's)")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="any other field of the recipe, such as noise=0.5, width=24 or precision=bfloat16",
    )


def add_dense_epochs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dense-epochs",
        type=positive,
        help="of the dense networks that tickets of the preset wide start in (default: the preset's)",
    )


def add_size_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size", type=size, metavar="SIDE|HxW", help="what pictures become: 64, or 48x64 for rows by columns (32)"
    )
    parser.add_argument(
        "--resize",
        choices=("squash", "cover", "contain"),
        help="how: stretched, cut to the largest centred part, or whole with white beside it (squash)",
    )
    parser.add_argument(
        "--interpolation", choices=("nearest", "bilinear", "bicubic", "lanczos"), help="of the resizing (bilinear)"
    )


def size(text: str) -> tuple[int, int]:
    """Height and width, as argparse asks for them."""
    try:
        return parse_size(text)
    except InputRejected as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_only(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these tickets alone: a structure, or resnet18-07")


def add_skip_damaged(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--skip-damaged",
        action="store_true",
        help="count, list and pass over pictures that cannot be read (default: the first one ends the command)",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, required=True, help="CIFAR-10 as torchvision keeps it, an image folder, or a zip"
    )
    add_skip_damaged(parser)
    parser.add_argument("--data-name", help="what claims call the data (default: the name of --data)")
    parser.add_argument("--state", type=Path, required=True, help="where checkpoints and finished tickets go")
    parser.add_argument("--workers", type=at_least_one, default=2, help="processes at once (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device of each process (default: %(default)s)")
    parser.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster: auto, host:port, or local")


def add_start_options(parser: argparse.ArgumentParser) -> None:
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--from", dest="start", type=Path, metavar="LIBRARY", help="go on from this library's tickets")
    start.add_argument(
        "--dense", type=Path, metavar="STATE", help="search inside the dense networks that `baseline` left there"
    )
    parser.add_argument(
        "--rate",
        type=positive,
        default=0.4,
        help="first rates with --from, as a share of the recipe's (default: %(default)s)",
    )
