"""The kinds of input that are fuzzed, each in `tests/fuzz/test_KIND.py`: how many in `make test`, and how many of `make fuzz`."""

SMOKE = {
    "checkpoints": 300,
    "arrays": 250,
    "lists": 350,
    "folders": 200,
    "genotypes": 300,
    "records": 150,
    "parameters": 250,
    "commands": 200,
}
FULL = {
    "checkpoints": 22_000,
    "arrays": 14_000,
    "lists": 20_000,
    "folders": 8_000,
    "genotypes": 20_000,
    "records": 3_000,
    "parameters": 10_000,
    "commands": 3_000,
}
TESTS = {"checkpoints": 1, "lists": 1, "records": 3, "parameters": 3, "arrays": 1, "folders": 1, "genotypes": 1, "commands": 1}  # in a file
