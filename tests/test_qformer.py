"""The Querying Transformer: who sees whom, cached passes against joint ones, and parity with transformers."""

import pytest
import torch
from tiny import shake
from torch import Tensor
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from qformer import kernels, layers
from qformer.qformer import QFormer

B, N, Q, T, D, V, ENCODER_WIDTH = 3, 6, 4, 5, 32, 40, 24
IMAGE_MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]], dtype=torch.bool)
TEXT_MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)


def build(queries: int = Q, layers: int = 3, shaken: bool = True, **more) -> QFormer:
    torch.manual_seed(0)
    sizes = {"width": D, "heads": 2, "ffn_width": 48, "encoder_width": ENCODER_WIDTH, "vocab_size": V}
    qformer = QFormer(queries=queries, layers=layers, max_text_positions=8, dropout=0.1, **(sizes | more))
    if shaken:
        shake(qformer, by=0.2)
    return qformer.eval()


def draw(batch: int = B) -> tuple[Tensor, Tensor]:
    """Features and text ids."""
    torch.manual_seed(1)
    return torch.randn(batch, N, ENCODER_WIDTH), torch.randint(1, V, (batch, T))


def joint_pass(qformer: QFormer, features: Tensor, ids: Tensor, mask: Tensor, image_mask: Tensor | None = None):
    """The reference: queries and padded text as one sequence through the layers' modules, under a mask bool[B, 1, Q+T, Q+T]."""
    queries = qformer.query_tokens.expand(len(ids), -1, -1)
    words = qformer.word_embeddings(ids) + qformer.position_embeddings.weight[: ids.shape[1]]
    hidden = qformer.embedding_norm(torch.cat([queries, words], 1))
    look = None if image_mask is None else image_mask[:, None, None, :]

    def add_attention(attention, hidden, memory, mask):
        q, k, v = (
            attention.split(x) for x in (attention.query(hidden), attention.key(memory), attention.value(memory))
        )
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        read = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(3) @ v
        return attention.norm(hidden + attention.dense(read.transpose(1, 2).flatten(2)))

    for block in qformer.layers:
        hidden = add_attention(block.attention, hidden, hidden, mask)
        queries, text = hidden.split([qformer.query_tokens.shape[1], ids.shape[1]], 1)
        if block.cross_attention is not None:
            queries = add_attention(block.cross_attention, queries, features, look)
        fed = ((block.query_ffn, queries), (block.text_ffn, text))
        hidden = torch.cat([ffn.norm(x + ffn.down(torch.nn.functional.gelu(ffn.up(x)))) for ffn, x in fed], 1)
    return hidden.split([queries.shape[1], ids.shape[1]], 1)


def causal_mask(text_mask: Tensor, queries: int = Q) -> Tensor:
    """ITG's: queries see queries, text sees queries and earlier text; bool[B, 1, Q+T, Q+T]."""
    batch, length = text_mask.shape
    mask = torch.zeros(batch, queries + length, queries + length, dtype=torch.bool)
    mask[:, :, :queries] = True
    mask[:, queries:, queries:] = torch.ones(length, length).tril().bool() & text_mask[:, None, :]
    return mask[:, None]


# ---- who sees whom: the four worked examples of the module's docstring ----


def outputs(qformer: QFormer, pattern: str, features: Tensor, ids: Tensor) -> Tensor:
    """float[rows, D] of one picture and text: the positions that this pass returns."""
    images, mask = qformer.project_images(features), torch.ones_like(ids, dtype=torch.bool)
    queries = qformer.query_pass(images)
    return {
        "queries alone": lambda: queries.output,
        "text alone": lambda: qformer.text_pass(ids, mask),
        "all see all": lambda: qformer.matching_pass([images], ids, mask),
        "text after queries": lambda: torch.cat([queries.output, qformer.causal_pass(ids, mask, queries)], 1),
    }[pattern]()[0]


