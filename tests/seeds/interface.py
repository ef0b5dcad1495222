"""What the models' documentation pages list: classes, constructors, methods, outputs. Typed from the pages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Documented:
    """One class of a page.

    Attributes:
        constructor: parameters; a dictionary where the page gives defaults.
        kept: parameters that the page describes, but its signature does not have: they are kept and not read.
        methods: name -> parameters.
        output: class that `forward` returns, and its fields as the page lists them.
    """

    constructor: dict[str, Any] | str = "config"
    kept: str = ""
    methods: dict[str, str] = field(default_factory=dict)
    output: tuple[str, str] | None = None


_ENCODER_DECODER = "input_ids attention_mask decoder_input_ids decoder_attention_mask"
_HEAD_MASKS = "head_mask decoder_head_mask cross_attn_head_mask"
_SOURCE = "encoder_outputs past_key_values inputs_embeds decoder_inputs_embeds"
_OUTPUTS = "output_attentions output_hidden_states output_router_logits"
_STACKS = (
    "past_key_values decoder_hidden_states decoder_attentions cross_attentions encoder_last_hidden_state "
    "encoder_hidden_states encoder_attentions"
)
_ROUTED_STACKS = f"{_STACKS} decoder_router_logits encoder_router_logits"
_DECODER = "input_ids attention_mask position_ids past_key_values inputs_embeds"
_GENERATE = (
    "inputs generation_config logits_processor stopping_criteria prefix_allowed_tokens_fn synced_gpus assistant_model "
    "streamer negative_prompt_ids negative_prompt_attention_mask use_model_defaults custom_generate"
)
_TRANSLATION: dict[str, Any] = {
    "vocab_size": 128112,
    "max_position_embeddings": 1024,
    "encoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "encoder_attention_heads": 16,
    "decoder_layers": 12,
    "decoder_ffn_dim": 4096,
    "decoder_attention_heads": 16,
    "encoder_layerdrop": 0.05,
    "decoder_layerdrop": 0.05,
    "use_cache": True,
    "is_encoder_decoder": True,
    "activation_function": "relu",
    "d_model": 1024,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "init_std": 0.02,
    "decoder_start_token_id": 2,
    "scale_embedding": True,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}

NLLB_MOE = {
    "NllbMoeConfig": Documented(
        {
            **_TRANSLATION,
            "router_bias": False,
            "router_dtype": "float32",
            "router_ignore_padding_tokens": False,
            "num_experts": 128,
            "expert_capacity": 64,
            "encoder_sparse_step": 4,
            "decoder_sparse_step": 4,
            "router_z_loss_coef": 0.001,
            "router_aux_loss_coef": 0.001,
            "second_expert_policy": "all",
            "normalize_router_prob_before_dropping": False,
            "batch_prioritized_routing": False,
            "moe_eval_capacity_token_fraction": 1.0,
            "moe_token_dropout": 0.2,
            "output_router_logits": False,
        },
        kept="classifier_dropout",
    ),
    "NllbMoeTop2Router": Documented(
        methods={
            "route_tokens": "router_logits input_dtype padding_mask",
            "forward": "hidden_states padding_mask",
        }
    ),
    "NllbMoeSparseMLP": Documented("config ffn_dim expert_class", methods={"forward": "hidden_states padding_mask"}),
    "NllbMoeModel": Documented(
        methods={
            "forward": f"{_ENCODER_DECODER} {_HEAD_MASKS} {_SOURCE} use_cache {_OUTPUTS} return_dict cache_position"
        },
        output=("Seq2SeqMoEModelOutput", f"last_hidden_state {_ROUTED_STACKS}"),
    ),
    "NllbMoeForConditionalGeneration": Documented(
        methods={
            "forward": f"{_ENCODER_DECODER} {_HEAD_MASKS} {_SOURCE} labels use_cache {_OUTPUTS} return_dict "
            "cache_position"
        },
        output=("Seq2SeqMoEOutput", f"loss logits {_ROUTED_STACKS}"),
    ),
}

M2M100 = {
    "M2M100Config": Documented({**_TRANSLATION, "tie_word_embeddings": True}),
    "M2M100Tokenizer": Documented(
        "vocab_file spm_file src_lang tgt_lang bos_token eos_token sep_token pad_token unk_token language_codes "
        "sp_model_kwargs num_madeup_words",
        methods={
            "build_inputs_with_special_tokens": "token_ids_0 token_ids_1",
            "get_special_tokens_mask": "token_ids_0 token_ids_1 already_has_special_tokens",
            "create_token_type_ids_from_sequences": "token_ids_0 token_ids_1",
            "save_vocabulary": "save_directory filename_prefix",
        },
    ),
    "M2M100Model": Documented(
        methods={"forward": f"{_ENCODER_DECODER} {_SOURCE} use_cache"},
        output=("Seq2SeqModelOutput", f"last_hidden_state {_STACKS}"),
    ),
    "M2M100ForConditionalGeneration": Documented(
        methods={"forward": f"{_ENCODER_DECODER} {_SOURCE} labels use_cache"},
        output=("Seq2SeqLMOutput", f"loss logits {_STACKS}"),
    ),
}

OLMOE = {
    "OlmoeConfig": Documented(
        {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": None,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-5,
            "use_cache": True,
            "pad_token_id": 1,
            "bos_token_id": None,
            "eos_token_id": 50279,
            "tie_word_embeddings": False,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "clip_qkv": None,
            "num_experts_per_tok": 8,
            "num_experts": 64,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.01,
            "norm_topk_prob": False,
        }
    ),
    "OlmoeModel": Documented(
        methods={"forward": f"{_DECODER} use_cache {_OUTPUTS} return_dict cache_position"},
        output=(
            "MoeModelOutputWithPast",
            "last_hidden_state past_key_values hidden_states attentions router_logits",
        ),
    ),
    "OlmoeForCausalLM": Documented(
        methods={"forward": f"{_DECODER} labels use_cache {_OUTPUTS} return_dict cache_position logits_to_keep"},
        output=(
            "MoeCausalLMOutputWithPast",
            "loss logits aux_loss router_logits past_key_values hidden_states attentions",
        ),
    ),
}

SWITCH_TRANSFORMERS = {
    "SwitchTransformersConfig": Documented(
        {
            "vocab_size": 32128,
            "d_model": 768,
            "d_kv": 64,
            "d_ff": 2048,
            "expert_capacity": 64,
            "num_layers": 12,
            "num_sparse_encoder_layers": 3,
            "num_decoder_layers": 12,
            "num_sparse_decoder_layers": 3,
            "num_heads": 12,
            "num_experts": 8,
            "router_bias": False,
            "router_jitter_noise": 0.01,
            "router_dtype": "float32",
            "router_ignore_padding_tokens": False,
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "dropout_rate": 0.1,
            "router_z_loss_coef": 0.001,
            "router_aux_loss_coef": 0.001,
            "initializer_factor": 1.0,
            "dense_act_fn": "relu",
            "add_router_probs": False,
            "use_cache": True,
        },
        kept="layer_norm_eps",
    ),
    "SwitchTransformersTop1Router": Documented(methods={"forward": "hidden_states"}),
    "SwitchTransformersSparseMLP": Documented(methods={"forward": "hidden_states"}),
    "SwitchTransformersModel": Documented(
        methods={"forward": f"{_ENCODER_DECODER} {_SOURCE} cache_position"},
        output=("Seq2SeqMoEModelOutput", f"last_hidden_state {_ROUTED_STACKS}"),
    ),
    "SwitchTransformersForConditionalGeneration": Documented(
        methods={"forward": f"{_ENCODER_DECODER} {_SOURCE} labels output_router_logits cache_position"},
        output=("Seq2SeqMoEOutput", f"loss logits {_ROUTED_STACKS}"),
    ),
    "SwitchTransformersEncoderModel": Documented(
        methods={"forward": "input_ids attention_mask inputs_embeds use_cache"},
        output=("MoEModelOutput", "last_hidden_state hidden_states attentions router_probs"),
    ),
}

PHIMOE = {
    "PhimoeConfig": Documented(
        {
            "vocab_size": 32064,
            "hidden_size": 4096,
            "intermediate_size": 6400,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "hidden_act": "silu",
            "max_position_embeddings": 131072,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-5,
            "use_cache": True,
            "pad_token_id": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
            "rope_theta": 1000000.0,
            "rope_scaling": None,
            "sliding_window": None,
            "attention_dropout": 0.0,
            "num_experts_per_tok": 2,
            "num_local_experts": 16,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "router_jitter_noise": 0.01,
            "input_jitter_noise": 0.0,
            "attention_bias": False,
            "lm_head_bias": False,
        }
    ),
    "PhimoeModel": Documented(
        methods={"forward": f"{_DECODER} use_cache {_OUTPUTS} cache_position"},
        output=(
            "MoeModelOutputWithPast",
            "last_hidden_state past_key_values hidden_states attentions router_logits",
        ),
    ),
    "PhimoeForCausalLM": Documented(
        methods={
            "forward": f"{_DECODER} labels use_cache {_OUTPUTS} cache_position logits_to_keep",
            "generate": _GENERATE,
        },
        output=(
            "MoeCausalLMOutputWithPast",
            "loss logits aux_loss router_logits past_key_values hidden_states attentions",
        ),
    ),
    "PhimoeForSequenceClassification": Documented(
        methods={"forward": f"{_DECODER} labels use_cache"},
        output=("SequenceClassifierOutputWithPast", "loss logits past_key_values hidden_states attentions"),
    ),
}

PAGES = {
    "NLLB-MoE": NLLB_MOE,
    "M2M100": M2M100,
    "OLMoE": OLMOE,
    "Switch Transformers": SWITCH_TRANSFORMERS,
    "PhiMoE": PHIMOE,
}
#: Methods the pages refer to as those "the library implements for all its models", and attributes their examples use.
ALL_MODELS = (
    "from_pretrained save_pretrained resize_token_embeddings get_input_embeddings set_input_embeddings "
    "get_output_embeddings set_output_embeddings tie_weights num_parameters gradient_checkpointing_enable "
    "gradient_checkpointing_disable enable_input_require_grads get_memory_footprint half bfloat16 float to eval train "
    "can_generate get_parameter_or_buffer init_weights post_init dummy_inputs name_or_path device dtype base_model "
    "set_attn_implementation get_decoder"
)
ALL_CONFIGS = "from_pretrained save_pretrained from_dict to_dict to_json_string to_json_file update from_json_file"
