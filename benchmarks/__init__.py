"""python -m benchmarks: this server over HTTP, its engine alone, and its peers, on one machine in one run."""
