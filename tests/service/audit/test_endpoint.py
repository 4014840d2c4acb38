"""Models behind HTTP, audited by their answers: real servers of two protocols, and servers that misbehave."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from torch import Tensor

from model_store.ensemble import calibrated
from model_store.library import write_library
from model_store.structures import Structure
from model_store.ticket import Ticket
from service.audit.api import audit
from service.audit.endpoint import ANSWERS, LEDGER, Endpoint, as_probabilities, seconds_to_wait
from service.audit.errors import AuditError, AuditRejected, BudgetSpent, OracleFailed
from service.audit.report.model import Interval, Report
from service.audit.report.verdicts import has_figures
from service.audit.target import Target
from tests.support.audit_models import DIGITS
from tests.support.digits import digits
from tests.support.planes import behind_a_port
from tests.support.searches import CPU, TINY
from tests.support.serving import serving
from tests.support.tickets import items
from tombola.cli import main
from training.search import Search

pytestmark = pytest.mark.usefixtures("warm_start", "quick_audits")
IMAGES: Final = 12
Answer = Callable[[Tensor], dict[str, Any] | Response]


@pytest.fixture(scope="module")
def ticket() -> Ticket:
    """Trained on digits, about 70 % right on test images."""
    recipe = replace(TINY, structure=Structure("resnet18", 4, 10, 2), steps=150, mask_share=0.1, density=0.9)
    search = Search(replace(recipe, muon_rate=0.1, clean_until=1.0, ramp_until=1.0), digits(), CPU)
    while not search.done:
        search.train_step()
    return search.ticket()


def some_digits(count: int = IMAGES) -> tuple[Any, Any]:
    test = digits().test
    return test.pixels[:count].numpy(), test.labels[:count].numpy()


# A server of the Open Inference Protocol, as MLServer and Triton answer


def logits_output(values: Tensor) -> dict[str, Any]:
    return {"name": "output__0", "datatype": "FP32", "shape": list(values.shape), "data": values.flatten().tolist()}


def oip_server(answer: Answer, *, channels_first: bool = False) -> FastAPI:
    """One model, `net`, that takes floats in [0, 1]."""
    app = FastAPI()
    shape = [-1, 3, 32, 32] if channels_first else [-1, 32, 32, 3]

    @app.get("/v2/models/net")
    def metadata() -> dict[str, Any]:
        return {"name": "net", "inputs": [{"name": "input__0", "datatype": "FP32", "shape": shape}], "outputs": []}

    @app.post("/v2/models/net/infer")
    async def infer(request: Request) -> Any:
        (tensor,) = (await request.json())["inputs"]
        images = torch.tensor(tensor["data"], dtype=torch.float32).view(tensor["shape"])
        output = answer(images if channels_first else images.permute(0, 3, 1, 2))
        return output if isinstance(output, Response) else {"model_name": "net", "outputs": [output]}

    return app


@contextmanager
def served(answer: Answer, **options: Any) -> Iterator[str]:
    with behind_a_port(oip_server(answer, **options)) as address:
        yield f"http://{address}/v2/models/net"


def network_of(ticket: Ticket) -> Answer:
    classify = calibrated(ticket)

    def answer(images: Tensor) -> dict[str, Any]:
        with torch.no_grad():
            return logits_output(classify(images))

    return answer


def agree(first: Interval, second: Interval) -> bool:
    return first.low <= second.value <= first.high and second.low <= first.value <= second.high


def test_a_module_and_its_endpoints_have_figures_that_agree(ticket: Ticket, tmp_path: Path) -> None:
    """One network: as a module, behind our own server in both protocols, and behind another server's."""
    arguments: dict[str, Any] = {"data": some_digits(), "profile": "smoke", "epsilons": [32], "threads": 1}
    module = audit(Target.from_torch(ticket.network().eval(), DIGITS), out=tmp_path / "module", **arguments)
    reports: dict[str, Report] = {}
    library = write_library(tmp_path / "library", classes=DIGITS, data="digits", tickets=items([ticket]))
    assert library.path is not None
    with serving(library.path, tmp_path / "state") as service, served(network_of(ticket)) as other:
        urls = {"v1": service.public, "oip": f"{service.public}/v2/models/tombola", "other": other}
        for name, url in urls.items():
            protocol: Any = "v1" if name == "v1" else "oip"
            target = Target.from_endpoint(url, DIGITS, budget=9_000, protocol=protocol)
            assert target.endpoint is not None
            assert (target.endpoint.repeats, target.endpoint.feedback) == (1, "score")
            attacks = ("square-queries",) if name != "other" else ()
            reports[name] = audit(target, out=tmp_path / name, attacks=attacks, **arguments)
    for name, report in reports.items():
        assert agree(report.clean, module.clean), name
        assert agree(report.robust, reports["other"].robust), name
        assert module.robust.value <= report.robust.value <= report.clean.value, name
        assert report.threat_model["knowledge"].startswith("answers alone")
        skipped = [check for check in report.checks if "an endpoint gives answers alone" in check.value]
        assert {check.outcome for check in skipped} == {"skipped"}
        assert len(skipped) >= 8
        assert report.verdict != "invalid"
    assert module.clean.value >= 0.5
    assert reports["other"].robust.value < reports["other"].clean.value
    image_counts = [
        json.loads(line)["images"] for line in (tmp_path / "other" / LEDGER).read_text("utf-8").splitlines()
    ]
    queries_of_attacks = sum(attack.queries or 0 for attack in reports["other"].attacks)
    assert queries_of_attacks < sum(image_counts) <= 9_000
    assert (tmp_path / "other" / "report.html").exists()


