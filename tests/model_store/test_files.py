"""Files are made whole or not at all, by one module."""

import ast
import errno
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier
from typing import Any, Final

import numpy as np
import pytest

from model_store import files
from model_store.files import replacing, write_atomically, write_new
from service.settings import Settings, SettingsRejected, admin_token, load_or_create_token
from tests.support.serving import ROOT, environment

PACKAGES: Final = ("model_store", "service", "training")
FULL: Final = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk(*_: Any) -> None:
    raise FULL


@pytest.fixture
def ordinary_umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# Whole or not at all


@pytest.mark.parametrize("data", [b"\x00bytes", "text: θ"])
def test_what_is_written_is_there_and_nothing_beside_it(tmp_path: Path, data: bytes | str) -> None:
    path = tmp_path / "file"
    for content in (b"before", data):
        write_atomically(path, content)
    assert path.read_bytes() == (data if isinstance(data, bytes) else data.encode())
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_failure_leaves_the_old_content_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, old: bytes | None
) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    monkeypatch.setattr(os, "fsync", full_disk) if step == "fsync" else monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(path, b"new")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if old is None else [old])


def test_a_block_that_raises_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with suppress(ZeroDivisionError), replacing(path) as file:
        file.write(b"half of the new")
        file.write(bytes(1 // 0))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_library_may_write_to_the_stream_or_to_its_name(tmp_path: Path) -> None:
    with replacing(tmp_path / "arrays.npz") as file:
        np.savez(file, ones=np.ones(3))
    with replacing(tmp_path / "text") as file:
        Path(file.name).write_bytes(b"by name")
    assert np.load(tmp_path / "arrays.npz")["ones"].tolist() == [1, 1, 1]
    assert (tmp_path / "text").read_bytes() == b"by name"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_writer_that_is_killed_leaves_one_content_or_the_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    program = f"""
from pathlib import Path
from model_store.files import write_atomically
for number in range(10**9):
    write_atomically(Path({str(path)!r}), bytes([number % 256]) * 300_000)
    print(number, flush=True)
"""
    for writes in (1, 3, 8):
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment()) as process:
            assert process.stdout is not None
            for _ in range(writes):
                process.stdout.readline()
            process.kill()
        content = path.read_bytes()
        assert len(content) == 300_000
        assert len(set(content)) == 1


# Permissions, links, devices


@pytest.mark.usefixtures("ordinary_umask")
def test_permissions_are_the_umask_s_or_the_old_file_s_or_those_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"new")
    assert mode_of(path) == 0o640
    path.chmod(0o664)
    write_atomically(path, b"again")
    assert mode_of(path) == 0o664
    write_atomically(path, b"secret", 0o600)
    assert mode_of(path) == 0o600
    write_new(tmp_path / "token", b"secret", 0o600)
    assert mode_of(tmp_path / "token") == 0o600


def test_a_secret_is_never_readable_by_others_not_even_while_it_is_written(tmp_path: Path) -> None:
    with replacing(tmp_path / "secret", 0o600) as file:
        file.write(b"secret")
        assert [mode_of(part) for part in tmp_path.iterdir()] == [0o600]


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_a_device_and_a_pipe_are_written_to_and_not_replaced(tmp_path: Path) -> None:
    write_atomically(Path(os.devnull), b"gone")
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_bytes)
        write_atomically(pipe, b"through it")
        assert read.result(timeout=30) == b"through it"
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_folder_in_the_file_s_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError) as caught:
        write_atomically(tmp_path, b"new")
    assert caught.value.filename == str(tmp_path)


# Made once


def test_of_many_who_make_a_file_at_once_one_does_and_the_others_find_it_whole(tmp_path: Path) -> None:
    together = Barrier(8)

    def make(name: bytes, path: Path) -> bytes:
        together.wait()
        with suppress(FileExistsError):
            write_new(path, name * 1000)
        return path.read_bytes()

    with ThreadPoolExecutor(8) as pool:
        for number in range(20):
            path = tmp_path / str(number)
            contents = set(pool.map(make, [bytes([65 + i]) for i in range(8)], [path] * 8))
            assert len(contents) == 1
            assert len(contents.pop()) == 1000
    assert len(list(tmp_path.iterdir())) == 20


@pytest.mark.parametrize("links", [True, False], ids=["with hard links", "without"])
def test_a_new_file_that_cannot_be_written_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, links: bool
) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    write_new(tmp_path / "first", b"whole")
    assert (tmp_path / "first").read_bytes() == b"whole"
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "first", b"another")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        write_new(tmp_path / "second", b"another")
    assert caught.value.filename == str(tmp_path / "second")
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    if not links:
        with pytest.raises(OSError, match="No space left"):
            files.write_exclusively(tmp_path / "second", b"another", 0o600)
        assert [path.name for path in tmp_path.iterdir()] == ["first"]


# The admin token


def tokens(folder: Path, count: int) -> list[str]:
    """What so many processes, started at once, take as the token."""
    program = (
        "import sys; from pathlib import Path; from service.settings import load_or_create_token as get; "
        "sys.stdin.read(1); print(get(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", program, str(folder / "admin-token")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment()}
    started = [subprocess.Popen(command, **pipes) for _ in range(count)]  # type: ignore[call-overload]
    return [process.communicate("\n")[0].strip() for process in started]


