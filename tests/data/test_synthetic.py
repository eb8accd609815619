"""The shop is what its parameters say, in every part and however it is cut."""

import io
import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mim_ray.config.load import load_scenario
from mim_ray.config.scenario import Synthetic
from mim_ray.data import synthetic
from mim_ray.data.pictures import NUM_STYLES, render, style_factors
from mim_ray.data.shop import START_US, ShopModel, style_vectors
from mim_ray.data.synthetic import make_events, make_items
from mim_ray.errors import ConfigError

SMALL = Synthetic(num_items=800, num_users=60, num_impressions=3_000, num_image_searches=120, num_weeks=2)


def pairs(model, num=20_000):
    rng = np.random.default_rng(0)
    return rng.integers(0, model.settings.num_users, num), rng.integers(0, model.settings.num_items, num)


@pytest.mark.parametrize("shares", [(0.4, 0.3, 0.3), (0.0, 0.3, 0.3), (1.0, 0.0, 0.0)])
def test_the_logits_variance_has_the_configured_shares(shares):
    style, individual, popularity = shares
    model = ShopModel(3, Synthetic(style_share=style, individual_share=individual, popularity_share=popularity))
    parts = model.logit_parts(*pairs(model))
    assert np.allclose(parts.var(0), np.array(shares) / sum(shares) * 4, rtol=0.08, atol=1e-9)
    assert abs(np.corrcoef(parts[:, 0], parts[:, 1])[0, 1] if style and individual else 0) < 0.03
    assert abs(model.click_prob(*pairs(model)).mean() - 0.15) < 0.01


