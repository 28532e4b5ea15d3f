"""Reads settings.ini, so that version, requirements and extras are said in one place."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="], interpolation=None)
config.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
settings = config["DEFAULT"]


def lines(key: str) -> list[str]:
    "The non-empty lines of a multi-line setting."
    return [line.strip() for line in settings.get(key, "").splitlines() if line.strip()]


setup(
    version=settings["version"],
    packages=find_packages(include=["archrepair", "archrepair.*"]),
    package_data={"archrepair": ["py.typed"]},
    python_requires=f">={settings['min_python']}",
    install_requires=lines("requirements"),
    extras_require={key.removesuffix("_requirements"): lines(key) for key in settings if key.endswith("_requirements")},
    entry_points={
        "console_scripts": lines("console_scripts"),
        # papermill imports its engine entry points before it reads its arguments: see nbs/paper/07_launcher.ipynb.
        "papermill.engine": ["archrepair=archrepair.paper.launcher:ArchrepairEngine"],
    },
    zip_safe=False,
)
