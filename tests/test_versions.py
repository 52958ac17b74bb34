"""Deployments of two versions of the project: they understand each other, or say which versions do not."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from another_version import write
from PIL import Image
from test_messages import CALL
from test_packet import assert_same, make_packet

from bench.serving.servers import ROOT, SPREAD, Server, servers, started
from deployments.messages import VERSION, Call, PacketReply, read_reply
from stages import packet
from stages.packet import LatentPacket
from stages.pipeline import Pipeline
from stages.wire import OtherVersion, Version

PACKAGES = ("backends", "cluster", "deployments", "stages")


NEXT_MINOR, NEXT_MAJOR = "minor", "major"


def after(version: Version, step: str) -> Version:
    return Version(version.major, version.minor + 1) if step == NEXT_MINOR else Version(version.major + 1, 0)


def copy_project(directory: Path, step: str) -> Path:
    """Copy the project as its next version; the next minor one has a field `hue` more in calls, replies and packets."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    messages, packets = directory / "deployments" / "messages.py", directory / "stages" / "packet.py"
    for path, version in ((messages, VERSION), (packets, packet.VERSION)):
        edit(path, r"^VERSION = Version\(.*\)$", f"VERSION = Version{tuple(after(version, step))}")
    if step == NEXT_MINOR:
        edit(messages, r"^    decodes: bool = False$", r"\g<0>\n    hue: float = 0.0")
        edit(messages, r'^    kind: Literal\["packet"\] = "packet"$', r"\g<0>\n    hue: float = 0.0")
        edit(packets, r"^    negative_embeds: torch\.Tensor \| None = None$", r"\g<0>\n    hue: float = 0.0")
    return directory


def edit(path: Path, pattern: str, replacement: str) -> None:
    """Change the one line of a file that matches."""
    text, count = re.subn(pattern, replacement, path.read_text(), flags=re.MULTILINE)
    assert count == 1, f"{path}: {pattern}"
    path.write_text(text)


