"""Hypothesis draws the same examples each time, leaves no files here, and takes as long as a loaded machine needs."""

import tempfile

from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

set_hypothesis_home_dir(f"{tempfile.gettempdir()}/hypothesis")
settings.register_profile(
    "functional",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("functional")
