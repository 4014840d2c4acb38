"""`tombola bench`: measurements of the engine and of what answers reveal."""

import argparse
from pathlib import Path
from typing import Any, Final

from service.benchmarks import SETTINGS
from service.settings import add_flags

DESCRIPTION: Final = """\
Measures the engine alone, what an answer's time and digits reveal, what rounding changes, and what an image costs.
The comparison over HTTP with other servers is `make bench`.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    kinds = parser.add_subparsers(required=True, metavar="WHAT", dest="benchmark")
    raw = add_kind(kinds, "raw", "the engine on recorded draws, against one image at a time in torch")
    raw.add_argument("--images", type=int, default=512, help="images, each with a recorded draw (512)")
    raw.add_argument("--seed", type=int, default=0, help="of the images and the draws (0)")
    latency = add_kind(kinds, "latency", "mutual information between an answer's time and its ensemble's size")
    latency.add_argument("--images", type=int, default=1500, help="single images, one after the other (1500)")
    latency.add_argument(
        "--quantum-ms", type=float, nargs="+", default=[10.0, 25.0], help="the quanta to compare with none (10 25)"
    )
    capacity = add_kind(kinds, "capacity", "processor time of an image in a whole server, and replicas for a load")
    capacity.add_argument("--images", type=int, default=2000, help="images of each kind of request (2000)")
    precision = add_kind(kinds, "precision", "how well one answer reveals the ensemble that gave it")
    add_data(precision)
    precision.add_argument("--images", type=int, default=40, help="of them (40)")
    precision.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    rounding = add_kind(kinds, "rounding", "what bfloat16 and 8 bits change in accuracy and save in time")
    add_data(rounding)
    rounding.add_argument(
        "--to", nargs="+", choices=("bfloat16", "int8"), default=["int8"], help="precisions to compare with float32"
    )
    rounding.add_argument("--images", type=int, default=500, help="of them; 256 more give the ranges of 8 bits (500)")
    for kind in (latency, capacity, precision, rounding):
        kind.add_argument("--into", type=Path, help="page in which the table of these results is replaced")


def add_kind(kinds: Any, name: str, about: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=about, description=f"Measures {about}.")
    parser.add_argument("--json", type=Path, help="file to write the results to as well")
    add_flags(parser, SETTINGS)
    parser.set_defaults(run=run)
    return parser


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="zip, npz or folder of labelled images")


def run(arguments: argparse.Namespace) -> int:
    from service.benchmarks.command import run

    return run(arguments)
