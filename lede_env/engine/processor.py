"""The CPU that this runs on."""

from __future__ import annotations

import platform


def processor_name() -> str:
    """Its name, such as "AMD EPYC"; off Linux its architecture."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
