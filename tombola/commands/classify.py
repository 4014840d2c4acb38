"""`tombola classify`: pictures of folders, zips and lists to a table of answers."""

import argparse
from pathlib import Path
from typing import Final

from service.settings import add_flags

SETTINGS: Final = ("library", "device", "engine", "threads", "engine_processes", "state_dir", "max_pixels")
DESCRIPTION: Final = """\
Classifies pictures and writes a table with a row for each. A PATH is a picture, a folder, a zip, or a list of paths
(.txt, or - for standard input). The work is done here, or with --url by a running service.

Each picture gets --draws random ensembles. The label is the commonest, and `agreement` is its share of the draws.
What cannot be classified has its reason in the column `error`. A run that was interrupted goes on where it stopped
when the same command is given again.
"""
EPILOG: Final = """\
examples:
  tombola classify photos --out results.jsonl
  tombola classify photos.zip --draws 9 --out results.parquet
  find . -name '*.png' | tombola classify - --url http://127.0.0.1:8000 --out results.csv

Exit codes: 0 all pictures have an answer, 1 some have none, 2 the run could not be done.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.usage = "tombola classify PATH [PATH ...] --out FILE [OPTION ...]"
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a picture, a folder, a zip, a list (.txt), or -")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the table: .jsonl, .csv or .parquet (extra parquet)"
    )
    parser.add_argument("--draws", type=positive, default=1, metavar="K", help="random ensembles for each picture (1)")
    service = parser.add_argument_group("a running service")
    service.add_argument("--url", help="its public plane, such as http://127.0.0.1:8000")
    service.add_argument("--key-file", type=Path, metavar="FILE", help="file that contains an API key")
    service.add_argument("--proxy", metavar="URL", help="proxy on the way to it")
    service.add_argument("--concurrency", type=positive, default=8, metavar="N", help="requests at the same time (8)")
    service.add_argument("--timeout-s", type=seconds, default=60.0, metavar="S", help="of each picture (60)")
    add_flags(parser, SETTINGS)
    parser.set_defaults(run=run)


def positive(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least 1")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: expected seconds above 0")
    return value


def run(arguments: argparse.Namespace) -> int:
    from tombola.batch import classify_files

    return classify_files(arguments, {name: value for name, value in vars(arguments).items() if name in SETTINGS})
