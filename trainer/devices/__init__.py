"""trainer/devices"""
