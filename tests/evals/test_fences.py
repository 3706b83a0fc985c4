"""Programs out of chat answers: fences as models write them."""

from __future__ import annotations

import pytest

from calm_jax.evals.code_execution import extract_code

GOOD = "def f():\n  return 1\n"
OTHER = "def f():\n  return 2\n"
INDENTED = "   def f():\n     return 1\n"
IN_DOCSTRING = 'def f():\n  """E.\n\n  ```\n  f()\n  ```\n  """\n  return 1\n'
IN_STRING = "s = '''\n{}\n'''\n" + GOOD

# One block, however it is fenced.
ONE = {
  "prose around": f"Sure:\n```python\n{GOOD}```\nIt returns `1`.",
  "no label": f"```\n{GOOD}```",
  "tildes": f"Sure:\n\n~~~python\n{GOOD}~~~\n\nIt returns 1.",
  "four backticks": f"````python\n{GOOD}````\nIt returns 1.",
  "another label": f"```Python3\n{GOOD}```",
  "attributes": f'``` {{.python}}\n{GOOD}```\n```js id="a"\nclass A {{}}\n```',
  "in a list": f"1. Do:\n\n   ```python\n{INDENTED}   ```\n\n2. Done.",
  "on the line of a list": f"1. ```python\n{INDENTED}   ```\n\n2. Done.",
  "in a list, code to the left": f"1. ```python\n{GOOD}```\nDone.",
  "indented tildes": f"   ~~~py\n{INDENTED}   ~~~\n",
  "tabs": "\t```python\n\tdef f():\n\t  return 1\n\t```",
  "after prose": f"Here is `f`: ```python\n{GOOD}```\n",
  "within Markdown": f"````markdown\n# Answer\n```python\n{GOOD}```\n````",
  "not closed": f"Sure:\n```python\n{GOOD}",
  "closed further right": f"```python\n{GOOD}  ```\nIt returns 1.",
  "closed, and prose": f"```python\n{GOOD}``` It returns 1.\nReally.",
  "closed, and prose at once": f"```python\n{GOOD}```This returns 1.",
  "closed after code": "```python\ndef f():\n  return 1```\nIt returns 1.",
  "Windows' line ends": f"A:\n```python\n{GOOD}```\nB.".replace("\n", "\r\n"),
  "code first": f"{GOOD}```\nIt returns:\n```\n1\n```",
  "code first, closed after code": "def f():\n  return 1\n```\nSo it is.",
  "no fence": GOOD,
}
# Several blocks.
MANY = {
  "corrected": f"```python\n{OTHER}```\nNo:\n```python\n{GOOD}```\nRight.",
  "thoughts": f"<think>```\n{OTHER}```</think>\n```python\n{GOOD}```",
  "how to call it": f"```python\n{GOOD}```\nUsage:\n```python\nprint(f())\n```",
  "its output": f"```python\n{GOOD}```\nOutput:\n```\n1\n```",
  "tests": f"```py\n{GOOD}```\n```py\ndef test_f():\n  assert f()\n```",
  "a console": f"```python\n{GOOD}```\n```pycon\n>>> class A: pass\n```",
  "a shell": f"```bash\npip install f\n```\n```python\n{GOOD}```",
  "another language": f"```python\n{GOOD}```\n```ruby\ndef f() 1 end\n```",
  "one broke off": f"```python\n{GOOD}```\nOr:\n```python\ndef f():\n  ret",
  "only a call is closed": f"```python\nf()\n```\n```python\n{GOOD}",
  "one was not closed": f"```python\n{OTHER}\n```python\n{GOOD}```",
  "after the end": f"```python\n{GOOD}```\n[DONE]\n```python\n{OTHER}```",
}


@pytest.mark.parametrize("answer", (ONE | MANY).values(), ids=ONE | MANY)
def test_the_program(answer):
  assert extract_code(answer) == GOOD


@pytest.mark.parametrize(
  ("answer", "code"),
  [
    (f"```python\n{IN_DOCSTRING}```\nIt returns 1.", IN_DOCSTRING),
    (f"{IN_DOCSTRING}[DONE]", IN_DOCSTRING),
    (f"~~~\n{IN_STRING.format('```')}~~~\n", IN_STRING.format("```")),
    (f"```\n{IN_STRING.format('~~~')}```\n", IN_STRING.format("~~~")),
    ("```\nx = 1\n```\n```\nx = 2\n```\n```\nx = 3", "x = 2\n"),
    ("```\ndef test_x(x): pass\n```\n```\nx()\n```", "def test_x(x): pass\n"),
    ("```python f = lambda: 1```", "f = lambda: 1\n"),
    (f"# The answer\n{GOOD}```\nSo it is.", f"# The answer\n{GOOD}"),
    (f"# The answer\n\n```python\n{GOOD}```\n", GOOD),
    ("```python\n```", ""),
    ("```", ""),
  ],
)
def test_fences_in_code_and_code_without_functions(answer, code):
  assert extract_code(answer) == code


def test_a_wrong_answer_is_not_made_right():
  """The last version counts, not whichever is right."""
  assert extract_code(f"```\n{GOOD}```\nBetter:\n```\n{OTHER}```") == OTHER
  assert extract_code(f"{OTHER}```\nor\n```python\n{GOOD}```") == OTHER
