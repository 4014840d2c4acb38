"""`tombola check`: is a library whole, does it run, how fast is it."""

import argparse
import json
from typing import Final

from service.settings import add_flags, read_settings

SETTINGS: Final = ("device", "engine", "threads", "state_dir")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "Verifies a library, warms it up, compares its logits with torch's and measures it."
    parser.add_argument(
        "library", nargs="?", help="the library's folder or location (TOMBOLA_LIBRARY, or the embedded one)"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    add_flags(parser, SETTINGS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    settings = read_settings({name: value for name, value in vars(arguments).items() if value is not None})
    from service.benchmarks.library_check import figures, lines

    results = figures(settings)
    print(json.dumps(results, indent=2) if arguments.json else "\n".join(lines(results)))
    return 0
