"""Errors of libraries as one sentence."""


def first_line(error: Exception) -> str:
    """The first line of a message, or the kind of the error where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
