"""What a run costs: seconds, tokens and kind of device of every call that trained, RUN/sessions.json.

In: the call that trains. Out: one entry a call, written at the start, at most every WRITE_EVERY_S and at the end. The
seconds are those that the machine was held: loading, evaluations, checkpoints and steps lost to a crash count.
"""

import datetime
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from stillroom.config import Json
from stillroom.errors import CorruptError
from stillroom.storage.paths import write_text_atomic

WRITE_EVERY_S = 10.0


class SessionRecord(BaseModel):
    """One call. A `device` is a GPU, or the machine where there is none; every rank has one of its own."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    started_at: str
    device: str
    num_devices: int
    seconds: float
    num_tokens: int
    """Tokens read in optimizer steps, those that a later call took again included."""


class Session:
    """The entry of this call, as a context manager."""

    def __init__(self, path: Path, num_ranks: int, started_s: float) -> None:
        """`started_s` is the call's start by time.monotonic(). Raises CorruptError."""
        self._path, self._started_s = path, started_s
        self._before = read_sessions(path)
        self._written_s = 0.0
        self._now = SessionRecord(
            started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            device=device_kind(),
            # Ranks on CPUs share a machine.
            # GROUP_WORLD_SIZE, of torchrun and of ranks.py, is the number of machines.
            num_devices=num_ranks if _has_gpu() else int(os.environ.get("GROUP_WORLD_SIZE", "1")),
            seconds=0.0,
            num_tokens=0,
        )

    def __enter__(self) -> Self:
        self._write()
        return self

    def __exit__(self, *_: object) -> None:
        self._write()

    def add(self, num_tokens: int) -> None:
        """Counts a step."""
        self._now = self._now.model_copy(update={"num_tokens": self._now.num_tokens + num_tokens})
        if time.monotonic() - self._written_s >= WRITE_EVERY_S:
            self._write()

    def _write(self) -> None:
        self._written_s = time.monotonic()
        self._now = self._now.model_copy(update={"seconds": self._written_s - self._started_s})
        entries = [one.model_dump() for one in (*self._before, self._now)]
        write_text_atomic(self._path, json.dumps(entries, indent=2) + "\n")


def read_sessions(path: Path) -> list[SessionRecord]:
    """Empty for runs of earlier versions. Raises CorruptError."""
    if not path.exists():
        return []
    try:
        return [SessionRecord.model_validate(one) for one in json.loads(path.read_text(encoding="utf-8"))]
    except ValueError as error:
        raise CorruptError(f"{path} is not a list of sessions: delete it to count from now on") from error


def cost_of(sessions: Sequence[SessionRecord], price_per_hour: float | None = None) -> Json | None:
    """Device hours by kind, tokens, and with the price of a device's hour the cost; None where nothing is recorded."""
    if not sessions:
        return None
    device_hours: dict[str, float] = {}
    for one in sessions:
        device_hours[one.device] = device_hours.get(one.device, 0.0) + one.seconds * one.num_devices / 3600
    hours = sum(device_hours.values())
    return {
        "num_calls": len(sessions),
        "seconds": sum(one.seconds for one in sessions),
        "device_hours": device_hours,
        "num_tokens": sum(one.num_tokens for one in sessions),
        "price_per_hour": price_per_hour,
        "cost": None if price_per_hour is None else hours * price_per_hour,
    }


def device_kind() -> str:
    """The GPU's name, or the processor's with its number of cores."""
    if _has_gpu():
        import torch

        return torch.cuda.get_device_name()
    return f"{_processor()}, {len(os.sched_getaffinity(0))} cores"


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.machine()
