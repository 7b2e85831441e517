"""What all settings have in common. Data sets define theirs beside their code, so this is below `config.py`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

Seed = Annotated[int, Field(ge=0, lt=2**32)]

# `json_schema_extra` of a setting that changes what is recorded or how work is divided, not what is learned: a run may
# be resumed with another value.
FREE_ON_RESUME: dict[str, Any] = {"free_on_resume": True}


class Settings(BaseModel):
    """Base of all sections: unknown keys are errors, values never change after reading, no silent conversion."""

    free_on_resume: ClassVar[bool] = False  # the whole section, as `FREE_ON_RESUME` for a setting

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
