"""The kinds of input that are fuzzed, each in `tests/fuzz/test_KIND.py`: how many in `make test`, and how many in `make fuzz`."""

SMOKE = {
    "checkpoints": 450, "arrays": 350, "lists": 500, "folders": 120, "genotypes": 300, "records": 42, "parameters": 138, "commands": 100,
}
FULL = {
    "checkpoints": 22_000, "arrays": 14_000, "lists": 20_000, "folders": 8_000, "genotypes": 20_000, "records": 3_000,
    "parameters": 10_000, "commands": 3_000,
}
TESTS = {"checkpoints": 1, "arrays": 1, "lists": 1, "folders": 1, "genotypes": 1, "records": 3, "parameters": 3, "commands": 1}  # in a file
