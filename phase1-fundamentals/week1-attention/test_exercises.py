"""Tests of week 1's exercises. A failure says what is wrong, not only that something is."""

import math

import pytest
import torch
import torch.nn.functional as F


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(a, b, tolerance=1e-5):
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def has_shape(x, *shape):
    assert isinstance(x, torch.Tensor), f"a tensor is wanted; you returned {type(x).__name__}"
    assert x.shape == shape, f"the shape should be {shape}; yours is {tuple(x.shape)}"


# ------------------------------------------------------------------------------------------ attention_weights


def test_attention_weights_are_the_scaled_softmax(answers):
    q, k = normal(2, 3, 5, 16), normal(2, 3, 7, 16, seed=1)
    weights = answers.attention_weights(q, k)
    has_shape(weights, 2, 3, 5, 7)
    sums = weights.sum(-1)
    over_queries = same(weights.sum(-2), torch.ones(2, 3, 7))
    assert not over_queries, (
        "your weights sum to one over the queries; each query's weights must, over the keys"
    )
    assert same(sums, torch.ones_like(sums)), (
        f"each query's weights must sum to one; yours sum to {sums[0, 0, 0]:.3f}"
    )
    scores = q @ k.transpose(-2, -1)
    assert not same(weights, scores.softmax(-1)), "the scores are not divided by √D"
    assert not same(weights, (scores / 16).softmax(-1)), "you divide by D; the paper divides by √D"
    assert same(weights, (scores / 4).softmax(-1)), "the weights are not softmax(q·kᵀ/√D)"


# ------------------------------------------------------------------------------------------- masked_attention


def test_masked_attention_sees_the_allowed_keys_only(answers):
    q, k, v = (normal(2, 4, 6, 8, seed=s) for s in range(3))
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    out = answers.masked_attention(q, k, v, mask)
    has_shape(out, 2, 4, 6, 8)
    moved_k, moved_v = k.clone(), v.clone()
    moved_k[:, :, 4:], moved_v[:, :, 4:] = 3.0, -3.0
    after = answers.masked_attention(q, moved_k, moved_v, mask)
    changed = (out[:, :, :4] - after[:, :, :4]).abs().amax((0, 1, 3)).nonzero().flatten().tolist()
    if changed:
        by_value = answers.masked_attention(q, k, moved_v, mask)[:, :, :4]
        weighted = not torch.equal(by_value, out[:, :, :4])
        reason = "it is given weight" if weighted else "its key is in the denominator of the softmax"
        pytest.fail(f"position {changed[0]} depends on position 4, which the mask hides from it ({reason})")
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert same(out, expected), "nothing hidden is seen, but the average of the allowed values is not right"


def test_masked_attention_gives_zeros_where_nothing_may_be_seen(answers):
    q, k, v = (normal(1, 1, 3, 4, seed=s) for s in range(3))
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    row = answers.masked_attention(q, k, v, mask)[0, 0, 1]
    assert not row.isnan().any(), "a query that may see nothing gives nan (0/0); it should give zeros"
    assert (row == 0).all(), "a query that may see nothing should give zeros; yours averages hidden values"


# ------------------------------------------------------------------------------------------------ window_mask


@pytest.mark.parametrize(("T", "window"), [(6, 3), (5, 1), (4, 9)])
def test_window_mask_is_a_band_below_the_diagonal(answers, T, window):
    mask = answers.window_mask(T, window)
    has_shape(mask, T, T)
    assert mask.dtype == torch.bool, f"the mask should be bool; yours is {mask.dtype}"
    for i in range(T):
        for j in range(T):
            wanted = 0 <= i - j < window
            if bool(mask[i, j]) != wanted:
                does, should = ("lets", "must not") if mask[i, j] else ("does not let", "should")
                pytest.fail(
                    f"with a window of {window} your mask {does} position {i} see position {j}; it {should}"
                )


# ------------------------------------------------------------------------------------------------ merge_heads


def test_merge_heads_keeps_each_position_together(answers):
    B, H, T, D = 2, 3, 4, 5
    place = torch.arange(T).view(1, 1, T, 1).expand(B, H, T, D)
    merged = answers.merge_heads(place)
    has_shape(merged, B, T, H * D)
    strangers = (merged[0, 0] != 0).nonzero().flatten()
    if len(strangers):
        stranger = merged[0, 0, strangers[0]]
        pytest.fail(
            f"position 0 of your result holds numbers of position {stranger}: transpose before you reshape"
        )
    head = torch.arange(H).view(1, H, 1, 1).expand(B, H, T, D)
    order = answers.merge_heads(head)[0, 0].tolist()
    assert order == [h for h in range(H) for _ in range(D)], (
        f"heads should stand one after the other; yours: {order}"
    )
    x = normal(B, H, T, D)
    assert same(answers.merge_heads(x), torch.cat([x[:, h] for h in range(H)], dim=-1))


# --------------------------------------------------------------------------------------------- grouped_scores


@pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])
def test_grouped_scores_uses_the_key_head_of_the_group(answers, kv_heads):
    q, k = normal(2, 6, 4, 8), normal(2, kv_heads, 5, 8, seed=1)
    scores = answers.grouped_scores(q, k)
    has_shape(scores, 2, 6, 4, 5)
    for head in range(6):
        wanted = head // (6 // kv_heads)
        products = [q[:, head] @ k[:, other].transpose(-2, -1) for other in range(kv_heads)]
        used = [other for other, product in enumerate(products) if same(scores[:, head], product, 1e-4)]
        message = f"with {kv_heads} key heads, query head {head} should read key head {wanted}; yours reads "
        assert used == [wanted], message + (f"{used[0]}" if used else "something else")


# ----------------------------------------------------------------------------------------------------- rotate


def test_rotate_leaves_position_zero_and_all_lengths_alone(answers):
    x = normal(2, 3, 8)
    turned = answers.rotate(x, torch.tensor([0, 5, 90]))
    has_shape(turned, 2, 3, 8)
    assert same(turned[:, 0], x[:, 0]), "at position 0 nothing should turn"
    assert same(turned.norm(dim=-1), x.norm(dim=-1)), (
        "a rotation keeps the length of a vector; yours changes it"
    )


def test_rotate_turns_the_right_pairs_in_the_right_direction(answers):
    one = torch.zeros(1, 8)
    one[0, 1] = 1.0  # the first number of pair 1
    turned = answers.rotate(one, torch.tensor([3]))[0]
    assert not same(turned, one[0]), "at position 3 nothing has turned: is it `positions` that you use?"
    moved = turned.abs().gt(1e-6).nonzero().flatten().tolist()
    assert moved == [1, 5], (
        f"dimension 1 should turn with dimension 5 (1 + D/2); yours turns in dimensions {moved}"
    )
    angle = 3 * 10_000 ** (-2 / 8)
    wrong_way = same(turned[5], torch.tensor(-math.sin(angle)), 1e-4)
    assert not wrong_way, "you turn backwards: the minus belongs to the first half, x₁cos − x₂sin"
    seen = math.atan2(turned[5], turned[1])
    assert abs(seen - angle) < 1e-4, (
        f"pair 1 of 4 at position 3 should turn by {angle:.4f}; yours turns by {seen:.4f}"
    )


def test_rotate_makes_dot_products_depend_on_distance_alone(answers):
    q, k = normal(16), normal(16, seed=1)

    def logit(i, j):
        return answers.rotate(q[None], torch.tensor([i]))[0] @ answers.rotate(k[None], torch.tensor([j]))[0]

    near, far = logit(7, 4), logit(107, 104)
    assert torch.isclose(near, far, atol=1e-3), f"distance 3 gives {near:.4f} at 7 and {far:.4f} at 107"
    assert not torch.isclose(near, logit(9, 4), atol=1e-3), "distances 3 and 5 give the same logit"


# --------------------------------------------------------------------------------------------- online_softmax


def pieces_of(scores, values, sizes):
    yield from zip(scores.split(sizes), values.split(sizes), strict=True)


@pytest.mark.parametrize("sizes", [[10], [3, 7], [1] * 10, [4, 1, 5]])
def test_online_softmax_equals_the_softmax_over_everything(answers, sizes):
    scores, values = normal(10) * 3, normal(10, 4, seed=1)
    scores = scores.sort().values  # ever larger: the maximum changes in every piece
    expected = scores.softmax(0) @ values
    found = answers.online_softmax(pieces_of(scores, values, sizes))
    has_shape(found, 4)
    if not same(found, expected):
        backwards = answers.online_softmax(pieces_of(scores.flip(0), values.flip(0), sizes))
        if same(backwards, expected):
            pytest.fail(
                "right if the largest score comes first, wrong if later: rescale what is summed already"
            )
        pytest.fail(
            f"in pieces of {sizes} the first number is {found[0]:.3f}; all at once it is {expected[0]:.3f}"
        )


def test_online_softmax_survives_large_scores(answers):
    scores, values = torch.tensor([998.0, 1000.0, 999.0]), torch.eye(3)
    found = answers.online_softmax(pieces_of(scores, values, [1, 1, 1]))
    assert found.isfinite().all(), "scores of 1000 overflow: exp(1000) is inf; subtract a maximum first"
    assert same(found, scores.softmax(0)), f"for scores 998, 1000, 999 the weights are {found.tolist()}"


# --------------------------------------------------------------------------------------------- kv_cache_bytes


