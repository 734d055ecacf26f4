"""A local emulator of Google Cloud Storage: ``python tests/bucket.py PORT`` serves a bucket named ``bucket``.

Processes find it with the environment variables of :func:`make_environment`.
"""

import sys
import time

from gcp_storage_emulator.handlers import objects


def make_environment(port: int) -> dict[str, str]:
    """Returns variables that make gcsfs, TensorStore and Google's client use the emulator, without credentials."""
    url = f"http://127.0.0.1:{port}"
    return {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "NO_GCE_CHECK": "true"}


def _serve(port):
    download = objects.download

    def download_with_generation(request, response, storage, *args, **kwargs):
        """Adds the generation of an object, as the real service does; TensorStore does not write without it."""
        try:
            found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = found["generation"]
        except objects.NotFound:
            pass
        return download(request, response, storage, *args, **kwargs)

    objects.download = download_with_generation
    from gcp_storage_emulator.server import create_server  # only now, because it looks up the handlers when imported

    create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket").start()
    while True:
        time.sleep(60)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
