"""Every planned model type of the installed transformers, made tiny by rules; what the rules cannot say is data in `OWN`."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from models import device
from multimodal import PARTS, with_images
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ds_seqpar.families import has_data_file

MULTIMODAL = tuple(sorted(PARTS))
"""Models of several parts; those among them that have a plan for a part beside the language model are planned types, too."""

HEADS: dict[str, Any] = {
    "speech-seq2seq-lm": AutoModelForSpeechSeq2Seq,
    "image-classification": AutoModelForImageClassification,
    "masked-lm": AutoModelForMaskedLM,
    "multiple-choice": AutoModelForMultipleChoice,
    "question-answering": AutoModelForQuestionAnswering,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
}
"""What stands on a model beside a causal language model's head, as the table names it."""

__all__ = [
    "ALL", "HEADS", "MULTIMODAL", "NoModelError", "batches_for", "causal", "heads_of",
    "planned_types", "tiny_config", "tiny_of",
]  # fmt: skip

SIZES: dict[str, Any] = dict(
    vocab_size=101, hidden_size=48, intermediate_size=50, num_hidden_layers=2, num_layers=2, num_attention_heads=6,
    num_key_value_heads=3, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    moe_intermediate_size=14, shared_expert_intermediate_size=18, moe_shared_expert_intermediate_size=18, num_experts=4,
    num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2, num_experts_per_token=2, moe_k=2,
    moe_topk=2, top_k_experts=2, n_shared_experts=1, n_group=1, topk_group=1, num_expert_group=1, q_lora_rank=20,
    kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, qk_head_dim=12, v_head_dim=10, index_head_dim=8, index_n_heads=2,
    index_topk=64, first_k_dense_replace=1, output_router_logits=True, router_aux_loss_coef=0.1, attention_dropout=0.0,
    hidden_dropout=0.0, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    attn_pdrop=0.0, sliding_window=5, query_pre_attn_scalar=8, linear_num_value_heads=4, linear_num_key_heads=2,
    linear_key_head_dim=8, linear_value_head_dim=8, linear_conv_kernel_dim=3, encoder_layers=2, decoder_layers=2,
    encoder_ffn_dim=50, decoder_ffn_dim=54, encoder_attention_heads=6, decoder_attention_heads=4, decoder_start_token_id=2,
    dropout=0.0, activation_dropout=0.0, classifier_dropout=0.0, classifier_dropout_prob=0.0, d_ff=50, d_kv=8, dropout_rate=0.0,
    relative_attention_num_buckets=8, relative_attention_max_distance=12, image_size=8, patch_size=4, layerdrop=0.0,
    summary_first_dropout=0.0, encoder_layerdrop=0.0, decoder_layerdrop=0.0, drop_path_rate=0.0,
)  # fmt: skip
"""Written over a config's own values wherever it has the field and the value there is of the same kind."""

