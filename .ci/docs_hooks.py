"""The files outside `docs/` that the site shows too, and the links between them."""

import pathlib
import posixpath
import re

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
    "tests/README.md": "tests.md",
}
"""Pages of the site, by the file of the checkout that each is made of."""

RESULTS = "benchmarks/results"
LOADED = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=["']?(?:https?:)?//[^>]*>""")
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def on_files(files, config):
    """Adds the pages from outside `docs/` and the files of results."""
    from mkdocs.structure.files import File  # tests read this module without mkdocs

    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for path in sorted((ROOT / RESULTS).glob("*.json")):
        files.append(File.generated(config, f"files/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns links to files of the checkout into links to files of the site; mkdocs warns of all others."""
    sources = {page: source for source, page in PAGES.items()}
    folder = posixpath.dirname(sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def turned(match: re.Match) -> str:
        before, target, anchor, after = match.groups(default="")
        if "://" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        uri = site_uri(path)
        if files.get_file_from_path(uri) is None:
            return match[0]
        return before + posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".") + anchor + after

    return LINK.sub(turned, markdown)


def on_post_page(output, page, config):
    """Raises if a page loads anything from another host."""
    if found := LOADED.search(output):
        raise ValueError(f"{page.file.src_uri} loads from another host: {found[0]}")
    return output


def site_uri(path: str) -> str:
    """The path on the site of a file of the checkout."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith(f"{RESULTS}/"):
        return f"files/{posixpath.basename(path)}"
    return posixpath.relpath(path, "docs")
