"""The commands that make keys and read the ledger, as a shell meets them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deployments.access.keys import SCOPES, Limits, new_charge_id
from deployments.access.store import AccessStore, Charge

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/access.sqlite3"


@pytest.fixture
def command(tmp_path: Path, database: str) -> str:
    config = {"applications": [{"name": "images", "args": {"access": {"database": database}}}]}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    return f"{sys.executable} -m deployments.access --config {tmp_path}/serve.yaml"


def shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_output_that_nobody_takes_is_no_traceback(command: str, database: str) -> None:
    store = AccessStore(database)
    key_id = store.create("shop", SCOPES, Limits()).key_id
    for _ in range(200):  # more than a pipe holds
        charge = Charge(
            id=new_charge_id(), key_id=key_id, request_id="r" * 1000, created_at=0.0, asked_images=1, asked_pixels=1
        )
        store.reserve(charge)
    store.close()
    head = shell(f"{command} ledger --until 2999-01-01 | head -n 1")
    assert head.stdout.startswith("time,key,key_id,")
    assert head.stderr == ""
    for listing in ("list", "ledger"):
        full = shell(f"{command} {listing} > /dev/full")
        assert (full.returncode, full.stderr) == (1, "the output: No space left on device\n")


def test_names_and_scopes_are_kept_plainly(command: str, database: str) -> None:
    assert shell(f"{command} create ' shop ' --scope jobs --scope images --scope jobs").returncode == 0
    store = AccessStore(database)
    assert [(key.name, key.scopes) for key in store.all_keys()] == [("shop", ["jobs", "images"])]
    store.close()
    assert "as 2026-01-31 or 2026-01-31T12:00" in " ".join(shell(f"{command} ledger --help").stdout.split())


def test_old_rows_are_deleted(command: str, database: str) -> None:
    store = AccessStore(database, clock=lambda: 1_000_000_000.0)
    key_id = store.create("shop", SCOPES, Limits()).key_id
    charge = Charge(id=new_charge_id(), key_id=key_id, request_id="r", created_at=0.0, asked_images=1, asked_pixels=1)
    store.reserve(charge)
    store.void(charge.id)
    store.close()
    assert shell(f"{command} prune").returncode == 2
    assert shell(f"{command} prune --until 2001-09-09").stdout == "rows deleted: 0\n"
    assert shell(f"{command} prune --until 2001-09-10").stdout == "rows deleted: 1\n"
    assert len(shell(f"{command} ledger").stdout.splitlines()) == 1
