"""Which slips in the code would the tests notice? Draws random mutants and runs the tests on each: `make mutants`.

Cosmic Ray finds and makes the mutants, and keeps the session; mutants.toml says of what, and which tests run. Another
run with the same seed goes on where the last one stopped.
"""

import argparse
import ast
import functools
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from cosmic_ray.commands import init
from cosmic_ray.modules import filter_paths, find_modules
from cosmic_ray.mutating import mutate_and_test, mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.testing import run_tests
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkItem, WorkResult

ROOT = Path(__file__).parents[1]
CONFIG = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())
COMPILED = ".jax_cache"  # by tests/conftest.py
Position = tuple[int, int]  # line from 1, column from 0


def main() -> None:
    """Prints a line for each mutant, and writes the diffs of those that no test noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="mutants; more of the same seed are these and others")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--again", action="store_true", help="test those again that no test noticed")
    parser.add_argument("--unchecked", action="store_true", help="trust that the tests pass where nothing is mutated")
    options = parser.parse_args()
    folder = ROOT / "build" / "mutants" / str(options.seed)
    code, tree = folder / "code", folder / "tree"  # as it was when the mutants were drawn; what is mutated and tested
    if not code.exists():
        copy_files(code)
    copy_files(tree, code)
    os.chdir(tree)
    with use_db(str(folder / "session.sqlite")) as db:
        mutants = draw(db, options.seed, options.count)
        results = dict(db.results)
        waiting = [
            mutant
            for mutant in mutants
            if mutant.job_id not in results or (options.again and not results[mutant.job_id].is_killed)
        ]
        commands = {command_for(mutant) for mutant in waiting}
        # Where a row names a test that is not there, pytest fails, which would pass for noticing.
        check_that_tests_pass({f"{command} --collect-only" for command in commands} if options.unchecked else commands)
        for i, mutant in enumerate(waiting, 1):
            results[mutant.job_id] = mutate_and_test(mutant.mutations, command_for(mutant), CONFIG["timeout"])
            db.set_result(mutant.job_id, results[mutant.job_id])
            print(f"{i}/{len(waiting)} {outcome(results[mutant.job_id])}: {describe(mutant)}", flush=True)
    unnoticed = [mutant for mutant in mutants if not results[mutant.job_id].is_killed]
    survivors = folder / "survivors.diff"
    survivors.write_text(
        "".join(f"{describe(mutant)}\n{results[mutant.job_id].diff}\n\n" for mutant in sorted(unnoticed, key=_key))
    )
    timeouts = sum(outcome(results[mutant.job_id]) == "ran too long" for mutant in mutants)
    print(
        f"{len(mutants) - len(unnoticed)} of {len(mutants)} noticed, {timeouts} of them by running longer than "
        f"{CONFIG['timeout']} s; the others are in {survivors}"
    )


def copy_files(target: Path, code: Path | None = None) -> None:
    """Makes `target` a copy of the files that git does not ignore, with the mutated packages from `code` if given.

    Compiled programs in `target` stay; at first they are those of the clone.
    """
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    if code and (ROOT / COMPILED).exists() and not (target / COMPILED).exists():
        shutil.copytree(ROOT / COMPILED, target / COMPILED)
    for old in target.glob("*"):
        if old.name != COMPILED:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    for name in filter(None, names):
        package = name.split("/")[0] in CONFIG["packages"]
        source = (code if code and package else ROOT) / name
        if source.exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)


def draw(db: WorkDB, seed: int, count: int) -> list[WorkItem]:
    """The first `count` mutants of a seed: each a place in the code, all equally likely, and one change to it."""
    if not db.num_work_items:
        modules = find_modules(map(Path, CONFIG["modules"]))
        init(sorted(filter_paths(modules, CONFIG["excluded-modules"])), db, {})
    excluded = re.compile("|".join(CONFIG["excluded-operators"]))
    places: dict[tuple[Path, Position, Position], list[WorkItem]] = defaultdict(list)
    for item in db.work_items:
        (mutation,) = item.mutations
        if not excluded.fullmatch(mutation.operator_name):
            places[mutation.module_path, mutation.start_pos, mutation.end_pos].append(item)
    random_state = random.Random(seed)
    order = sorted(places)
    random_state.shuffle(order)
    drawn: list[WorkItem] = []
    for place in order:
        item = random_state.choice(sorted(places[place], key=_key))
        if len(drawn) < count and not is_text(*place) and is_python(item.mutations[0]):
            drawn.append(item)
    return drawn


def _key(item: WorkItem) -> tuple[Path, Position, str, int]:
    (mutation,) = item.mutations
    return mutation.module_path, mutation.start_pos, mutation.operator_name, mutation.occurrence


def is_text(path: Path, begin: Position, end: Position) -> bool:
    """Whether a place of a module lies in what is only read by people or type checkers."""
    line = path.read_text().splitlines()[begin[0] - 1]
    alone = line[begin[1] :].startswith("*,")  # among parameters, no operator
    return alone or any(first <= begin and end <= last for first, last in _texts(path))


@functools.cache
def _texts(path: Path) -> list[tuple[Position, Position]]:
    return list(_find_texts(ast.parse(path.read_text())))


def _find_texts(module: ast.Module) -> Iterator[tuple[Position, Position]]:
    """Errors and other formatted strings, annotations, protocols, `__repr__`, and decorators that only save time."""
    for node in ast.walk(module):
        texts: list[ast.AST | None] = []
        if isinstance(node, ast.Raise | ast.JoinedStr):
            texts = [node]
        elif isinstance(node, ast.arg | ast.AnnAssign):
            texts = [node.annotation]
        elif isinstance(node, ast.ClassDef):
            texts = [node] if any(ast.unparse(base).startswith("Protocol") for base in node.bases) else []
        elif isinstance(node, ast.FunctionDef):
            caches = [x for x in node.decorator_list if "cache" in ast.unparse(x) or "jit" in ast.unparse(x)]
            texts = [node] if node.name in ("__repr__", "__str__") else [node.returns, *caches]
        for text in filter(None, texts):
            # A decorator's place begins with its @.
            first = (text.lineno, 0 if text in getattr(node, "decorator_list", []) else text.col_offset)
            # One that is removed ends with its line.
            last = (text.end_lineno + 1, 0) if first[1] == 0 else (text.end_lineno, text.end_col_offset)
            yield first, last


def is_python(mutation: MutationSpec) -> bool:
    """Whether what a mutation makes can be compiled: `def f(*, x)` is no product."""
    operator = get_operator(mutation.operator_name)(**mutation.operator_args)
    try:
        compile(mutate_code(mutation.module_path.read_text(), operator, mutation.occurrence), "mutant", "exec")
    except SyntaxError:
        return False
    return True


def command_for(mutant: WorkItem) -> str:
    """What tests a mutant: the row of the longest path that its module lies in."""
    module = str(mutant.mutations[0].module_path)
    row = max((path for path in CONFIG["tests"] if module.startswith(path)), key=len)
    tests = [f"tests/{name}" for name in CONFIG["tests"][row]]
    return shlex.join([sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-m", "not exhaustive", *tests])


def check_that_tests_pass(commands: set[str]) -> None:
    """Ends the program if tests fail where nothing is mutated."""
    for i, command in enumerate(sorted(commands), 1):
        print(f"without a mutant, {i}/{len(commands)}: {command}", flush=True)
        result, output = run_tests(command, CONFIG["timeout"])
        if result != TestOutcome.SURVIVED:
            sys.exit(f"{output}\nThe tests have to pass, and in less than {CONFIG['timeout']} s.")


def outcome(result: WorkResult) -> str:
    """In words."""
    if result.is_killed:
        return "ran too long" if result.output == "timeout" else "noticed"
    return "NOT NOTICED"


def describe(mutant: WorkItem) -> str:
    """Where a mutant is and what it changes."""
    (mutation,) = mutant.mutations
    change = mutation.operator_name.removeprefix("core/")
    return f"{mutation.module_path}:{mutation.start_pos[0]}:{mutation.start_pos[1]} {change} {mutation.occurrence}"


if __name__ == "__main__":
    main()
