"""The tokenizer of the miniature world: CLIP's byte-pair encoding, learned from the captions of scenes."""

from __future__ import annotations

import string
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 32
VOCABULARY = 512


def learn_tokenizer(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """Return a tokenizer with one token per word of the captions; other words are split into letters.

    The tokenizer is saved in `folder`. A saved one is loaded and not learned again: new token numbers would not fit
    networks trained with the old ones.
    """
    if not (folder / "merges.txt").exists():
        _learn(captions, folder)
    return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)


def _learn(captions: Iterable[str], folder: Path) -> None:
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = WhitespaceSplit()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[START, END],
        end_of_word_suffix="</w>",
        min_frequency=1,
        show_progress=False,
    )
    letters = [character for character in string.printable if not character.isspace()]
    # Each letter alone, at the end of a word, and before another letter: enough to spell any word.
    spelt = [f"{letter} {letter}{other}" for letter in letters for other in "ab"]
    tokenizer.train_from_iterator([*captions, *spelt], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))


def special_tokens(tokenizer: CLIPTokenizer) -> dict[str, int]:
    """Return the numbers of the special tokens, by their names in a text model's configuration."""
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
