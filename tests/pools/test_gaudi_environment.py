"""The releases that Gaudi's libraries pin, on a processor: what is encoded here is denoised and decoded there."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from plans import PLANS

from deployments.messages import Call, Hop, ImageRequest, PacketReply, Route, read_reply
from stages.config import ModelConfig
from stages.packet import LatentPacket
from stages.pipeline import Pipeline, Prompted

ROOT = Path(__file__).parents[2]
PLAN = PLANS["hybrid"]
IMAGES = [
    Prompted("a red star", 1, "blue"),
    Prompted("a small furry green square left of a large blue triangle on a white background", 2),
    Prompted("a shape", 3, "red, a furry shape"),
]


@pytest.fixture(scope="module")
def packets(pipeline: Pipeline) -> list[LatentPacket]:
    """As this environment encodes them."""
    return pipeline.enter(PLAN, IMAGES)


@pytest.fixture(scope="module")
def answers(
    gaudi_python: str, packets: list[LatentPacket], config: ModelConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The directory in which `elsewhere.py` ran."""
    directory = tmp_path_factory.mktemp("calls")
    save_as_transformers_4(Path(config.source), directory / "older")
    for name, hop in {
        "encode": Hop(deployment="Gaudi"),
        "denoise": Hop(deployment="Gaudi", end=len(PLAN.stages)),
    }.items():
        (directory / name).mkdir()
        for number, packet in enumerate(packets):
            (directory / name / f"{number}.json").write_text(Call(route=route(number), hop=hop).to_json())
            if hop.end:
                (directory / name / f"{number}.packet").write_bytes(packet.to_bytes())
    run(gaudi_python, "tests/pools/elsewhere.py", "configs/scenes.yaml", str(directory))
    return directory


def run(*command: str) -> None:
    """Run a command from the repository."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr


def route(number: int) -> Route:
    image = IMAGES[number]
    request = ImageRequest(
        request_id="r",
        image_index=number,
        seed=image.seed,
        size="128x128",
        prompt=image.prompt,
        negative_prompt=PLAN.negative_prompt(image.negative_prompt, " "),
    )
    return Route(image=request, plan=PLAN, preset=None, format="png", quality=90, partial_images=0, deadline=2.0**40)


def save_as_transformers_4(source: Path, copy: Path) -> None:
    """Copy a pipeline, with the configs of text encoder and tokenizer as release 4 of transformers wrote them."""
    for file in source.rglob("*.*"):
        (copy / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        (copy / file.relative_to(source)).symlink_to(file)
    encoder = json.loads((source / "text_encoder" / "config.json").read_text())
    text = encoder["text_config"]
    rotary = text.pop("rope_parameters")
    text["rope_theta"] = rotary["rope_theta"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rotary["mrope_section"]}
    text["tie_word_embeddings"] = encoder["tie_word_embeddings"]
    encoder["transformers_version"] = "4.53.0"
    tokenizer = json.loads((source / "tokenizer" / "tokenizer_config.json").read_text())
    tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    for name, content in {"text_encoder/config.json": encoder, "tokenizer/tokenizer_config.json": tokenizer}.items():
        (copy / name).unlink()
        (copy / name).write_text(json.dumps(content))


def test_all_nodes_run_the_same_ray() -> None:
    locks = [ROOT / "requirements.lock", ROOT / "cluster" / "environments" / "gaudi.lock"]
    (version,) = {line for lock in locks for line in lock.read_text().splitlines() if line.startswith("ray==")}
    assert version


def test_every_node_can_build_the_application(gaudi_python: str) -> None:
    run(gaudi_python, "-c", "import deployments.app")


@pytest.mark.parametrize("there", ["cpu", "gaudi"])
def test_images_are_denoised_and_decoded_there(
    answers: Path, packets: list[LatentPacket], pipeline: Pipeline, there: str
) -> None:
    truths = packets
    for _ in PLAN.stages:
        truths = pipeline.denoise(truths, PLAN)
    images = pipeline.decoder.decode(torch.stack([truth.latent for truth in truths]), truths[0].grid)
    for number, (truth, image) in enumerate(zip(truths, images, strict=True)):
        answer = answers / there / str(number)
        assert read_reply(answer.with_suffix(".json").read_text()) == PacketReply()
        packet = LatentPacket.from_bytes(answer.with_suffix(".packet").read_bytes())
        assert (packet.position, packet.sigma, packet.seed) == (truth.position, truth.sigma, truth.seed)
        torch.testing.assert_close(packet.latent, truth.latent, rtol=0, atol=2e-5)
        with Image.open(answer.with_suffix(".png")) as decoded:
            assert np.abs(np.asarray(decoded, int) - np.asarray(image, int)).max() <= 1


def test_what_its_own_major_release_saved_is_encoded_with_there(answers: Path, packets: list[LatentPacket]) -> None:
    for number, truth in enumerate(packets):
        packet = LatentPacket.from_bytes((answers / "encoded" / f"{number}.packet").read_bytes())
        assert torch.equal(packet.latent, truth.latent)
        for ours, theirs in (
            (truth.prompt_embeds, packet.prompt_embeds),
            (truth.negative_embeds, packet.negative_embeds),
        ):
            torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)


def test_what_a_later_major_release_saved_is_not(answers: Path) -> None:
    message = (answers / "refused.txt").read_text()
    assert f"text_encoder cannot be loaded: transformers {transformers.__version__} saved it" in message
