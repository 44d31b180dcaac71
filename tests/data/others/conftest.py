"""Nothing here is a test: the scripts import what is not installed and take arguments."""

collect_ignore_glob = ["*.py"]
