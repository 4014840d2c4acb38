"""Clients that ask all the time, for pictures of a server at work."""

import base64
import json
import urllib.request
from contextlib import AbstractContextManager
from itertools import cycle
from typing import Final

from tests.support.serving import fetch, over_and_over
from tombola.sample_image import draw_sample

PAUSE_S: Final = 0.1
IMAGES: Final = (1, 1, 1, 4, 16)  # in requests, over and over: enough that draws are soon compared with their law


def traffic(url: str) -> AbstractContextManager[None]:
    """One client of the public plane at this address, until left. It takes no offence at being turned away."""
    picture = base64.b64encode(draw_sample()).decode()
    bodies = cycle([json.dumps({"images": [picture] * count}).encode() for count in IMAGES])

    def ask() -> None:
        fetch(urllib.request.Request(f"{url}/v1/classify", next(bodies), {"content-type": "application/json"}))

    return over_and_over(ask, PAUSE_S)
