"""Who may import whom: the package's layers, checked on the source itself.

A rule names a module or a package and covers everything below it; the longest rule that fits a module counts. To
let a layer use another, add it here, and ask first whether the arrow still points down.
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "eagle3_ray"

# module or package -> modules or packages of ours that it may import ("" is eagle3_ray itself: its version).
LAYERS: dict[str, set[str]] = {
    "": set(),
    "__main__": {"cli"},
    "cli": {"", "config", "verbs", "schema", "flags", "settings_file", "errors", "console", "stopping"},
    "flags": {"verbs", "schema", "storage", "errors"},
    "settings_file": {"schema", "storage", "errors"},
    "config": {"schema", "storage"},
    "verbs": {"config", "schema", "storage"},
    "schema": {"storage"},
    "storage": {"errors"},
    "background": set(),
    "console": set(),
    "stopping": set(),
    "machine": set(),
    "errors": set(),
    "versions": {""},
    "intervals": set(),
    "metrics": {"intervals"},
    "loggers": {"metrics", "storage", "errors"},
    "speculators_format": {"errors"},
    "data": {"data", "storage", "errors"},
    "model": {"model", "config", "storage", "errors"},
    "training": {
        *("training", "model", "data", "config", "storage", "errors"),
        *("loggers", "metrics", "speculators_format", "versions", "background", "console", "machine"),
    },
    "training.run_folder": {"storage", "errors", "training.stagnation"},
    "training.metrics_file": {"storage", "errors"},
    "training.plan_file": {"storage", "errors"},
    "generation": {"generation", "model", "data", "verbs", "storage", "errors"},
    "evaluation": {
        *("evaluation", "generation", "model", "data", "training.ready", "training.step"),
        *("speculators_format", "intervals", "storage", "errors"),
    },
    "demo": {"demo", "errors"},
    "export": {
        *("model", "data.vocab", "training.checkpoint", "training.run_folder"),
        *("speculators_format", "storage", "errors"),
    },
    "report": {
        *("", "report", "metrics", "settings_file", "storage", "errors"),
        *("training.metrics_file", "training.plan_file", "training.run_folder"),
    },
    "jobs": {
        *("", "jobs", "training", "generation", "evaluation", "export", "report", "demo", "model", "data"),
        *(
            "config",
            "verbs",
            "errors",
            "loggers",
            "metrics",
            "settings_file",
            "speculators_format",
            "storage",
            "versions",
        ),
        *("background", "console", "machine", "stopping"),
    },
}

# library -> where it may be imported; nowhere else. "jobs" stands for every module in it.
LIBRARIES: dict[str, set[str]] = {
    "ray": {
        *("data.index", "data.pipeline", "jobs", "machine"),
        *(
            "training.channel",
            "training.job",
            "training.loop",
            "training.preemption",
            "training.progress",
            "training.rank",
        ),
        *("training.saver", "training.stream", "training.telemetry"),
    },
    "torch.distributed.fsdp": {"training.sharding"},
    "transformers": {"model", "generation", "evaluation", "demo", "jobs"},
    "wandb": {"loggers"},
    "trackio": {"loggers"},
    "torch.utils.tensorboard": {"loggers"},
    "tyro": {"cli"},
    "yaml": {"settings_file"},
    "pyarrow.fs": {"storage"},
    "matplotlib": {"report.plots"},
}

HEAVY = {"torch", "ray", "transformers", "numpy", "pandas", "pyarrow", "safetensors"}
NAMES_THAT_SAY_NOTHING = {"utils", "util", "common", "helpers", "helper", "base", "misc", "tools"}
# Functions that see every error, one handler each, and swallow none. A thread of the first two hands it to the one that
# waits for it, which raises it; the third looks for Ray's bare Exception, and raises it or one of its own.
SEES_EVERY_ERROR = {("background", "run"), ("data.pipeline", "produce"), ("jobs.cluster", "_start_local")}


def name_of(path: Path) -> str:
    """`data.index` for eagle3_ray/data/index.py, `data` for its package, `` for eagle3_ray itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def covers(rule: str, module: str) -> bool:
    return module == rule or (rule != "" and module.startswith(rule + "."))


