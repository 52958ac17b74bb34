"""What a hand-over costs: bytes, copies and milliseconds of a packet's way to another process and back.

Packets are those of Qwen-Image: a latent of 64 channels for each 16x16 pixels, and embeddings of 3584 numbers a token
of a prompt and of a negative prompt. Each goes from one process to another, and comes back, in these ways:

- packet: written and read in one process, which is the engine's own part of a hand-over;
- serve: as the router's hops do, a call of a replica that reads the packet and writes it anew;
- serve-store: the same without RAY_SERVE_USE_GRPC_BY_DEFAULT, so that Serve sends packets by Ray's object store;
- store: Ray's object store, the packet's bytes put by one process and got by the other;
- grpc: the bytes alone, as a message of gRPC's Python library.

Both processes are on one node; on two nodes of this machine; or on two nodes in network namespaces that a link of
limited rate and delay joins, which takes root. Times are medians. Copies are counted by `bench.serving.copies` in both
processes, and given as copied bytes over the bytes that were handed over, there and back. What Ray's daemons copy from
node to node, and the kernel for sockets, is not in them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import grpc
import ray
import torch
import yaml
from ray import serve

from bench.machine import machine_name
from bench.results import add_output_argument, output_directory, write_json
from bench.serving.copies import build_counter, copied_bytes
from cluster.local import running_head
from deployments.attempts import attempt
from deployments.messages import Call, Hop, ImageRequest, PacketReply, Route, Wire
from stages.packet import LatentPacket
from stages.plan import Plan

ROOT = Path(__file__).parents[2]
CLUSTERS = ("one node", "two nodes", "two namespaces")
Way = Literal["packet", "serve", "serve-store", "store", "grpc"]
WAYS: tuple[Way, ...] = get_args(Way)

_CHANNELS, _PATCH, _WIDTH = 64, 16, 3584  # of Qwen-Image
_NEGATIVE_TOKENS = 64
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_WARM_UP = 3  # hand-overs that are not counted
_TIMEOUT_S = 120.0
_NEAR, _FAR, _ADDRESSES = "handover-near", "handover-far", ("10.199.83.1", "10.199.83.2")
_STORE_BYTES = 256 * 1024 * 1024
_HEAD = {"num_cpus": 1, "object_store_memory": _STORE_BYTES}
_UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
_METHOD = "/handover/echo"


class Unavailable(Exception):
    """Something that this machine cannot do; the message says what it lacks."""


@dataclass(frozen=True)
class Form:
    """A packet's form: the image's width and height in pixels, the tensors' dtype, and the prompt's tokens."""

    size: int
    dtype: str
    text_tokens: int

    def make(self) -> LatentPacket:
        """Make such a packet, of random numbers."""
        rows = self.size // _PATCH

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape).to(_DTYPES[self.dtype])

        return LatentPacket(
            model="qwen-image",
            request_id="handover",
            image_index=0,
            seed=0,
            grid=(rows, rows),
            sigma=0.5,
            position=1,
            step=0,
            text_tokens=self.text_tokens,
            avoids=True,
            spans=(),
            latent=draw(rows * rows, _CHANNELS),
            prompt_embeds=draw(self.text_tokens, _WIDTH),
            negative_embeds=draw(_NEGATIVE_TOKENS, _WIDTH),
        )


@dataclass(frozen=True)
class Row:
    """A result.

    Attributes:
        cluster: where the two processes were.
        way: how the packet was handed over.
        form: the packet's form.
        bytes: length of the packet.
        milliseconds: there and back, median.
        copies: copies of the packet in memory, of each hand-over; None where no C compiler makes a counter.
    """

    cluster: str
    way: str
    form: Form
    bytes: int
    milliseconds: float
    copies: float | None


def _call() -> Call:
    stage = {"name": "base", "sigma_start": 1.0, "sigma_end": 0.0, "steps": 1}
    image = ImageRequest(
        request_id="handover", image_index=0, seed=0, size="512x512", prompt="a star", negative_prompt="blue"
    )
    route = Route(
        image=image,
        plan=Plan.model_validate({"stages": [stage]}),
        preset=None,
        format="png",
        quality=90,
        partial_images=0,
        deadline=2.0**40,
    )
    return Call(route=route, hop=Hop(deployment="Far", end=1))


class Reader:
    """A replica that computes nothing: it reads a packet and writes it anew."""

    async def run(self, call: str, packet: bytes) -> Wire:
        """Do what `deployments.replica.StageReplica.run` does around its work."""
        Call.from_json(call)
        return PacketReply().to_json(), LatentPacket.from_bytes(packet).to_bytes()

    async def copied(self) -> int | None:
        """Return the bytes that this process has copied."""
        return copied_bytes()


class Far:
    """The process that packets are handed to, but for Serve's replica."""

    async def listen(self, host: str) -> str:
        """Start a server of gRPC that answers with what it gets; return its address."""
        echo = grpc.unary_unary_rpc_method_handler(self._echo)  # without serializers, messages are bytes
        self._server = grpc.aio.server(options=_UNLIMITED)
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("handover", {"echo": echo})])
        port = self._server.add_insecure_port(f"{host}:0")
        await self._server.start()
        return f"{host}:{port}"

    @staticmethod
    async def _echo(data: bytes, context: Any) -> bytes:
        return data

    async def fetch(self, put: list[Any]) -> list[Any]:
        """Get the bytes of a reference from the object store, and put them there anew."""
        return [ray.put(await put[0])]

    async def copied(self) -> int | None:
        """Return the bytes that this process has copied."""
        return copied_bytes()


