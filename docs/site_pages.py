"""The pages of `make docs`: README.md, docs/, the docstrings of each folder.

mkdocs calls the functions that begin with `on_`. Pages are written as GitHub
shows them, so their links may lead out of docs/; here they become links between
the pages of the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGE = "calm_jax"
# Files of the repository that are pages of another name, or from outside docs/.
PAGES = {
  "README.md": "index.md",
  "CONTRIBUTING.md": "contributing.md",
  "CHANGELOG.md": "changelog.md",
  "docs/README.md": "pages.md",
}
# The methods of LanguageModel are functions of several folders.
METHODS = (
  *("generation.text.generate", "generation.text.stream"),
  *("generation.text.score", "generation.attention_maps.cross_attention"),
  *("composition.checkpoint.save", "composition.checkpoint.push_to_hub"),
  *("composition.transformers_folder.export_hf", "composition.model.Model.add"),
  "composition.model.Model.drop",
)
FUNCTIONS = (
  *("language_model.load_model", "language_model.load_composed"),
  *("composition.model.compose", "composition.model.join_compositions"),
  *("language_model.LanguageModel", "core.errors.InputError"),
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
  """Sets the navigation: the table of docs/README.md, then the code."""
  nav = [{"Start": "index.md"}, {"All pages": "pages.md"}]
  index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
  for title, target in re.findall(
    r"^\| (?:\*\*(.+)\*\*|\[.*?\]\((.+?)\)) \|", index, re.M
  ):
    if title:
      nav.append({title: []})
    else:
      [pages] = nav[-1].values()
      pages.append(_site_path(posixpath.normpath(f"docs/{target}")))
  code = [f"code/{folder}.md" for folder in _folders()]
  nav.append({"Code": ["code/api.md", *code, "changelog.md"]})
  config.nav = nav
  return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds the pages that are no file of docs/, or one of another name."""
  files.remove(files.src_uris["README.md"])
  made = {
    page: (ROOT / source).read_text(encoding="utf-8")
    for source, page in PAGES.items()
  }
  made["code/api.md"] = _api()
  made |= {f"code/{folder}.md": _docstrings(folder) for folder in _folders()}
  for page, text in made.items():
    files.append(File.generated(config, page, content=text))
  return files


def on_page_markdown(
  markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
  """Lets links to files of the repository lead to their pages."""
  here = page.file.src_uri
  sources = {made: source for source, made in PAGES.items()}
  folder = posixpath.dirname(sources.get(here, f"docs/{here}"))

  def lead(match: re.Match) -> str:
    path, hash_, fragment = match[1].partition("#")
    if not path or "://" in path:
      return match[0]
    path = _site_path(posixpath.normpath(posixpath.join(folder, path)))
    path, _, module = path.partition("#")
    path = posixpath.relpath(path, posixpath.dirname(here) or ".")
    return f"]({path}{hash_ or '#' * bool(module)}{fragment or module})"

  return re.sub(r"\]\(([^)\s]+)\)", lead, markdown)


def _site_path(path: str) -> str:
  """The page of a file of the repository; of a module with its fragment."""
  if path in PAGES:
    return PAGES[path]
  if path.startswith(f"{PACKAGE}/") and path.endswith(".py"):
    name = path.removesuffix(".py").replace("/", ".")
    return f"code/{_page_of(name)}.md#{name}"
  return path.removeprefix("docs/")


def _folders() -> list[str]:
  """Packages of calm_jax by name, "commands" for its own modules first."""
  inner = sorted((ROOT / PACKAGE).glob("*/__init__.py"))
  return ["commands", *(path.parent.name for path in inner)]


def _page_of(module: str) -> str:
  parts = module.split(".")
  return parts[1] if len(parts) > 2 else "commands"


def _docstrings(folder: str) -> str:
  """A page of all modules of a folder."""
  inside = "*.py" if folder == "commands" else f"{folder}/**/*.py"
  paths = sorted((ROOT / PACKAGE).glob(inside))
  names = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in paths
    if path.name != "__init__.py"
  ]
  title = PACKAGE if folder == "commands" else f"{PACKAGE}.{folder}"
  return "\n\n".join([f"# {title}", *(f"::: {name}" for name in names)]) + "\n"


def _api() -> str:
  """A page of what `import calm_jax` gives."""
  blocks = [
    f"::: {PACKAGE}.{name}\n    options:\n      skip_local_inventory: true\n"
    "      show_root_full_path: false"
    for name in (*FUNCTIONS, *METHODS)
  ]
  blocks.insert(len(FUNCTIONS), "The methods below are LanguageModel's too.")
  intro = "What `import calm_jax` gives, and the methods of a model."
  return "\n\n".join(["# Python", intro, *blocks]) + "\n"
