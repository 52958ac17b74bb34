"""The real application over HTTP, started by the command of the README on the small model."""

from __future__ import annotations

import asyncio
import base64
import re
import socket
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from PIL import Image
from pydantic import ValidationError
from served import deployment_statuses, images_of, log_lines, pixels

from bench.serving.servers import Running
from bench.serving.trace import chrome_trace, most_busy
from deployments.settings import Settings
from stages.image import ImageFormat
from stages.pipeline import Pipeline

DEPLOYMENTS = {"Ingress", "TextEncoder", "Base", "Bridge", "Distilled", "VAEDecoder"}


def test_serve_run_starts_six_healthy_deployments(url: str) -> None:
    assert httpx.get(f"{url}/readyz", timeout=10).json() == {
        "status": "ready",
        "replicas": {**dict.fromkeys(DEPLOYMENTS, 1), "Ingress": 2},
        "stages": {
            "encode": {"TextEncoder": 1},
            "base": {"Base": 1},
            "bridge": {"Bridge": 1},
            "distilled": {"Distilled": 1},
            "decode": {"VAEDecoder": 1},
        },
    }
    assert httpx.get(f"{url}/healthz", timeout=10).json() == {"status": "ok"}
    assert deployment_statuses() == dict.fromkeys(DEPLOYMENTS, "HEALTHY")


def test_openai_client_gets_four_images_for_four_seeds_and_one_image_twice_for_one_seed(client: OpenAI) -> None:
    prompt = "a yellow square left of a purple ring"
    response = client.images.generate(model="scenes", prompt=prompt, n=4, size="128x128", extra_body={"seed": 7})
    images = [pixels(image) for image in images_of(response)]
    assert [image["seed"] for image in response.model_dump()["data"]] == [7, 8, 9, 10]
    assert all(image.shape == (128, 128, 3) for image in images)
    for index, image in enumerate(images):
        assert all(np.abs(image - other).mean() > 1 for other in images[index + 1 :])
    again = client.images.generate(prompt=prompt, size="128x128", extra_body={"seed": 9})
    assert np.abs(pixels(images_of(again)[0]) - images[2]).max() <= 1


def test_reply_carries_seed_timings_nfe_and_megapixels(client: OpenAI) -> None:
    response = client.images.generate(prompt="a red star", n=2, size="256x256").model_dump()
    assert response["plan"] == "hybrid"
    assert response["nfe"] == 14
    assert response["megapixels"] == pytest.approx(2 * 256 * 256 / 1e6)
    for image in response["data"]:
        stages = [timing["stage"] for timing in image["timings"]]
        assert stages == ["encode", "base", "base", "base", "bridge", "distilled", "decode"]
        assert all(timing["seconds"] > 0 for timing in image["timings"])
        assert image["nfe"] == 7
        assert pixels(image).shape == (256, 256, 3)
    assert response["seed"] == response["data"][0]["seed"]


@pytest.mark.parametrize("size", ["128x128", "256x256"])
def test_served_image_is_the_one_that_the_stages_make_in_one_process(
    client: OpenAI, pipeline: Pipeline, size: Literal["128x128", "256x256"]
) -> None:
    for plan in ("hybrid", "distilled"):
        extra = {"seed": 3, "plan": plan, "negative_prompt": "blue"}
        served = client.images.generate(prompt="a striped heart", size=size, extra_body=extra)
        (local,) = pipeline.run(plan, "a striped heart", negative_prompt="blue", seeds=(3,), size=size)
        assert np.abs(pixels(images_of(served)[0]) - np.asarray(local.image).astype(int)).max() <= 1


