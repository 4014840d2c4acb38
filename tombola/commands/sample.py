"""`tombola sample`: a picture to try the server with."""

import argparse
import sys
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "Writes a PNG of a ship, 256x256 pixels. It is the same picture each time."
    parser.add_argument("file", nargs="?", type=Path, help="where to write it (standard output)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from model_store.files import write_atomically
    from tombola.sample_image import SIDE, draw_sample

    if arguments.file is None:
        sys.stdout.buffer.write(draw_sample())
    else:
        write_atomically(arguments.file, draw_sample())
        print(f"{arguments.file}: a ship, {SIDE}x{SIDE}")
    return 0
