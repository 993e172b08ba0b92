"""Who is next: clients in turn, each client's requests in the order in which they came."""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """A bounded queue in which a client that sends much delays itself, not others. Not for several threads at once.

    When it is full, a newcomer takes the place of the last request of the client with the most waiting; that client
    itself is turned away.

    Args:
        max_items: that wait in all.
    """

    def __init__(self, max_items: int):
        self._max_items = max_items
        self._by_client: OrderedDict[str, deque[Item]] = OrderedDict()  # whose turn is next comes first

    def __len__(self) -> int:
        return sum(map(len, self._by_client.values()))

    def put(self, client: str, item: Item) -> Item | None:
        """Let an item wait. Returns what has no room now: None, an item of another client, or `item` itself."""
        turned_away = None
        if len(self) >= self._max_items:
            greediest = max(self._by_client, key=lambda name: len(self._by_client[name]))
            if len(self._by_client[greediest]) <= len(self._by_client.get(client, ())) + 1:
                return item
            turned_away = self._by_client[greediest].pop()
        self._by_client.setdefault(client, deque()).append(item)
        return turned_away

    def take(self) -> Item:
        """The next item; its client's others wait until all other clients had a turn. Raises IndexError if there is none."""
        if not self._by_client:
            raise IndexError("The queue is empty.")
        client, items = self._by_client.popitem(last=False)
        item = items.popleft()
        if items:
            self._by_client[client] = items
        return item

    def upcoming(self, count: int) -> list[Item]:
        """The next so many items, in the order in which they will be taken."""
        rounds = itertools.zip_longest(*self._by_client.values())
        in_order = (item for items in rounds for item in items if item is not None)
        return list(itertools.islice(in_order, count))

    def remove_if(self, unwanted: Callable[[Item], bool]) -> list[Item]:
        """Take out the items that are not wanted any more, and return them."""
        removed = [item for items in self._by_client.values() for item in items if unwanted(item)]
        if removed:
            kept = ((client, deque(i for i in items if not unwanted(i))) for client, items in self._by_client.items())
            self._by_client = OrderedDict((client, items) for client, items in kept if items)
        return removed
