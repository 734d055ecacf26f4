"""Fuzz tests of all external input: no crash, no hang, consistent results."""

import datetime
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest
from fuzz.targets import FOUND, SEEDS, TARGETS, WORDS
from hypothesis import given, settings
from hypothesis import strategies as st

import stf_jax.data.image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::DeprecationWarning")

GUIDED = pathlib.Path(__file__).parent / "guided.py"
SECONDS = 60  # per target, with coverage guidance
EXAMPLES = {"annotations": 800, "image": 600, "image_path": 600, "scoring": 800, "benchmark": 800}  # default: 200


VALUE = re.compile(rb'"[^"\x1e\n]*"|[0-9]+|\[[^][{}\x1e]*\]|\{[^][{}\x1e]*\}')  # an innermost JSON value
REPLACEMENTS = (
    b"null",
    b"true",
    b"-1",
    b"1.5",
    b'""',
    b'"x"',
    b'"\\ud800"',
    b"[]",
    b"{}",
    b"[null]",
    b"[1]",
    b'{"": 0}',
)


def make_inputs(name):
    """Generates a target's seeds with bytes overwritten or values exchanged, and inputs made of its words."""
    words = st.sampled_from([word.encode() for word in WORDS[name]])
    pieces = st.one_of(words, st.text(max_size=8).map(str.encode), st.binary(max_size=8))
    edits = st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 40), pieces), max_size=4)
    edited = st.builds(_apply_edits, st.sampled_from(SEEDS[name]), edits)
    exchanges = st.lists(st.tuples(st.integers(0, 400), st.sampled_from(REPLACEMENTS)), min_size=1, max_size=3)
    exchanged = st.builds(_exchange_values, st.sampled_from(SEEDS[name]), exchanges)
    return st.one_of(edited, exchanged, st.lists(pieces, max_size=30).map(b"".join))


def _apply_edits(data, edits):
    for place, length, piece in edits:
        place %= len(data) + 1
        data = data[:place] + piece + data[place + length :]
    return data


def _exchange_values(data, exchanges):
    for place, replacement in exchanges:
        if found := list(VALUE.finditer(data)):
            begin, end = found[place % len(found)].span()
            data = data[:begin] + replacement + data[end:]
    return data


@pytest.fixture(scope="module", autouse=True)
def _limit_image_size():
    """Limits the size of images, which would make the tests slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stf_jax.data.image, "MAX_PIXELS", 2**20)
        yield


@pytest.mark.parametrize("name", TARGETS)
def test_any_input(name):
    seconds = datetime.timedelta(seconds=30)  # detects hangs

    @settings(max_examples=EXAMPLES.get(name, 200), deadline=seconds)
    @given(make_inputs(name))
    def run(data):
        TARGETS[name](data)

    run()


@pytest.mark.parametrize("name", TARGETS)
def test_known_inputs(name, subtests):
    for number, data in enumerate([*SEEDS[name], *FOUND[name]]):
        with subtests.test(number=number, data=data):
            TARGETS[name](data)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_guided_by_coverage(name, tmp_path):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: requirements-dev.txt has it for Linux on x86-64")
    options = [f"-max_total_time={SECONDS}", "-timeout=20", "-rss_limit_mb=4096", f"-artifact_prefix={tmp_path}/"]
    command = [sys.executable, str(GUIDED), name, *options, "-print_final_stats=1", str(tmp_path / "corpus")]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10 * SECONDS)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-8000:]
    executed = re.search(r"number_of_executed_units: (\d+)", run.stderr)
    assert executed is not None
    print(f"{name}: {executed[1]} inputs in {SECONDS} s")
    assert int(executed[1]) > 200
