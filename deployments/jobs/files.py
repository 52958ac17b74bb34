"""The files of jobs' images, in a directory or wherever fsspec reaches; and links to them that expire."""

from __future__ import annotations

import secrets
from contextlib import suppress

import fsspec
from itsdangerous import BadSignature, SignatureExpired, URLSafeTimedSerializer

from stages.image import ImageFormat


class ImageFiles:
    """Keeps files by names of our own, `JOB/RANDOM.FORMAT`; methods are to be called from a thread."""

    def __init__(self, url: str) -> None:
        """Use a directory, or another file system by its fsspec URL.

        Raises:
            ImportError: the file system needs a package that is not installed.
            ValueError: there is no such file system.
        """
        self._fs, self._root = fsspec.core.url_to_fs(url)

    def write(self, job_id: str, data: bytes, format: ImageFormat) -> str:
        """Write a file of a job; return its name."""
        name = f"{job_id}/{secrets.token_hex(8)}.{format}"
        self._fs.makedirs(f"{self._root}/{job_id}", exist_ok=True)
        self._fs.pipe_file(f"{self._root}/{name}", data)
        return name

    def read(self, name: str) -> bytes:
        """Return a file; raises FileNotFoundError."""
        return self._fs.cat_file(f"{self._root}/{name}")

    def delete_job(self, job_id: str) -> None:
        """Delete all files of a job, those of lost attempts among them."""
        directory = f"{self._root}/{job_id}"
        self._fs.invalidate_cache(directory)
        with suppress(FileNotFoundError):
            self._fs.rm(directory, recursive=True)

    def sign(self, name: str, seconds: int) -> str | None:
        """Return a link of the file system's own that holds for so long, or None if it makes none."""
        with suppress(NotImplementedError):
            return self._fs.sign(f"{self._root}/{name}", expiration=seconds)
        return None

    def probe(self) -> None:
        """Write a file and delete it; raises whatever the file system does if that cannot be."""
        self.write("probe", b"", "png")
        self.delete_job("probe")


class BadLink(Exception):
    """A link that was never made here, or that has expired."""


class Links:
    """Makes and reads the part of a link to a file that says which one, and until when."""

    def __init__(self, key: str, seconds: int) -> None:
        """Sign with a key.

        Args:
            key: secret that those who make links and those who read them share.
            seconds: seconds for which links hold.
        """
        self._signer = URLSafeTimedSerializer(key, salt="links")
        self.seconds = seconds

    def sign(self, name: str) -> str:
        """Return a token for a file."""
        return self._signer.dumps(name)

    def read(self, token: str) -> str:
        """Return the name of a token's file; raises BadLink."""
        try:
            return self._signer.loads(token, max_age=self.seconds)
        except SignatureExpired as error:
            raise BadLink("the link has expired") from error
        except BadSignature as error:
            raise BadLink("the link's signature is wrong") from error
