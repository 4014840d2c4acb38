import argparse
import logging
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from service.settings import (
    RENAMED,
    Settings,
    SettingsRejected,
    add_flags,
    admin_token,
    ensure_state_dir,
    is_loopback,
    read_settings,
    setting_docs,
)
from tombola.cli import main


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in setting_docs():
        monkeypatch.delenv(row.variable, raising=False)
    monkeypatch.delenv("TOMBOLA_CONFIG", raising=False)


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    """`serve` sets the root logger up for the whole process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def flags(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return vars(parser.parse_args(arguments))


def test_flag_beats_variable_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings(flags()).port == 8000
    monkeypatch.setenv("TOMBOLA_PORT", "8100")
    assert read_settings(flags()).port == 8100
    assert read_settings(flags("--port", "8200")).port == 8200


def test_every_setting_has_a_unit_a_reason_a_variable_and_a_flag() -> None:
    for row in setting_docs():
        assert row.variable == "TOMBOLA_" + row.name.upper()
        assert row.flag == "--" + row.name.replace("_", "-")
        assert row.unit
        assert row.meaning.count(".") >= 2, row.name  # what it is. why it is so.


def test_yes_and_no_are_flags_too() -> None:
    assert read_settings(flags("--no-metrics-open")).metrics_open is False
    assert read_settings(flags("--log-requests")).log_requests is True


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOMBOLA_ADMIN_TOKEN", "")
    assert read_settings().admin_token is None


def test_variables_that_kubernetes_sets_for_a_service_called_tombola_are_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (
        ("TOMBOLA_PORT", "tcp://10.0.0.1:8000"),
        ("TOMBOLA_PORT_8000_TCP_ADDR", "10.0.0.1"),
        ("TOMBOLA_SERVICE_HOST", "10.0.0.1"),
        ("TOMBOLA_SERVICE_PORT_HTTP", "8000"),
    ):
        monkeypatch.setenv(name, value)
    assert read_settings().port == 8000


@pytest.mark.parametrize("name", ["TOMBOLA_ADMIN", "TOMBOLA_ENGINE", "TOMBOLA_BLUE_GREEN"])
def test_variables_of_services_whose_names_begin_with_ours_are_passed_over(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Service "tombola-admin" makes TOMBOLA_ADMIN_PORT, which is a setting's name too."""
    for suffix, value in (
        ("SERVICE_HOST", "10.0.0.1"),
        ("SERVICE_PORT", "8001"),
        ("SERVICE_PORT_HTTP", "8001"),
        ("PORT", "tcp://10.0.0.1:8001"),
        ("PORT_8001_TCP", "tcp://10.0.0.1:8001"),
        ("PORT_8001_TCP_PROTO", "tcp"),
        ("PORT_8001_SCTP_ADDR", "10.0.0.1"),
    ):
        monkeypatch.setenv(f"{name}_{suffix}", value)
    assert read_settings().admin_port == 8001
    assert read_settings().engine == "auto"


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_setting_s_old_name_is_refused_with_its_new_one(
    old: str, new: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert new in Settings.model_fields
    with monkeypatch.context() as patch:
        patch.setenv(f"TOMBOLA_{old.upper()}", "1")
        with pytest.raises(SettingsRejected) as refused:
            read_settings()
    assert str(refused.value) == f"TOMBOLA_{old.upper()}: now named TOMBOLA_{new.upper()}"
    file = tmp_path / "tombola.toml"
    file.write_text(f"{old} = 1\n")
    with pytest.raises(SettingsRejected, match=f"tombola.toml: {old}: now named {new}$"):
        read_settings({"config": file})
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--" + old.replace("_", "-"), "1"])
    assert ended.value.code == 2
    assert f"--{old.replace('_', '-')}: now named --{new.replace('_', '-')}" in capsys.readouterr().err


def test_flag_beats_variable_beats_file_beats_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_settings().port == 8000
    Path("tombola.toml").write_text("port = 8100\nmetrics_open = false\n")
    assert (read_settings().port, read_settings().metrics_open) == (8100, False)
    monkeypatch.setenv("TOMBOLA_PORT", "8200")
    assert read_settings().port == 8200
    assert read_settings(flags("--port", "8300")).port == 8300
    monkeypatch.setenv("TOMBOLA_PORT", "tcp://10.0.0.1:8000")  # Kubernetes' own: no value of ours
    assert read_settings().port == 8100


def test_another_file_of_settings_is_named_by_variable_or_flag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("threads = 2\n")
    (tmp_path / "b.toml").write_text("threads = 3\n")
    monkeypatch.setenv("TOMBOLA_CONFIG", str(tmp_path / "a.toml"))
    assert read_settings().threads == 2
    assert read_settings(flags("--config", str(tmp_path / "b.toml"))).threads == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "prot: no such setting; did you mean port?"),
        ("port = ", "no TOML: "),
        ("[serve]\nport = 1", "serve: no such setting"),
        ("port = 'http'", r"TOMBOLA_PORT \(--port\): input should be a valid integer"),
        (None, "No such file or directory"),
    ],
)
def test_a_file_of_settings_that_cannot_be_used_is_refused_in_one_line(
    text: str | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "my.toml").write_text(text)
    with pytest.raises(SettingsRejected, match=message) as refused:
        read_settings({"config": tmp_path / "my.toml"})
    assert "\n" not in str(refused.value)


