"""trainer/evaluate"""
