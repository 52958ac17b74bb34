"""The store of jobs, in SQLite or PostgreSQL.

Each method is one short transaction, to be called from a thread. Workers claim jobs with leases: until its lease ends,
a job is its owner's alone, and afterwards anyone's. What an owner writes is written only while it still is the owner.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any, Literal, get_args

from sqlalchemy import JSON, ColumnElement, Index, UniqueConstraint, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column

from deployments.database import Database

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
STATUSES: tuple[Status, ...] = get_args(Status)
_UNFINISHED: tuple[Status, ...] = ("queued", "in_progress")


class QueueFull(Exception):
    """As many jobs as there may be are not done."""


class KeyReused(Exception):
    """An idempotency key came with another body before."""


class _Table(MappedAsDataclass, DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON, list[dict[str, Any]]: JSON}  # noqa: RUF012 (SQLAlchemy's own)


class ImageJob(_Table, kw_only=True):
    """A job; times are seconds since the epoch.

    Attributes:
        id: the job's id.
        created_at: when it was accepted.
        request: JSON of an `ImagesRequest` whose names, size and seed are resolved.
        request_hash: hash of what was asked for, to which the idempotency key is held.
        key_id: the API key that asked for it; empty where the API is open.
        idempotency_key: the client's, unique for the API key.
        response_format: whether the result has images or links.
        status: where it stands.
        owner: the worker that has it.
        lease_until: when others may take it.
        attempts: how often a worker began with it.
        progress: percentage that is done.
        stages: progress by stage, see `deployments.jobs.progress`.
        completed_at: when it ended, however.
        expires_at: when it is deleted.
        result: the answer of images/generations, with names of files in place of images.
        error_code, error_message: why it failed.
        webhook_url: whom to tell of its end.
        webhook_due: when to do so, or None if there is nothing to tell, or no more.
        webhook_attempts: how often it was tried.
        webhook_delivered_at: when it was heard.
        traceparent: span of the request that asked for it, as W3C's Trace Context writes it.
    """

    __tablename__ = "image_jobs"

    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[float]
    request: Mapped[str]
    request_hash: Mapped[str]
    key_id: Mapped[str] = mapped_column(default="")
    idempotency_key: Mapped[str | None] = mapped_column(default=None)
    response_format: Mapped[str] = mapped_column(default="b64_json")
    status: Mapped[Status] = mapped_column(default="queued")
    owner: Mapped[str | None] = mapped_column(default=None)
    lease_until: Mapped[float] = mapped_column(default=0.0)
    attempts: Mapped[int] = mapped_column(default=0)
    progress: Mapped[int] = mapped_column(default=0)
    stages: Mapped[list[dict[str, Any]]] = mapped_column(default_factory=list)
    completed_at: Mapped[float | None] = mapped_column(default=None)
    expires_at: Mapped[float | None] = mapped_column(default=None)
    result: Mapped[dict[str, Any] | None] = mapped_column(default=None)
    error_code: Mapped[str | None] = mapped_column(default=None)
    error_message: Mapped[str | None] = mapped_column(default=None)
    webhook_url: Mapped[str | None] = mapped_column(default=None)
    webhook_due: Mapped[float | None] = mapped_column(default=None)
    webhook_attempts: Mapped[int] = mapped_column(default=0)
    webhook_delivered_at: Mapped[float | None] = mapped_column(default=None)
    traceparent: Mapped[str | None] = mapped_column(default=None)

    __table_args__ = (
        UniqueConstraint("key_id", "idempotency_key"),
        Index("image_jobs_by_time", "key_id", "created_at", "id"),
        Index("image_jobs_by_status", "status", "lease_until"),
        Index("image_jobs_by_webhook", "webhook_due"),
        Index("image_jobs_by_expiry", "expires_at"),
    )

    @property
    def finished(self) -> bool:
        """Whether it ended, however."""
        return self.status not in _UNFINISHED


class _Key(_Table, kw_only=True):
    """A key that all replicas share."""

    __tablename__ = "image_job_keys"

    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class Store(Database):
    """Keeps jobs."""

    def __init__(self, url: str, clock: Callable[[], float] = time.time) -> None:
        """Open the store, and create it where there is none.

        Args:
            url: `sqlite:///PATH` or `postgresql://...`.
            clock: returns seconds since the epoch.

        Raises:
            OSError: the directory of SQLite's file cannot be made.
            OldTables: another version of the project made it.
            sqlalchemy.exc.SQLAlchemyError: the database cannot be used.
        """
        super().__init__(url, _Table.metadata, clock)

    def create(self, job: ImageJob, max_unfinished: int) -> ImageJob:
        """Add a job, or return the one that its idempotency key and request made before.

        Requests at the same moment may exceed `max_unfinished` in PostgreSQL by as many.

        Raises:
            KeyReused: the key came with another request.
            QueueFull: so many jobs are not done.
        """
        try:
            with self._session.begin() as session:
                if before := self._before(session, job):
                    return before
                unfinished = select(func.count()).select_from(ImageJob).where(ImageJob.status.in_(_UNFINISHED))
                if (session.scalar(unfinished) or 0) >= max_unfinished:
                    raise QueueFull
                session.add(job)
            return job
        except IntegrityError:  # the same key at the same time
            with self._session.begin() as session:
                if before := self._before(session, job):
                    return before
            raise

    def before(self, job: ImageJob) -> ImageJob | None:
        """Return the job that a new one's idempotency key and request made before, if any; raises KeyReused."""
        with self._reading.begin() as session:
            return self._before(session, job)

    def _before(self, session: Session, job: ImageJob) -> ImageJob | None:
        if job.idempotency_key is None:
            return None
        found = session.scalar(
            select(ImageJob).where(ImageJob.key_id == job.key_id, ImageJob.idempotency_key == job.idempotency_key)
        )
        if found and found.request_hash != job.request_hash:
            raise KeyReused
        return found

    def get(self, job_id: str) -> ImageJob | None:
        """Return a job, if it is there."""
        with self._reading.begin() as session:
            return session.get(ImageJob, job_id)

    def page(self, key_id: str, limit: int, after: ImageJob | None, *, ascending: bool) -> list[ImageJob]:
        """Return the next jobs of an API key after one in order of time."""
        order = [column if ascending else column.desc() for column in (ImageJob.created_at, ImageJob.id)]
        query = select(ImageJob).where(ImageJob.key_id == key_id).order_by(*order).limit(limit)
        if after:
            query = query.where(_beyond(after, ascending=ascending))
        with self._reading.begin() as session:
            return list(session.scalars(query))

    def claim(self, owner: str, lease_s: float, max_attempts: int) -> ImageJob | None:
        """Take a job that nobody has, for `lease_s`, and count an attempt.

        It is the oldest one of the API key that has the fewest at work, so that none waits for all jobs of another.
        """
        now = self._clock()
        at_work = (
            select(ImageJob.key_id, func.count().label("jobs"))
            .where(ImageJob.status == "in_progress", ImageJob.lease_until > now)
            .group_by(ImageJob.key_id)
            .subquery()
        )
        with self._session.begin() as session:
            job = session.scalar(
                select(ImageJob)
                .outerjoin(at_work, at_work.c.key_id == ImageJob.key_id)
                .where(ImageJob.status.in_(_UNFINISHED), ImageJob.lease_until <= now, ImageJob.attempts < max_attempts)
                .order_by(func.coalesce(at_work.c.jobs, 0), ImageJob.created_at, ImageJob.id)
                .limit(1)
                .with_for_update(of=ImageJob, skip_locked=True)
            )
            if job:
                job.status, job.owner, job.lease_until = "in_progress", owner, now + lease_s
                job.attempts += 1
                job.progress, job.stages = 0, []
            return job

    def renew(self, job_id: str, owner: str, lease_s: float, progress: int, stages: list[dict[str, Any]]) -> bool:
        """Prolong a lease and note the progress; return whether the job still is the owner's."""
        with self._session.begin() as session:
            if job := self._held(session, job_id, owner):
                job.lease_until, job.progress, job.stages = self._clock() + lease_s, progress, stages
            return job is not None

    def release(self, job_id: str, owner: str, pause_s: float, *, counted: bool) -> bool:
        """Give a job back, for others to take after a pause; return whether it was the owner's.

        Args:
            job_id: the job's id.
            owner: who gives it back.
            pause_s: seconds for which nobody is to take it.
            counted: whether the attempt counts.
        """
        with self._session.begin() as session:
            if job := self._held(session, job_id, owner):
                job.status, job.owner, job.lease_until = "queued", None, self._clock() + pause_s
                job.attempts -= not counted
            return job is not None

    def pause(self, key_id: str, pause_s: float) -> None:
        """Let nobody take an API key's jobs that wait, for `pause_s`."""
        until = self._clock() + pause_s
        waiting = (ImageJob.key_id == key_id) & (ImageJob.status == "queued") & (ImageJob.lease_until < until)
        with self._session.begin() as session:
            session.execute(update(ImageJob).where(waiting).values(lease_until=until))

    def release_all(self, owner: str) -> None:
        """Give back all jobs of an owner, as if it had not begun with them."""
        with self._session.begin() as session:
            session.execute(
                update(ImageJob)
                .where(ImageJob.owner == owner)
                .values(status="queued", owner=None, lease_until=0.0, attempts=ImageJob.attempts - 1)
            )

    def complete(
        self, job_id: str, owner: str, result: dict[str, Any], stages: list[dict[str, Any]], keep_s: float
    ) -> bool:
        """End a job with its result; return whether it was the owner's, so that this counts."""
        with self._session.begin() as session:
            if job := self._held(session, job_id, owner):
                job.result, job.progress, job.stages = result, 100, stages
                self._end(job, "completed", keep_s)
            return job is not None

    def fail(self, job_id: str, owner: str, code: str, message: str, keep_s: float) -> bool:
        """End a job with an error; return whether it was the owner's, so that this counts."""
        with self._session.begin() as session:
            if job := self._held(session, job_id, owner):
                job.error_code, job.error_message = code, message
                self._end(job, "failed", keep_s)
            return job is not None

    def fail_lost(self, max_attempts: int, code: str, message: str, keep_s: float) -> list[str]:
        """End the jobs that were lost with their worker at the last attempt; return their ids."""
        with self._session.begin() as session:
            lost = session.scalars(
                select(ImageJob)
                .where(
                    ImageJob.status.in_(_UNFINISHED),
                    ImageJob.lease_until <= self._clock(),
                    ImageJob.attempts >= max_attempts,
                )
                .with_for_update(skip_locked=True)
            ).all()
            for job in lost:
                job.error_code, job.error_message = code, message
                self._end(job, "failed", keep_s)
            return [job.id for job in lost]

    def cancel(self, job_id: str, keep_s: float) -> ImageJob | None:
        """End a job that is not done, whoever has it; return it as it is then, if it is there."""
        with self._session.begin() as session:
            job = session.get(ImageJob, job_id, with_for_update=True)
            if job and not job.finished:
                self._end(job, "cancelled", keep_s)
            return job

    def expired(self, limit: int) -> list[str]:
        """Return ids of jobs that need not be kept any longer."""
        query = select(ImageJob.id).where(ImageJob.expires_at <= self._clock()).limit(limit)
        with self._reading.begin() as session:
            return list(session.scalars(query))

    def delete(self, job_id: str) -> None:
        """Forget a job that is done."""
        with self._session.begin() as session:
            job = session.get(ImageJob, job_id, with_for_update=True)
            if job and job.finished:
                session.delete(job)

    def claim_webhook(self, retry_s: Callable[[int], float], max_attempts: int) -> ImageJob | None:
        """Take a job whose end is to be told now, count an attempt, and note when it is due again.

        Args:
            retry_s: returns seconds until the next attempt, by the number of those made.
            max_attempts: attempts after which it is not due again.
        """
        now = self._clock()
        with self._session.begin() as session:
            job = session.scalar(
                select(ImageJob)
                .where(ImageJob.webhook_due <= now)
                .order_by(ImageJob.webhook_due)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            if job:
                job.webhook_attempts += 1
                last = job.webhook_attempts >= max_attempts
                job.webhook_due = None if last else now + retry_s(job.webhook_attempts)
            return job

    def note_delivered(self, job_id: str) -> None:
        """Note that a job's end was heard."""
        with self._session.begin() as session:
            if job := session.get(ImageJob, job_id, with_for_update=True):
                job.webhook_due, job.webhook_delivered_at = None, self._clock()

    def key(self, name: str) -> str:
        """Return a secret that all who use this store share, drawn by the first who asks."""
        try:
            with self._session.begin() as session:
                if found := session.get(_Key, name):
                    return found.value
                session.add(drawn := _Key(name=name, value=secrets.token_urlsafe(32)))
            return drawn.value
        except IntegrityError:  # another one was first
            with self._session.begin() as session:
                return session.get_one(_Key, name).value

    def _held(self, session: Session, job_id: str, owner: str) -> ImageJob | None:
        query = select(ImageJob).where(ImageJob.id == job_id, ImageJob.owner == owner)
        return session.scalar(query.with_for_update())

    def _end(self, job: ImageJob, status: Status, keep_s: float) -> None:
        now = self._clock()
        job.status, job.owner, job.lease_until = status, None, 0.0
        job.completed_at, job.expires_at = now, now + keep_s
        job.webhook_due = now if job.webhook_url else None


def _beyond(job: ImageJob, *, ascending: bool) -> ColumnElement[bool]:
    """Whether a row comes after a job in order of time."""
    at, job_id = ImageJob.created_at, ImageJob.id
    later = at > job.created_at if ascending else at < job.created_at
    return or_(later, (at == job.created_at) & (job_id > job.id if ascending else job_id < job.id))
