"""The method: localize the block, search it, fine-tune it, and judge the outcome."""
