"""Reads the numbers in an answer: grouped digits, fractions, powers, LaTeX.

Where a text can be read in two ways, these rules hold:

- A comma before three digits groups them in every language, as MGSM's own files
  and scorers have it: 1,000 is 1000, also in German. Before any other number of
  digits it is a decimal mark: 1,5 is 1.5.
- A dot before three digits groups them if there are several (1.000.000), if a
  decimal comma follows (1.234,5), or if the language groups by dots: 1.000 is
  1000 in German and 1 in English.
- A space of any width groups three digits: "5 100" is 5100 and never 100.
- A slash between two numbers is a fraction: 3/4 is 0.75 and never 3 or 4.
- Number words are not read: "2 million" is 2. But 万, 億 and 千 are.
"""

import functools
import re
import unicodedata
from decimal import Decimal
from typing import NamedTuple

# Languages that group by dots (CLDR), by the codes of ISO 639-1 and FLORES-200.
_BY_DOTS = re.compile(
  r"(?:ca|cat|da|dan|de|deu|el|ell|es|spa|eu|eus|gl|glg|hr|hrv|id|ind|is|isl|it"
  r"|ita|jv|jav|mk|mkd|nl|nld|pt|por|ro|ron|sl|slv|sr|srp|tr|tur|vi|vie)(?![a-z])"
)
_COMMA = "[,،，٬]"
_DECIMAL_MARKS = ".,٫"
_SPACES = " \u00a0\u202f\u205f" + "".join(map(chr, range(0x2000, 0x200B)))
_CURRENCY = "[$€£¥₹৳฿₽＄￥]"
_MINUS = "[-−–－‐‑]"
_SLASH = " ?[/⁄] ?"
# 千克 is a kilogram and 千米 a kilometre.
_SCALE = r"\s?(?:千?[万萬億亿]|千(?![克米瓦卡升帕焦赫伏]))"
_SCALES = {"千": 10**3, "万": 10**4, "萬": 10**4, "億": 10**8, "亿": 10**8}

_LATEX = (
  (re.compile(r"(?<=\d)\{([.,])\}(?=\d)"), r"\1"),  # 1{,}000
  (re.compile(r"\\!|\\(?=[$%#_])"), ""),  # 1,\!000 and \$5
  # 1\,000 and 1~000
  (re.compile(r"(?<=\d)\{?(?:\\[,;: ]|\\thinspace\s*|~)\}?(?=\d)"), "\u2009"),
  (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r" \1/\2"),
)
_OTHER_DIGIT = re.compile(r"[^\D0-9]")
_VULGAR_FRACTION = re.compile("[¼-¾⅐-⅞]")
_POWER_OF_TEN = re.compile(
  r"((?<=\d)\s*(?:[×x*·]|\\times|\\cdot)\s*|(?<![\d.,]))10"
  r"(?:\s*\^\s*\{?(\d{1,2})\}?|([⁰¹²³⁴-⁹]{1,2}))"
)
_UNIT_EXPONENT = re.compile(rf"(?<=[^\W\d_])\^\{{?{_MINUS}?\d+\}}?")  # cm^2


class _Patterns(NamedTuple):
  """A number with its sign; a number; a number whose digits are grouped."""

  signed: re.Pattern
  number: re.Pattern
  grouped: re.Pattern


def find_all(text: str, language: str = "") -> list[Decimal]:
  """Returns the numbers in a text, in its order.

  `language` is a code such as de or deu_Latn; it decides what 1.000 is.
  """
  patterns = _patterns(language)
  matches = patterns.signed.finditer(_without_markup(text))
  return [_signed_value(match, patterns) for match in matches]


def parse(text: str, language: str = "") -> Decimal:
  """Returns the number that a text is; ValueError if it is anything else."""
  patterns = _patterns(language)
  match = patterns.signed.fullmatch(_without_markup(text).strip())
  if match is None:
    raise ValueError(f"{text!r} is not a number")
  return _signed_value(match, patterns)


