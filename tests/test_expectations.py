"""The helper of golden tests: it compares texts, and writes new ones into the file when asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from expectations import assert_expected, exchange

FILE = '''from expectations import assert_expected

def test_one() -> None:
    assert_expected("a", "")

def test_two() -> None:
    assert_expected(
        "é" + "b",
        """
            old
            lines
        """,
    )
'''


def test_equal_texts_and_others() -> None:
    assert_expected("a\n  b\n", """
        a
          b
    """)  # fmt: skip
    with pytest.raises(AssertionError, match="expected\na\n\nfound\nb"):
        assert_expected("b", "a")


def test_texts_are_exchanged_in_their_places(tmp_path: Path) -> None:
    """Lines are those of the file as it was imported, whatever was exchanged before."""
    path = tmp_path / "test_file.py"
    path.write_text(FILE)
    exchange(path, 4, "first\n  line")
    exchange(path, 7, "éb")
    exchange(path, 4, "again")
    text = path.read_text()
    assert '    assert_expected("a", """\n        again\n    """)\n' in text
    assert '        """\n            éb\n        """,\n' in text
    assert "old" not in text
    compile(text, str(path), "exec")
