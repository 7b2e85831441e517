"""Qwen2 backbone, bidirectional or causal, with the parameter names of Hugging Face's `Qwen2ForCausalLM`.

RMSNorm before attention and MLP, rotary embedding that pairs the two halves of a head, grouped-query attention with
biases on query, key and value, SwiGLU, and an output head that may share the embedding matrix.

With rotary embedding attention depends only on offsets between positions, so a bidirectional model does not know the
absolute position: on fully masked input all positions compute the same. `model.learned_positions` adds a learned vector
per position to the token embeddings, which Qwen2 does not have.

Shapes: B rows, L positions, D width, K keys, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from base.memory import check_memory
from config import Config, ModelConfidence, ModelSettings
from model.attention import Attention, KeyValueCache, rotary_tables
from model.block_mask import decoding_mask, noisy_and_clean, training_mask
from model.token_scores import TokenScores, score_tokens, scored_positions

# As in Qwen2. The published PUMA code has wider initial weights, which slow down the first thousands of steps.
INIT_STD = 0.02
# Names of weights.
EMBEDDING, POSITIONS = "model.embed_tokens.weight", "model.embed_positions.weight"
HEAD = "lm_head.weight"
LAYER_BYTES = 1 << 15  # of the Python objects of a layer


class SwiGLU(nn.Module):
    """Gated MLP."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        width, inner = settings.hidden_size, settings.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """MLP of x [B, L, D]; [B, L, D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP, each with a norm before it and a residual around it.

    With `recomputed`, the backward pass recomputes activations instead of storing them.
    """

    def __init__(self, settings: ModelSettings, causal: bool) -> None:
        super().__init__()
        self.recomputed = False
        self.input_layernorm = nn.RMSNorm(settings.hidden_size, settings.rms_norm_eps)
        self.self_attn = Attention(settings, causal)
        self.post_attention_layernorm = nn.RMSNorm(settings.hidden_size, settings.rms_norm_eps)
        self.mlp = SwiGLU(settings)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | BlockMask | None = None,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """One layer of x [B, L, D]; [B, L, D]. Other arguments as in `Attention`."""
        if self.recomputed and torch.is_grad_enabled():
            arguments = (x, cos, sin, mask, past)
            return checkpoint(self._compute, *arguments, use_reentrant=False)
        return self._compute(x, cos, sin, mask, past)

    def _compute(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | BlockMask | None,
        past: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, past)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Embeddings, layers and the last norm: tokens in, hidden states out."""

    def __init__(self, settings: ModelSettings, causal: bool) -> None:
        super().__init__()
        self.head_width = settings.hidden_size // settings.num_attention_heads
        self.n_key_value_heads, self.causal = settings.n_key_value_heads, causal
        self.rope_theta, self.rotary = settings.rope_theta, settings.rotary
        self.embed_tokens = nn.Embedding(settings.vocab_size, settings.hidden_size)
        self.embed_positions: nn.Embedding | None = None
        if settings.learned_positions is not None:
            self.embed_positions = nn.Embedding(settings.learned_positions, settings.hidden_size)
        self.layers = nn.ModuleList(Layer(settings, causal) for _ in range(settings.num_hidden_layers))
        self.norm = nn.RMSNorm(settings.hidden_size, settings.rms_norm_eps)
        self.compiled: Callable[..., Tensor] | None = None

    def compile_training(self) -> None:
        """Compile the forward pass in train mode only: its shapes are fixed; those of evaluation vary between calls."""
        self.compiled = torch.compile(self._compute)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | BlockMask | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Tokens int64 [B, L] to hidden states [B, L, D].

        Args:
            positions: int64 [L], by default those after the cached ones.
            mask: bool [L, K] over the K = L keys of this pass (cache.length + L with a cache), or a BlockMask; by
                default a causal model attends to positions up to its own, a bidirectional one to all.
            cache: keys and values of earlier positions; see `KeyValueCache`. Not for training.

        Raises:
            ValueError: more tokens than learned positions.
        """
        n_past = cache.length if cache is not None else 0
        n_keys = n_past + tokens.shape[1]
        if positions is None:
            table = self.embed_positions
            if table is not None and n_keys > table.num_embeddings:
                raise ValueError(f"{n_keys} tokens, but the model has {table.num_embeddings} learned positions")
            positions = torch.arange(n_past, n_keys, device=tokens.device)
        if self.causal and mask is None and n_past:
            mask = torch.arange(n_keys, device=tokens.device) <= positions[:, None]  # [L, K]
        # At position 0 the rotation is the identity.
        rotary_positions = positions if self.rotary else torch.zeros_like(positions)
        # Not compiled: each layer's kernels would compute all powers, sines and cosines again.
        cos, sin = rotary_tables(rotary_positions, self.head_width, self.rope_theta)
        compute = self.compiled if self.compiled is not None and self.training else self._compute
        return compute(tokens, positions, cos, sin, mask, cache)

    def _compute(
        self,
        tokens: Tensor,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | BlockMask | None,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """See `forward` and `rotary_tables`."""
        n_keys = tokens.shape[1] + (cache.length if cache is not None else 0)
        x = self.embed_tokens(tokens)  # [B, L, D]
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions)
        for number, layer in enumerate(self.layers):
            past = None
            if cache is not None:
                past = cache.keys[number, :, :, :n_keys], cache.values[number, :, :, :n_keys]
            x = layer(x, cos, sin, mask, past)
        return self.norm(x)

    def empty_cache(self, n_rows: int, n_positions: int) -> KeyValueCache:
        """A cache for `n_rows` rows of `n_positions` positions, in the dtype of attention."""
        device = self.embed_tokens.weight.device
        on_gpu = device.type == "cuda" and torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if on_gpu else torch.float32
        shape = (len(self.layers), n_rows, self.n_key_value_heads, n_positions, self.head_width)
        keys, values = torch.zeros((2, *shape), dtype=dtype, device=device)
        return KeyValueCache(keys, values)


class Transformer(nn.Module):
    """The model. Scores and predictions are aligned to token positions: entry i is about token i.

    `forward` is the training pass, so that wrappers such as DistributedDataParallel see it.

    Args:
        causal: positions attend to themselves and to earlier positions only.
        shifted: position i predicts token i + 1, as in autoregressive models; `forward` and `predict` align the result.
            Token 0 has no position before it and is predicted by position 0.
        block_size: size of blocks that attend to themselves and to earlier blocks (`block_mask`); None: no blocks.
            Cannot be combined with `shifted`: the first token of a block would be predicted by the noisy block before.
    """

    def __init__(
        self, settings: ModelSettings, *, causal: bool = False, shifted: bool = False, block_size: int | None = None
    ) -> None:
        super().__init__()
        assert block_size is None or not (causal or shifted)
        self.shifted, self.block_size = shifted, block_size
        self.model = Backbone(settings, causal)
        self.lm_head = nn.Linear(settings.hidden_size, settings.vocab_size, bias=False)
        self.tied = settings.tie_word_embeddings
        if self.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw matrices from a normal distribution with standard deviation 0.02; set biases to 0 and norms to 1."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, INIT_STD, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
            if isinstance(module, nn.RMSNorm):
                module.weight.fill_(1.0)

    def recompute_layers(self) -> None:
        """Activation checkpointing: each layer keeps only its input and is recomputed in the backward pass."""
        for layer in self.model.layers:
            assert isinstance(layer, Layer)
            layer.recomputed = True

    def forward(
        self,
        xt: Tensor,
        x0: Tensor,
        weight: Tensor,
        confidence: ModelConfidence = "top_prob",
        scored: Callable[[], Tensor | None] | None = None,
    ) -> TokenScores:
        """Loss, NLL and confidence of x0 given xt (int64 [B, L]) at positions of nonzero weight (float32 [B, L]).

        Args:
            confidence, scored: see `score_tokens`.
        """
        scored = scored or scored_positions([weight], self.lm_head.weight.shape[0])[0]
        if self.block_size is None:
            hidden = self._align(self.model(xt))
        else:
            tokens, positions = noisy_and_clean(xt, x0, self.block_size)
            mask = training_mask(xt.shape[1], self.block_size, xt.device, self.model.head_width)
            hidden = self.model(tokens, positions=positions, mask=mask)[:, : xt.shape[1]]  # [B, L, D]
        compiled = self.training and self.model.compiled is not None
        return score_tokens(hidden, self.lm_head.weight, x0, weight, scored, compiled, confidence)

    def predicted_logits(self, xt: Tensor) -> Tensor:
        """Logits [B, L, V] of the token at each position of xt (int64 [B, L]), as samplers see it; for analysis.

        Samplers also give the mask token probability 0, and run under autocast (`training.precision`).
        """
        return self.lm_head(self.hidden_states(xt))

    def hidden_states(self, xt: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Hidden states [B, L, D] from which the tokens at the positions of xt (int64 [B, L]) are predicted.

        Args:
            cache: keys and values of the positions before xt; see `KeyValueCache`.
        """
        mask = None
        if self.block_size is not None:
            n_past = cache.length if cache is not None else 0
            mask = decoding_mask(n_past, n_past + xt.shape[1], self.block_size, xt.device)
        return self._align(self.model(xt, mask=mask, cache=cache))

    def weights(self) -> dict[str, Tensor]:
        """Tensors to save, by Hugging Face's names; without a tied head, as in Hugging Face's files."""
        return {name: tensor for name, tensor in self.state_dict().items() if not (self.tied and name == HEAD)}

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Load `weights`; raises RuntimeError that names missing tensors, unknown ones and those of another shape."""
        tied = {HEAD: tensors[EMBEDDING]} if self.tied else {}
        self.load_state_dict(tensors | tied)

    def logits(self, tokens: Tensor) -> Tensor:
        """All logits [B, L, V] as Hugging Face returns them, without the masks of blocks: for tests and benchmarks.

        `predicted_logits` are those of a model that predicts shifted tokens or attends to blocks.
        """
        return self.lm_head(self.model(tokens))

    def _align(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, L, D], moved to the positions of the tokens that they predict."""
        return torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1) if self.shifted else hidden


