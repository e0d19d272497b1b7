"""What NVIDIA's management library tells of a GPU: driver, limits, clocks, power, energy, reasons of slowness."""

from __future__ import annotations

from typing import Any

__all__ = ["Nvml"]

_SLOWED = {
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
}


class Nvml:
    """One GPU. What it does not tell is None; nothing raises.

    Args:
        library: the module `pynvml`; None if there is none.
        handle: of the GPU.
        why: why nothing can be asked; "" if it can.
    """

    def __init__(self, library: Any, handle: Any, why: str = "") -> None:
        self._library, self._handle, self._why = library, handle, why

    @classmethod
    def of(cls, uuid: str, index: int) -> Nvml:
        """The GPU that torch calls so, which may have another number for the driver.

        Args:
            uuid: as torch tells it; "" if it does not.
            index: torch's number of it, for drivers that do not know the uuid.
        """
        try:
            import pynvml
        except ImportError:
            return cls(None, None, 'not read: pip install "linearize[suite]" brings nvidia-ml-py')
        try:
            pynvml.nvmlInit()
            name = uuid if uuid.startswith(("GPU-", "MIG-")) or not uuid else f"GPU-{uuid}"
            by_name = (lambda: pynvml.nvmlDeviceGetHandleByUUID(name)) if name else None
            try:
                handle = by_name() if by_name is not None else pynvml.nvmlDeviceGetHandleByIndex(index)
            except pynvml.NVMLError:
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        except pynvml.NVMLError as error:
            return cls(None, None, f"not read: {error}")
        return cls(pynvml, handle)

    def _ask(self, name: str, *arguments: Any, own: bool = True) -> Any:
        """The answer of one function; None if this GPU or this driver has none."""
        if self._library is None:
            return None
        try:
            function = getattr(self._library, name)
            return function(*([self._handle] if own else []), *arguments)
        except (self._library.NVMLError, AttributeError):
            return None

    def facts(self) -> dict[str, Any]:
        """Driver, power limit, highest clocks."""
        driver = self._ask("nvmlSystemGetDriverVersion", own=False)
        told = {
            "driver": driver.decode() if isinstance(driver, bytes) else driver,
            "power_limit_w": _thousandth(self._ask("nvmlDeviceGetEnforcedPowerLimit")),
            "most_clock_mhz": self._ask("nvmlDeviceGetMaxClockInfo", 1),
            "most_memory_clock_mhz": self._ask("nvmlDeviceGetMaxClockInfo", 2),
            "persistence": self._ask("nvmlDeviceGetPersistenceMode"),
        }
        return {**told, "nvml": self._why or "read"}

    def state(self) -> dict[str, Any]:
        """Clocks in MHz, power in watts, temperature in degrees Celsius, and why it is slowed."""
        bits = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:
            bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        return {
            "clock_mhz": self._ask("nvmlDeviceGetClockInfo", 1),
            "memory_clock_mhz": self._ask("nvmlDeviceGetClockInfo", 2),
            "power_w": _thousandth(self._ask("nvmlDeviceGetPowerUsage")),
            "temperature_c": self._ask("nvmlDeviceGetTemperature", 0),
            "slowed": [name for bit, name in _SLOWED.items() if (bits or 0) & bit],
        }

    def joules(self) -> float | None:
        """Energy of the board since the driver was loaded."""
        return _thousandth(self._ask("nvmlDeviceGetTotalEnergyConsumption"))


def _thousandth(value: int | None) -> float | None:
    return None if value is None else value / 1e3
