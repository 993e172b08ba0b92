"""Images that a server fetches for its clients, without becoming their way into the network it stands in.

A name is resolved once and the connection goes to the address that was judged, so a name that changes its mind gains
nothing; a redirect is judged like a first URL; proxies from the environment are not used. image_source.py fetches for
people who may reach those addresses anyway.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
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
    """Download what a client's URL names. Not from an event loop's thread.

    Args:
        url: http:// or https://.
        max_mb: most of it, in MiB.
        max_seconds: for all of it, redirects included.
        may_reach: judges addresses.

    Raises:
        ImageError: it leads to an address that is not public, fails, is too large or takes too long.
    """
    # In a loop of its own, all of it ends in time; a socket's timeout begins anew with each byte that trickles in.
    try:
        return asyncio.run(asyncio.wait_for(_fetch(url, int(max_mb * 2**20), may_reach), max_seconds))
    except asyncio.TimeoutError:
        raise ImageError(f"{source_name(url)} cannot be fetched: it takes too long.") from None


async def _fetch(url: str, max_bytes: int, may_reach: Callable[[Address], bool]) -> bytes:
    # trust_env: a proxy would resolve the name again, where nobody judges the address.
    async with httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=None) as client:
        for _ in range(_MAX_REDIRECTS + 1):
            try:
                target, body = await _get(client, httpx.URL(url), max_bytes, may_reach)
            except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
                raise ImageError(f"{source_name(url)} cannot be fetched: the request failed.") from error
            if target is None:
                return body
            url = target
    raise ImageError(f"{source_name(url)} cannot be fetched: it redirects more than {_MAX_REDIRECTS} times.")


async def _get(
    client: httpx.AsyncClient, url: httpx.URL, max_bytes: int, may_reach: Callable[[Address], bool]
) -> tuple[str | None, bytes]:
    """Where a URL redirects to, or None and what it gives."""
    name = source_name(str(url))
    if url.scheme not in ("http", "https") or not url.host:
        raise ImageError(f"{name} cannot be fetched: it is no http:// or https:// URL.")
    address = await _resolve(url, name, may_reach)
    request = client.build_request(
        "GET",
        url.copy_with(host=str(address), userinfo=b""),
        headers={**_HEADERS, "Host": url.netloc.decode("ascii")},
        extensions={"sni_hostname": url.raw_host.decode("ascii")},  # whose certificate is expected
    )
    response = await client.send(request, stream=True)
    try:
        if response.has_redirect_location:
            return str(url.join(response.headers["Location"])), b""
        if not response.is_success:
            raise ImageError(f"{name} cannot be fetched: the answer is {response.status_code}.")
        return None, await _body(response, name, max_bytes)
    finally:
        await response.aclose()


async def _resolve(url: httpx.URL, name: str, may_reach: Callable[[Address], bool]) -> Address:
    """The first of a host's addresses. If one is not public, none is used."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(url.host, url.port or url.scheme, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(where[0].partition("%")[0]) for *_, where in found]
    if not addresses or not all(may_reach(address) for address in addresses):
        raise ImageError(f"{name} cannot be fetched: it is not on the public internet.")
    return addresses[0]


async def _body(response: httpx.Response, name: str, max_bytes: int) -> bytes:
    data = bytearray()
    async for piece in response.aiter_raw():
        data += piece
        if len(data) > max_bytes:
            raise ImageError(f"{name} cannot be fetched: it is larger than {max_bytes / 2**20:g} MiB.")
    return bytes(data)
