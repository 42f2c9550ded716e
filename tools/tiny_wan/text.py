"""The tiny text side: a frozen random UMT5 and a tokenizer of whole words.

A random encoder is enough: it maps captions to well separated sequences of vectors, and nobody
trains it.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import attrs
import torch
from moving_digits import DIGITS, DIRECTIONS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
TEXT_DIM = 64
LONGEST = 64
"""Tokens of a caption that are read at most."""


@attrs.frozen(kw_only=True)
class Language:
    """The words of all captions.

    Attributes:
        words: in lower case, in the order of their indices, after the three marks.
        length: tokens that every caption is padded to. Padding is attended, so training and
            sampling must agree on it.
        punctuation: signs are words of their own, and not parts of those that they stand beside.
    """

    words: tuple[str, ...]
    length: int
    punctuation: bool = True

    @property
    def vocabulary(self) -> dict[str, int]:
        return {word: index for index, word in enumerate((PAD, END, UNKNOWN, *self.words))}


MOVING_DIGITS = Language(
    words=("the", "digit", "moving", *DIGITS, *DIRECTIONS), length=8, punctuation=False
)
"""Six tokens (five words and the end mark) and two of padding."""


def language_of(captions: Sequence[str], most_words: int) -> Language:
    """Collect the most frequent words of captions; others will be unknown."""
    counts: Counter[str] = Counter()
    longest = 0
    for caption in captions:
        found = re.findall(r"\w+|[^\w\s]+", caption.lower())  # as Whitespace divides
        counts.update(found)
        longest = max(longest, len(found))
    words = [word for word, _ in counts.most_common(most_words)]
    return Language(words=tuple(words), length=min(longest + 1, LONGEST))


def build_tokenizer(language: Language = MOVING_DIGITS) -> PreTrainedTokenizerFast:
    """Word level; the end mark is appended, as UMT5's own tokenizer does, so that the empty prompt
    is not an empty sequence.
    """
    vocabulary = language.vocabulary
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace() if language.punctuation else WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=language.length,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write it so that transformers 4 reads it too: version 5 records a class, `TokenizersBackend`,
    that 4 does not have.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("backend", None)
    settings.pop("is_local", None)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def build_text_encoder(seed: int = 0, language: Language = MOVING_DIGITS) -> UMT5EncoderModel:
    """Build the encoder; `initializer_factor=1.0` keeps the outputs at unit scale."""
    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=len(language.vocabulary),
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        initializer_factor=1.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return UMT5EncoderModel(config).eval().requires_grad_(False)


@torch.no_grad()
def embed(
    tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, prompts: list[str]
) -> torch.Tensor:
    """`[P, L, D]`, zero beyond each prompt's length, as `WanPipeline` makes it."""
    tokens = tokenizer(
        prompts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    hidden = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return hidden * tokens.attention_mask.unsqueeze(-1).to(hidden.dtype)
