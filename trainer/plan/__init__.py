"""trainer/plan"""
