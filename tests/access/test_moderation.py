"""Checks of prompts and images that fail in ways of their own."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from deployments.http.errors import APIError
from deployments.http.moderation import Moderation
from deployments.moderation import ModerationSettings

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def leave(prompt: str, negative_prompt: str | None) -> None:
    sys.exit(3)


async def leave_later(prompt: str, negative_prompt: str | None) -> None:
    await asyncio.sleep(0)
    raise SystemExit


def interrupt(prompt: str, negative_prompt: str | None) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("check", [leave, leave_later, interrupt])
async def test_a_check_that_would_end_the_server_refuses(check: Callable[..., object]) -> None:
    with pytest.raises(APIError, match="the prompt cannot be checked") as refused:
        await Moderation(ModerationSettings(prompt=check)).check_prompt("a star", None)
    assert (refused.value.status, refused.value.code) == (503, "moderation_unavailable")


def test_a_module_that_ends_the_program_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ends.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValidationError, match="'ends:check' cannot be imported: SystemExit: 3"):
        ModerationSettings(prompt="ends:check")
