import os
from pathlib import Path

import pytest


@pytest.fixture(scope="package")
def chromium():
    """A browser without a window; the test is left out where there is none. Only one can be started at a time."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    with playwright.sync_playwright() as started:
        found = path if Path(path).exists() else started.chromium.executable_path
        if not Path(found).exists():
            pytest.skip("no chromium: CHROMIUM names its program, or `playwright install chromium` brings one")
        # Chromium's own sandbox needs rights that containers do not have.
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()
