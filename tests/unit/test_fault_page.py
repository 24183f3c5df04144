"""docs/faults.md shows the table by which the nodes are broken in tests/libvirt."""

from __future__ import annotations

from tests.libvirt.faults import FAULTS, OWN_FAULTS, PAGE, page_with_tables
from vmnode.conditions import BY_NAME


def test_the_page_shows_the_table_that_is_tested() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == page_with_tables(page), "python -m tests.libvirt.faults writes it anew"


def test_every_row_has_a_name_of_its_own() -> None:
    names = [fault.name for fault in FAULTS] + [fault.name for fault in OWN_FAULTS]
    assert len(set(names)) == len(names)


def test_a_row_counts_for_the_attribute_as_its_condition_does() -> None:
    for fault in FAULTS:
        if fault.condition:
            assert fault.attribute_of_guests == BY_NAME[fault.condition].guest, fault.name
