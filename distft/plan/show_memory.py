"""What a plan says of memory: what each rank takes it for, and the largest model that fits."""

from __future__ import annotations

from typing import Any

LEAST = 0.01
"""Of a rank's memory; what takes less is told together."""


def memory_lines(found: dict[str, Any]) -> list[str]:
    """The device's sum and its terms, its host's, and the sum of both for machines where they are one."""
    device, host = (sum(found[where].values()) for where in ("device", "host"))
    return [
        f"{'memory per rank':<22} {amount(device)} on the device, engine {found['of']}, fullest in the {found['fullest']}",
        *_terms(found["device"]),
        f"{'':<22} {amount(host)} of its host, and about {amount(found['process'])} for the process itself",
        *_terms(found["host"]),
        f"{'':<22} {amount(device + host + found['process'])} in all where there is no GPU",
    ]


def largest_lines(found: list[dict[str, Any]]) -> list[str]:
    """A line for each number of GPUs."""
    lines = []
    for number, one in enumerate(found):
        label = "largest that fits" if number == 0 else ""
        gpus = f"{one['gpus']} x {one['gpu_bytes'] / 1e9:.0f} GB"
        if not one["parameters"]:
            told = "none at these settings"
        else:
            told = f"{one['parameters'] / 1e9:.3g} billion parameters, with {amount(one['host_bytes_per_rank'])} of host memory a GPU"
        lines.append(f"{label:<23}{gpus:>11}: {told}")
    return lines


def amount(size: float) -> str:
    """Bytes as a person reads them; 1 GB is 1e9 of them."""
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.2g} MB"


def _terms(terms: dict[str, int]) -> list[str]:
    """A line each, the largest first."""
    total = sum(terms.values())
    large = {name: size for name, size in terms.items() if size >= LEAST * total}
    rest = total - sum(large.values())
    told = sorted(large.items(), key=lambda one: -one[1]) + ([("others", rest)] if rest else [])
    return [f"{'':<22} {amount(size):>12}  {name}" for name, size in told]
