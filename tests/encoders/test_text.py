import json

import pytest
import torch
from transformers import BertConfig, BertModel

from mim_ray.config.scenario import Text
from mim_ray.encoders.text import build_text
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
