"""The evaluation as one HTML page: what results.json says, what training and the edit looked like, and what flipped."""
