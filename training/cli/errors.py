"""UserError, and other libraries' errors in one line without a token; `loading(what)` around strangers' code, in place of 17 broad excepts."""

import re

from huggingface_hub import get_token


class UserError(Exception):
    """A problem that the user can solve; its message says how. Printed without a traceback."""


def without_token(text: str) -> str:
    """`text` with whatever looks like, or is, an access token replaced."""
    token = get_token()
    if token:
        text = text.replace(token, "***")
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}", "***", text)


def error_text(error: BaseException) -> str:
    """One line on an error of the client, without a token."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return without_token(f"{type(error).__name__}: {' '.join(lines)[:400]}")
