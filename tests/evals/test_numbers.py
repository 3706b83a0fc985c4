"""Numbers in answers: written in all ways that people group digits."""

from __future__ import annotations

from decimal import Decimal

import pytest

from calm_jax.evals import numbers

# Of every length, and with groups that begin with zeros.
INTEGERS = (
  *(1000, 1005, 9_999, 12_000, 70_000, 100_000, 104_050, 999_999),
  *(1_000_000, 1_234_567, 20_000_003, 123_456_789, 1_000_000_000),
)
EIGHT_SCRIPTS = "٠۰०০௦౦๐０"  # their zeros


def grouped(number: int, separator: str) -> str:
  return f"{number:,}".replace(",", separator)


@pytest.mark.parametrize(
  "separator",
  [
    *",'’‘_，٬،",
    *" \u00a0\u202f\u2009\u2007\u2008\u200a\u2002\u205f",
    *("{,}", r"\,", r"\;", r"\:", "\\ ", "~", r"{\,}", r",\!", r"\thinspace "),
  ],
)
@pytest.mark.parametrize("language", ["", "de", "ja"])
def test_grouped_digits_are_one_number(separator, language):
  for number in INTEGERS:
    text = grouped(number, separator)
    assert numbers.find_all(f"x = {text}.", language) == [number]
    assert numbers.find_all(f"$-{text}$ and", language) == [-number]
    if separator[-1] not in ",，٬،!}":
      for mark in ".,":
        assert numbers.find_all(f"{text}{mark}25") == [number + Decimal("0.25")]


@pytest.mark.parametrize("zero", EIGHT_SCRIPTS)
def test_digits_of_other_scripts(zero):
  digits = {ord("0") + i: chr(ord(zero) + i) for i in range(10)}
  for number in INTEGERS:
    for separator in (",", " ", "\u202f", "{,}"):
      text = grouped(number, separator).translate(digits)
      assert numbers.find_all(text) == [number], text
  assert numbers.find_all("0,500 1/2".translate(digits)) == [
    Decimal("0.5"), Decimal("0.5"),
  ]  # fmt: skip


@pytest.mark.parametrize("language", ["de", "deu_Latn", "es", "spa_Latn", "pt"])
def test_dots_group_where_the_language_does(language):
  for number in INTEGERS:
    text = grouped(number, ".")
    assert numbers.find_all(text, language) == [number]
    assert numbers.find_all(f"{text},5 €", language) == [
      number + Decimal("0.5")
    ]
  for text in ("0.125", "1.5", "1.25", "3.1415"):
    assert numbers.find_all(text, language) == [Decimal(text)]


@pytest.mark.parametrize("language", ["", "en", "ru", "sw", "th", "zho_Hans"])
def test_one_dot_is_a_decimal_mark_elsewhere(language):
  assert numbers.find_all("1.000", language) == [1]
  assert numbers.find_all("12.345", language) == [Decimal("12.345")]
  assert numbers.find_all("1.000.000", language) == [1_000_000]
  assert numbers.find_all("1.234,5", language) == [Decimal("1234.5")]


@pytest.mark.parametrize(
  ("text", "found"),
  [
    # Fractions are no pairs of numbers, and dates no fractions.
    ("1/2", "0.5"),
    ("2 1/2 cups", "2.5"),
    ("2½", "2.5"),
    ("¾ of it", "0.75"),
    (r"\frac{1}{2}", "0.5"),
    (r"2\dfrac{1}{4}", "2.25"),
    ("1,000/4", "250"),
    (r"\frac{1{,}000}{4}", "250"),
    ("-3/4", "-0.75"),
    ("3/4/2024", "3 4 2024"),
    ("7/0", "NaN"),
    # Powers of ten are part of a number, and exponents of units are none.
    ("1.5e6", "1500000"),
    ("2 × 10³", "2000"),
    (r"1.5 \times 10^{6}", "1500000"),
    ("10^3", "1000"),
    ("18 cm^2", "18"),
    ("18 m^{3}", "18"),
    ("18 m²", "18"),
    # Groups of four digits in Chinese and Japanese.
    ("7万", "70000"),
    ("7万2千円", "72000"),
    ("7万2,500円", "72500"),
    ("1億2000万", "120000000"),
    ("12.5 万", "125000"),
    ("3千万", "30000000"),
    ("5千克、5千米", "5 5"),
    # Several numbers stay several.
    ("5, 10", "5 10"),
    ("2024 100", "2024 100"),
    ("1,000 500", "1000 500"),
    ("1.5 200", "1.5 200"),
    ("0 100", "0 100"),
    ("1000 000", "1000 0"),
    ("12 34", "12 34"),
    # What the rules of the module decide.
    ("5 100-dollar bills", "5100"),
    ("rooms 2,3", "2.3"),
    ("1,0000", "1"),
    ("2 million", "2"),
  ],
)
def test_what_is_one_number(text, found):
  expected = [Decimal(number) for number in found.split()]
  assert str(numbers.find_all(text)) == str(expected) or (
    numbers.find_all(text) == expected
  )


def test_a_number_alone():
  assert numbers.parse(" 1,200 ") == 1200
  assert numbers.parse("2.500", "de") == 2500
  assert numbers.parse("2,5") == Decimal("2.5")
  for text in ("", "a", "1 2", "18 eggs", "1, 2", "1,2,3"):
    with pytest.raises(ValueError, match="not a number"):
      numbers.parse(text)
