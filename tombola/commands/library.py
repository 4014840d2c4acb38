"""`tombola library`: shows, compares, fetches and publishes libraries."""

import argparse
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model_store.library import Library

DESCRIPTION = """\
Shows, compares, fetches and publishes libraries. A LIBRARY is a folder, or a location such as
https://host/path#sha256=DIGEST, s3://bucket/path, hf://owner/name or oci://registry/name:tag. The digest is the
library's.
"""
EPILOG = """\
examples:
  tombola library show my-library
  tombola library diff my-library https://models.example/robust
  tombola library push my-library s3://models/robust
  tombola library push my-library oci://registry.example/models/robust:1
  tombola library pull s3://models/robust#sha256=DIGEST my-copy
"""


WORDS = {"weights": "other weights: ", "entry": "other entry: ", "claims": ""}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    actions = parser.add_subparsers(required=True, metavar="WHAT", dest="what")
    show = add_action(actions, "show", "its digest, tickets, classes and claims")
    show.add_argument("library", metavar="LIBRARY", help="a folder or a location")
    diff = add_action(actions, "diff", "what a second library has that the first has not")
    diff.add_argument("first", metavar="LIBRARY", help="a folder or a location")
    diff.add_argument("second", metavar="LIBRARY", help="another one")
    pull = add_action(actions, "pull", "fetch a library into a new folder, verified")
    pull.add_argument("source", metavar="LOCATION", help="with or without #sha256= and the digest")
    pull.add_argument("folder", type=Path, metavar="FOLDER", help="the new folder")
    push = add_action(actions, "push", "publish a folder's library to s3://, hf:// or oci://")
    push.add_argument("folder", type=Path, metavar="FOLDER", help="a library's folder")
    push.add_argument("target", metavar="LOCATION", help="where to put it")
    for action, run in ((show, run_show), (diff, run_diff), (pull, run_pull), (push, run_push)):
        action.set_defaults(run=run)


def add_action(actions: Any, name: str, about: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=about, description=f"{about.capitalize()}.")
    return parser


def opened(stack: ExitStack, text: str) -> "Library":
    """A folder's library, or one from elsewhere in a folder that goes with the stack."""
    from model_store.library import open_library
    from service.library_source import fetch, parse_location

    if "://" not in text:
        return open_library(Path(text))
    folder = Path(tempfile.mkdtemp(prefix="tombola-"))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return fetch(parse_location(text, pinned=False), folder / "library")


def run_show(arguments: argparse.Namespace) -> int:
    with ExitStack() as stack:
        library = opened(stack, arguments.library)
    print(f"digest   {library.digest}")
    print(f"classes  {len(library.classes)}: {', '.join(library.classes)}")
    print(f"input    {'x'.join(map(str, library.input.shape))}")
    for entry in library.manifest.entries:
        print(f"{entry.role:8s} {entry.name:24s} {entry.sha256[:12]}  {claims_text(entry)}")
    print(f"{len(library.tickets)} tickets and {len(library.baselines)} baselines")
    return 0


def claims_text(entry: Any) -> str:
    return ", ".join(f"{claim.metric} {100 * claim.value:.1f} %" for claim in entry.claims) or "no claims"


def run_diff(arguments: argparse.Namespace) -> int:
    """Prints a line for each difference, and how many there are."""
    with ExitStack() as stack:
        first, second = opened(stack, arguments.first), opened(stack, arguments.second)
    lines = differences(first, second)
    for line in lines:
        print(line)
    print(f"{first.digest[:12]} -> {second.digest[:12]}: {len(lines)} differences")
    return 0


def differences(first: "Library", second: "Library") -> list[str]:
    from model_store.library_diff import compare_libraries

    before, after = ({entry.name: entry for entry in library.manifest.entries} for library in (first, second))
    comparison = compare_libraries(first, second)
    lines = [f"~ {name}" for name in comparison.shared]
    for ticket in comparison.tickets:
        old, new = before.get(ticket.name), after.get(ticket.name)
        if new is None:
            lines.append(f"- {ticket.name}")
        elif old is None:
            lines.append(f"+ {ticket.name}  {claims_text(new)}")
        else:
            lines.append(f"~ {ticket.name}  {WORDS[ticket.difference]}{claims_text(old)} -> {claims_text(new)}")
    return sorted(lines)


def run_pull(arguments: argparse.Namespace) -> int:
    from model_store.errors import LibraryRejected
    from service.library_source import fetch, parse_location

    if arguments.folder.exists():
        raise LibraryRejected(f"{arguments.folder}: is there already; choose a new folder")
    library = fetch(parse_location(arguments.source, pinned=False), arguments.folder)
    print(f"{arguments.folder}: library {library.digest}, {len(library.tickets)} tickets")
    return 0


def run_push(arguments: argparse.Namespace) -> int:
    from model_store.library import open_library
    from service.library_source import parse_location, push

    print(push(open_library(arguments.folder), parse_location(arguments.target, pinned=False)))
    return 0
