"""trainer/run"""
