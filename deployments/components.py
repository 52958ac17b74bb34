"""The components of a model that a replica's stages need, and how an image passes through them."""

from __future__ import annotations

from backends import get_backend
from backends.directories import make_writable
from deployments.gauging import WorkGauge
from deployments.messages import Call, PacketReply, Start, Wire
from deployments.settings import DECODE, ENCODE
from deployments.workers import DecodeWorker, DenoiseWorker, EncodeWorker, HandOut
from stages.packet import LatentPacket
from stages.pulse import Pulse


class Components:
    """What a replica's stages need, on one device.

    Attributes:
        encoder, transformer, decoder: the components; None for one that is not needed.
    """

    def __init__(self, start: Start) -> None:
        """Load the components."""
        model, placement = start.model, start.placement
        backend = get_backend(placement.backend)
        if placement.compilation_cache:
            make_writable(placement.compilation_cache)
            backend.keep_compilations(placement.compilation_cache)
        self._gauge = WorkGauge()
        self.encoder = EncodeWorker(model, backend) if ENCODE in placement.stages else None
        self.transformer = (
            DenoiseWorker(model, backend, placement, self._gauge.note_step) if placement.denoises else None
        )
        self.decoder = DecodeWorker(model, backend) if DECODE in placement.stages else None

    @property
    def pulses(self) -> dict[str, Pulse]:
        """The pulse of each component that is here."""
        workers = {"encoder": self.encoder, "transformer": self.transformer, "decoder": self.decoder}
        return {component: worker.pulse for component, worker in workers.items() if worker}

    def tell(self) -> None:
        """Tell the metrics of the work since the last time."""
        denoising = self.transformer.census() if self.transformer else {}
        self._gauge.tell(self.pulses, denoising, self.transformer.adapters if self.transformer else ())

    def check_health(self) -> None:
        """Raise RuntimeError if the thread that uses the device has died."""
        if self.transformer:
            self.transformer.check_health()

    async def run(self, call: Call, packet: bytes, hand_out: HandOut) -> Wire:
        """Run a hop of an image.

        Args:
            call: the call.
            packet: the packet after the previous hop; empty for the first hop, which encodes the prompt.
            hand_out: see `DenoiseWorker.denoise`.

        Returns:
            A reply's JSON, and the packet or, if the hop decodes, the image's file.

        Raises:
            stages.errors.PromptTooLong, stages.errors.NotFinite, stages.wire.OtherVersion: of this image.
        """
        size = call.route.image.size
        if packet:
            current = LatentPacket.from_bytes(packet)
        else:
            assert self.encoder, "no encoder here"
            with self._gauge.staying(ENCODE, size):
                current = await self.encoder.encode(call.route.image, call.route.plan.stages[0].scale)
        if current.position < call.hop.end:
            assert self.transformer, "no transformer here"
            current = await self.transformer.denoise(current, call, hand_out)
        if call.hop.decodes:
            assert self.decoder, "no decoder here"
            with self._gauge.staying(DECODE, size):
                reply, data = await self.decoder.decode(current, size, call.route.format, call.route.quality)
            return reply.to_json(), data
        return PacketReply().to_json(), current.to_bytes()
