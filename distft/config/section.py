"""The base of every section of the run file: frozen, strict, documented field by field."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the run file. Unknown keys are errors, values never change after loading, and strings are not coerced to
    numbers: `lr: "1e-5"` is refused rather than guessed at."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
