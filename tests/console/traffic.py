"""Clients that ask all the time, for pictures of a server at work."""

import base64
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from service.sample import ship

PAUSE_S: Final = 0.1
IMAGES: Final = (1, 1, 1, 4, 16)  # in requests, over and over: enough that draws are soon compared with their law


@contextmanager
def traffic(url: str) -> Iterator[None]:
    """One client of the public plane at this address, until left. It takes no offence at being turned away."""
    over = threading.Event()
    thread = threading.Thread(target=ask, args=(f"{url}/v1/classify", over))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def ask(url: str, over: threading.Event) -> None:
    picture = base64.b64encode(ship()).decode()
    bodies = [json.dumps({"images": [picture] * count}).encode() for count in IMAGES]
    turn = 0
    while not over.wait(PAUSE_S):
        request = urllib.request.Request(url, bodies[turn % len(bodies)], {"content-type": "application/json"})
        with suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=60):
            turn += 1