_HYBRID = dict(layer_types=["linear_attention", "full_attention"])
_HALF = dict(
    rope_parameters={
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 0],
        "partial_rotary_factor": 0.5,
    }
)
_MROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]})
_PER_LAYER_INPUT = dict(
    vocab_size_per_layer_input=101, hidden_size_per_layer_input=6, num_global_key_value_heads=3,
    layer_types=["sliding_attention", "full_attention"],
    num_kv_shared_layers=0,
)  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "bart": dict(scale_embedding=True),
    "distilbert": dict(dim=48, hidden_dim=50, n_layers=2, n_heads=6, dropout=0.0, qa_dropout=0.0, seq_classif_dropout=0.0),
    "electra": dict(embedding_size=20, summary_last_dropout=0.0),
    "modernbert": dict(local_attention=4, cls_token_id=1, sep_token_id=2, decoder_bias=True),
    "t5": dict(decoder_start_token_id=0),
    "mt5": dict(decoder_start_token_id=0),
    "umt5": dict(decoder_start_token_id=0),
    "roc_bert": dict(pronunciation_vocab_size=20, pronunciation_embed_dim=6, shape_vocab_size=22, shape_embed_dim=6,
        enable_pronunciation=True),
    "rembert": dict(input_embedding_size=20, output_embedding_size=28),
    "albert": dict(embedding_size=20),
    "layoutlm": dict(max_2d_position_embeddings=32),
    "markuplm": dict(max_xpath_tag_unit_embeddings=7, max_xpath_subs_unit_embeddings=8, tag_pad_id=5, subs_pad_id=6,
        xpath_unit_hidden_size=4, max_depth=3),
    "mobilebert": dict(embedding_size=20, true_hidden_size=24, intra_bottleneck_size=24, num_feedforward_networks=2),
    "roformer": dict(embedding_size=20),
    "deberta": dict(relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=5),
    "deberta-v2": dict(relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=4, share_att_key=True,
        norm_rel_ebd="layer_norm", conv_kernel_size=3, conv_act="gelu"),
    "big_bird": dict(attention_type="original_full"),
    "dbrx": dict(d_model=48, n_heads=6, n_layers=2, max_seq_len=64, resid_pdrop=0.0, emb_pdrop=0.0,
        attn_config=dict(kv_n_heads=3, rope_theta=10000.0, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=50, moe_num_experts=4, moe_top_k=2, hidden_size=48)),
    "jetmoe": dict(num_attention_heads=6, kv_channels=8),
    "mamba": dict(state_size=4, time_step_rank=3),
    "falcon_mamba": dict(state_size=4, time_step_rank=3),
    "mamba2": dict(num_heads=12, head_dim=8, expand=2, state_size=4, n_groups=2, chunk_size=4),
    "recurrent_gemma": dict(num_hidden_layers=3, lru_width=48, attention_window_size=5, block_types=["recurrent", "attention"]),
    "xlstm": dict(hidden_size=64, num_heads=4, chunk_size=16, qk_dim_factor=1.0),
    "rwkv": dict(attention_hidden_size=48, context_length=64),
    "xlm": dict(gelu_activation=True), "flaubert": dict(gelu_activation=True),
    "mllama_text_model": dict(num_hidden_layers=2, cross_attention_layers=[]),
    "zamba2": dict(hybrid_layer_ids=[1, 2], num_hidden_layers=3, layer_types=["linear_attention", "hybrid", "hybrid"],
        num_mem_blocks=1, mamba_d_state=4, n_mamba_heads=12,
        mamba_headdim=8, mamba_ngroups=2, chunk_size=4, adapter_rank=4, attention_hidden_size=96, attention_head_dim=16,
        use_shared_attention_adapter=True,
        num_key_value_heads=6),
    "zamba": dict(num_hidden_layers=3, layer_types=["linear_attention", "hybrid", "hybrid"], mamba_d_state=4, n_mamba_heads=2,
        mamba_dt_rank=4, attention_hidden_size=96, attention_head_dim=16, num_key_value_heads=6),
    "mpnet": dict(relative_attention_num_buckets=32),
    "ctrl": dict(dff=50),
    "audio-spectrogram-transformer": dict(max_length=12, num_mel_bins=8, frequency_stride=4, time_stride=4),
    "whisper": dict(num_mel_bins=8, max_source_positions=5, max_target_positions=64),
    "dinov3_vit": dict(pos_embed_rescale=None),
    "beit": dict(use_mask_token=False, layer_scale_init_value=0.1, out_indices=[0, 1]),
    "data2vec-vision": dict(layer_scale_init_value=0.1, out_indices=[0, 1]),
    "convbert": dict(embedding_size=20, conv_kernel_size=3),
    "bigbird_pegasus": dict(attention_type="original_full"),
    "switch_transformers": dict(num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        decoder_start_token_id=0, router_jitter_noise=0.0),
    "nllb-moe": dict(encoder_sparse_step=2, decoder_sparse_step=2, moe_token_dropout=0.0, router_jitter_noise=0.0),
    "longt5": dict(local_radius=3, decoder_start_token_id=0),
    "longformer": dict(attention_window=4), "led": dict(attention_window=4, max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64),
    "vit_mae": dict(mask_ratio=0.5),
    "tapas": dict(type_vocab_sizes=[3, 6, 6, 2, 6, 6, 4]),
    "deepseek_ocr2_text": dict(mlp_layer_types=["dense", "sparse"]),
    "ernie4_5_vl_moe_text": dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}),
    "codegen": dict(num_attention_heads=4, hidden_size=32, rotary_dim=4),
    "falcon": dict(new_decoder_architecture=True, num_kv_heads=3, parallel_attn=True, alibi=False),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], attention_dropout=0.0, resid_dropout=0.0, embed_dropout=0.0),
    "gptj": dict(rotary_dim=4),
    "mpt": dict(d_model=48, n_heads=6, n_layers=2, max_seq_len=64),
    "opt": dict(word_embed_proj_dim=48, ffn_dim=50, dropout=0.0),
    "bailing_hybrid": _HYBRID,
    "bamba": dict(attn_layer_indices=[1], mamba_n_heads=6, mamba_d_state=8),
    "cohere_compass_text": dict(
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={k: _MROPE["rope_parameters"] for k in ("sliding_attention", "full_attention")},
    ),
    "cosmos3_edge_text": _MROPE,
    "paddleocr_vl_text": _MROPE,
    "qwen2_5_omni_text": _MROPE,
    "phimoe": dict(router_jitter_noise=0.0, input_jitter_noise=0.0),
    "seed_oss": dict(residual_dropout=0.0),
    "qwen3_omni_moe_talker_text": dict(shared_expert_intermediate_size=18),
    "t5gemma2_decoder": dict(dropout_rate=0.0),
    "t5gemma2_text": dict(dropout_rate=0.0),
    "deepseek_v4": dict(output_router_logits=False),
    "gemma4_vision": dict(patch_size=4, pooling_kernel_size=2, position_embedding_size=8),
    "llama4_vision_model": dict(image_size=16, patch_size=4, intermediate_size=192, vision_output_dim=20, projector_input_dim=20,
        projector_output_dim=20),
    "diffllama": dict(num_key_value_heads=2, num_attention_heads=4, hidden_size=32),
    "dory": dict(num_hidden_layers=6, n_input_layers=2, n_output_layers=2, layer_types=["sliding_attention", "mlp"] * 3),
    "dots3_note_text": dict(num_key_value_heads=6),
    "esmc": dict(num_key_value_heads=6),
    "flint": dict(output_router_logits=False),
    "falcon_h1": dict(embedding_multiplier=2.0, lm_head_multiplier=0.5, key_multiplier=0.7, attention_in_multiplier=1.3,
        attention_out_multiplier=0.8, ssm_in_multiplier=1.1, ssm_out_multiplier=0.9, mlp_multipliers=[0.9, 1.2],
        ssm_multipliers=[1.1, 0.9, 1.2, 0.8, 1.3], mamba_d_ssm=48, mamba_n_heads=6, mamba_d_head=8, mamba_d_state=8,
        mamba_chunk_size=8),
    "gemma3n_text": _PER_LAYER_INPUT | dict(activation_sparsity_pattern=[0.0, 0.0], laurel_rank=4),
    "gemma4_text": _PER_LAYER_INPUT | dict(enable_moe_block=True),
    "glm4v_moe_text": _HALF,
    "glm4v_text": _HALF,
    "glm5_next_text": dict(layer_types=["linear_attention", "full_attention"], linear_num_heads=2,
        linear_head_dim=8, num_key_value_heads=6, qk_rope_head_dim=0),
    "glm_image_text": _HALF,
    "glm_ocr_text": _HALF,
    "granitemoehybrid": dict(layer_types=["linear_attention", "attention"], mamba_n_heads=6, mamba_d_state=8),
    "hunyuan_vl_text": _MROPE,
    "hy_v4_vl_text": dict(qk_rope_head_dim=8, **_MROPE),
    "inkling2_loop_text": dict(unpadded_vocab_size=101, swa_num_attention_heads=6, swa_num_key_value_heads=3, swa_head_dim=8,
        sliding_window_size=5, d_rel=4, rel_extent=8, num_hidden_layers=3, n_layers_per_attn_res_block=1,
        layer_types=["hybrid_sliding", "hybrid", "hybrid"], loop_layer_index_start=1, loop_layer_index_end=2, loop_num_passes=2,
        loop_gate_rank=4),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=4,
        mamba_dt_rank=3, use_mamba_kernels=False),
    "kimi_linear": _HYBRID,
    "lfm3": dict(layer_types=["conv", "full_attention"]),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "longcat_flash": dict(head_dim=4, num_layers=2, num_hidden_layers=4, ffn_hidden_size=50, expert_ffn_hidden_size=14,
        zero_expert_num=2, moe_topk=3),
    "neomme": dict(head_dim=16, patch_size=32),
    "qwen2_5_vl_text": _MROPE,
    "qwen2_vl_text": _MROPE,
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen4_exp_text": dict(
        layer_types=["linear_attention", "indexed_attention"], ngram_vocab_size_base=50, indexer_n_heads=2, indexer_kv_heads=1,
        indexer_head_dim=8, indexer_budget=64, indexer_compress_ratio=1,
    ),
}  # fmt: skip
EMBEDDED = ("deepseek_ocr2_encoder", "qwen3_omni_moe_talker_code_predictor", "qwen3_omni_moe_talker_text")
"""Types that are given embeddings: sums of their own and of what another model makes."""

