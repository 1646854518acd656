"""The site of docs, by Sphinx: ``make docs`` writes it to site/.

Its pages are the Markdown files that GitHub shows, the notebooks, and the docstrings."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

project, author = "lit_rlhf", "the lit_rlhf contributors"
release = version_of("lit-rlhf")
root_doc = "docs/index"
include_patterns = ["docs/**.md", "notebooks/*.ipynb", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme, html_title = "furo", f"lit_rlhf {release}"
html_copy_source = False
nb_execution_mode = "off"  # the tests run them; -D nb_execution_mode=force shows what they print and draw
nb_execution_excludepatterns = ["04_*"]  # not this one: it needs a checkpoint and records
nb_execution_timeout, nb_execution_raise_on_error = 900, True  # seconds for a cell
nb_merge_streams = True
myst_heading_anchors = 4
suppress_warnings = ["myst.xref_missing"]  # links to folders, which GitHub shows; tests/test_readme.py follows each
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # those of Lightning refer to pages of its own
