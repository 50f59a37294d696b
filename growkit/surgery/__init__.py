"""growkit/surgery"""
