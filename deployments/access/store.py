"""The database of keys and of the ledger; each method is one short transaction, to be called from a thread.

The ledger is also what limits are held to: a request reserves its row before its images are made and settles it when
they are, so that what a key had in the last minute, and what it has in the making, are sums of its rows, whichever
replicas wrote them. Transactions of one key follow one upon another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import JSON, BigInteger, ColumnElement, Index, case, delete, func, literal, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column

from deployments.access.keys import Limits, Presented
from deployments.database import Database

_WINDOW_S = 60.0
_WAIT_S = 4  # for a lock, a connection or a statement; callers wait a second longer
# A client's pause when too many of its images are in the making. Rows say only when these end at the latest, a
# minute or more after most of them do.
_SOON_S = 1.0
_PAGE = 1000  # rows of the ledger that are read at once


class NameTaken(Exception):
    """A key has this name, or had it before it was revoked."""


class Revoked(Exception):
    """The key was revoked, or never was."""


class ChargeEnded(Exception):
    """A charge of this id is another key's, or has ended."""


class LimitExceeded(Exception):
    """What is asked for is more than the key may have now.

    Attributes:
        reason: the sentence for the client, which names the limit.
        retry_after_s: seconds until there is room, if nothing else comes; None if there never is.
    """

    def __init__(self, reason: str, retry_after_s: float | None) -> None:
        super().__init__(reason)
        self.reason, self.retry_after_s = reason, retry_after_s


@dataclass(frozen=True)
class Served:
    """What was served.

    Attributes:
        images: number of images.
        pixels: pixels of all of them.
        evaluations: network evaluations that they took.
    """

    images: int
    pixels: int
    evaluations: float


class _Table(MappedAsDataclass, DeclarativeBase):
    type_annotation_map = {list[str]: JSON}  # noqa: RUF012 (SQLAlchemy's own)


class Key(_Table, kw_only=True):
    """A key; times are seconds since the epoch.

    Attributes:
        id: what the key begins with.
        name: whose it is.
        digest: hash of its secret.
        scopes: what it may be used for.
        requests_per_minute, megapixels_per_minute, concurrent_images: see `Limits`.
        created_at: when it was made.
        revoked_at: since when it is of no use.
    """

    __tablename__ = "access_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    digest: Mapped[str]
    scopes: Mapped[list[str]]
    requests_per_minute: Mapped[int | None] = mapped_column(default=None)
    megapixels_per_minute: Mapped[float | None] = mapped_column(default=None)
    concurrent_images: Mapped[int | None] = mapped_column(default=None)
    created_at: Mapped[float]
    revoked_at: Mapped[float | None] = mapped_column(default=None)


class Charge(_Table, kw_only=True):
    """A row of the ledger, for a request or a job that a key was let in with; times are seconds since the epoch.

    Attributes:
        id: the job's id, or one of the ledger's own.
        key_id: the key's id.
        request_id: id of the request in logs.
        created_at: when it was let in.
        asked_images, asked_pixels: what was asked for.
        making_until: when its images are no longer in the making, whatever comes; 0 if they are not.
        settled_at: when it ended; None before, and for good if its replica died.
        images, pixels, evaluations: what was served.
    """

    __tablename__ = "access_charges"

    id: Mapped[str] = mapped_column(primary_key=True)
    key_id: Mapped[str]
    request_id: Mapped[str]
    created_at: Mapped[float]
    asked_images: Mapped[int]
    asked_pixels: Mapped[int] = mapped_column(BigInteger)
    making_until: Mapped[float] = mapped_column(default=0.0)
    settled_at: Mapped[float | None] = mapped_column(default=None)
    images: Mapped[int] = mapped_column(default=0)
    pixels: Mapped[int] = mapped_column(BigInteger, default=0)
    evaluations: Mapped[float] = mapped_column(default=0.0)

    __table_args__ = (
        Index("access_charges_by_time", "key_id", "created_at"),
        Index("access_charges_in_the_making", "key_id", "making_until"),
        Index("access_charges_in_order", "created_at", "id"),
    )


