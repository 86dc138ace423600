"""The tiny text encoders: real T5 and CLIP classes at a small size, and their tokenizers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

_VOCABULARY = 480
T5_TOKENS = 24
CLIP_TOKENS = 24


def t5_tokenizer(captions: Iterable[str]) -> Any:
    """A byte-level BPE with T5's special tokens first; pads to 24 tokens."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = _byte_level(captions, special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=T5_TOKENS,
    )


def clip_tokenizer(captions: Iterable[str]) -> Any:
    """A byte-level BPE that ends like CLIP's: the end token has the largest id and pads."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = _byte_level(captions, [])
    tokenizer.add_special_tokens([start, end])
    ids = [(token, tokenizer.token_to_id(token)) for token in (start, end)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=ids
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        unk_token=end,
        model_max_length=CLIP_TOKENS,
    )


def t5_model(vocabulary: int) -> nn.Module:
    """Two layers, 64 wide."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def clip_model(vocabulary: int) -> nn.Module:
    """Two layers, 64 wide, pooled at the largest token id as CLIP-L is."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=1,
            max_position_embeddings=CLIP_TOKENS,
            hidden_act="quick_gelu",
            eos_token_id=2,
            bos_token_id=0,
            pad_token_id=1,
        )
    )


def _byte_level(captions: Iterable[str], special: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer
