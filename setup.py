"""Reads settings.ini, so that version, requirements and extras are said in one place."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=["="], interpolation=None)
config.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
settings = config["DEFAULT"]


def lines(key: str) -> list[str]:
    "The non-empty lines of a multi-line setting."
    return [line.strip() for line in settings.get(key, "").splitlines() if line.strip()]


class BuildPy(build_py):
    "Leaves out `_modidx.py`, the index that nbdev writes into the package for its own tools."

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [module for module in super().find_package_modules(package, package_dir) if module[1] != "_modidx"]


setup(
    version=settings["version"],
    packages=find_packages(include=["archrepair", "archrepair.*"]),
    package_data={"archrepair": ["py.typed"]},
    cmdclass={"build_py": BuildPy},
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
