"""Text of others that is safe in a terminal."""


def printable(text: str) -> str:
    """The text with control characters replaced, except new line and tab, so that it cannot control the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" or ord(c) > 0x9F else "\ufffd" for c in text)
