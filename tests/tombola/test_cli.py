"""The command line: one parser, quick help, and one line for whatever is refused."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import service
import training
from model_store.code_version import product_version
from tombola.cli import GROUPS, main

COMMANDS = [command for group in GROUPS.values() for command in group]
HEAVY = {"torch", "numpy", "fastapi", "uvicorn", "matplotlib", "openvino", "PIL", "rich"}


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What standard error has of a command line that is refused: one line, and exit code 2."""
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("tombola: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("name", ["", *(command.name for command in COMMANDS)])
def test_help_imports_nothing_heavy_and_takes_less_than_half_a_second_of_processor_time(name: str) -> None:
    script = f"""
import resource, sys
from tombola.cli import main
try:
    main({[*name.split(), "--help"]})
except SystemExit:
    pass
print(*sorted({HEAVY} & set(sys.modules)), file=sys.stderr)
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, file=sys.stderr)
"""
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy, seconds = shown.stderr.splitlines()
    assert heavy == ""
    assert float(seconds) < 0.5
    assert "usage: tombola" in shown.stdout


def test_the_gate_of_a_pipeline_and_a_client_s_report_load_no_networks() -> None:
    """What reads a report runs beside other people's programs, every few minutes."""
    report = Path(service.__file__).parent / "audit" / "results" / "report.json"
    script = f"""
import sys
from tombola.cli import main
main(["gate", {str(report)!r}, "--robust-lower", "0.1"])
from service.audit.report.model import read_report
print(*sorted({{"torch", "openvino", "matplotlib", "fastapi"}} & set(sys.modules)), file=sys.stderr)
"""
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stderr == "\n"
    assert "the lower bound of robust accuracy is at least 10.0 %" in shown.stdout


def test_the_help_lists_every_command_but_those_for_our_own_processes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line[2:].partition("  ")[0].strip() for line in lines if line.startswith("  ")}
    assert listed >= {command.name for command in COMMANDS if command.help}
    assert not listed & {command.name for command in COMMANDS if not command.help}


def test_without_a_command_the_help_is_shown_and_nothing_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: tombola" in capsys.readouterr().err


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"tombola {product_version()}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["srve"], "srve: no such command; did you mean serve?"),
        (["serve", "--librar", "x"], "--librar: not expected here; did you mean --library?"),
        (["serve", "--prot=1"], "--prot=1: not expected here; did you mean --port?"),
        (["serve", "library"], "library: not expected here"),
        (["search", "--state", "s"], "the following arguments are required: --data"),
        (["search", "--data", "d", "--state", "s", "--epochs", "none"], "none: expected a number above 0"),
        (["bench", "nothing"], "invalid choice: 'nothing'"),
        (["audit", "--fail-under", "most"], "invalid float value: 'most'"),
        (["bench", "raw", "--imags", "1"], "did you mean --images?"),
    ],
)
def test_a_mistake_is_one_line_that_says_where_to_look(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refusal(words, capsys)
    assert message in error
    assert "--help)" in error


@pytest.mark.parametrize("package", [service, training])
def test_the_packages_are_no_commands(package: ModuleType) -> None:
    assert package.__file__ is not None
    assert not (Path(package.__file__).parent / "__main__.py").exists()
