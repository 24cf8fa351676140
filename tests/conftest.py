"""One thread for each process: tests start some, which else would wait for one another."""

import csv
import os
from collections.abc import Iterator

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported


@pytest.fixture
def short_fields() -> Iterator[None]:
    """Python's own limit of a csv field, which another project of this process may have raised."""
    limit = csv.field_size_limit(131_072)
    yield
    csv.field_size_limit(limit)
