"""tombola bench capacity: what an image costs a server, and how many replicas a load takes.

A server is started as it would be in production and asked over HTTP. Its cost is the processor time that it counts
itself: process_cpu_seconds_total and tombola_engine_cpu_seconds_total. So neither the client nor other work on the
machine is in it. The same quotient can be watched on servers that are in use; docs/OPERATING.md says how, and what
to do with the number.
"""

import base64
import http.client
import io
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from model_store.input_spec import InputSpec
from model_store.json_object import Json
from service.outbound import open_url
from service.settings import Settings, SettingsRejected

ROWS: Final = 512  # images under way at the most: full windows, and half of what a server admits
CLIENTS: Final = 32  # connections at the most
BATCH: Final = 64  # images in a request of the second kind, or as many as a body holds
CORES: Final = 2  # of a replica, as deploy/kubernetes has it
SHARE: Final = 0.6  # of its cores that a replica should be busy with at the peak: the rest is for bursts and failures
LOADS: Final = (100, 1_000, 10_000, 100_000, 1_000_000)  # images per second
SCRAPE_S: Final = 15  # as deploy/prometheus has it


@dataclass(frozen=True)
class RunningServer:
    """A server that runs, by the two addresses it announced."""

    public: str
    admin: str

    def metrics(self) -> dict[str, float]:
        """Every series of /metrics."""
        with open_url(f"{self.admin}/metrics", 30) as answer:
            lines = answer.read().decode().splitlines()
        return {
            name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        }


@contextmanager
def server(flags: Sequence[str]) -> Iterator[RunningServer]:
    """`tombola serve` on free ports. Raises SettingsRejected if it does not come up."""
    with tempfile.TemporaryDirectory() as state:
        command = [sys.executable, "-m", "tombola", "serve", "--port", "0", "--admin-port", "0", "--drain-delay-s", "0"]
        # A machine that does other work as well may be slow: that must not end requests.
        command += ["--state-dir", state, "--log-level", "error", "--deadline-s", "600", *flags]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
            try:
                yield announced(process)
            finally:
                process.terminate()


def announced(process: "subprocess.Popen[str]") -> RunningServer:
    output: dict[str, str] = {}
    for line in process.stdout or ():
        name, _, rest = line.partition(" ")
        output[name] = rest.split()[0] if rest.split() else ""
        if name == "Ready:":
            return RunningServer(output["public"], output["admin"])
    raise SettingsRejected("bench capacity: the server did not come up; what it said is above")


def noise(spec: InputSpec) -> bytes:
    """PNG of the input's size that does not compress: what costs most to decode of what clients usually send."""
    pixels = np.random.default_rng(0).integers(0, 256, (spec.height, spec.width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def bodies(spec: InputSpec, max_body_bytes: int) -> dict[str, tuple[bytes, int]]:
    """The two kinds of request: (body, images in it)."""
    image = noise(spec)
    text = base64.b64encode(image).decode()
    count = max(1, min(BATCH, max_body_bytes // (len(text) + 8)))
    return {"one": (image, 1), "many": (json.dumps({"images": [text] * count}).encode(), count)}


def ask(place: RunningServer, body: bytes, images: int, total: int) -> None:
    """`total` images, `images` a request. Raises SettingsRejected if the server turns any away."""
    left = iter(range(math.ceil(total / images)))
    lock, refused = threading.Lock(), []

    def client() -> None:
        with closing(http.client.HTTPConnection(str(urlsplit(place.public).netloc), timeout=600)) as connection:
            while True:
                with lock:
                    if next(left, None) is None:
                        return
                connection.request("POST", "/v1/classify", body)
                response = connection.getresponse()
                response.read()
                if response.status != 200:
                    refused.append(response.status)

    threads = [threading.Thread(target=client) for _ in range(min(CLIENTS, ROWS // images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if refused:
        raise SettingsRejected(f"bench capacity: expected answers only, got {len(refused)} refusals, as {refused[0]}")


def cost(place: RunningServer, body: bytes, images: int, total: int) -> Json:
    """Of `total` images, after a few to warm up. Raises SettingsRejected where the process cannot count its time."""
    ask(place, body, images, max(ROWS, total // 10))
    before, begun = place.metrics(), time.perf_counter()
    ask(place, body, images, total)
    after, passed_s = place.metrics(), time.perf_counter() - begun
    if "process_cpu_seconds_total" not in after:
        raise SettingsRejected("bench capacity: this system does not tell a process its processor time; use Linux")
    own, apart, done = (
        after[name] - before[name]
        for name in ("process_cpu_seconds_total", "tombola_engine_cpu_seconds_total", "tombola_inference_images_total")
    )
    cpu_s = own + apart
    return {"images": int(done), "cpu_ms": round(1000 * cpu_s / done, 3), "images_per_s": round(done / passed_s, 1)}


def measure(settings: Settings, names: Sequence[str], total: int, spec: InputSpec) -> Json:
    """names: the settings that the started server is to share.  spec: the library's input."""
    options = {name: getattr(settings, name) for name in names if name != "state_dir"}
    flags = [word for name, value in options.items() if value is not None for word in (flag(name), str(value))]
    requests = bodies(spec, settings.max_body_bytes)
    with server(flags) as place:
        figures: Json = {kind: cost(place, body, images, total) for kind, (body, images) in requests.items()}
        metrics = place.metrics()
    return figures | {
        "rows": ROWS,
        "batch": requests["many"][1],
        "memory_mb": round(
            (metrics["process_resident_memory_bytes"] + metrics["tombola_engine_resident_memory_bytes"]) / 1e6
        ),
        "series": len(metrics),
    }


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# What follows from it


def replicas(images_per_s: float, cpu_ms: float, cores: float = CORES, share: float = SHARE) -> int:
    """ceil(images/s x processor seconds per image / (cores of a replica x share of them to be busy))."""
    return max(1, math.ceil(images_per_s * cpu_ms / 1000 / (cores * share)))


def table(figures: Json) -> str:
    """Markdown: the measured cost, and what loads take of replicas, memory and Prometheus."""
    one, many = figures["one"], figures["many"]
    summary = (
        f"An image costs **{one['cpu_ms']:.2f} ms** of processor time in a request of its own, and "
        f"**{many['cpu_ms']:.2f} ms** in one of {figures['batch']}. "
        f"Measured on {one['images']:,} and {many['images']:,} images, up to {figures['rows']} of them under way. "
        f"Library {figures['library'][:12]}, {figures['engine']['name']}, {figures['machine']['cpu']}, load "
        f"{figures['machine']['load_before']:.1f} before. A replica takes {figures['memory_mb']:,} MB and exports "
        f"{figures['series']:,} series."
    )
    lines = [
        "<!-- tombola bench capacity -->",
        summary,
        "",
        f"| images/s | cores busy | replicas of {CORES} cores | memory, GB | series | samples/s |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for load in LOADS:
        count = replicas(load, one["cpu_ms"])
        lines.append(
            f"| {load:,} | {load * one['cpu_ms'] / 1000:,.1f} | {count:,} | {count * figures['memory_mb'] / 1000:,.1f} "
            f"| {count * figures['series']:,} | {count * figures['series'] / SCRAPE_S:,.0f} |"
        )
    return "\n".join(lines)