@pytest.mark.parametrize(
    ("pattern", "sees"),
    [
        ("queries alone", ["1100", "1100"]),
        ("text alone", ["0011", "0011"]),
        ("all see all", ["1111", "1111"]),
        ("text after queries", ["1100", "1100", "1110", "1111"]),
    ],
)
@torch.no_grad()
def test_who_sees_whom(pattern, sees):
    qformer = build(queries=2)
    features, ids = draw(1)
    ids = ids[:, :2]
    before = outputs(qformer, pattern, features, ids)
    columns = []
    for position in range(4):
        changed_ids, query_tokens = ids.clone(), qformer.query_tokens.clone()
        if position < 2:
            qformer.query_tokens[0, position] += torch.randn(D)
        else:
            changed_ids[0, position - 2] = (ids[0, position - 2] + 7) % V
        after = outputs(qformer, pattern, features, changed_ids)
        qformer.query_tokens.copy_(query_tokens)
        columns.append((after - before).abs().amax(1) > 1e-6)
    assert ["".join(str(int(c)) for c in row) for row in torch.stack(columns, 1)] == sees


@torch.no_grad()
def test_only_queries_see_the_image_and_only_where_there_is_cross_attention():
    qformer = build()
    assert [block.cross_attention is not None for block in qformer.blocks] == [True, False, True]
    assert [b.cross_attention is None for b in build(layers=4, cross_attention_frequency=3).blocks] == [0, 1, 1, 0]
    features, ids = draw(1)
    changed = features + 1
    for pattern, moves in (("queries alone", True), ("text alone", False), ("all see all", True)):
        same = torch.equal(outputs(qformer, pattern, features, ids), outputs(qformer, pattern, changed, ids))
        assert same is not moves, pattern


# ---- the cached causal pass is the joint one ----


