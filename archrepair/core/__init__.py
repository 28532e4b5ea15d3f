"""The ground floor: errors, progress bars, tiers, where files are, the registry of names, and pages of HTML."""
