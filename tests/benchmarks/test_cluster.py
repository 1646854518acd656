"""The table of what stages need on many GPUs."""

import cluster
from page import BEGIN, END


def table():
    page = cluster.PAGE.read_text(encoding="utf-8")
    return page.partition(BEGIN.format("table", "cluster"))[2].partition(END.format("table"))[0].strip().splitlines()


def test_the_page_has_what_the_script_prints(tmp_path):
    rows = table()
    assert rows[0].split(" | ")[0] == f"| {cluster.HEAD[0]}" and len(rows) == 2 + len(cluster.ROWS)
    assert cluster.line("1B on 8", cluster.needs(cluster.command("1B on 8"), str(tmp_path))) == rows[3]


def test_rows_are_commands():
    assert len(cluster.ROWS) == 11
    for row in cluster.ROWS:
        settings = dict(setting.split("=") for setting in cluster.command(row))
        assert int(settings["trainer.devices"]) * int(settings["trainer.num_nodes"]) == int(row.split(" on ")[1])
