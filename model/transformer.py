"""Qwen2 backbone, bidirectional or causal, with the parameter names of Hugging Face's `Qwen2ForCausalLM`.

RMSNorm before each block, rotary embedding that pairs the two halves of a head, grouped-query attention with biases on
query, key and value, SwiGLU, an output head that may share the embedding matrix.

Shapes: B rows, L positions, D width, H query heads, G key and value heads, E head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelSettings
from model.token_scores import TokenPredictions, TokenScores, predict_tokens, score_tokens

# Qwen2's. The published PUMA code starts wider, which costs it the first thousands of steps.
INIT_STD = 0.02
TIED_HEAD = "lm_head.weight"


def rotary_tables(n_positions: int, head_width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, float32 [L, E]; both halves of E hold the same frequencies."""
    frequencies = theta ** (-torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width)
    angles = torch.arange(n_positions, device=device, dtype=torch.float32)[:, None] * frequencies  # [L, E / 2]
    angles = torch.cat([angles, angles], dim=1)  # [L, E]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to x [B, H, L, E]; position i and i + E/2 of a head are one pair."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, settings: ModelSettings, causal: bool) -> None:
        super().__init__()
        width, n_heads, n_key_heads = settings.hidden_size, settings.num_attention_heads, settings.n_key_value_heads
        self.head_width, self.causal = width // n_heads, causal
        self.q_proj = nn.Linear(width, n_heads * self.head_width)
        self.k_proj = nn.Linear(width, n_key_heads * self.head_width)
        self.v_proj = nn.Linear(width, n_key_heads * self.head_width)
        self.o_proj = nn.Linear(n_heads * self.head_width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """X [B, L, D] to [B, L, D]; cos and sin [L, E]."""
        split = (*x.shape[:2], -1, self.head_width)
        q, k, v = (proj(x).view(split).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        # On CPU the backward pass of attention is several times slower in bfloat16 than in float32.
        dtype = torch.float32 if x.device.type == "cpu" else v.dtype
        q, k = rotate(q, cos, sin).to(dtype), rotate(k, cos, sin).to(dtype)  # [B, H, L, E], [B, G, L, E]
        grouped = q.shape[1] != k.shape[1]
        with torch.autocast(x.device.type, enabled=False):
            out = F.scaled_dot_product_attention(q, k, v.to(dtype), is_causal=self.causal, enable_gqa=grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated MLP."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        width, inner = settings.hidden_size, settings.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """X [B, L, D] to [B, L, D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and a residual."""

    def __init__(self, settings: ModelSettings, causal: bool) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(settings.hidden_size, settings.rms_norm_eps)
        self.self_attn = Attention(settings, causal)
        self.post_attention_layernorm = nn.RMSNorm(settings.hidden_size, settings.rms_norm_eps)
        self.mlp = SwiGLU(settings)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """X [B, L, D] to [B, L, D]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Embedding, blocks and the last norm: tokens in, hidden states out."""

    def __init__(self, settings: ModelSettings, causal: bool) -> None:
        super().__init__()
        self.head_width = settings.hidden_size // settings.num_attention_heads
        self.rope_theta = settings.rope_theta
        self.embed_tokens = nn.Embedding(settings.vocab_size, settings.hidden_size)
        self.layers = nn.ModuleList(Block(settings, causal) for _ in range(settings.num_hidden_layers))
        self.norm = nn.RMSNorm(settings.hidden_size, settings.rms_norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B, L] to hidden states [B, L, D]."""
        cos, sin = rotary_tables(tokens.shape[1], self.head_width, self.rope_theta, tokens.device)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class Transformer(nn.Module):
    """The model. Scores and predictions are aligned to token positions: entry i is about token i.

    `forward` is the training pass, so that wrappers such as DistributedDataParallel see it.
    """

    def __init__(self, settings: ModelSettings, *, causal: bool = False) -> None:
        super().__init__()
        self.model = Backbone(settings, causal)
        self.lm_head = nn.Linear(settings.hidden_size, settings.vocab_size, bias=False)
        self.training_backbone: Callable[[Tensor], Tensor] | None = None
        self.tied = settings.tie_word_embeddings
        if self.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Matrices from a normal distribution with standard deviation 0.02, biases 0, norms 1."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, INIT_STD, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()

    def compile_training(self) -> None:
        """Compile the pass of train mode alone: its shapes never change, while evaluation's do at every call."""
        self.training_backbone = torch.compile(self.model.forward)

    def forward(self, xt: Tensor, x0: Tensor, weight: Tensor) -> TokenScores:
        """Loss, NLL and confidence of the clean tokens x0 (int64 [B, L]) given xt, where weight (float32) is not 0."""
        backbone = self.training_backbone if self.training and self.training_backbone else self.model
        return score_tokens(backbone(xt), self.lm_head.weight, x0, weight)

    def predict(
        self, xt: Tensor, positions: Tensor, banned: int, *, temperature: float = 0.0, noise_key: Tensor | None = None
    ) -> TokenPredictions:
        """Best token and its confidence at `positions` (bool [B, L]); see `predict_tokens` for the rest."""
        hidden = self.model(xt)[positions]  # [N, D]
        return predict_tokens(hidden, self.lm_head.weight, banned, temperature=temperature, noise_key=noise_key)

    def weights(self) -> dict[str, Tensor]:
        """Tensors to save, by Hugging Face's names; a tied head is left out, as Hugging Face does."""
        return {name: tensor for name, tensor in self.state_dict().items() if not (self.tied and name == TIED_HEAD)}

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Undo `weights`; raises RuntimeError naming what is missing, unknown or of another shape."""
        tied = {TIED_HEAD: tensors["model.embed_tokens.weight"]} if self.tied else {}
        self.load_state_dict(tensors | tied)

    def logits(self, tokens: Tensor) -> Tensor:
        """All logits [B, L, V]: for tests and export, never in training."""
        return self.lm_head(self.model(tokens))
