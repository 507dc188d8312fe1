"""mPLUG-Owl2 and the models of its architecture."""
