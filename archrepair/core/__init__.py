"""The ground floor: errors, progress bars, tiers, where files lie, and pages of HTML."""
