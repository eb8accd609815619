import subprocess
import sys

import pytest

from mim_ray.encoders.tokenizer import special_tokens, train_tokenizer

TITLES = ["red round shoe", "blue square bag with dots", "Green Round hat", "red bag"] * 5


def test_the_same_titles_give_the_same_tokenizer_in_any_order_of_hash_tables():
    assert len({train_tokenizer(TITLES, 100).to_str() for _ in range(5)}) == 1


@pytest.mark.slow
def test_another_process_trains_the_same_tokenizer():
    script = (
        "from mim_ray.encoders.tokenizer import train_tokenizer as train\n"
        f"print(train({TITLES!r}, 100).to_str(), end='')"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert other.stdout == train_tokenizer(TITLES, 100).to_str()


def test_known_words_become_tokens_between_the_special_ones():
    tokenizer = train_tokenizer(TITLES, 200)
    encoding = tokenizer.encode("RED round shoe")
    assert encoding.tokens == ["[CLS]", "red", "round", "shoe", "[SEP]"]


def test_characters_take_at_most_a_quarter_of_the_vocabulary_and_unknown_ones_are_unknown():
    titles = ["".join(chr(0x4E00 + i * 7 + j) for j in range(7)) for i in range(200)] + ["aa aa aa"]
    tokenizer = train_tokenizer(titles, 80)
    assert tokenizer.get_vocab_size() <= 80
    assert "a" in tokenizer.get_vocab()
    assert tokenizer.encode("ü").tokens == ["[CLS]", "[UNK]", "[SEP]"] or tokenizer.encode("ü").tokens[1] == "u"


def test_no_titles_still_give_a_tokenizer():
    tokenizer = train_tokenizer([], 64)
    assert tokenizer.encode("anything").tokens == ["[CLS]", "[UNK]", "[SEP]"]


def test_special_tokens_are_found():
    special = special_tokens(train_tokenizer(TITLES, 100))
    assert (special.pad, special.cls, special.mask) == (0, 2, 4)
    assert special.all == (0, 1, 2, 3, 4)
