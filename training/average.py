"""Average LoRAs that were trained from the same one, such as several checkpoints of a run.

`python -m training.average runs/distilled/lora runs/first/lora runs/second/lora` writes the mean of the last two.

What is averaged are the two factors of each matrix, as model soups average weights (Wortsman et al. 2022, arXiv
2203.05482). That is near the mean of their products as long as the LoRAs are near each other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import QwenImagePipeline
from safetensors.torch import load_file

from stages.sources import BadFile, find_adapter

_PREFIX = f"{QwenImagePipeline.transformer_name}."


def average(loras: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Return the mean of saved LoRAs of a transformer, in the first one's dtypes.

    Raises:
        BadFile: one is not there.
        ValueError: they are not of the same layers or ranks.
    """
    states = [load_file(find_adapter("loras", str(directory), None)) for directory in loras]
    first = states[0]
    shapes = {key: value.shape for key, value in first.items()}
    for directory, state in zip(loras, states, strict=True):
        if shapes != {key: value.shape for key, value in state.items()}:
            raise ValueError(f"{directory} has other layers or ranks than {loras[0]}")
    return {
        key.removeprefix(_PREFIX): torch.stack([state[key].float() for state in states]).mean(0).to(value.dtype)
        for key, value in first.items()
    }


def main() -> None:
    """Write the mean as a LoRA of diffusers' format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="directory to write")
    parser.add_argument("loras", type=Path, nargs="+", help="directories as training writes them")
    arguments = parser.parse_args()
    try:
        mean = average(arguments.loras)
    except (BadFile, ValueError) as error:
        sys.exit(f"average: {error}")
    QwenImagePipeline.save_lora_weights(arguments.output, transformer_lora_layers=mean)


if __name__ == "__main__":
    main()
