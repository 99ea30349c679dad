"""The GGUF file as a Hugging Face checkpoint of `LlamaForCausalLM`: weights in bfloat16, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path

import torch
from gguf import GGUFReader, TokenType, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""What the model was tuned with; the chat template adds it where a conversation has no system message."""
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n"
    + SYSTEM
    + "<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] in ['image', 'image_url'] %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's name of a tensor of a layer -> that of transformers."""


def write(gguf: Path, path: Path) -> None:
    """Write the checkpoint folder `path` from the file `gguf`."""
    reader = GGUFReader(gguf)
    tokenizer = read_tokenizer(reader)
    model = _read_model(reader, tokenizer)
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)


def _read_model(reader: GGUFReader, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The language model in float32; transformers' own reader of GGUF files would ask for another dependency."""

    def value(key: str) -> int | float:
        return reader.fields[f"llama.{key}"].contents()

    config = LlamaConfig(
        vocab_size=value("vocab_size"),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        block, *name = tensor.name.split(".")
        if block == "blk":
            layer, part, kind = name
            weight = _unpaired(weight, heads[part]) if part in heads else weight
            weights[f"model.layers.{layer}.{TENSORS[part]}.{kind}"] = weight
        else:
            weights[{"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[block] + ".weight"] = weight
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    model.generation_config.do_sample = False
    return model


def _unpaired(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection, `[heads * head_dim, hidden]`, in the order of transformers.

    GGUF stores the two rows that a rotary frequency turns side by side, transformers half a head apart.
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def read_tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """The tokenizer from the file's own vocabulary and merges.

    It is a byte-level BPE that sees every digit alone: what the file names as its pre-tokenizer, `smollm`.
    (transformers' own reader of GGUF files makes a SentencePiece tokenizer of it, which splits differently.)
    """
    fields = reader.fields
    tokens, merges, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type"))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    named = {
        name: tokens[fields[f"tokenizer.ggml.{key}_token_id"].contents()]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        chat_template=CHAT_TEMPLATE,
        model_max_length=fields["llama.context_length"].contents(),
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": token for name, token in named.items()},
    )
