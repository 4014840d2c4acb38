"""Libraries from elsewhere: a web server and an S3 of this machine; pinned, verified, whole or not at all."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest

from model_store.errors import LibraryRejected
from model_store.library import Library
from service.library_manager import LibraryManager
from service.library_source import Location, fetch, local_library, parse_location, push, remove_unused
from service.observability.metrics import Metrics
from service.settings import Settings, read_settings
from tests.support.http_server import running
from tests.support.hub import REPOSITORY, hub
from tests.support.planes import png
from tests.support.serving import environment, serving, tiny_library
from tests.support.side_effects import listening
from tombola.cli import main

pytestmark = pytest.mark.usefixtures("warm_start")

DIGEST = "ab" * 32


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return tiny_library(tmp_path / "web" / "robust")


@pytest.fixture
def web(library: Library) -> Iterator[str]:
    """The library's folder behind a web server."""
    handler = partial(Handler, directory=str(library.path.parent))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    with running(server):
        yield f"http://127.0.0.1:{server.server_port}/robust"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of an S3 of this machine, named and opened by AWS's own variables."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "of-a-test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="models")
    yield "s3://models/robust"
    server.stop()


def test_a_server_s_library_is_fetched_once_verified_and_opened(library: Library, web: str, tmp_path: Path) -> None:
    settings = Settings(library=f"{web}#sha256={library.digest}", state_dir=tmp_path / "state")
    steps: list[str] = []
    for _ in range(2):
        folder = local_library(settings, steps.append)
        assert folder == tmp_path / "state" / "libraries" / library.digest
    assert steps == [f"fetching the library from {web}"]
    assert [path.name for path in (tmp_path / "state" / "libraries").iterdir()] == [library.digest]


def test_the_real_process_serves_a_library_from_elsewhere(library: Library, web: str, tmp_path: Path) -> None:
    location: Any = f"{web}#sha256={library.digest}"
    with serving(location, tmp_path / "state") as process:
        status, answer = process.classify(png())
    assert (status, answer["library"]) == (200, library.digest)


