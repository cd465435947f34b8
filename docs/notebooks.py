"""The manual's builder runs each notebook, and makes it a page with what it showed.

A notebook is committed without outputs.  What it writes to stderr (progress, warnings with paths of
the machine) is not shown.
"""

import os
from typing import Any

import nbformat
from mkdocs.structure.files import File
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from traitlets.config import Config

LONGEST_CELL = 600  # seconds, on a busy machine


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add a page for each notebook, and its pictures."""
    for source in [file for file in files if file.src_uri.endswith(".ipynb")]:
        name = source.src_uri.removesuffix(".ipynb")
        text, pictures = _run(source.abs_src_path, os.path.basename(name))
        files.append(File.generated(config, f"{name}.md", content=text))
        for picture, data in pictures.items():
            place = os.path.join(os.path.dirname(name), picture)
            files.append(File.generated(config, place, content=data))
    return files


def _run(path: str, name: str) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a notebook that has run, and its pictures by the paths that it has there."""
    notebook = nbformat.read(path, as_version=4)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed prints that it has chosen it
    # the default, TCP, warns that it is not encrypted
    sockets = Config(KernelManager={"transport": "ipc"})
    NotebookClient(notebook, timeout=LONGEST_CELL, config=sockets).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                _unindent(output.get("data", {}))
    resources = {"unique_key": name, "output_files_dir": f"{name}_files"}
    text, made = MarkdownExporter().from_notebook_node(notebook, resources)
    return text, made["outputs"]


def _unindent(data: dict[str, str]) -> None:
    """Let no line of HTML begin as Markdown's code does, and none be empty, which would end it."""
    if "text/html" in data:
        lines = data["text/html"].splitlines()
        data["text/html"] = "\n".join(line.strip() for line in lines if line.strip())
