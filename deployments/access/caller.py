"""The dependencies of routes that let callers in; FastAPI runs them before a body is read."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes
from ray import serve

from deployments.access.access import Access, Caller

# For the description of the API alone: errors have that API's shape, and an open one asks for no key.
_described = HTTPBearer(
    auto_error=False, scheme_name="key", description="A key of `python -m deployments.access create`."
)


def access_here() -> Access:
    """Return the access to the replica that this runs in."""
    access: Access = serve.get_replica_context().servable_object.access
    return access


async def identify(
    needed: SecurityScopes,
    request: Request,
    access: Annotated[Access, Depends(access_here)],
    described: Annotated[HTTPAuthorizationCredentials | None, Depends(_described)],
) -> Caller:
    """Return whom a request is from; raises APIError if the caller may not make it."""
    # Several different ones are none that a key is in, as if they were sent as one.
    authorization = ", ".join(dict.fromkeys(request.headers.getlist("authorization"))) or None
    return await access.identify(authorization, needed.scope_str)


ForImages = Annotated[Caller, Security(identify, scopes=["images"])]
ForJobs = Annotated[Caller, Security(identify, scopes=["jobs"])]
ForModels = Annotated[Caller, Security(identify, scopes=["models"])]
