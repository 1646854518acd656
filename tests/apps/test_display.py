# ruff: noqa: RUF001  the page's minus signs and dashes are meant
import pytest

from lit_rlhf.apps.display import duration, fill_template, number, percent, printable


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (0.9996, "1.00"),
        (-1.2345, "−1.23"),
        (12.345, "12.3"),
        (1234.5, "1,234"),
        (0.000123, "0.000123"),
        (0.00001234, "1.23×10⁻⁵"),
        (15360, "15,360"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_have_three_significant_digits(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.7412, "74.1%"), (1.0, "100%"), (0.9999, "100%"), (0.0, "0%"), (0.00189, "0.189%"), (None, "–")],
)
def test_shares_are_percentages(share, text):
    assert percent(share) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.14, "3.1 s"), (59.7, "1 min 0 s"), (335.4, "5 min 35 s"), (7322, "2 h 2 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_line_breaks_and_emoji_stay():
    assert printable("a\tb\nc 😀 é") == "a\tb\nc 😀 é"


def test_templates_are_filled_in_or_left_out():
    figures = {"val_loss": 0.5, "val_loss_first": 2.0, "accuracy": 0.75, "count": 1200, "none": None}
    assert fill_template("loss {val_loss:change}, {count} prompts", figures) == "loss 2.00 → 0.500, 1,200 prompts"
    assert (
        fill_template("**{accuracy:%}** right[; {none} more][, {count} asked].", figures)
        == "**75.0%** right, 1,200 asked."
    )
    assert fill_template("{none} and {count}", figures) is None and fill_template("{missing}", figures) is None
    assert fill_template("{count:change}", figures) == "1,200" and fill_template("plain", {}) == "plain"