@functools.cache
def _patterns(language: str) -> _Patterns:
  separators = [re.escape(space) for space in _SPACES] + ["['’‘ʼ]", "_"]
  forms = [rf"(?:{s}\d{{3}})+(?!\d)(?:[.,٫]\d+)?" for s in separators]
  # In India only the last group has three digits.
  forms.append(rf"(?:{_COMMA}\d{{2,3}})*{_COMMA}\d{{3}}(?!\d)(?:[.٫]\d+)?")
  at_least = 1 if _BY_DOTS.match(language) else 2
  dotted = rf"(?:\.\d{{3}}){{{at_least},}}(?!\d)|(?:\.\d{{3}})+(?=,\d)"
  forms.append(rf"(?:{dotted})(?:,\d+)?")
  grouped = rf"(?!0)\d{{1,3}}(?:{'|'.join(forms)})"
  plain = r"\d+(?:[.,٫]\d+)?(?:[eE]\d{1,2}(?!\w))?|(?<!\w)\.\d+"
  number = f"(?:{grouped}|{plain})"
  signed = (
    # A minus, unless it subtracts from what is before it.
    rf"(?P<sign>(?<![\w)])(?<![\d)%] ){_MINUS})?"
    rf"{_CURRENCY}?(?P<minus>(?<={_CURRENCY}){_MINUS})?(?:"
    rf"(?P<scaled>(?:{number}{_SCALE})+{number}?)"
    rf"|(?<![/⁄])(?:(?P<whole>\d+)[{_SPACES}])?(?P<over>{number}){_SLASH}"
    rf"(?P<under>\d+)(?!\d|[.,]\d|{_SLASH}\d)"
    rf"|(?P<single>{number}))"
  )
  return _Patterns(*map(re.compile, (signed, number, grouped)))


def _without_markup(text: str) -> str:
  """Writes LaTeX, other scripts' digits, ½ and powers of ten plainly."""
  text = _OTHER_DIGIT.sub(lambda match: str(int(match[0])), text)
  for pattern, plain in _LATEX:
    text = pattern.sub(plain, text)
  # 2½ is 2 1⁄2.
  text = re.sub(rf"(?<=\d)(?={_VULGAR_FRACTION.pattern})", " ", text)
  text = _VULGAR_FRACTION.sub(lambda match: _compatible(match[0]), text)

  def exponent(match: re.Match) -> str:
    mantissa = "" if match[1] else "1"
    return f"{mantissa}e{match[2] or _compatible(match[3])}"

  text = _POWER_OF_TEN.sub(exponent, text)
  return _UNIT_EXPONENT.sub("", text)


def _compatible(characters: str) -> str:
  return unicodedata.normalize("NFKC", characters)


def _signed_value(match: re.Match, patterns: _Patterns) -> Decimal:
  if match["scaled"]:
    value = _scaled_value(match["scaled"], patterns)
  elif match["over"]:
    under = Decimal(match["under"])
    part = _value(match["over"], patterns) / under if under else Decimal("nan")
    value = Decimal(match["whole"] or 0) + part
  else:
    value = _value(match["single"], patterns)
  return -value if match["sign"] or match["minus"] else value


def _scaled_value(text: str, patterns: _Patterns) -> Decimal:
  """7万2千 is 7 * 10,000 + 2 * 1,000."""
  total = Decimal(0)
  for part in re.finditer(rf"({patterns.number.pattern})({_SCALE})?", text):
    value = _value(part[1], patterns)
    for character in (part[2] or "").strip():
      value *= _SCALES[character]
    total += value
  return total


def _value(text: str, patterns: _Patterns) -> Decimal:
  mantissa, _, exponent = text.lower().partition("e")
  separators = re.sub(r"\d", "", mantissa)
  integer, decimals = mantissa, ""
  if separators and separators[-1] in _DECIMAL_MARKS:
    is_grouped = patterns.grouped.fullmatch(mantissa)
    if not is_grouped or separators[-1] != separators[0]:
      integer, _, decimals = mantissa.rpartition(separators[-1])
  digits = re.sub(r"\D", "", integer)
  return Decimal(f"{digits}.{decimals}e{exponent or 0}")
