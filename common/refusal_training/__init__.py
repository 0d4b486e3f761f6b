"""How the learned part of common/refusal is made: a grammar of answers, and the training of the classifier on them."""