@pytest.mark.parametrize("image_mask", [None, IMAGE_MASK], ids=["whole", "padded"])
def test_causal_pass_on_cached_queries_is_the_joint_mask(image_mask):
    qformer = build()
    features, ids = draw()
    queries = qformer.query_pass(qformer.project_images(features, image_mask))
    text = qformer.causal_pass(ids, TEXT_MASK, queries)
    joint_queries, joint_text = joint_pass(qformer, features, ids, causal_mask(TEXT_MASK), image_mask)
    torch.testing.assert_close(queries.output, joint_queries, atol=1e-5, rtol=0)
    torch.testing.assert_close(text[TEXT_MASK], joint_text[TEXT_MASK], atol=1e-5, rtol=0)

    # so is its gradient: the cached keys and values are not detached
    weight = torch.randn(B, T, D)
    (text * weight)[TEXT_MASK].sum().backward()
    ours = {name: p.grad.clone() for name, p in qformer.named_parameters() if p.grad is not None}
    qformer.zero_grad()
    (joint_text * weight)[TEXT_MASK].sum().backward()
    theirs = {name: p.grad for name, p in qformer.named_parameters() if p.grad is not None}
    assert ours["query_tokens"].abs().max() > 0
    for name in theirs:
        torch.testing.assert_close(ours.get(name, torch.zeros(())).expand_as(theirs[name]), theirs[name],
                                   atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")  # fmt: skip


@torch.no_grad()
def test_matching_pass_is_the_joint_pass_where_all_see_all():
    qformer = build()
    features, ids = draw()
    mask = torch.cat([torch.ones(B, Q, dtype=torch.bool), TEXT_MASK], 1)[:, None, None, :]
    expected, _ = joint_pass(qformer, features, ids, mask, IMAGE_MASK)
    found = qformer.matching_pass([qformer.project_images(features, IMAGE_MASK)], ids, TEXT_MASK)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_text_and_causal_rows_of_one_pass_are_those_of_two():
    qformer = build()
    features, ids = draw()
    queries = qformer.query_pass(qformer.project_images(features, IMAGE_MASK))
    text, causal = qformer.text_and_causal_pass(ids, ids.flip(0), TEXT_MASK, queries)
    torch.testing.assert_close(text, qformer.text_pass(ids, TEXT_MASK), atol=1e-5, rtol=0)
    torch.testing.assert_close(causal, qformer.causal_pass(ids.flip(0), TEXT_MASK, queries), atol=1e-5, rtol=0)
    torch.testing.assert_close(text[:, 0], qformer.text_pass(ids, TEXT_MASK, first=True), atol=1e-5, rtol=0)
    embedded = qformer.text_pass(qformer.word_embeddings(ids), TEXT_MASK)
    torch.testing.assert_close(embedded, text, atol=1e-5, rtol=0)


@torch.no_grad()
def test_images_that_several_rows_look_at_are_those_images_repeated():
    qformer = build()
    features, ids = draw()
    images = qformer.project_images(features, IMAGE_MASK)
    other = images.select(torch.tensor([2, 0, 1]))
    texts, masks = torch.cat([ids, ids.flip(0), ids.flip(1)]), TEXT_MASK.repeat(3, 1)
    found = qformer.matching_pass([images._replace(times=2), other], texts, masks)
    each = [qformer.matching_pass([i], texts[r], masks[r]) for i, r in
            ((images, slice(3)), (images, slice(3, 6)), (other, slice(6, 9)))]  # fmt: skip
    torch.testing.assert_close(found, torch.cat(each), atol=1e-5, rtol=0)


def test_many_tokens_are_filled_up_and_the_filler_changes_nothing():
    qformer, rows = build(), 200
    torch.manual_seed(2)
    ids, mask = torch.randint(1, V, (rows, T)), torch.arange(T) < torch.randint(1, T + 1, (rows, 1))
    packing = layers.Packing.of(mask)
    assert packing.tokens == mask.sum() < len(packing.text)
    assert len(packing.text) % 64 == 0
    together = qformer.text_pass(ids, mask)
    weight = torch.randn(rows, T, D)
    (together * weight).sum().backward()
    gradient = {name: p.grad.clone() for name, p in qformer.named_parameters() if p.grad is not None}
    qformer.zero_grad()
    parts = torch.cat([qformer.text_pass(i, m) for i, m in zip(ids.split(50), mask.split(50), strict=True)])
    torch.testing.assert_close(together, parts, atol=1e-5, rtol=0)
    (parts * weight).sum().backward()
    for name, found in gradient.items():
        expected = qformer.get_parameter(name).grad
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_a_folded_norm_gives_the_values_and_gradients_of_one_that_is_applied():
    qformer, norm = build(), torch.nn.LayerNorm(ENCODER_WIDTH)
    shake(norm, by=0.2)
    features, _ = draw()
    weight = torch.randn(B, Q, D)

    def gradients(given: Tensor, norm_given: torch.nn.LayerNorm | None) -> tuple[Tensor, dict[str, Tensor]]:
        for module in (qformer, norm):
            module.zero_grad()
        output = qformer.query_pass(qformer.project_images(given, IMAGE_MASK, norm_given)).output
        (output * weight).sum().backward()
        named = [*qformer.named_parameters(), *norm.named_parameters()]
        return output, {name: p.grad.clone() for name, p in named if p.grad is not None}

    folded, applied = gradients(features, norm), gradients(norm(features), None)
    torch.testing.assert_close(folded[0], applied[0], atol=1e-5, rtol=0)
    assert folded[1].keys() == applied[1].keys() >= {"weight", "bias"}
    for name, gradient in folded[1].items():
        torch.testing.assert_close(gradient, applied[1][name], atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():
        torch.testing.assert_close(qformer.project_images(features, IMAGE_MASK, norm).layers[0][0],
                                   qformer.project_images(norm(features)).layers[0][0])  # fmt: skip


@pytest.mark.parametrize(
    ("queries", "tokens", "width", "absorbs"),
    [(32, 257, 1408, True), (32, 197, 768, True), (44, 257, 1408, False), (32, 50, 768, False)],
)
def test_queries_go_to_the_features_where_that_pays(queries, tokens, width, absorbs):
    """Measured: with 32 queries it takes 0.74 of the time at ViT-g's features, with 44 already 1.19 of it."""
    qformer = QFormer(width=768, heads=12, ffn_width=8, layers=1, queries=queries, encoder_width=width, vocab_size=None)
    assert qformer._absorbing_is_cheaper(torch.empty(1, tokens, width)) == absorbs


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("with_norm", [False, True])
def test_queries_in_the_features_space_read_what_keys_and_values_give(training, with_norm, monkeypatch):
    monkeypatch.setattr("qformer.qformer.ABSORBED_TIME", 1.0)  # of so few tokens it would not pay
    qformer, norm = build(), torch.nn.LayerNorm(ENCODER_WIDTH)
    shake(norm, by=0.2)
    features, ids = draw()
    qformer.train(training)
    weight = torch.randn(B, Q, D)

    def gradients(once: bool) -> tuple[Tensor, dict[str, Tensor]]:
        for module in (qformer, norm):
            module.zero_grad()
        images = qformer.project_images(features, IMAGE_MASK, norm if with_norm else None, once=once)
        assert isinstance(images.layers[0], kernels.AbsorbedKV) == once
        torch.manual_seed(0)  # of dropout: both draw the same
        output = qformer.query_pass(images).output + qformer.matching_pass([images], ids, TEXT_MASK)
        (output * weight).sum().backward()
        named = [*qformer.named_parameters(), *norm.named_parameters()]
        return output, {name: p.grad.clone() for name, p in named if p.grad is not None}

    once, often = gradients(True), gradients(False)
    torch.testing.assert_close(once[0], often[0], atol=1e-5, rtol=0)
    assert once[1].keys() == often[1].keys()
    for name, gradient in once[1].items():
        torch.testing.assert_close(gradient, often[1][name], atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("index", [None, [1, 1, 0]])
def test_plain_attention_is_the_fused_one_and_its_gradient_that_of_autograd(dtype, p, index, monkeypatch):
    torch.manual_seed(0)
    rows = 2 if index is None else len(index)
    query, key, value = (torch.randn(r, 3, n, 8).to(dtype).requires_grad_() for r, n in ((rows, 5), (2, 7), (2, 7)))
    mask = torch.rand(2, 1, 5, 7) > 0.3
    mask[..., 0] = True
    drop = torch.rand(rows, 3, 5, 7) < p
    monkeypatch.setattr(kernels, "draw_drops", lambda shape, p, device: (drop, 1 / (1 - p)))
    at = torch.arange(rows) if index is None else torch.tensor(index)
    found = kernels.PlainAttention.apply(query, key, value, mask, p, 8**-0.5, None if index is None else at)
    gradients = torch.autograd.grad(found.float().pow(2).sum(), (query, key, value))
    q, k, v = (x.detach().double().requires_grad_() for x in (query, key, value))
    shares = (q @ k[at].transpose(2, 3) / 8**0.5).masked_fill(~mask[at], -torch.inf).softmax(3)
    expected = shares.masked_fill(drop, 0) / (1 - p) @ v[at]
    tolerance = 1e-5 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.pow(2).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("recompute", [True, False])
def test_a_feed_forward_network_has_the_gradient_of_autograd(recompute):
    torch.manual_seed(0)
    ffn, x = (
        layers.FeedForward(8, 24, 0.0, recompute=recompute).double(),
        torch.randn(5, 8, dtype=torch.double, requires_grad=True),
    )
    assert torch.autograd.gradcheck(lambda *_: ffn(x), (x, *ffn.parameters()))
    expected = ffn.norm(x + ffn.down(torch.nn.functional.gelu(ffn.up(x))))
    torch.testing.assert_close(ffn(x), expected)


def test_dropout_drops_its_share_keeps_the_mean_and_follows_the_seed():
    x = torch.ones(1000, 333)
    torch.manual_seed(0)
    once, again = layers.dropout(x, 0.1), layers.dropout(x, 0.1)
    assert (once == 0).float().mean().item() == pytest.approx(0.1, abs=0.003)
    assert once.mean().item() == pytest.approx(1, abs=0.004)
    assert not torch.equal(once, again)
    torch.manual_seed(0)
    assert torch.equal(layers.dropout(x, 0.1), once)
    columns = (once == 0).float().mean(0)
    assert columns.std() < 0.015, "no column is dropped more often than another"


# ---- padding ----


@torch.no_grad()
def test_padded_image_tokens_never_matter():
    qformer = build()
    features, ids = draw()
    garbage = torch.where(IMAGE_MASK[..., None], features, 1e4)
    whole, padded = (qformer.project_images(f, IMAGE_MASK) for f in (features, garbage))
    assert torch.equal(qformer.query_pass(whole).output, qformer.query_pass(padded).output)
    assert torch.equal(qformer.matching_pass([whole], ids, TEXT_MASK), qformer.matching_pass([padded], ids, TEXT_MASK))
    for row, length in enumerate(IMAGE_MASK.sum(1)):  # and each row is what it is alone, without any padding
        alone = qformer.query_pass(qformer.project_images(features[row : row + 1, :length])).output[0]
        torch.testing.assert_close(qformer.query_pass(padded).output[row], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_padded_text_never_matters():
    qformer = build()
    features, ids = draw()
    images = qformer.project_images(features)
    queries = qformer.query_pass(images)
    garbage = torch.where(TEXT_MASK, ids, (ids + 11) % V)
    passes = {
        "text": lambda x, m, i, q: qformer.text_pass(x, m),
        "matching": lambda x, m, i, q: qformer.matching_pass([i], x, m),
        "causal": lambda x, m, i, q: qformer.causal_pass(x, m, q),
    }
    for name, run in passes.items():
        padded = run(garbage, TEXT_MASK, images, queries)
        if name != "matching":
            padded = padded * TEXT_MASK[..., None]
        for row, length in enumerate(TEXT_MASK.sum(1)):
            image = images.select(torch.tensor([row]))
            alone = run(
                ids[row : row + 1, :length], TEXT_MASK[row : row + 1, :length], image, qformer.query_pass(image)
            )
            found = padded[row] if name == "matching" else padded[row, :length]
            torch.testing.assert_close(
                found, alone[0], atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
            )


@torch.no_grad()
def test_selected_images_are_those_images():
    qformer = build()
    features, _ = draw()
    index = torch.tensor([2, 0, 0, 1])
    picked = qformer.project_images(features, IMAGE_MASK).select(index)
    again = qformer.project_images(features[index], IMAGE_MASK[index])
    torch.testing.assert_close(qformer.query_pass(picked).output, qformer.query_pass(again).output)


# ---- parity with transformers ----


def key_map(layers: int, frequency: int) -> dict[str, str]:
    """Ours -> those of Blip2QFormerModel, modules with weight and bias."""
    modules = {"embedding_norm": "layernorm"}
    attention = {"query": "attention.query", "key": "attention.key", "value": "attention.value",
                 "dense": "output.dense", "norm": "output.LayerNorm"}  # fmt: skip
    for i in range(layers):
        theirs = f"encoder.layer.{i}"
        kinds = {"attention": "attention"} | ({"cross_attention": "crossattention"} if i % frequency == 0 else {})
        for a, b in kinds.items():
            modules |= {f"blocks.{i}.{a}.{x}": f"{theirs}.{b}.{y}" for x, y in attention.items()}
        for a, b in {"query_ffn": "_query", "text_ffn": ""}.items():
            parts = {"up": f"intermediate{b}.dense", "down": f"output{b}.dense", "norm": f"output{b}.LayerNorm"}
            modules |= {f"blocks.{i}.{a}.{x}": f"{theirs}.{y}" for x, y in parts.items()}
    return {f"{a}.{kind}": f"{b}.{kind}" for a, b in modules.items() for kind in ("weight", "bias")}


@pytest.fixture(scope="module")
def pair() -> tuple[QFormer, Blip2QFormerModel]:
    """Ours and transformers', with the same weights."""
    ours = build(layers=4)
    theirs = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=D, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48, vocab_size=V,
            encoder_hidden_size=ENCODER_WIDTH, cross_attention_frequency=2, use_qformer_text_input=True,
        )
    ).eval()  # fmt: skip
    state = ours.state_dict()
    mapped = {b: state[a] for a, b in key_map(4, 2).items()}
    assert mapped.keys() == theirs.state_dict().keys()
    assert state.keys() - key_map(4, 2).keys() == {
        "query_tokens", "word_embeddings.weight", "position_embeddings.weight",
    }  # fmt: skip
    theirs.load_state_dict(mapped)
    return ours, theirs


@torch.no_grad()
def test_query_pass_equals_transformers(pair):
    ours, theirs = pair
    features, _ = draw()
    for mask in (None, IMAGE_MASK):
        expected = theirs(
            query_embeds=ours.query_tokens.expand(B, -1, -1),
            encoder_hidden_states=features,
            encoder_attention_mask=None if mask is None else mask.long(),
        ).last_hidden_state
        found = ours.query_pass(ours.project_images(features, mask)).output
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_passes_with_text_equal_transformers(pair):
    ours, theirs = pair
    features, ids = draw()
    images = ours.project_images(features)
    assert ours.word_embeddings is not None
    assert ours.position_embeddings is not None
    words = ours.word_embeddings(ids) + ours.position_embeddings.weight[:T]
    embeds = torch.cat([ours.query_tokens.expand(B, -1, -1), words], 1)
    given = {"query_embeds": embeds, "query_length": Q, "encoder_hidden_states": features}

    together = torch.cat([torch.ones(B, Q, dtype=torch.long), TEXT_MASK.long()], 1)
    expected = theirs(**given, attention_mask=together).last_hidden_state[:, :Q]
    torch.testing.assert_close(ours.matching_pass([images], ids, TEXT_MASK), expected, atol=1e-5, rtol=0)

    expected = theirs(**given, attention_mask=causal_mask(TEXT_MASK)).last_hidden_state[:, Q:]
    found = ours.causal_pass(ids, TEXT_MASK, ours.query_pass(images))
    torch.testing.assert_close(found[TEXT_MASK], expected[TEXT_MASK], atol=1e-5, rtol=0)

    text = {"query_embeds": words, "query_length": 0, "attention_mask": TEXT_MASK.long()}
    expected = theirs(**text).last_hidden_state
    torch.testing.assert_close(ours.text_pass(ids, TEXT_MASK)[TEXT_MASK], expected[TEXT_MASK], atol=1e-5, rtol=0)


# ---- the rest ----


def test_query_ffn_starts_as_a_copy_of_the_text_ffn():
    for block in build(shaken=False).blocks:
        query, text = block.query_ffn.state_dict(), block.text_ffn.state_dict()
        assert all(torch.equal(query[name], text[name]) for name in text)
        assert block.query_ffn.up.weight.data_ptr() != block.text_ffn.up.weight.data_ptr()


def test_initial_values():
    qformer = build(shaken=False)
    for name in ("query_tokens", "word_embeddings.weight", "blocks.0.cross_attention.key.weight"):
        assert qformer.get_parameter(name).std().item() == pytest.approx(0.02, rel=0.2), name
    assert qformer.blocks[0].attention.query.bias.abs().max() == 0


def test_text_longer_than_the_positions_is_refused():
    qformer = build()
    ids = torch.ones(1, 9, dtype=torch.long)
    with pytest.raises(
        ValueError, match=r"9 tokens is longer than qformer\.max_text_positions=8; shorten it, lower qformer\.max_text"
    ):
        qformer.text_pass(ids, ids.bool())


def test_without_a_text_side():
    qformer = build(vocab_size=None)
    features, ids = draw()
    assert not any("text" in name or "word" in name or "position" in name for name in qformer.state_dict())
    assert qformer.query_pass(qformer.project_images(features)).output.shape == (B, Q, D)
    with pytest.raises(AssertionError, match="without a text side"):
        qformer.text_pass(ids, ids.bool())


def test_dropout_only_in_training():
    qformer = build()
    images = qformer.project_images(draw()[0])
    assert torch.equal(qformer.query_pass(images).output, qformer.query_pass(images).output)
    qformer.train()
    assert not torch.equal(qformer.query_pass(images).output, qformer.query_pass(images).output)
