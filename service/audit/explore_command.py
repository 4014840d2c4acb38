"""tombola audit explore: laws of theta compared on the attack images that an audit has stored."""

import argparse
from pathlib import Path
from typing import Final

RESULT: Final = "explore.json"
FIGURE: Final = "frontier.svg"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = run.__doc__
    parser.add_argument("folder", type=Path, help="of a finished audit: its --out")
    parser.add_argument("--library", type=Path, help="the audited library, to attack the chosen law once more")
    parser.add_argument(
        "--selection",
        type=Path,
        metavar="FOLDER",
        help="another audit, on held-out images, to choose the law on",
    )
    parser.add_argument("--threads", type=int, default=0, help="cores to use (those of this container)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Compares laws of theta by cost and robust accuracy, on the attack images that an audit has stored."""
    import torch

    from model_store.files import write_atomically
    from service.audit.explore import SERVED, explore
    from service.audit.report.plots import plot_frontier
    from service.cpu import usable_cores

    torch.set_num_threads(1)
    exploration = explore(options.folder, options.library, options.threads or usable_cores(), options.selection)
    write_atomically(options.folder / RESULT, exploration.model_dump_json(indent=1).encode())
    write_atomically(options.folder / FIGURE, plot_frontier(exploration.laws, exploration.bound).encode())
    shown = sorted((row for row in exploration.laws if row.frontier or row.name == SERVED), key=lambda row: row.cost)
    for row in shown:
        robust, low, high = (100 * each for each in (row.robust.value, row.robust.low, row.robust.high))
        print(
            f"{100 * row.cost:5.0f} % of the cost  {robust:5.1f} % [{low:.1f}, {high:.1f}]  "
            f"ten tries {100 * row.after_ten:5.1f} %  endless {100 * row.for_ever:5.1f} %  {row.name}"
        )
    if exploration.confirmed is not None:
        print(f"the best law after an attack on itself: {100 * exploration.confirmed.value:.1f} %")
    print(
        f"no law over {exploration.draws:,} draws of these tickets keeps more than {100 * exploration.bound:.1f} % "
        f"of these {exploration.reported_on} images under these {exploration.attacks} attacks; the served law keeps "
        f"{100 * exploration.laws[0].robust.value:.1f} %"
    )
    return 0
