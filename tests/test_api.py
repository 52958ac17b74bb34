"""What requests may say and how errors name what they may not: schemas, resolution and error shapes, without Ray."""

from __future__ import annotations

import json
import pickle
import time
from dataclasses import replace
from typing import Any

import pytest
from openai.types import image_generate_params
from ray.exceptions import RayTaskError
from ray.serve.exceptions import BackPressureError
from starlette.datastructures import Headers

from deployments.http.errors import APIError
from deployments.http.front import received
from deployments.http.resolve import Job, Offer, resolve
from deployments.http.schemas import ImagesRequest
from deployments.messages import RefusalReply
from deployments.settings import SERVED_STAGES, ServedStage
from stages.config import ModelConfig
from stages.image import MAX_SEED
from stages.plan import PlanError

STAGE = {"name": "base", "sigma_start": 1, "sigma_end": 0, "steps": 4}


@pytest.fixture(scope="module")
def offer(config: ModelConfig) -> Offer:
    pools: dict[ServedStage, tuple[str, ...]] = {**dict.fromkeys(SERVED_STAGES, ("cpu",)), "base": ("h100", "mi300")}
    return Offer(config, blocks=6, default_plan="hybrid", max_images=10, max_timeout_s=120.0, pools=pools)


def read(**fields: Any) -> ImagesRequest:
    return ImagesRequest.read(json.dumps({"prompt": "a ring", **fields}).encode())


def refusal(body: bytes | dict[str, Any], offer: Offer | None = None) -> dict[str, Any]:
    """The error that a body ends in."""
    data = body if isinstance(body, bytes) else json.dumps({"prompt": "a ring", **body}).encode()

    def accept() -> None:
        request = ImagesRequest.read(data)
        assert offer, request
        resolve(request, offer)

    with pytest.raises(APIError) as caught:
        accept()
    assert caught.value.status == 400
    error: dict[str, Any] = caught.value.body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


def test_every_field_of_openais_schema_is_known() -> None:
    known = set(ImagesRequest.model_fields)
    assert set(image_generate_params.ImageGenerateParamsStreaming.__annotations__) <= known


@pytest.mark.parametrize("field", sorted(set(ImagesRequest.model_fields) - {"prompt"}))
def test_null_is_absent(field: str, offer: Offer) -> None:
    assert read(**{field: None}) == read()
    assert resolve(read(**{field: None}, seed=1) if field != "seed" else read(seed=1), offer) == resolve(
        read(seed=1), offer
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"quality": "auto"},
        {"quality": "standard"},
        {"style": "vivid"},
        {"background": "auto"},
        {"background": "opaque"},
        {"moderation": "auto"},
        {"moderation": "low"},
        {"response_format": "b64_json"},
        {"safety_identifier": "0" * 64},
        {"user": "somebody"},
        {"size": "auto"},
        {"output_compression": 0},
        {"output_compression": 100},
        {"guidance_scale": 3},
    ],
)
def test_values_that_ask_for_nothing_special_are_accepted(fields: dict[str, Any], offer: Offer) -> None:
    assert isinstance(resolve(read(**fields), offer), Job)


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"background": "transparent"}, "'auto' or 'opaque'"),
        ({"response_format": "url"}, "'b64_json'"),
        ({"quality": "hd"}, "'auto' or 'standard'"),
        ({"style": "natural"}, "'vivid'"),
        ({"moderation": "none"}, "'auto' or 'low'"),
        ({"output_format": "gif"}, "'png', 'jpeg' or 'webp'"),
        ({"complexity": "high"}, "null"),
        ({"frame_count": 4}, "null"),
        ({"frame_duration_ms": 100}, "null"),
        ({"svg": {"model": "x"}}, "null"),
        ({"output_compression": 101}, "less than or equal to 100"),
        ({"partial_images": 4}, "less than or equal to 3"),
        ({"size": "100x100"}, "auto, 128x128"),
        ({"plan": "fastest"}, "base, cached, distilled, hybrid, or stages"),
        ({"n": 11}, "1 to 10"),
        ({"seed": MAX_SEED + 1}, f"less than or equal to {MAX_SEED}"),
        ({"seed": MAX_SEED, "n": 2}, f"at most {MAX_SEED - 1}"),
        ({"guidance_scale": 21}, "less than or equal to 20"),
        ({"timeout_s": 0}, "greater than 0"),
        ({"timeout_s": 121}, "at most 120"),
    ],
)
def test_what_cannot_be_done_is_refused_with_what_can(fields: dict[str, Any], allowed: str, offer: Offer) -> None:
    error = refusal(fields, offer)
    assert (error["param"], error["code"]) == (next(iter(fields)), "invalid_value")
    assert allowed in error["message"]