MORE_INPUTS: dict[str, dict[str, Any]] = {
    "deepseek_ocr2_encoder": {"num_patches": 4},
    "voxtral_realtime_text": {"t_cond": (1, 1, 48)},
}
"""Numbers, and tensors without a gradient, that a type is given beside its tokens."""

_VISION = (
    "beit", "clip_vision_model", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "ijepa",
        "siglip_vision_model",
    "vit", "vit_msn",
)  # fmt: skip
PATCHES: dict[str, dict[str, Any]] = {
    **{name: {"pixel_values": (3, 3, 8, 8)} for name in _VISION},
    "gemma4_vision": {"pixel_values": (3, 16, 48), "pixel_position_ids": [[x, y] for y in range(4) for x in range(4)]},
    "audio-spectrogram-transformer": {"input_values": (3, 12, 8)},
    "llama4_vision_model": {"pixel_values": (3, 3, 16, 16)},
    "vit_mae": {"pixel_values": (3, 3, 8, 8), "noise": [0.3, 0.1, 0.4, 0.2]},
}
"""Vision towers by themselves: what they are given instead of tokens; positions are the same for each of three images."""

WITHOUT: dict[str, tuple[str, ...]] = {"longformer": ("multiple-choice", "question-answering")}
"""Heads that random tokens cannot be given to: Longformer's finds the question by three separators."""

