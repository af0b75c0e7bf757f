"""The stub driver of the runtime's tests."""

from tests.runtime.conftest import stub_driver, stub_library

__all__ = ["stub_driver", "stub_library"]
