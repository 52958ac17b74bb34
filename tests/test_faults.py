"""The benchmarks of faults, each in a short form: a real server is disturbed, overloaded, used, changed and fuzzed."""

from __future__ import annotations

import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench.faults.answers import Answer, Figures, different
from bench.serving.servers import ROOT

KINDS = ("kill Base", "kill Ingress", "kill a node", "kill the controller", "stop Distilled")


def bench(name: str, output: Path, *arguments: object) -> dict[str, Any]:
    """Run a benchmark, which must end well, and return its results."""
    command = [sys.executable, "-m", "bench", name, *map(str, arguments), "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    content: dict[str, Any] = json.loads((output / f"{name}.json").read_text())
    return content


@pytest.mark.ray
@pytest.mark.slow
def test_no_request_is_lost_to_faults(tmp_path: Path) -> None:
    content = bench("chaos", tmp_path, "--requests", 24, "--rate", 0.5, "--faults", 5, "--kinds", *KINDS)
    assert sorted(each["name"] for each in content["faults"]) == sorted(KINDS)
    assert content["disturbed"]["answers"] == content["undisturbed"]["answers"] == {"200": 24}


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.slow
def test_too_much_load_is_refused_and_the_rest_is_in_time(tmp_path: Path) -> None:
    """Bars of time are for quiet cores; here everything must be answered, and what is admitted in time."""
    command = [sys.executable, "-m", "bench", "overload", "--seconds", "12", "--saturation-seconds", "8"]
    subprocess.run([*command, "--output", str(tmp_path)], cwd=ROOT, capture_output=True, timeout=900)
    content = json.loads((tmp_path / "overload.json").read_text())
    assert content["late"] == 0
    assert content["answers"].keys() == {"200", "503 overloaded"}


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.slow
def test_nothing_is_left_of_requests(tmp_path: Path) -> None:
    """Slopes are for longer times."""
    command = [sys.executable, "-m", "bench", "soak", "--minutes", "0.7", "--output", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=900)
    content = json.loads((tmp_path / "soak.json").read_text())
    assert (content["failed"], content["left"]) == (0, {})
    assert content["outcomes"].keys() == {"image", "stream", "gone", "error"}
    assert len(content["processes"]) > 8


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.slow
def test_no_request_is_lost_to_an_update(tmp_path: Path) -> None:
    content = bench("rollout", tmp_path, "--rate", 0.4, "--still", 3, "--changes", "an update of all")
    assert content["changed"]["answers"].keys() == {"200"}


@pytest.mark.ray
@pytest.mark.slow
def test_nonsense_is_answered(tmp_path: Path) -> None:
    content = bench("fuzz", tmp_path, "--cases", 400)
    assert sum(content["plans"]["answers"].values()) >= 60
    assert {"200", "400"} <= content["plans"]["answers"].keys() & content["jobs"]["answers"].keys()
    assert {"200", "400", "404"} <= content["api"]["answers"].keys()
    assert content["packets"]["answers"]["PacketError"] > 40


def test_a_gap_is_a_time_in_which_requests_wait_for_an_image() -> None:
    def answer(number: int, sent: float, end: float, status: int = 200) -> Answer:
        return Answer(number, sent, end, status)

    waits = Figures.of([answer(0, 0.0, 1.0), answer(1, 2.0, 3.0), answer(2, 2.5, 7.0), answer(3, 3.0, 4.0, 503)])
    assert (waits.gap, waits.longest, waits.answers) == (4.0, 4.5, {"200": 3, "503": 1})
    idle = Figures.of([answer(0, 0.0, 1.0), answer(1, 100.0, 101.5)])
    assert idle.gap == 1.5
    with pytest.raises(ValueError, match="no image"):
        Figures.of([answer(0, 0.0, 1.0, 503)])


def test_images_are_the_same_within_rounding() -> None:
    def file(gray: int) -> bytes:
        buffer = BytesIO()
        Image.new("L", (4, 4), gray).save(buffer, "png")
        return buffer.getvalue()

    expected = [Answer(number, 0.0, 1.0, 200, image=file(100)) for number in range(3)]
    made = [Answer(number, 0.0, 1.0, 200, image=file(gray)) for number, gray in enumerate((103, 104, 100))]
    assert different([*made, Answer(3, 0.0, 1.0, 503)], expected) == [1]
