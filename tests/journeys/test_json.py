"""Every command can be read by a program."""
from typer.main import get_command

from archrepair.cli.app import app


def test_every_command_speaks_json():
    commands = get_command(app).commands
    assert {"train", "localize", "repair", "evaluate", "compare", "corrupt", "list", "run", "report"} <= commands.keys()
    assert not [name for name, one in commands.items() if not any("--json" in parameter.opts for parameter in one.params)]
