"""Every HTTP client of the project. None of them takes a proxy from the environment.

A variable such as http_proxy is set for a whole machine. It would lead calls of loopback, and the tokens in them, to
somebody else. Whoever needs a proxy names it.
"""

import ipaddress
import socket
import urllib.request
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    import httpx


Client = TypeVar("Client")


class ProxyRejected(ValueError):
    """A proxy that cannot be used: one line that names it."""


DIRECT: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def http_client(*, timeout_s: float, proxy: str | None = None, **options: Any) -> "httpx.Client":
    """A client that asks directly, or through the proxy it is given. Raises ProxyRejected.

    Args:
      timeout_s: of connecting, and of each wait for bytes.
      proxy: URL of a proxy, http:// or https://.
      options: httpx.Client's own, such as base_url and headers.
    """
    import httpx

    return build(httpx.Client, timeout_s, proxy, options)


def async_http_client(*, timeout_s: float, proxy: str | None = None, **options: Any) -> "httpx.AsyncClient":
    """As http_client, for asyncio."""
    import httpx

    return build(httpx.AsyncClient, timeout_s, proxy, options)


def build(kind: Callable[..., Client], timeout_s: float, proxy: str | None, options: dict[str, Any]) -> Client:
    import httpx

    # SSL_CERT_FILE is still read: it names whom to trust, not whom to ask.
    certificates = httpx.create_ssl_context()
    try:
        return kind(trust_env=False, verify=certificates, proxy=proxy, timeout=timeout_s, **options)
    except (ValueError, ImportError, httpx.InvalidURL) as error:
        raise ProxyRejected(f"proxy {proxy}: {error}") from None


def open_url(request: str | urllib.request.Request, timeout_s: float = 60) -> Any:
    """As urllib's urlopen, without a proxy. Raises URLError, HTTPError."""
    return DIRECT.open(request, timeout=timeout_s)


def read_at_most(response: Any, most: int) -> bytes | None:
    """The body of a streamed httpx.Response; None if it is longer, however long it is."""
    data = bytearray()
    for chunk in response.iter_bytes():
        data += chunk
        if len(data) > most:
            return None
    return bytes(data)


def in_public_network(host: str) -> bool:
    """Whether every address of a host is public. One that has no address is: a request to it fails in any case."""
    try:
        addresses = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return True
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_global for *_, address in addresses)


def loopback_url(url: str) -> str:
    """The URL as this machine reaches it, where the service listens on all addresses."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
