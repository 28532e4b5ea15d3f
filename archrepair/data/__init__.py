"""What a repair sees and is judged on: data sets, files of one's own, archives, failures, scenarios."""
