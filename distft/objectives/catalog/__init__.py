"""Every objective, by name. To add one: write its file beside this one, and add its class to `Objective`."""

from __future__ import annotations

from distft.objectives.catalog.asft import Asft
from distft.objectives.catalog.dft import Dft
from distft.objectives.catalog.eaft import Eaft
from distft.objectives.catalog.eksft import Eksft
from distft.objectives.catalog.kd import Kd
from distft.objectives.catalog.lwf import Lwf
from distft.objectives.catalog.sft import Sft
from distft.objectives.catalog.sft_kl import SftKl
from distft.objectives.catalog.stm import Stm
from distft.objectives.catalog.stm_kl import StmKl
from distft.objectives.catalog.talr import Talr

Objective = Sft | SftKl | Stm | StmKl | Lwf | Kd | Eksft | Eaft | Dft | Asft | Talr

__all__ = [
    "Asft", "Dft", "Eaft", "Eksft", "Kd", "Lwf", "Objective", "Sft", "SftKl", "Stm", "StmKl", "Talr",
]  # fmt: skip
