"""The host's own tests use its fixtures as any other extension's tests do."""

from ..fixtures import *  # noqa: F403
