"""What tests in this folder share is in `tests/support`."""

import pytest

# Asserts there say what they compared, as those of a test module do.
pytest.register_assert_rewrite("scheduler_world")
