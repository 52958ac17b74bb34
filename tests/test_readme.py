"""The README's first example, as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from bench.serving.servers import Running
from scenes.oracle import holds, read

README = (Path(__file__).parent.parent / "README.md").read_text()


def block(language: str) -> str:
    (code,) = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return code


@pytest.mark.parametrize("language", ["python", "sh"])
def test_first_example_draws_and_saves_what_it_asks_for(server: Running, language: str, tmp_path: Path) -> None:
    code = block(language).replace("http://127.0.0.1:8000", server.url)
    interpreter = [sys.executable, "-c"] if language == "python" else ["bash", "-e", "-o", "pipefail", "-c"]
    subprocess.run([*interpreter, code], cwd=tmp_path, check=True, timeout=300)
    (saved,) = tmp_path.iterdir()
    with Image.open(saved) as image:
        reading = read(image)
    assert reading.background == "white"
    assert holds(reading, ("heart", "red"), "left of", ("ring", "blue"))
    assert len(reading.objects) == 2
