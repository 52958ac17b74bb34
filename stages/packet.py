"""The format of an image between two stages, or two steps: a versioned header and raw tensors, as bytes.

Pools run different versions of torch and diffusers, so none of their objects are pickled. Layout, little-endian:
magic (4 bytes), version (two u8, see `stages.wire`), CRC-32 of the version and all that follows (u32), length of the
header (u32), the header as JSON, then the tensors, one after the other.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stages.spans import Span
from stages.wire import OtherVersion, Version, to_plain, used_fields

VERSION = Version(6, 0)
_MAGIC = b"LTNT"
_PREFIX = struct.Struct("<4sBBI")
_LENGTH = struct.Struct("<I")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
        prompt_embeds: (length, width), without padding; of length 0 where no later stage needs it.
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
        """Serialise; each tensor is copied once, and twice from a device."""
        parts = used_fields(self)
        tensors = {name: part.cpu().contiguous() for name, part in parts.items() if isinstance(part, torch.Tensor)}
        content = {
            **{name: to_plain(part) for name, part in parts.items() if name not in tensors},
            "tensors": {
                name: [str(tensor.dtype).removeprefix("torch."), *tensor.shape] for name, tensor in tensors.items()
            },
        }
        header = json.dumps(content).encode()
        body: list[bytes | memoryview] = [_LENGTH.pack(len(header)), header, *map(_memory, tensors.values())]
        return b"".join([_PREFIX.pack(_MAGIC, *VERSION, _checksum(VERSION, *body)), *body])

    @classmethod
    def from_bytes(cls, data: bytes) -> LatentPacket:
        """Inverse of `to_bytes`, which copies each tensor once.

        Raises:
            OtherVersion: another version wrote it.
            PacketError: it is anything else.
        """
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
            tensors = _read_tensors(header.pop("tensors"), body[_LENGTH.size + length :])
            header["grid"] = tuple(header["grid"])
            header["spans"] = tuple(Span(**span) for span in header["spans"])
            fields: dict[str, Any] = {**header, **tensors}
            return cls(**fields)
        except (struct.error, ValueError, TypeError, KeyError, AttributeError) as error:
            if version != VERSION:
                raise OtherVersion("latent packet", version, VERSION, str(error)) from error
            raise PacketError(f"latent packet has another layout than version {VERSION}: {error}") from error


def _read_tensors(forms: Mapping[str, Sequence[Any]], data: memoryview) -> dict[str, torch.Tensor]:
    """Copy tensors out of `data`, where they lie one after the other, in memory of their own.

    Args:
        forms: dtype and shape of each by its name.
        data: the tensors, and nothing else.

    Raises:
        ValueError: a dtype, a shape or the length of `data` is wrong.
    """
    tensors = {}
    for name, (dtype, *shape) in forms.items():
        if dtype not in _DTYPES:
            raise ValueError(f"{name} is of {dtype!r}, not of {' or '.join(_DTYPES)}")
        if min(shape, default=0) < 0 or math.prod(shape) * _DTYPES[dtype].itemsize > len(data):
            raise ValueError(f"{name} of {shape} numbers is not within the packet")
        tensor = torch.empty(shape, dtype=_DTYPES[dtype])
        _memory(tensor)[:] = data[: tensor.nbytes]
        tensors[name], data = tensor, data[tensor.nbytes :]
    if data:
        raise ValueError(f"{len(data)} bytes are left after its tensors")
    return tensors


def _memory(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor of the host."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _checksum(version: Version, *parts: bytes | memoryview) -> int:
    checksum = zlib.crc32(bytes(version))
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return checksum
