import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from mim_ray.config.scenario import Encoders
from mim_ray.encoders.item_encoder import ItemEncoder, encode_batch, encode_queries, load_for_tables, unit
from mim_ray.errors import ArtifactError


def images(count: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def test_forward_gives_all_three_embeddings(encoder):
    tokens = encoder.text.tokenize(["red bag", "blue hat"])
    both = torch.ones(2, dtype=torch.bool)
    embedded = encoder.eval()(torch.from_numpy(images(2)), both, tokens, both)
    assert embedded.image.shape == embedded.text.shape == embedded.mm.shape == (2, 8)
    torch.testing.assert_close(embedded.image, encoder.encode_image(torch.from_numpy(images(2))))
    torch.testing.assert_close(embedded.text, encoder.encode_text(tokens))
    torch.testing.assert_close(embedded.mm, encoder.fuse(embedded.image, embedded.text))


def test_a_missing_modality_is_zero_and_its_input_does_not_matter(encoder):
    encoder.eval()
    has_image, has_text = torch.tensor([True, False]), torch.tensor([False, True])
    first = encoder(torch.from_numpy(images(2)), has_image, encoder.text.tokenize(["", "hat"]), has_text)
    other = images(2)
    other[1] = 255 - other[1]
    second = encoder(torch.from_numpy(other), has_image, encoder.text.tokenize(["red bag", "hat"]), has_text)
    assert first.image[1].abs().sum() == 0
    assert first.text[0].abs().sum() == 0
    torch.testing.assert_close(first.mm, second.mm, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.mm[0], encoder.fuse(first.image, torch.zeros(2, 8))[0])


def test_missing_modalities_keep_gradients_finite(encoder):
    nothing = torch.zeros(2, dtype=torch.bool)
    embedded = encoder(torch.from_numpy(images(2)), nothing, encoder.text.tokenize([None, None]), nothing)
    unit(embedded.mm).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters() if p.grad is not None)


def test_encode_batch_gives_unit_rows_and_zeros_for_items_with_neither(encoder):
    rows = encode_batch(encoder, ["red bag", None, "hat", "  "], images(4), np.array([True, True, False, False]))
    assert rows.dtype == np.float32
    assert np.linalg.norm(rows, axis=1) == pytest.approx([1, 1, 1, 0], abs=1e-5)


def test_a_query_is_its_pictures_embedding_else_its_texts(encoder):
    titles, pictures, has = ["red bag", None, "hat", "  "], images(4), np.array([True, True, False, False])
    rows = encode_queries(encoder, titles, pictures, has)
    assert rows.dtype == np.float32
    with torch.inference_mode():
        encoder.eval()
        of_images = unit(encoder.encode_image(torch.from_numpy(pictures[:2])))
        of_text = unit(encoder.encode_text(encoder.text.tokenize(["hat"])))
    np.testing.assert_allclose(rows[:2], of_images, atol=1e-5)
    np.testing.assert_allclose(rows[2:3], of_text, atol=1e-5)
    assert not rows[3].any()
    assert encode_queries(encoder, [], images(0), np.zeros(0, bool)).shape == (0, encoder.width)


def test_encode_batch_does_not_depend_on_what_stands_beside_an_item(encoder):
    titles, pictures, has = ["red bag", None, "blue square bag with dots"], images(3), np.array([True, True, False])
    together = encode_batch(encoder, titles, pictures, has)
    alone = [encode_batch(encoder, titles[i : i + 1], pictures[i : i + 1], has[i : i + 1])[0] for i in range(3)]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)


def test_encode_batch_leaves_the_training_mode_as_it_was(encoder):
    encoder.train()
    encode_batch(encoder, ["hat"], images(1), np.array([True]))
    assert encoder.training


def test_encode_batch_of_nothing_is_empty(encoder):
    assert encode_batch(encoder, [], images(0), np.zeros(0, bool)).shape == (0, 8)


def test_encode_batch_refuses_pictures_of_another_size(encoder):
    with pytest.raises(ValueError, match="16 x 16"):
        encode_batch(encoder, ["hat"], images(1, size=24), np.array([True]))