def test_a_model_answers_to_its_aliases(offer: Offer) -> None:
    known = replace(offer, model=offer.model.model_copy(update={"aliases": ("gpt-image-1",)}))
    for name in ("scenes", "gpt-image-1"):
        assert isinstance(resolve(read(model=name), known), Job)
    with pytest.raises(APIError, match="model must be 'scenes' or 'gpt-image-1', not 'dall-e-3'"):
        resolve(read(model="dall-e-3"), known)


def test_time_that_a_request_may_take_is_its_own_or_the_servers(offer: Offer) -> None:
    assert resolve(read(), offer).timeout_s == offer.max_timeout_s
    assert resolve(read(timeout_s=0.5), offer).timeout_s == 0.5


@pytest.mark.parametrize(
    "fields",
    [
        {"n": True},
        {"n": "2"},
        {"n": 2.5},
        {"plan": ""},
        {"plan": 3},
        {"plan": []},
        {"stream": "true"},
        {"stream": 1},
        {"prompt": 7},
        {"prompt": None},
        {"prompt": ["a ring"]},
        {"seed": "1"},
        {"size": 128},
        {"user": 7},
        {"guidance_scale": "3"},
        {"guidance_scale": True},
        {"output_compression": "80"},
    ],
)
def test_types_are_not_guessed(fields: dict[str, Any], offer: Offer) -> None:
    error = refusal(fields, offer)
    assert (error["param"], error["code"]) == (next(iter(fields)), "invalid_value")


@pytest.mark.parametrize("field", ["user", "safety_identifier", "model", "size", "plan"])
def test_texts_that_identify_are_bounded(field: str, offer: Offer) -> None:
    error = refusal({field: "x" * 257}, offer)
    assert error["param"] == field
    assert "at most 256 characters" in error["message"]
    name = refusal({"plan": {"name": "x" * 257, "stages": [STAGE]}}, offer)
    assert name["param"] == "plan.name"


CACHES: dict[str, dict[str, object]] = {
    "first_block": {"threshold": 0.1},
    "taylorseer": {"interval": 2},
    "teacache": {"threshold": 0.1},
    "magcache": {"threshold": 0.1, "ratios": [1.0]},
    "seacache": {"threshold": 0.1},
}


