"""Stage one: find the direction that carries refusal, and remove it from the weights."""
