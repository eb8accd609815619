"""What pre-training and C-SFT share: InfoNCE (Eq. 5) and the gather across workers."""
