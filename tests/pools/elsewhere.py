"""What a pool in another environment does with calls: `python tests/pools/elsewhere.py MODEL_CONFIG DIRECTORY`.

`encode` and `denoise` in the directory hold calls, as `N.json`, and the packets beside them, as `N.packet`. Replies go
to `encoded`, where `older` holds the model that is encoded with, and to a directory of each backend's name, where what
was denoised is decoded to `N.png`. `refused.txt` says why the model itself is not encoded with.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import torch
from habana_stand_in import gaudi_on_cpu

from backends import get_backend
from deployments.messages import Start
from deployments.replica import StageReplica
from deployments.settings import Placement
from stages.config import ModelConfig
from stages.decode import Decoder, to_file
from stages.errors import NotFinite
from stages.packet import LatentPacket
from stages.yaml_file import ConfigError

STALL_S = 600.0  # busy processors take long


def start(model: ModelConfig, placement: Placement) -> StageReplica:
    return StageReplica(Start(model=model, placement=placement, stall_timeout_s=STALL_S).to_json())


async def answer(replica: StageReplica, calls: Path, replies: Path) -> None:
    """Make all calls of a directory at once."""
    replies.mkdir()

    async def run(call: Path) -> None:
        packet = call.with_suffix(".packet")
        reply, data = await replica.run(call.read_text(), packet.read_bytes() if packet.exists() else b"")
        (replies / call.name).write_text(reply)
        (replies / packet.name).write_bytes(data)

    await asyncio.gather(*map(run, calls.glob("*.json")))


def decode(model: ModelConfig, backend: str, replies: Path) -> None:
    """Decode the packets of a directory."""
    decoder = Decoder(model, get_backend(backend))
    for path in replies.glob("*.packet"):
        packet = LatentPacket.from_bytes(path.read_bytes())
        (image,) = decoder.decode(packet.latent[None], packet.grid)
        if isinstance(image, NotFinite):
            raise image
        path.with_suffix(".png").write_bytes(to_file(image, "png"))


def main() -> None:
    """Run the program."""
    torch.set_num_threads(1)
    directory = Path(sys.argv[2])
    model = ModelConfig.read(Path(sys.argv[1]))
    model = model.model_copy(update={"sizes": model.sizes[:1], "plans_at": {}, "dtype": "float32"})
    with gaudi_on_cpu():
        for backend in ("cpu", "gaudi"):
            placement = Placement(stages=("base", "bridge", "distilled"), backend=backend, max_batch_tokens=256)
            asyncio.run(answer(start(model, placement), directory / "denoise", directory / backend))
            decode(model, backend, directory / backend)
        older = model.model_copy(update={"source": str(directory / "older")})
        encodes = Placement(stages=("encode",), backend="gaudi")
        asyncio.run(answer(start(older, encodes), directory / "encode", directory / "encoded"))
    try:
        start(model, Placement(stages=("encode",)))
    except ConfigError as error:
        (directory / "refused.txt").write_text(str(error))


if __name__ == "__main__":
    main()
