"""trainer/log"""
