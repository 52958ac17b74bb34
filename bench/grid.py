"""Draw the same prompts and seeds by several plans, side by side.

`python -m bench.grid configs/scenes.yaml bench/grid.png`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from backends import get_backend
from stages.model import ModelConfig
from stages.pipeline import Pipeline

PROMPTS = ("a large star", "a furry heart on a white background", "a red circle left of a blue square")
MARGIN = 4
LABEL = 16


def draw_grid(pipeline: Pipeline, plans: Sequence[str], prompts: Sequence[str], seeds: Sequence[int]) -> Image.Image:
    """Prompts down, plans across, and within a plan one column a seed."""
    drawn = {
        (prompt, plan): [result.image for result in pipeline.run(plan, prompt, seeds=seeds)]
        for prompt in prompts
        for plan in plans
    }
    width, height = drawn[prompts[0], plans[0]][0].size
    block = len(seeds) * width + 3 * MARGIN
    sheet = Image.new("RGB", (len(plans) * block, LABEL + len(prompts) * (height + LABEL)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, plan in enumerate(plans):
        pen.text((column * block + MARGIN, 2), plan, fill="black")
    for row, prompt in enumerate(prompts):
        top = LABEL + row * (height + LABEL)
        pen.text((MARGIN, top + 2), prompt, fill="black")
        for column, plan in enumerate(plans):
            for place, image in enumerate(drawn[prompt, plan]):
                sheet.paste(image, (column * block + place * width, top + LABEL))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--plans", nargs="+", default=["base", "distilled", "hybrid"])
    parser.add_argument("--seeds", type=int, default=4)
    arguments = parser.parse_args()
    pipeline = Pipeline(ModelConfig.read(arguments.config), get_backend("cpu"))
    draw_grid(pipeline, arguments.plans, PROMPTS, range(arguments.seeds)).save(arguments.output)


if __name__ == "__main__":
    main()
