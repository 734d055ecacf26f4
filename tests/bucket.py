"""A stand-in for Google Cloud Storage on this machine: ``python tests/bucket.py PORT`` serves a bucket ``bucket``.

Whoever is to find it is started with :func:`environment`.
"""

import sys
import time

from gcp_storage_emulator.handlers import objects


def environment(port: int) -> dict[str, str]:
    """Variables by which gcsfs, TensorStore and Google's own client find the stand-in, and look for no credentials."""
    here = f"http://127.0.0.1:{port}"
    return {"STORAGE_EMULATOR_HOST": here, "TENSORSTORE_GCS_HTTP_URL": here, "NO_GCE_CHECK": "true"}


def _serve(port):
    download = objects.download

    def with_generation(request, response, storage, *args, **kwargs):
        """As the real one says which version of an object it is; TensorStore will not write without."""
        try:
            found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = found["generation"]
        except objects.NotFound:
            pass
        return download(request, response, storage, *args, **kwargs)

    objects.download = with_generation
    from gcp_storage_emulator.server import create_server  # after that, for it looks the handlers up

    create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket").start()
    while True:
        time.sleep(60)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
