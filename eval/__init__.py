"""Stage 3: original, abliterated and healed model on the same items, and the release made of what they show."""