def imports_of(module: str) -> Iterator[str]:
    """Full dotted names of all a module imports, inside functions too: `from a import b` gives `a.b`."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports of ours are written out, not relative"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports_of(module: str) -> set[str]:
    """The modules of ours that a module imports: `data.index` for `from eagle3_ray.data.index import build_index`."""
    found = set()
    for name in imports_of(module):
        head, _, rest = name.partition(".")
        if head == PACKAGE.name:
            while rest not in MODULES:  # the last part is a name in the module, not a module
                rest = rest.rpartition(".")[0]
            found.add(rest)
    return found


def rule_for(module: str) -> str:
    fitting = [rule for rule in LAYERS if covers(rule, module)]
    assert fitting, f"{module}: no rule in LAYERS says what it may import"
    return max(fitting, key=len)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    allowed = LAYERS[rule_for(module)]
    stray = {name for name in own_imports_of(module) if not any(covers(rule, name) for rule in allowed)}
    assert not stray, f"{module} may import {sorted(allowed)}, not {sorted(stray)}"


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_stays_where_it_belongs(library: str) -> None:
    users = {module for module in MODULES if any(covers(library, name) for name in imports_of(module))}
    stray = {user for user in users if not any(covers(place, user) for place in LIBRARIES[library])}
    assert not stray, f"{library} belongs in {sorted(LIBRARIES[library])}, not in {sorted(stray)}"
    unused = {place for place in LIBRARIES[library] if not any(covers(place, user) for user in users)}
    assert not unused, f"{library} is no longer imported in {sorted(unused)}: take them off the table"


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["train", "--data-path", "s3://bucket", "--lr", "x"]]
)
def test_help_and_mistakes_are_answered_without_a_heavy_library(words: list[str]) -> None:
    program = (
        "import contextlib, sys\nfrom eagle3_ray.cli import main\n"
        f"with contextlib.suppress(SystemExit): main({words!r})\n"
        f"found = sorted({HEAVY!r} & set(sys.modules))\n"
        "sys.exit(f'imported: {found}' if found else None)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_train_starts_ray_before_it_imports_what_takes_seconds() -> None:
    program = (
        "import sys, eagle3_ray.jobs.train\n"
        "sys.exit(str(sorted({'torch', 'transformers', 'pandas', 'ray.data', 'ray.train'} & set(sys.modules)) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("module", ["training.loop", "training.stream"])
def test_workers_and_ray_trains_controller_start_without_transformers(module: str) -> None:
    program = f"import sys, eagle3_ray.{module}\nsys.exit('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "it is imported, which takes every process seconds"


def test_a_report_is_made_without_torch_and_ray() -> None:
    program = (
        "import sys, eagle3_ray.jobs.report, eagle3_ray.report.page\n"
        "sys.exit(str(sorted({'torch', 'ray', 'transformers', 'pandas'} & set(sys.modules)) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("module", ["step", "tokens"])
def test_a_benchmark_of_the_step_needs_torch_and_numpy_alone(module: str) -> None:
    """So that it runs on any borrowed GPU."""
    absent = ("ray", "transformers", "pydantic", "safetensors", "huggingface_hub", "pyarrow", "pandas", "yaml", "tyro")
    program = f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\nimport tests.benchmarks.{module}"
    done = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_module_imports_itself_by_a_detour() -> None:
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in finished:
            for name in sorted(own_imports_of(module)):
                visit(name, (*path, module))
            finished.add(module)

    for module in MODULES:
        visit(module, ())


def test_every_rule_is_about_a_module_there_is() -> None:
    named = {*LAYERS, *(name for allowed in LAYERS.values() for name in allowed)}
    assert named <= set(MODULES), f"take off the table: {sorted(named - set(MODULES))}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_says_what_it_is_for(module: str) -> None:
    assert ast.get_docstring(tree_of(module)), f"{MODULES[module]}: has no docstring"


def test_no_module_is_named_for_nothing() -> None:
    parts = {part for module in MODULES for part in module.split(".")}
    assert not parts & NAMES_THAT_SAY_NOTHING


def is_call_of(node: ast.AST, function: str, num_arguments: int) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == function
        and len(node.args) == num_arguments
    )


@pytest.mark.parametrize("module", MODULES)
def test_no_attribute_is_read_with_a_default(module: str) -> None:
    lines = [node.lineno for node in ast.walk(tree_of(module)) if is_call_of(node, "getattr", 3)]  # type: ignore[attr-defined]
    assert not lines, f"{MODULES[module]}: getattr with a default hides a misspelt name, lines {lines}"


def nodes_with_functions(node: ast.AST, function: str = "") -> Iterator[tuple[ast.AST, str]]:
    """Everything below a node, with the name of the function that it is directly in."""
    for child in ast.iter_child_nodes(node):
        yield child, function
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from nodes_with_functions(child, child.name if is_function else function)  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", MODULES)
def test_no_handler_catches_everything(module: str) -> None:
    found = []
    for node, function in nodes_with_functions(tree_of(module)):
        if isinstance(node, ast.ExceptHandler):
            caught = set() if node.type is None else {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
            if node.type is None or caught & {"Exception", "BaseException"}:
                found.append((module, function))
    assert sorted(found) == sorted(known for known in SEES_EVERY_ERROR if known[0] == module), MODULES[module]
