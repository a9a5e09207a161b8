"""Attention, positions, blocks, and models built from them: the encoder–decoder Transformer, GPT, BERT."""