class Near:
    """The process that hands packets over and gets them back."""

    async def measure(
        self, way: Way, form: Form, repeats: int, far: Any, address: str
    ) -> tuple[int, float, float | None]:
        """Hand a packet over so many times; return its length, median seconds, and copies of each hand-over."""
        packet = form.make()
        data = packet.to_bytes()
        call = _call()
        replica = None
        if way in ("serve", "serve-store"):
            replica = serve.get_deployment_handle("Reader", "handover")
        async with grpc.aio.insecure_channel(address, options=_UNLIMITED) as channel:
            echo = channel.unary_unary(_METHOD)

            async def hand_over() -> bytes:
                if way == "packet":
                    LatentPacket.from_bytes(packet.to_bytes())
                    return data
                if replica:
                    return (await attempt(replica, call, data, _TIMEOUT_S, lambda reply, packet: None))[1]
                if way == "store":
                    (answer,) = await far.fetch.remote([ray.put(data)])
                    got: bytes = await answer
                    return got
                answered: bytes = await echo(data, timeout=_TIMEOUT_S)
                return answered

            async def copied() -> int | None:
                there = await (replica.copied.remote() if replica else far.copied.remote())
                here = copied_bytes()
                return None if here is None or there is None else here + there

            for _ in range(_WARM_UP):
                if await hand_over() != data:
                    raise RuntimeError(f"{way}: another packet came back")
            before, seconds = await copied(), []
            for _ in range(repeats):
                start = time.perf_counter()
                await hand_over()
                seconds.append(time.perf_counter() - start)
            after = await copied()
        ways = 1 if way == "packet" else 2
        copies = None if before is None or after is None else (after - before) / (ways * repeats * len(data))
        return len(data), statistics.median(seconds), copies


def measure(cluster: str, address: str, forms: list[Form], repeats: int, counter: Path | None) -> Iterator[Row]:
    """Measure every way on a cluster whose nodes have the resources `near` and `far`."""
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    variables = dict(config["applications"][0]["runtime_env"]["env_vars"])  # as the engine's replicas have them
    variables |= {"OMP_NUM_THREADS": "1", **({"LD_PRELOAD": str(counter)} if counter else {})}
    environment = {"env_vars": variables}
    by_store = {"env_vars": {**variables, "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0"}}
    ray.init(address, namespace="serve", log_to_driver=False)
    try:
        serve.start(proxy_location="Disabled")
        options = {"num_cpus": 0, "resources": {"far": 0.1}, "runtime_env": environment}
        serve.run(serve.deployment(Reader, ray_actor_options=options).bind(), name="handover", route_prefix=None)
        far = ray.remote(**options)(Far).remote()
        near, near_by_store = (
            ray.remote(num_cpus=0, resources={"near": 0.1}, runtime_env=each)(Near).remote()
            for each in (environment, by_store)
        )
        host = next(node["NodeManagerAddress"] for node in ray.nodes() if "far" in node["Resources"])
        listening = ray.get(far.listen.remote(host), timeout=_TIMEOUT_S)
        for form in forms:
            for way in WAYS:
                sender = near_by_store if way == "serve-store" else near
                measured = sender.measure.remote(way, form, repeats, far, listening)
                length, seconds, copies = ray.get(measured, timeout=10 * _TIMEOUT_S)
                yield Row(cluster, way, form, length, 1000 * seconds, copies)
    finally:
        serve.shutdown()
        ray.shutdown()


@contextmanager
def one_node() -> Iterator[str]:
    """Run a cluster of one node; its address."""
    with running_head(**_HEAD, resources={"near": 1, "far": 1}) as cluster:
        yield cluster.address


@contextmanager
def two_nodes() -> Iterator[str]:
    """Run a cluster of two nodes, which have the machine's network in common; its address."""
    with running_head(**_HEAD, resources={"near": 1}) as cluster:
        cluster.add_node(num_cpus=1, num_gpus=0, resources={"far": 1}, object_store_memory=_STORE_BYTES)
        yield cluster.address


