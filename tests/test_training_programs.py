"""The programs of training/, run as the script that makes the checkpoint runs them, on a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from backends import Backend
from stages.config import ModelConfig
from stages.pipeline import Pipeline

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "training" / "scenes.sh"


def _schedule(steps: int) -> dict[str, float]:
    return {"steps": steps, "batch_size": 2, "learning_rate": 1e-3, "save_every": steps}


def _tiny() -> dict[str, dict[str, Any]]:
    """`training/scenes.yaml` with a step or two of every kind."""
    config = yaml.safe_load((ROOT / "training" / "scenes.yaml").read_text())
    few = {"count": 2, "batch_size": 2}
    config["vae"] |= {"model": {**config["vae"]["model"], "base_dim": 8}, "schedule": _schedule(1)}
    config["decoder"] |= {"schedule": _schedule(1)}
    config["model"]["transformer"] |= {"num_layers": 2}
    size = {"width": 64, "height": 64, "count": 4, "share": 1.0}
    config["base"] |= {"sizes": [size], "workers": 0, "tokens": 16, "head_depth": 1, "schedule": _schedule(1)}
    config["trajectories"] |= {**few, "steps": 8}
    student = {"prompt_count": 4, "sizes": [[64, 64]], "tokens": 16, "regression_steps": 1, "critic_steps": 1}
    config["distilled"] |= {**student, "schedule": _schedule(3)}
    config["bridge"] |= {"regression_steps": 1, "schedule": _schedule(2)}
    config["tail"] |= {"teacher_steps": 2, "decoded": 1, "schedule": _schedule(1)}
    config["tail"]["pairs"] |= few
    return config


@pytest.mark.slow
@pytest.mark.long
def test_script_makes_a_checkpoint_from_nothing(tmp_path: Path, backend: Backend) -> None:
    """By every program in turn, each on what those before it left; the engine draws by the hybrid plan with it."""
    config, programs, run = tmp_path / "tiny.yaml", tmp_path / "programs", tmp_path / "run"
    config.write_text(yaml.safe_dump(_tiny()))
    programs.mkdir()
    python = programs / "python"  # this one, with the tiny config for the script's
    python.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" "${{@/#training\\/scenes.yaml/{config}}}"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    subprocess.run([SCRIPT, "run"], cwd=tmp_path, env=environment, check=True, timeout=1000)
    for trained in ("vae", "decoder", "base", "distilled", "bridge", "tail"):
        assert list((run / trained / "samples").glob("*.png")), trained

    served = yaml.safe_load((ROOT / "configs" / "scenes.yaml").read_text())
    served |= {"source": str(run / "checkpoint"), "sizes": ["64x64"], "plans_at": {}}
    served["plans"] = str(ROOT / "configs" / "plans" / "scenes.yaml")
    served["adapters"] = {name: {"source": str(run / "checkpoint" / "loras" / name)} for name in served["adapters"]}
    (tmp_path / "served.yaml").write_text(yaml.safe_dump(served))
    pipeline = Pipeline(ModelConfig.read(tmp_path / "served.yaml"), backend)
    (result,) = pipeline.run("hybrid", "a red star", size="64x64")
    assert result.image.size == (64, 64)
    assert result.nfe == 7


@pytest.mark.parametrize("arguments", [[], ["one", "two"]])
def test_script_takes_one_directory(tmp_path: Path, arguments: list[str]) -> None:
    answer = subprocess.run([SCRIPT, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 2
    assert "RUN_DIRECTORY" in answer.stderr
    assert not list(tmp_path.iterdir())