@pytest.mark.parametrize("kind", CACHES)
def test_errors_name_the_field_of_a_cache(kind: str, offer: Offer) -> None:
    required = CACHES[kind]
    cached = {**STAGE, "cache": {"kind": kind, **required}}
    assert resolve(read(plan={"stages": [cached]}), offer).plan.stages[0].cache
    for field in required:
        wrong = {**STAGE, "cache": {"kind": kind, **required, field: "x"}}
        assert refusal({"plan": {"stages": [wrong]}})["param"] == f"plan.stages.0.cache.{field}"
        missing = {**STAGE, "cache": {"kind": kind, **{key: required[key] for key in required if key != field}}}
        error = refusal({"plan": {"stages": [missing]}})
        assert (error["param"], error["code"]) == (f"plan.stages.0.cache.{field}", "missing_required_parameter")
    unknown = refusal({"plan": {"stages": [{**STAGE, "cache": {"kind": kind, **required, kind: 1}}]}})
    assert (unknown["param"], unknown["code"]) == (f"plan.stages.0.cache.{kind}", "unknown_parameter")


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"name": "refiner"}, "name", "'base', 'bridge' or 'distilled'"),
        ({"steps": 0}, "steps", "greater than or equal to 1"),
        ({"steps": "4"}, "steps", "valid integer"),
        ({"steps": True}, "steps", "valid integer"),
        ({"shift": 1000}, "shift", "'dynamic' or Input should be less than or equal to 100"),
        ({"shift": "static"}, "shift", "'dynamic' or Input should be a valid number"),
        ({"cache": 3}, "cache", "object"),
        ({"cache": {"kind": "none"}}, "cache", "'first_block', 'taylorseer', 'teacache', 'magcache', 'seacache'"),
        ({"cache": {}}, "cache", "'kind'"),
        ({"cache": {"kind": "magcache", "threshold": 0.1, "ratios": [1, 0]}}, "cache.ratios.1", "greater than 0"),
        ({"attention_guidance": {"tau": 0}}, "attention_guidance.tau", "greater than or equal to 1"),
        ({"skip_blocks": [1, -1]}, "skip_blocks.1", "greater than or equal to 0"),
        ({"skip_blocks": [6]}, "skip_blocks", "below 6"),
        ({"skip_blocks": list(range(6))}, "skip_blocks", "must leave one of 6"),
        ({"skip_blocks": [0], "cache": {"kind": "first_block", "threshold": 0.1}}, "skip_blocks", "must not have 0"),
        ({"adapter": "turbo"}, "adapter", "must be one of ['bridge', 'distilled', 'finish']"),
        ({"adapter": "distilled", "guidance_scale": 3}, "guidance_scale", "must be 1"),
        ({"reads_negative": True}, "reads_negative", "needs an adapter"),
        ({"sigma_start": 0.9}, "sigma_start", "must be 1 (pure noise)"),
        ({"sigma_end": 0.1}, "sigma_end", "must be 0 (clean)"),
        ({"sigma_end": 1}, "sigma_end", "must be below sigma_start"),
        ({"inline": 1}, "inline", "not permitted"),
    ],
)
def test_errors_name_the_field_of_a_stage(change: dict[str, Any], param: str, message: str, offer: Offer) -> None:
    error = refusal({"plan": {"stages": [{**STAGE, **change}]}}, offer)
    assert error["param"] == f"plan.stages.0.{param}"
    assert message in error["message"]


def test_fallback_plans_make_the_same_images_by_other_plans(offer: Offer) -> None:
    asked = resolve(read(plan="base", guidance_scale=2, fallback_plans=["cached", "distilled"], n=2), offer)
    assert [job.preset for job in asked.fallbacks] == ["cached", "distilled"]
    assert {(job.seed, job.n, job.size) for job in asked.fallbacks} == {(asked.seed, 2, asked.size)}
    assert asked.fallbacks[0].plan == offer.model.plan("cached", asked.size).with_guidance(2)
    assert asked.fallbacks[1].plan == offer.model.plan("distilled", asked.size)  # which is not guided
    assert asked.fallbacks[1].warnings[-1] == "the server is loaded: plan distilled in place of base"
    assert resolve(read(fallback_plans=None, priority=None), offer).fallbacks == ()


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"fallback_plans": ["cached", "fastest"]}, "fallback_plans.1", "must be one of base"),
        ({"fallback_plans": "cached"}, "fallback_plans", "valid array"),
        ({"fallback_plans": [1]}, "fallback_plans.0", "valid string"),
        ({"fallback_plans": ["cached"] * 9}, "fallback_plans", "at most 8"),
        ({"priority": "urgent"}, "priority", "'interactive' or 'batch'"),
    ],
)
def test_wrong_priorities_and_fallbacks_are_named(
    fields: dict[str, Any], param: str, message: str, offer: Offer
) -> None:
    error = refusal(fields, offer)
    assert (error["param"], error["code"]) == (param, "invalid_value")
    assert message in error["message"]


