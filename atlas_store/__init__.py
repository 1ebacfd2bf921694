"""A store of annotated atlases: add one by one, read lazily, lose none."""
