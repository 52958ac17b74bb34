"""Build a small pipeline of Qwen-Image's classes with random weights.

`python -m training.init training/scenes.yaml VAE_DIRECTORY OUTPUT_DIRECTORY`
"""

from __future__ import annotations

from itertools import islice
from typing import Any

from accelerate.utils import set_seed
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

from scenes.examples import examples
from training.lib.loop import parse_arguments, read_config

_CHAT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
# Qwen-Image's prompt template. The pipeline drops its first 34 tokens, so each word must be one token here as well.
_TEMPLATE = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:\nuser\nassistant\n"
)


def train_tokenizer(vocabulary: int, captions: int = 20_000) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on captions and the prompt template, with Qwen2's pre-tokenizer, in lower case.

    Args:
        vocabulary: number of tokens.
        captions: number of captions.
    """
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    bpe.decoder = decoders.ByteLevel()
    corpus = [text for _, text in islice(examples(seed=7, width=16, height=16), captions)]
    # Every word also occurs alone, without the punctuation that follows it in captions.
    words = sorted({word.strip(",.!") for text in corpus for word in text.split()})
    corpus += [_TEMPLATE] * captions + [f" {word}" for word in words] * 100 + words * 100
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=_CHAT_TOKENS + _VISION_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    end = _CHAT_TOKENS[0]
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=end,
        pad_token=end,
        unk_token=end,
        additional_special_tokens=_CHAT_TOKENS[1:] + _VISION_TOKENS,
    )


def build_pipeline(config: dict[str, Any], vae: AutoencoderKLQwenImage) -> QwenImagePipeline:
    """Build a pipeline of a random text encoder and transformer, a trained tokenizer and Qwen-Image's scheduler.

    Args:
        config: `vocabulary`, and the arguments of the models' configs as `text`, `vision` and `transformer`.
        vae: the pipeline's autoencoder.
    """
    tokenizer = train_tokenizer(config["vocabulary"])
    token = tokenizer.convert_tokens_to_ids
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "bos_token_id": token("<|im_start|>"),
                "eos_token_id": token("<|im_end|>"),
                **config["text"],
            },
            vision_config=config["vision"],
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
            image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"),
            tie_word_embeddings=True,
        )
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=0.5,
        max_image_seq_len=8192,
        max_shift=0.9,
        shift_terminal=0.02,
        use_dynamic_shifting=True,
    )
    transformer = QwenImageTransformer2DModel(
        joint_attention_dim=config["text"]["hidden_size"], **config["transformer"]
    )
    return QwenImagePipeline(scheduler, vae, text_encoder, tokenizer, transformer)


def main() -> None:
    """Write the pipeline to the output directory."""
    arguments = parse_arguments(__doc__, "vae", "output")
    config = read_config(arguments.config, "model")
    set_seed(config["seed"])
    pipeline = build_pipeline(config, AutoencoderKLQwenImage.from_pretrained(arguments.vae))
    pipeline.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
