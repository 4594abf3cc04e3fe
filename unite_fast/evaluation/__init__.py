"""Evaluation of trained models: FID and other metrics, guidance search, gallery."""
