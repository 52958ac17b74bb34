"""What crosses a stage boundary survives it, or is refused."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import fields, replace

import pytest
import torch

from stages.packet import VERSION, LatentPacket, PacketError
from stages.spans import Span
from stages.wire import OtherVersion, Version


def make_packet(dtype: torch.dtype = torch.float32, *, negative: bool = True) -> LatentPacket:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return LatentPacket(
        model="scenes",
        request_id="req-é",
        image_index=3,
        seed=2**63 - 1,
        grid=(2, 3),
        sigma=0.9,
        position=1,
        step=2,
        text_tokens=5,
        avoids=negative,
        spans=(Span("encode", 1764000000.125, 1764000000.25), Span("base", 1764000001.0, 1764000002.5, nfe=3.5)),
        latent=draw(6, 8),
        prompt_embeds=draw(5, 4),
        negative_embeds=draw(2, 4) if negative else None,
    )


def assert_same(actual: LatentPacket, expected: LatentPacket) -> None:
    for field in fields(LatentPacket):
        left, right = getattr(actual, field.name), getattr(expected, field.name)
        if isinstance(right, torch.Tensor):
            torch.testing.assert_close(left, right, atol=0, rtol=0)  # also compares shapes and dtypes
        else:
            assert left == right, field.name
            assert type(left) is type(right), field.name


def with_checksum(body: bytes, *, magic: bytes = b"LTNT", version: Version = VERSION) -> bytes:
    return struct.pack("<4sBBI", magic, *version, zlib.crc32(bytes(version) + body)) + body


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("negative", [True, False])
def test_round_trip(dtype: torch.dtype, negative: bool) -> None:
    packet = make_packet(dtype, negative=negative)
    assert_same(LatentPacket.from_bytes(packet.to_bytes()), packet)


def test_round_trip_of_tensors_that_are_views_of_others() -> None:
    packet = make_packet()
    packet = replace(packet, latent=torch.randn(8, 6).T, prompt_embeds=torch.randn(4, 6, 8)[2])
    assert_same(LatentPacket.from_bytes(packet.to_bytes()), packet)


def test_round_trip_of_tensors_that_share_their_memory() -> None:
    """As the two embeddings do when the negative prompt is the prompt."""
    packet = make_packet()
    packet = replace(packet, negative_embeds=packet.prompt_embeds, latent=packet.prompt_embeds)
    assert_same(LatentPacket.from_bytes(packet.to_bytes()), packet)


def test_a_tensor_without_elements_comes_back() -> None:
    packet = replace(make_packet(), prompt_embeds=torch.zeros(0, 4))
    assert_same(LatentPacket.from_bytes(packet.to_bytes()), packet)


def test_what_was_read_is_not_tied_to_the_bytes() -> None:
    data = bytearray(make_packet().to_bytes())
    packet = LatentPacket.from_bytes(bytes(data))
    packet.latent.zero_()
    assert_same(LatentPacket.from_bytes(bytes(data)), make_packet())


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_every_damaged_byte_is_detected(flip: int) -> None:
    data = make_packet().to_bytes()
    undetected = []
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= flip
        try:
            LatentPacket.from_bytes(bytes(damaged))
        except (PacketError, OtherVersion):
            continue
        undetected.append(position)
    assert len(data) > 500
    assert undetected == []


def test_every_truncation_and_any_surplus_is_detected() -> None:
    data = make_packet().to_bytes()
    for length in range(len(data)):
        with pytest.raises(PacketError):
            LatentPacket.from_bytes(data[:length])
    with pytest.raises(PacketError, match="damaged"):
        LatentPacket.from_bytes(data + b"\0")


@pytest.mark.parametrize("data", [b"", b"L", b"LTNT", b"GIF89a" + bytes(100), b"LTN\0" + bytes(100)])
def test_what_is_no_packet_is_refused(data: bytes) -> None:
    with pytest.raises(PacketError, match="not a latent packet"):
        LatentPacket.from_bytes(data)


NEWER = Version(VERSION.major, VERSION.minor + 1)


@pytest.mark.parametrize("major", [0, VERSION.major + 1, 255])
def test_another_major_version_is_refused_by_both_numbers(major: int) -> None:
    with pytest.raises(
        OtherVersion, match=rf"^a latent packet of version {major}\.7, where version {VERSION} is read$"
    ):
        LatentPacket.from_bytes(with_checksum(b"anything", version=Version(major, 7)))


def test_another_minor_version_is_read_unless_it_uses_a_field_of_its_own() -> None:
    assert_same(LatentPacket.from_bytes(with_checksum(make_packet().to_bytes()[10:], version=NEWER)), make_packet())
    with pytest.raises(OtherVersion, match=rf"of version {NEWER}, where version {VERSION} is read \(.*'priority'\)"):
        LatentPacket.from_bytes(with_checksum(rewritten({"priority": 1})[10:], version=NEWER))


def test_layout_is_as_documented() -> None:
    data = make_packet().to_bytes()
    assert with_checksum(data[10:]) == data
    (length,) = struct.unpack_from("<I", data, 10)
    header = json.loads(data[14 : 14 + length])
    assert (header["request_id"], header["seed"], header["grid"]) == ("req-é", 2**63 - 1, [2, 3])


def rewritten(changes: dict[str, object], without: tuple[str, ...] = ()) -> bytes:
    """A packet with an altered header and a checksum that matches it."""
    data = make_packet().to_bytes()
    (length,) = struct.unpack_from("<I", data, 10)
    header = {**json.loads(data[14 : 14 + length]), **changes}
    text = json.dumps({key: value for key, value in header.items() if key not in without}).encode()
    return with_checksum(struct.pack("<I", len(text)) + text + data[14 + length :])


UNREADABLE = {
    "nothing after the checksum": with_checksum(b""),
    "half a length": with_checksum(b"\0\0"),
    "no header": with_checksum(struct.pack("<I", 0)),
    "header that is no JSON": with_checksum(struct.pack("<I", 4) + b"\xff\xfe{}"),
    "header that is no object": with_checksum(struct.pack("<I", 2) + b"[]"),
    "header longer than the packet": with_checksum(struct.pack("<I", 2**31) + b"{}"),
    "unknown field": rewritten({"priority": 1}),
    "missing field": rewritten({}, without=("seed",)),
    "no tensors": rewritten({}, without=("tensors",)),
    "a tensor of another dtype": rewritten({"tensors": {"latent": ["float64", 6, 8]}}),
    "a tensor longer than the packet": rewritten({"tensors": {"latent": ["float32", 2**20, 8]}}),
    "a tensor of a negative size": rewritten({"tensors": {"latent": ["float32", -1, 8]}}),
    "bytes after the tensors": rewritten({"tensors": {"latent": ["float32", 6, 8]}}),
    "span with another field": rewritten({"spans": [{"stage": "base", "start": 0, "finish": 1}]}),
}


@pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE)
def test_another_layout_under_a_valid_checksum_is_refused(data: bytes) -> None:
    with pytest.raises(PacketError, match="another layout"):
        LatentPacket.from_bytes(data)


def test_the_altered_headers_are_refused_for_what_was_altered() -> None:
    assert_same(LatentPacket.from_bytes(rewritten({})), make_packet())