def test_a_misspelt_variable_is_refused_and_the_right_one_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOMBOLA_MAX_QUEUE_SIZ", "5")
    with pytest.raises(
        SettingsRejected, match="TOMBOLA_MAX_QUEUE_SIZ: no such setting; did you mean TOMBOLA_MAX_QUEUE_SIZE"
    ):
        read_settings()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"port": "abc"}, r"TOMBOLA_PORT \(--port\): .*integer.*'abc'"),
        ({"port": "70000"}, r"TOMBOLA_PORT .*65535"),
        ({"deadline_s": "0"}, r"TOMBOLA_DEADLINE_S .*greater than 0"),
        ({"engine": "onnx"}, r"TOMBOLA_ENGINE .*'torch'.*'onnx'"),
        ({"max_queue_size": "4"}, r"TOMBOLA_MAX_QUEUE_SIZE 4: below TOMBOLA_MAX_IMAGES 512"),
        ({"max_body_bytes": str(1 << 30)}, r"TOMBOLA_BODY_MEMORY_BYTES .* below"),
        ({"port": "9000", "admin_port": "9000"}, "two ports"),
        ({"admin_token": "x" * 16, "admin_token_file": "token"}, "both set"),
        ({"host": ""}, "TOMBOLA_HOST: empty; expected an address"),
        ({"admin_host": "[]"}, "TOMBOLA_ADMIN_HOST: empty; expected an address"),
        ({"trusted_proxies": "10.0.0.1, proxy"}, "TOMBOLA_TRUSTED_PROXIES 'proxy': expected"),
        ({"trusted_proxies": "10.0.0.1/8"}, "TOMBOLA_TRUSTED_PROXIES '10.0.0.1/8': expected"),
        ({"latency_quantum_ms": "10001"}, "TOMBOLA_LATENCY_QUANTUM_MS 10001: above TOMBOLA_DEADLINE_S 10"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(given: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsRejected, match=message) as refused:
        read_settings(given)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e400", "1e12"])
def test_no_limit_is_taken_that_no_clock_could_keep(value: str) -> None:
    names = [name for name, field in Settings.model_fields.items() if field.annotation is float]
    assert len(names) >= 10
    for name in names:
        with pytest.raises(SettingsRejected, match=f"TOMBOLA_{name.upper()} "):
            read_settings({name: value})


def test_proxies_are_addresses_networks_or_all() -> None:
    for proxies in ("", "*", "127.0.0.1", "::1, 10.0.0.0/8,fd00::/8"):
        assert read_settings({"trusted_proxies": proxies}).trusted_proxies == proxies


def test_the_token_is_masked_wherever_settings_are_shown() -> None:
    secret = "correct-horse-battery-staple"
    settings = Settings(admin_token=SecretStr(secret))
    assert secret not in repr(settings)
    assert secret not in str(settings.shown())
    with pytest.raises(SettingsRejected) as refused:
        read_settings({"admin_token": secret, "admin_token_file": secret})
    assert secret not in str(refused.value)


# The admin token


def test_beyond_loopback_the_admin_plane_needs_a_token_of_its_own(tmp_path: Path) -> None:
    settings = Settings(admin_host="0.0.0.0", state_dir=tmp_path)
    (tmp_path / "admin-token").write_text("one-that-was-made-before-on-loopback")
    with pytest.raises(SettingsRejected, match=r"0\.0\.0\.0.*TOMBOLA_ADMIN_TOKEN_FILE"):
        admin_token(settings)
    given = Settings(admin_host="0.0.0.0", admin_token=SecretStr("a-token-of-my-own-making"))
    assert admin_token(given) == "a-token-of-my-own-making"


def test_on_loopback_a_token_is_made_once_for_this_user_alone(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path / "state")
    made = admin_token(settings)
    file = tmp_path / "state" / "admin-token"
    assert len(made) >= 32
    assert admin_token(settings) == made
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_token_comes_from_its_file_without_the_newline(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("sixteen-or-more-characters\n")
    assert admin_token(Settings(admin_token_file=tmp_path / "token")) == "sixteen-or-more-characters"


@pytest.mark.parametrize("token", ["short", "with some spaces in it", "umlaut-ä-umlaut-ä"])
def test_a_weak_token_is_refused_and_not_repeated(token: str) -> None:
    with pytest.raises(SettingsRejected, match="at least 16 printable ASCII") as refused:
        admin_token(Settings(admin_token=SecretStr(token)))
    assert token not in str(refused.value)


def test_a_missing_token_file_is_said_by_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsRejected, match="nowhere: cannot be read as a token"):
        admin_token(Settings(admin_token_file=tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("host", "answer"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
    ],
)
def test_loopback_is_known(host: str, answer: bool) -> None:
    assert is_loopback(host) is answer


def test_a_state_folder_that_cannot_be_is_said_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsRejected, match=r"TOMBOLA_STATE_DIR .*cannot be made"):
        ensure_state_dir(Settings(state_dir=tmp_path / "file" / "state"))


# The command


@pytest.mark.usefixtures("logging_as_before")
@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--port", "none"],
        ["serve", "--admin-host", "0.0.0.0"],
        ["check", "/nowhere/at/all"],
        ["serve", "--library", "/nowhere/at/all", "--port", "0", "--admin-port", "0"],
        ["serve", "--audits-data", "/nowhere/at/all", "--port", "0", "--admin-port", "0"],
        ["serve", "--audit-surrogate-library", "/nowhere/at/all", "--port", "0", "--admin-port", "0"],
        ["check", "--device", "nothing"],
        ["serve", "--device", "nothing", "--port", "0", "--admin-port", "0"],
        ["bench", "raw", "--device", "nothing"],
    ],
)
def test_a_command_that_cannot_run_says_why_in_one_line_and_fails(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*arguments, "--state-dir", str(tmp_path)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("{")]
    assert len(lines) == 1
    assert lines[0].startswith("tombola: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "/nowhere/at/all.png"],
        ["audit", "--profile", "smoke", "--admin-url", "http://127.0.0.1:1", "--token-file", "/nowhere/at/all.png"],
    ],
)
def test_a_file_that_cannot_be_had_is_named_with_the_reason(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == "tombola: /nowhere/at/all.png: No such file or directory\n"


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    help_text = " ".join(capsys.readouterr().out.split())
    for row in setting_docs():
        assert row.flag.removeprefix("--") in help_text
        assert row.variable in help_text
