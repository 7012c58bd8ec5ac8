"""What each stated wish is worth, on few tasks; tests/price_of_wishes.py prints the whole table."""

import pytest
from price_of_wishes import LEAST, WISHES, price


@pytest.mark.parametrize("scale", LEAST)
@pytest.mark.parametrize("kind", WISHES)
def test_a_wish_is_worth_carrying_out(kind, scale, monkeypatch):
    kept, left_out, n = price(kind, 8, scale, monkeypatch)
    assert n == 8 or kind == "web page"
    assert kept - left_out >= LEAST[scale], (kept, left_out)
