"""A Hugging Face checkpoint of a Llama-like model as Megatron's GPTModel, this rank's part of it.

What comes in: a model folder, this rank's place. What goes out: a frozen GPTModel with the
checkpoint's weights, which turns packed tokens into logprobs of their targets. It must not know:
adapters, runs, losses.

In Megatron a layer has one linear for q, k and v and one for gate and up. Rows of the first go by
key-value group: the group's queries, its key, its value. Those of the second are gate, then up, of
this rank.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from app.worker.trainers.megatron_core import (
    GPTModel,
    TransformerConfig,
    TransformerLayer,
    get_gpt_layer_local_spec,
    parallel_state,
)
from app.worker.trainers.megatron_head import Head, twice
from app.worker.trainers.megatron_packing import PackedAttention
from app.worker.trainers.megatron_shapes import Shapes, shapes
from app.worker.trainers.megatron_weights import Weights


class Layer(TransformerLayer):  # type: ignore[misc]
    """A layer that may compute its activations twice instead of keeping them.

    Megatron's own way wants CUDA's random state, and an input that has a gradient.
    """

    recompute = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.recompute and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        return twice(super().forward, *args, **kwargs)


class CausalModel(GPTModel):  # type: ignore[misc]
    """GPTModel on packed tokens. `forward(ids, positions, packed, labels=targets)`, all [1, n],
    gives the last stage (logprobs float32 [n], correct bool [n]), the others hidden states.
    """

    def prepare(self, shapes: Shapes, inverse_frequencies: Tensor) -> None:
        """What GPTModel's constructor does not take."""
        self.head = Head(shapes.vocabulary)
        self.frequencies = torch.cat([inverse_frequencies, inverse_frequencies])

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, **kwargs: Any) -> Any:
        """Positions begin again with each sequence; Megatron's would count through."""
        hidden, _, *others = super()._preprocess(
            input_ids=input_ids, position_ids=position_ids, **kwargs
        )
        angles = position_ids[0, :, None].float() * self.frequencies
        return (hidden, angles[:, None, None, :], *others)

    def _postprocess(self, hidden_states: Tensor, labels: Tensor, **_: object) -> Any:
        if not self.post_process:
            return hidden_states
        weight = None
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        return self.head.logprobs(hidden_states, labels[0], self.output_layer, weight)


def build(
    folder: Path, dtype: torch.dtype, device: torch.device, *, recompute: bool
) -> tuple[CausalModel, Shapes]:
    """This rank's part of a model, frozen. Megatron's parallel state must be set up.

    Raises:
        ConfigurationError: a model this engine cannot compute, or that lacks a weight.
    """
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    sizes = shapes(config, folder, ranks, stages)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _gpt(config, sizes, stages, dtype)
    for layer in model.decoder.layers:
        layer.recompute = recompute
    model.requires_grad_(False).to(device, dtype).eval()
    frequencies = LlamaRotaryEmbedding(config).inv_freq
    model.prepare(sizes, frequencies.to(device, torch.float32))
    with torch.no_grad():
        _fill(model, sizes, Weights(folder), tied=config.tie_word_embeddings)
    return model, sizes


def _gpt(config: Any, sizes: Shapes, stages: int, dtype: torch.dtype) -> CausalModel:
    normed = config.model_type == "qwen3"
    megatron = TransformerConfig(
        num_layers=sizes.layers,
        hidden_size=sizes.hidden,
        num_attention_heads=sizes.padded_heads,
        num_query_groups=sizes.padded_groups,
        kv_channels=sizes.head_dim,
        ffn_hidden_size=sizes.padded_ffn,
        tensor_model_parallel_size=sizes.ranks,
        pipeline_model_parallel_size=stages,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        qk_layernorm=normed,
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        add_qkv_bias=config.model_type == "qwen2",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=normed)
    spec.module = Layer
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    return CausalModel(
        megatron,
        spec,
        vocab_size=sizes.padded_vocabulary,
        max_sequence_length=sizes.max_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        # Over several stages each end reads its own copy: nothing here ever changes it.
        share_embeddings_and_output_weights=config.tie_word_embeddings and stages == 1,
        position_embedding_type="none",
    )


def _fill(model: CausalModel, sizes: Shapes, weights: Weights, *, tied: bool) -> None:
    """Copy this rank's part of every weight."""
    rank = parallel_state.get_tensor_model_parallel_rank()

    def words(name: str) -> Tensor:
        return sizes.vocabulary_cut.piece(weights[name], rank, sizes.ranks)

    embedding = "model.embed_tokens.weight"
    if model.pre_process:
        model.embedding.word_embeddings.weight.copy_(words(embedding))
    if model.post_process:
        model.decoder.final_layernorm.weight.copy_(weights["model.norm.weight"])
        if model.output_layer.weight is not None:
            model.output_layer.weight.copy_(words(embedding if tied else "lm_head.weight"))
    for layer in model.decoder.layers:
        _fill_layer(layer, sizes, weights, rank)


def _fill_layer(layer: Any, sizes: Shapes, weights: Weights, rank: int) -> None:
    prefix = f"model.layers.{layer.layer_number - 1}"
    attention, mlp = layer.self_attention, layer.mlp

    def piece(projection: str, kind: str = "weight") -> Tensor:
        whole = weights[f"{prefix}.{projection}.{kind}"]
        return sizes.weight(projection).piece(whole, rank, sizes.ranks)

    def fused(kind: str) -> Tensor:
        groups = sizes.padded_groups // sizes.ranks
        parts = [piece(f"self_attn.{name}_proj", kind) for name in "qkv"]
        grouped = [part.view(groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, 1).flatten(0, 1)

    attention.linear_qkv.weight.copy_(fused("weight"))
    if attention.linear_qkv.bias is not None:
        attention.linear_qkv.bias.copy_(fused("bias"))
    attention.linear_proj.weight.copy_(piece("self_attn.o_proj"))
    mlp.linear_fc1.weight.copy_(torch.cat([piece("mlp.gate_proj"), piece("mlp.up_proj")]))
    mlp.linear_fc2.weight.copy_(piece("mlp.down_proj"))
    norms = {
        "input_layernorm": layer.input_layernorm,
        "post_attention_layernorm": layer.pre_mlp_layernorm,
        "self_attn.q_norm": attention.q_layernorm,
        "self_attn.k_norm": attention.k_layernorm,
    }
    for name, norm in norms.items():
        weight = cast("Tensor | None", getattr(norm, "weight", None))
        if weight is not None:
            weight.copy_(weights[f"{prefix}.{name}.weight"])
