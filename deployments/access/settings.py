"""The section `access` of the application's arguments."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from deployments.database_url import DatabaseURL


class AccessSettings(BaseModel):
    """Who may use the API: whoever has a key.

    Attributes:
        database: SQLAlchemy's URL of the database of keys and of the ledger, of SQLite or PostgreSQL.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    database: DatabaseURL
