"""Fair turns, a rate limit for each client, and an estimate of the wait.

Nothing here knows of threads or event loops: time is an argument, and the caller holds the lock.
"""

import math
from collections import OrderedDict, deque
from typing import Final, Generic, Protocol, TypeVar

SMOOTHING: Final = 0.2  # weight of the last batch in the estimate: the last ten or so decide
MAX_CLIENTS: Final = 10_000  # token buckets remembered; the longest unused is forgotten first


class Queueable(Protocol):
    """A request with images in the queue. next_index: its first image that no batch has taken."""

    @property
    def client(self) -> str: ...
    @property
    def size(self) -> int: ...

    next_index: int


Request = TypeVar("Request", bound=Queueable)


class FairQueue(Generic[Request]):
    """Images of many requests, taken in turns: one image of each client, and of a client one image of each request.

    So a request of 512 images delays a single image by one image, not by 512.
    """

    def __init__(self) -> None:
        self.clients: OrderedDict[str, deque[Request]] = OrderedDict()
        self.length = 0  # images
        self.length_by_client: dict[str, int] = {}

    def push(self, request: Request) -> None:
        self.clients.setdefault(request.client, deque()).append(request)
        self.count(request.client, request.size - request.next_index)

    def take(self, limit: int) -> list[tuple[Request, int]]:
        """At most `limit` images, each as (request, index of the image in it)."""
        taken: list[tuple[Request, int]] = []
        while self.clients and len(taken) < limit:
            client, requests = self.clients.popitem(last=False)
            request = requests.popleft()
            taken.append((request, request.next_index))
            request.next_index += 1
            if request.next_index < request.size:
                requests.append(request)
            if requests:
                self.clients[client] = requests
            self.count(client, -1)
        return taken

    def drop(self, request: Request) -> None:
        """Removes the images of a request that are still queued."""
        if request.next_index >= request.size:
            return
        requests = self.clients[request.client]
        requests.remove(request)
        if not requests:
            del self.clients[request.client]
        self.count(request.client, request.next_index - request.size)
        request.next_index = request.size

    def count(self, client: str, change: int) -> None:
        self.length += change
        remaining = self.length_by_client.get(client, 0) + change
        if remaining:
            self.length_by_client[client] = remaining
        else:
            self.length_by_client.pop(client, None)

    def images_until_last(self, client: str, size: int) -> int:
        """The most images that are taken up to and including the last of `size` new ones of this client."""
        others = len(self.length_by_client) - (client in self.length_by_client)
        own = self.length_by_client.get(client, 0) + size
        return min(self.length + size, own * (others + 1))


class ThroughputEstimate:
    """Seconds per image, smoothed over recent batches."""

    def __init__(self) -> None:
        self.seconds_per_image = 0.0
        self.last_end = 0.0

    def record(self, images: int, started_at: float, ended_at: float) -> None:
        """A batch of so many images. Time that it shared with the batch before counts once."""
        latest = max(0.0, ended_at - max(started_at, self.last_end)) / images
        if self.seconds_per_image == 0.0:
            self.seconds_per_image = latest
        else:
            self.seconds_per_image += SMOOTHING * (latest - self.seconds_per_image)
        self.last_end = ended_at

    def wait_s(self, images: int) -> float:
        return images * self.seconds_per_image

    def retry_after_s(self, images: int) -> int:
        """Whole seconds, as the header has them."""
        return min(60, max(1, math.ceil(self.wait_s(images))))


class RateLimiter:
    """A token bucket for each client: `burst` tokens at first, `rate` more each second, one token an image."""

    def __init__(self, rate: float, burst: int) -> None:
        self.rate = rate
        self.burst = burst
        self.levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, client: str, images: int, now: float) -> float:
        """Seconds until the tokens for so many images are there, 0 if they are. A rate of 0 limits nothing.

        A request of more images than `burst` needs a full bucket, and leaves it in debt.
        """
        return max(0.0, (min(images, self.burst) - self.level(client, now)) / self.rate) if self.rate > 0 else 0.0

    def take(self, client: str, images: int, now: float) -> None:
        if self.rate <= 0:
            return
        level = self.level(client, now)
        self.levels.pop(client, None)
        self.levels[client] = (level - images, now)
        if len(self.levels) > MAX_CLIENTS:
            self.levels.popitem(last=False)

    def level(self, client: str, now: float) -> float:
        level, then = self.levels.get(client, (float(self.burst), now))
        return min(float(self.burst), level + (now - then) * self.rate)
