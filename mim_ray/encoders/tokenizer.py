"""A WordPiece tokenizer trained on the catalogue's titles, for language towers that bring none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that masked language modelling must know; None where the tokenizer has no such token."""

    pad: int
    cls: int | None
    mask: int | None
    all: tuple[int, ...]


def train_tokenizer(titles: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """WordPiece over lower-cased words, as BERT's. The same titles in the same order give the same tokenizer."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary_size, special_tokens=[PAD, UNK, CLS, SEP, MASK], show_progress=False
    )
    tokenizer.train_from_iterator(titles, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
        special_tokens=[(CLS, tokenizer.token_to_id(CLS)), (SEP, tokenizer.token_to_id(SEP))],
    )
    return tokenizer


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """The special ids of BERT-like (`[PAD]`) and RoBERTa-like (`<pad>`) tokenizers."""

    def first(*names: str) -> int | None:
        return next((i for i in map(tokenizer.token_to_id, names) if i is not None), None)

    pad = first(PAD, "<pad>")
    special = tuple(sorted(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special))
    return SpecialTokens(0 if pad is None else pad, first(CLS, "<s>"), first(MASK, "<mask>"), special)
