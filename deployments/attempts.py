"""One attempt at a hop: a call to a replica, and how it can be lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Literal

import grpc
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments import ray_internals
from deployments.messages import Call, FinalReply, ImageReply, PacketReply, RefusalReply, StepReply, read_reply
from stages.wire import OtherVersion

Reason = Literal["died", "stalled", "hung", "refused"]


class Lost(Exception):
    """An attempt that no replica will end, so that the hop is to be tried again.

    Attributes:
        deployment: where it was.
        reason: `died` if its replica did while it had the image, `stalled` if the replica's device did, `hung` if it
            took too long, which may have been in a queue, and `refused` if nothing was begun or no replica is left.
    """

    def __init__(self, deployment: str, reason: Reason) -> None:
        super().__init__(deployment, reason)
        self.deployment, self.reason = deployment, reason


async def attempt(
    replica: DeploymentHandle,
    call: Call,
    packet: bytes,
    limit_s: float | None,
    on_step: Callable[[StepReply, bytes], object],
) -> tuple[PacketReply | ImageReply | RefusalReply, bytes]:
    """Call a replica; cancelling this cancels the replica's work.

    Args:
        replica: handle of the hop's deployment.
        call: the call.
        packet: the packet to begin with.
        limit_s: seconds after which to give up, or None to leave that to the caller.
        on_step: called with the replies during the hop, and the packets beside them.

    Returns:
        The last reply, and what came beside it.

    Raises:
        Lost: it is to be tried again.
        grpc.RpcError: the packet is longer than what Serve was told to send.
    """
    send = _stream if call.hop.previews or call.hop.checkpoints or call.hop.tells else _call
    try:
        async with asyncio.timeout(limit_s) as limit:
            reply, data = await send(replica, call, packet, on_step)
    except (RayActorError, grpc.RpcError) as error:
        if isinstance(error, grpc.RpcError) and error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise  # the packet is longer than RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH, wherever it goes
        raise Lost(call.hop.deployment, "died") from error
    except DeploymentUnavailableError as error:
        raise Lost(call.hop.deployment, "refused") from error
    except TimeoutError as error:
        if not limit.expired():
            raise
        # Serve holds the call while no replica is left, and gives it to the next one.
        raise Lost(call.hop.deployment, "refused" if ray_internals.lacks_replicas(replica) else "hung") from error
    except OtherVersion as error:
        reply, data = RefusalReply(code="other_version", message=str(error)), b""
    if reply.kind == "stalled":
        raise Lost(call.hop.deployment, "stalled" if reply.begun else "refused")
    return reply, data


async def _call(
    replica: DeploymentHandle, call: Call, packet: bytes, on_step: Callable[[StepReply, bytes], object]
) -> tuple[FinalReply, bytes]:
    response = replica.run.remote(call.to_json(), packet)
    try:
        header, data = await response
        reply = read_reply(header)
        if isinstance(reply, StepReply):
            raise RuntimeError(f"{call.hop.deployment} ended with a {reply.kind}")
        return reply, data
    finally:
        response.cancel()  # no effect if it is done


async def _stream(
    replica: DeploymentHandle, call: Call, packet: bytes, on_step: Callable[[StepReply, bytes], object]
) -> tuple[FinalReply, bytes]:
    results = replica.options(stream=True).stream.remote(call.to_json(), packet)
    try:
        async for header, data in results:
            reply = read_reply(header)
            if not isinstance(reply, StepReply):
                return reply, data
            on_step(reply, data)
        raise RuntimeError(f"{call.hop.deployment} ended without a reply")
    finally:
        results.cancel()
