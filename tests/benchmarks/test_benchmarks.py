"""The arithmetic of the benchmarks, benchmarks and service/benchmarks/command.py; nothing is measured here."""

import json
import random
import struct
from pathlib import Path
from typing import Any, Final

import pytest

from benchmarks.beside import AUDIT
from benchmarks.chaos import slope_per_hour
from benchmarks.load import quantile_ms
from benchmarks.protocols import infer, middle, prefixed
from benchmarks.report import MARKS, best_peers, markdown_tables, ratios
from benchmarks.requests import files, tensors
from model_store.errors import PageRejected
from model_store.input_spec import CIFAR10_INPUT
from model_store.pages import replace_section
from service.benchmarks.timing_leakage import entropy, guess_accuracy, mutual_information
from service.grpc.infer_message import parse, read_inference
from service.web.infer_request import ModelSpec


def server(kind: str, images: float, p99_ms: float) -> dict[str, Any]:
    closed = [{"clients": n, "images_per_s": images, "p50_ms": 10.0, "p99_ms": p99_ms} for n in (1, 8, 32, 128)]
    opened = [
        {"share": share, "rate": share * images, "p99_ms": p99_ms * share, "goodput_per_s": images}
        for share in (0.5, 0.8, 1.2)
    ]
    forms = {"png": {"closed": closed, "open": opened, "capacity": images}}
    return {"kind": kind, "forms": forms, "equal": [], "busy_mb": 100.0, "start_s": 1.0}


@pytest.fixture
def figures() -> dict[str, Any]:
    ours = server("", 300.0, 50.0) | {"equal": [{"p99_ms": 20.0}, {"p99_ms": 30.0}]}
    peers = {
        "a": server("plain", 100.0, 500.0),
        "b": server("plain", 60.0, 90.0),
        "b grouped": server("grouped", 150, 70),
    }
    raw = {"ratio": 7.5, "engine_images_per_s": 320.0, "without_http_images_per_s": 310.0, "askers": 32}
    return {"raw": raw, "forwards": {"median_sum_ms": 8.0}, "servers": {**peers, "tombola": ours}}


def test_the_best_peer_of_a_kind_is_the_one_that_answers_most_and_its_load_80_percent_of_that(
    figures: dict[str, Any],
) -> None:
    best = best_peers(figures["servers"])
    assert {kind: (peer["name"], peer["rate"]) for kind, peer in best.items()} == {
        "plain": ("a", 80.0),
        "grouped": ("b grouped", 120.0),
    }


def test_ratios_worked_by_hand(figures: dict[str, Any]) -> None:
    result = ratios(figures)
    assert result["raw_over_plain_loop"] == 7.5
    assert result["without_http_over_raw"] == 0.969  # 310 / 320
    assert result["http_over_raw_at_32"] == 0.938  # 300 / 320
    assert result["idle_p50_over_forwards"] == 1.25  # 10 / 8
    expected = {"peer": "a", "images_per_s": 3.0, "rate": 80.0, "p99_ms": 20.0, "peer_p99_ms": 400.0}
    assert result["over_best_peer"]["plain"] == expected
    assert result["over_best_peer"]["grouped"]["images_per_s"] == 2.0


def test_the_table_is_rebuilt_between_its_marks_and_again_the_same(figures: dict[str, Any], tmp_path: Path) -> None:
    machine = {"cpu": "a processor", "cores": 2, "python": "3.11", "torch": "2", "openvino": "2026.4-1"}
    conditions = {"machine": machine, "versions": {"wrk": "4"}, "library": {"digest": "ab" * 32, "tickets": 40}}
    whole = (
        figures
        | conditions
        | {"commit": "c" * 40, "when": "2026-01-31T00:00:00", "seconds": 20.0, "ratios": ratios(figures)}
    )
    (tmp_path / "compare.json").write_text(json.dumps(whole))
    page = tmp_path / "README.md"
    page.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    replace_section(page, MARKS, markdown_tables(tmp_path))
    once = page.read_text("utf-8")
    replace_section(page, MARKS, markdown_tables(tmp_path))
    assert page.read_text("utf-8") == once
    assert once.startswith("before\n")
    assert once.endswith("\nafter\n")
    assert "old" not in once
    assert "| **tombola** (png) | 300 | 300 | 300 | 300 | 10 / 50 | 300 | 100 | 1.0 |" in once
    assert "library abababababab of 40 tickets; commit cccccccccccc;" in once