LABELS, CHOICES = 3, 2
FLOAT32 = ("xglm", "inkling2_loop_text", "inkling2_text")
"""Types whose code has a dtype of its own inside."""


@cache
def planned_types() -> tuple[str, ...]:
    """Model types whose config carries a `base_model_tp_plan`, in alphabetical order."""
    return tuple(sorted(t for t in CONFIG_MAPPING if getattr(CONFIG_MAPPING[t], "base_model_tp_plan", None)))


ALL = sorted({*planned_types(), *MULTIMODAL, *filter(has_data_file, CONFIG_MAPPING)})
"""Every model type that is measured: transformers plans it, or a data file here does."""


@cache
def heads_of(model_type: str) -> tuple[str, ...]:
    """The heads of HEADS that transformers has for the type, which it is measured with; none for a model of several parts."""
    if model_type in MULTIMODAL:
        return ()
    there = (head for head, auto in HEADS.items() if CONFIG_MAPPING[model_type] in auto._model_mapping)
    return tuple(head for head in there if head not in WITHOUT.get(model_type, ()))


def tiny_config(model_type: str, **more: Any) -> PreTrainedConfig:
    """The type's config, two layers deep; `more` goes over everything."""
    own = {**OWN.get(model_type, {}), **more}
    plain = CONFIG_MAPPING[model_type]()
    if model_type in PARTS:
        parts = PARTS[model_type]
        text = tiny_config(plain.get_text_config().model_type, **parts.text)
        return CONFIG_MAPPING[model_type](**{**parts.config, **parts.towers, "text_config": text, **own})
    values = {name: size for name, size in SIZES.items() if _replaceable(plain, name)}
    if "kv_lora_rank" in values:  # latent attention: no grouped kv heads, and the config derives head_dim
        values["num_key_value_heads"] = SIZES["num_attention_heads"]
        values.pop("head_dim", None)
    values |= own
    return CONFIG_MAPPING[model_type](**values)


