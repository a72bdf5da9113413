"""Nothing that a user names is run: no pickle, no eval, no code that comes with a model."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(
    path for floor in ("hijacklens", "probes", "analyses") for path in (ROOT / floor).rglob("*.py")
)
BANNED = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.loads",
    "shelve.open",
    "torch.load",
    "joblib.load",
    "pandas.read_pickle",
    "pd.read_pickle",
    "yaml.load",
    "subprocess.call",
    "subprocess.Popen",
}
IMPORTERS = {
    "hijacklens/__init__.py": "analyses.defence, for the public name `defend`",
    "analyses/commands/group.py": "a command of the list there",
    "analyses/commands/names.py": "our own modules, for the names that a shell completes",
    "analyses/reproduction/analysis.py": "the module of an analysis in the catalogue",
    "analyses/sweeps/file.py": "tomllib, or tomli on Python 3.10",
    "hijacklens/models/packaged.py": "a package of the list there",
    "hijacklens/results/result.py": "a module of ours, by a matched name in result.json",
    "hijacklens/workers/cluster.py": "ray",
}
"""Modules that import by name, and what."""


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def calls(path: Path) -> list[ast.Call]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_runs_or_unpickles_what_it_is_given(path):
    name = str(path.relative_to(ROOT))
    for call in calls(path):
        function = called(call)
        assert function not in BANNED, f"{name}:{call.lineno} calls {function}"
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert keywords.get("trust_remote_code") != "True", f"{name}:{call.lineno}"
        assert keywords.get("shell") != "True", f"{name}:{call.lineno}"
        assert keywords.get("allow_pickle") != "True", f"{name}:{call.lineno}"
        if function == "np.load":
            assert keywords.get("allow_pickle") == "False", f"{name}:{call.lineno}"
        if function.endswith("import_module"):
            assert name in IMPORTERS, f"{name}:{call.lineno} imports by name"


def test_code_of_a_model_is_run_only_when_asked_for():
    """Every parameter and option `trust_remote_code` is off by default."""
    seen = 0
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "trust_remote_code":
                assert node.value is not None
                assert ast.unparse(node.value) == "False"
                seen += 1
            if isinstance(node, ast.FunctionDef):
                named = node.args.kwonlyargs
                defaults = dict(zip((a.arg for a in named), node.args.kw_defaults, strict=True))
                default = defaults.get("trust_remote_code")
                if default is not None:
                    assert ast.unparse(default) == "False"
                    seen += 1
    assert seen >= 3  # load_model, ModelLoader, ModelEntry