def test_a_page_without_marks_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("nothing here")
    with pytest.raises(PageRejected, match="expected <!-- benchmarks"):
        replace_section(page, MARKS, "text")
    assert page.read_text("utf-8") == "nothing here"


def test_quantiles_and_slopes_worked_by_hand() -> None:
    assert quantile_ms([0.001 * n for n in range(1, 101)], 0.99) == 100.0
    assert quantile_ms([], 0.5) is None
    rising = [{"s": float(s), "mb": 100 + s / 36} for s in range(0, 3600, 60)]
    assert slope_per_hour(rising) == pytest.approx(100, abs=0.1)


def test_a_message_is_one_whole_request() -> None:
    for form in (files("/v1/classify", ("Tombola-Timeout-Ms", "1000")), tensors()):
        head, body = form.messages("127.0.0.1:1")[0].split(b"\r\n\r\n", 1)
        assert f"Content-Length: {len(body)}".encode() in head
        assert body == form.bodies[0]


def test_a_time_that_is_the_size_tells_all_of_it_and_a_time_by_chance_nothing() -> None:
    chance = random.Random(0)
    sizes = [chance.choice((1, 2, 3, 4)) for _ in range(4000)]
    assert entropy((1, 1, 1, 1)) == pytest.approx(2)
    mutual_bits, _ = mutual_information([size + chance.random() / 2 for size in sizes], sizes)
    assert mutual_bits == pytest.approx(2, abs=0.2)  # a bin may straddle two sizes
    mutual_bits, by_chance = mutual_information([chance.random() for _ in sizes], sizes)
    assert mutual_bits < 0.01
    assert by_chance == pytest.approx(15 * 3 / (2 * 4000 * 0.6931), rel=0.3)  # Miller and Madow's bias, in bits


def test_a_time_that_tells_one_of_two_bits_tells_one_bit() -> None:
    chance = random.Random(1)
    sizes = [chance.choice((1, 2, 3, 4)) for _ in range(4000)]
    mutual_bits, _ = mutual_information([(size > 2) + chance.random() / 2 for size in sizes], sizes)
    assert mutual_bits == pytest.approx(1, abs=0.1)


def test_sizes_are_named_as_often_as_their_times_differ() -> None:
    chance = random.Random(2)
    sizes = [chance.choice((1, 2, 3, 4)) for _ in range(4000)]
    assert guess_accuracy([size + chance.random() / 2 for size in sizes], sizes) > 0.95
    assert guess_accuracy([(size > 2) + chance.random() / 2 for size in sizes], sizes) == pytest.approx(0.5, abs=0.05)
    assert guess_accuracy([chance.random() for _ in sizes], sizes) == pytest.approx(0.25, abs=0.05)
    assert guess_accuracy([0.01] * len(sizes), sizes) == pytest.approx(0.25, abs=0.05)


