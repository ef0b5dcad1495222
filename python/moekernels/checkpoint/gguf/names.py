"""What GGUF files call the weights of our models: one stack of all experts per projection."""

from __future__ import annotations

from moekernels.checkpoint.keymap import KeyMap, Rule


def _decoder(experts: str) -> KeyMap:
    """The names of a decoder of sparse layers.

    Args:
        experts: our name of the sparse MLP within a layer.
    """
    layer = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
    }
    model = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
    stack = f"layers.{{layer}}.{experts}.experts"
    return KeyMap(
        rules=(
            *(
                Rule(f"{theirs}.{kind}", f"{ours}.{kind}")
                for theirs, ours in model.items()
                for kind in ("weight", "bias")
            ),
            *(
                Rule(f"blk.{{layer}}.{theirs}.{kind}", f"layers.{{layer}}.{ours}.{kind}")
                for theirs, ours in layer.items()
                for kind in ("weight", "bias")
            ),
            Rule("blk.{layer}.ffn_gate_inp.weight", f"layers.{{layer}}.{experts}.router.weight"),
            Rule("blk.{layer}.ffn_gate_exps.weight", f"{stack}.gate_up_proj", part=0, parts=2),
            Rule("blk.{layer}.ffn_up_exps.weight", f"{stack}.gate_up_proj", part=1, parts=2),
            Rule("blk.{layer}.ffn_down_exps.weight", f"{stack}.down_proj"),
        ),
        heads=("output.weight", "output.bias"),
        # Part of the configuration.
        ignored=(r"rope_factors_(long|short)\.weight",),
    )


GGUF_KEY_MAPS: dict[str, KeyMap] = {"olmoe": _decoder("mlp"), "phimoe": _decoder("block_sparse_moe")}
