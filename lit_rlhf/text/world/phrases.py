"""The vocabulary of the built-in world: sentences and questions, as ``phrases.yaml`` has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

PHRASES: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("phrases.yaml").read_text(encoding="utf-8"))