@pytest.mark.parametrize(("output_format", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_output_formats(client: OpenAI, output_format: ImageFormat, kind: str) -> None:
    extra = {"plan": "distilled", "seed": 1}
    response = client.images.generate(prompt="a ring", output_format=output_format, extra_body=extra)
    (image,) = images_of(response)
    assert image.b64_json
    assert Image.open(BytesIO(base64.b64decode(image.b64_json))).format == kind


def test_stream_sends_partial_images_then_the_image(client: OpenAI) -> None:
    events = list(client.images.generate(prompt="a red star", stream=True, partial_images=2, extra_body={"seed": 5}))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    assert [event.partial_image_index for event in partial] == [0, 1]
    (whole,) = images_of(client.images.generate(prompt="a red star", extra_body={"seed": 5}))
    assert np.abs(pixels(events[-1]) - pixels(whole)).max() <= 1
    assert np.abs(pixels(events[0]) - pixels(whole)).mean() > 0.5


def test_words_that_the_model_does_not_know_are_told(client: OpenAI) -> None:
    extra = {"plan": "distilled", "negative_prompt": "a Dog!"}
    told = [
        "prompt has words that the model does not know: photo, cat",
        "negative_prompt has words that the model does not know: dog",
    ]
    assert client.images.generate(prompt="A photo of a cat", extra_body=extra).model_dump()["warnings"] == told
    partial, done = client.images.generate(
        prompt="A photo of a cat", stream=True, partial_images=1, extra_body={**extra, "plan": "hybrid"}
    )
    assert "warnings" not in partial.model_dump()
    assert done.model_dump()["warnings"] == told
    known = client.images.generate(prompt="A RED circle!", extra_body={"plan": "distilled", "negative_prompt": "blue"})
    assert "warnings" not in known.model_dump()


def test_a_plan_whose_bridge_names_an_unknown_adapter_is_refused(client: OpenAI) -> None:
    stages = [
        {"name": "base", "sigma_start": 1, "sigma_end": 0.75, "steps": 1},
        {"name": "bridge", "sigma_start": 0.75, "sigma_end": 0, "steps": 1, "adapter": "turbo"},
    ]
    with pytest.raises(BadRequestError, match=r"adapter must be one of .*, not 'turbo'"):
        client.images.generate(prompt="a ring", extra_body={"plan": {"stages": stages}})


def test_inline_plan_and_guidance_scale(client: OpenAI) -> None:
    plan = {
        "stages": [
            {"name": "base", "sigma_start": 1, "sigma_end": 0.75, "steps": 2, "guidance_scale": 3},
            {"name": "distilled", "sigma_start": 0.75, "sigma_end": 0, "steps": 2, "shift": 3, "adapter": "distilled"},
        ]
    }
    response = client.images.generate(prompt="a ring", extra_body={"plan": plan, "guidance_scale": 1})
    assert response.model_dump()["nfe"] == 4
    assert client.images.generate(prompt="a ring", extra_body={"plan": plan}).model_dump()["nfe"] == 6


def test_models_and_plans_are_listed(url: str, client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["scenes"]
    plans = httpx.get(f"{url}/v1/plans", timeout=10).json()
    assert {(plan["name"], *plan["sizes"]): (plan["nfe"], plan["work"]) for plan in plans["data"]} == {
        ("base", "128x128"): (100, 100), ("base", "256x256"): (100, 43),
        ("cached", "128x128"): (100, 100), ("cached", "256x256"): (100, 43),
        ("distilled", "128x128"): (4, 4), ("distilled", "256x256"): (4, 1.75),
        ("hybrid", "128x128"): (7, 7), ("hybrid", "256x256"): (7, 2.5),
    }  # fmt: skip
    assert plans["default"] == "hybrid"


@pytest.mark.parametrize(
    ("extra", "param", "code"),
    [
        ({"size": "100x100"}, "size", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"plan": "distilled", "guidance_scale": 3}, "guidance_scale", "invalid_value"),
        ({"steps": 4}, "steps", "unknown_parameter"),
        ({"prompt": "red star " * 200}, "prompt", "prompt_too_long"),
        ({"plan": {"stages": [{"name": "base"}]}}, "plan.stages.0.sigma_start", "missing_required_parameter"),
    ],
)
def test_bad_input_is_a_400_that_names_the_field(url: str, extra: dict[str, Any], param: str, code: str) -> None:
    answer = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a ring", **extra}, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert (error["param"], error["code"]) == (param, code)
    assert param.split(".")[-1] in error["message"]


def test_openai_client_raises_its_own_errors(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="size must be one of auto, 128x128"):
        client.images.generate(prompt="a ring", size="100x100")
    with pytest.raises(NotFoundError, match="model must be 'scenes'"):
        client.images.generate(prompt="a ring", model="dall-e-3")


def test_missing_prompt_and_unknown_path_have_the_apis_shape(url: str) -> None:
    missing = httpx.post(f"{url}/v1/images/generations", json={}, timeout=10)
    assert (missing.status_code, missing.json()["error"]["code"]) == (400, "missing_required_parameter")
    unknown = httpx.get(f"{url}/v1/nothing", timeout=10)
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")


def test_other_methods_are_refused_with_those_that_are_allowed(url: str) -> None:
    answer = httpx.get(f"{url}/v1/images/generations", timeout=10)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded", "text/plain"])
def test_a_body_must_say_that_it_is_json(url: str, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    answer = httpx.post(f"{url}/v1/images/generations", content=b'{"prompt": "a ring"}', headers=headers, timeout=10)
    assert answer.status_code == 415
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_content_type", None)
    told = f", not {content_type}" if content_type else "; there is none"
    assert error["message"] == f"Content-Type must be application/json{told}"


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_is_read_no_further_than_its_bound(url: str, announced: bool) -> None:
    def chunks() -> Iterator[bytes]:
        yield from [b" " * 2**16] * 64

    body = b" " * 2**22 if announced else chunks()
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{url}/v1/images/generations", content=body, headers=headers, timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert answer.json()["error"]["message"] == "the body must be at most 1048576 bytes"


def test_the_api_is_described(url: str) -> None:
    document = httpx.get(f"{url}/openapi.json", timeout=10).json()
    content = document["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]
    assert {"prompt", "negative_prompt", "quality"} <= set(content["schema"]["properties"])
    assert "Plan" in document["components"]["schemas"]


def test_headers_that_cannot_be_read_are_a_400(url: str) -> None:
    answer = httpx.get(f"{url}/v1/models", headers={b"serve_multiplexed_model_id": b"\xe9\xff"}, timeout=10)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "headers must be in UTF-8")


def test_headers_of_clients_name_no_request_and_set_no_clock(server: Running, url: str) -> None:
    """Proxies before this one may set such ones: nginx, for instance, when it had the request."""
    for value in ("t=1795869346.123", "1795869346123", "nan", "0"):
        headers = {"X-Request-Start": value, "X-Front-Received": value, "X-Request-ID": "first\tsecond" + "x" * 1000}
        body = {"prompt": "a cross", "plan": "distilled"}
        answer = httpx.post(f"{url}/v1/images/generations", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
    assert not log_lines(server, "Ingress", "first\tsecond")


def test_a_path_with_a_slash_more_is_unknown(url: str) -> None:
    answer = httpx.get(f"{url}/v1/plans/", timeout=10)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_a_client_that_leaves_while_it_sends_is_no_error_of_the_server(server: Running, url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\nContent-Type: application/json"
    for _ in range(3):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head + b'\r\n\r\n{"prompt"')
            time.sleep(0.2)
    assert httpx.get(f"{url}/v1/models", timeout=10).status_code == 200
    assert not log_lines(server, "Ingress", "ClientDisconnect")
    assert "Traceback" not in server.log.read_text()


def test_the_description_is_a_page_that_needs_no_other_server(url: str) -> None:
    page = httpx.get(f"{url}/docs", timeout=10).text
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", page)
    script, style = (re.search(rf"""["'](/[^"']+\.{kind})["']""", page) for kind in ("js", "css"))
    for asset in (script, style):
        assert asset
        assert httpx.get(f"{url}{asset[1]}", timeout=10).raise_for_status().content


def test_an_image_that_cannot_be_done_in_time_is_given_up_at_its_deadline(url: str) -> None:
    """In the shape of the API, in a stream too; at once where it is known what an image takes."""
    httpx.post(f"{url}/v1/images/generations", json={"prompt": "a ring"}, timeout=60)
    body = {"prompt": "a ring", "plan": "base", "size": "256x256", "timeout_s": 0.05}
    answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    streamed = httpx.post(f"{url}/v1/images/generations", json={**body, "stream": True}, timeout=60)
    assert (streamed.status_code, streamed.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert "s, more than the 0.05 s that the request has" in streamed.json()["error"]["message"]


def test_a_priority_and_fallback_plans_are_accepted(url: str) -> None:
    body = {"prompt": "a ring", "plan": "hybrid", "priority": "batch", "fallback_plans": ["distilled"]}
    answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)
    assert answer.raise_for_status().json()["plan"] == "hybrid"  # nothing else is there


INLINE = {"stages": [{"name": "base", "sigma_start": 1, "sigma_end": 0, "steps": 1}]}


def test_a_clients_text_is_one_escaped_line_of_the_log(server: Running, url: str) -> None:
    body = {"prompt": "a ring", "seed": 4711, "user": "eve\nINFO forged \x1b[31m", "plan": {**INLINE, "name": "a\nb"}}
    httpx.post(f"{url}/v1/images/generations", json=body, timeout=60).raise_for_status()
    asked, made = log_lines(server, "Ingress", "seed 4711")
    assert r"by plan inline, seed 4711, user 'eve\nINFO forged \x1b[31m'" in asked
    assert "plan inline, seed 4711, 1 evaluations" in made


def test_a_prompt_that_is_too_long_is_refused_without_a_traceback(server: Running, url: str) -> None:
    body = {"prompt": "red star " * 200, "plan": "base"}
    answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)
    assert answer.json()["error"]["code"] == "prompt_too_long"
    for deployment in ("Ingress", "TextEncoder"):
        assert not log_lines(server, deployment, "Traceback")
        assert not log_lines(server, deployment, "PromptTooLong")


def test_metrics_have_a_closed_set_of_plans_and_outcomes(server: Running, url: str) -> None:
    for name in ("mine", "yours"):
        body = {"prompt": "a ring", "plan": {**INLINE, "name": name}}
        httpx.post(f"{url}/v1/images/generations", json=body, timeout=60).raise_for_status()
    httpx.post(f"{url}/v1/images/generations", json={"prompt": "red star " * 200, "plan": "base"}, timeout=60)

    deadline = time.monotonic() + 120
    counted: set[tuple[str, str]] = set()
    while not {("inline", "done"), ("base", "refused")} <= counted and time.monotonic() < deadline:
        lines = server.metrics("ray_images_total{")
        counted = {(tag("plan", line), tag("outcome", line)) for line in lines}
        time.sleep(1)
    assert {("inline", "done"), ("base", "refused")} <= counted
    assert {plan for plan, _ in counted} <= {"inline", "base", "cached", "distilled", "hybrid"}
    assert {outcome for _, outcome in counted} <= {"done", "refused", "cancelled", "failed", "not_finite"}


def tag(name: str, line: str) -> str:
    """A metric's label."""
    return line.partition(f'{name}="')[2].partition('"')[0]


def test_concurrent_requests_keep_several_stages_busy_at_once(url: str) -> None:
    """They come one after the other: those that come together also stay together, in one batch, stage by stage."""

    async def send() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as session:

            async def one(seed: int) -> httpx.Response:
                await asyncio.sleep(0.05 * seed)
                return await session.post("/v1/images/generations", json={"prompt": "a red star", "seed": seed})

            answers = await asyncio.gather(*(one(seed) for seed in range(16)))
        return [image for answer in answers for image in answer.raise_for_status().json()["data"]]

    images = asyncio.run(send())
    assert len(images) == 16
    assert most_busy(images) >= 3
    assert len(chrome_trace(images)["traceEvents"]) == 5 + 16 * 7  # base comes in three parts


def test_client_that_goes_away_stops_its_work(server: Running) -> None:
    """In the deployment that is at it, before its next step: see `test_batching`."""
    images = 4
    body = {"prompt": "a ring", "plan": "base", "size": "256x256", "n": images}
    headers = {"X-Request-ID": "went-away"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/images/generations", json=body, headers=headers, timeout=1)
    deadline = time.monotonic() + 120
    while not (lines := log_lines(server, "Base", "went-away", "cancelled by the caller")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert len(lines) <= images
    assert not log_lines(server, "Base", "went-away", "evaluations")


def test_a_stage_in_parts_is_one_call(server: Running) -> None:
    body = {"prompt": "a ring", "plan": "hybrid"}
    headers = {"X-Request-ID": "counted"}
    httpx.post(f"{server.url}/v1/images/generations", json=body, headers=headers, timeout=120).raise_for_status()
    calls = {name: log_lines(server, name, "counted", "evaluations") for name in ("Base", "Bridge", "Distilled")}
    assert {name: len(lines) for name, lines in calls.items()} == {"Base": 1, "Bridge": 1, "Distilled": 1}
    assert {name: line.count("evaluations") for name, (line,) in calls.items()} == {
        "Base": 3, "Bridge": 1, "Distilled": 1
    }  # fmt: skip


def test_wrong_settings_stop_the_start_and_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="max_imagez"):
        Settings.model_validate({"model": "configs/scenes.yaml", "max_imagez": 3})
    with pytest.raises(ValidationError, match="default_plan must be one of"):
        Settings.model_validate({"model": "configs/scenes.yaml", "default_plan": "fastest"})
    for key, value in (
        ("request_timeout_s", float("inf")),
        ("request_timeout_s", float("nan")),
        ("request_timeout_s", 0),
        ("max_images", 0),
        ("max_images", 65),
        ("max_images", True),
        ("max_images", "4"),
        ("checkpoint_steps", 0),
        ("checkpoint_steps", 2.5),
        ("hang_factor", 1.0),
        ("hang_floor_s", 0),
        ("stall_timeout_s", float("inf")),
    ):
        with pytest.raises(ValidationError, match=key):
            Settings.model_validate({"model": "configs/scenes.yaml", key: value})
    with pytest.raises(ValidationError, match="stall_timeout_s must be below hang_floor_s, 20, not 30"):
        Settings.model_validate({"model": "configs/scenes.yaml", "hang_floor_s": 20})
    assert Settings.model_validate({"model": "configs/scenes.yaml", "checkpoint_steps": None}).checkpoint_steps is None
    ends, middle = {"stages": ["encode", "decode"]}, {"stages": ["base", "bridge"]}
    last, twice = {"stages": ["distilled"]}, {"stages": ["base", "base", "bridge"]}
    every = "encode, base, bridge, distilled, decode"
    for placement, message in (
        (
            {"A": ends, "B": middle},
            f"must run each of {every}, which the plans of configs/scenes.yaml need; it lacks distilled",
        ),
        (
            {"A": ends, "B": twice, "C": last},
            "(?s)placement.B.stages.*base is there twice",
        ),
        ({"A": ends, "B": middle, "C": {**last, "fuse": "lora"}}, "placement.C.fuse must be one of"),
        ({"A": {**ends, "fuse": "bridge"}}, "(?s)placement.A.*fuse must go with one of the stages base, bridge"),
        ({"A.B": ends}, "(?s)placement.*A.B.*should match pattern"),
        ({"A": ends, "Ingress": {"stages": ["base", "bridge", "distilled"]}}, "placement.Ingress must have another"),
        ({"A": {"stages": ["base"], "max_batch_tokens": 2**25}}, "(?s)placement.A.max_batch_tokens"),
        ({"A": {"stages": ["refiner"]}}, r"(?s)placement.A.stages.0.*'encode', 'base', 'bridge', 'distilled' or"),
        ({"A": {**ends, "pool": "abacus"}}, r"(?s)A.pool must be one of \['cpu'\] of .*pools.yaml, not 'abacus'"),
    ):
        with pytest.raises(ValidationError, match=message):
            Settings.model_validate({"model": "configs/scenes.yaml", "placement": placement})
    bad = tmp_path / "model.yaml"
    bad.write_text("name: x\nsource: y\nsizes: [100x100]\n")
    with pytest.raises(ValidationError, match="multiples of 16"):
        Settings.model_validate({"model": str(bad)})
