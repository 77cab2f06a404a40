"""What docs/*.md reach outside docs/: pictures of bench/ become part of the site, other links become plain text."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pictures of bench/."""
    for path in sorted((ROOT / "bench").rglob("*.png")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`![text](../bench/x.png)` -> the picture on the site; `[text](../path)` -> `text` (`path`)."""
    markdown = re.sub(r"(!\[[^\]]*\])\(\.\./(bench/[^)]+\.png)\)", r"\1(\2)", markdown)
    return re.sub(r"(?<!!)\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)", r"\1 (`\2`)", markdown)
