"""Tokenizers, encoders and decoders of a few kilobytes, written as transformers writes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["SIGNS", "write_bert", "write_gpt", "write_tokenizer"]

SIGNS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_tokenizer(folder: Path, pieces: Sequence[str], **signs: str) -> int:
    """A tokenizer of word pieces, with BERT's signs before the given pieces; how many there are.

    signs: by default those of BERT.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: number for number, piece in enumerate([*SIGNS, *pieces])}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    if not signs:
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    signs = signs or {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    fast: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", **signs)
    fast.save_pretrained(folder)
    return len(vocabulary)


def write_bert(folder: Path, pieces: Sequence[str], seed: int = 0, positions: int = 64) -> Path:
    """An encoder of 2 layers and 12 dimensions with random weights."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    count = write_tokenizer(folder, pieces)
    config: Any = BertConfig(vocab_size=count, max_position_embeddings=positions, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = BertModel(config, add_pooling_layer=False)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def write_gpt(folder: Path, pieces: Sequence[str]) -> Path:
    """A decoder of 2 layers and 12 dimensions with random weights; [SEP] begins and ends its texts."""
    from transformers import GPT2Config, GPT2Model

    count = write_tokenizer(folder, pieces, bos_token="[SEP]", eos_token="[SEP]")
    config: Any = GPT2Config(
        vocab_size=count, n_positions=64, n_embd=12, n_layer=2, n_head=2, bos_token_id=3, eos_token_id=3
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = GPT2Model(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder
