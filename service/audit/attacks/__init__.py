"""One attack a file. Each takes a target and labelled images and returns images inside the threat model."""
