"""Finds the program in a chat answer: Python in a fence of Markdown.

Of several fences the last counts that holds Python, defines a function or a
class that is no test, and is closed. If none does, Python decides first, then
a definition, then the closing. So an example of how to call the function, its
output, or a version that broke off is not taken for the program.
"""

import re
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

# Prose may stand before ``` on its line. ~~~ is also an operator of Python.
_TICKS = re.compile(r"(.*?)(?<!`)(`{3,})([^`]*)")
_TILDES = re.compile(r"(\s*)(~{3,})(.*)")
_ONE_LINE = re.compile(r"[^`]*(`{3,})(?:(?:python3?|py)\s)?([^`]+)\1\s*")
_PYTHON = re.compile(r"[\s{.]*(?:(?:python|py)[\d.]*(?!\w)|$)", re.IGNORECASE)
_MARKDOWN = re.compile(r"\s*(?:markdown|md)\b", re.IGNORECASE)
# Tests of the program take no arguments; MBPP asks for functions test_... too.
_DEFINITION = re.compile(
  r"^(?:async\s+)?def\s+(?!(?:test\w*|main)\s*\(\s*\))"
  r"|^class\s+(?!Test)|^\w+\s*=\s*lambda\b",
  re.MULTILINE,
)
_CODE_FIRST = re.compile(
  r"(?:\s*#.*\n)*\s*(?:(?:def|class|import|from|async)\s|@\w|\w+\s*=)"
)
_END_OF_CODE = re.compile(
  r"^(?:`{3,}|~{3,})|^([^`\n]*[^`\s])[ \t]*`{3,}[ \t]*$", re.MULTILINE
)


class _Block(NamedTuple):
  label: str
  code: str
  is_closed: bool


def find_program(text: str) -> str:
  """Returns the program in an answer; all of the answer if it has no fence.

  An answer that begins with code ends at its first fence.
  """
  if _CODE_FIRST.match(text):
    end = _END_OF_CODE.search(text)
    if end is None:
      return text
    return text[: end.end(1) if end[1] else end.start()]

  def merit(block: _Block) -> tuple[bool, bool, bool]:
    is_python = _PYTHON.match(block.label) is not None
    defines = _DEFINITION.search(block.code) is not None
    return is_python, defines, block.is_closed

  blocks = list(_blocks(text))
  # The last of equals: max takes the first.
  return max(reversed(blocks), key=merit).code if blocks else text


def _blocks(text: str) -> Iterator[_Block]:
  """Yields the fences of a text; of a fence of Markdown those within it."""
  lines = text.split("\n")
  at = 0
  while at < len(lines):
    line, at = lines[at], at + 1
    if one_line := _ONE_LINE.fullmatch(line):
      yield _Block("", one_line[2].strip() + "\n", True)
      continue
    opening = _TICKS.fullmatch(line) or _TILDES.fullmatch(line)
    if not opening:
      continue
    before, fence, label = opening.groups()
    inside, used, is_closed = _read_block(lines[at:], len(before), fence)
    at += used
    if before.isspace():
      indent = re.compile(rf"[ \t]{{0,{len(before)}}}")
      inside = [indent.sub("", line, count=1) for line in inside]
    code = "".join(line + "\n" for line in inside)
    if _MARKDOWN.match(label):
      yield from _blocks(code)
    else:
      yield _Block(label, _unindent(code), is_closed)


def _read_block(
  lines: list[str], column: int, fence: str
) -> tuple[list[str], int, bool]:
  """Reads the lines after an opening fence, which stands at `column`.

  A fence further right than that belongs to the code, such as to a docstring;
  but where no other closes the block, the last of these does.

  Returns the lines of the block, how many were read, and whether it is closed.
  """
  closing = re.compile(rf"(\s*){fence}{fence[0]}*(.*)")
  closing_after_code = re.compile(r"([^`]*[^`\s])\s*`{3,}\s*")
  further_right = None
  for i, line in enumerate(lines):
    if match := closing.fullmatch(line):
      indent, rest = match.groups()
      if len(indent) > column:
        if not rest.strip():
          further_right = i
      elif len(rest.split()) == 1 or (rest.strip() and _PYTHON.match(rest)):
        return lines[:i], i, False  # The label of the next block.
      else:
        return lines[:i], i + 1, True
    elif fence[0] == "`" and (match := closing_after_code.fullmatch(line)):
      return [*lines[:i], match[1]], i + 1, True
  if further_right is not None:
    return lines[:further_right], further_right + 1, True
  end = len(lines)
  while end and not lines[end - 1]:
    end -= 1
  return lines[:end], len(lines), False


def _unindent(code: str) -> str:
  return textwrap.dedent(code) if re.match(r"\n*[ \t]", code) else code
