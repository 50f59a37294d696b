"""What growth saves on the user's own data: one model trained from scratch beside the same model grown, many ways."""
