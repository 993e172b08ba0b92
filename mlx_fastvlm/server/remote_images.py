"""Images that a server fetches for its clients, without becoming their way into the network it stands in.

A name is resolved once and the connection goes to the address that was judged, so a name that changes its mind gains
nothing; a redirect is judged like a first URL; proxies from the environment are not used. image_source.py fetches for
people who may reach those addresses anyway.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable

import httpx

from mlx_fastvlm.errors import ImageError
from mlx_fastvlm.image_source import source_name

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_MAX_REDIRECTS = 3
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # NAT64: the last 32 bits are an IPv4 address
_HEADERS = {"User-Agent": "mlx-fastvlm", "Accept": "image/*", "Accept-Encoding": "identity"}


def is_public(address: Address) -> bool:
    """Whether an address belongs to the open internet; one that stands for an IPv4 address is judged by that."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _TRANSLATED:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.sixtofour is not None or address.teredo is not None:  # tunnels to IPv4 that nobody serves from
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


def fetch_image(url: str, max_mb: float, max_seconds: float, may_reach: Callable[[Address], bool] = is_public) -> bytes:
    """Download what a client's URL names.

    Args:
        url: http:// or https://.
        max_mb: most of it, in MiB.
        max_seconds: for all of it, redirects included.
        may_reach: judges addresses.

    Raises:
        ImageError: it leads to an address that is not public, fails, is too large or takes too long.
    """
    deadline = time.monotonic() + max_seconds
    # trust_env: a proxy would resolve the name again, where nobody judges the address.
    with httpx.Client(trust_env=False, follow_redirects=False) as client:
        for _ in range(_MAX_REDIRECTS + 1):
            try:
                target, body = _get(client, httpx.URL(url), int(max_mb * 2**20), deadline, may_reach)
            except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
                reason = "it takes too long" if isinstance(error, httpx.TimeoutException) else "the request failed"
                raise ImageError(f"{source_name(url)} cannot be fetched: {reason}.") from error
            if target is None:
                return body
            url = target
    raise ImageError(f"{source_name(url)} cannot be fetched: it redirects more than {_MAX_REDIRECTS} times.")


def _get(
    client: httpx.Client, url: httpx.URL, max_bytes: int, deadline: float, may_reach: Callable[[Address], bool]
) -> tuple[str | None, bytes]:
    """Where a URL redirects to, or None and what it gives."""
    name = source_name(str(url))
    if url.scheme not in ("http", "https") or not url.host:
        raise ImageError(f"{name} cannot be fetched: it is no http:// or https:// URL.")
    address = _resolve(url, name, may_reach)
    left = deadline - time.monotonic()
    if left <= 0:
        raise _too_slow(name)
    request = client.build_request(
        "GET",
        url.copy_with(host=str(address), userinfo=b""),
        headers={**_HEADERS, "Host": url.netloc.decode("ascii")},
        extensions={"sni_hostname": url.raw_host.decode("ascii")},  # whose certificate is expected
        timeout=left,
    )
    response = client.send(request, stream=True)
    try:
        if response.has_redirect_location:
            return str(url.join(response.headers["Location"])), b""
        if not response.is_success:
            raise ImageError(f"{name} cannot be fetched: the answer is {response.status_code}.")
        return None, _body(response, name, max_bytes, deadline)
    finally:
        response.close()


def _resolve(url: httpx.URL, name: str, may_reach: Callable[[Address], bool]) -> Address:
    """The first of a host's addresses. If one is not public, none is used."""
    found = socket.getaddrinfo(url.host, url.port or url.scheme, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(where[0].partition("%")[0]) for *_, where in found]
    if not addresses or not all(may_reach(address) for address in addresses):
        raise ImageError(f"{name} cannot be fetched: it is not on the public internet.")
    return addresses[0]


def _body(response: httpx.Response, name: str, max_bytes: int, deadline: float) -> bytes:
    data = bytearray()
    for piece in response.iter_raw():
        data += piece
        if len(data) > max_bytes:
            raise ImageError(f"{name} cannot be fetched: it is larger than {max_bytes / 2**20:g} MiB.")
        if time.monotonic() > deadline:
            raise _too_slow(name)
    return bytes(data)


def _too_slow(name: str) -> ImageError:
    return ImageError(f"{name} cannot be fetched: it takes too long.")
