"""One host of a run on several: it meets the others in a rendezvous, gets its ranks, and shares how ranks ended.

In: a meeting that every host knows, and how many ranks this host starts. Out: the numbers of its ranks, the address
where all ranks join, and the exit codes of the ranks of all hosts in the one order that every host sees. torch is
imported only to meet: the program that starts the hosts' agents needs none.
"""

from __future__ import annotations

import functools
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from stillroom.errors import ConfigError, StillroomError, first_line

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler

JOIN_S = 600
LEAVE_S = 15.0
"""How long a host that is done waits for the exit codes of others; longer than these give their ranks to end."""
POLL_S = 0.2

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Meeting:
    """Where hosts meet: `first_host` is reachable from all; `index` is this host's number of `num_hosts`."""

    run_id: str
    first_host: str
    port: int
    num_hosts: int
    index: int
    num_ranks: int


class Peers:
    """The hosts of a run, as one of them sees them."""

    def __init__(self, handler: RendezvousHandler, meeting: Meeting) -> None:
        """Raises RendezvousError or RuntimeError if the others do not come, or do not say what they have."""
        self._handler, self._meeting = handler, meeting
        self._store = store = handler.next_rendezvous().store
        self._codes: dict[int, int] = {}
        self._num_read = 0
        self._is_lost = False
        store.set(f"ranks/{meeting.index}", str(meeting.num_ranks))
        if meeting.index == 0:
            store.set("port", str(_free_port()))
        numbers = [int(store.get(f"ranks/{index}")) for index in range(meeting.num_hosts)]
        self.first_rank, self.num_ranks = sum(numbers[: meeting.index]), sum(numbers)
        self.address, self.port = meeting.first_host, int(store.get("port"))
        self.host, self.num_hosts = socket.gethostname(), meeting.num_hosts

    def tell(self, rank: int, code: int) -> None:
        """Reports that a rank of this host has ended."""
        number = self._add("num_ended", 1) - 1
        self._ask(lambda: self._store.set(f"ended/{number}", json.dumps([rank, code])))

    def codes(self) -> dict[int, int]:
        """Exit codes by rank, of all hosts, in the order in which they became known."""
        for number in range(self._num_read, self._add("num_ended", 0)):
            text = self._ask(functools.partial(self._store.get, f"ended/{number}"))
            if text is None:
                break
            rank, code = json.loads(text)
            self._codes.setdefault(rank, code)
            self._num_read = number + 1
        return self._codes

    def leave(self) -> None:
        """Waits until every host has reported everything: the first one holds the reports."""
        deadline_s = time.monotonic() + LEAVE_S
        self._wait_for_all("num_done", deadline_s)
        self.codes()
        if self._meeting.index > 0:
            # Otherwise it would miss the first host's heartbeat, and say so at length.
            self._handler.shutdown()
            self._add("num_gone", 1)
        else:
            self._wait_for_all("num_gone", deadline_s)

    def _wait_for_all(self, name: str, deadline_s: float) -> None:
        number = self._add(name, 1)
        while 0 < number < self._meeting.num_hosts and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
            number = self._add(name, 0)

    def _add(self, name: str, amount: int) -> int:
        return self._ask(lambda: self._store.add(name, amount)) or 0

    def _ask(self, question: Callable[[], Answer]) -> Answer | None:
        """None without the first host: each knows only its own ranks then, which end by themselves, as they lose it."""
        if self._is_lost:
            return None
        try:
            return question()
        except RuntimeError:
            self._is_lost = True
            return None


def meet(meeting: Meeting) -> Peers:
    """Meets the other hosts. Raises StillroomError if they do not come within JOIN_S seconds, ConfigError if this one
    does not know the name of the first.
    """
    from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    try:
        socket.getaddrinfo(meeting.first_host, meeting.port)
    except OSError as error:
        # Now rather than after JOIN_S: a name from ~/.ssh/config is known to ssh alone.
        raise ConfigError(
            f"{socket.gethostname()} cannot resolve {meeting.first_host}, the first of --hosts: use a name or "
            "an address that all hosts know"
        ) from error
    endpoint, num_hosts = f"{meeting.first_host}:{meeting.port}", meeting.num_hosts
    asked = RendezvousParameters(
        "c10d",
        endpoint,
        meeting.run_id,
        min_nodes=num_hosts,
        max_nodes=num_hosts,
        is_host=meeting.index == 0,
        join_timeout=JOIN_S,
        read_timeout=JOIN_S,
    )
    try:
        return Peers(get_rendezvous_handler(asked), meeting)
    except (RendezvousError, RuntimeError) as error:
        raise StillroomError(
            f"{socket.gethostname()} cannot reach all {num_hosts} hosts through {endpoint}: "
            f"{first_line(error)}. Set MASTER_PORT to use another port"
        ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
