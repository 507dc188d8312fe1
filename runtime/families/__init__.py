"""Model families: one folder each, with its conversation template, its tokenizer, and its positions.

A bundle's manifest names its family. ``positions`` turns text and images into what the decoder is fed: in mPLUG-Owl2 an
image is rows among the token rows. A family that feeds images to the decoder in another way (mPLUG-Owl3: as keys and
values of some layers) differs there, and in its engine's inputs.
"""