def count_parameters(settings: ModelSettings) -> int:
    """Number of parameters of the model of these settings, whose layers are alike. It is not built in memory.

    Raises:
        ValueError: the model cannot be built: a weight has more bytes than torch can count, say.
    """
    counts = []
    for n_layers in (1, 2):
        with torch.device("meta"):
            try:
                model = Transformer(settings.model_copy(update={"num_hidden_layers": n_layers}))
            except RuntimeError as error:
                raise ValueError(f"the model of section model cannot be built: {error}") from error
        counts.append(sum(map(Tensor.numel, model.parameters())))
    return counts[0] + (settings.num_hidden_layers - 1) * (counts[1] - counts[0])


def build_model(config: Config) -> Transformer:
    """The model of the settings; the objective determines attention and whether predictions are shifted.

    Raises:
        ValueError: it is built on the CPU, and this machine has too little memory for it; or as `count_parameters`.
    """
    n_parameters = count_parameters(config.model)
    if torch.get_default_device().type == "cpu":
        n_bytes = 4 * n_parameters + LAYER_BYTES * config.model.num_hidden_layers
        check_memory(n_bytes, "the model of the settings in section model")
    model = Transformer(config.model, causal=config.causal, shifted=config.shifted, block_size=config.block_causal_size)
    assert sum(map(Tensor.numel, model.parameters())) == n_parameters, "count_parameters is for layers that are alike"
    return model
