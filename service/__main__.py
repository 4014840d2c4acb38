"""python -m service serve | check | sample | bench | audit | reference"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from model_store.errors import StoreError, os_error_text
from service.settings import Settings, SettingsRejected, add_flags, ensure_state_dir, read_settings

Run = Callable[[argparse.Namespace], int]

EPILOG: Final = """\
Every setting is also a variable: --queue-rows is TOMBOLA_QUEUE_ROWS; a flag wins over it. Examples:

  python -m service serve --port 8080              the embedded library on another port
  TOMBOLA_LIBRARY=my/library python -m service serve
  python -m service check my/library               is it whole, does it run, how fast is it
  python -m service sample picture.png             something to POST
  python -m service bench raw                      the engine against the plain loop
"""
CHECKED: Final = ("device", "engine", "threads", "state_dir")


def main(arguments: Sequence[str] | None = None) -> int:
    """The process's exit code. What is wrong is said in one line."""
    given = parser().parse_args(arguments)
    chosen: Run = given.run
    try:
        return chosen(given)
    except (SettingsRejected, StoreError) as error:
        print(f"tombola: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a file to be read or written that cannot be; what the others are is said where they are
        print(f"tombola: {os_error_text(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m service",
        description="Serves a library of lottery tickets: a fresh random ensemble for every image.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve a library until SIGTERM", description=run_serve.__doc__)
    add_flags(serve)
    serve.set_defaults(run=run_serve)
    check = commands.add_parser("check", help="verify a library, warm it up, measure it", description=run_check.__doc__)
    check.add_argument(
        "library", nargs="?", type=Path, help="folder of the library (TOMBOLA_LIBRARY, or the embedded one)"
    )
    check.add_argument("--json", action="store_true", help="print the figures as JSON")
    add_flags(check, CHECKED)
    check.set_defaults(run=run_check)
    sample = commands.add_parser("sample", help="write a picture to try the server with")
    sample.add_argument("file", nargs="?", type=Path, help="where to write it (standard output)")
    sample.set_defaults(run=run_sample)
    reference = commands.add_parser("reference", help="print REFERENCE.md: every setting, metric and route")
    reference.set_defaults(run=run_reference)
    for module in ("service.benchmarks.command", "service.audit.command"):
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module).add_parser(commands)
    return top


def run_serve(given: argparse.Namespace) -> int:
    """Serves a library on two planes until SIGTERM or Ctrl-C. SIGHUP reads the library and the API keys again."""
    settings = read_settings(vars(given))
    from service import app

    return app.run(settings, announce)


def announce(service: Any, serving: Any) -> None:
    """What a person wants to know once it runs, and a line to paste."""
    from model_store.policy import states
    from service.sample import ship

    picture = ensure_state_dir(service.settings).resolve() / "sample.png"
    picture.write_bytes(ship())
    library, engine = serving.library, serving.engine
    key = "" if service.settings.api_keys_file is None else "-H 'Authorization: Bearer YOUR-KEY' "
    print(f"library  {library.digest[:12]}, {len(library.tickets)} tickets of {len(library.classes)} classes")
    print(f"engine   {engine.name} on {engine.device}, {engine.threads} threads; {engine.note}; ", end="")
    print(f"logits within {engine.difference:.0e} of torch's; warm in {engine.warm_up_s:.1f} s")
    print(f"public   {service.public_url}")
    print(f"admin    {service.admin_url}   token: {token_place(service.settings)}")
    print(f"try      curl {key}--data-binary @{picture} {service.public_url}/v1/classify")
    print(f"Ready: every image gets one of {states(library.policy):,} ensembles.", flush=True)


def token_place(settings: Settings) -> str:
    """Where the admin token is, never the token."""
    if settings.admin_token is not None:
        return "the one in TOMBOLA_ADMIN_TOKEN"
    return str(settings.admin_token_file or settings.state_dir / "admin-token")


def run_sample(given: argparse.Namespace) -> int:
    from service.sample import ship

    if given.file is None:
        sys.stdout.buffer.write(ship())
    else:
        given.file.write_bytes(ship())
        print(f"{given.file}: a ship, 256x256")
    return 0


def run_check(given: argparse.Namespace) -> int:
    """Verifies a library, warms it up, compares its logits with torch's and measures it. Exit code 0 if all is well."""
    from service.benchmarks.library_check import figures, lines

    found = figures(read_settings({name: value for name, value in vars(given).items() if value is not None}))
    print(json.dumps(found, indent=2) if given.json else "\n".join(lines(found)))
    return 0


def run_reference(_: argparse.Namespace) -> int:
    from service.reference import page

    print(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
