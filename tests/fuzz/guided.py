"""Coverage-guided fuzzing of one target: ``python tests/fuzz/guided.py TARGET [libFuzzer's options] CORPUS``.

The folder ``CORPUS`` starts with the target's seeds and collects inputs that reach new code. An input that breaks the
target stops the run, is written to ``-artifact_prefix``, and is printed as a line for targets.FOUND.
"""

import os
import pathlib
import sys
import tempfile

import atheris

sys.path[:0] = [str(pathlib.Path(__file__).parent.parent), str(pathlib.Path(__file__).parent.parent.parent)]
os.environ["JAX_PLATFORMS"] = "cpu"
with atheris.instrument_imports(include=["stf_jax", "PIL", "ml_collections", "absl.flags"]):
    from fuzz.targets import FOUND, SEEDS, TARGETS, WORDS

    import stf_jax.data.image


def main() -> None:
    """Runs until libFuzzer's limits are reached or the target breaks."""
    name, *options, corpus = sys.argv[1:]
    # Large images would make fuzzing slow.
    stf_jax.data.image.MAX_PIXELS = 2**20
    folder = pathlib.Path(corpus)
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate([*SEEDS[name], *FOUND[name]]):
        (folder / f"seed-{number}").write_bytes(seed)

    def run_target(data):
        try:
            TARGETS[name](data)
        except BaseException:
            print(f"{name} breaks with:\n    {data!r},", file=sys.stderr, flush=True)
            raise

    with tempfile.NamedTemporaryFile("w", suffix=".dict") as words:
        for word in WORDS[name]:
            words.write('"' + "".join(f"\\x{byte:02x}" for byte in word.encode()) + '"\n')
        words.flush()
        atheris.Setup([sys.argv[0], f"-dict={words.name}", *options, corpus], run_target)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
