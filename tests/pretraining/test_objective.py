import math

import pytest
import torch

from mim_ray.config.scenario import Text, Vision
from mim_ray.encoders.item_encoder import ItemEncoder
from mim_ray.encoders.text import TextTower, build_text
from mim_ray.encoders.tokenizer import SpecialTokens, train_tokenizer
from mim_ray.encoders.vision import build_vision
from mim_ray.pretraining.objective import (
    NOT_ASKED,
    ImageTextAligner,
    MaskedImageModel,
    MaskedLanguageModel,
    NextTokenModel,
    draw_image_mask,
    mask_cell,
    mask_tokens,
    masked_l1,
    next_tokens,
)

TOWERS = [
    Vision(
        model="eva02_tiny_patch14_224",
        image_size=32,
        model_args={"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
    ),
    Vision(model="test_vit", image_size=32, model_args={"embed_dim": 24, "depth": 1, "num_heads": 2}),
    Vision(model="test_resnet", image_size=32),
    Vision(model="test_convnext", image_size=48),
    Vision(
        model="swin_tiny_patch4_window7_224",
        image_size=32,
        model_args={"embed_dim": 16, "window_size": 4, "depths": [1, 1], "num_heads": [1, 2]},
    ),
]
NAMES = [tower.model for tower in TOWERS]


@pytest.mark.parametrize(
    ("image_size", "stride", "cell"),
    [(224, 14, 14), (224, 32, 32), (32, 8, 8), (32, 32, 8), (48, 32, 12), (50, 16, 10)],
)
def test_hidden_cells_tile_the_image_with_at_least_four_a_side(image_size, stride, cell):
    assert mask_cell(image_size, stride) == cell
    assert image_size % cell == 0


def test_every_image_hides_the_same_number_of_cells_in_other_places():
    mask = draw_image_mask(200, 4, 0.6, torch.Generator().manual_seed(0))
    assert mask.flatten(1).sum(1).unique().tolist() == [10]  # round(0.6 * 16)
    assert mask.float().mean(0).min() > 0.4
    assert mask.float().mean(0).max() < 0.8


@pytest.mark.parametrize(("ratio", "hidden"), [(0.0, 1), (1.0, 15)])
def test_something_is_always_hidden_and_something_left(ratio, hidden):
    assert draw_image_mask(3, 4, ratio, torch.Generator()).flatten(1).sum(1).tolist() == [hidden] * 3


def test_masked_error_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    drawn, image = torch.randn(2, 2, 3, 4, 4, generator=generator)
    hidden = torch.rand(2, 4, 4, generator=generator) < 0.5
    errors = [
        abs(float(drawn[b, c, y, x]) - float(image[b, c, y, x]))
        for b in range(2)
        for y in range(4)
        for x in range(4)
        for c in range(3)
        if hidden[b, y, x]
    ]
    assert float(masked_l1(drawn, image, hidden)) == pytest.approx(math.fsum(errors) / len(errors), rel=1e-5)


@pytest.mark.parametrize("settings", TOWERS, ids=NAMES)
def test_hidden_pixels_cannot_be_seen_and_the_others_can(settings):
    torch.manual_seed(0)
    model = MaskedImageModel(build_vision(settings)).eval()
    size = settings.image_size
    pixels = torch.randint(0, 256, (1, 3, size, size)).to(torch.uint8)
    mask = draw_image_mask(1, model.side, 0.6, torch.Generator().manual_seed(0))
    hidden = model.hidden_pixels(mask)
    with torch.no_grad():
        normal = model.reconstruct(model.vision.normalise(pixels), mask)
        changed = torch.where(hidden.unsqueeze(1), 255 - pixels, pixels)
        same = model.reconstruct(model.vision.normalise(changed), mask)
        other = model.reconstruct(model.vision.normalise(255 - changed), mask)
    assert normal.shape == (1, 3, size, size)
    assert torch.equal(normal, same)
    assert not torch.equal(normal, other)


@pytest.mark.parametrize("settings", TOWERS[:3], ids=NAMES[:3])
def test_the_drawing_of_a_cell_lands_where_the_cell_is(settings):
    model = MaskedImageModel(build_vision(settings)).eval()
    torch.nn.init.zeros_(model.head.weight)
    with torch.no_grad():  # channel c, row y, column x of a cell from output channel c * stride^2 + y * stride + x
        model.head.bias.copy_(torch.arange(len(model.head.bias), dtype=torch.float32))
        drawn = model.reconstruct(torch.zeros(1, 3, 32, 32), torch.zeros(1, model.side, model.side, dtype=torch.bool))
    stride = model.vision.stride
    assert float(drawn[0, 1, 2, 3]) == stride**2 + 2 * stride + 3


@pytest.mark.parametrize("settings", TOWERS, ids=NAMES)
def test_masked_image_modelling_learns_with_transformers_and_convolutions(settings):
    torch.manual_seed(0)
    model = MaskedImageModel(build_vision(settings))
    size = settings.image_size
    pixels = torch.randint(0, 256, (8, 3, 1, 1)).expand(8, 3, size, size).to(torch.uint8)  # one colour each
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        loss = model(pixels, draw_image_mask(8, model.side, 0.5, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert model.mask_token.grad is not None
    assert model.mask_token.grad.abs().sum() > 0


def token_batch(rows: int, length: int, special: SpecialTokens, vocabulary: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(len(special.all), vocabulary, (rows, length), generator=generator)
    ids[:, 0], ids[:, -1] = 2, 0
    attention = torch.ones_like(ids)
    attention[:, -1] = 0
    return {"input_ids": ids, "attention_mask": attention}


def test_words_are_hidden_in_berts_proportions():
    special = SpecialTokens(pad=0, cls=2, mask=4, all=(0, 1, 2, 3, 4))
    vocabulary = 1_000
    tokens = token_batch(400, 52, special, vocabulary)
    changed, labels = mask_tokens(tokens, special, vocabulary, 0.15, torch.Generator().manual_seed(0))
    ids, new = tokens["input_ids"], changed["input_ids"]
    asked = labels != NOT_ASKED
    assert float(asked[:, 1:-1].float().mean()) == pytest.approx(0.15, abs=0.01)
    assert float((new[asked] == 4).float().mean()) == pytest.approx(0.8, abs=0.02)
    assert float((new[asked] == ids[asked]).float().mean()) == pytest.approx(0.1, abs=0.02)
    assert not asked[:, 0].any()  # [CLS]
    assert not asked[:, -1].any()  # padding
    assert torch.equal(labels[asked], ids[asked])
    assert torch.equal(new[~asked], ids[~asked])
    assert torch.equal(tokens["input_ids"], token_batch(400, 52, special, vocabulary)["input_ids"])  # input untouched


def test_the_same_generator_hides_the_same_words():
    special = SpecialTokens(pad=0, cls=2, mask=4, all=(0, 1, 2, 3, 4))
    tokens = token_batch(5, 9, special, 50)
    first, second = (mask_tokens(tokens, special, 50, 0.3, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first[0]["input_ids"], second[0]["input_ids"])
    assert torch.equal(first[1], second[1])


@pytest.fixture(scope="module")
def encoder(scenario) -> ItemEncoder:
    tokenizer = train_tokenizer(["red round shoe", "blue square bag with dots"], 100)
    return ItemEncoder.build(scenario.encoders, tokenizer, 0).eval()


def test_masked_language_loss_equals_a_loop(encoder):
    torch.manual_seed(0)
    model = MaskedLanguageModel(encoder.text).eval()
    tokens = encoder.text.tokenize(["red round shoe", "blue bag"])
    labels = torch.full_like(tokens["input_ids"], NOT_ASKED)
    labels[0, 1], labels[0, 3], labels[1, 2] = 7, 9, 11
    with torch.no_grad():
        logits = (model.head(encoder.text.token_states(tokens)) @ model.words.weight.T + model.bias).double()
        loss = float(model(tokens, labels))
    terms = [
        math.log(sum(math.exp(z) for z in logits[row, place].tolist())) - float(logits[row, place, word])
        for row, place, word in ((0, 1, 7), (0, 3, 9), (1, 2, 11))
    ]
    assert loss == pytest.approx(sum(terms) / 3, rel=1e-4)


def test_a_batch_without_asked_words_has_a_loss_of_zero_with_gradients(encoder):
    model = MaskedLanguageModel(encoder.text)
    tokens = encoder.text.tokenize(["red bag"])
    loss = model(tokens, torch.full_like(tokens["input_ids"], NOT_ASKED))
    loss.backward()
    assert loss.item() == 0.0
    encoder.zero_grad()


@pytest.fixture(scope="module")
def gpt() -> TextTower:
    """A tiny GPT-2 with a tokenizer trained on titles."""
    tokenizer = train_tokenizer(["red round shoe", "blue square bag with dots"], 100)
    settings = {"n_embd": 24, "n_layer": 1, "n_head": 2, "n_positions": 16}
    torch.manual_seed(0)
    return build_text(Text(model="gpt2", max_tokens=8, model_args=settings), tokenizer).eval()


def test_labels_of_next_tokens_are_the_tokens_that_follow(gpt):
    tokens = gpt.tokenize(["red round shoe", "bag"])
    ids, labels = tokens["input_ids"], next_tokens(tokens)
    length = int(tokens["attention_mask"][1].sum())
    assert labels[0].tolist() == [*ids[0, 1:].tolist(), NOT_ASKED]
    assert labels[1].tolist() == [*ids[1, 1:length].tolist(), *[NOT_ASKED] * (ids.shape[1] - length + 1)]


def test_next_token_loss_equals_a_loop_and_its_weights_are_the_word_embeddings(gpt):
    model = NextTokenModel(gpt)
    assert model.words is gpt.net.get_input_embeddings()
    tokens = gpt.tokenize(["red round shoe", "bag"])
    with torch.no_grad():
        logits = (gpt.token_states(tokens) @ gpt.net.wte.weight.T).double()
        loss = float(model(tokens, next_tokens(tokens)))
    terms = []
    for row, real in enumerate(tokens["attention_mask"].sum(1).tolist()):
        for place in range(real - 1):
            word = int(tokens["input_ids"][row, place + 1])
            scores = logits[row, place].tolist()
            terms.append(math.log(sum(math.exp(score) for score in scores)) - scores[word])
    assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_a_gpt_tower_does_not_see_the_words_it_is_asked_for(gpt):
    first, second = (gpt.token_states(gpt.tokenize([title])) for title in ("red round shoe", "red round bag"))
    torch.testing.assert_close(first[:, :3], second[:, :3])


def test_aligner_gives_the_encoders_embeddings_and_a_clamped_scale(encoder):
    tokens = encoder.text.tokenize(["red bag", "shoe"])
    pixels = torch.randint(0, 256, (2, 3, 16, 16)).to(torch.uint8)
    image, text, scale = ImageTextAligner(encoder, temperature=0.07).eval()(pixels, tokens)
    torch.testing.assert_close(image, encoder.encode_image(pixels))
    torch.testing.assert_close(text, encoder.encode_text(tokens))
    assert scale.item() == pytest.approx(1 / 0.07, rel=1e-5)
    assert ImageTextAligner(encoder, temperature=0.001)(pixels, tokens)[2].item() == pytest.approx(100.0)


def test_a_clamped_scale_can_come_back(encoder):
    aligner = ImageTextAligner(encoder, temperature=0.5)
    with torch.no_grad():
        aligner.log_scale.fill_(9.0)
    aligner.clamp()
    scale = aligner.log_scale.exp()
    scale.backward()
    assert scale.item() == pytest.approx(100.0)
    assert aligner.log_scale.grad.item() == pytest.approx(100.0)  # not cut off at the limit


def test_aligner_leaves_fusion_out(encoder):
    aligner = ImageTextAligner(encoder, 0.07)
    trained = {id(p) for p in aligner.parameters()}
    assert not trained & {id(p) for p in encoder.fusion.parameters()}
