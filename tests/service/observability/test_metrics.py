import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.observability.metrics import PREFIX, TABLE, Metrics, describe_build


def families(metrics: Metrics) -> dict[str, str]:
    return {family.name: family.type for family in text_string_to_metric_families(metrics.text().decode())}


def test_the_exposition_holds_every_row_of_the_table_with_its_kind() -> None:
    shown = families(Metrics())
    for row in TABLE:
        assert shown[PREFIX + row.name.removesuffix("_total" if row.kind == "counter" else "")] == row.kind


def test_names_follow_prometheus_conventions() -> None:
    for row in TABLE:
        assert (row.kind == "counter") == row.name.endswith("_total"), row.name
        assert not row.name.endswith(("_ms", "_us", "_kb", "_mb")), row.name
        assert row.meaning.endswith("."), row.name


def test_no_label_could_hold_a_client_a_draw_or_a_path() -> None:
    labels = {label for row in TABLE for label, _ in row.labels}
    assert not labels & {"client", "key", "member", "members", "n", "size", "theta", "seed", "path", "request_id"}


def test_series_of_bounded_labels_exist_before_anything_happens() -> None:
    text = Metrics().text().decode()
    assert 'tombola_shed_total{reason="queue"} 0.0' in text
    assert 'tombola_inference_requests_total{outcome="deadline"} 0.0' in text
    assert 'tombola_audit_runs_total{kind="smoke",outcome="failed"} 0.0' in text


def test_there_are_no_created_series_and_there_are_process_metrics() -> None:
    text = Metrics().text().decode()
    assert "_created" not in text
    assert "process_resident_memory_bytes" in text


def test_a_value_outside_the_table_becomes_other() -> None:
    metrics = Metrics()
    metrics.inc("http_requests_total", route="unmatched", method="BREW", code="405")
    assert metrics.value("http_requests_total", route="unmatched", method="other", code="405") == 1


def test_metrics_of_two_instances_are_apart() -> None:
    one, two = Metrics(), Metrics()
    one.inc("inference_images_total", 3)
    assert (one.value("inference_images_total"), two.value("inference_images_total")) == (3, 0)


def test_counters_gauges_and_histograms_tell_their_values() -> None:
    metrics = Metrics()
    metrics.set("queue_depth", 7)
    metrics.observe("queue_wait_seconds", 0.003)
    assert metrics.value("queue_depth") == 7
    assert metrics.value("queue_wait_seconds_count") == 1
    assert metrics.value("queue_wait_seconds_sum") == pytest.approx(0.003)


def test_an_unknown_metric_is_an_error_of_the_program() -> None:
    with pytest.raises(KeyError):
        Metrics().inc("no_such_total")


def test_what_is_running_is_one_series() -> None:
    metrics = Metrics()
    describe_build(metrics, version="1.2", commit="abc", torch="2.14")
    assert 'commit="abc"' in metrics.text().decode()


def test_a_replaced_label_leaves_no_series_behind() -> None:
    metrics = Metrics()
    metrics.set("library_info", 1, digest="old")
    metrics.forget("library_info")
    metrics.set("library_info", 1, digest="new")
    text = metrics.text().decode()
    assert 'digest="new"' in text
    assert 'digest="old"' not in text