# What is refused


def perfect(images: Tensor) -> Tensor:
    """Logits that know the digits by heart."""
    test = digits().test
    flat = (images * 255).round().flatten(1)
    known = test.pixels[:100].float().flatten(1)
    nearest = torch.cdist(flat, known).argmin(dim=1)
    return torch.eye(10)[test.labels[:100][nearest]] * 8


def bytes_output(labels: list[str]) -> dict[str, Any]:
    return {"name": "label", "datatype": "BYTES", "shape": [len(labels)], "data": labels}


BAD: Final[dict[str, tuple[Answer, str]]] = {
    "500": (lambda _: JSONResponse({"error": "out of\nmemory"}, 500), "500: .*out of.*memory"),
    "garbage": (lambda _: Response("<html>hello"), "no JSON: '<html>hello'"),
    "a number": (lambda _: JSONResponse(7), "an answer that cannot be read"),
    "no outputs": (lambda _: JSONResponse({"outputs": []}), r"expected \[4, 10\] numbers, or 4 labels"),
    "wrong shape": (lambda images: logits_output(perfect(images)[:, :7]), r"\['FP32', 4, 7\].*expected \[4, 10\]"),
    "too few": (lambda images: logits_output(perfect(images)[:2]), r"expected \[4, 10\]"),
    "not finite": (
        lambda images: {**logits_output(perfect(images)), "data": ["NaN"] * 10 * len(images)},
        "not finite",
    ),
    "unknown label": (lambda images: bytes_output(["cat"] * len(images)), "answers label 'cat'; expected one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_answers_that_cannot_be_used_are_one_line(name: str) -> None:
    answer, text = BAD[name]
    with served(answer) as url, pytest.raises(AuditError, match=text) as failure:
        Target.from_endpoint(url, 10, budget=100)
    assert "\n" not in str(failure.value)
    assert url in str(failure.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"protocol": "grpc"}, "expected one of oip, v1"),
        ({"feedback": "gradient"}, "expected one of score, decision"),
        ({"budget": 0}, "at least 1"),
        ({"proxy": "nonsense"}, "proxy nonsense"),
        ({"size": (64, 64)}, r"takes images of \[32, 32\]; the audit's are \[64, 64\]"),
        ({"budget": 5}, "4 images of a budget of 5 are spent, and 4 more are needed"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(options: dict[str, Any], text: str) -> None:
    with served(lambda images: logits_output(perfect(images))) as url, pytest.raises(AuditError, match=text):
        Target.from_endpoint(url, 10, **{"budget": 100, **options})


def test_nobody_there_is_one_line() -> None:
    with pytest.raises(OracleFailed, match="ConnectError"):
        Target.from_endpoint("http://127.0.0.1:9/v2/models/net", 10, budget=100)


def test_labels_and_scores_in_another_order_are_refused() -> None:
    """The labels of the answer and its numbers do not belong together in the order of the class file."""

    def answer(images: Tensor) -> Response:
        logits = perfect(images)
        labels = [DIGITS[(int(place) + 1) % 10] for place in logits.argmax(dim=1)]
        return JSONResponse({"outputs": [logits_output(logits), bytes_output(labels)]})

    with served(answer) as url, pytest.raises(AuditRejected, match=r"answers label '\d' where class \d is the highest"):
        Target.from_endpoint(url, DIGITS, budget=100)


def test_scores_alone_in_another_order_are_no_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing in such answers says so but the clean accuracy, which is chance or less."""
    data = tmp_path / "digits.npz"
    images, labels = some_digits()
    np.savez(data, images=images.transpose(0, 2, 3, 1), labels=labels)
    with served(lambda images: logits_output(perfect(images).roll(1, dims=1))) as url:
        options = ["--endpoint", url, "--budget", "9000", "--data", str(data), "--out", str(tmp_path / "out")]
        assert main(["audit", *options, "--profile", "smoke", "--images", "8"]) == 2
    note, refusal = capsys.readouterr().err.splitlines()
    assert note.startswith("digits.npz: no pictures of 4 of the library's 10 classes")
    assert "no more than by chance" in refusal


def test_a_budget_that_is_too_small_says_what_would_do(tmp_path: Path) -> None:
    with served(lambda images: logits_output(perfect(images))) as url:
        target = Target.from_endpoint(url, 10, budget=1500)
        text = r"budget 1500: this audit asks about up to \d+ images, \d+ for each of 8; .*--budget \d+, or --images 4"
        with pytest.raises(AuditRejected, match=text):
            audit(target, data=some_digits(), profile="smoke", epsilons=[8], out=tmp_path)
        report = audit(target, data=some_digits(4), profile="smoke", epsilons=[8], out=tmp_path)
    assert has_figures(report)


def test_what_was_measured_is_kept_and_resumed(tmp_path: Path) -> None:
    """The server fails after the first attack. A second session asks neither for it nor for scored images again."""
    broken: list[object] = []

    def answer(images: Tensor) -> dict[str, Any] | Response:
        return JSONResponse({"error": "gone"}, 500) if broken else logits_output(perfect(images))

    arguments: dict[str, Any] = {"data": some_digits(4), "profile": "smoke", "epsilons": [8], "out": tmp_path}
    with served(answer) as url:
        target = Target.from_endpoint(url, 10, budget=5_000)
        with pytest.raises(OracleFailed, match=r"500: .*gone"):
            audit(target, emit=lambda event: broken.append(event) if event.event == "step" else None, **arguments)
        kept = list((tmp_path / "attacks").glob("*.npz"))
        assert len(kept) == 1
        assert target.endpoint is not None
        first = target.endpoint.spent
        broken.clear()
        again = Target.from_endpoint(url, 10, budget=5_000)
        report = audit(again, **arguments)
        assert again.endpoint is not None
        square, hopskipjump = (attack.queries or 0 for attack in report.attacks)
        assert first >= square
        assert first + hopskipjump <= again.endpoint.spent < first + hopskipjump + square


def test_the_budget_holds_whatever_is_asked(tmp_path: Path) -> None:
    with served(lambda images: logits_output(perfect(images))) as url:
        endpoint = Endpoint(url, DIGITS, (32, 32), budget=20)
        endpoint.accept()
        endpoint.keep_in(tmp_path)
        pixels = torch.zeros(12, 3, 32, 32, dtype=torch.uint8)
        endpoint.attack_answers(pixels)
        with pytest.raises(BudgetSpent, match="20 images of a budget of 20 are spent"):
            endpoint.attack_answers(pixels[:1])


def test_a_busy_server_is_waited_for() -> None:
    batch_sizes: list[int] = []

    def answer(images: Tensor) -> dict[str, Any] | Response:
        batch_sizes.append(len(images))
        if len(batch_sizes) % 2:
            return Response("busy", 429, headers={"retry-after": "0"})
        return logits_output(perfect(images))

    with served(answer) as url:
        target = Target.from_endpoint(url, 10, budget=8)
    assert target.endpoint is not None
    assert target.endpoint.spent == 8
    assert len(batch_sizes) == 4


def test_labels_alone_leave_the_attacks_that_need_no_more(tmp_path: Path) -> None:
    def answer(images: Tensor) -> dict[str, Any]:
        return bytes_output([DIGITS[place] for place in perfect(images).argmax(dim=1)])

    with served(answer, channels_first=True) as url:
        with pytest.raises(AuditRejected, match="answers labels alone"):
            Target.from_endpoint(url, DIGITS, budget=100, feedback="score")
        report = audit(
            Target.from_endpoint(url, DIGITS, budget=9_000), data=some_digits(4), profile="smoke", out=tmp_path
        )
    assert [attack.name for attack in report.attacks] == ["hopskipjump-queries"]


def test_random_answers_are_scored_several_times(tmp_path: Path) -> None:
    """A third of the answers are wrong, whatever the image: accuracy is two thirds, and no image counts as 0 or 1."""
    generator = torch.Generator().manual_seed(0)

    def answer(images: Tensor) -> dict[str, Any]:
        logits = perfect(images)
        wrong = torch.rand(len(images), generator=generator) < 1 / 3
        return logits_output(torch.where(wrong[:, None], logits.roll(1, dims=1), logits))

    with served(answer) as url:
        target = Target.from_endpoint(url, 10, budget=20_000)
        assert target.endpoint is not None
        assert target.endpoint.repeats == ANSWERS
        report = audit(target, data=some_digits(4), profile="smoke", attacks=("square-queries",), out=tmp_path)
    assert abs(report.clean.value - 2 / 3) < 0.2
    assert report.ours.scored_on == f"all {ANSWERS} states"


def test_logits_become_probabilities_and_probabilities_stay() -> None:
    rounded = np.array([[0.33, 0.33, 0.33], [1.0, 0.0, 0.0]])
    assert as_probabilities(rounded) is rounded
    shares = as_probabilities(np.array([[1000.0, 1000.0, -1000.0]]))
    assert shares.tolist() == [[0.5, 0.5, 0.0]]


@pytest.mark.parametrize(("header", "seconds"), [("2", 2), ("-1", 0), ("inf", 1), ("1e9", 60), ("Wed, 21 Oct", 1)])
def test_a_server_s_wish_to_wait_is_read_with_care(header: str, seconds: float) -> None:
    assert seconds_to_wait(header) == seconds
