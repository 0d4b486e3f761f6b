"""Ground floor: what more than one stage needs. Imports nothing from the stages."""
