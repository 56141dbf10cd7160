"""The laws of the library, one per file: mathematics only.

Uses `laws`, and nothing else of the library.
Every module in here is imported, so that it registers its law: a new file needs no other change.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
