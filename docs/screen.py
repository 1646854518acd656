"""Draws screen.svg, what a run whose models were compared ends with on the terminal.

python docs/screen.py runs/quickstart"""

import io
import re
import sys
from pathlib import Path

from rich.console import Console

from lit_rlhf.apps.report.screen import print_screen

console = Console(record=True, width=118, file=io.StringIO())
print_screen(Path(sys.argv[1]), console)
picture = console.export_svg(title="lit-rlhf", font_aspect_ratio=0.6)
picture = re.sub(r"@font-face \{.*?\n    \}\n", "", picture, flags=re.DOTALL)  # of another server
Path(__file__).with_name("screen.svg").write_text(picture.replace("Fira Code, ", ""), encoding="utf-8")
