"""Keep pytest from importing the script here, which needs PyTorch and two checkouts."""

collect_ignore_glob = ["*.py"]