class AccessStore(Database):
    """Keeps keys and the ledger."""

    def __init__(self, url: str, clock: Callable[[], float] = time.time) -> None:
        """Open the database, and create the tables where there are none.

        Args:
            url: `sqlite:///PATH` or `postgresql://...`.
            clock: returns seconds since the epoch.

        Raises:
            OSError: the directory of SQLite's file cannot be made.
            OldTables: another version of the project made it.
            sqlalchemy.exc.SQLAlchemyError: the database cannot be used.
        """
        super().__init__(url, _Table.metadata, clock, _WAIT_S)

    def create(self, name: str, scopes: Sequence[str], limits: Limits) -> Presented:
        """Make a key; return it, which nobody can do again. Raises NameTaken."""
        drawn = Presented.draw()
        try:
            with self._session.begin() as session:
                session.add(
                    Key(
                        id=drawn.key_id,
                        name=name,
                        digest=drawn.digest,
                        scopes=list(scopes),
                        requests_per_minute=limits.requests_per_minute,
                        megapixels_per_minute=limits.megapixels_per_minute,
                        concurrent_images=limits.concurrent_images,
                        created_at=self._clock(),
                    )
                )
        except IntegrityError:
            raise NameTaken from None
        return drawn

    def all_keys(self) -> list[Key]:
        """Return all keys, the oldest first, those that were revoked among them."""
        with self._reading.begin() as session:
            return list(session.scalars(select(Key).order_by(Key.created_at, Key.id)))

    def revoke(self, name: str) -> bool:
        """Make a key useless; return whether it was of use."""
        with self._session.begin() as session:
            key = session.scalar(select(Key).where(Key.name == name, Key.revoked_at.is_(None)).with_for_update())
            if key:
                key.revoked_at = self._clock()
            return key is not None

    def find(self, presented: Presented) -> Key:
        """Return the key that a client presents; raises Revoked if there is none with this secret."""
        with self._reading.begin() as session:
            key = session.get(Key, presented.key_id)
        if not presented.matches(key.digest if key else None) or key is None or key.revoked_at is not None:
            raise Revoked
        return key

    def reserve(self, charge: Charge) -> None:
        """Enter a request that is to be let in.

        One that was let in before and has not ended is taken over: its replica died, and it counts once.

        Raises:
            ChargeEnded: the id is of no use for this request.
            LimitExceeded: the key may not have that now, or never.
            Revoked: the key is of no use any more.
        """
        with self._session.begin() as session:
            key = self._lock(session, charge.key_id)
            now = self._clock()
            before = session.get(Charge, charge.id, with_for_update=True)
            if before and (before.key_id != key.id or before.settled_at is not None):
                raise ChargeEnded
            charge.created_at = before.created_at if before else now
            recent = (Charge.key_id == key.id) & (Charge.created_at > now - _WINDOW_S) & (Charge.id != charge.id)
            if key.concurrent_images is not None and charge.asked_images > key.concurrent_images:
                raise _never(f"{_count(key.concurrent_images, 'image')} at once", f"{charge.asked_images}")
            if key.requests_per_minute is not None:
                rows = select(func.count()).select_from(Charge).where(recent)
                if (session.scalar(rows) or 0) >= key.requests_per_minute:
                    wait = self._wait(session, recent, now, room=key.requests_per_minute - 1, of_pixels=False)
                    raise LimitExceeded(f"the key may make {_count(key.requests_per_minute, 'request')} a minute", wait)
            if key.megapixels_per_minute is not None:
                room = round(key.megapixels_per_minute * 1e6) - charge.asked_pixels
                told = f"{_count(key.megapixels_per_minute, 'megapixel')} a minute"
                if room < 0:
                    raise _never(told, f"{charge.asked_pixels / 1e6:g}")
                if (session.scalar(select(func.sum(_PIXELS)).where(recent)) or 0) > room:
                    wait = self._wait(session, recent, now, room=room, of_pixels=True)
                    raise LimitExceeded(f"the key may have {told}", wait)
            if charge.making_until:
                self._check_concurrency(session, key, charge.asked_images, now, besides=charge.id)
            session.merge(charge)

    def withdraw(self, charge: Charge) -> None:
        """Charge nothing for a request of which nobody knows whether `reserve` entered it, and let it do so no more.

        Raises:
            sqlalchemy.exc.IntegrityError: `reserve` entered it meanwhile; try again.
        """
        with self._session.begin() as session:
            if not self._end(session, (Charge.id == charge.id) & (Charge.key_id == charge.key_id), _NOTHING):
                charge.created_at = charge.settled_at = self._clock()
                charge.making_until = 0.0
                session.merge(charge)

    def begin(self, charge_id: str, until: float) -> None:
        """Note that images of a request that was let in are in the making, until then at most.

        Raises:
            LimitExceeded: too many of the key's are.
            Revoked: the key is of no use any more.
        """
        with self._session.begin() as session:
            charge = session.get(Charge, charge_id)
            if charge is None:
                raise Revoked
            key = self._lock(session, charge.key_id)
            self._check_concurrency(session, key, charge.asked_images, self._clock(), besides=charge_id)
            charge.making_until = until

    def pause(self, charge_id: str, until: float) -> None:
        """Note that images of which `begin` said so are no longer in the making; they may begin again."""
        with self._session.begin() as session:
            begun = (Charge.id == charge_id) & (Charge.making_until == until)
            session.execute(update(Charge).where(begun).values(making_until=0.0))

    def settle(self, charge_id: str, served: Served) -> None:
        """Charge for what was served, unless that was settled otherwise before."""
        with self._session.begin() as session:
            self._end(session, Charge.settled_at.is_(None) & (Charge.id == charge_id), served)

    def void(self, charge_id: str) -> None:
        """Charge nothing, whatever was settled before or will be."""
        with self._session.begin() as session:
            self._end(session, Charge.id == charge_id, _NOTHING)

    def ledger(self, since: float, until: float) -> Iterator[tuple[Charge, str]]:
        """Yield rows of the ledger by the time at which they were let in, each with its key's name.

        Args:
            since: the first time that is in, in seconds since the epoch.
            until: the first one that no longer is.
        """
        query = select(Charge, Key.name).join(Key, Key.id == Charge.key_id).order_by(Charge.created_at, Charge.id)
        query = query.where(Charge.created_at >= since, Charge.created_at < until)
        page = query
        while True:
            with self._reading.begin() as session:
                rows = [(charge, name) for charge, name in session.execute(page.limit(_PAGE))]
            yield from rows
            if len(rows) < _PAGE:
                return
            last = rows[-1][0]
            later = (Charge.created_at == last.created_at) & (Charge.id > last.id)
            page = query.where((Charge.created_at > last.created_at) | later)

    def prune(self, until: float) -> int:
        """Delete rows of requests and jobs that ended and were let in before; return how many.

        What counts for limits stays, and so does what may still end.

        Args:
            until: the first time that stays, in seconds since the epoch.
        """
        pruned = 0
        while True:
            with self._session.begin() as session:
                now = self._clock()
                lost = (Charge.making_until > 0.0) & (Charge.making_until < now)
                ended = Charge.settled_at.is_not(None) | lost
                old = select(Charge.id).where(Charge.created_at < min(until, now - _WINDOW_S), ended).limit(_PAGE)
                deleted = len(session.scalars(delete(Charge).where(Charge.id.in_(old)).returning(Charge.id)).all())
            pruned += deleted
            if deleted < _PAGE:
                return pruned

    def _lock(self, session: Session, key_id: str) -> Key:
        """Return a key whose transactions now wait for this one; raises Revoked."""
        key = session.get(Key, key_id, with_for_update=True)
        if key is None or key.revoked_at is not None:
            raise Revoked
        return key

    def _end(self, session: Session, which: ColumnElement[bool], served: Served) -> bool:
        """Settle rows; return whether there are any."""
        values = {"images": served.images, "pixels": served.pixels, "evaluations": served.evaluations}
        ending = update(Charge).where(which).values(making_until=0.0, settled_at=self._clock(), **values)
        return session.scalar(ending.returning(Charge.id)) is not None

    def _check_concurrency(self, session: Session, key: Key, images: int, now: float, besides: str) -> None:
        if key.concurrent_images is None:
            return
        making = select(func.sum(Charge.asked_images)).where(
            Charge.key_id == key.id, Charge.making_until > now, Charge.id != besides
        )
        if (session.scalar(making) or 0) + images > key.concurrent_images:
            raise LimitExceeded(f"the key may have {_count(key.concurrent_images, 'image')} at once", _SOON_S)

    def _wait(self, session: Session, recent: ColumnElement[bool], now: float, room: int, *, of_pixels: bool) -> float:
        """Return the seconds until what a key had in the last minute is no more than `room`."""
        amount = _PIXELS if of_pixels else literal(1)
        rows = session.execute(select(Charge.created_at, amount).where(recent).order_by(Charge.created_at))
        entries = rows.all()
        left = sum(value for _, value in entries)
        for created_at, value in entries:
            left -= value
            if left <= room:
                return created_at + _WINDOW_S - now
        return _WINDOW_S


_NOTHING = Served(0, 0, 0.0)
_PIXELS = case((Charge.settled_at.is_(None), Charge.asked_pixels), else_=Charge.pixels)


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}" if number == 1 else f"{number:g} {noun}s"


def _never(may: str, asked: str) -> LimitExceeded:
    return LimitExceeded(f"the key may have {may}, and the request asks for {asked}", None)
