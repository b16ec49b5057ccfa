"""The model families that are tried: `FAMILIES`, and tiny models of them with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}


@dataclass(frozen=True)
class Family:
    name: str
    model: str
    """A class of transformers."""
    layer: str
    """Decoder layer 1, as `model.named_modules()` has it."""
    notes: str = ""
    options: Mapping = field(default_factory=dict)
    """Of its configuration, beside or in place of SIZES; None leaves one out."""
    text: Mapping | None = None
    """Options of the text's configuration, in a model that reads more."""


FAMILIES = (
    Family("Phi-3", "Phi3ForCausalLM", "model.layers.1"),
    Family("Phi", "PhiForCausalLM", "model.layers.1", "parallel residual"),
    Family("Llama", "LlamaForCausalLM", "model.layers.1"),
    Family(
        "Llama 4",
        "Llama4ForCausalLM",
        "model.layers.1",
        "mixture of experts, chunked attention",
        EXPERTS | {"intermediate_size_mlp": 48},
    ),
    Family(
        "Mistral",
        "MistralForCausalLM",
        "model.layers.1",
        "sliding window",
        {"sliding_window": 4},
    ),
    Family("Mixtral", "MixtralForCausalLM", "model.layers.1", "mixture of experts", EXPERTS),
    Family("Qwen2", "Qwen2ForCausalLM", "model.layers.1"),
    Family("Qwen3", "Qwen3ForCausalLM", "model.layers.1"),
    Family(
        "Qwen3 MoE",
        "Qwen3MoeForCausalLM",
        "model.layers.1",
        "mixture of experts",
        EXPERTS | {"moe_intermediate_size": 16},
    ),
    Family("Gemma", "GemmaForCausalLM", "model.layers.1"),
    Family(
        "Gemma 2",
        "Gemma2ForCausalLM",
        "model.layers.1",
        "sliding and full attention",
        {"sliding_window": 4},
    ),
    Family(
        "Gemma 3",
        "Gemma3ForCausalLM",
        "model.layers.1",
        "sliding and full attention",
        {
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    Family(
        "Gemma 4",
        "Gemma4ForCausalLM",
        "model.layers.1",
        "layers that share keys",
        {
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "num_kv_shared_layers": 1,
            "global_head_dim": 8,
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 8,
        },
    ),
    Family("GPT-NeoX, Pythia", "GPTNeoXForCausalLM", "gpt_neox.layers.1", "parallel residual"),
    Family("GPT-2", "GPT2LMHeadModel", "transformer.h.1", "learned positions"),
    Family(
        "GPT-Neo",
        "GPTNeoForCausalLM",
        "transformer.h.1",
        "learned positions",
        {"attention_types": [[["global", "local", "global"], 1]], "window_size": 4},
    ),
    Family("GPT-J", "GPTJForCausalLM", "transformer.h.1", "parallel residual", {"rotary_dim": 4}),
    Family("GPTBigCode", "GPTBigCodeForCausalLM", "transformer.h.1", "learned positions"),
    Family(
        "CodeGen",
        "CodeGenForCausalLM",
        "transformer.h.1",
        "parallel residual",
        {"rotary_dim": 4},
    ),
    Family(
        "OPT",
        "OPTForCausalLM",
        "model.decoder.layers.1",
        "learned positions",
        {"ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    Family("Bloom", "BloomForCausalLM", "transformer.h.1", "ALiBi"),
    Family(
        "Falcon",
        "FalconForCausalLM",
        "transformer.h.1",
        "parallel residual",
        {"head_dim": None},
    ),
    Family(
        "Falcon, ALiBi",
        "FalconForCausalLM",
        "transformer.h.1",
        "ALiBi",
        {"head_dim": None, "alibi": True, "parallel_attn": False},
    ),
    Family("MPT", "MptForCausalLM", "transformer.blocks.1", "ALiBi"),
    Family("StableLM", "StableLmForCausalLM", "model.layers.1"),
    Family("StarCoder2", "Starcoder2ForCausalLM", "model.layers.1"),
    Family("Cohere", "CohereForCausalLM", "model.layers.1", "parallel residual"),
    Family(
        "Cohere 2",
        "Cohere2ForCausalLM",
        "model.layers.1",
        "parallel residual, sliding window",
        {"sliding_window": 4},
    ),
    Family("OLMo", "OlmoForCausalLM", "model.layers.1"),
    Family("OLMo 2", "Olmo2ForCausalLM", "model.layers.1", "norms after the sublayers"),
    Family("OLMoE", "OlmoeForCausalLM", "model.layers.1", "mixture of experts", EXPERTS),
    Family("Granite", "GraniteForCausalLM", "model.layers.1"),
    Family("GLM 4", "Glm4ForCausalLM", "model.layers.1"),
    Family("SmolLM3", "SmolLM3ForCausalLM", "model.layers.1"),
    Family("gpt-oss", "GptOssForCausalLM", "model.layers.1", "mixture of experts", EXPERTS),
    Family(
        "DeepSeek-V3",
        "DeepseekV3ForCausalLM",
        "model.layers.1",
        "latent attention, mixture of experts",
        {
            "num_key_value_heads": 4,
            "head_dim": 4,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
    Family(
        "Qwen3-Next",
        "Qwen3NextForCausalLM",
        "model.layers.1",
        "linear and full attention, mixture of experts",
        EXPERTS
        | {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    Family(
        "Jamba",
        "JambaForCausalLM",
        "model.layers.1",
        "state space and attention, mixture of experts",
        EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    ),
    Family("LFM2", "Lfm2ForCausalLM", "model.layers.1", "convolution and attention"),
    Family(
        "Gemma 3, multimodal",
        "Gemma3ForConditionalGeneration",
        "model.language_model.layers.1",
        "the language decoder",
        {"vision_config": VISION, "mm_tokens_per_image": 4, "image_token_id": 63},
        {"model_type": "gemma3_text"},
    ),
    Family(
        "LLaVA",
        "LlavaForConditionalGeneration",
        "model.language_model.layers.1",
        "the language decoder",
        {
            "vision_config": VISION | {"model_type": "clip_vision_model"},
            "image_token_id": 63,
        },
        {"model_type": "llama"},
    ),
    Family(
        "Qwen2-VL",
        "Qwen2VLForConditionalGeneration",
        "model.language_model.layers.1",
        "the language decoder",
        {
            "vision_config": {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
            "image_token_id": 63,
            "video_token_id": 62,
        },
        {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
    ),
)


def build(family: Family, seed: int = 0) -> torch.nn.Module:
    import transformers

    kind = getattr(transformers, family.model)
    options = {name: value for name, value in (SIZES | family.options).items() if value is not None}
    if family.text is not None:
        options = dict(family.options, text_config=SIZES | TOKENS | family.text)
    torch.manual_seed(seed)
    return kind(kind.config_class(**options, **TOKENS)).eval()