def test_the_same_seed_builds_the_same_encoder(settings, tokenizer):
    first, second, other = (ItemEncoder.build(settings, tokenizer, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_building_leaves_the_callers_random_numbers_alone(settings, tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    ItemEncoder.build(settings, tokenizer, 0)
    assert torch.equal(torch.rand(3), expected)


def test_save_and_load_give_the_same_encoder(encoder, settings, tmp_path):
    assert encoder.encoder_version is None
    version = encoder.save(str(tmp_path), stage="csft")
    loaded = ItemEncoder.load(str(tmp_path), settings)
    assert loaded.encoder_version == encoder.encoder_version == version
    assert version.startswith("csft-")
    assert len(version) == len("csft-") + 12
    arguments = (["red bag", None], images(2), np.array([False, True]))
    assert np.array_equal(encode_batch(loaded, *arguments), encode_batch(encoder, *arguments))
    assert not loaded.training


def test_the_layout_for_tables_changes_neither_embeddings_nor_version(encoder, tmp_path):
    encoder.save(str(tmp_path / "first"), stage="csft")
    plain, laid_out = ItemEncoder.load(str(tmp_path / "first")), load_for_tables(str(tmp_path / "first"))
    kernels = [p for p in laid_out.vision.net.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert kernels
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    batch = (["red bag", None, "hat"], images(3), np.array([True, True, False]))
    np.testing.assert_allclose(encode_batch(laid_out, *batch), encode_batch(plain, *batch), atol=1e-5)
    assert laid_out.save(str(tmp_path / "again"), stage="csft") == plain.encoder_version


def test_what_is_saved_is_json_and_safetensors(encoder, tmp_path):
    encoder.save(str(tmp_path), stage="csft")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["encoder.json", "model.safetensors", "tokenizer.json"]


def test_the_version_follows_the_weights_and_nothing_else(encoder, tmp_path):
    first = encoder.save(str(tmp_path / "a"), stage="csft")
    assert encoder.save(str(tmp_path / "b"), stage="csft") == first
    assert encoder.save(str(tmp_path / "b"), stage="pretraining").partition("-")[2] == first.partition("-")[2]
    assert ItemEncoder.load(str(tmp_path / "a")).save(str(tmp_path / "c"), stage="csft") == first
    with torch.no_grad():
        encoder.text_projection.bias += 1e-3
    assert encoder.save(str(tmp_path / "d"), stage="csft") != first


def test_another_architecture_than_asked_for_is_refused_with_both_names(encoder, settings, tmp_path):
    encoder.save(str(tmp_path), stage="csft")
    wanted = Encoders.model_validate(settings.model_dump() | {"vision": {"model": "test_resnet", "image_size": 32}})
    with pytest.raises(ArtifactError, match=r"holds eva02_tiny_patch14_224.*asks for test_resnet"):
        ItemEncoder.load(str(tmp_path), wanted)


def test_weights_that_do_not_fit_their_description_are_refused(encoder, tmp_path):
    encoder.save(str(tmp_path), stage="csft")
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("image_projection.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"other weights than eva02_tiny_patch14_224.*image_projection"):
        ItemEncoder.load(str(tmp_path))


def test_damaged_and_missing_encoders_are_a_sentence(encoder, tmp_path):
    with pytest.raises(ArtifactError, match="is not there"):
        ItemEncoder.load(str(tmp_path / "nothing"))
    encoder.save(str(tmp_path), stage="csft")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="damaged"):
        ItemEncoder.load(str(tmp_path))
    (tmp_path / "encoder.json").write_text(json.dumps({"settings": {"colour": 1}}))
    with pytest.raises(ArtifactError, match="does not describe an encoder"):
        ItemEncoder.load(str(tmp_path))


def test_an_encoder_started_from_public_weights_reloads_without_them(settings, tokenizer, tmp_path):
    from transformers import BertConfig, BertModel

    vision, text = tmp_path / "eva", tmp_path / "bge"
    vision.mkdir()
    net = timm.create_model("eva02_tiny_patch14_224", num_classes=0, img_size=16, **settings.vision.model_args)
    save_file(net.state_dict(), vision / "model.safetensors")
    BertModel(BertConfig(vocab_size=tokenizer.get_vocab_size(), **settings.text.model_args)).save_pretrained(text)
    (text / "tokenizer.json").write_text(tokenizer.to_str())
    values = settings.model_dump()
    values["vision"]["weights"], values["text"]["weights"] = str(vision), str(text)
    encoder = ItemEncoder.build(Encoders.model_validate(values), None, seed=0)
    encoder.save(str(tmp_path / "saved"), stage="untrained")
    for folder in (vision, text):
        for file in folder.iterdir():
            file.unlink()
    loaded = ItemEncoder.load(str(tmp_path / "saved"), settings)
    arguments = (["red bag"], images(1), np.array([True]))
    assert np.array_equal(encode_batch(loaded, *arguments), encode_batch(encoder, *arguments))


def test_towers_and_heads_hold_every_parameter_once(encoder):
    parameters = [*encoder.tower_parameters(), *encoder.head_parameters()]
    assert {id(p) for p in parameters} == {id(p) for p in encoder.parameters()}
    assert len(parameters) == len({id(p) for p in parameters})


def test_the_rank_of_low_rank_fusion_is_part_of_the_architecture(settings, tokenizer, tmp_path):
    low = settings.model_copy(update={"fusion": "low_rank_tfn", "fusion_rank": 2})
    ItemEncoder.build(low, tokenizer, 0).save(str(tmp_path), stage="csft")
    with pytest.raises(ArtifactError, match=r"of rank 2, but .* of rank 3"):
        ItemEncoder.load(str(tmp_path), low.model_copy(update={"fusion_rank": 3}))
    ItemEncoder.build(settings, tokenizer, 0).save(str(tmp_path), stage="csft")
    ItemEncoder.load(str(tmp_path), settings.model_copy(update={"fusion_rank": 3}))  # exact fusion has none
