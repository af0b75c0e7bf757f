"""The training loop that pretraining, fine-tuning and distillation share. Knows no stage."""
