"""The command `tombola`: one parser for everything that people type.

A command's options are read from its module only when that command is chosen, so that `--help` imports nothing heavy.
"""

import argparse
import difflib
import importlib
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from model_store.code_version import product_version
from model_store.errors import TombolaError, os_error_text

Run = Callable[[argparse.Namespace], int]

REFUSED: Final = 2  # exit code: something in the command, its settings or its files cannot be used
INTERRUPTED: Final = 130  # exit code: Ctrl-C, as shells have it


@dataclass(frozen=True)
class Command:
    """One command. `options` is the `module:function` that adds its options and sets `run`."""

    name: str
    options: str
    help: str | None  # None: not listed, for our own processes


GROUPS: Final[dict[str, tuple[Command, ...]]] = {
    "Serve": (
        Command("serve", "tombola.commands.serve:add_options", "serve a library on two planes until SIGTERM"),
        Command("check", "tombola.commands.check:add_options", "verify a library, warm it up and measure it"),
        Command("classify", "tombola.commands.classify:add_options", "classify pictures into a table"),
        Command("sample", "tombola.commands.sample:add_options", "write a picture to try the server with"),
    ),
    "Audit": (
        Command("audit", "service.audit.command:add_options", "attack a library, and check the attacks"),
        Command(
            "audit explore", "service.audit.explore_command:add_options", "compare laws on the attacks of an audit"
        ),
        Command("gate", "service.audit.command:add_gate_options", "hold an audit's report against requirements"),
    ),
    "Make libraries": (
        Command("plan", "tombola.commands.training:add_plan", "show the jobs of a library and their cost"),
        Command("fetch", "tombola.commands.training:add_fetch", "download CIFAR-10 (170 MB) with torchvision"),
        Command("search", "tombola.commands.training:add_search", "search tickets, or resume a search"),
        Command("baseline", "tombola.commands.training:add_baseline", "train the dense networks to compare with"),
        Command("scratch", "tombola.commands.training:add_scratch", "make the pure scratch tickets of a library"),
        Command("status", "tombola.commands.training:add_status", "show the progress of a search"),
        Command("export", "tombola.commands.training:add_export", "write finished tickets as a library"),
        Command("library", "tombola.commands.library:add_options", "show, compare, fetch and publish libraries"),
        Command("table", "tombola.commands.training:add_table", "print a library's reported accuracy"),
        Command("compare", "tombola.commands.training:add_compare", "measure how different the tickets are"),
        Command("figures", "tombola.commands.training:add_figures", "plot a search's loss and accuracy"),
        Command("work", "tombola.commands.training:add_work", None),
    ),
    "Measure": (Command("bench", "tombola.commands.bench:add_options", "measure the engine, latency and cost"),),
}

EXAMPLES: Final = """\
examples:
  tombola serve                              the embedded library, on port 8000 of this machine
  tombola sample picture.png                 something to POST to it
  tombola check my/library                   is it whole, does it run, how fast is it
  tombola classify photos --out results.csv  a folder, each picture with its answer
  tombola audit --profile smoke              attack the embedded library for a minute
  tombola search --data cifar10 --state run  search tickets of your own

`tombola COMMAND --help` explains a command.
"""


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations whose mistakes are one line and exit code 2."""

    def __init__(self, *, options: str = "", **words: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **words}, allow_abbrev=False)
        self.options = options

    def load(self) -> "Parser":
        """Adds the command's options, once."""
        if self.options:
            module, function = self.options.split(":")
            self.options = ""
            getattr(importlib.import_module(module), function)(self)
        return self

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Unknown options are refused by the command that they were given to, which knows what is near."""
        self.load()
        arguments, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self.listed_options(), n=1)
            self.error(f"{unknown[0]}: not expected here" + (f"; did you mean {near[0]}?" if near else ""))
        return arguments, unknown

    def listed_options(self) -> list[str]:
        return [flag for each in self._actions if each.help != argparse.SUPPRESS for flag in each.option_strings]

    def error(self, message: str) -> NoReturn:
        self.exit(REFUSED, f"tombola: {message} (see {self.prog} --help)\n")


def parser() -> Parser:
    """The whole command line."""
    top = Parser(
        prog="tombola",
        usage="tombola COMMAND ...",
        description="Serves, audits and makes libraries of lottery tickets: a fresh random ensemble for every image.",
        epilog=f"{overview()}\n{EXAMPLES}",
    )
    top.add_argument("--version", action="version", version=f"tombola {product_version()}", help="print the version")
    commands = top.add_subparsers(
        metavar="COMMAND", dest="command", prog="tombola", parser_class=Parser, help=argparse.SUPPRESS
    )
    for group in GROUPS.values():
        for command in group:
            commands.add_parser(command.name, options=command.options)
    return top


def check_command(top: Parser, words: Sequence[str]) -> None:
    """Refuses a command that does not exist, with the nearest one that does."""
    name = next((word for word in words if not word.startswith("-")), None)
    listed = [command.name for group in GROUPS.values() for command in group if command.help]
    if name is None or name in {command.name for group in GROUPS.values() for command in group}:
        return
    near = difflib.get_close_matches(name, listed, n=1)
    top.error(f"{name}: no such command" + (f"; did you mean {near[0]}?" if near else ""))


def overview() -> str:
    """The listed commands by group."""
    lines = []
    for title, group in GROUPS.items():
        lines += [f"{title.lower()}:", *(f"  {each.name:14s} {each.help}" for each in group if each.help), ""]
    return "\n".join(lines)


def join_names(words: Sequence[str]) -> list[str]:
    """The words, those of a command of two as one: `audit explore`."""
    joined = " ".join(words[:2])
    return [joined, *words[2:]] if joined in {c.name for group in GROUPS.values() for c in group} else list(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit code."""
    top, words = parser(), join_names(sys.argv[1:] if argv is None else argv)
    check_command(top, words)
    arguments = top.parse_args(words)
    if arguments.command is None:
        top.print_help(sys.stderr)
        return REFUSED
    run: Run = arguments.run
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a locale without UTF-8 lacks characters such as theta
    try:
        return run(arguments)
    except TombolaError as error:
        print(f"tombola: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"tombola: {os_error_text(error)}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED
