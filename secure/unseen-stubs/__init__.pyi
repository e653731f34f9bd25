"""Types of the module ``unseen``, which as a single file cannot have a py.typed (PEP 561)."""

from secure import *  # noqa: F403
from secure import __all__ as __all__
