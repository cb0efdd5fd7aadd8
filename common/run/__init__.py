"""What makes a run: the loop around a recipe, its folder, metrics, pictures, export."""
