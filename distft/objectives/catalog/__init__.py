"""Every objective, by name. To add one: write its file beside this one, and add its class to `Objective`."""

from __future__ import annotations

from distft.objectives.catalog.sft import Sft
from distft.objectives.catalog.sft_kl import SftKl
from distft.objectives.catalog.stm import Stm
from distft.objectives.catalog.stm_kl import StmKl

Objective = Sft | SftKl | Stm | StmKl

__all__ = ["Objective", "Sft", "SftKl", "Stm", "StmKl"]
