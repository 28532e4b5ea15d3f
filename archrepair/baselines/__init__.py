"""The methods of others, and controls, under the same call as ArchRepair."""
