"""Mutation testing: changes one operator or constant at a time and checks that a test fails. Needs Python 3.12.

    python tests/mutate.py map --out=DIR                    # run the suite once; note which test runs which line
    python tests/mutate.py run --out=DIR --count=300        # sample mutants, run the tests of their lines
    python tests/mutate.py report --out=DIR                 # the share of killed mutants, and the survivors

``run`` resumes after an interruption. A mutant is killed if one of the tests that execute its line fails, hangs or
cannot be collected. Lines that only other processes execute are left out.
"""

import argparse
import ast
import collections
import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGETS = ("stf_jax/models", "stf_jax/training", "stf_jax/data", "stf_jax/checkpointing")
# Of the tests that run a line, the fastest ones, so many that they took this long for the map.
SECONDS = 60
SLOWER = 6  # a mutant's tests hang if they take so many times longer
_SWAPS: dict[type, str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.In: "not in", ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is",
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*", ast.Pow: "*",
    ast.And: "or", ast.Or: "and", ast.BitAnd: "|", ast.BitOr: "&",
}  # fmt: skip


# ---- The map, as a plugin of pytest ----------------------------------------------------------------------------------


class LineMap:
    """Notes the lines of the targets that each test executes first in its process."""

    def __init__(self, file: pathlib.Path) -> None:
        self.file, self.lines, self.package = file, set(), f"{ROOT}{os.sep}stf_jax"
        self.seconds = 0.0  # of setup, call and teardown
        events = sys.monitoring
        events.use_tool_id(events.COVERAGE_ID, "mutate")
        events.register_callback(events.COVERAGE_ID, events.events.LINE, self._note)
        events.set_events(events.COVERAGE_ID, events.events.LINE)

    def _note(self, code, line):
        if code.co_filename.startswith(self.package):
            self.lines.add((code.co_filename[len(self.package) - len("stf_jax") :], line))
        return sys.monitoring.DISABLE

    def pytest_runtest_logreport(self, report):
        self.seconds += report.duration
        if report.when == "teardown":
            note = {"test": report.nodeid, "seconds": round(self.seconds, 2), "lines": sorted(self.lines)}
            self.seconds = 0.0
            with self.file.open("a") as out:
                out.write(json.dumps(note) + "\n")
            self.lines.clear()
            sys.monitoring.restart_events()


def pytest_configure(config):
    """Starts the map in each worker."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker and (out := os.environ.get("MUTATE_MAP")):
        config.pluginmanager.register(LineMap(pathlib.Path(out, f"lines-{worker}.jsonl")))


# ---- Mutants ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A change of ``file``: the characters from ``begin`` to ``end`` become ``new``."""

    file: str
    line: int
    in_decorator: bool  # like ``frozen=True``, which changes nothing that a program does
    begin: int
    end: int
    old: str
    new: str


