"""The report in a browser: where one is, at a phone's and a desktop's width."""

from __future__ import annotations

import os
import shutil

import made_runs
import pytest

from calm_jax import report

playwright = pytest.importorskip(
  "playwright.sync_api",
  reason="playwright is not installed: pip install -e .[browser]",
)
CHROMIUM = os.environ.get("CHROMIUM") or next(
  filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), ""
)
OFFLINE = (
  "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
  "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser():
  if not CHROMIUM:
    pytest.skip("no Chromium: put it on PATH, or its path in CHROMIUM")
  with playwright.sync_playwright() as started:
    yield started.chromium.launch(executable_path=CHROMIUM, args=OFFLINE)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  root = tmp_path_factory.mktemp("runs")
  codes = [f"l{i:02}_Latn" for i in range(60)]
  made_runs.languages(root / "ntl", codes=codes)
  made_runs.languages(root / "ntl" / "lora", "lora", codes=codes)
  folders = [made_runs.key_values(root / "kv"), root / "ntl"]
  return report.write(folders, root / "out")


@pytest.mark.parametrize("width", [360, 390, 1280])
def test_it_loads_alone_and_fits(browser, page, width):
  tab = browser.new_page(viewport={"width": width, "height": 800})
  said, asked = [], []
  tab.on("console", lambda message: said.append(message.text))
  tab.on("pageerror", lambda error: said.append(str(error)))
  tab.on("request", lambda request: asked.append(request.url))
  tab.goto(page.as_uri(), wait_until="load")
  assert said == []
  outside = [url for url in asked if not url.startswith("data:")]
  assert outside == [page.as_uri()]
  drawn = "Array.from(document.images, image => image.naturalWidth)"
  assert len(tab.evaluate(drawn)) == 8 and 0 not in tab.evaluate(drawn)
  # Wide tables scroll in themselves; the page never does.
  for opened in (False, True):
    tab.evaluate(
      "open => document.querySelectorAll('details')"
      ".forEach(one => one.open = open)",
      opened,
    )
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
  smallest = tab.evaluate(
    "Math.min(...Array.from(document.querySelectorAll('body *'), "
    "one => parseFloat(getComputedStyle(one).fontSize)))"
  )
  assert smallest >= 11
  tab.close()
