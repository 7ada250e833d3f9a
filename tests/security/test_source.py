"""The code of this repository names nothing that would run what a file holds; the two places that are meant to run code are listed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDERS = ("common", "sft", "reward_model", "rlhf", "examples")
ALLOWED = {
    # A reward function is a Python file or module that the user's own config names.
    ("rlhf/reward_pipelines/function.py", "exec"),
    ("rlhf/reward_pipelines/function.py", "compile"),
    ("rlhf/reward_pipelines/function.py", "importlib.import_module"),
    # Between the processes of one training, which meet on loopback.
    ("common/launch/runtime.py", "distributed.all_gather_object"),
    ("common/launch/runtime.py", "distributed.broadcast_object_list"),
    ("common/gathered.py", "distributed.all_gather_object"),
}
FORBIDDEN = frozenset(
    [
        "eval",
        "exec",
        "compile",
        "__import__",
        "importlib.import_module",
        "os.system",
        "os.popen",
        "pickle.load",
        "pickle.loads",
        "pickle.Unpickler",
        "dill.load",
        "dill.loads",
        "cloudpickle.load",
        "cloudpickle.loads",
        "joblib.load",
        "marshal.load",
        "marshal.loads",
        "shelve.open",
        "torch.hub.load",
        "torch.jit.load",
        "yaml.load",
        "yaml.load_all",
        "yaml.full_load",
        "yaml.unsafe_load",
        "pandas.read_pickle",
        "pd.read_pickle",
    ]
)
ONLY_WITH = {"torch.load": ("weights_only", True)}
NEVER_WITH = {"shell": True, "allow_pickle": True, "weights_only": False, "trust_remote_code": True}


def dotted(node: ast.expr) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def dangers(text: str) -> Iterator[str]:
    """Calls in Python text that could run what they are given."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        given = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
        if name in FORBIDDEN or name.endswith(("_gather_object", "_object_list", "_object")):
            yield name
        if name in ONLY_WITH and given.get(ONLY_WITH[name][0]) is not ONLY_WITH[name][1]:
            yield name
        yield from (f"{name}({word}={value})" for word, value in NEVER_WITH.items() if given.get(word) is value)


def test_nothing_here_runs_what_a_file_holds(root: Path) -> None:
    found = {
        (path.relative_to(root).as_posix(), danger)
        for folder in FOLDERS
        for path in sorted((root / folder).rglob("*.py"))
        for danger in dangers(path.read_text(encoding="utf-8"))
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    "text",
    [
        "pickle.loads(x)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "distributed.broadcast_object_list(parts)",
    ],
)
def test_the_search_finds(text: str) -> None:
    assert list(dangers(text))
    assert not list(dangers("model.eval(); torch.load(path, weights_only=True); np.load(path); subprocess.run(words)"))