def test_serving_beside_an_audit_is_told_with_what_it_was_without(tmp_path: Path) -> None:
    def loads(factor: float) -> dict[str, Any]:
        return {
            "one": {"p50_ms": 5 * factor, "p99_ms": 9 * factor},
            "many": {"images_per_s": 500 / factor, "p99_ms": 100 * factor},
            "open": {"p50_ms": 7 * factor, "p99_ms": 20 * factor},
        }

    machine = {"cpu": "a processor", "cores": 2, "python": "3.11", "torch": "2", "openvino": "2026.4-1"}
    conditions = {"machine": machine, "versions": {"wrk": "4"}, "library": {"digest": "ab" * 32, "tickets": 40}}
    whole = conditions | {"commit": "c" * 40, "when": "2026-01-31T00:00:00", "rate": 250.0, "share_done": 0.04}
    whole |= {"audit": AUDIT, "alone": [loads(1), loads(2)], "beside": loads(4)}
    (tmp_path / "audited.json").write_text(json.dumps(whole))
    text = markdown_tables(tmp_path)
    assert "32 clients get 125 (500 before, 250 after) images/s, p99 400 (100 before, 200 after) ms" in text
    assert "one client p50 20 (5 before, 10 after) and p99 36 (9 before, 18 after) ms" in text
    assert "250 images/s, p50 28 (7 before, 14 after)" in text
    assert "4 % of it done" in text


CONDITIONS: Final = {
    "machine": {"cpu": "a", "cores": 2, "python": "3.11", "torch": "2", "openvino": "2026.4-1", "load_before": 1.25},
    "versions": {"wrk": "4"},
    "library": {"digest": "ab" * 32, "tickets": 40},
    "commit": "c" * 40,
    "when": "2026-01-31T00:00:00",
}


def test_both_protocols_are_compared_round_by_round_and_medians_are_shown(tmp_path: Path) -> None:
    def rates(http: float, grpc: float) -> dict[str, Any]:
        return {"http": {"images_per_s": http, "cpu_ms": 2.0}, "grpc": {"images_per_s": grpc, "cpu_ms": 2.5}}

    rounds = [{"png": rates(100.0, 50.0)}, {"png": rates(200.0, 190.0)}, {"png": rates(50.0, 45.0)}]
    figures = middle(rounds, "png")
    assert figures["of_rounds"] == [0.5, 0.95, 0.9]
    assert figures["grpc_over_http"] == 0.9  # the ratio of the medians would be 0.5
    whole = CONDITIONS | {"clients": 32, "rounds": rounds, "forms": {"png": figures}}
    (tmp_path / "grpc.json").write_text(json.dumps(whole))
    text = markdown_tables(tmp_path)
    assert "100 images/s over HTTP and 50 over gRPC, 2.00 and 2.50 ms" in text
    assert "gRPC is at 90 % of HTTP (50 to 95)" in text


def test_a_grpc_request_of_the_generator_is_what_the_server_reads() -> None:
    form = infer("image", "BYTES", [1], prefixed(files("/v1/classify").bodies))
    model = ModelSpec(("label",), 10, 8, CIFAR10_INPUT)
    for body, picture in zip(form.bodies, files("/v1/classify").bodies, strict=True):
        assert struct.unpack(">BI", body[:5]) == (0, len(body) - 5)
        read = read_inference(parse(body[5:]), model)
        assert [bytes(image) for image in read.images] == [picture]


def test_the_batch_command_is_compared_with_the_engine_beside_it(tmp_path: Path) -> None:
    def rates(**each: float) -> dict[str, Any]:
        return {name: {"images_per_s": rate, "cpu_ms": 100 / rate} for name, rate in each.items()}

    rounds = [rates(served=100.0, engine=200.0, command=rate) for rate in (90.0, 100.0, 190.0)]
    whole = CONDITIONS | {"data": "a.zip", "pictures": 10000, "rounds": rounds, "note": "bfloat16"}
    whole |= {"extra": {"s": 1.0, "cpu_ms": 0.25}, "batches": [32, 256]}
    (tmp_path / "batch.json").write_text(json.dumps(whole))
    text = markdown_tables(tmp_path)
    assert "100 pictures/s, 100 % of the engine alone in the service's batches of 32, 50 % in the command's of" in text
    assert "1.25 ms by the command, of the engine alone 1.00 and 0.50 ms; bfloat16. " in text
    assert "Load of the machine before: 1.2. " in text
