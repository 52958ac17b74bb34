"""Databases that the replicas of Ingress share: SQLite on one machine, PostgreSQL for any number of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, MetaData, create_engine, event, func, inspect, make_url, select
from sqlalchemy.orm import sessionmaker

_WAIT_S = 10  # for a lock, a connection or a statement
_READS = "images_reads"  # the execution option of engines that only read
_SCHEMA_LOCK = 0x6A6F6273  # PostgreSQL's number of the lock that whoever creates tables holds


class OldTables(Exception):
    """A database whose tables another version of this project made."""


class Database:
    """What stores have in common: transactions that write, those that only read, and a clock."""

    def __init__(self, url: str, metadata: MetaData, clock: Callable[[], float], wait_s: int = _WAIT_S) -> None:
        """Open a database, and create the tables that are not there.

        Args:
            url: `sqlite:///PATH` or `postgresql://...`.
            metadata: the tables.
            clock: returns seconds since the epoch.
            wait_s: longest wait for a lock, a connection or a statement, in seconds.

        Raises:
            OSError: the directory of SQLite's file cannot be made.
            OldTables: a table is there with other columns.
            sqlalchemy.exc.SQLAlchemyError: the database cannot be used.
        """
        self._clock = clock
        self._engine = _connect(url, wait_s)
        self._session = sessionmaker(self._engine, expire_on_commit=False)
        # In SQLite, what only reads waits for no writer.
        self._reading = sessionmaker(self._engine.execution_options(**{_READS: True}), expire_on_commit=False)
        try:
            _create_tables(self._engine, metadata)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close its connections."""
        self._engine.dispose()


def _connect(url: str, wait_s: int) -> Engine:
    parsed = make_url(url)
    if parsed.drivername == "postgresql":
        return create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            hide_parameters=True,  # of errors, since these are logged
            pool_pre_ping=True,
            pool_timeout=wait_s,
            connect_args={"connect_timeout": wait_s, "options": f"-c statement_timeout={wait_s}s"},
        )
    if parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed, hide_parameters=True, pool_timeout=wait_s, connect_args={"timeout": wait_s})

    # As SQLAlchemy's page on SQLite has it: a transaction that may write begins as a writer's, not where the driver
    # thinks that it must, so that nothing changes between what it reads and what it writes.
    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, record: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN" if connection.get_execution_options().get(_READS) else "BEGIN IMMEDIATE")

    return engine


def _create_tables(engine: Engine, metadata: MetaData) -> None:
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":  # in which creating twice at once is an error
            connection.execute(select(func.pg_advisory_xact_lock(_SCHEMA_LOCK)))
        metadata.create_all(connection)
        found = inspect(connection)
        for table in metadata.sorted_tables:
            columns = {column["name"] for column in found.get_columns(table.name)}
            if missing := [column.name for column in table.columns if column.name not in columns]:
                raise OldTables(
                    f"the table {table.name} has no column {missing[0]}: another version of the server made it; "
                    "name a new database, or drop the table"
                )
