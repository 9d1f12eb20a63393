"""Each test of the ops that asks runs on each backend."""

from collections.abc import Iterator

import pytest

from reprdpo.ops import backends, use_backend


@pytest.fixture(params=["reference", "native", pytest.param("triton", marks=pytest.mark.interpreter)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend that serves the test's ops; the test is skipped where it is not there."""
    if not (status := backends()[request.param]).available:
        pytest.skip(status.reason)
    with use_backend(request.param):
        yield request.param
