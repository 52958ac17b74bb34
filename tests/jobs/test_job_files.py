"""Files of jobs' images, in a directory and in a real server of S3's interface, and links to them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from itsdangerous import TimestampSigner
from moto.server import ThreadedMotoServer

from deployments.jobs.files import BadLink, ImageFiles, Links

REGION = "us-east-1"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of an empty bucket; where it is and who may use it is said by the environment, as users say it."""
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": REGION,
    }.items():
        monkeypatch.setenv(name, value)
    yield "s3://images/of-jobs"
    server.stop()


def check_files(files: ImageFiles) -> None:
    files.probe()
    names = [files.write("job", data, "webp") for data in (b"first", b"second")]
    other = files.write("other", b"third", "png")
    assert all(name.startswith("job/") and name.endswith(".webp") for name in names)
    assert [files.read(name) for name in (*names, other)] == [b"first", b"second", b"third"]
    files.delete_job("job")
    files.delete_job("job")
    for name in names:
        with pytest.raises(FileNotFoundError):
            files.read(name)
    assert files.read(other) == b"third"


def test_files_in_a_directory(tmp_path: Path) -> None:
    files = ImageFiles(str(tmp_path / "images"))
    check_files(files)
    assert files.sign("job/a.png", 60) is None
    (directory,) = (tmp_path / "images").iterdir()
    assert directory.name == "other"


def test_files_in_s3_and_links_of_its_own(s3: str) -> None:
    files = ImageFiles(s3)
    check_files(files)
    link = files.sign(files.write("job", b"an image", "png"), 60)
    assert link
    assert "Expires" in link
    assert httpx.get(link, timeout=30).content == b"an image"


def test_a_file_system_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        ImageFiles("nowhere://images")


def test_a_link_holds_for_a_while_and_for_its_file_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000_000
    monkeypatch.setattr(TimestampSigner, "get_timestamp", lambda self: now)
    links = Links("key", 60)
    token = links.sign("job/a.png")
    now += 60
    assert links.read(token) == "job/a.png"
    for forged in (token[:-1] + ("A" if token[-1] != "A" else "B"), "x" + token, token.partition(".")[0], "", "é.b.c"):
        with pytest.raises(BadLink, match="signature"):
            links.read(forged)
    with pytest.raises(BadLink, match="signature"):
        Links("another key", 60).read(token)
    now += 1
    with pytest.raises(BadLink, match="expired"):
        links.read(token)
