"""Rows in one forward pass, and one stage of a plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from plans import PLANS
from reference import predict_velocity

from backends import Backend
from stages.caches import make_cache
from stages.config import ModelConfig
from stages.denoise import ImageState, join_negative, step
from stages.families.qwen_image.transformer import QwenImageTransformer
from stages.latents import draw_noise
from stages.loading import load_adapters, load_transformer
from stages.network import Network
from stages.packet import LatentPacket
from stages.pipeline import Pipeline
from stages.plan import AttentionGuidanceSpec, Plan, StageName, StageSpec, TaylorSeerSpec, TeaCacheSpec
from stages.sigmas import stage_sigmas

PROMPTS = ["a red circle", "two small green squares left of a large blue triangle on a white background", " "]
GRID = (4, 6)
AVOIDING = AttentionGuidanceSpec(scale=4.0, tau=2.5, alpha=0.5)

# In float32, which orders its sums by the shape of the batch.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def embeds(pipeline: Pipeline) -> list[torch.Tensor]:
    return [pipeline.encoder.encode(prompt) for prompt in PROMPTS]


def make_row(
    embeds: list[torch.Tensor], prompt: int, negative: int | None, scale: float, sigmas: list[float], seed: int
) -> ImageState:
    return ImageState(
        latent=draw_noise(seed, 16, GRID),
        sigmas=torch.tensor(sigmas),
        grid=GRID,
        prompt_embeds=embeds[prompt],
        negative_embeds=None if negative is None else embeds[negative],
        guidance_scale=scale,
    )


def varied_rows(embeds: list[torch.Tensor]) -> list[ImageState]:
    return [
        make_row(embeds, 0, 2, 4.0, [1.0, 0.8, 0.5], seed=1),
        make_row(embeds, 1, None, 1.0, [0.7, 0.2, 0.1], seed=2),
        make_row(embeds, 2, 1, 2.5, [0.3, 0.1, 0.0], seed=3),
        make_row(embeds, 0, None, 1.0, [0.02, 0.01, 0.0], seed=4),
        replace(make_row(embeds, 0, 1, 1.0, [0.6, 0.3, 0.0], seed=5), attention_guidance=AVOIDING),
    ]


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())


def plan_of(steps: int, *, sigma_end: float = 0.0, guidance_scale: float = 1.0) -> Plan:
    """The base model over the whole range, or down to `sigma_end` and in one further step to the end."""
    base = StageSpec(name="base", sigma_start=1.0, sigma_end=sigma_end, steps=steps, guidance_scale=guidance_scale)
    if sigma_end == 0.0:
        return Plan(stages=(base,))
    rest = StageSpec(name="distilled", sigma_start=sigma_end, sigma_end=0.0, steps=1, adapter="distilled")
    return Plan(stages=(base, rest))


def ends_with(
    *,
    guidance_scale: float = 1.0,
    adapter: str | None = None,
    reads_negative: bool = False,
    attention_guidance: AttentionGuidanceSpec | None = None,
) -> Plan:
    """A step of the base model, and one of a bridge like this to the end."""
    base = StageSpec(name="base", sigma_start=1.0, sigma_end=0.9, steps=1)
    bridge = StageSpec(
        name="bridge",
        sigma_start=0.9,
        sigma_end=0.0,
        steps=1,
        guidance_scale=guidance_scale,
        adapter=adapter,
        reads_negative=reads_negative,
        attention_guidance=attention_guidance,
    )
    return Plan(stages=(base, bridge))


def negative_embeds(packet: LatentPacket) -> torch.Tensor:
    """(length, width), of a packet that has a negative prompt."""
    assert packet.negative_embeds is not None
    return packet.negative_embeds


@pytest.fixture
def packet(pipeline: Pipeline) -> LatentPacket:
    return pipeline.encoder.begin("test", 0, 7, "64x64", PROMPTS[0], PROMPTS[1])


@pytest.mark.parametrize("cached", [False, True])
def test_rows_together_equal_rows_alone(network: Network, embeds: list[torch.Tensor], cached: bool) -> None:
    assert len({len(embed) for embed in embeds}) == 3
    together, alone = varied_rows(embeds), varied_rows(embeds)
    if cached:  # one of five rows, and never at its first two steps: all go through the blocks, that one on its own way
        together[0].cache = make_cache(TaylorSeerSpec(interval=2), steps=2)
    for _ in range(2):
        step(network, together)
        for row in alone:
            step(network, [row])
    for joint, single, start in zip(together, alone, varied_rows(embeds), strict=True):
        assert joint.index == single.index == 2
        assert joint.done
        # Guidance adds up the errors of its two evaluations, by their weights.
        bound = TOLERANCE * (2 * single.guidance_scale - 1)
        assert difference(joint.latent, single.latent) < bound
        assert difference(joint.denoised, single.denoised) < bound
        assert difference(joint.denoised, start.latent) > 1e-3


def test_a_rows_velocity_depends_on_prompt_noise_level_and_grid(
    transformer: QwenImageTransformer2DModel, embeds: list[torch.Tensor]
) -> None:
    """So that the comparisons of this file can fail."""
    latent = draw_noise(0, 16, (4, 6))[None]

    def velocity(sigma: float, prompt: int, grid: tuple[int, int]) -> torch.Tensor:
        with torch.inference_mode():
            return predict_velocity(transformer, latent, torch.tensor([sigma]), [embeds[prompt]], grid)

    reference = velocity(0.8, 0, (4, 6))
    assert reference.shape == latent.shape
    assert reference.dtype == torch.float32
    assert difference(reference, velocity(0.8, 1, (4, 6))) > 1e-3
    assert difference(reference, velocity(0.7, 0, (4, 6))) > 1e-3
    assert difference(reference, velocity(0.8, 0, (6, 4))) > 1e-3


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("fused", [None, "distilled"])
def test_rows_of_several_adapters_share_a_pass_and_are_what_peft_computes_one_by_one(
    config: ModelConfig,
    backend: Backend,
    fused: str | None,
    embeds: list[torch.Tensor],
    blocks_run: list[int],
    scale: float,
) -> None:
    """In float64, where rounding needs no tolerance: fusing an adapter and taking it away again has its own."""
    transformer = load_transformer(config, backend).module.double()
    ours = QwenImageTransformer(load_transformer(config, backend).module.double())
    network = Network(ours, load_adapters(config, transformer), fused)
    for name, adapter in config.adapters.items():
        state = QwenImagePipeline.lora_state_dict(adapter.source)
        QwenImagePipeline.load_lora_into_transformer(state, transformer, adapter_name=name)
    transformer.double()
    adapters = ["bridge", None, "distilled", "distilled"]
    rows = varied_rows(embeds)[1:2] * 4
    queries = [
        replace(row.model_input(), adapter=adapter, adapter_scale=scale)
        for row, adapter in zip(rows, adapters, strict=True)
    ]
    with torch.inference_mode():
        answers = network.evaluate(queries, GRID)
    assert len(blocks_run) == 1
    for query, answer in zip(queries, answers, strict=True):
        if query.adapter is None:
            transformer.disable_lora()
        else:
            transformer.set_adapters(query.adapter, scale)
            transformer.enable_lora()
        with torch.inference_mode():
            alone = predict_velocity(transformer, query.latent[None], torch.tensor([query.sigma]), [query.embeds], GRID)
        assert difference(answer.velocity, alone[0]) < 1e-7 * alone.abs().max()
    assert difference(answers[0].velocity, answers[1].velocity) > 1e-3
    assert difference(answers[0].velocity, answers[2].velocity) > 1e-3


def test_guidance_has_the_direction_of_the_combination_and_the_norm_of_the_positive() -> None:
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn((2, 5, 64), generator=generator)
    guided = QwenImageTransformer.guide(positive, negative, 4.0)
    torch.testing.assert_close(guided.norm(dim=-1), positive.norm(dim=-1))
    combined = 4 * positive - 3 * negative
    torch.testing.assert_close(torch.cosine_similarity(guided, combined), torch.ones(5))
    torch.testing.assert_close(QwenImageTransformer.guide(positive, negative, 1.0), positive)


def test_an_unguided_step_is_eulers_and_foresees_the_clean_latent(
    network: Network, transformer: QwenImageTransformer2DModel, embeds: list[torch.Tensor]
) -> None:
    row = make_row(embeds, 1, None, 1.0, [0.7, 0.2, 0.0], seed=2)
    start = row.latent.clone()
    with torch.inference_mode():
        velocity = predict_velocity(transformer, start[None], torch.tensor([0.7]), [embeds[1]], GRID)[0]
    step(network, [row])
    assert difference(row.denoised, start - 0.7 * velocity) < 1e-6
    assert difference(row.latent, start - 0.5 * velocity) < 1e-6
    assert (row.index, row.done) == (1, False)
    assert row.sigma == pytest.approx(0.2)


def test_preview_of_a_step_is_the_clean_latent_that_it_foresees(
    pipeline: Pipeline, transformer: QwenImageTransformer2DModel, packet: LatentPacket
) -> None:
    plan = plan_of(1, sigma_end=0.4, guidance_scale=3.0)
    with torch.inference_mode():
        positive, negative = (
            predict_velocity(transformer, packet.latent[None], torch.tensor([1.0]), [embed], packet.grid)[0]
            for embed in (packet.prompt_embeds, negative_embeds(packet))
        )
    velocity = QwenImageTransformer.guide(positive, negative, 3.0)
    task = pipeline.denoiser.begin(packet, plan)
    pipeline.denoiser.step([task])
    preview, after = task.preview(), task.finish()
    assert difference(preview.latent, packet.latent - 1.0 * velocity) < TOLERANCE
    assert difference(after.latent, packet.latent - 0.6 * velocity) < TOLERANCE
    assert difference(preview.latent, after.latent) > 1e-2
    assert preview.latent.dtype == packet.latent.dtype
    assert [span.nfe for span in preview.spans] == [0, 2]
    assert (preview.sigma, len(preview.prompt_embeds), preview.negative_embeds) == (0.0, 0, None)


def test_preview_of_the_last_step_is_its_result(pipeline: Pipeline, packet: LatentPacket) -> None:
    task = pipeline.denoiser.begin(packet, plan_of(3))
    while not task.state.done:
        pipeline.denoiser.step([task])
    assert difference(task.preview().latent, task.finish().latent) < 1e-6


def test_packets_record_what_was_done_to_them(pipeline: Pipeline, packet: LatentPacket) -> None:
    plan = PLANS["hybrid"]
    history = [packet]
    for _ in plan.stages:
        history += pipeline.denoiser.denoise(history[-1:], plan)
    assert [after.sigma for after in history] == [1.0, 0.965, 0.92, 0.75, 0.5, 0.0]
    assert [after.position for after in history] == [0, 1, 2, 3, 4, 5]
    spans = history[-1].spans
    done = [("encode", 0), ("base", 1), ("base", 2), ("base", 2), ("bridge", 1), ("distilled", 1)]
    assert [(span.stage, span.nfe) for span in spans] == done
    assert all(span.start <= span.end for span in spans)
    assert [after.negative_embeds is None for after in history] == [False, False, False, False, False, True]
    assert [len(after.prompt_embeds) for after in history] == [len(packet.prompt_embeds)] * 5 + [0]
    assert (history[-1].request_id, history[-1].seed, history[-1].grid) == ("test", 7, (4, 4))


def test_negative_prompt_stays_as_long_as_a_later_stage_is_guided(pipeline: Pipeline, packet: LatentPacket) -> None:
    plan = ends_with(guidance_scale=2.0)
    (between,) = pipeline.denoiser.denoise([packet], plan)
    assert torch.equal(negative_embeds(between), negative_embeds(packet))
    (after,) = pipeline.denoiser.denoise([between], plan)
    assert after.negative_embeds is None
    assert after.spans[-1].nfe == 2


READS_NEGATIVE = ends_with(adapter="bridge", reads_negative=True)
AVOIDS = ends_with(attention_guidance=AVOIDING)


def test_a_stage_that_reads_the_negative_prompt_evaluates_once_with_both(
    pipeline: Pipeline, network: Network, packet: LatentPacket
) -> None:
    (between,) = pipeline.denoiser.denoise([packet], READS_NEGATIVE)
    (after,) = pipeline.denoiser.denoise([between], READS_NEGATIVE)
    assert (after.spans[-1].nfe, after.negative_embeds) == (1, None)

    negative = negative_embeds(packet)
    text = join_negative(packet.prompt_embeds, negative)
    torch.testing.assert_close(text[len(packet.prompt_embeds) :], -negative)
    sigmas = torch.tensor([0.9, 0.0])
    row = ImageState(between.latent, sigmas, packet.grid, text, adapter="bridge")
    step(network, [row])
    assert difference(after.latent, row.latent) < TOLERANCE
    deaf = ImageState(between.latent, sigmas, packet.grid, packet.prompt_embeds, adapter="bridge")
    step(network, [deaf])
    assert difference(after.latent, deaf.latent) > 1e-2


def test_a_stage_with_attention_guidance_evaluates_once_with_both_prompts(
    pipeline: Pipeline, network: Network, packet: LatentPacket
) -> None:
    (between,) = pipeline.denoiser.denoise([packet], AVOIDS)
    (after,) = pipeline.denoiser.denoise([between], AVOIDS)
    assert (after.spans[-1].nfe, after.negative_embeds) == (1, None)

    row = ImageState(between.latent, torch.tensor([0.9, 0.0]), packet.grid, packet.prompt_embeds)
    deaf, alike = replace(row), replace(row, negative_embeds=packet.prompt_embeds, attention_guidance=AVOIDING)
    avoiding = replace(row, negative_embeds=packet.negative_embeds, attention_guidance=AVOIDING)
    for each in (deaf, alike, avoiding):
        step(network, [each])
    assert difference(after.latent, avoiding.latent) < TOLERANCE
    assert difference(after.latent, deaf.latent) > 1e-2
    assert difference(alike.latent, deaf.latent) < TOLERANCE  # nothing leads away from the prompt itself


def test_attention_is_guided_away_from_negative_prompts_that_were_asked_for_alone(
    pipeline: Pipeline, network: Network
) -> None:
    empty = pipeline.encoder.begin("test", 0, 7, "64x64", PROMPTS[0], " ")
    assert not empty.avoids
    assert empty.negative_embeds is not None  # for classifier-free guidance
    (between,) = pipeline.denoiser.denoise([empty], AVOIDS)
    assert between.negative_embeds is None
    (after,) = pipeline.denoiser.denoise([between], AVOIDS)
    row = ImageState(between.latent, torch.tensor([0.9, 0.0]), empty.grid, empty.prompt_embeds)
    step(network, [row])
    assert difference(after.latent, row.latent) < TOLERANCE


@pytest.mark.parametrize(
    ("plan", "stage"),
    [(plan_of(1, guidance_scale=4.0), "base"), (READS_NEGATIVE, "bridge"), (AVOIDS, "bridge")],
    ids=["guided", "reads", "avoids"],
)
def test_a_packet_without_the_negative_prompt_that_its_stage_needs_is_refused(
    pipeline: Pipeline, packet: LatentPacket, plan: Plan, stage: StageName
) -> None:
    position = [spec.name for spec in plan.stages].index(stage)
    lacking = replace(packet, negative_embeds=None, position=position, sigma=plan.stages[position].sigma_start)
    with pytest.raises(ValueError, match=f"image 0 of test has no negative prompt for {stage}"):
        pipeline.denoiser.denoise([lacking], plan)


@pytest.mark.parametrize("position", [0, 1])
def test_a_packet_at_another_noise_level_is_refused(
    pipeline: Pipeline, packet: LatentPacket, blocks_run: list[int], position: int
) -> None:
    packets = [packet, packet]
    packets[position] = replace(packet, sigma=0.9)
    with pytest.raises(ValueError, match=r"packet at sigma 0\.9 cannot enter base at 1\.0"):
        pipeline.denoiser.denoise(packets, plan_of(3))
    assert blocks_run == []


def test_packets_of_several_grids_are_refused_even_with_as_many_tokens(
    pipeline: Pipeline, packet: LatentPacket, blocks_run: list[int]
) -> None:
    with pytest.raises(ValueError, match=r"packets of grids \(4, 4\) and \(2, 8\) cannot share a batch"):
        pipeline.denoiser.denoise([packet, replace(packet, grid=(2, 8))], plan_of(3))
    assert blocks_run == []


def test_packets_at_several_stages_are_each_taken_through_their_own(pipeline: Pipeline, packet: LatentPacket) -> None:
    plan = PLANS["hybrid"]
    (after,) = pipeline.denoiser.denoise([packet], plan)
    together = pipeline.denoiser.denoise([after, packet], plan)
    for single, joint in zip((after, packet), together, strict=True):
        (alone,) = pipeline.denoiser.denoise([single], plan)
        assert (joint.sigma, joint.position) == (alone.sigma, alone.position)
        assert difference(joint.latent, alone.latent) < TOLERANCE * alone.latent.abs().max()


def test_teacache_skips_while_what_enters_the_blocks_changes_little(
    transformer: QwenImageTransformer2DModel,
    scheduler: FlowMatchEulerDiscreteScheduler,
    pipeline: Pipeline,
    packet: LatentPacket,
) -> None:
    """Against the method's definition, written out over the whole model."""
    steps, threshold, coefficients = 12, 0.2, (2.0, 0.5, 0.01)
    cache = TeaCacheSpec(threshold=threshold, coefficients=coefficients)
    stage = plan_of(steps).stages[0].model_copy(update={"cache": cache})
    (done,) = pipeline.denoiser.denoise([packet], Plan(stages=(stage,)))

    seen: dict[str, torch.Tensor] = {}
    blocks = transformer.transformer_blocks
    handles = [
        blocks[0].attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(modulated=kwargs["hidden_states"]), with_kwargs=True
        ),
        transformer.img_in.register_forward_hook(lambda module, args, output: seen.update(entered=output)),
        blocks[-1].register_forward_hook(lambda module, args, output: seen.update(left=output[1])),
        transformer.norm_out.register_forward_pre_hook(lambda module, args: seen.update(temb=args[1])),
    ]
    latent, sigmas = packet.latent[None], stage_sigmas(stage, scheduler, len(packet.latent))
    before = added = None
    change, evaluated = 0.0, 0
    with torch.inference_mode():
        for step_index in range(steps):
            sigma, after = sigmas[step_index], sigmas[step_index + 1]
            velocity = predict_velocity(transformer, latent, sigma[None], [packet.prompt_embeds], packet.grid)
            modulated = seen["modulated"]
            if before is not None:
                relative = float((modulated - before).abs().mean() / before.abs().mean())
                change += float(np.polyval(coefficients, relative))
            if before is None or change >= threshold or step_index == steps - 1:
                change, added, evaluated = 0.0, seen["left"] - seen["entered"], evaluated + 1
            else:
                assert added is not None
                left = transformer.norm_out(seen["entered"] + added, seen["temb"])
                velocity = transformer.proj_out(left)
            before = modulated
            latent = latent + (after - sigma) * velocity
    for handle in handles:
        handle.remove()
    assert 2 < evaluated < steps - 2
    assert done.spans[-1].nfe == evaluated
    assert difference(done.latent, latent[0]) < TOLERANCE * latent.abs().max()


