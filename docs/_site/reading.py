"""How Griffe, which the reference is read by, sees this repository."""

from __future__ import annotations

from typing import Any

import griffe


def with_examples(docstring: str) -> str:
    """The docstring with the title under which Griffe expects examples."""
    return docstring.replace("\nExample:\n", "\nExamples:\n")


class AsInstalled(griffe.Extension):
    """`samplers/` is the package `stepcache.samplers`, and `Example:` begins code."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        if pkg.path == "stepcache":
            loader.load("samplers", submodules=True)
            pkg.set_member("samplers", loader.modules_collection["samplers"])

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = with_examples(obj.docstring.value)
