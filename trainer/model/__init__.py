"""trainer/model"""