@pytest.mark.parametrize(
    ("plan", "param"),
    [
        ({}, "plan.stages"),
        ({"stages": []}, "plan.stages"),
        ({"stages": [STAGE], "name": 3}, "plan.name"),
        ({"stages": [STAGE], "plan": 3}, "plan.plan"),
        ({"stages": [{**STAGE, "sigma_end": 0.5}, {**STAGE, "sigma_start": 0.4}]}, "plan.stages.1.sigma_start"),
        ({"stages": [{**STAGE, "name": "distilled", "sigma_end": 0.5}, {**STAGE, "sigma_start": 0.5}]},
         "plan.stages.1.name"),
    ],
)  # fmt: skip
def test_errors_name_the_field_of_a_plan(plan: dict[str, Any], param: str) -> None:
    assert refusal({"plan": plan})["param"] == param


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (b'{"prompt": "a ring" 3}', "line 1 column 21"),
        (b'{"prompt": "a ring",\n "n": }', "line 2 column 7"),
        (b"", "line 1 column 0"),
        (b'{"prompt": "\xff"}', "line 1 column 13"),
        (b'{"prompt": "\\ud800"}', "line 1 column"),
        (b"prompt=a+ring", "line 1 column 1"),
        (b"[" * 100_000, "line 1 column"),
    ],
)
def test_broken_json_says_where_and_blames_no_field(body: bytes, where: str) -> None:
    error = refusal(body)
    assert (error["param"], error["code"]) == (None, "invalid_json")
    assert where in error["message"]


@pytest.mark.parametrize("body", [b"[]", b'"a ring"', b"null", b"7"])
def test_a_body_that_is_no_object_blames_no_field(body: bytes) -> None:
    error = refusal(body)
    assert (error["param"], error["message"]) == (None, "Input should be an object")


def test_numbers_are_finite() -> None:
    for number in (b"NaN", b"Infinity", b"1e999"):
        assert refusal(b'{"prompt": "a ring", "guidance_scale": %b}' % number)["param"] == "guidance_scale"


def test_a_message_repeats_no_more_than_it_must() -> None:
    error = refusal({"x" * 100_000: 1})
    assert (error["code"], len(error["param"])) == ("unknown_parameter", 1000)
    tag = refusal({"plan": {"stages": [{**STAGE, "cache": {"kind": "x" * 100_000}}]}})
    assert len(tag["message"]) == 1000


def test_own_plans_have_no_presets_name_whatever_they_are_called(offer: Offer) -> None:
    own = resolve(read(plan={"name": "hybrid", "stages": [STAGE]}), offer)
    assert (own.preset, own.plan.name) == (None, "hybrid")
    assert resolve(read(plan="base", guidance_scale=2), offer).preset == "base"
    assert resolve(read(), offer).preset == "hybrid"


@pytest.mark.parametrize(
    ("choice", "left"),
    [
        ({"only": ["mi300"]}, ("mi300",)),
        ({"only": ["mi300", "h100"]}, ("h100", "mi300")),
        ({"ignore": ["mi300"]}, ("h100",)),
        ({"only": ["mi300", "h100"], "ignore": ["h100"]}, ("mi300",)),
        ({"only": None, "ignore": None}, ("h100", "mi300")),
    ],
)
def test_a_stage_may_run_on_the_pools_that_a_request_leaves_it(
    choice: dict[str, Any], left: tuple[str, ...], offer: Offer
) -> None:
    (route,) = resolve(read(pools={"base": choice}), offer).routes("id", 10.0)
    assert route.pools == {"base": left}
    assert resolve(read(), offer).routes("id", 10.0)[0].pools == {}