def test_processes_that_start_at_once_have_one_token(tmp_path: Path) -> None:
    results = tokens(tmp_path, 4)
    assert len(set(results)) == 1
    assert len(results[0]) >= 40
    assert (tmp_path / "admin-token").read_text() == f"{results[0]}\n"
    assert mode_of(tmp_path / "admin-token") == 0o600


def test_a_full_disk_at_the_first_start_is_said_and_the_next_start_works(tmp_path: Path) -> None:
    """The real command; no file may grow beyond nothing, as on a disk without room."""
    state = tmp_path / "state"
    command = [sys.executable, "-m", "tombola", "serve", "--state-dir", str(state), "--port", "0", "--admin-port", "0"]
    done = subprocess.run(
        command,
        env=environment(PYTHONDONTWRITEBYTECODE="1"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == f"tombola: {state}/admin-token: File too large\n"
    assert list(state.iterdir()) == []
    settings = Settings(state_dir=state)
    token = admin_token(settings)
    assert token == admin_token(settings) == (state / "admin-token").read_text().strip()


@pytest.mark.parametrize(("content", "length"), [("", 0), ("\n", 0), ("short", 5)])
def test_an_unfinished_token_of_an_older_version_says_what_to_do(tmp_path: Path, content: str, length: int) -> None:
    path = tmp_path / "admin-token"
    path.write_text(content)
    expected = (
        f"^{path}: {length} characters, left by a start that could not finish; .* Delete the file: the next start"
    )
    with pytest.raises(SettingsRejected, match=expected):
        load_or_create_token(path)


# No other module makes files


# What opens a file for writing without files.py: the function, and why it may.
ALLOWED: Final = {
    ("model_store.library", "write_lock"): "a lock that holds nothing",
    ("model_store.data_files", "copy_out"): "an archive's files, in a temporary folder",
    ("model_store.data_files", "unpack"): "an archive's members, in a temporary folder",
    ("service.admin.audit_process", "spawn"): "a log that a process appends to",
    ("service.admin.audit_worker", "write"): "events, appended by line; the reader leaves a last part alone",
    ("service.audit.endpoint", "record"): "queries, appended by line and read up to the last whole one",
    ("service.library_source", "fetch"): "a library in a folder of its own, moved into place whole",
    ("service.library_source", "install"): "the move of a whole library into its place",
    ("service.library_source", "remove_unused"): "the move of a library that goes out of its place",
    ("training.executors.local", "start_worker"): "a log that a process appends to",
    ("training.jobs", "add"): "a log that is appended to by line",
    ("training.jobs", "lock_folder"): "a lock that holds nothing",
}
IN_MEMORY: Final = {"stream", "buffer", "file"}  # what pictures and arrays are saved to: streams, `replacing`'s too
WRITERS: Final = {"write_text", "write_bytes", "touch", "rename", "savefig", "savez", "save", "save_file", "tofile"}
FUNCTIONS: Final = {
    "os.replace",
    "os.rename",
    "os.link",
    "shutil.copy",
    "shutil.copyfile",
    "shutil.copytree",
    "shutil.move",
}


def makes_files(call: ast.Call) -> bool:
    """Whether a call opens a file for writing, or has one written by its name."""
    name, words = ast.unparse(call.func), [*call.args, *(word.value for word in call.keywords)]
    last = name.rpartition(".")[2]
    if last in ("open", "fdopen"):
        modes = [word.value for word in words if isinstance(word, ast.Constant) and isinstance(word.value, str)]
        return any(
            set(mode) <= set("rwaxbt+") and set(mode) & set("wax+") for mode in modes
        ) or "O_CREAT" in ast.unparse(call)
    if name in FUNCTIONS or "NamedTemporaryFile" in name or "mkstemp" in name:
        return True
    if last == "replace":  # Path's; str's has two arguments, and dataclasses' has names
        return len(call.args) == 1 and not call.keywords and not name.startswith(("self.", "dataclasses."))
    if name == "save_file":  # safetensors'
        return "file.name" not in map(ast.unparse, call.args)
    return (
        last in WRITERS
        and "." in name
        and not name.startswith(("safetensors.", "self.", "search."))
        and not to_memory(call)
    )


def to_memory(call: ast.Call) -> bool:
    return bool(call.args) and ast.unparse(call.args[0]) in IN_MEMORY


def offences(module: str, tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, innermost function) of each call that makes a file."""

    def visit(node: ast.AST, inside: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call) and makes_files(child):
                yield module, inside
            scope = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else inside
            yield from visit(child, scope)

    return visit(tree, "")


def test_no_other_module_makes_files() -> None:
    writers = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if module != "model_store.files":
                writers |= set(offences(module, ast.parse(path.read_text(encoding="utf-8"))))
    assert writers == set(ALLOWED)


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("path.write_text('x')", True),
        ("path.open('w')", True),
        ("open(path, mode='ab')", True),
        ("path.open('x', encoding='utf-8')", True),
        ("os.open(path, os.O_WRONLY | os.O_CREAT)", True),
        ("part.replace(path)", True),
        ("np.savez(path, a=1)", True),
        ("figure.savefig(path)", True),
        ("save_file(tensors, path)", True),
        ("tempfile.NamedTemporaryFile()", True),
        ("path.open()", False),
        ("open(path, 'rb')", False),
        ("archive.open(item)", False),
        ("text.replace('a', 'b')", False),
        ("replace(job, data=name)", False),
        ("image.save(buffer, 'PNG')", False),
    ],
)
def test_every_way_to_make_a_file_is_seen(source: str, *, seen: bool) -> None:
    assert bool(list(offences("m", ast.parse(source)))) == seen
