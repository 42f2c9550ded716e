"""A tokenizer of eight words, for tiny pipelines whose text encoder is random."""

from __future__ import annotations

from pathlib import Path

WORDS = ("<pad>", "</s>", "<unk>", "a", "seven", "moving", "left", "&")


def save(folder: Path, *, max_length: int) -> None:
    """Write a WordLevel tokenizer that ends each prompt with ``</s>``, as T5's does.

    Args:
        max_length: ``model_max_length`` of its configuration.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
    ).save_pretrained(folder)
