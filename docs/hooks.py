"""Hook of mkdocs: what the pages link to outside of docs/ is a part of the site, too.

The same links have to lead somewhere on a forge, where they are relative to a file of the
repository, and in the site, which has no other source than the repository. So a file of the
repository has one place in the site: docs/x is x, and any other x is x. A document (.md) outside of
docs/ is a page, source code is a page that shows it, and other files, such as pictures, are copied.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Documents of the repository that are in the navigation.
DOCUMENTS = ("CONTRIBUTING.md", "CHANGELOG.md")
LANGUAGES = {".py": "python", ".sh": "bash", ".toml": "toml", ".yml": "yaml", ".cff": "yaml"}
# [text](target) and ![text](target), or a fence of code, in which nothing is a link.
FENCE = r"^(?P<fence>`{3,}).*?^(?P=fence)`*$"
LINK = re.compile(
    rf"{FENCE}|(?P<before>\]\()(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)",
    flags=re.MULTILINE | re.DOTALL,
)
# Code with a pipe that is escaped, as a forge needs it in a table; Python-Markdown shows both.
ESCAPED = re.compile(r"`[^`\n]*\\\|[^`\n]*`")


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside of docs/ that pages link to, and those that these link to."""
    documents = [*DOCUMENTS, *(f"docs/{x.src_uri}" for x in files.documentation_pages())]
    seen = set(documents)
    for document in documents:  # which grows
        if not document.startswith("docs/"):
            files.append(_file(document, config))
        if document.endswith(".md"):
            linked = set(links(document, (ROOT / document).read_text("utf-8"))) - seen
            seen |= linked
            documents += sorted(x for x in linked if not x.startswith("docs/"))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The links of a page as links within the site."""
    uri = page.file.src_uri
    if Path(uri).with_suffix("").suffix in LANGUAGES:
        page.meta["search"] = {"exclude": True}
        return markdown
    generated = page.file.generated_by is not None
    markdown = ESCAPED.sub(lambda code: code[0].replace("\\|", "|"), markdown)
    return in_site(uri if generated else f"docs/{uri}", markdown)


def links(document: str, markdown: str) -> Iterator[str]:
    """The files of the repository that a document of it links to."""
    found: list[str] = []

    def collect(path: str) -> str:
        found.append(path)
        return ""

    _replaced(document, markdown, collect)
    return iter(found)


def in_site(document: str, markdown: str) -> str:
    """The text of a document with its links as they have to be in the site."""
    folder = posixpath.dirname(_place(document)) or "."
    return _replaced(document, markdown, lambda path: posixpath.relpath(_place(path), folder))


def _replaced(document: str, markdown: str, change: Callable[[str], str]) -> str:
    """The text with each link to a file of the repository changed."""

    def replace(match: re.Match[str]) -> str:
        target = match["target"]
        if target is None or "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(document), target))
        if not (ROOT / path).is_file():
            raise PluginError(f"{document}: expected a link to a file, got {target}")
        return f"{match['before']}{change(path)}{match['anchor'] or ''})"

    return LINK.sub(replace, markdown)


def _place(path: str) -> str:
    """Where a file of the repository is in the site's sources."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == "README.md":  # the first page has its place
        return "index.md"
    return f"{path}.md" if Path(path).suffix in LANGUAGES else path


def _file(path: str, config: Any) -> File:
    """The file of the site that stands for one of the repository."""
    language = LANGUAGES.get(Path(path).suffix)
    if language is None:
        return File.generated(config, _place(path), abs_src_path=str(ROOT / path))
    text = (ROOT / path).read_text("utf-8").rstrip()
    page = f"---\nhide: [navigation, toc]\n---\n\n# {path}\n\n~~~~{language}\n{text}\n~~~~\n"
    return File.generated(config, _place(path), content=page)
