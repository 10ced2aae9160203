"""The engine in a Python that has only some packages: what else is installed cannot be imported there."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

_CODE = '''
import importlib.metadata as metadata, json, sys
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

waiting, allowed = list(json.loads(sys.argv[1])), set()
while waiting:
    name = canonical(waiting.pop())
    if name not in allowed:
        allowed.add(name)
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                waiting.append(needed.name)
owners = metadata.packages_distributions()
refused = {module for module, names in owners.items() if not {canonical(n) for n in names} & allowed} - {"progidiff"}

class Without:
    """A finder that does not find the refused packages, neither their modules nor their metadata."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in refused else self.finder.find_spec(name, path, target)

    def find_distributions(self, *context):
        found = getattr(self.finder, "find_distributions", lambda *context: ())(*context)
        return (each for each in found if canonical(each.metadata["Name"] or "") in allowed)

sys.meta_path[:] = map(Without, sys.meta_path)
assert {"monai", "pytest"} <= refused, "nothing is refused, so this would show nothing"

sys.argv = ["progidiff", *sys.argv[2:]]
from progidiff.__main__ import main
main()
'''


def alone(packages: Sequence[str], *arguments: str) -> list[str]:
    """The command of ``progidiff`` with these packages and what they require; any other package is refused."""
    return [sys.executable, "-c", _CODE, json.dumps(list(packages)), *arguments]
