"""What leaves the package: files for other runtimes, model cards, footprints, reports."""
