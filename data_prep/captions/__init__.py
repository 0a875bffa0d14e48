"""Captions of rendered clips in words, without figures: what a small base model is trained on."""
