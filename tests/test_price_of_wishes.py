"""What each stated wish is worth, on few tasks; tests/price_of_wishes.py prints the whole table."""

import pytest
from price_of_wishes import LEAST, WISHES, price, tasks_with

from lib.reading import kinds_of_wish


@pytest.mark.parametrize("scale", LEAST)
@pytest.mark.parametrize("kind", WISHES)
def test_a_wish_is_worth_carrying_out(kind, scale, monkeypatch):
    kept, left_out, n = price(kind, 8, scale, monkeypatch)
    assert n == 8 or kind == "web page"
    assert kept - left_out >= LEAST[scale], (kept, left_out)


@pytest.mark.parametrize("kind", WISHES)
def test_a_kind_of_wish_has_one_name(kind):
    """That of lib.reading, by which train_vrl.py's table is made."""
    stated = tasks_with(WISHES[kind][0], 20)
    assert stated and all(kind in kinds_of_wish(task["constraints"]) for task in stated)
