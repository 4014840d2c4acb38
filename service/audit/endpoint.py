"""A classifier behind HTTP, known by its answers alone: two protocols, a budget of images, and a ledger of them."""

import base64
import hashlib
import json
import math
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.audit.attacks.black_box import PATIENCE, TIMEOUT_S, as_png, as_row
from service.audit.errors import AuditRejected, BudgetSpent, OracleFailed
from service.outbound import ProxyRejected, http_client

Protocol = Literal["oip", "v1"]
Feedback = Literal["score", "decision"]
PROTOCOLS: Final[tuple[Protocol, ...]] = get_args(Protocol)
FEEDBACKS: Final[tuple[Feedback, ...]] = get_args(Feedback)
LEDGER: Final = "queries.jsonl"
REQUEST_IMAGES: Final = 32  # images of one request
PROBES: Final = 4  # random images that it answers twice before it is accepted
ANSWERS: Final = 8  # to each scored image, where answers are random
MAX_WAIT_S: Final = 60.0  # for one Retry-After
SAME: Final = 0.02  # of equal answers: two digits of a probability, rounded either way
SUMS_TO_ONE: Final = 0.06  # rounded probabilities of ten classes are off by so much at most
FLOATS: Final = ("FP16", "FP32", "FP64")
INTEGERS: Final = ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")
Rows = NDArray[np.float64]


