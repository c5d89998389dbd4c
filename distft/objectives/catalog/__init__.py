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
from distft.objectives.treatment import Wiring

Objective = Sft | SftKl | Stm | StmKl | Lwf | Kd | Eksft | Eaft | Dft | Asft | Talr

NOT_WIRED: frozenset[Wiring] = frozenset({"anchors"})
"""What rules can ask for and training cannot give yet; `config.check` refuses them."""

__all__ = [
    "NOT_WIRED", "Asft", "Dft", "Eaft", "Eksft", "Kd", "Lwf", "Objective", "Sft", "SftKl", "Stm", "StmKl", "Talr",
]  # fmt: skip
