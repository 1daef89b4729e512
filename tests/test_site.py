"""The documents: the site builds without a warning, without the network; links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import warpstep

ROOT = Path(__file__).parent.parent
IN_ROOT = sorted(ROOT.glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    for needed in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.not_quick
def test_the_site_needs_no_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        fetched = re.findall(r"<(?:script|link|img|source|iframe)\b[^>]*>", page.read_text())
        assert fetched
        for tag in fetched:
            assert not re.search(r'(?:src|srcset|href)="(?:https?:)?//', tag), (page, tag)


@pytest.mark.not_quick
def test_the_api_has_every_public_name(site):
    text = "".join(page.read_text() for page in site.glob("api/*/index.html"))
    names = set(warpstep.__all__) - {"__version__", "compat", "functional", "torch_ops"}
    assert names >= {"AdamW", "enable", "status"}
    for name in names:
        assert f'id="warpstep.{name}"' in text, name
    for module in (warpstep.compat, warpstep.functional):
        for name in module.__all__:
            assert f'id="{module.__name__}.{name}"' in text, name
    for method in ("clip_grad_norm_", "swap_ema", "statistics", "state_bytes"):
        assert f".{method}" in text, method
    assert not re.search(r":(class|func|meth):", text)  # reST's roles


@pytest.mark.parametrize("path", IN_ROOT, ids=lambda path: path.name)
def test_links_of_the_roots_documents_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", path.read_text())
    for link in filter(None, (inline or attribute for inline, attribute in links)):
        if not link.startswith("http"):
            assert (ROOT / link.partition("#")[0]).exists(), link


def test_readme_fits_on_a_page():
    """Beside its tables: a stranger decides in half a minute."""
    lines = (ROOT / "README.md").read_text().splitlines()
    words = [line.split() for line in lines if not line.startswith(("|", "<!--"))]
    assert sum(map(len, words)) <= 950
