"""Who goes next, and who may come in: fair turns, a rate for each client, and an estimate of the wait.

Nothing here knows of threads or event loops: time is an argument, and the caller holds the lock.
"""

import math
from collections import OrderedDict, deque
from typing import Final, Generic, Protocol, TypeVar

SMOOTHING: Final = 0.2  # weight of the last window in the pace: the last ten or so decide
CLIENTS: Final = 10_000  # token buckets remembered; the longest unused is forgotten first


class Waiting(Protocol):
    """A request with rows in the queue. next: its first row not yet taken."""

    @property
    def client(self) -> str: ...
    @property
    def size(self) -> int: ...

    next: int


Request = TypeVar("Request", bound=Waiting)


class FairQueue(Generic[Request]):
    """Rows of many requests, handed out in turns: one row of each client, and of a client one row of each request.

    So a request of 512 images delays a single image by one row, not by 512.
    """

    def __init__(self) -> None:
        self.clients: OrderedDict[str, deque[Request]] = OrderedDict()
        self.rows = 0
        self.rows_of: dict[str, int] = {}

    def push(self, request: Request) -> None:
        self.clients.setdefault(request.client, deque()).append(request)
        self.count(request.client, request.size - request.next)

    def take(self, limit: int) -> list[tuple[Request, int]]:
        """At most `limit` rows, each as (request, index of the row in it)."""
        taken: list[tuple[Request, int]] = []
        while self.clients and len(taken) < limit:
            client, requests = self.clients.popitem(last=False)
            request = requests.popleft()
            taken.append((request, request.next))
            request.next += 1
            if request.next < request.size:
                requests.append(request)
            if requests:
                self.clients[client] = requests
            self.count(client, -1)
        return taken

    def drop(self, request: Request) -> None:
        """Takes the rest of a request out; nothing happens when none of it is left."""
        if request.next >= request.size:
            return
        requests = self.clients[request.client]
        requests.remove(request)
        if not requests:
            del self.clients[request.client]
        self.count(request.client, request.next - request.size)
        request.next = request.size

    def count(self, client: str, change: int) -> None:
        self.rows += change
        left = self.rows_of.get(client, 0) + change
        if left:
            self.rows_of[client] = left
        else:
            self.rows_of.pop(client, None)

    def ahead(self, client: str, size: int) -> int:
        """Rows that will be taken before the last of `size` new rows of this client, at most, by the rule of turns."""
        others = len(self.rows_of) - (client in self.rows_of)
        mine = self.rows_of.get(client, 0) + size
        return min(self.rows + size, mine * (others + 1))


class ThroughputEstimate:
    """How fast rows are answered, from the windows that have been."""

    def __init__(self) -> None:
        self.row_s = 0.0
        self.last = 0.0

    def record(self, rows: int, begun: float, done: float) -> None:
        """A window of `rows` ran from `begun` to `done`; time that it shared with the one before counts once."""
        found = max(0.0, done - max(begun, self.last)) / rows
        self.row_s = found if self.row_s == 0.0 else self.row_s + SMOOTHING * (found - self.row_s)
        self.last = done

    def wait_s(self, rows: int) -> float:
        return rows * self.row_s

    def retry_after_s(self, rows: int) -> int:
        """Whole seconds, as the header has them."""
        return min(60, max(1, math.ceil(self.wait_s(rows))))


class RateLimiter:
    """For each client `burst` tokens at first, `rate` more each second, one a row."""

    def __init__(self, rate: float, burst: int) -> None:
        self.rate = rate
        self.burst = burst
        self.levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, client: str, rows: int, now: float) -> float:
        """Seconds until the tokens for so many rows are there, 0 if they are. A rate of 0 limits nothing.

        A request of more rows than `burst` needs a full bucket, and leaves it in debt.
        """
        return max(0.0, (min(rows, self.burst) - self.level(client, now)) / self.rate) if self.rate > 0 else 0.0

    def take(self, client: str, rows: int, now: float) -> None:
        if self.rate <= 0:
            return
        level = self.level(client, now)
        self.levels.pop(client, None)
        self.levels[client] = (level - rows, now)
        if len(self.levels) > CLIENTS:
            self.levels.popitem(last=False)

    def level(self, client: str, now: float) -> float:
        level, then = self.levels.get(client, (float(self.burst), now))
        return min(float(self.burst), level + (now - then) * self.rate)
