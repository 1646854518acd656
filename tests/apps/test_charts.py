from lit_rlhf.apps.charts import Chart, Line, _noisy, _smoothed, draw, ticks


def test_a_line_by_hand():
    """The plot reaches from (46, 152), bottom left, to (328, 10)."""
    points = [(0.0, 0.0), (5.0, 25.0), (10.0, 100.0)]
    drawing = draw(Chart("Right", "%", "steps", [Line("held out", "pink", points)], (50.0, "chance")))
    assert drawing.strokes[0].path == "M46.0 152.0L187.0 116.5L328.0 10.0"
    assert drawing.strokes[0].last == "100%" and drawing.reference.at == 81
    assert [tick.label for tick in drawing.y_ticks] == ["0", "25", "50", "75", "100"]
    assert [tick.label for tick in drawing.x_ticks] == ["0.0", "2.5", "5.0", "7.5", "10.0"]


def test_tick_labels_fit_beside_the_axis():
    def labels(*axis):
        return [label.replace("\N{MINUS SIGN}", "-") for _, label in ticks(*axis)]

    assert labels(0.0, 0.001, 0.00025) == ["0", "2.5e-4", "5e-4", "7.5e-4", "1e-3"]
    assert labels(-0.0005, 0.0005, 0.0005) == ["-0.0005", "0.0000", "0.0005"]
    assert labels(0.0, 4e-5, 2e-5) == ["0", "2e-5", "4e-5"]


def test_smoothing_keeps_a_straight_line_and_removes_a_zigzag():
    smooth = _smoothed([(float(x), 2.0 * x + (-1) ** x) for x in range(80)])
    assert max(abs(y - 2 * x) for x, y in smooth[5:-5]) < 0.25
    assert _noisy([(float(x), float(x % 2)) for x in range(80)]) and not _noisy(
        [(float(x), 2.0 * x) for x in range(80)]
    )
