import io
import math

import numpy as np
import pytest
import torch

from shared.evaluation import analysis


def test_the_exponent_of_an_exact_power_law_is_recovered():
    x = np.array([128, 256, 512, 1024])
    fit = analysis.fit_exponent(x, 3.5 * x**1.8)
    assert fit.exponent == pytest.approx(1.8, abs=1e-9)
    assert fit.coefficient == pytest.approx(3.5)
    assert fit.r_squared == pytest.approx(1)
    assert fit.high - fit.low < 1e-6
    assert fit(2048) == pytest.approx(3.5 * 2048**1.8)


def test_slope_interval_and_r_squared_equal_scipys_regression():
    from scipy import stats

    rng = np.random.default_rng(0)
    x = np.geomspace(1, 1000, 9)
    y = 2 * x**-0.4 * np.exp(rng.normal(0, 0.2, 9))
    fit, expected = analysis.fit_exponent(x, y, confidence=0.9), stats.linregress(np.log(x), np.log(y))
    half = stats.t.ppf(0.95, 7) * expected.stderr
    assert fit.exponent == pytest.approx(expected.slope)
    assert (fit.low, fit.high) == pytest.approx((expected.slope - half, expected.slope + half))
    assert fit.r_squared == pytest.approx(expected.rvalue**2)


def test_the_interval_covers_the_true_exponent_as_often_as_it_says():
    rng = np.random.default_rng(1)
    x = np.geomspace(1, 100, 6)
    fits = [analysis.fit_exponent(x, x**0.5 * np.exp(rng.normal(0, 0.3, 6))) for _ in range(400)]
    covered = np.mean([fit.low <= 0.5 <= fit.high for fit in fits])
    assert 0.92 <= covered <= 0.98


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2], [1, 2], "three or more"),
        ([1, 2, 3], [1, 2], "three or more"),
        ([1, 2, 3], [1, 0, 2], "positive"),
        ([1, 2, 3], [1, math.nan, 2], "positive"),
        ([2, 2, 2], [1, 2, 3], "equal"),
    ],
)
def test_a_fit_without_enough_to_go_on_is_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        analysis.fit_exponent(x, y)


def test_mean_and_sd_are_printed_with_the_digits_that_the_spread_allows():
    spread = analysis.mean_sd([1.50, 1.52, 1.54])
    assert (spread.mean, spread.sd, spread.n) == pytest.approx((1.52, 0.02, 3))
    assert str(spread) == "1.520 ± 0.020 (n = 3)"
    assert str(analysis.mean_sd([250, 350])) == "300 ± 71 (n = 2)"
    assert analysis.mean_sd([7]).sd == 0


def test_nothing_to_average_is_refused():
    with pytest.raises(ValueError, match="nothing"):
        analysis.mean_sd([])


def test_pairing_finds_a_small_difference_that_the_spread_between_items_hides():
    rng = np.random.default_rng(0)
    a = rng.normal(10, 5, 100)
    result = analysis.paired_difference(a, a - 0.2 + rng.normal(0, 0.1, 100))
    assert result.significant
    assert result.low < 0.2 < result.high
    assert result.high - result.low < 0.06
    shuffled = analysis.paired_difference(a, rng.permutation(a - 0.2))
    assert not shuffled.significant


def test_the_bootstrap_interval_agrees_with_the_normal_one_for_many_pairs():
    d = np.random.default_rng(3).normal(0.3, 1, 400)
    result = analysis.paired_difference(d, np.zeros(400))
    half = 1.96 * d.std(ddof=1) / 20
    assert (result.low, result.high) == pytest.approx((d.mean() - half, d.mean() + half), abs=0.008)


def test_the_same_seed_gives_the_same_interval():
    a, b = np.random.default_rng(0).normal(size=(2, 20))
    assert analysis.paired_difference(a, b) == analysis.paired_difference(a, b)


def test_unpaired_measurements_are_refused():
    with pytest.raises(ValueError, match="pairs"):
        analysis.paired_difference([1, 2, 3], [1, 2])


@pytest.fixture
def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


def png_size(figure) -> int:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return len(buffer.getvalue())


def test_a_figure_has_title_and_labels_and_stays_under_60_kb(pyplot):
    figure, ax = analysis.figure("Training loss", "step", "loss (nats per token)")
    for i in range(4):
        ax.plot(np.arange(300), np.exp(-np.arange(300) / 80) + i, label=f"run {i}")
    ax.legend()
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == (
        "Training loss",
        "step",
        "loss (nats per token)",
    )
    assert figure.dpi == 80
    assert png_size(figure) < 60_000


def test_the_style_does_not_leak_into_the_readers_own_figures(pyplot):
    before = pyplot.rcParams["axes.grid"], pyplot.rcParams["figure.dpi"]
    analysis.figure("title", "x", "y")
    assert (pyplot.rcParams["axes.grid"], pyplot.rcParams["figure.dpi"]) == before


def test_a_grid_of_attention_maps_stays_under_60_kb(pyplot):
    figure, axes = analysis.figure("Heads", "key", "query", rows=2, columns=4, size=(10, 5))
    tokens = list("2024-03-05")
    weights = torch.softmax(torch.randn(8, 10, 10, generator=torch.Generator().manual_seed(0)), -1)
    for head, ax in enumerate(axes):
        analysis.attention_map(ax, weights[head], queries=tokens, keys=tokens, title=f"head {head}")
    assert [label.get_text() for label in axes[0].get_xticklabels()] == tokens
    np.testing.assert_allclose(axes[3].images[0].get_array(), weights[3])
    assert png_size(figure) < 60_000


def test_an_attention_map_refuses_labels_that_do_not_fit(pyplot):
    _, ax = analysis.figure("t", "x", "y")
    with pytest.raises(ValueError, match="2 labels for 3"):
        analysis.attention_map(ax, np.eye(3), keys=["a", "b"])
    with pytest.raises(ValueError, match="matrix"):
        analysis.attention_map(ax, np.ones((2, 3, 3)))


def test_a_table_is_aligned_text_and_escaped_html():
    table = analysis.table(
        [["gzip", 2.71828, 12000], ["<b>GPT</b>", 1.5, 7]], ["model", "bits per byte", "bytes"]
    )
    assert str(table).splitlines() == [
        "model       bits per byte   bytes",
        "──────────  ─────────────  ──────",
        "gzip                2.718  12,000",
        "<b>GPT</b>            1.5       7",
    ]
    assert "&lt;b&gt;GPT&lt;/b&gt;" in table._repr_html_()
    assert '<td style="text-align:right">2.718</td>' in table._repr_html_()


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="2 cells: a, b"):
        analysis.table([[1, 2, 3]], ["a", "b"])
