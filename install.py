"""Run by A1111 and the Forge family when they start: installs this checkout, without its dependencies.

torch is there already, in the version the host needs. The installation is editable: updating the extension is enough.
"""

import json
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

HERE = Path(__file__).resolve().parent


def installed() -> bool:
    """Whether stepcache is installed from this folder."""
    sources = (found.read_text("direct_url.json") for found in distributions(name="stepcache"))
    return any(json.loads(source)["url"] == HERE.as_uri() for source in sources if source)


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
