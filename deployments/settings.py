"""What `serve_config.yaml` passes to the application; a wrong key or value fails at start and is named."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from backends import Quantization, get_backend
from stages.model import ModelConfig
from stages.plan import STAGES, StageName, presets


def _known_backend(name: str) -> str:
    get_backend(name)
    return name


BackendName = Annotated[str, AfterValidator(_known_backend)]


class Transformer(BaseModel):
    """A deployment of the transformer.

    Attributes:
        stages: that it runs. Several share one set of weights, with a LoRA of each image's own.
        fuse: adapter to fuse into the weights, which makes it cost nothing more; for a deployment of one stage.
        backend: what its replicas run on.
        compile: whether to compile the transformer's blocks before the replica reports ready.
        max_batch_tokens: most image tokens in one forward pass; a guided image counts twice.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stages: Annotated[tuple[StageName, ...], Field(min_length=1)]
    fuse: str | None = None
    backend: BackendName = "cpu"
    compile: bool = False
    max_batch_tokens: Annotated[int, Field(ge=1)] = 16384


class Settings(BaseModel):
    """Arguments of the application.

    Attributes:
        model: path of the model's config, from the working directory or from the project's root.
        default_plan: preset for requests that name none.
        encoder, decoder: backends of the text encoder and of the autoencoder.
        transformers: deployments that share the stages out, by name.
        max_images: largest `n` of a request.
        request_timeout_s: longest time that a request may take, queues included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path
    default_plan: str = "hybrid"
    encoder: BackendName = "cpu"
    decoder: BackendName = "cpu"
    transformers: dict[str, Transformer] = {stage.capitalize(): Transformer(stages=(stage,)) for stage in STAGES}
    max_images: Annotated[int, Field(ge=1, le=64)] = 10
    request_timeout_s: Annotated[float, Field(gt=0.0)] = 120.0

    @model_validator(mode="after")
    def _runnable(self) -> Settings:
        if self.default_plan not in presets():
            raise ValueError(f"default_plan must be one of {sorted(presets())}, not {self.default_plan!r}")
        model = self.read_model()
        adapters = model.adapters
        presets()[self.default_plan].with_adapters(adapters)
        shared_out = sorted(stage for transformer in self.transformers.values() for stage in transformer.stages)
        if shared_out != sorted(STAGES):
            raise ValueError(f"transformers must run each of {', '.join(STAGES)} once, not {', '.join(shared_out)}")
        for name, transformer in self.transformers.items():
            if transformer.fuse not in (None, *adapters):
                raise ValueError(
                    f"transformers.{name}.fuse must be one of {sorted(adapters)}, not {transformer.fuse!r}"
                )
        self._check_quantization("text_encoder", model.quantize.text_encoder, self.encoder)
        for transformer in self.transformers.values():
            self._check_quantization("transformer", model.quantize.transformer, transformer.backend)
        return self

    def _check_quantization(self, part: str, scheme: Quantization | None, backend: str) -> None:
        if scheme is None:
            return
        try:
            get_backend(backend).check_quantization(scheme)
        except ValueError as error:
            raise ValueError(f"quantize.{part} of {self.model} {error}") from error

    def read_model(self) -> ModelConfig:
        """The model's config; raises FileNotFoundError or pydantic's ValidationError."""
        return ModelConfig.read(self.model)
