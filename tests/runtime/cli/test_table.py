"""Aligned columns."""

from owl2.runtime.cli.table import section, table


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [("name", "size"), ("a longer name", "1"), ("", "")]
    assert table(rows) == "name           size\na longer name  1\n"
    assert table(rows, "<>") == "name           size\na longer name     1\n"
    assert table(rows, ">") == "         name  size\na longer name  1\n"


def test_foreign_cells_stay_in_their_cell() -> None:
    assert table([("a\nb\x1b[31m", "c"), ("", "d")]) == "a\\nb\\x1b[31m  c\n              d"


def test_a_section_is_indented() -> None:
    assert section("title", table([("a", "b"), ("cc", "d")])) == "title\n  a   b\n  cc  d"
