"""For all tests."""

import sys
from collections.abc import Iterator

import pytest

# Asserts of shared helpers say what they compared, as those of a test module do.
pytest.register_assert_rewrite("scheduler_world", "world_checks", "world_parts", "provider_bench")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Commands and servers that tests start inherit the environment: model weights that the user has measured change no
    test, and no test leaves any behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLCACHE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tensors of tests are small: threads that wait for each other cost more than they save, ten times as much where
    something else runs too.  Of this process only: servers have threads as ever."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)
