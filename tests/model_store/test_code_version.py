"""The commit of the code that runs: of its own repository, never of one that it was installed into."""

import subprocess
from pathlib import Path

from model_store.code_version import commit_of


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.example", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", folder, *who, *words], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_commit_is_that_of_the_repository_that_holds_the_file(tmp_path: Path) -> None:
    own, installed = tmp_path / "package" / "own.py", tmp_path / ".venv" / "installed.py"
    for file in (own, installed):
        file.parent.mkdir()
        file.write_text("")
    assert commit_of(own) == "unknown"
    git(tmp_path, "init", "-q")
    assert commit_of(own) == "unknown"
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "-q", "-m", "one")
    assert commit_of(own) == git(tmp_path, "rev-parse", "HEAD")
    assert commit_of(installed) == "unknown"