def test_skipped_blocks_are_left_out_row_by_row(
    config: ModelConfig, backend: Backend, network: Network, embeds: list[torch.Tensor], blocks_run: list[int]
) -> None:
    skips = [frozenset[int](), frozenset({0, 3}), frozenset({5}), frozenset({3})]
    count = network.blocks
    rows = varied_rows(embeds)[:4]
    queries = [replace(row.model_input(), skip_blocks=skip) for row, skip in zip(rows, skips, strict=True)]
    with torch.inference_mode():
        together = network.evaluate(queries, GRID)
    assert sum(blocks_run) == sum(count - len(skip) for skip in skips)
    assert [answer.cost for answer in together] == [(count - len(skip)) / count for skip in skips]
    for query, answer in zip(queries, together, strict=True):
        pruned = load_transformer(config, backend).module
        kept = [block for index, block in enumerate(pruned.transformer_blocks) if index not in query.skip_blocks]
        pruned.transformer_blocks = torch.nn.ModuleList(kept)
        with torch.inference_mode():
            alone = predict_velocity(pruned, query.latent[None], torch.tensor([query.sigma]), [query.embeds], GRID)
        assert difference(answer.velocity, alone[0]) < TOLERANCE * alone.abs().max()


def test_a_plan_cannot_skip_what_is_not_there_or_all_there_is(pipeline: Pipeline, packet: LatentPacket) -> None:
    for skip, complaint in (({2, 6}, "must be below 6, not 6"), (set(range(6)), "must leave one of 6 blocks")):
        stage = plan_of(2).stages[0].model_copy(update={"skip_blocks": frozenset(skip)})
        with pytest.raises(ValueError, match=rf"stages\.0\.skip_blocks {complaint}"):
            pipeline.denoiser.denoise([packet], Plan(stages=(stage,)))
