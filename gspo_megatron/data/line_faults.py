"""What the reader of a file says of one of its lines."""

from __future__ import annotations

from gspo_megatron.config.loading import RecipeError, refuse


def broken_line(key: str, where: str, fault: str, fix: str) -> RecipeError:
    """Make the RecipeError of one line.

    Args:
        key: recipe key that names the file.
        where: `FILE line N`.
        fault: what is wrong with it; reads on from there.
        fix: what to do.
    """
    return refuse("line-broken", key, f"{where} {fault}", fix)


def broken_file(key: str, message: str, fix: str) -> RecipeError:
    """Make the RecipeError of a file that cannot be read at all."""
    return refuse("line-file-missing", key, message, fix)
