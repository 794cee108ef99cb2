"""Mixtures of meta-LoRAs against arithmetic written out, in every form."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora.config import AdapterConfig
from lora.model import AdaptedModel
from strategies.personal.meta import MetaLoRAs

FORMS = [*itertools.product(("product", "factor"), ("shared", "own"))]


def adapted_model() -> AdaptedModel:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24,
    )  # fmt: skip
    return AdaptedModel.attach(LlamaForCausalLM(shape).eval(), AdapterConfig(rank=2, alpha=3))


def made(mixing: str, frame: str, *, count: int = 3) -> tuple[AdaptedModel, MetaLoRAs]:
    adapted = adapted_model()
    meta = MetaLoRAs(adapted, count=count, mixing=mixing, frame=frame)  # type: ignore[arg-type]
    with torch.no_grad():
        meta.b.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.3)
    return adapted, meta


def drawn_weights(meta: MetaLoRAs, rows: int) -> Tensor:
    source = torch.Generator().manual_seed(2)
    return torch.softmax(torch.randn(len(meta.sites), rows, meta.count, generator=source), -1)


def naive_delta(adapted: AdaptedModel, meta: MetaLoRAs, weights: Tensor, site: int) -> Tensor:
    """The update `[d_out, d_in]` of one row at one site, term by term."""
    name = meta.sites[site]
    b = meta.layout.views(meta.b)["B", name]
    frame = adapted.frame.matrices[name]
    a = meta.layout_a.views(meta.a)["A", name] if meta.a is not None else frame.expand(meta.count, -1, -1)
    if meta.mixing == "product":
        terms = [weights[i] * b[i] @ a[i] for i in range(meta.count)]
    else:
        pairs = itertools.product(range(meta.count), repeat=2)
        terms = [weights[i] * weights[j] * b[i] @ a[j] for i, j in pairs]
    return adapted.scale * torch.stack(terms).sum(0)


class NaiveLinear(nn.Module):
    """y = (W + delta of the row) x, one row after the other."""

    def __init__(self, base: nn.Linear, deltas: list[Tensor]) -> None:
        super().__init__()
        self.base, self.deltas = base, deltas

    def forward(self, x: Tensor) -> Tensor:
        rows = [nn.functional.linear(row, self.base.weight + d) for row, d in zip(x, self.deltas, strict=True)]
        return torch.stack(rows)


@pytest.mark.parametrize(("mixing", "frame"), FORMS)
def test_outputs_and_gradients_are_those_of_the_sums_written_out(mixing: str, frame: str) -> None:
    adapted, meta = made(mixing, frame)
    ids = torch.randint(50, (4, 7), generator=torch.Generator().manual_seed(3))
    # Slopes are those of the logits: weights sum to one, and off that plane the forms of a shared frame differ.
    logits = drawn_weights(meta, 4).log().requires_grad_(True)
    weights = torch.softmax(logits, -1)
    wanted = [meta.b, logits, *([meta.a] if meta.a is not None else [])]
    with adapted.bound(meta.blocks(weights)) as model:
        ours = model(input_ids=ids).logits
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(4))
    our_slopes = torch.autograd.grad((ours * direction).sum(), wanted, retain_graph=True)
    base = adapted.detach()
    for site, name in enumerate(meta.sites):
        parent, leaf = name.rsplit(".", 1)
        deltas = [naive_delta(adapted, meta, weights[site, row], site) for row in range(4)]
        setattr(base.get_submodule(parent), leaf, NaiveLinear(base.get_submodule(name), deltas))  # type: ignore[arg-type]
    theirs = base(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for our, their in zip(our_slopes, torch.autograd.grad((theirs * direction).sum(), wanted), strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)
        assert our.abs().max() > 1e-3


def test_over_a_shared_frame_products_and_factors_mix_alike() -> None:
    blocks = []
    for mixing in ("product", "factor"):
        _, meta = made(mixing, "shared")
        blocks.append(meta.blocks(drawn_weights(meta, 2)))
    assert blocks[0].keys() == blocks[1].keys()
    assert all(torch.equal(blocks[0][key], blocks[1][key]) for key in blocks[0])


@pytest.mark.parametrize(("mixing", "frame"), FORMS)
def test_it_starts_as_the_base_model(mixing: str, frame: str) -> None:
    adapted = adapted_model()
    meta = MetaLoRAs(adapted, count=3, mixing=mixing, frame=frame)  # type: ignore[arg-type]
    ids = torch.arange(12).view(2, 6)
    plain = adapted.base(input_ids=ids).logits
    with adapted.bound(meta.blocks(drawn_weights(meta, 2))) as model:
        assert torch.equal(model(input_ids=ids).logits, plain)


def test_own_as_differ_and_lie_within_kaimings_bound() -> None:
    meta = MetaLoRAs(adapted_model(), count=4, frame="own", seed=5)
    assert meta.a is not None
    for view in meta.layout_a.views(meta.a.detach()).values():
        assert view.abs().max() <= view.shape[-1] ** -0.5
        assert view.std() > 0.4 * view.shape[-1] ** -0.5
        assert not torch.equal(view[0], view[1])


@pytest.mark.parametrize("frame", ["shared", "own"])
def test_cosines_are_those_of_the_products(frame: str) -> None:
    adapted, meta = made("product", frame)
    ones = torch.eye(3)
    updates = [
        torch.cat([naive_delta(adapted, meta, ones[i], site).flatten() for site in range(len(meta.sites))])
        for i in range(3)
    ]
    pairs = [torch.cosine_similarity(x, y, dim=0) for x, y in itertools.combinations(updates, 2)]
    assert float(meta.cosines()) == pytest.approx(float(torch.stack(pairs).mean().detach()), abs=1e-5)
    with torch.no_grad():
        meta.b.zero_()
    assert torch.isnan(meta.cosines())


@pytest.mark.parametrize(("mixing", "frame"), FORMS)
def test_one_mixture_is_a_row_of_many(mixing: str, frame: str) -> None:
    adapted, meta = made(mixing, frame)
    weights = drawn_weights(meta, 3)
    ids = torch.randint(50, (3, 5), generator=torch.Generator().manual_seed(6))
    with adapted.bound(meta.blocks(weights)) as model:
        together = model(input_ids=ids).logits
    with adapted.bound(meta.one(weights[:, 1])) as model:
        torch.testing.assert_close(model(input_ids=ids).logits[1], together[1], rtol=1e-5, atol=1e-6)