def _replaceable(config: PreTrainedConfig, name: str) -> bool:
    aliases = getattr(config, "attribute_map", {})
    value = vars(config).get(aliases.get(name, name), "absent")
    return value != "absent" and not isinstance(value, list | dict | PreTrainedConfig)


def causal(config: PreTrainedConfig) -> bool:
    """True if the type has a causal-LM head in transformers."""
    return _head_class(config) is not None


def _head_class(config: PreTrainedConfig) -> Any:
    heads = AutoModelForImageTextToText if config.model_type in PARTS else AutoModelForCausalLM
    return heads if type(config) in heads._model_mapping else None


def _build(config: PreTrainedConfig, head: str = "") -> PreTrainedModel:
    if head:
        config.architectures = config.architectures or []  # of a type with several classes of the head: the first
        return HEADS[head].from_config(config)
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        if causal(config) or type(config) in AutoModel._model_mapping:
            return (_head_class(config) or AutoModel).from_config(config)
    except ValueError as problem:
        if "Could not find" not in str(problem):
            raise
    module = import_module(name)  # parts of multimodal models have no entry in the Auto classes
    classes = [
        c for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, PreTrainedModel) and getattr(c, "config_class", None) is type(config)
        and "For" not in c.__name__ and not c.__name__.endswith("PreTrainedModel")
    ]  # fmt: skip
    if not classes:
        raise NoModelError(f"transformers has no model of its own for {type(config).__name__}")
    return classes[0]._from_config(config)


class NoModelError(Exception):
    """transformers has a config of the type, but no model."""


def tiny_of(
    model_type: str,
    *,
    dtype: torch.dtype | None = None,
    build_only: bool = False,
    experts: str | None = "eager",
    head: str = "",
    **more: Any,
) -> PreTrainedModel:
    """A random model: with the `head` asked for, else the causal LM where there is one, else the base model.

    Equal weights on every call and rank.
    """
    if head.endswith("-classification"):
        more = {"num_labels": LABELS, "classifier_dropout": 0.0, **more}
    config = tiny_config(model_type, **more)
    config.get_text_config()._experts_implementation_internal = experts  # None: grouped products, which know no float64
    if build_only:
        return _build(config, head)
    with torch.device("meta"):
        size = sum(p.numel() for p in _build(config, head).parameters())
    assert size < 4_000_000, f"{model_type} is not tiny: {size} parameters"
    torch.manual_seed(0)
    model = _build(config, head)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(re.search(key, name) for key in model._keys_to_ignore_on_save or ()):
                continue  # such as the positions that the class makes anew when it is loaded
            if parameter.dim() > 2 or not bool(torch.isfinite(parameter).all()):
                parameter.zero_()  # some are left uninitialised
            parameter.add_(torch.randn(parameter.shape) * (0.1 if parameter.dim() == 1 else 0.05))
    for module in model.modules():
        if hasattr(module, "eoi_token_index"):  # an id with an embedding of its own
            module.eoi_token_index = int(batches_for(1, 3, 7)[0]["input_ids"][1, 1])
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():  # `model.to` would make complex buffers real
            tensor.data = tensor.data.to(dtype or _dtype(model_type))
    return model.to(device())


