"""The format of an image between two stages, or two steps: a versioned header and raw tensors, as bytes.

Pools run different versions of torch and diffusers, so none of their objects are pickled. Layout, little-endian:
magic (4 bytes), version (two u8, see `stages.wire`), CRC-32 of the version and all that follows (u32), length of the
header (u32), the header as JSON, then a safetensors file.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from stages.spans import Span
from stages.wire import OtherVersion, Version, to_plain, used_fields

VERSION = Version(6, 0)
_MAGIC = b"LTNT"
_PREFIX = struct.Struct("<4sBBI")
_LENGTH = struct.Struct("<I")


class PacketError(ValueError):
    """Bytes that are not a packet, or that were damaged in transit."""


@dataclass(frozen=True)
class LatentPacket:
    """One image between two stages, or between two steps of a stage.

    Attributes:
        model: name of the model that generates the image.
        request_id, image_index: the request, and which of its images this is.
        seed: seed of the image's noise.
        grid: (rows, columns) of latent tokens.
        sigma: noise level of `latent`.
        position: number of the plan's stages that are done, each part counted.
        step: number of steps that are done of the stage after these.
        text_tokens: tokens of the request's prompts, for its bill.
        avoids: whether the request has a negative prompt; if not, `negative_embeds` are the empty prompt's.
        spans: work done so far, for timings and traces.
        latent: (rows * columns, channels); in the embeddings' dtype between stages, in float32 between steps.
        prompt_embeds: (length, width), without padding.
        negative_embeds: (length, width), or None where no later stage needs it.
    """

    model: str
    request_id: str
    image_index: int
    seed: int
    grid: tuple[int, int]
    sigma: float
    position: int
    step: int
    text_tokens: int
    avoids: bool
    spans: tuple[Span, ...]
    latent: torch.Tensor
    prompt_embeds: torch.Tensor
    negative_embeds: torch.Tensor | None = None

    def to_bytes(self) -> bytes:
        """Serialise; tensors are copied to the CPU."""
        parts = used_fields(self)
        # Copies, because safetensors refuses tensors that share memory, as embeddings of equal prompts do.
        tensors = {
            name: tensor.cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in parts.items()
            if isinstance(tensor, torch.Tensor)
        }
        header = json.dumps(to_plain({name: part for name, part in parts.items() if name not in tensors})).encode()
        body = _LENGTH.pack(len(header)) + header + save_tensors(tensors)
        return _PREFIX.pack(_MAGIC, *VERSION, _checksum(VERSION, body)) + body

    @classmethod
    def from_bytes(cls, data: bytes) -> LatentPacket:
        """Inverse of `to_bytes`; raises OtherVersion or, on anything else, PacketError."""
        if len(data) < _PREFIX.size or data[: len(_MAGIC)] != _MAGIC:
            raise PacketError("not a latent packet")
        _, major, minor, checksum = _PREFIX.unpack_from(data)
        version = Version(major, minor)
        if major != VERSION.major:
            raise OtherVersion("latent packet", version, VERSION)
        body = memoryview(data)[_PREFIX.size :]
        if _checksum(version, body) != checksum:
            raise PacketError("latent packet was damaged: its checksum does not match")
        try:
            (length,) = _LENGTH.unpack_from(body)
            header = json.loads(bytes(body[_LENGTH.size : _LENGTH.size + length]))
            tensors = load_tensors(bytes(body[_LENGTH.size + length :]))
            header["grid"] = tuple(header["grid"])
            header["spans"] = tuple(Span(**span) for span in header["spans"])
            fields: dict[str, Any] = {**header, **tensors}
            return cls(**fields)
        except (struct.error, ValueError, TypeError, KeyError, SafetensorError) as error:
            if version != VERSION:
                raise OtherVersion("latent packet", version, VERSION, str(error)) from error
            raise PacketError(f"latent packet has another layout than version {VERSION}: {error}") from error


def _checksum(version: Version, body: bytes | memoryview) -> int:
    return zlib.crc32(body, zlib.crc32(bytes(version)))
