"""`tombola serve`: a library on two planes."""

import argparse
from typing import Any
from urllib.request import getproxies

from service.settings import Settings, add_flags, ensure_state_dir, read_settings

DESCRIPTION = """\
Serves a library on two planes until SIGTERM or Ctrl-C. SIGHUP reads the library and the API keys again.

Every option is also a variable: --max-body-bytes is TOMBOLA_MAX_BODY_BYTES. An option wins over its variable.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.usage = "tombola serve [OPTION ...]"
    add_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    settings = read_settings(vars(arguments))
    from service import app

    return app.run(settings, announce)


def announce(service: Any, serving: Any) -> None:
    """Prints what a person wants to know once the server is ready, and a line to paste."""
    from model_store.policy import states
    from tombola.sample_image import draw_sample

    picture = ensure_state_dir(service.settings).resolve() / "sample.png"
    picture.write_bytes(draw_sample())
    library, engine = serving.library, serving.engine
    key = "" if service.settings.api_keys_file is None else "-H 'Authorization: Bearer YOUR-KEY' "
    print(f"library  {library.digest[:12]}, {len(library.tickets)} tickets of {len(library.classes)} classes")
    print(f"engine   {engine.name} on {engine.device}, {engine.threads} threads; {engine.note}; ", end="")
    print(f"logits within {engine.difference:.0e} of torch's; warm in {engine.warm_up_s:.1f} s")
    print(f"public   {service.public_url}")
    print(f"admin    {service.admin_url}   token: {token_source(service.settings)}")
    proxied = getproxies().keys() - {"no"}  # curl would ask that proxy for this machine's loopback
    direct = "--noproxy '*' " if proxied else ""
    print(f"try      curl {direct}{key}--data-binary @{picture} {service.public_url}/v1/classify")
    print(f"Ready: every image gets one of {states(library.policy):,} ensembles.", flush=True)


def token_source(settings: Settings) -> str:
    """Where the admin token is, never the token."""
    if settings.admin_token is not None:
        return "the one in TOMBOLA_ADMIN_TOKEN"
    return str(settings.admin_token_file or settings.state_dir / "admin-token")
