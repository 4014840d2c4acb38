"""Real clients and real proxies that ask for an upgrade: nobody loses a body, and nobody gets another's answer."""

import asyncio
import http.client
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from model_store.images import Pixels
from service.scheduling.answers import Probabilities
from tests.support.http_wire import read_answers
from tests.support.planes import TOKEN, Oracle, StandIn, admin_app, behind_a_port, png, public_app
from tools.fuzz.http_differential import PROXIES, installed, main, proxy_before, run_duel

CLASSIFY: Final = "/v1/classify"
PICTURES: Final = [png(12 + 25 * index) for index in range(10)]
ATTACKER: Final = 9
VICTIM: Final = 2
JAVA: Final = """
import java.net.URI;
import java.net.http.*;
import java.nio.file.*;

class Post {
    public static void main(String[] arguments) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        byte[] picture = Files.readAllBytes(Path.of(arguments[1]));
        for (int turn = 0; turn < 3; turn++) {
            HttpRequest.BodyPublisher body = turn == 1
                ? HttpRequest.BodyPublishers.ofInputStream(() -> new java.io.ByteArrayInputStream(picture))
                : HttpRequest.BodyPublishers.ofByteArray(picture);
            HttpRequest request = HttpRequest.newBuilder(URI.create(arguments[0])).POST(body).build();
            HttpResponse<String> response = client.send(request, HttpResponse.BodyHandlers.ofString());
            System.out.println(response.statusCode() + " " + response.body());
        }
    }
}
"""


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


@pytest.fixture(scope="module")
def public() -> Iterator[str]:
    with behind_a_port(public_app()) as address:
        yield address


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    path.write_bytes(PICTURES[VICTIM])
    return path


def index_of(body: bytes | str) -> int:
    index: int = json.loads(body)["predictions"][0]["index"]
    return index


@needs("curl")
@pytest.mark.parametrize("options", [[], ["--header", "transfer-encoding: chunked"]], ids=["length", "chunked"])
def test_curl_that_would_like_http_2_gets_its_answer(public: str, picture: Path, options: list[str]) -> None:
    url = f"http://{public}{CLASSIFY}"
    command = ["curl", "--silent", "--noproxy", "*", "--max-time", "20", "--http2", *options]
    command += ["--write-out", "\n%{http_code} %{num_connects}\n", "--data-binary", f"@{picture}"]
    output = subprocess.run([*command, url, url], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [index_of(line) for line in output[::2]] == [VICTIM] * 2
    assert output[1::2] == ["200 1", "200 0"]


@needs("curl")
def test_curl_that_insists_on_http_2_is_refused_and_told_so(public: str) -> None:
    command = ["curl", "--silent", "--noproxy", "*", "--max-time", "20", "--http2-prior-knowledge", f"http://{public}/"]
    assert subprocess.run(command, capture_output=True, check=False).returncode not in (0, 28)


@needs("curl")
def test_curl_on_the_admin_plane(picture: Path) -> None:
    with behind_a_port(admin_app()) as address:
        url = f"http://{address}/admin/library"
        command = ["curl", "--silent", "--noproxy", "*", "--max-time", "20", "--http2", "--data-binary", f"@{picture}"]
        command += ["--header", f"authorization: Bearer {TOKEN}", "--write-out", "\n%{http_code} %{num_connects}\n"]
        output = subprocess.run([*command, url, url], capture_output=True, text=True, check=True).stdout.splitlines()
    assert output[1::2] == ["200 1", "200 0"]


@needs("java")
def test_java_s_client_gets_its_answers(public: str, picture: Path, tmp_path: Path) -> None:
    """Its default asks for h2c with every first request."""
    source = tmp_path / "Post.java"
    source.write_text(JAVA)
    command = ["java", "-XX:TieredStopAtLevel=1", "-Djdk.httpclient.connectionPoolSize=1", str(source)]
    url = f"http://{public}{CLASSIFY}"
    done = subprocess.run([*command, url, str(picture)], capture_output=True, text=True, check=False, timeout=120)
    if "jdk.compiler" in done.stderr:
        pytest.skip("this Java runs no source files")
    assert done.returncode == 0, done.stderr
    assert [(line[:3], index_of(line[4:])) for line in done.stdout.splitlines()] == [("200", VICTIM)] * 3


class Slow(Oracle):
    """Takes its time over the attacker's picture, so that somebody else asks meanwhile."""

    async def submit(self, rows: Pixels, *, client: str, deadline: float | None) -> Probabilities:
        probabilities = await super().submit(rows, client=client, deadline=deadline)
        if probabilities[0].argmax() == ATTACKER:
            await asyncio.sleep(0.3)
        return probabilities


def attack(port: int) -> bytes:
    """A POST that asks for an upgrade, whose body is a whole request after many empty lines.

    They do not fit into one segment. A server that believes the upgrade reads two requests. It answers the second one
    to whoever comes next over the same upstream connection.
    """
    picture = PICTURES[ATTACKER]
    inner = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (CLASSIFY.encode(), len(picture))
    body = b"\r\n" * 200_000 + inner + picture
    head = b"POST %s HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    head += b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\ncontent-length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(head % (CLASSIFY.encode(), len(body)))
        connection.sendall(body)
        return connection.recv(65536)


@pytest.mark.parametrize("name", PROXIES)
def test_the_next_visitor_gets_an_answer_to_its_own_picture(name: str) -> None:
    if not installed(name):
        pytest.skip(f"{PROXIES[name][0]} is not installed")
    with (
        behind_a_port(public_app(StandIn(Slow()))) as address,
        proxy_before(int(address.split(":")[1]), name) as port,
    ):
        for _ in range(3):
            (answer,) = read_answers(attack(port))
            assert answer.status == 415  # the body is no picture
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            for index in (VICTIM, 0, 7):
                connection.request("POST", CLASSIFY, PICTURES[index])
                response = connection.getresponse()
                assert (response.status, index_of(response.read())) == (200, index)
            connection.close()


@pytest.mark.parametrize("name", PROXIES)
def test_a_short_run_of_the_differential_fuzzer_finds_nothing(name: str) -> None:
    if not installed(name):
        pytest.skip(f"{PROXIES[name][0]} is not installed")
    duel = run_duel(name, 300, seed=7, limit_s=60)
    assert duel.wrong == []
    assert duel.sent >= 300
    assert duel.statuses[200] > 150
    assert duel.statuses[400] > 10


def test_the_fuzzer_says_which_proxy_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tools.fuzz.http_differential.installed", lambda name: name == "nginx")
    assert main(["--proxies", "nginx", "haproxy"]) == 2
    assert capsys.readouterr().err == "not installed: haproxy\n"
