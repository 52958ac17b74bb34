"""End-to-end text-to-image with each adapter fused into weights of its own, as separate deployments have them."""

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
    """A pipeline with one more copy of the transformer for each adapter, which is fused into its weights.

    An adapted step then costs no more than a step of the base model. `Pipeline` holds all adapters beside one set of
    weights.
    """

    def __init__(self, config: ModelConfig, backend: Backend, remembered: int = REMEMBERED) -> None:
        super().__init__(config, backend, remembered)
        self._fused = {adapter: Denoiser.load(config, backend, adapter) for adapter in config.adapters}

    def denoise(self, packets: Sequence[LatentPacket], plan: Plan) -> list[LatentPacket]:
        adapter = plan.stages[packets[0].position].adapter
        return self._fused.get(adapter or "", self.denoiser).denoise(packets, plan)
