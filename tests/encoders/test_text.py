import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from mim_ray.config.scenario import Text
from mim_ray.encoders.text import build_from_config, build_text
from mim_ray.errors import ArtifactError, ConfigError

ARGS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def saved_bert(tmp_path, tokenizer):
    """A tiny BERT with random weights in the layout of BGE's and BERT's public folders."""
    torch.manual_seed(3)
    net = BertModel(BertConfig(vocab_size=tokenizer.get_vocab_size(), **ARGS)).eval()
    net.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    return tmp_path, net


def test_the_first_tokens_state_is_pooled(tokenizer):
    tower = build_text(Text(model="bert", max_tokens=8, model_args=ARGS), tokenizer).eval()
    tokens = tower.tokenize(["red round shoe", "bag"])
    torch.testing.assert_close(tower(tokens), tower.token_states(tokens)[:, 0])
    assert tower(tokens).shape == (2, 16)


GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}


def test_a_causal_tower_pools_its_last_real_token(tokenizer):
    tower = build_text(Text(model="gpt2", max_tokens=8, model_args=GPT), tokenizer).eval()
    assert tower.causal
    assert not build_text(Text(model="bert", max_tokens=8, model_args=ARGS), tokenizer).causal
    tokens = tower.tokenize(["red round shoe", "bag"])
    states = tower.token_states(tokens)
    lengths = tokens["attention_mask"].sum(dim=1)
    assert lengths[0] > lengths[1]
    torch.testing.assert_close(tower(tokens), torch.stack([states[row, n - 1] for row, n in enumerate(lengths)]))
    torch.testing.assert_close(tower(tower.tokenize(["bag"])), tower(tokens)[1:])


def test_titles_are_cut_and_padded_and_missing_ones_are_empty(tokenizer):
    tower = build_text(Text(model="bert", max_tokens=5, model_args=ARGS), tokenizer)
    tokens = tower.tokenize(["red round shoe red round shoe", None, ""])
    assert tokens["input_ids"].shape == (3, 5)
    assert tokens["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]


def test_padding_changes_nothing(tokenizer):
    tower = build_text(Text(model="bert", max_tokens=8, model_args=ARGS), tokenizer).eval()
    alone = tower(tower.tokenize(["bag"]))
    beside = tower(tower.tokenize(["bag", "blue square bag with dots"]))[:1]
    torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-5)


def test_weights_and_tokenizer_of_a_local_folder_are_loaded(saved_bert):
    folder, net = saved_bert
    tower = build_text(Text(model="bert", weights=str(folder), max_tokens=8), None).eval()
    tokens = tower.tokenize(["red round shoe", "bag"])
    torch.testing.assert_close(tower.token_states(tokens), net(**tokens).last_hidden_state)


def test_weights_of_another_model_type_are_refused_with_both_names(saved_bert):
    with pytest.raises(ArtifactError, match=r"'bert' model.*asks for 'roberta'"):
        build_text(Text(model="roberta", weights=str(saved_bert[0])), None)


def test_pickled_weights_are_never_loaded(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="no safetensors"):
        build_text(Text(model="bert", weights=str(tmp_path)), None)


def test_code_in_a_model_folder_never_runs(saved_bert):
    folder, _ = saved_bert
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w').close()\nclass Config: pass\nclass Model: pass\n"
    )
    build_text(Text(model="bert", weights=str(folder), max_tokens=8), None)  # the library's own class is used
    assert not (folder / "ran").exists()


def test_an_unknown_model_type_suggests_the_nearest(tokenizer):
    with pytest.raises(ConfigError, match=r"'brt' is no transformers model type; did you mean .*bert"):
        build_text(Text(model="brt"), tokenizer)


def test_more_tokens_than_positions_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="max_tokens = 64 is more than the 10 positions"):
        build_text(Text(model="bert", max_tokens=64, model_args=ARGS | {"max_position_embeddings": 10}), tokenizer)


def test_wrong_arguments_are_a_sentence(tokenizer):
    with pytest.raises(ConfigError, match="model_args"):
        build_text(Text(model="bert", model_args={"hidden_size": 15, "num_attention_heads": 2}), tokenizer)


def test_a_tower_without_weights_needs_a_tokenizer():
    with pytest.raises(ConfigError, match="tokenizer trained on titles"):
        build_text(Text(model="bert"), None)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode": "mean", "embedding_dimension": 16}, "mean"),
    ],
)
def test_the_folders_own_pooling_is_obeyed(saved_bert, config, expected, tokenizer):
    folder, net = saved_bert
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    tower = build_text(Text(model="bert", weights=str(folder), max_tokens=8), None).eval()
    tokens = tower.tokenize(["red round shoe", "bag"])
    states, lengths = net(**tokens).last_hidden_state, tokens["attention_mask"].sum(dim=1).tolist()
    by_hand = {
        "cls": lambda row, n: states[row, 0],
        "mean": lambda row, n: states[row, :n].mean(dim=0),
        "lasttoken": lambda row, n: states[row, n - 1],
    }[expected]
    torch.testing.assert_close(tower(tokens), torch.stack([by_hand(row, n) for row, n in enumerate(lengths)]))
    again = build_from_config(tower.described(), tower.tokenizer, 8)
    assert again.pooling == expected


@pytest.mark.parametrize("config", [{"pooling_mode_max_tokens": True}, {"pooling_mode": ["cls", "mean"]}])
def test_an_unknown_pooling_is_refused(saved_bert, config):
    folder, _ = saved_bert
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"known are cls, mean, lasttoken"):
        build_text(Text(model="bert", weights=str(folder)), None)


def test_gpt2s_own_tokenizer_is_made_to_end_titles(tmp_path):
    letters = {letter: row for row, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters | {"<|endoftext|>": len(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    GPT2Model(GPT2Config(vocab_size=len(letters) + 1, **GPT)).save_pretrained(tmp_path)
    tower = build_text(Text(model="gpt2", weights=str(tmp_path), max_tokens=6), None).eval()
    tokens = tower.tokenize(["", "ab", "much too long"])
    assert [
        row[: int(n)].tolist()[-1]
        for row, n in zip(tokens["input_ids"], tokens["attention_mask"].sum(dim=1), strict=True)
    ] == [len(letters)] * 3
    assert tokens["attention_mask"].sum(dim=1).tolist() == [1, 3, 6]
    torch.testing.assert_close(tower(tower.tokenize(["ab"])), tower(tokens)[1:2])


def test_roberta_counts_positions_after_its_padding(tokenizer):
    args = ARGS | {"max_position_embeddings": 12, "pad_token_id": 1}
    with pytest.raises(ConfigError, match="10 positions"):
        build_text(Text(model="roberta", max_tokens=11, model_args=args), tokenizer)
    tower = build_text(Text(model="roberta", max_tokens=10, model_args=args), tokenizer)
    tower(tower.tokenize(["red " * 20]))


def test_encoder_decoders_are_refused(tokenizer):
    args = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ConfigError, match="encoder-decoder"):
        build_text(Text(model="t5", model_args=args), tokenizer)


def test_weights_with_missing_layers_are_refused(saved_bert):
    folder, net = saved_bert
    state = {key: value for key, value in net.state_dict().items() if "attention.self.query" not in key}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"lack 2 of the bert model"):
        build_text(Text(model="bert", weights=str(folder)), None)
