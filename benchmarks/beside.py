"""What an audit costs those who are served meanwhile: the same loads without one, with one, and without one again."""

import json
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from benchmarks import requests
from benchmarks.load import closed_loop, open_figures
from benchmarks.requests import Form
from benchmarks.servers import Running
from service.outbound import open_url

SHARE: Final = 0.5  # of the capacity, in the open loop
AUDIT: Final = {"profile": "smoke", "images": 200}  # on images made here; far longer than it is looked at
PATIENCE_S: Final = 300.0


def beside_an_audit(running: Running, token: str, seconds: float) -> dict[str, Any]:
    form = requests.files("/v1/classify")
    closed_loop(running.place, form, 32, 3)  # warm
    rate = SHARE * closed_loop(running.place, form, 32, seconds)["images_per_s"]
    before = loads(running, form, rate, seconds)
    with audit(running, token) as progress:
        beside, share = loads(running, form, rate, seconds), progress()
    after = loads(running, form, rate, seconds)
    return {"rate": round(rate, 1), "audit": AUDIT, "share_done": share, "alone": [before, after], "beside": beside}


def loads(running: Running, form: Form, rate: float, seconds: float) -> dict[str, Any]:
    return {
        "one": closed_loop(running.place, form, 1, seconds),
        "many": closed_loop(running.place, form, 32, seconds),
        "open": open_figures(running.place, form, rate, seconds, deadline_s=1.0),
    }


@contextmanager
def audit(running: Running, token: str) -> Iterator[Any]:
    """An audit that is attacking; gives what tells which share of it is done. Raises RuntimeError if it ends before it
    is cancelled."""

    def ask(method: str, path: str, content: Any = None) -> Any:
        body = None if content is None else json.dumps(content).encode()
        headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
        request = urllib.request.Request(f"{running.admin}{path}", body, headers, method=method)
        with open_url(request, 60) as answer:
            return json.loads(answer.read())

    path = f"/admin/audits/{ask('POST', '/admin/audits', AUDIT)['id']}"
    late = time.monotonic() + PATIENCE_S
    while (state := ask("GET", path))["progress"] is None:
        if time.monotonic() > late or state["state"] not in ("queued", "running"):
            raise RuntimeError(f"the audit has not begun: {state}")
        time.sleep(0.5)
    yield lambda: ask("GET", path)["progress"]["share"]
    if ask("DELETE", path)["state"] != "cancelled":
        raise RuntimeError("the audit ended too early")
