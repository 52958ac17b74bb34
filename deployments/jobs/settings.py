"""The section `jobs` of the application's arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator

from deployments.database_url import DatabaseURL

_Seconds = Annotated[float, Field(strict=True, gt=0.0, le=366 * 86400.0)]


class WebhookSettings(BaseModel):
    """How the ends of jobs are told.

    Attributes:
        secret_file: file of the secret that signs them, `whsec_` and 24 to 64 bytes in base64.
        allow_private: whether to call addresses that are not on the public internet.
        attempts: most attempts at each.
        timeout_s: longest time that an attempt may take, in seconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    secret_file: Path
    allow_private: StrictBool = False
    attempts: Annotated[int, Field(strict=True, ge=1, le=20)] = 8
    timeout_s: Annotated[float, Field(strict=True, gt=0.0, le=120.0)] = 10.0


class JobsSettings(BaseModel):
    """Where jobs are kept, and how they are worked on.

    Attributes:
        directory: directory of the store and the images, where these are not said.
        store: SQLAlchemy's URL of the store, of SQLite or PostgreSQL.
        images: directory or fsspec URL of the images.
        concurrent: most jobs that each replica of Ingress works on at once.
        max_unfinished: most jobs that are not done.
        attempts: most attempts at a job.
        timeout_s: longest time that an attempt may take, in seconds.
        lease_s: seconds for which a worker has a job before it must say that it still works on it.
        keep_s: seconds after its end for which a job is kept, and its images.
        links_s: seconds for which links to images hold.
        public_url: address of the API as clients know it, in links; by default the one that the request went to.
        webhooks: how the ends of jobs are told; None to refuse jobs that ask for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    directory: Path | None = None
    store: DatabaseURL | None = None
    images: str | None = None
    concurrent: Annotated[int, Field(strict=True, ge=1, le=1024)] = 4
    max_unfinished: Annotated[int, Field(strict=True, ge=1, le=10_000_000)] = 10_000
    attempts: Annotated[int, Field(strict=True, ge=1, le=100)] = 3
    timeout_s: _Seconds = 600.0
    lease_s: Annotated[float, Field(strict=True, ge=3.0, le=3600.0)] = 30.0
    keep_s: _Seconds = 86400.0
    links_s: Annotated[int, Field(strict=True, ge=1, le=7 * 86400)] = 3600
    public_url: Annotated[str, Field(pattern=r"^https?://[^?#]+$")] | None = None
    webhooks: WebhookSettings | None = None

    @model_validator(mode="after")
    def _placed(self) -> JobsSettings:
        if self.directory is None and None in (self.store, self.images):
            raise ValueError("directory must be there, or both store and images")
        return self

    @property
    def store_url(self) -> str:
        """URL of the store."""
        return self.store or f"sqlite:///{self.directory}/jobs.sqlite3"

    @property
    def images_url(self) -> str:
        """Directory or URL of the images."""
        return self.images or f"{self.directory}/images"