@pytest.mark.parametrize(
    ("pools", "param", "message"),
    [
        (
            {"tail": {"only": ["cpu"]}},
            "pools.tail",
            "must be one of the stages encode, base, bridge, distilled, decode",
        ),
        ({"base": {"only": ["cpu"]}}, "pools.base.only", "that base stands on, h100, mi300; not 'cpu'"),
        ({"decode": {"ignore": ["tpu"]}}, "pools.decode.ignore", "that decode stands on, cpu; not 'tpu'"),
        ({"decode": {"ignore": ["cpu"]}}, "pools.decode", "must leave one of cpu"),
        ({"base": {"only": ["h100"], "ignore": ["h100"]}}, "pools.base", "must leave one of h100, mi300"),
        ({"base": {"only": []}}, "pools.base.only", "at least 1 item"),
        ({"base": {"only": "h100"}}, "pools.base.only", "valid array"),
        ({"base": {"only": [7]}}, "pools.base.only.0", "valid string"),
        ({"base": {"prefer": ["h100"]}}, "pools.base.prefer", "not permitted"),
        ({"base": "h100"}, "pools.base", "object"),
        ([], "pools", "object"),
    ],
)
def test_errors_name_the_stage_and_its_pools(pools: Any, param: str, message: str, offer: Offer) -> None:
    error = refusal({"pools": pools}, offer)
    assert error["param"] == param
    assert message in error["message"]


def test_images_of_a_request_have_seeds_one_after_another(offer: Offer) -> None:
    routes = resolve(read(n=3, seed=7, user="a", safety_identifier=""), offer).routes("id", 10.0)
    assert [(route.image.image_index, route.image.seed) for route in routes] == [(0, 7), (1, 8), (2, 9)]
    assert {route.deadline for route in routes} == {10.0}


def test_a_seed_is_drawn_where_none_is_given(offer: Offer) -> None:
    seeds = {resolve(read(n=10), offer).seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed <= MAX_SEED - 9 for seed in seeds)


def test_a_failure_of_several_images_is_told_as_the_first_one() -> None:
    too_long = ExceptionGroup("images", [APIError(400, "prompt_too_long", "long", "prompt")])
    assert APIError.from_failure(too_long).code == "prompt_too_long"
    long = RefusalReply(code="prompt_too_long", message="long", param="negative_prompt")
    refused = APIError.from_refusal(long, "TextEncoder")
    assert (refused.status, refused.body["error"]["param"]) == (400, "negative_prompt")
    other = APIError.from_refusal(RefusalReply(code="other_version", message="2.0, not 1.0"), "Base")
    assert (other.status, other.code) == (500, "other_version")
    assert str(other) == "Base and the router are of versions that do not go together: 2.0, not 1.0"
    assert APIError.from_failure(TimeoutError()).status == 504
    full = APIError.from_failure(BackPressureError(num_queued_requests=3, max_queued_requests=3))
    assert (full.status, full.code, full.headers) == (503, "overloaded", {"Retry-After": "1"})
    wrapped = RayTaskError("run", "traceback", TimeoutError())
    assert APIError.from_failure(wrapped).status == 504
    assert APIError.from_failure(KeyError("secret")).body["error"]["message"].startswith("the request failed")


def test_plan_errors_cross_processes() -> None:
    error = pickle.loads(pickle.dumps(PlanError("stages.0.steps", "must be even")))
    assert (str(error), error.field) == ("stages.0.steps must be even", "stages.0.steps")


def test_a_request_was_received_when_its_front_says_and_never_later_than_now() -> None:
    before = time.time()
    assert received(Headers({"x-front-received": str(before - 3)})) == before - 3
    for value in ("nan", "inf", "1e18", "t=5", ""):
        assert before <= received(Headers({"x-front-received": value})) <= time.time()
    assert before <= received(Headers()) <= time.time()


def test_a_plan_with_a_stage_that_no_deployment_runs_is_refused(offer: Offer) -> None:
    without = replace(offer, pools={stage: pools for stage, pools in offer.pools.items() if stage != "bridge"})
    assert resolve(read(plan={"stages": [STAGE]}), without).plan.stages[0].name == "base"
    bridged = [{**STAGE, "sigma_end": 0.5}, {**STAGE, "name": "bridge", "sigma_start": 0.5, "adapter": "bridge"}]
    error = refusal({"plan": {"stages": bridged}}, without)
    assert error["param"] == "plan.stages.1.name"
    assert "must be one of base, distilled, which this server runs, not 'bridge'" in error["message"]
