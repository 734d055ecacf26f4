"""Coverage-guided fuzzing of one target: ``python tests/fuzz/guided.py TARGET [libFuzzer's options] CORPUS``.

New inputs that reach new code are kept in the folder ``CORPUS``, which is given the target's seeds first. An input that
breaks the target ends it, is written where ``-artifact_prefix`` says, and is printed as a line for targets.FOUND.
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
    """Runs until libFuzzer's options say that it is enough, or a target breaks."""
    name, *options, corpus = sys.argv[1:]
    # What a file may ask for is much for a fuzzer that wants to try many of them.
    stf_jax.data.image.MAX_PIXELS = 2**20
    folder = pathlib.Path(corpus)
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate([*SEEDS[name], *FOUND[name]]):
        (folder / f"seed-{number}").write_bytes(seed)

    def tried(data):
        try:
            TARGETS[name](data)
        except BaseException:
            print(f"{name} breaks with:\n    {data!r},", file=sys.stderr, flush=True)
            raise

    with tempfile.NamedTemporaryFile("w", suffix=".dict") as words:
        for word in WORDS[name]:
            words.write('"' + "".join(f"\\x{byte:02x}" for byte in word.encode()) + '"\n')
        words.flush()
        atheris.Setup([sys.argv[0], f"-dict={words.name}", *options, corpus], tried)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
