"""A module whose own import fails."""

import nothing_like_it  # type: ignore[import-not-found]  # noqa: F401
