"""The kernels know jax and nothing else, and say what they are."""

import ast
import subprocess
import sys
from pathlib import Path

import kernels

ROOT = Path(kernels.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def test_only_jax_is_imported():
    allowed = {"jax", "numpy", "kernels"} | sys.stdlib_module_names  # numpy comes with jax
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in allowed, f"{file.relative_to(ROOT)} imports {name}"


def test_only_dispatch_asks_for_the_platform():
    for file in FILES:
        if file.name != "dispatch.py":
            assert "default_backend" not in file.read_text(), file.relative_to(ROOT)


def test_operations_import_without_the_zoo():
    """And without starting a backend."""
    program = (
        "import sys, kernels.linear_scan, kernels.selective_scan, kernels.linear_attention, kernels.delta_rule, "
        "kernels.sequence, kernels.nearest_code, kernels.sparse_attention, kernels.native_sparse_attention, "
        "kernels.moba, kernels.alternating_sparse_attention\n"
        "import jax._src.xla_bridge as bridge\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('zoo', 'flax', 'optax')]\n"
        "assert not bridge.backends_are_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT.parent)
