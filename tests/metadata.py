"""Writes the files that say who, what and which version, from settings.ini and pyproject.toml: `python tests/metadata.py`.

CITATION.cff is written by hand but for its version; codemeta.json and .zenodo.json are made whole. A repository's address stands in all
three once settings.ini has a line `repository`.
"""
import configparser
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent


def facts() -> dict[str, Any]:
    "What the three files have in common."
    config = configparser.ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    settings, project = config["DEFAULT"], tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["preferred-citation"]
    keywords = [word.strip() for word in settings["keywords"].split(",")]
    return {"title": settings["lib_name"], "version": settings["version"], "abstract": project["description"],
            "license": project["license"], "authors": [settings["author"]], "keywords": keywords,
            "repository": settings.get("repository", ""), "python": settings["min_python"],
            "paper": {"title": cited["title"], "doi": cited["doi"]}}


def codemeta(known: dict[str, Any]) -> dict[str, Any]:
    "CodeMeta 3.0: what catalogues of software read."
    address = {"codeRepository": known["repository"]} if known["repository"] else {}
    paper = {"@type": "ScholarlyArticle", "name": known["paper"]["title"], "@id": f"https://doi.org/{known['paper']['doi']}"}
    return {"@context": "https://w3id.org/codemeta/3.0", "@type": "SoftwareSourceCode", "name": known["title"], "version": known["version"],
            "description": known["abstract"], "license": f"https://spdx.org/licenses/{known['license']}", **address,
            "author": [{"@type": "Organization", "name": name} for name in known["authors"]], "keywords": known["keywords"],
            "programmingLanguage": "Python", "runtimePlatform": f"Python {known['python']} and newer", "referencePublication": paper}


def zenodo(known: dict[str, Any]) -> dict[str, Any]:
    "What Zenodo reads when a release is archived."
    related = [{"identifier": known["paper"]["doi"], "relation": "references", "scheme": "doi",
                "resource_type": "publication-article"}]
    if known["repository"]:
        related.append({"identifier": known["repository"], "relation": "isSupplementTo", "scheme": "url"})
    return {"title": known["title"], "version": known["version"], "description": known["abstract"], "license": known["license"],
            "creators": [{"name": name} for name in known["authors"]], "keywords": known["keywords"], "upload_type": "software",
            "access_right": "open", "related_identifiers": related}


def citation(known: dict[str, Any]) -> str:
    "CITATION.cff with the version, and the address, of the settings."
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    text = re.sub(r"(?m)^repository-code: .*\n", "", text)
    address = f"\nrepository-code: {known['repository']}" if known["repository"] else ""
    return re.sub(r"(?m)^version: .*$", f"version: {known['version']}{address}", text)


def files() -> dict[str, str]:
    "The three files by name."
    known = facts()
    as_json = lambda content: json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return {"codemeta.json": as_json(codemeta(known)), ".zenodo.json": as_json(zenodo(known)), "CITATION.cff": citation(known)}


if __name__ == "__main__":
    for name, content in files().items():
        (ROOT / name).write_text(content, encoding="utf-8")
