"""The sandbox world: a guild town with a potion shop, on which the whole method runs with no download.

The oracle (:mod:`reprdpo.data.sandbox.oracle`) is left out on purpose: evaluation alone may read it.
"""

from reprdpo.data.sandbox.build import Sandbox, load_sandbox
from reprdpo.data.sandbox.world import SandboxWorld, build_world

__all__ = ["Sandbox", "SandboxWorld", "build_world", "load_sandbox"]
