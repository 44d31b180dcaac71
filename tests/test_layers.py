"""Imports run one way."""

import ast

import pytest
from test_repository import MODULES

# Whom a module may import, of the package and of what costs a dependency.
LAYERS = {
    "_checks": set(),
    "_names": set(),
    "_interrupts": set(),
    "_writing": {"_interrupts"},
    "_leaves": set(),
    "_masks": {"_leaves", "_names"},
    "_betas": set(),
    "_decays": {"_betas", "_checks"},
    "_sums": set(),
    "_weights": {"_betas", "_checks", "_sums"},
    "_paths": {"_writing"},
    "_combining": {"_checks"},
    "_least_squares": set(),
    "_power_profiles": {"_checks", "_decays", "_least_squares"},
    "_profiles": {"_betas", "_checks", "_decays", "_sums", "_weights"},
    "posthoc": {
        "_betas",
        "_checks",
        "_combining",
        "_decays",
        "_least_squares",
        "_power_profiles",
        "_profiles",
        "_weights",
    },
    "_tracing": set(),
    "_conditional": {"_tracing"},
    "_rounding": {"_conditional", "_leaves"},
    "_sharding": {"_checks", "_conditional", "_leaves", "_masks", "_names"},
    "_states": set(),
    "_recursion": {
        "_betas",
        "_checks",
        "_conditional",
        "_leaves",
        "_masks",
        "_rounding",
        "_sharding",
        "_states",
    },
    "_averaging": {
        "_betas",
        "_checks",
        "_leaves",
        "_recursion",
        "_rounding",
        "_sharding",
    },
    "_commits": {"_checks", "_leaves", "_rounding"},
    "_asynchronous": {"_checks", "_commits", "_rounding", "_tracing"},
    "_collectives": {"_conditional", "_tracing"},
    "_workers": {"_collectives", "_conditional", "_leaves", "_tracing"},
    "_local_checks": {"_checks", "_commits", "_tracing"},
    "_exchange": {"_collectives", "_commits", "_local_checks", "_rounding", "_workers"},
    "_local_updates": {
        "_checks",
        "_collectives",
        "_commits",
        "_conditional",
        "_exchange",
        "_leaves",
        "_local_checks",
        "_rounding",
        "_states",
        "_tracing",
        "_workers",
    },
    "_local_options": {"_local_updates"},
    "_local_methods": {"_checks", "_local_options", "_local_updates"},
    "_nodes": {"_names", "_states"},
    "_reading": {"_checks", "_leaves", "_names", "_nodes", "_sharding", "_states"},
    "_restarting": {
        "_checks",
        "_leaves",
        "_names",
        "_nodes",
        "_reading",
        "_recursion",
        "_sharding",
        "_states",
    },
    "_local_loop": {
        "_checks",
        "_exchange",
        "_leaves",
        "_local_updates",
        "_nodes",
        "_reading",
        "_states",
        "_workers",
    },
    "_optimizer_states": {"_names", "_nodes"},
    "_places": {"_leaves", "_names", "_nodes", "_optimizer_states"},
    "batch_stats": {"_averaging", "_checks", "_decays", "_names"},
    "_swap": {"_checks", "_names", "_nodes", "_places", "_reading"},
    "checkpoint._average_names": {"_checks", "_masks", "_names", "checkpoint"},
    "checkpoint._record": {"_nodes", "_places"},
    "checkpoint._agreement": {"_names", "_nodes", "checkpoint._record"},
    "checkpoint._finished": {"checkpoint._record", "orbax"},
    "checkpoint._locating": {"_names", "_places"},
    "checkpoint._files": {
        "_names",
        "_nodes",
        "_places",
        "_writing",
        "checkpoint",
        "checkpoint._agreement",
        "checkpoint._finished",
        "checkpoint._locating",
    },
    "checkpoint._selecting": {
        "_names",
        "_nodes",
        "_paths",
        "_profiles",
        "checkpoint",
        "checkpoint._files",
    },
    "checkpoint._merging": {
        "_checks",
        "_combining",
        "_names",
        "checkpoint",
        "checkpoint._files",
        "checkpoint._selecting",
    },
    "checkpoint._combinations": {
        "_checks",
        "_paths",
        "_profiles",
        "checkpoint",
        "checkpoint._merging",
    },
    "checkpoint._describing": {
        "_checks",
        "_paths",
        "_profiles",
        "_weights",
        "checkpoint",
    },
    "checkpoint._exporting": {
        "_checks",
        "_paths",
        "_writing",
        "checkpoint",
        "checkpoint._merging",
        "checkpoint._selecting",
    },
    "checkpoint._handlers": {
        "_checks",
        "_places",
        "_swap",
        "checkpoint",
        "checkpoint._files",
        "orbax",
    },
    "checkpoint._synthesis": {
        "_checks",
        "_names",
        "_paths",
        "_profiles",
        "_weights",
        "checkpoint",
        "checkpoint._combinations",
        "checkpoint._merging",
        "posthoc",
    },
    "checkpoint.__init__": {
        "_checks",
        "_paths",
        "_places",
        "_swap",
        "_writing",
        "checkpoint",
        "checkpoint._average_names",
        "checkpoint._combinations",
        "checkpoint._describing",
        "checkpoint._exporting",
        "checkpoint._handlers",
        "checkpoint._synthesis",
        "orbax",
    },
    "checkpoint._arrays": {"orbax"},
    "checkpoint._checksums": {"_names"},
    "checkpoint._reading": {"checkpoint", "checkpoint._files", "orbax"},
    "checkpoint._units": {"_names", "_nodes", "checkpoint._files"},
    "checkpoint._worker_rows": {
        "_names",
        "_nodes",
        "_places",
        "checkpoint._arrays",
        "checkpoint._files",
        "checkpoint._locating",
    },
    "checkpoint._matching": {
        "_leaves",
        "_names",
        "_nodes",
        "_optimizer_states",
        "_places",
        "_states",
        "checkpoint._arrays",
        "checkpoint._files",
        "checkpoint._units",
        "checkpoint._worker_rows",
    },
    "checkpoint._restoring": {
        "_places",
        "_swap",
        "checkpoint",
        "checkpoint._files",
        "checkpoint._matching",
        "checkpoint._worker_rows",
    },
    "checkpoint._standing": {
        "_names",
        "_nodes",
        "_places",
        "checkpoint",
        "checkpoint._files",
        "checkpoint._locating",
    },
    "checkpoint._replacing": {"_interrupts", "_writing", "checkpoint"},
    "checkpoint._streaming": {"_writing", "checkpoint", "checkpoint._files", "orbax"},
    "checkpoint._trees": {
        "_names",
        "_nodes",
        "_places",
        "_swap",
        "checkpoint",
        "checkpoint._files",
        "orbax",
    },
    "tf1._constraint": {"_checks", "_leaves", "_rounding"},
    "tf1._gates": {"_checks"},
    "tf1._slots": {"_checks", "_leaves", "_names", "_nodes"},
    "tf1._rows": {"_masks", "tf1._slots"},
    "tf1._gradients": {"_checks", "_leaves", "_masks", "_names", "tf1._gates"},
    "tf1._optimizer": {
        "_checks",
        "_leaves",
        "_names",
        "tf1._gates",
        "tf1._gradients",
        "tf1._rows",
        "tf1._slots",
    },
    "tf1.__init__": {
        "tf1._constraint",
        "tf1._gates",
        "tf1._gradients",
        "tf1._optimizer",
        "tf1._slots",
    },
    "plots": {"_checks", "_names", "_paths", "_writing", "matplotlib"},
    "_terminal": {"rich", "typer"},
    "_commands": {"_interrupts", "_names", "_profiles", "_terminal", "typer"},
    "_options": {"_profiles", "_writing", "typer"},
    "_printing": {"_terminal", "_weights", "rich"},
    "cli": {"", "_commands", "_options", "_terminal", "demo", "rich", "typer"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.quick(1000)
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_imports_run_one_way(name):
    guarded = {"orbax", "flax", "matplotlib", "chex", "sklearn", "rich", "typer"}
    found = set()
    for module in imports(MODULES[name]):
        top, _, rest = module.partition(".")
        if top == "emaopt":
            found.add(rest)
        elif top in guarded:
            found.add(top)
    assert found == LAYERS[name]


def test_every_module_has_its_place():
    programs = {"__main__", "demo", "digits"}
    assert set(MODULES) - programs == {"__init__", *LAYERS}
