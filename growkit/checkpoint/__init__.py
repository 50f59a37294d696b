"""growkit/checkpoint"""
