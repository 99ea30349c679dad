"""For all tests."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Commands and servers that tests start inherit the environment: model weights that the user has measured change no
    test, and no test leaves any behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLCACHE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
