"""Run by A1111, Forge, reForge and Forge Classic when they start: installs this checkout, without its dependencies.

torch is there already, in the version the host needs. The installation is editable: updating the extension is enough.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def installed() -> bool:
    """Whether `import stepcache` finds this checkout."""
    found = importlib.util.find_spec("stepcache")
    return found is not None and found.origin is not None and HERE in Path(found.origin).resolve().parents


def main() -> None:
    if installed():
        return
    command = f'install --no-deps --editable "{HERE}"'
    try:
        import launch
    except ImportError:
        subprocess.check_call([sys.executable, "-m", "pip", "install", "--no-deps", "--editable", str(HERE)])
    else:
        launch.run_pip(command, "stepcache")


main()
