"""One folder for the first minutes on a real GPU: built here by `build.py`, run there by `run.sh`."""