def test_kv_cache_bytes_of_a_large_model(answers):
    expected = 2 * 80 * 8 * 128 * 4096 * 2
    found = answers.kv_cache_bytes(80, 64, 8, 8192, 4096, 1, 2)
    assert found != expected // 2, "that is the keys alone; values are kept too"
    assert found != expected * 8, "that is a key head for every query head; only the 8 shared ones are kept"
    assert found != expected * 64, "a head is d_model / num_heads wide, not d_model"
    assert found == expected, f"Llama 2 70B at 4,096 tokens keeps {expected:,} bytes; you say {found:,}"
    assert answers.kv_cache_bytes(2, 4, 2, 32, 10, 3, 4) == 2 * 2 * 3 * 2 * 8 * 10 * 4, (
        "the batch must count too"
    )


# -------------------------------------------------------------------------------------------------- noam_rate


def test_noam_rate_is_the_papers(answers):
    first = answers.noam_rate(0, 512, 4000)
    assert first > 0, "step 0 is the paper's step 1; at a rate of zero the first update does nothing"
    rates = [answers.noam_rate(step, 512, 4000) for step in (0, 100, 3999, 16_000)]
    assert rates[0] < rates[1] < rates[2], (
        "the rate should rise until `warmup_steps`; yours falls from the start"
    )
    assert rates[2] > rates[3], "after the warm-up the rate should fall"
    for step, rate in zip(
        (0, 100, 3999, 15_999), (*rates[:3], answers.noam_rate(15_999, 512, 4000)), strict=True
    ):
        wanted = 512**-0.5 * min((step + 1) ** -0.5, (step + 1) / 4000**1.5)
        assert math.isclose(rate, wanted, rel_tol=1e-9), (
            f"at step {step} the rate is {wanted:.3g}; yours is {rate:.3g}"
        )


# ---------------------------------------------------------------------------------------------- smoothed_loss


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_smoothed_loss_equals_pytorchs(answers, epsilon):
    logits, targets = normal(3, 5, 11), torch.arange(15).view(3, 5) % 10 + 1
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=epsilon)
    loss = answers.smoothed_loss(logits, targets, epsilon, 0)
    has_shape(loss)
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert epsilon == 0 or not same(loss, plain), "ε makes no difference to your loss"
    assert same(loss, expected), (
        f"without any padding, at ε = {epsilon}, it is {expected:.4f}; yours is {loss:.4f}"
    )


@pytest.mark.parametrize("pad_id", [0, 4])
def test_smoothed_loss_does_not_see_padding(answers, pad_id):
    logits, targets = normal(2, 6, 11), torch.full((2, 6), 7)
    alone = answers.smoothed_loss(logits, targets, 0.1, pad_id)
    padding = torch.full((2, 9), pad_id)
    wider = torch.cat((logits, normal(2, 9, 11, seed=1)), dim=1)
    padded = answers.smoothed_loss(wider, torch.cat((targets, padding), dim=1), 0.1, pad_id)
    if not same(alone, padded):
        share = (padded / alone).item()
        diluted = abs(share - 6 / 15) < 1e-3
        reason = (
            "you divide by all positions, not by the real ones" if diluted else "padding is in the average"
        )
        pytest.fail(f"9 tokens of padding change the loss from {alone:.4f} to {padded:.4f}: {reason}")


# -------------------------------------------------------------------------------------------------- beam_step


def test_beam_step_takes_the_best_over_all_hypotheses(answers):
    scores = torch.tensor([-1.0, -5.0, -9.0])
    log_probs = torch.tensor(
        [[0.5, 0.3, 0.15, 0.05], [0.05, 0.9, 0.03, 0.02], [0.25, 0.25, 0.25, 0.25]]
    ).log()
    running = torch.zeros(3, dtype=torch.bool)
    new, beams, tokens = answers.beam_step(scores, log_probs, running, 3)
    has_shape(new, 3)
    pairs = list(zip(beams.tolist(), tokens.tolist(), strict=True))
    assert len(set(beams.tolist())) == 1, (
        f"the three best continuations all come from hypothesis 0; yours come from {beams.tolist()} "
        "(do the scores so far count, and may one hypothesis go on in several ways?)"
    )
    assert pairs == [(0, 0), (0, 1), (0, 2)], (
        f"expected (hypothesis, token) (0, 0), (0, 1), (0, 2); yours: {pairs}"
    )
    assert same(new, scores[0] + log_probs[0, :3]), (
        f"the new scores should be {(scores[0] + log_probs[0, :3]).tolist()}"
    )


def test_beam_step_leaves_finished_hypotheses_as_they_are(answers):
    scores = torch.tensor([-1.0, -1.2])
    log_probs = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]]).log()
    new, beams, tokens = answers.beam_step(scores, log_probs, torch.tensor([True, False]), 2)
    assert (beams[0].item(), tokens[0].item()) == (0, 2), (
        f"hypothesis 0 has ended: it goes on with the end token (2) only, and is best; "
        f"yours puts hypothesis {beams[0]} with token {tokens[0]} first"
    )
    assert same(new[0], scores[0]), (
        f"to stay finished costs nothing: its score stays −1; yours is {new[0]:.3f}"
    )
    assert (beams[1].item(), tokens[1].item()) == (1, 0), "the second best is hypothesis 1 with token 0"
