"""Keep pytest from importing the scripts here, which need TensorFlow."""

collect_ignore_glob = ["*.py"]
