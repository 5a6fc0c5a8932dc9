"""Model folders, the Hugging Face Hub and StableHLO samplers."""
