"""The one error a caller can be shown as a single line."""


class ThresherError(ValueError):
    """The caller's mistake: the message says what must hold, what was got and what to do.

    A ``ValueError``, so library users need no import to catch it; the command line prints its one line and exits with code 2.
    """


def require(condition: bool, must: str, got: object, do: str) -> None:
    """Raise ``ThresherError("<must>; got <got>; <do>")`` unless ``condition`` holds.

    Args:
        condition: what must be true.
        must: what must hold, naming the argument, e.g. ``"topk must be at least 1"``.
        got: the offending value (shown with ``str``; pass shapes and dtypes, not tensors).
        do: what the caller should do instead.
    """
    if not condition:
        raise ThresherError(f"{must}; got {got}; {do}")