def exchange(tmp_path: Path, step: str, fields: dict[str, Any]) -> Path:
    """Exchange what travels between deployments with a process of the next version; return the directory of all."""
    other, directory = copy_project(tmp_path / "other", step), tmp_path / "wire"
    directory.mkdir()
    write(directory, "ours", CALL, PacketReply(), make_packet())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(other), str(ROOT / "tests")))}
    command = [sys.executable, "-P", str(ROOT / "tests" / "another_version.py"), str(directory), json.dumps(fields)]
    ended = subprocess.run(command, cwd=other, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    return directory


def readers(directory: Path, name: str) -> list[Callable[[], object]]:
    return [
        lambda: Call.from_json((directory / f"{name}.call").read_text()),
        lambda: read_reply((directory / f"{name}.reply").read_text()),
        lambda: LatentPacket.from_bytes((directory / f"{name}.packet").read_bytes()),
    ]


def refusals(directory: Path, name: str) -> list[str]:
    """Why this version does not read what the other one sent under a name."""
    refused = []
    for read in readers(directory, name):
        with pytest.raises(OtherVersion) as error:
            read()
        refused.append(str(error.value))
    return refused


def test_the_next_minor_version_is_understood_unless_it_uses_what_it_added(tmp_path: Path) -> None:
    directory = exchange(tmp_path, NEXT_MINOR, {"hue": 0.5})
    for name in ("plain", "again"):  # what it sent of its own, and what it had read from here
        call, reply, latent = (read() for read in readers(directory, name))
        assert isinstance(call, Call)
        assert isinstance(reply, PacketReply)
        assert (call.route, call.hop) == (CALL.route, CALL.hop)
        assert isinstance(latent, LatentPacket)
        assert_same(latent, make_packet())
    assert (directory / "refused.txt").read_text() == ""
    theirs = after(VERSION, NEXT_MINOR)
    assert refusals(directory, "used") == [
        f"a message of version {theirs}, where version {VERSION} is read (hop.hue: Extra inputs are not permitted)",
        f"a message of version {theirs}, where version {VERSION} is read (packet.hue: Extra inputs are not permitted)",
        f"a latent packet of version {after(packet.VERSION, NEXT_MINOR)}, where version {packet.VERSION} is read "
        "(LatentPacket.__init__() got an unexpected keyword argument 'hue')",
    ]


def test_another_major_version_is_refused_by_both_sides(tmp_path: Path) -> None:
    directory = exchange(tmp_path, NEXT_MAJOR, {})
    here, there = (VERSION, packet.VERSION), (after(VERSION, NEXT_MAJOR), after(packet.VERSION, NEXT_MAJOR))

    def sentences(theirs: tuple[Version, Version], ours: tuple[Version, Version]) -> list[str]:
        message = f"a message of version {theirs[0]}, where version {ours[0]} is read"
        return [message, message, f"a latent packet of version {theirs[1]}, where version {ours[1]} is read"]

    assert refusals(directory, "plain") == sentences(there, here)
    assert (directory / "refused.txt").read_text().splitlines() == sentences(here, there)


def with_distilled_of(directory: Path, step: str) -> Server:
    """The shipped server, on which the next version of the project runs the deployment Distilled."""
    other = copy_project(directory / "other", step)
    # Ray puts the driver's directories before all others, so the packages are there before it does.
    (other / "sitecustomize.py").write_text(f"import {', '.join(PACKAGES)}\n")
    python = directory / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{other}:$PYTHONPATH" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    pool = {"backend": "cpu", "resources": {"CPU": 0.3}, "replicas": 5}
    pools = {"cpu": pool, "other": {**pool, "environment": {"py_executable": str(python)}}}
    (directory / "pools.yaml").write_text(yaml.safe_dump(pools))
    (server,) = [server for server in servers(ROOT / "configs" / "scenes.yaml") if server.name == SPREAD]
    assert server.config
    (application,) = server.config["applications"]
    application["args"]["pools"] = str(directory / "pools.yaml")
    application["args"]["placement"]["Distilled"]["pool"] = "other"
    for deployment in application["deployments"]:
        if deployment["name"] != "Ingress":
            deployment.pop("ray_actor_options", None)
    return server


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.slow
def test_a_deployment_of_the_next_minor_version_serves(tmp_path: Path, pipeline: Pipeline) -> None:
    server = with_distilled_of(tmp_path, NEXT_MINOR)
    edit(tmp_path / "other" / "deployments" / "replica.py", r"^        console\.attach\(\)$", TRACE.format(tmp_path))
    with started(server, ROOT / "configs" / "scenes.yaml") as running:
        body = {"prompt": "a striped heart", "seed": 3}
        answer = httpx.post(f"{running.url}/v1/images/generations", json=body, timeout=120).raise_for_status().json()
    (truth,) = pipeline.run("hybrid", "a striped heart", seeds=(3,), size="128x128")
    served = np.asarray(Image.open(BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))), int)
    assert np.abs(served - np.asarray(truth.image, int)).max() <= 3
    assert (tmp_path / "trace").read_text() == str(after(VERSION, NEXT_MINOR))


TRACE = r"""\g<0>
        from pathlib import Path
        from deployments.messages import VERSION
        Path("{}/trace").write_text(str(VERSION))"""


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.slow
def test_a_deployment_of_another_major_version_stops_the_start_in_a_sentence(tmp_path: Path) -> None:
    server = with_distilled_of(tmp_path, NEXT_MAJOR)
    sentence = f"a message of version {VERSION}, where version {after(VERSION, NEXT_MAJOR)} is read"
    with (
        pytest.raises(RuntimeError, match=rf"cannot start: Distilled: \S*OtherVersion: {re.escape(sentence)}\n"),
        started(server, ROOT / "configs" / "scenes.yaml"),
    ):
        pass
