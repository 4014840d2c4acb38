from dataclasses import replace
from pathlib import Path

import pytest

from model_store.processor import has_bfloat16
from tests.support.searches import TINY
from training import device
from training.device import resolve_precision

OPEN = replace(TINY, precision="auto")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["flags\t\t: fpu avx512f avx512_bf16", "flags\t\t: fpu avx512f avx512_bf16"], True),
        (["flags\t\t: fpu amx_bf16 amx_tile"], True),
        (["Features\t: fp asimd bf16 i8mm"], True),
        (["flags\t\t: fpu avx2 avx512f"], False),
        (["Features\t: fp asimd bf16", "Features\t: fp asimd"], False),  # cores of two kinds
        (["vmx flags\t: avx512_bf16", "model name\t: bf16"], False),
        ([], False),
    ],
)
def test_bfloat16_is_there_if_every_core_has_it(lines: list[str], expected: bool, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("\n".join(["processor\t: 0", *lines, "bogomips\t: 5600"]))
    assert has_bfloat16(cpuinfo) is expected


def test_a_system_that_does_not_say_has_no_bfloat16(tmp_path: Path) -> None:
    assert not has_bfloat16(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "cpu_has_it", "expected"),
    [
        ("cpu", True, "bfloat16"),
        ("cpu", False, "float32"),
        ("cuda:1", False, "bfloat16"),
        ("mps", True, "float32"),
    ],
)
def test_an_open_precision_becomes_what_the_device_is_fast_in(
    name: str, cpu_has_it: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "has_bfloat16", lambda: cpu_has_it)
    assert resolve_precision(OPEN, name).precision == expected
    assert resolve_precision(TINY, name) is TINY
