"""Base of all settings. Data sets define their own settings, so this base is below `config.py`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from base.reading import MAX_INTEGER

Seed = Annotated[int, Field(ge=0, lt=2**32)]

# `json_schema_extra` of a setting that may differ when a run is resumed: it changes what is recorded or how work is
# divided, not what is learned.
FREE_ON_RESUME: dict[str, Any] = {"free_on_resume": True}


class Settings(BaseModel):
    """Base of all sections: unknown keys are errors, values are frozen and never converted silently."""

    free_on_resume: ClassVar[bool] = False  # `FREE_ON_RESUME` for all settings of the section

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _integers_fit_64_bits(cls, value: Any) -> Any:
        parts = [value]
        while parts:
            part = parts.pop()
            if isinstance(part, tuple):
                parts += part
            elif isinstance(part, int) and part >= MAX_INTEGER:
                raise ValueError("must be less than 2^63")
        return value

    def is_default(self, key: str) -> bool:
        """Whether a setting has its default value, given or not."""
        return bool(getattr(self, key) == type(self).model_fields[key].default)
