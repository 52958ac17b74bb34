"""What `serve_config.yaml` passes to the application; a wrong key or value fails at start and is named."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from backends import get_backend
from stages.model import ModelConfig
from stages.plan import presets


class Backends(BaseModel):
    """Backend of each deployment that has a device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: str = "cpu"
    base: str = "cpu"
    bridge: str = "cpu"
    distilled: str = "cpu"
    decoder: str = "cpu"

    @field_validator("*")
    @classmethod
    def _known(cls, value: str) -> str:
        get_backend(value)
        return value


class Settings(BaseModel):
    """Arguments of the application.

    Attributes:
        model: path of the model's config, from the working directory or from the project's root.
        default_plan: preset for requests that name none.
        backends: by deployment.
        max_images: largest `n` of a request.
        request_timeout_s: longest time that a request may take, queues included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path
    default_plan: str = "hybrid"
    backends: Backends = Backends()
    max_images: Annotated[int, Field(ge=1, le=64)] = 10
    request_timeout_s: Annotated[float, Field(gt=0.0)] = 120.0

    @model_validator(mode="after")
    def _runnable(self) -> Settings:
        if self.default_plan not in presets():
            raise ValueError(f"default_plan must be one of {sorted(presets())}, not {self.default_plan!r}")
        presets()[self.default_plan].with_adapters(self.read_model().adapters)
        return self

    def read_model(self) -> ModelConfig:
        """The model's config; raises FileNotFoundError or pydantic's ValidationError."""
        return ModelConfig.read(self.model)
