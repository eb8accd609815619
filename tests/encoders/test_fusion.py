import pytest
import torch

from mim_ray.encoders.fusion import LowRankTensorFusion, TensorFusion, build_fusion, outer_product

KINDS = ["tfn", "low_rank_tfn", "concat"]


def test_outer_product_equals_a_loop_written_from_equation_3():
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, 4, 5, generator=generator)
    result = outer_product(image, text)
    for row in range(4):
        left = [*image[row].tolist(), 1.0]
        right = [*text[row].tolist(), 1.0]
        for i in range(6):
            for j in range(6):
                assert float(result[row, i, j]) == pytest.approx(left[i] * right[j], rel=1e-6)


def test_outer_product_by_hand():
    result = outer_product(torch.tensor([[2.0, 3.0]]), torch.tensor([[5.0, 7.0]]))
    assert result[0].tolist() == [[10.0, 14.0, 2.0], [15.0, 21.0, 3.0], [5.0, 7.0, 1.0]]


def test_a_missing_modality_leaves_only_the_others_own_terms():
    result = outer_product(torch.zeros(1, 2), torch.tensor([[5.0, 7.0]]))
    assert result[0].tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [5.0, 7.0, 1.0]]


def test_tensor_fusion_is_the_mlp_of_equation_4_on_the_flat_product():
    import math

    torch.manual_seed(1)
    fusion = TensorFusion(width=2, hidden=3)  # too few hidden units for the start as a sum
    image, text = torch.randn(2, 1, 2)
    flat = [a * b for a in [*image[0].tolist(), 1.0] for b in [*text[0].tolist(), 1.0]]
    first, last = fusion.mlp[0], fusion.mlp[2]
    hidden = [
        sum(w * x for w, x in zip(row, flat, strict=True)) + bias
        for row, bias in zip(first.weight.tolist(), first.bias.tolist(), strict=True)
    ]
    hidden = [x * 0.5 * (1.0 + math.erf(x / math.sqrt(2.0))) for x in hidden]
    expected = [
        sum(w * x for w, x in zip(row, hidden, strict=True)) + bias
        for row, bias in zip(last.weight.tolist(), last.bias.tolist(), strict=True)
    ]
    assert fusion(image, text)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_low_rank_fusion_is_the_outer_product_weighed_with_a_low_rank_tensor():
    torch.manual_seed(2)
    fusion = LowRankTensorFusion(width=3, hidden=5, rank=2)  # too few hidden units for the start as a sum
    image, text = torch.randn(2, 4, 3)
    a, b = (factors.view(2, 5, 4) for factors in (fusion.image_factors, fusion.text_factors))
    tensor = torch.einsum("rhi,rhj->hij", a, b)
    hidden = torch.einsum("bij,hij->bh", outer_product(image, text), tensor)
    assert torch.linalg.matrix_rank(tensor[0]) == 2
    torch.testing.assert_close(fusion(image, text), fusion.last(hidden), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_item_without_a_modality_keeps_the_others_embedding_at_first(kind):
    fusion = build_fusion(kind, width=6, hidden=20, rank=3)
    one, none = torch.randn(2, 6), torch.zeros(2, 6)
    torch.testing.assert_close(fusion(one, none), one, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fusion(none, one), one, rtol=1e-5, atol=1e-6)


def test_every_weight_of_low_rank_fusion_can_learn():
    torch.manual_seed(0)
    fusion = LowRankTensorFusion(width=4, hidden=16, rank=3)
    optimizer = torch.optim.SGD(fusion.parameters(), 0.1)
    before = [parameter.detach().clone() for parameter in fusion.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        fusion(torch.randn(32, 4), torch.randn(32, 4)).square().mean().backward()
        optimizer.step()
    for old, new in zip(before, fusion.parameters(), strict=True):
        assert (old != new).float().mean() > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_fusion_starts_as_the_sum_of_both_embeddings(kind):
    torch.manual_seed(0)
    fusion = build_fusion(kind, width=6, hidden=20, rank=3)
    image, text = torch.randn(2, 8, 6)
    torch.testing.assert_close(fusion(image, text), image + text, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_fusion_does_not_stay_a_sum_when_it_trains(kind):
    torch.manual_seed(0)
    fusion = build_fusion(kind, width=4, hidden=32, rank=3)
    image, text = torch.randn(2, 64, 4)
    wanted = image * text  # bi-modal terms only
    optimizer = torch.optim.Adam(fusion.parameters(), 1e-2)
    first = None
    for _ in range(150):
        loss = (fusion(image, text) - wanted).square().mean()
        first = first if first is not None else float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1 * first
