"""`tombola serve`: a library on two planes."""

import argparse
from typing import Any
from urllib.request import getproxies

from model_store.errors import os_error_text
from model_store.files import write_atomically
from service.settings import Settings, add_flags, admin_token, ensure_state_dir, read_settings

DESCRIPTION = """\
Serves a library on two planes until SIGTERM or Ctrl-C. SIGHUP reads the library and the API keys again.

Every setting is an option, a variable and a key of tombola.toml: --max-body-bytes, TOMBOLA_MAX_BODY_BYTES,
max_body_bytes. An option wins over its variable, a variable over the file, the file over the default.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.usage = "tombola serve [OPTION ...]"
    add_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    settings = read_settings(vars(arguments))
    ensure_state_dir(settings)
    admin_token(settings)  # what it refuses, it refuses before a process starts
    from service.engine.launcher import NVIDIA_DRIVER, start_ahead

    gpu = NVIDIA_DRIVER.exists()
    fork_server = start_ahead(settings.library, settings, print_step, gpu=gpu, background=False)
    try:
        from service import lifecycle  # takes seconds, in which the library is being opened

        return lifecycle.run(settings, announce, print_step, fork_server)
    finally:
        if fork_server is not None:
            fork_server.close()


def print_step(step: str) -> None:
    print(f"start    {step}", flush=True)


def announce(service: Any, serving: Any) -> None:
    """Prints what a person wants to know once the server is ready, and a line to paste."""
    from model_store.policy import states
    from service.outbound import loopback_url
    from tombola.sample_image import draw_sample

    picture = service.settings.state_dir.resolve() / "sample.png"
    library, engine = serving.library, serving.engine
    key = "" if service.settings.api_keys_file is None else "-H 'Authorization: Bearer YOUR-KEY' "
    print(f"library  {library.digest[:12]}, {len(library.tickets)} tickets of {len(library.classes)} classes")
    print(f"engine   {engine.name} on {engine.device}, {engine.threads} threads; {engine.note}; ", end="")
    print(f"logits within {engine.difference:.0e} of torch's; warm in {engine.warm_up_s:.1f} s")
    print(f"public   {service.public_url}")
    if service.grpc is not None:
        print(f"grpc     {service.grpc.address}")
    print(f"admin    {service.admin_url}   token: {token_source(service.settings)}")
    proxied = getproxies().keys() - {"no"}  # curl would ask that proxy for this machine's loopback
    direct = "--noproxy '*' " if proxied else ""
    try:
        write_atomically(picture, draw_sample())
        print(f"try      curl {direct}{key}--data-binary @{picture} {loopback_url(service.public_url)}/v1/classify")
    except OSError as error:  # no reason for a server that is ready to end
        print(f"try      no sample picture: {os_error_text(error)}")
    print(f"Ready: every image gets one of {states(library.policy):,} ensembles.", flush=True)


def token_source(settings: Settings) -> str:
    """Where the admin token is, never the token."""
    if settings.admin_token is not None:
        return "the one in TOMBOLA_ADMIN_TOKEN"
    return str(settings.admin_token_file or settings.state_dir / "admin-token")
