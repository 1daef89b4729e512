"""What mkdocs is told beside mkdocs.yml: pages from the repository's root, docstrings' markup."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
# Documents that a reader of the repository looks for in its root: there they are edited.
FROM_ROOT = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages from the root, their links into docs/ as they are from there."""
    for page, source in FROM_ROOT.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        for other, linked in FROM_ROOT.items():
            text = text.replace(f"]({linked})", f"]({other})")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings are written for help(), with reST's roles and `::`; a page needs neither."""
    html = re.sub(r":(?:class|func|meth|mod):(?=<code>|<a )", "", html)
    return html.replace("::</p>", ":</p>")
