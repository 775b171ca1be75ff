"""A small world, a model that draws it, concepts that are new to it, and a judge of the lot."""
