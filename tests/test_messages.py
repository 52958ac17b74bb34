"""What travels between deployments: plain data of one version."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from collections.abc import Callable

import pytest
from plans import PLANS

from deployments.messages import (
    VERSION,
    Call,
    Hop,
    ImageReply,
    ImageRequest,
    MessageError,
    PacketReply,
    RefusalReply,
    Reply,
    Route,
    StalledReply,
    StepReply,
    read_reply,
)
from stages.spans import Span
from stages.wire import OtherVersion

CALL = Call(
    route=Route(
        image=ImageRequest(
            request_id="r", image_index=1, seed=2**32 - 1, size="128x64", prompt="a ring\n\u2603", negative_prompt=None
        ),
        plan=PLANS["hybrid"],
        preset=None,
        format="webp",
        quality=80,
        partial_images=2,
        deadline=1234567890.123456,
        pools={"base": ("h100", "mi300")},
    ),
    hop=Hop(deployment="Base", end=3, work=4, previews=(1, 3), checkpoints=(2,)),
)
REPLIES = [
    PacketReply(),
    StepReply(kind="preview", step=3),
    StepReply(kind="checkpoint", step=10),
    StalledReply(begun=True),
    ImageReply(
        index=0, seed=3, text_tokens=5, image_tokens=64, spans=(Span("encode", 1.25, 2.5), Span("base", 2, 3, 4.5))
    ),
    RefusalReply(code="not_finite", message="the image is not finite after stage base"),
]


def test_a_call_is_json_and_comes_back_whole() -> None:
    data = CALL.to_json()
    assert json.loads(data)["version"] == list(VERSION)
    assert Call.from_json(data) == CALL


@pytest.mark.parametrize("reply", REPLIES, ids=lambda reply: reply.kind)
def test_a_reply_comes_back_whole(reply: Reply) -> None:
    assert read_reply(reply.to_json()) == reply


def test_another_version_is_refused_in_a_sentence() -> None:
    newer = json.dumps(json.loads(CALL.to_json()) | {"version": [VERSION.major + 1, 0], "colour": "new"})
    sentence = f"^a message of version {VERSION.major + 1}.0, where version {VERSION} is read$"
    with pytest.raises(OtherVersion, match=sentence):
        Call.from_json(newer)
    with pytest.raises(OtherVersion, match=sentence):
        read_reply(newer)
    for broken in ("{}", "[]", "", CALL.to_json().replace('"route"', '"rout"')):
        with pytest.raises(MessageError, match="of another shape than version"):
            Call.from_json(broken)


def test_what_computes_nothing_loads_neither_torch_nor_diffusers() -> None:
    """Configuration, plans, messages, router, ingress, proxy and simulator, one after the other in one process."""
    modules = (
        "stages.config", "stages.plan", "deployments.messages", "deployments.settings", "deployments.check",
        "deployments.router", "deployments.http.ingress", "deployments.http.front", "deployments.launch",
        "deployments.app", "deployments.__main__", "deployments.jobs.jobs", "cluster.simulate",
        "cluster.plan", "cluster.check", "cluster.render",
    )  # fmt: skip
    program = (
        "import importlib, sys\n"
        "for module in sys.argv[1:]:\n"
        "    importlib.import_module(module)\n"
        "    print(module, *({'torch', 'diffusers', 'transformers', 'peft'} & sys.modules.keys()))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program, *modules], capture_output=True, text=True, check=True, timeout=120
    )
    assert loaded.stdout.splitlines() == list(modules)


def test_errors_do_not_quote_messages_since_they_are_logged() -> None:
    version = [VERSION.major, VERSION.minor]
    image = {"prompt": "zanzibar", "request_id": 4}
    wrong: list[tuple[Callable[[str], object], str]] = [
        (Call.from_json, json.dumps({"version": version, "route": {"image": image, "plan": "zanzibar"}, "hop": 1})),
        (Call.from_json, json.dumps({"version": version, "route": image, "hop": image})),
        (Call.from_json, '"zanzibar'),
        (Call.from_json, json.dumps({"version": "zanzibar", **image})),
        (read_reply, json.dumps({"version": version, "kind": "image", "index": "zanzibar"})),
    ]
    for read, text in wrong:
        with pytest.raises(MessageError) as refused:
            read(text)
        assert "zanzibar" not in "".join(traceback.format_exception(refused.value))