@contextmanager
def two_namespaces(rate: str, delay: str) -> Iterator[str]:
    """Run a cluster of two nodes, each in a network namespace of its own; its address.

    Args:
        rate: of the link between them each way, as tc writes it.
        delay: of what goes over the link each way, likewise; `0` for none.

    Raises:
        Unavailable: this user or the kernel cannot do that.
    """
    with ExitStack() as undo:
        _root("ip", "netns", "add", _FAR)
        undo.callback(_root, "ip", "netns", "delete", _FAR)
        _root("ip", "link", "add", _NEAR, "type", "veth", "peer", "name", _FAR, "netns", _FAR)  # goes with the other
        inside = ("ip", "netns", "exec", _FAR)
        for prefix, link, address in (((), _NEAR, _ADDRESSES[0]), (inside, _FAR, _ADDRESSES[1])):
            _root(*prefix, "ip", "address", "add", f"{address}/24", "dev", link)
            _root(*prefix, "ip", "link", "set", link, "up")
            shape = ("netem", "delay", delay, "rate", rate) if delay != "0" else _bucket(rate)
            _root(*prefix, "tc", "qdisc", "add", "dev", link, "root", *shape)
        _root(*inside, "ip", "link", "set", "lo", "up")
        with running_head(**_HEAD, node_ip_address=_ADDRESSES[0], resources={"near": 1}) as cluster:
            command = [
                *inside, sys.executable, "-m", "ray.scripts.scripts", "start", "--block",
                f"--address={cluster.address}",
                f"--node-ip-address={_ADDRESSES[1]}", "--num-cpus=1", "--num-gpus=0", '--resources={"far": 1}',
                f"--object-store-memory={_STORE_BYTES}",
            ]  # fmt: skip
            node = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                _wait_for(cluster.address, "far", node)
                yield cluster.address
            finally:
                node.terminate()
                node.wait(timeout=60)


def _wait_for(address: str, resource: str, node: subprocess.Popen[bytes]) -> None:
    """Wait until a cluster has a resource, whose node is being started."""
    ray.init(address, log_to_driver=False)
    try:
        deadline = time.monotonic() + _TIMEOUT_S
        while resource not in ray.cluster_resources():
            if node.poll() is not None or time.monotonic() > deadline:
                raise Unavailable(f"the second node did not join {address}")
            time.sleep(0.2)
    finally:
        ray.shutdown()


def _bucket(rate: str) -> tuple[str, ...]:
    return ("tbf", "rate", rate, "burst", "256kb", "latency", "400ms")


def _root(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except FileNotFoundError as error:
        raise Unavailable(f"there is no {command[0]}") from error
    if done.returncode:
        raise Unavailable(f"`{' '.join(command)}`: {done.stderr.strip()}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048], help="width and height in pixels")
    parser.add_argument("--text-tokens", type=int, nargs="+", default=[64, 512], help="of the prompt")
    parser.add_argument("--clusters", choices=CLUSTERS, nargs="+", default=CLUSTERS)
    parser.add_argument("--repeats", type=int, default=20, help="hand-overs of each packet")
    parser.add_argument("--rate", default="1gbit", help="of the link between two namespaces, as tc writes it")
    parser.add_argument("--delay", default="1ms", help="of the same, each way; 0 where the kernel has no netem")
    add_output_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print a line for each result, and write `handover.json`."""
    forms = [
        Form(size, dtype, tokens) for size in arguments.sizes for dtype in _DTYPES for tokens in arguments.text_tokens
    ]
    starts: dict[str, Callable[[], AbstractContextManager[str]]] = {
        "one node": one_node,
        "two nodes": two_nodes,
        "two namespaces": lambda: two_namespaces(arguments.rate, arguments.delay),
    }
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    os.environ.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory() as directory:
        counter = build_counter(Path(directory))
        for cluster in arguments.clusters:
            try:
                with starts[cluster]() as address:
                    for row in measure(cluster, address, forms, arguments.repeats, counter):
                        print(_line(row), flush=True)
                        rows.append(row)
            except Unavailable as error:
                skipped[cluster] = str(error)
                print(f"{cluster}: skipped: {error}", flush=True)
    link = {"rate": arguments.rate, "delay": arguments.delay}
    content = {"machine": machine_name(), "link": link, "skipped": skipped, "rows": [asdict(row) for row in rows]}
    write_json(output_directory(arguments) / "handover.json", content)


def _line(row: Row) -> str:
    copies = "unknown" if row.copies is None else f"{row.copies:.1f}"
    return (
        f"{row.cluster}, {row.way}: {row.form.size} pixels, {row.form.dtype}, {row.form.text_tokens} tokens: "
        f"{row.bytes / 1e6:.2f} MB, {row.milliseconds:.1f} ms, {copies} copies"
    )
