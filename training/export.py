"""Copy a trained pipeline, converted to bfloat16, and its LoRAs into one directory, which a model's config can name.

`python -m training.export runs/base/pipeline checkpoints/scenes distilled=runs/distilled/lora bridge=runs/bridge/lora`
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import QwenImagePipeline


def main() -> None:
    """Write the pipeline to the output directory, and each LoRA to `loras/NAME` there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("loras", nargs="*", metavar="NAME=DIRECTORY")
    arguments = parser.parse_args()
    QwenImagePipeline.from_pretrained(arguments.pipeline, dtype=torch.bfloat16).save_pretrained(arguments.output)
    for entry in arguments.loras:
        name, _, directory = entry.partition("=")
        shutil.copytree(directory, arguments.output / "loras" / name, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
