"""How docstrings are read for the reference: an Example is a block of code there."""

import re
from typing import Any

import griffe


class Sections(griffe.Extension):
    """Names the sections as griffe does, which knows "Examples" alone."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        del kwargs
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", text)
