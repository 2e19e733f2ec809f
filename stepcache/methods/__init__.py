"""Methods: gate, criterion and predictor under a published name. One file a method; `base` says what a method is.

Every file in this folder is imported, and what it registers appears in the command line, the bench, ComfyUI, the web
UIs and the documentation. To add a method from a paper, add its file.
"""

from importlib import import_module
from pkgutil import iter_modules

from .base import CommonOptions, Method
from .registry import METHODS, accepted_options, main_number, method, register

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

FIRST, LAST = "forecast", "none"
for _name in sorted(METHODS, key=lambda name: (name != FIRST, name == LAST, name)):
    METHODS[_name] = METHODS.pop(_name)

__all__ = ["METHODS", "CommonOptions", "Method", "accepted_options", "main_number", "method", "register"]
