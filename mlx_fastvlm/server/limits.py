"""How much a server takes on, in one place."""

from __future__ import annotations

from dataclasses import dataclass, fields

from mlx_fastvlm.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds that keep one client, or many, from exhausting the machine.

    Attributes:
        max_batch: answers decoded together.
        max_queue: requests that wait for a place.
        max_request_mb: a request's body, in MiB.
        max_images: images of one request.
        max_image_mp: pixels of one image, in millions; `image_decoding` has a limit of its own.
        max_tokens: longest answer, and the length of one whose request names none.
        max_seconds: from a request's arrival to the end of its answer.
        grace_seconds: that answers may still take when the server stops.
        remote_image_mb: one image fetched for a client, in MiB.
        remote_image_seconds: for fetching it, redirects included.

    Raises:
        OptionError: one of them is not above zero.
    """

    max_batch: int = 16
    max_queue: int = 64
    max_request_mb: float = 20
    max_images: int = 8
    max_image_mp: float = 50
    max_tokens: int = 1024
    max_seconds: float = 300
    grace_seconds: float = 5
    remote_image_mb: float = 20
    remote_image_seconds: float = 10

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < float("inf"):
                raise OptionError(f"{field.name} is {value}; expected a number above 0.")

    @property
    def max_request_bytes(self) -> int:
        """`max_request_mb` in bytes."""
        return int(self.max_request_mb * 2**20)

    @property
    def max_open_requests(self) -> int:
        """Requests whose bodies are in memory: those with a place, those in the queue, and some on their way there."""
        return 2 * (self.max_batch + self.max_queue)
