"""What may not be committed."""

import subprocess
from pathlib import Path

import pytest

from tools.committed_files import MAX_BYTES, main


def test_a_private_key_and_a_large_file_are_refused_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key.pem").write_text("-----BEGIN " + "RSA PRIVATE KEY-----\nMIIE\n")
    (tmp_path / "large.bin").write_bytes(bytes(MAX_BYTES + 1))
    (tmp_path / "fine.py").write_bytes(b"x = 1\n" + bytes(MAX_BYTES - 6))
    assert main([str(tmp_path / "fine.py")]) == 0
    assert capsys.readouterr().err == ""
    assert main([str(path) for path in sorted(tmp_path.iterdir())]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path}/key.pem: a private key",
        f"{tmp_path}/large.bin: 2,000,001 bytes; expected at most 2,000,000",
    ]


def test_what_is_committed_passes() -> None:
    files = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(files) > 200
    assert main(files) == 0
