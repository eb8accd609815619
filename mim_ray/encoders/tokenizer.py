"""A WordPiece tokenizer trained on the catalogue's titles, for language towers that bring none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that masked language modelling must know; None where the tokenizer has no such token."""

    pad: int
    cls: int | None
    mask: int | None
    all: tuple[int, ...]


def train_tokenizer(titles: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """WordPiece over lower-cased words, as BERT's. The same titles give the same tokenizer, in any process.

    The library alone does not promise that: it numbers the continuing characters ("##a") in the order of a hash table,
    and the numbers break ties later. So they are given to it in a fixed order, and the tokenizer is made anew from the
    vocabulary. At most a quarter of the vocabulary goes to characters, the most frequent ones.
    """
    titles = list(titles)
    empty = _tokenizer({token: row for row, token in enumerate(SPECIAL)})
    counts = Counter(letter for title in titles for letter in empty.normalizer.normalize_str(title) if letter.strip())
    letters = sorted(sorted(counts), key=lambda letter: -counts[letter])[: vocabulary_size // 4]
    continuing = [f"##{letter}" for letter in sorted(letters)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[*SPECIAL, *continuing],
        initial_alphabet=sorted(letters),
        limit_alphabet=len(letters),
        show_progress=False,
    )
    empty.train_from_iterator(titles, trainer)
    return _tokenizer(empty.get_vocab())


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """The special ids of BERT-like (`[PAD]`) and RoBERTa-like (`<pad>`) tokenizers."""

    def first(*names: str) -> int | None:
        return next((i for i in map(tokenizer.token_to_id, names) if i is not None), None)

    pad = first(PAD, "<pad>")
    special = tuple(sorted(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special))
    return SpecialTokens(0 if pad is None else pad, first(CLS, "<s>"), first(MASK, "<mask>"), special)


def _tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNK))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
        special_tokens=[(CLS, vocabulary[CLS]), (SEP, vocabulary[SEP])],
    )
    return tokenizer
