"""The way from prompt to image with the adapters as spread deployments hold them."""

from __future__ import annotations

from collections.abc import Sequence

from backends import Backend
from stages.config import ModelConfig
from stages.encode import REMEMBERED
from stages.packet import LatentPacket
from stages.pipeline import Pipeline
from stages.plan import Plan
from stages.stage import Denoiser


class SpreadPipeline(Pipeline):
    """Each adapter is fused into a copy of the weights of its own, so that its rows cost nothing more."""

    def __init__(self, config: ModelConfig, backend: Backend, remembered: int = REMEMBERED) -> None:
        super().__init__(config, backend, remembered)
        self._fused = {adapter: Denoiser.load(config, backend, adapter) for adapter in config.adapters}

    def denoise(self, packets: Sequence[LatentPacket], plan: Plan) -> list[LatentPacket]:
        adapter = plan.stages[packets[0].position].adapter
        return self._fused.get(adapter or "", self.denoiser).denoise(packets, plan)
