"""How OpenMP's threads wait: spinning while the machine is ours, asleep while other programs want its cores."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECK_S = 1.0
BUSY_FRAC = 0.1
QUIET_FRAC = 0.03
QUIET_CHECKS = 5
WAIT_VARIABLES = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}


class CoreSharing:
    """While entered, watches how long the calling thread waits for a core, and ends OpenMP's spinning when it does.

    Threads that spin while they wait are faster alone, by 15 to 25%, but beside two busy programs they use up the time
    slices of the threads they wait for, and four fifths of the speed is lost (benchmarks/results/busy.md).

    `parallel_region` runs one OpenMP region on `num_threads` threads. Does nothing where the environment says how
    threads wait (OMP_WAIT_POLICY, GOMP_SPINCOUNT), with one thread, and on systems without Linux's /proc.
    """

    def __init__(self, num_threads: int, parallel_region: Callable[[], object]) -> None:
        self._parallel_region = parallel_region
        self._waits = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        is_wanted = num_threads > 1 and not WAIT_VARIABLES & os.environ.keys() and self._waits.exists()
        # With the caller's own team these make more threads than there are cores.
        self._num_teams = len(os.sched_getaffinity(0)) // num_threads if is_wanted else 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="core-sharing", daemon=True)

    def __enter__(self) -> "CoreSharing":
        if self._num_teams:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        release, num_quiet = None, 0
        waited_s, now_s = self._waited_s(), time.monotonic()
        while not self._end.wait(CHECK_S):
            (waited_s, before_s), (now_s, since_s) = (self._waited_s(), waited_s), (time.monotonic(), now_s)
            frac = (waited_s - before_s) / (now_s - since_s)
            num_quiet = num_quiet + 1 if frac < QUIET_FRAC else 0
            if release is None and frac > BUSY_FRAC:
                release = self._add_teams()
            elif release is not None and num_quiet >= QUIET_CHECKS:
                release.set()
                release = None
        if release is not None:
            release.set()

    def _add_teams(self) -> threading.Event:
        """Adds sleeping threads with OpenMP teams of their own, which end once the returned event is set.

        The only switch that works in a running program: libgomp spins 300,000 rounds before it sleeps, but 1,000 while
        it manages more threads than there are cores (its manual, GOMP_SPINCOUNT).
        """
        release = threading.Event()

        def hold_team() -> None:
            self._parallel_region()
            release.wait()

        for _ in range(self._num_teams):
            threading.Thread(target=hold_team, name="core-sharing-team", daemon=True).start()
        return release

    def _waited_s(self) -> float:
        # schedstat holds nanoseconds on a core, nanoseconds waiting for one, and the number of turns.
        return int(self._waits.read_text().split()[1]) / 1e9