def test_click_logit_equals_a_loop_over_its_formula():
    model = ShopModel(1, Synthetic(num_items=50, num_users=5))
    users, items = pairs(model, 20)
    from mim_ray.data import shop
    from mim_ray.data.ids import normal

    for user, item, logit in zip(users.tolist(), items.tolist(), model.click_logit(users, items), strict=True):
        weights = normal(1, shop._TASTE, user * 19 + np.arange(19)).tolist()
        taste, start = 0.0, 0
        style = int(model.styles(np.array([item]))[0])
        for levels, level in zip((6, 8, 5), (style // 40, style // 5 % 8, style % 5), strict=True):
            mean = sum(weights[start : start + levels]) / levels
            taste += (weights[start + level] - mean) * math.sqrt(levels / (levels - 1))
            start += levels
        p = normal(1, shop._USER_LATENT, user * 6 + np.arange(6)).tolist()
        q = normal(1, shop._ITEM_LATENT, item * 6 + np.arange(6)).tolist()
        own = sum(a * b for a, b in zip(p, q, strict=True)) / math.sqrt(6)
        popularity = float(normal(1, shop._POPULARITY, np.array([item]))[0])
        variance = math.sqrt(0.4) * taste / math.sqrt(3) + math.sqrt(0.3) * own + math.sqrt(0.3) * popularity
        assert logit == pytest.approx(model.intercept + 2.0 * variance)


def test_all_shares_zero_is_a_config_error():
    with pytest.raises(ConfigError, match="all 0"):
        ShopModel(0, Synthetic(style_share=0, individual_share=0, popularity_share=0)).shares  # noqa: B018


def test_each_block_of_items_holds_each_style_once_and_can_be_searched():
    model = ShopModel(5, Synthetic())
    styles = model.styles(np.arange(10 * NUM_STYLES)).reshape(10, NUM_STYLES)
    assert (np.sort(styles, 1) == np.arange(NUM_STYLES)).all()
    assert (styles[0] != styles[1]).any()
    items = model.items_of_style(np.full(10, 77), np.arange(10))
    assert (model.styles(items) == 77).all()
    assert (items // NUM_STYLES == np.arange(10)).all()


def test_cosine_of_styles_is_the_share_of_equal_factors():
    styles = np.array([0, 1, 5, 40, 46, 0])
    cosines = style_vectors(styles) @ style_vectors(styles).T
    factors = style_factors(styles)
    for a in range(6):
        for b in range(6):
            assert cosines[a, b] == pytest.approx((factors[a] == factors[b]).mean(), abs=1e-6)


def test_num_existing_agrees_with_created_at():
    model = ShopModel(0, SMALL)
    created = model.created_us(np.arange(800))
    assert (np.diff(created) > 0).all()
    for time in (START_US, START_US + 10**11, START_US + model.duration_us, int(created[500]), int(created[500]) + 1):
        assert model.num_existing(np.array([time]))[0] == max(1, int((created < time).sum()))


def test_renderings_differ_but_show_their_style():
    """A nearest-mean classifier on few pixels knows shape, palette and pattern far better than chance."""

    def pixels(style, key):
        image = Image.open(io.BytesIO(render(style, key % 8, key, 32)))
        return np.asarray(image, np.float32).reshape(-1) / 255

    assert render(7, 1, 5, 32) == render(7, 1, 5, 32)
    assert np.abs(pixels(7, 5) - pixels(7, 6)).mean() > 0.04
    colours = np.stack(
        [pixels(5 * p, key).reshape(32, 32, 3)[12:20, 12:20].mean((0, 1)) for p in range(8) for key in range(10)]
    )
    colours /= np.linalg.norm(colours, axis=1, keepdims=True)
    means = colours.reshape(8, 10, 3).mean(1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert ((colours @ means.T).argmax(1) == np.repeat(np.arange(8), 10)).mean() > 0.8


def test_items_have_pictures_titles_and_holes():
    items = make_items(ShopModel(0, SMALL), 0, 300)
    assert items.num_rows == 300
    assert 0 < items["image"].null_count < 30
    assert 0 < items["title"].null_count < 30
    assert Image.open(io.BytesIO(items["image"][1].as_py() or items["image"][2].as_py())).size == (48, 48)
    whole = make_items(ShopModel(0, SMALL), 100, 110)
    assert whole.equals(items.slice(100, 10).combine_chunks())


def test_events_in_parts_equal_events_in_one_and_are_ordered_in_time():
    model = ShopModel(2, SMALL)
    whole, truth, counts = make_events(model, 0, 3_000)
    parts = [make_events(model, a, a + 500) for a in range(0, 3_000, 500)]
    joined = pa.concat_tables([part[0] for part in parts])
    assert (np.diff(np.asarray(joined["timestamp"].cast(pa.int64()))) >= 0).all()
    order = [("timestamp", "ascending"), ("event", "ascending"), ("item_id", "ascending")]
    assert joined.sort_by(order).to_pylist() == whole.sort_by(order).to_pylist()
    assert pa.concat_tables([part[1] for part in parts]).to_pylist() == truth.to_pylist()
    for name in ("impressions", "clicks", "searches", "rows"):
        assert sum(part[2][name] for part in parts) == counts[name]
    assert counts["impressions"] == 3_000
    assert counts["searches"] == 120


def test_events_make_sense():
    model = ShopModel(2, SMALL)
    events, truth, _ = make_events(model, 0, 3_000)
    created = dict(
        zip(synthetic.item_ids(np.arange(800)).to_pylist(), model.created_us(np.arange(800)).tolist(), strict=True)
    )
    rows = events.to_pylist()
    shown = {row["impression_id"]: row for row in rows if row["event"] == "impression"}
    assert set(shown) == set(truth["impression_id"].to_pylist())
    for row in rows:
        assert created[row["item_id"]] <= row["timestamp"].timestamp() * 1e6 + 1
        if row["event"] == "click":
            assert shown[row["impression_id"]]["item_id"] == row["item_id"]
            assert row["timestamp"] > shown[row["impression_id"]]["timestamp"]
        if row["query_image"] is not None:
            assert row["event"] == "purchase"
            assert row["impression_id"] is None
    clicks = pc.sum(pc.equal(events["event"], "click")).as_py()
    assert clicks == pytest.approx(sum(truth["prob"].to_pylist()), rel=0.15)


def test_tiny_shops_without_every_style_still_answer_searches():
    model = ShopModel(0, Synthetic(num_items=20, num_users=5, num_impressions=50, num_image_searches=30, num_weeks=1))
    events, _, counts = make_events(model, 0, 50)
    assert counts["searches"] == 30
    assert set(events["item_id"].to_pylist()) <= set(synthetic.item_ids(np.arange(20)).to_pylist())


@pytest.mark.ray
def test_run_writes_the_shop(ray_cluster, tmp_path):
    overrides = [
        f"synthetic.{key}={value}" for key, value in SMALL.model_dump().items() if value != getattr(Synthetic(), key)
    ]
    result = synthetic.run(load_scenario("tiny", overrides), output=str(tmp_path))
    assert pq.read_table(tmp_path / "items.parquet").num_rows == 800
    assert pq.read_table(tmp_path / "truth" / "styles.parquet").num_rows == 800
    assert pq.read_table(tmp_path / "truth" / "impressions.parquet").num_rows == 3_000
    assert pq.read_table(tmp_path / "interactions.parquet").num_rows == result.metrics["num_rows"]
    assert 0.75 < result.metrics["oracle_auc"] < 0.95