def _dtype(model_type: str) -> torch.dtype:
    return torch.float32 if model_type in FLOAT32 else torch.float64


def batches_for(
    count: int, rows: int, seq: int, *, vocab: int = 101, model_type: str = "", head: str = ""
) -> list[dict[str, torch.Tensor]]:
    """`count` batches, some labels ignored: for any `head` of HEADS the last row padded; with images if the type takes them."""
    generator = torch.Generator().manual_seed(1)
    if head == "image-classification":
        return [_images(generator, rows, model_type) for _ in range(count)]
    if head == "speech-seq2seq-lm":
        batches = batches_for(count, rows, seq, head="seq2seq-lm")
        sounds = torch.randn((rows, 8, 10), generator=generator).to(device(), _dtype(model_type))
        return [{"input_features": sounds, "labels": batch["labels"]} for batch in batches]
    if head:
        make = _batch_of(head)
        return [{name: x.to(device()) for name, x in make(generator, rows, seq, vocab).items()} for _ in range(count)]
    result = []
    for _ in range(count):
        ids = torch.randint(3, vocab, (rows, seq), generator=generator)
        labels = ids.clone()
        labels[0, :2] = -100
        batch = {name: x.to(device()) for name, x in {"input_ids": ids, "labels": labels}.items()}
        if model_type in PARTS:
            batch = with_images(batch, model_type, _dtype(model_type), len(result))
        if model_type in PATCHES:
            batch = {}
        for name, value in {**MORE_INPUTS.get(model_type, {}), **PATCHES.get(model_type, {})}.items():
            batch[name] = value
            if isinstance(value, tuple):
                batch[name] = torch.randn(value, generator=generator).to(device(), _dtype(model_type))
            elif isinstance(value, list):
                batch[name] = torch.tensor([value] * rows, device=device())
        if model_type in EMBEDDED:
            embeds = torch.randn((rows, seq, SIZES["hidden_size"]), generator=generator)
            batch["inputs_embeds"] = embeds.to(device(), _dtype(model_type))
        result.append(batch)
    return result


def _images(generator: torch.Generator, rows: int, model_type: str) -> dict[str, torch.Tensor]:
    shape = PATCHES[model_type]["pixel_values"][1:]
    pixels = torch.randn((rows, *shape), generator=generator).to(device(), _dtype(model_type))
    return {"pixel_values": pixels, "labels": torch.randint(0, LABELS, (rows,), generator=generator).to(device())}


def _batch_of(head: str) -> Callable[[torch.Generator, int, int, int], dict[str, torch.Tensor]]:
    def make(generator: torch.Generator, rows: int, seq: int, vocab: int) -> dict[str, torch.Tensor]:
        def integers(below: int, *shape: int) -> torch.Tensor:
            return torch.randint(0, below, shape, generator=generator)

        leading = (rows, CHOICES) if head == "multiple-choice" else (rows,)
        ids = 3 + integers(vocab - 3, *leading, seq)
        mask = torch.ones_like(ids)
        mask[-1, ..., seq - 2 :] = 0
        ids[..., seq - 3] = 2  # the end of a sentence, where encoder-decoders classify
        ids.masked_fill_(mask == 0, 0)
        batch = {"input_ids": ids, "attention_mask": mask}
        if head == "question-answering":
            return batch | {"start_positions": integers(seq, rows), "end_positions": integers(seq, rows)}
        labels = {
            "masked-lm": lambda: ids.masked_fill(integers(2, rows, seq) == 0, -100),
            "multiple-choice": lambda: integers(CHOICES, rows),
            "seq2seq-lm": lambda: (3 + integers(vocab - 3, rows, seq - 2)).masked_fill(
                integers(4, rows, seq - 2) == 0, -100
            ),
            "sequence-classification": lambda: integers(LABELS, rows),
            "token-classification": lambda: integers(LABELS, rows, seq).masked_fill(integers(4, rows, seq) == 0, -100),
        }
        return batch | {"labels": labels[head]()}

    return make
