"""Draws screen.svg, what a run whose models were compared ends with, and recording.svg, the lines that came before.

    lit-rlhf | tee quickstart.log
    python docs/screen.py runs/quickstart quickstart.log

The recording scrolls in 20 seconds through what took minutes: what the models wrote as they learned, and the end."""

import html
import io
import re
import sys
from pathlib import Path

from rich.console import Console

from lit_rlhf.apps.report.screen import print_screen

COLUMNS, ROWS = 118, 34
HERE = Path(__file__).parent
MARKS = {"✓": "#98a84b", "✗": "#cc555a"}
RECORDING = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
  text {{ font: 14px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #c5c8c6; white-space: pre; }}
  @keyframes up {{ 85%, 100% {{ transform: translateY(-{way}px); }} }}
  .lines {{ animation: up 20s steps({count}) infinite; }}
</style>
<rect width="100%" height="100%" rx="8" fill="#292929"/>
<svg y="8" height="{inner}"><g class="lines">
{lines}
</g></svg>
</svg>
"""


def main(run: Path, log: Path) -> None:
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    print_screen(run, console)
    picture = console.export_svg(title="lit-rlhf", clear=False)
    picture = re.sub(r"@font-face \{.*?\n    \}\n", "", picture, flags=re.DOTALL)  # of another server
    (HERE / "screen.svg").write_text(picture.replace("Fira Code, ", ""), encoding="utf-8")
    end = console.export_text().splitlines()
    printed = re.split(r"[\r\n]+", log.read_text(encoding="utf-8"))
    tables = next(i for i, line in enumerate(printed) if line.strip().startswith("held-out prompt"))
    before = [line for line in printed[:tables] if line.strip() and not re.search(r"\d+%\|", line)]  # a bar's states
    draw(["$ lit-rlhf", *before, *end, f"report: {run}/report.html"])


def draw(lines: list[str]) -> None:
    high, inner = 18, 18 * ROWS
    texts = [
        f'<text x="12" y="{inner + high * i - 4}">{coloured(line[:COLUMNS])}</text>' for i, line in enumerate(lines)
    ]
    filled = {
        "width": 8.45 * COLUMNS + 24, "height": inner + 16, "inner": inner,
        "way": high * len(lines), "count": len(lines), "lines": "\n".join(texts),
    }  # fmt: skip
    (HERE / "recording.svg").write_text(RECORDING.format(**filled), encoding="utf-8")


def coloured(line: str) -> str:
    return re.sub("[✓✗]", lambda m: f'<tspan fill="{MARKS[m[0]]}">{m[0]}</tspan>', html.escape(line))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
