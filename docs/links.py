"""What the manual's builder does with links that leave ``docs/``.

Pages are read in the repository as well as on the site, where only ``docs/`` exists.  A few texts
of other folders become pages of the site, as notebooks do; a link to any other file becomes that
file's path.
"""

import os
import re
from typing import Any

from mkdocs.structure.files import File

# texts that lie beside what they describe, and the pages that they become
BROUGHT = {
    "integrations/verl/recipes/README.md": "verl_recipes.md",
    "benchmarks/notes.md": "how_it_is_measured.md",
    "benchmarks/PEERS.md": "peers.md",
}
LINK = re.compile(r"\[([^\]]*)\]\((?![a-z]+:)([^)#\s]+)(#[^)\s]*)?\)")  # not https:


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add the texts of other folders."""
    root = os.path.dirname(config.config_file_path)
    for source, page in BROUGHT.items():
        files.append(File.generated(config, page, abs_src_path=os.path.join(root, source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Point the links of a page that leave ``docs/`` to where their targets are on the site."""
    uri = page.file.src_uri
    homes = {made: source for source, made in BROUGHT.items()}
    home = os.path.dirname(homes.get(uri, f"docs/{uri}"))

    def placed(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        path = os.path.normpath(os.path.join(home, target))
        if path in BROUGHT:
            path = f"docs/{BROUGHT[path]}"
        if path.startswith("docs/"):
            page = re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
            to = os.path.relpath(page, os.path.dirname(uri) or ".")
            return f"[{text}]({to}{anchor})"
        return f"{text} (`{path}`)" if f"`{path}`" != text else text

    return LINK.sub(placed, markdown)
