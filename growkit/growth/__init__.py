"""growkit/growth"""
