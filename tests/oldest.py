"""Constraints for pip, used by `make test-oldest`: every run-time requirement of settings.ini at the oldest release that it allows."""
import configparser
import re
from pathlib import Path

SETTINGS = Path(__file__).resolve().parent.parent / "settings.ini"


def constraints() -> list[str]:
    "`torch>=2.11` becomes `torch==2.11.*`."
    config = configparser.ConfigParser(delimiters=["="], interpolation=None)
    config.read(SETTINGS, encoding="utf-8")
    requirements = config["DEFAULT"]["requirements"].split()
    return [re.sub(r"^([\w-]+)>=([\d.]+)$", r"\1==\2.*", requirement) for requirement in requirements]


if __name__ == "__main__":
    print("\n".join(constraints()))
