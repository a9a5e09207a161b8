"""Attention, positions, blocks and the models built from them: the encoder–decoder Transformer, GPT and BERT."""
