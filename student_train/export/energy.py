"""The energy that this machine has used, where it says: processor packages by RAPL, NVIDIA GPUs by NVML."""

import importlib
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Counters of the whole machine: other programs' work is in them too."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self._packages = [path for path in sorted(powercap.glob("intel-rapl:?/energy_uj")) if _is_readable(path)]
        self._ranges_uj = [int((path.parent / "max_energy_range_uj").read_text()) for path in self._packages]
        self._last_uj = [0] * len(self._packages)
        self._wrapped_uj = 0
        self._nvml, self._gpus = _gpus()

    def read_j(self) -> float | None:
        """Joules since some moment; None where nothing is counted."""
        if not self._packages and not self._gpus:
            return None
        found = [int(path.read_text()) for path in self._packages]
        # The counters start over after some minutes.
        for now, before, size in zip(found, self._last_uj, self._ranges_uj, strict=True):
            self._wrapped_uj += size if now < before else 0
        self._last_uj = found
        gpus_mj: float = sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(one) for one in self._gpus)
        return (sum(found) + self._wrapped_uj) / 1e6 + gpus_mj / 1e3


def _is_readable(path: Path) -> bool:
    try:
        path.read_text()
    except OSError:
        # Since 2020 kernels let only root read it.
        return False
    return True


def _gpus() -> tuple[Any, list[Any]]:
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # noqa: BLE001  no package, no driver, no GPU: its errors are of many types
        return None, []
    handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    counted = []
    for handle in handles:
        try:
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            counted.append(handle)
        except nvml.NVMLError:
            # GPUs before Volta do not count.
            continue
    return nvml, counted
