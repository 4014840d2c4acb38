"""Serves a ticket library: a fresh random ensemble for every image, on a public and an admin plane."""

import os

# With a folder inherited from another program, prometheus_client would keep the service's numbers in files there.
for _name in ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"):
    os.environ.pop(_name, None)
