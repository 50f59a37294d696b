"""trainer/cli"""
