"""A word-level tokenizer made from the world's own words."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EOS, PAD, UNKNOWN = "<eos>", "<pad>", "<unk>"


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token for every word of ``texts``, with the space before it, and for every mark and line end.

    Decoding what was encoded gives the same text again where every word is known; an unknown word is ``<unk>``.
    """
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    words: set[str] = set()
    for text in texts:
        words.update(piece for piece, _ in splitter.pre_tokenize_str(text))
    vocabulary = {word: index for index, word in enumerate((PAD, EOS, UNKNOWN, *sorted(words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
