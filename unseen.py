"""The package ``secure`` under a name that no other distribution has: ``unseen.connect`` is ``secure.connect``.

Importing it checks first that our packages are the ones that Python imports (``unseen_start``). ``python -m unseen`` is
the command ``unseen``.
"""

from typing import TYPE_CHECKING, Any

import unseen_start

if TYPE_CHECKING:
    from secure import *  # noqa: F403
    from secure import __all__ as __all__
elif __name__ == "__main__":
    unseen_start.main()
else:
    unseen_start.check()

    import secure

    __all__ = secure.__all__

    def __getattr__(name: str) -> Any:
        """Take a name from ``secure`` when it is first used, as some of them load gRPC."""
        return getattr(secure, name)

    def __dir__() -> list[str]:
        return dir(secure)
