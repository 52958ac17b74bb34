"""The interface of a family of models; the rest of the engine is the same for every family.

In the engine an image is tokens (rows * columns, 4 * channels), see `stages.latents`; a noise level is sigma, 1 for
pure noise; and a velocity is dx/dsigma, which points from the clean latent towards noise. A family's components convert
these to its model's own conventions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

if TYPE_CHECKING:  # a family's name and numbers are also read where torch is not loaded
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from stages.text import Rows, Text


class Context(Protocol):
    """A family's further inputs of its blocks, besides the tokens."""

    def __getitem__(self, rows: Rows) -> Self:
        """Return a selection of rows."""


@dataclass(frozen=True)
class Tokens:
    """The state between two blocks.

    Attributes:
        image: (batch, tokens, width); there may be more tokens than the latent has.
        text: (batch, length, width).
        context: the family's further inputs of its blocks.
    """

    image: torch.Tensor
    text: torch.Tensor
    context: Context

    def __getitem__(self, rows: Rows) -> Tokens:
        return Tokens(self.image[rows], self.text[rows], self.context[rows])


class TextEncoder(ABC):
    """Turns prompts into embeddings.

    Attributes:
        kind: class of the checkpoint's component.
    """

    kind: ClassVar[Any]

    def __init__(self, module: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.module = module
        self.tokenizer = tokenizer

    @property
    @abstractmethod
    def layers(self) -> nn.Module:
        """The layers that a config's `quantize` applies to."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """Most tokens of a prompt that is not truncated, the template's not counted."""

    @property
    @abstractmethod
    def head(self) -> int:
        """Number of the template's tokens before the prompt whose embeddings are left out."""

    @abstractmethod
    def tokenize(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt in its template."""

    @abstractmethod
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed tokens int64 (1, length): (1, length, width); no token's embedding depends on later tokens."""

    def count(self, prompt: str) -> int:
        """Count the tokens of a prompt, without those of the template."""
        return len(self.tokenize(prompt)) - self._template

    @cached_property
    def _template(self) -> int:
        return len(self.tokenize(""))


class Transformer(ABC):
    """Runs a transformer block by block, so that each row of a batch may skip other blocks.

    Attributes:
        kind: class of the checkpoint's component.
    """

    kind: ClassVar[Any]

    def __init__(self, module: Any) -> None:
        """Take a module, which may be on the meta device; raises ValueError if its config says what is not walked."""
        self.module = module

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The repeated blocks, in their order."""

    @property
    @abstractmethod
    def text_width(self) -> int:
        """Width of prompt embeddings."""

    @property
    @abstractmethod
    def token_channels(self) -> int:
        """Number of channels of a latent's token."""

    @abstractmethod
    def avoid_complex(self) -> None:
        """Run without complex numbers from now on."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the layers around the blocks; diffusers' own property visits every module, 2 ms a step."""
        return next(self.module.parameters()).dtype

    @abstractmethod
    def enter(self, latents: torch.Tensor, sigmas: torch.Tensor, text: Text, grid: tuple[int, int]) -> Tokens:
        """Run what precedes the first block.

        Args:
            latents: (batch, rows * columns, token_channels).
            sigmas: (batch,), each row's noise level, on any device.
            text: prompts of the batch, in the layers' dtype.
            grid: rows and columns of tokens.
        """

    @abstractmethod
    def modulate(self, entered: Tokens) -> torch.Tensor:
        """Return the image tokens (batch, tokens, width) as the first block's attention receives them."""

    @abstractmethod
    def run_block(self, index: int, tokens: Tokens) -> Tokens:
        """Run one block."""

    @abstractmethod
    def leave(self, tokens: Tokens) -> torch.Tensor:
        """Run what follows the last block: velocities (batch, rows * columns, token_channels) in float32."""

    def predict(self, latents: torch.Tensor, sigmas: torch.Tensor, text: Text, grid: tuple[int, int]) -> torch.Tensor:
        """Run a whole forward pass: velocities (batch, rows * columns, token_channels) in float32; see `enter`."""
        tokens = self.enter(latents, sigmas, text, grid)
        for index in range(len(self.blocks)):
            tokens = self.run_block(index, tokens)
        return self.leave(tokens)

    @staticmethod
    @abstractmethod
    def guide(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
        """Combine two velocities (..., tokens, channels) by classifier-free guidance; scale 1 gives `positive`."""


class Autoencoder(ABC):
    """Turns latents into pixels.

    Attributes:
        kind: class of the checkpoint's component.
    """

    kind: ClassVar[Any]

    def __init__(self, module: Any) -> None:
        """Take a module, which may be on the meta device; raises ValueError if its config cannot be right."""
        self.module = module

    @abstractmethod
    def decode(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Decode latents (batch, rows * columns, token_channels): pixels (batch, 3, height, width), about -1 to 1."""


class Family(ABC):
    """A family of models: what its checkpoints have in common.

    Attributes:
        name: name in configs.
        pipeline: diffusers' pipeline class, which the checkpoints name.
        pixels_per_token: side of a token's square of pixels; sizes are multiples of it.
        longest_prompt: most tokens of a prompt, without the template's, that any of its models accepts.
        template_tokens: most tokens that the template adds to a prompt's embeddings.
        empty_prompt: the prompt that stands for no negative prompt.
        guides_attention: whether its transformers support attention guidance by the negative prompts of a `Text`.
    """

    name: ClassVar[str]
    pipeline: ClassVar[str]
    pixels_per_token: ClassVar[int]
    longest_prompt: ClassVar[int]
    template_tokens: ClassVar[int]
    empty_prompt: ClassVar[str]
    guides_attention: ClassVar[bool] = False

    @abstractmethod
    def count_blocks(self, transformer: Mapping[str, Any]) -> int:
        """Count the blocks of a transformer, from its own config."""

    @abstractmethod
    def latent_channels(self, transformer: Mapping[str, Any]) -> int:
        """Return the number of channels of a latent, from the transformer's own config."""

    @property
    @abstractmethod
    def text_encoder(self) -> type[TextEncoder]:
        """Class of its text encoders; this property and the next two load torch and diffusers."""

    @property
    @abstractmethod
    def transformer(self) -> type[Transformer]:
        """Class of its transformers."""

    @property
    @abstractmethod
    def autoencoder(self) -> type[Autoencoder]:
        """Class of its autoencoders."""