@dataclass(eq=False)
class Endpoint:
    """One model at one address.

    budget: the most images that it may be asked about, over all sessions of an audit.  feedback: what the attacker
    uses, the answers' probabilities or their labels; None for whatever it gives.
    """

    url: str
    classes: tuple[str, ...]
    size: tuple[int, int]
    budget: int
    protocol: Protocol = "oip"
    feedback: Feedback | None = None
    key: str | None = None
    proxy: str | None = None
    repeats: int = 1  # answers to each scored image: several where they are random
    spent: int = 0
    ledger: Path | None = None
    answers: dict[str, list[float]] = field(default_factory=dict)  # for scoring; an attack always asks anew
    pixels: dict[str, Any] = field(default_factory=dict)  # the input tensor of the Open Inference Protocol

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise AuditRejected(f"protocol {self.protocol!r:.40}; expected one of {', '.join(PROTOCOLS)}")
        if self.feedback not in (None, *FEEDBACKS):
            raise AuditRejected(f"feedback {self.feedback!r:.40}; expected one of {', '.join(FEEDBACKS)}")
        if self.budget < 1:
            raise AuditRejected(f"budget {self.budget}; expected a number of images, at least 1")
        try:
            self.client = http_client(timeout_s=TIMEOUT_S, proxy=self.proxy)
        except ProxyRejected as error:
            raise AuditRejected(str(error)) from None
        weakref.finalize(self, self.client.close)
        suffix = "/infer" if self.protocol == "oip" else "/v1/classify"
        self.url = self.url.rstrip("/").removesuffix(suffix)

    @property
    def digest(self) -> str:
        """SHA-256 of its address and classes: its weights are not known."""
        return hashlib.sha256(json.dumps([self.url, self.protocol, self.feedback, self.classes]).encode()).hexdigest()

    def accept(self) -> None:
        """Asks about a few random images, twice. Raises AuditRejected, OracleFailed."""
        if self.protocol == "oip":
            self.pixels = find_pixels(self.send("GET", self.url), self.url, self.size)
        generator = torch.Generator().manual_seed(0)
        probes = torch.randint(0, 256, (PROBES, 3, *self.size), generator=generator, dtype=torch.uint8)
        first, second = self.ask(probes), self.ask(probes)
        labels_alone = bool(np.isin(np.concatenate([first, second]), (0.0, 1.0)).all())
        if self.feedback == "score" and labels_alone:
            raise AuditRejected(
                f"{self.url}: answers labels alone; expected probabilities or logits for score feedback"
            )
        self.feedback = self.feedback or ("decision" if labels_alone else "score")
        self.repeats = 1 if np.allclose(first, second, atol=SAME) else ANSWERS

    def keep_in(self, folder: Path) -> None:
        """Goes on from the ledger of an earlier session in this folder, if there is one."""
        self.ledger = folder / LEDGER
        for line in self.ledger.read_text("utf-8").splitlines() if self.ledger.exists() else ():
            try:
                entry = json.loads(line)
                self.spent += entry["images"]
                self.answers.update(entry["answers"])
            except (ValueError, KeyError, TypeError):  # cut off in the middle of a line
                continue

    def logits(self, images: Tensor, place: int) -> Tensor:
        """Log-probabilities, [N, classes], of its `place`-th answer to each image: asked once, then remembered."""
        pixels = (images * 255).round().to(torch.uint8).cpu()
        keys = [f"{place} {hashlib.sha256(image.numpy().tobytes()).hexdigest()}" for image in pixels]
        new = [index for index, key in enumerate(keys) if key not in self.answers]
        for index in torch.split(torch.tensor(new, dtype=torch.int64), REQUEST_IMAGES) if new else ():
            rows = self.ask(pixels[index])
            self.record(len(index), {keys[i]: row for i, row in zip(index.tolist(), rows.tolist(), strict=True)})
        shares = torch.tensor([self.answers[key] for key in keys], dtype=torch.float32)
        return shares.clamp_min(1e-6).log().to(images.device)

    def attack_answers(self, pixels: Tensor) -> Rows:
        """What an attacker sees, [N, classes]: never a remembered answer."""
        parts = []
        for part in torch.split(pixels, REQUEST_IMAGES):
            parts.append(self.ask(part))
            self.record(len(part), {})
        rows = np.concatenate(parts)
        return one_hot(rows.argmax(axis=1), len(self.classes)) if self.feedback == "decision" else rows

    def record(self, images: int, answers: dict[str, list[float]]) -> None:
        self.answers.update(answers)
        if self.ledger is not None:
            self.ledger.parent.mkdir(parents=True, exist_ok=True)
            with self.ledger.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"images": images, "answers": answers}) + "\n")

    def ask(self, pixels: Tensor) -> Rows:
        """Probabilities, [N, classes], for uint8 [N, 3, H, W]. Raises BudgetSpent, OracleFailed."""
        if self.spent + len(pixels) > self.budget:
            raise BudgetSpent(
                f"{self.url}: {self.spent} images of a budget of {self.budget} are spent, and {len(pixels)} more are "
                "needed; what was measured is kept, and a larger --budget goes on from there"
            )
        if self.protocol == "v1":
            encoded = [base64.b64encode(as_png(image)).decode() for image in pixels]
            body = self.send("POST", f"{self.url}/v1/classify", {"images": encoded})
            rows = self.read(read_predictions, body)
        else:
            request = {"inputs": [input_tensor(self.pixels, pixels)]}
            body = self.send("POST", f"{self.url}/infer", request)
            rows = self.read(read_tensors, body, len(pixels))
        if rows.shape != (len(pixels), len(self.classes)):
            raise OracleFailed(f"{self.url}: answers {list(rows.shape)} to {len(pixels)} images of {len(self.classes)}")
        if not np.isfinite(rows).all():
            raise OracleFailed(f"{self.url}: answers that are not finite numbers")
        self.spent += len(pixels)
        return rows

    def read(self, reader: Any, *arguments: Any) -> Rows:
        try:
            rows: Rows = reader(*arguments, self.classes)
        except WrongOrder as error:
            raise AuditRejected(f"{self.url}: {error}") from None
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise OracleFailed(f"{self.url}: an answer that cannot be read ({error!r:.160})") from None
        return rows

    def send(self, method: str, url: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON of a response. Waits as long as the server asks it to. Raises OracleFailed."""
        import httpx

        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        for _ in range(PATIENCE):
            try:
                response = self.client.request(method, url, json=body, headers=headers)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise OracleFailed(f"{url}: {type(error).__name__}: {error!s:.160}") from None
            if response.status_code not in (429, 503):
                break
            time.sleep(seconds_to_wait(response.headers.get("retry-after", "1")))
        if response.status_code != 200:
            raise OracleFailed(f"{url}: {response.status_code}: {' '.join(response.text.split())!r:.160}")
        try:
            return response.json()
        except ValueError:
            raise OracleFailed(f"{url}: no JSON: {response.text!r:.80}") from None


class WrongOrder(Exception):
    """Labels and numbers of an answer that do not belong together in the classes' order."""


def seconds_to_wait(header: str) -> float:
    try:
        seconds = float(header)
    except ValueError:  # a date
        return 1.0
    return min(max(seconds, 0.0), MAX_WAIT_S) if math.isfinite(seconds) else 1.0


class EndpointOracle:
    """The endpoint as a black-box attack asks it, counted from 0."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self.queries = endpoint, 0

    def __enter__(self) -> "EndpointOracle":
        return self

    def __exit__(self, *_: object) -> None:
        """The client stays open for the next attack."""

    def __call__(self, pixels: Tensor) -> Rows:
        self.queries += len(pixels)
        return self.endpoint.attack_answers(pixels)


class AnswersOf(nn.Module):
    """An endpoint's `place`-th answers as a network: what scoring sees. It has no gradient."""

    def __init__(self, endpoint: Endpoint, place: int) -> None:
        super().__init__()
        self.endpoint, self.place = endpoint, place
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.endpoint.logits(images, self.place)


# Tombola's own protocol


def read_predictions(body: Any, classes: Sequence[str]) -> Rows:
    rows = []
    for prediction in body["predictions"]:
        index, label = prediction["index"], prediction.get("label")
        if label is not None and (not 0 <= index < len(classes) or classes[index] != label):
            raise WrongOrder(f"answers label {label!r} at index {index}; expected the order of {list(classes)!r:.80}")
        rows.append(as_row(prediction, len(classes)))
    return np.stack(rows)


# The Open Inference Protocol


def find_pixels(metadata: Any, url: str, size: tuple[int, int]) -> dict[str, Any]:
    """The input tensor that takes pictures. Raises AuditRejected."""
    inputs = metadata.get("inputs") if isinstance(metadata, dict) else None
    for each in inputs if isinstance(inputs, list) else ():
        shape, kind = each.get("shape", ()), each.get("datatype")
        if kind in ("UINT8", *FLOATS) and len(shape) == 4 and 3 in (shape[1], shape[3]):
            first = shape[1] == 3
            wanted = tuple(shape[2:] if first else shape[1:3])
            if all(there in (-1, length) for there, length in zip(wanted, size, strict=True)):
                return {"name": each["name"], "datatype": kind, "channels_first": first}
            raise AuditRejected(f"{url}: takes images of {list(wanted)}; the audit's are {list(size)}")
    raise AuditRejected(
        f"{url}: no input of pixels in its metadata ({inputs!r:.120}); expected UINT8 or FP32, [N, 3, H, W]"
    )


def input_tensor(spec: dict[str, Any], pixels: Tensor) -> dict[str, Any]:
    """Pixels as they are for UINT8, in [0, 1] for floats."""
    values = pixels if spec["channels_first"] else pixels.permute(0, 2, 3, 1)
    numbers = values.flatten() if spec["datatype"] == "UINT8" else values.flatten().double() / 255
    return {
        "name": spec["name"],
        "datatype": spec["datatype"],
        "shape": list(values.shape),
        "data": numbers.tolist(),
    }


def read_tensors(body: Any, count: int, classes: Sequence[str]) -> Rows:
    """Probabilities, from an output of numbers, of indices, or of labels."""
    outputs = body["outputs"]
    rows: Rows | None = None
    for output in outputs:
        if output["datatype"] in FLOATS and math.prod(output["shape"]) == count * len(classes):
            rows = as_probabilities(np.array(output["data"], dtype=np.float64).reshape(count, len(classes)))
    for output in outputs:
        if output["datatype"] == "BYTES" and math.prod(output["shape"]) == count:
            labels = np.array([place_of(str(label), classes) for label in np.ravel(output["data"])])
            if rows is None:
                return one_hot(labels, len(classes))
            lead = rows.max(axis=1) - rows[np.arange(count), labels]
            if (lead > 0).any():
                place = int(lead.argmax())
                raise WrongOrder(
                    f"answers label {classes[labels[place]]!r} where class {int(rows[place].argmax())} is the highest; "
                    f"expected the order of {list(classes)!r:.80}"
                )
    if rows is None:
        for output in outputs:
            if output["datatype"] in INTEGERS and math.prod(output["shape"]) == count:
                return one_hot(np.array(output["data"], dtype=np.int64).reshape(count), len(classes))
        shapes = [[output["datatype"], *output["shape"]] for output in outputs]
        raise ValueError(f"outputs {shapes}; expected [{count}, {len(classes)}] numbers, or {count} labels")
    return rows


def one_hot(labels: NDArray[np.int64], classes: int) -> Rows:
    rows: Rows = np.eye(classes)[labels]
    return rows


def place_of(label: str, classes: Sequence[str]) -> int:
    if label not in classes:
        raise WrongOrder(f"answers label {label!r:.40}; expected one of {list(classes)!r:.80}")
    return classes.index(label)


def as_probabilities(values: Rows) -> Rows:
    """Rows that sum to about 1 are probabilities already; others are logits."""
    if (values >= 0).all() and (np.abs(values.sum(axis=1) - 1) < SUMS_TO_ONE).all():
        return values
    shares = np.exp(values - values.max(axis=1, keepdims=True))
    normalised: Rows = shares / shares.sum(axis=1, keepdims=True)
    return normalised