def test_a_bucket_is_pushed_to_and_pulled_from(
    library: Library, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["library", "push", str(library.path), bucket]) == 0
    location = capsys.readouterr().out.strip()
    assert location == f"{bucket}#sha256={library.digest}"
    assert main(["library", "pull", location, str(tmp_path / "copy")]) == 0
    assert library.digest in capsys.readouterr().out
    assert main(["library", "pull", location, str(tmp_path / "copy")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert local_library(Settings(library=location, state_dir=tmp_path / "state")) is not None


def test_a_bucket_is_asked_itself_whatever_proxy_the_environment_names(
    library: Library, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with listening() as proxy:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        push(library, parse_location(bucket, pinned=False))
        fetch(parse_location(bucket, pinned=False), tmp_path / "copy")
    assert proxy.heard == []


HUB: Final = """
import json, sys
from tombola.cli import main
for words in json.loads(sys.argv[1]):
    assert main(words) == 0, words
"""


def test_a_repository_of_the_hub_is_pushed_to_and_pulled_from_without_a_proxy(library: Library, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (extra hf)")
    location, copy, home = f"hf://{REPOSITORY}", tmp_path / "copy", tmp_path / "home"
    home.mkdir()
    lines = [
        ["library", "push", str(library.path), location],
        ["library", "pull", f"{location}#sha256={library.digest}", str(copy)],
        ["library", "diff", location, str(library.path)],
    ]
    with hub() as served, listening() as proxy:
        variables = environment(HF_ENDPOINT=served.url, HF_TOKEN="hf_of_a_test", HOME=str(home), **proxy.environment)
        command = [sys.executable, "-c", HUB, json.dumps(lines)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pushed, pulled, differs = done.stdout.splitlines()
    assert pushed == f"{location}#sha256={library.digest}"
    assert pulled == f"{copy}: library {library.digest}, 4 tickets"
    assert differs.endswith(": 0 differences")
    assert set(served.files) == {"manifest.json", *(entry.file for entry in library.manifest.entries)}
    assert "Bearer hf_of_a_test" in served.tokens
    assert proxy.heard == []
    assert list(home.iterdir()) == []


def test_a_repository_that_the_hub_does_not_have_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (extra hf)")
    command = [sys.executable, "-m", "tombola", "library", "pull", "hf://acme/other", str(tmp_path / "copy")]
    with hub() as served:
        variables = environment(HF_ENDPOINT=served.url, HOME=str(tmp_path))
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("tombola: hf://acme/other/manifest.json: ")
    assert list(tmp_path.iterdir()) == []


def test_fetched_libraries_are_removed_but_those_in_use_and_the_last_two(tmp_path: Path) -> None:
    settings, root = Settings(state_dir=tmp_path / "state"), tmp_path / "state" / "libraries"
    assert remove_unused(settings, ()) == []
    names = [f"{number:064x}" for number in range(5)]
    for age, name in enumerate([*names, f".{names[0]}.12.part", f".{names[1]}.34.part", "somebody-s-own"]):
        (root / name).mkdir(parents=True)
        (root / name / "manifest.json").write_text("{}")
        os.utime(root / name, (1000 + age, 1000 + age))
    fresh = root / f".{names[2]}.56.part"
    fresh.mkdir()
    removed = remove_unused(settings, {root / names[0]})
    assert [path.name for path in removed] == [names[1], names[2]]
    left = {path.name for path in root.iterdir()}
    assert left == {names[0], names[3], names[4], fresh.name, "somebody-s-own"}
    assert remove_unused(settings, {root / names[0]}) == []


def test_a_library_s_use_is_what_keeps_it(library: Library, web: str, tmp_path: Path) -> None:
    settings = Settings(library=f"{web}#sha256={library.digest}", state_dir=tmp_path / "state")
    folder = local_library(settings)
    assert folder is not None
    others = [folder.with_name(f"{number:064x}") for number in range(3)]
    for other in others:
        other.mkdir()
    os.utime(folder, (1000, 1000))
    local_library(settings)
    os.utime(others[0], (2000, 2000))
    assert others[0] in remove_unused(settings, ())
    assert folder.is_dir()


def test_the_service_removes_what_nobody_uses_once_another_library_serves(tmp_path: Path, library: Library) -> None:
    root = tmp_path / "state" / "libraries"
    old, audited = [root / f"{number:064x}" for number in range(4)], root / ("ab" * 32)
    for age, folder in enumerate([*old, audited]):
        folder.mkdir(parents=True)
        os.utime(folder, (age, age if folder != audited else 0))
    manager = LibraryManager(Settings(library=library.path, state_dir=tmp_path / "state", engine="torch"), Metrics())
    manager.libraries_in_use = lambda: {audited}
    manager.remove_unused_libraries(library.path)
    assert {folder.name for folder in root.iterdir()} == {old[2].name, old[3].name, audited.name}


def test_what_is_shown_and_what_differs(
    library: Library, web: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_library(tmp_path / "other", structures=("resnet18",))
    assert main(["library", "show", web]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"digest   {library.digest}"
    assert shown[-1] == "4 tickets and 0 baselines"
    assert main(["library", "diff", web, str(library.path)]) == 0
    assert capsys.readouterr().out == f"{library.digest[:12]} -> {library.digest[:12]}: 0 differences\n"
    assert main(["library", "diff", str(library.path), str(other.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == ["- resnet34-20", "- resnet34-50", "~ policy"]
    assert lines[-1].endswith(": 3 differences")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ftp://host/x#sha256=" + DIGEST, "ftp://: expected a folder, or http, https, s3, hf, oci"),
        ("oci://host#sha256=" + DIGEST, "oci://host: expected oci://HOST/NAME:TAG"),
        ("https://host/x", "https://host/x: expected #sha256="),
        ("https://host/x#sha256=12", "https://host/x: expected #sha256="),
        ("https://me:secret@host/x#sha256=" + DIGEST, "https://host: no credentials and no query"),
        ("https://host/x?token=secret#sha256=" + DIGEST, "https://host: no credentials and no query"),
    ],
)
def test_a_location_that_cannot_be_used_is_refused_without_showing_a_secret(text: str, message: str) -> None:
    with pytest.raises(LibraryRejected) as refused:
        parse_location(text)
    assert str(refused.value).startswith(message)
    assert "secret" not in str(refused.value)


def test_nothing_is_kept_of_a_library_that_is_not_the_one_that_was_named(
    library: Library, web: str, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    with pytest.raises(LibraryRejected, match=f"^{web}: digest {library.digest}; expected {DIGEST}"):
        fetch(Location(web, DIGEST), folder)
    for entry in library.manifest.entries[:1]:
        file = library.path / entry.file
        sound = file.read_bytes()
        file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        with pytest.raises(LibraryRejected, match="other bytes than the manifest says"):
            fetch(Location(web, library.digest), folder)
        file.unlink()
        with pytest.raises(LibraryRejected, match="status 404"):
            fetch(Location(web, library.digest), folder)
    (library.path / "manifest.json").write_bytes(b"{}")
    with pytest.raises(LibraryRejected, match=f"^{web}/manifest.json: "):
        fetch(Location(web, library.digest), folder)
    with pytest.raises(LibraryRejected, match="ConnectError"):
        fetch(Location("http://127.0.0.1:1/x", DIGEST), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["web"]


def test_a_location_in_a_setting_keeps_its_slashes_and_a_folder_is_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOMBOLA_LIBRARY", f"s3://models/robust#sha256={DIGEST}")
    assert read_settings().library == f"s3://models/robust#sha256={DIGEST}"
    monkeypatch.setenv("TOMBOLA_LIBRARY", "models/robust")
    assert read_settings().library == Path("models/robust")
    assert "TOMBOLA_LIBRARY" not in environment()