def find_mutants(file: pathlib.Path) -> Iterator[Mutant]:
    """Yields the mutants of a file: comparisons, arithmetic, logic, numbers and truth values."""
    source = file.read_text()
    starts = [0]
    for text in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(text))
    data = source.encode()
    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    decorated = {decorator.lineno for node in classes for decorator in node.decorator_list}

    def place(node: ast.AST, end: bool = False) -> int:
        return starts[(node.end_lineno if end else node.lineno) - 1] + (node.end_col_offset if end else node.col_offset)

    def change(node: ast.AST, begin: int, end: int, new: str) -> Mutant:
        name = str(file.relative_to(ROOT))
        return Mutant(name, node.lineno, node.lineno in decorated, begin, end, data[begin:end].decode(), new)

    def swap(node: ast.AST, left: ast.AST, right: ast.AST, operator: ast.AST) -> Iterator[Mutant]:
        mutant = change(node, place(left, end=True), place(right), f" {_SWAPS.get(type(operator))} ")
        if type(operator) in _SWAPS and not re.search(r"[()\[\]\n]", mutant.old):
            yield mutant

    for node in _walk_code(ast.parse(source)):
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            yield from swap(node, node.left, node.comparators[0], node.ops[0])
        elif isinstance(node, ast.BinOp):
            yield from swap(node, node.left, node.right, node.op)
        elif isinstance(node, ast.BoolOp):
            yield from swap(node, node.values[0], node.values[1], node.op)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield change(node, place(node), place(node) + len("not "), "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield change(node, place(node), place(node, True), str(not node.value))
        elif isinstance(node, ast.Constant) and isinstance(node.value, int):
            yield change(node, place(node), place(node, True), str(node.value + 1))
        elif isinstance(node, ast.Constant) and isinstance(node.value, float):
            yield change(node, place(node), place(node, True), str(node.value * 2 or 1.0))


def _walk_code(tree: ast.AST) -> Iterator[ast.AST]:
    """Walks what is executed: no annotations, messages of errors or branches for type checkers."""
    skipped = {"annotation", "returns"}
    if isinstance(tree, ast.Raise | ast.Assert | ast.JoinedStr):
        return
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.dump(tree.test):
        return
    yield tree
    for name, value in ast.iter_fields(tree):
        if name not in skipped:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _walk_code(child)


# ---- The commands ----------------------------------------------------------------------------------------------------


def make_map(out: pathlib.Path) -> None:
    """Runs the suite once, and writes which test executes which line."""
    for file in out.glob("lines-*.jsonl"):
        file.unlink()
    environment = {**os.environ, "MUTATE_MAP": str(out), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    subprocess.run([sys.executable, "-m", "pytest", "-p", "mutate"], cwd=ROOT, env=environment, check=False)


def _read_map(out: pathlib.Path) -> dict[tuple[str, int], list[str]]:
    """Returns the tests of each line: those that execute it, then others of its file, the fastest first.

    A line that runs at import belongs to the first test of a process only, so the others are needed.
    """
    tests, of_file = collections.defaultdict(set), collections.defaultdict(set)
    for file in out.glob("lines-*.jsonl"):
        for line in file.read_text().splitlines():
            note = json.loads(line)
            for name, number in note["lines"]:
                tests[name, number].add((note["seconds"], note["test"]))
                of_file[name].add((note["seconds"], note["test"]))
    chosen: dict[tuple[str, int], list[str]] = {}
    for key, found in tests.items():
        ordered = sorted(found) + sorted(of_file[key[0]] - found)
        total = itertools.accumulate(seconds for seconds, _ in ordered)
        chosen[key] = [
            test for (_, test), end in zip(ordered, total, strict=True) if end < SECONDS or test == ordered[0][1]
        ]
    return chosen


def sample(out: pathlib.Path, count: int) -> list[Mutant]:
    """Returns ``count`` mutants on lines that tests execute, evenly over all of them; the same each time."""
    lines = _read_map(out)
    files = sorted({file for target in TARGETS for file in ROOT.glob(f"{target}/**/*.py")})
    mutants = [mutant for file in files for mutant in find_mutants(file) if (mutant.file, mutant.line) in lines]
    print(f"{len(mutants)} mutants in {len(files)} files")
    return random.Random(0).sample(mutants, min(count, len(mutants)))


def run(out: pathlib.Path, count: int, workers: int) -> None:
    """Runs the tests of each sampled mutant in a copy of the project; appends to ``results.jsonl``."""
    results = out / "results.jsonl"
    known = {json.loads(line)["number"] for line in results.read_text().splitlines()} if results.exists() else set()
    lines, mutants = _read_map(out), sample(out, count)
    folders = [out / f"copy-{i}" for i in range(workers)]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in ("configs", "docs", "examples", "launch", "stf_jax", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for file in (file for file in ROOT.iterdir() if file.is_file()):
            shutil.copy(file, folder)

    def work(worker: int) -> None:
        for number in range(worker, len(mutants), workers):
            mutant = mutants[number]
            if number not in known and not mutant.in_decorator:
                status = try_mutant(folders[worker], mutant, lines[mutant.file, mutant.line])
                note = {"number": number, **dataclasses.asdict(mutant), "status": status}
                with results.open("a") as file:
                    file.write(json.dumps(note) + "\n")
                print(f"{number} {status}: {mutant.file}:{mutant.line} {mutant.old!r} -> {mutant.new!r}", flush=True)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))


def try_mutant(folder: pathlib.Path, mutant: Mutant, tests: list[str]) -> str:
    """Returns ``killed``, ``survived`` or ``timeout``."""
    file = folder / mutant.file
    source = file.read_bytes()
    file.write_bytes(source[: mutant.begin] + mutant.new.encode() + source[mutant.end :])
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{folder / 'tests'}"}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", *tests]
    try:
        process = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, timeout=60 + SLOWER * SECONDS, check=False
        )
        return "survived" if process.returncode == 0 else "killed"
    except subprocess.TimeoutExpired:
        return "timeout"
    finally:
        file.write_bytes(source)


def report(out: pathlib.Path) -> None:
    """Prints a table by folder, and the survivors."""
    notes = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    notes = [note for note in notes if not note["in_decorator"]]
    groups = collections.defaultdict(collections.Counter)
    for note in notes:
        groups[str(pathlib.Path(note["file"]).parent)][note["status"] != "survived"] += 1
        groups["all"][note["status"] != "survived"] += 1
    print("| code | mutants | killed |\n|---|--:|--:|")
    for name, counts in sorted(groups.items()):
        print(f"| `{name}` | {counts.total()} | {100 * counts[True] / counts.total():.0f} % |")
    for note in sorted(notes, key=lambda note: (note["file"], note["line"])):
        if note["status"] == "survived":
            print(f"{note['file']}:{note['line']}: {note['old'].strip()} -> {note['new'].strip()}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["map", "run", "report"])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the map and the results")
    parser.add_argument("--count", type=int, default=300, help="number of mutants")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    arguments = parser.parse_args()
    if arguments.command == "map" and sys.version_info < (3, 12):
        parser.error("map needs Python 3.12")
    if arguments.command == "run" and not any(arguments.out.glob("lines-*.jsonl")):
        parser.error(f"{arguments.out} has no map: run `python tests/mutate.py map` first")
    if arguments.command == "report" and not (arguments.out / "results.jsonl").exists():
        parser.error(f"{arguments.out} has no results: run `python tests/mutate.py run` first")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.command == "map":
        make_map(arguments.out)
    elif arguments.command == "run":
        run(arguments.out, arguments.count, arguments.workers)
    else:
        report(arguments.out)


if __name__ == "__main__":
    main()
