"""A causal language model of LLaMA's architecture: transformers' own, with fresh weights."""

from __future__ import annotations

from torch import nn


def llama(
    vocab_size: int,
    hidden: int,
    ffn: int,
    layers: int,
    heads: int,
    context: int = 1024,
    tied: bool = False,
) -> nn.Module:
    """`LlamaForCausalLM`: RMSNorm, rotary positions, SwiGLU, no biases.

    Args:
        hidden: width; `ffn` that of the feed-forward layer.
        heads: of attention, hidden / heads numbers each.
        context: tokens of the longest sequence.
        tied: one matrix as embedding and as output layer.

    Raises: ValueError where the heads do not divide the width; ImportError without transformers.
    """
    if hidden % heads:
        raise ValueError(f"model.hidden={hidden} is no multiple of model.heads={heads}")
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=context,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
