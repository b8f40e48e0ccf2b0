"""What several test files use: plain functions and constants, a module a subject. Fixtures are in conftest.py."""

from pathlib import Path

import pytest

# An assertion that fails in one of these shows its values, as it does in a test file.
pytest.register_assert_rewrite("helpers.packs", "helpers.runs", "helpers.scoring", "helpers.scripts")

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
