"""Names from files, as they stand on a terminal and on pages."""

from nlm.checkpoint.names import printable


def test_only_what_steers_is_escaped():
    """Controls, surrogates, separators and overrides; other spaces and joiners are of names."""
    for kept in ("layer.0", "naïve", "a\u00a0b", "全\u3000角", "क्\u200dष", "\u200fא", "👩\u200d🔬"):
        assert printable(kept) == kept
    for number in (*range(0x20), 0x7F, 0x85, 0x9B, 0x2028, 0x2029, *range(0x202A, 0x202F),
                   *range(0x2066, 0x206A), 0xD800, 0xDFFF, 0xAD, 0x200B, 0xFEFF, 0xFFFA, 0xE0041,
                   0xE000, 0x10FFFF, 0x378):  # fmt: skip
        shown = printable(f"a{chr(number)}\u3000")
        assert shown.startswith("a\\") and shown.endswith("\u3000"), number
        assert shown[:-1].isascii() and shown[:-1].isprintable(), number
